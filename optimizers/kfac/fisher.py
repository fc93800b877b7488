"""The Fisher information: the loss's likelihood, and a function f that samples it.

A loss h is read as a mean of negative log-likelihoods, h = Σ_t c_t ℓ_t, where t runs
over the examples and the positions of outputs, and c_t holds all that stands before:
1 / (number of terms), sample weights, the output's mask, the loss's weight, and what
the loss averages over the last axis. The curvature of h is Σ_t c_t E[∇ℓ_t ∇ℓ_tᵀ] with
labels drawn from the model. So the derivatives of

    f = Σ_t √c_t ℓ_t

are such that their squares, summed over examples, are the curvature of h itself: this
is the one place where a mean's 1/N comes in.
"""

import math

import keras
from keras import ops
from keras.src.backend import get_keras_mask

from ...layers.ops import random

REDUCTIONS = ("sum", "mean", "sum_over_batch_size", "mean_with_sample_weight")
KINDS = ("sampled", "empirical", "exact")
_LIKELIHOODS = {}


def register_likelihood(*losses):
    """Decorates the `Likelihood` of losses, so that KFAC knows their curvature.

    Args:
        *losses: Classes of losses, of which each has its own likelihood whatever it
            derives from, and functions that are losses.

    Raises:
        ValueError: If there is none, or one is no function or class.

    Example:

    Half the squared error, summed and not averaged over outputs:

    >>> from keras import ops
    >>> from kzoo.optimizers import Gaussian, register_likelihood
    >>> def half_squared_error(y_true, y_pred):
    ...     return 0.5 * ops.sum(ops.square(y_true - y_pred), axis=-1)
    >>> @register_likelihood(half_squared_error)
    ... class StandardNormal(Gaussian):
    ...     def share(self, size):
    ...         return 1.0
    """
    if not losses or not all(callable(loss) for loss in losses):
        raise ValueError(
            f"expected classes of losses, or functions. Received: {list(losses)}"
        )

    def register(likelihood):
        _LIKELIHOODS.update(dict.fromkeys(losses, likelihood))
        return likelihood

    return register


class Likelihood:
    """What a loss says of the distribution p(y | outputs) that a model predicts.

    A loss is a mean of negative log-likelihoods ℓ = -log p(y | outputs), or of a share
    of them. KFAC needs ℓ as a function of the outputs of one position, whose
    distribution is along the last axis; labels drawn from p; and for the exact
    curvature functions r_c with the Fisher information E[∇ℓ ∇ℓᵀ] = Σ_c ∇r_c ∇r_cᵀ.

    Args:
        from_logits: The loss's own argument, or False.
    """

    def __init__(self, from_logits=False):
        self.from_logits = from_logits

    def loss(self, labels, outputs):
        """Returns ℓ, of labels as the loss takes them or as drawn.

        Args:
            labels: Tensor.
            outputs: Tensor `[..., C]`, float32 or float64.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `loss`")

    def draw(self, outputs, seed):
        """Returns labels drawn from the model.

        Args:
            outputs: As above.
            seed: Pair of integers for `kzoo.layers.ops.random`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no `draw`, which labels from the model need"
        )

    def roots(self, outputs):
        """Returns r, `[..., C]`, of which factors may be `ops.stop_gradient`'s."""
        raise NotImplementedError(
            f"{type(self).__name__} has no `roots`, which the exact curvature needs"
        )

    def share(self, size):
        """Returns what the loss of one position is as a part of ℓ.

        Args:
            size: The size of the outputs' last axis.
        """
        return 1.0


@register_likelihood(
    keras.losses.CategoricalCrossentropy,
    keras.losses.categorical_crossentropy,
    keras.losses.SparseCategoricalCrossentropy,
    keras.losses.sparse_categorical_crossentropy,
)
class Categorical(Likelihood):
    """One of C classes, with the softmax of logits or with probabilities."""

    def log_probabilities(self, outputs):
        """Returns the logarithms of the classes' probabilities."""
        if self.from_logits:
            return ops.log_softmax(outputs, axis=-1)
        outputs = outputs / ops.sum(outputs, axis=-1, keepdims=True)
        return ops.log(ops.maximum(outputs, keras.config.epsilon()))

    def loss(self, labels, outputs):
        """Returns ℓ, of labels that are one-hot or classes."""
        log_p = self.log_probabilities(outputs)
        if len(labels.shape) == len(outputs.shape) and labels.shape[-1] == 1:
            labels = labels[..., 0] if outputs.shape[-1] != 1 else labels
        if len(labels.shape) < len(outputs.shape):
            labels = ops.one_hot(ops.cast(labels, "int32"), outputs.shape[-1])
        return -ops.sum(ops.cast(labels, log_p.dtype) * log_p, axis=-1)

    def draw(self, outputs, seed):
        """Returns labels drawn from the model, as classes."""
        p = ops.exp(self.log_probabilities(outputs))
        u = random.uniform(ops.shape(p)[:-1], seed, "float32")
        # The first class whose distribution function is above u.
        below = ops.cast(ops.cumsum(p, axis=-1), "float32") <= u[..., None]
        drawn = ops.sum(ops.cast(below, "int32"), axis=-1)
        return ops.minimum(drawn, p.shape[-1] - 1)

    def roots(self, outputs):
        """Returns functions r, `[..., C]`, with the Fisher information Σ_c ∇r_c ∇r_cᵀ.

        What of them depends on outputs only as a factor is not differentiated.
        """
        # diag(p) - p pᵀ = Σ_c p_c ∇ℓ(c) ∇ℓ(c)ᵀ, ℓ(c) = -log p_c.
        log_p = self.log_probabilities(outputs)
        return -ops.exp(0.5 * ops.stop_gradient(log_p)) * log_p


@register_likelihood(keras.losses.BinaryCrossentropy, keras.losses.binary_crossentropy)
class Bernoulli(Likelihood):
    """D independent events, with logits or probabilities; Keras averages over them."""

    def logits(self, outputs):
        """Returns the logits of outputs."""
        if self.from_logits:
            return outputs
        epsilon = keras.config.epsilon()
        outputs = ops.clip(outputs, epsilon, 1 - epsilon)
        return ops.log(outputs) - ops.log1p(-outputs)

    def loss(self, labels, outputs):
        """Returns ℓ, summed over the last axis."""
        z = self.logits(outputs)
        labels = ops.reshape(ops.cast(labels, z.dtype), ops.shape(z))
        return ops.sum(ops.softplus(z) - labels * z, axis=-1)

    def draw(self, outputs, seed):
        """Returns labels drawn from the model."""
        p = ops.sigmoid(self.logits(outputs))
        return random.bernoulli(ops.shape(p), seed, p, "float32")

    def roots(self, outputs):
        """Returns functions whose squared gradients sum to the Fisher information."""
        z = self.logits(outputs)
        p = ops.stop_gradient(ops.sigmoid(z))
        return ops.sqrt(p * (1 - p)) * z

    def share(self, size):
        """Returns the part of ℓ that the loss of one position is."""
        return 1.0 / size


@register_likelihood(keras.losses.MeanSquaredError, keras.losses.mean_squared_error)
class Gaussian(Likelihood):
    """D normal numbers with variance 1 around the outputs: ℓ = |y - ŷ|² / 2.

    Keras's mean squared error averages |y - ŷ|² over the last axis: it is 2/D ℓ.
    """

    def loss(self, labels, outputs):
        """Returns ℓ, summed over the last axis."""
        labels = ops.reshape(ops.cast(labels, outputs.dtype), ops.shape(outputs))
        return 0.5 * ops.sum(ops.square(labels - outputs), axis=-1)

    def draw(self, outputs, seed):
        """Returns labels drawn from the model."""
        return outputs + random.normal(ops.shape(outputs), seed, outputs.dtype)

    def roots(self, outputs):
        """Returns functions whose squared gradients sum to the Fisher information."""
        return outputs

    def share(self, size):
        """Returns the part of ℓ that the loss of one position is."""
        return 2.0 / size


class Term:
    """The likelihood of one output, and how the loss weighs it.

    Args:
        loss: A Keras loss, or its name.
        weight: The loss's weight.
    """

    def __init__(self, loss, weight=None):
        found = keras.losses.get(loss)
        is_loss = isinstance(found, keras.losses.Loss)
        config = found.get_config() if is_loss else {}
        known = _LIKELIHOODS.get(type(found) if is_loss else found)
        if known is None:
            names = sorted(thing.__name__ for thing in _LIKELIHOODS)
            raise ValueError(
                f"expected a loss whose likelihood is known, one of {names}, or one of "
                f"your own with `register_likelihood`. Received: loss={loss!r}"
            )
        if config.get("axis", -1) != -1:
            raise ValueError(
                f"expected a loss along the last axis. Received: axis={config['axis']}"
            )
        self.reduction = config.get("reduction", "sum_over_batch_size")
        if self.reduction not in REDUCTIONS:
            raise ValueError(
                f"expected a loss with a reduction, one of {REDUCTIONS}. Received: "
                f"reduction={self.reduction!r}"
            )
        if config.get("ignore_class") is not None:
            raise ValueError(
                "expected a loss that leaves out positions by a mask or by sample "
                f"weights. Received: ignore_class={config['ignore_class']}"
            )
        self.likelihood = known(config.get("from_logits", False))
        self.weight = 1.0 if weight is None else float(weight)

    def f(self, kind, outputs, labels, sample_weight, seed, fraction=1.0):
        """Returns Σ_t √c_t ℓ_t of this output.

        Args:
            kind: One of `KINDS`.
            outputs: The model's output; for `"exact"`, of C copies of the batch.
            labels: The labels, which only `"empirical"` reads.
            sample_weight: Weights of the examples, or None.
            seed: Pair of integers.
            fraction: Which part of the batch's examples these are.
        """
        mask, size = get_keras_mask(outputs), outputs.shape[-1]
        outputs = _wide(outputs)
        if kind == "exact":
            if mask is not None:
                mask = ops.reshape(mask, (size, -1, *ops.shape(mask)[1:]))[0]
            outputs = ops.reshape(outputs, (size, -1, *ops.shape(outputs)[1:]))
            ones = (1,) * (len(outputs.shape) - 2)
            index = ops.reshape(ops.eye(size, dtype=outputs.dtype), (size, *ones, size))
            losses = ops.sum(index * self.likelihood.roots(outputs), axis=-1)
            terms = ops.shape(losses)[1:]
        else:
            if kind == "sampled":
                labels = self.likelihood.draw(ops.stop_gradient(outputs), seed)
            losses = self.likelihood.loss(ops.convert_to_tensor(labels), outputs)
            terms = ops.shape(losses)
        if kind != "sampled":
            # For what sums over examples before it squares.
            losses = losses * random.random_sign(ops.shape(losses), seed, losses.dtype)
        weights = mask, sample_weight
        return ops.sum(
            losses * self._root(terms, size, weights, fraction, losses.dtype)
        )

    def roots(self, outputs, sample_weight, fraction=1.0):
        """Returns functions r, `[..., C]`, with this output's curvature Σ ∇r ∇rᵀ.

        Args:
            outputs: The model's output.
            sample_weight: Weights of the examples, or None.
            fraction: Which part of the batch's examples these are.
        """
        weights = get_keras_mask(outputs), sample_weight
        r = self.likelihood.roots(_wide(outputs))
        *terms, size = ops.shape(r)
        return self._root(terms, size, weights, fraction, r.dtype)[..., None] * r

    def _root(self, terms, size, weights, fraction, dtype):
        """Returns √c_t, of as many axes as there are `terms`, or a scalar.

        The loss is reduced as Keras does it: what a mask leaves out is not counted
        either.
        """
        c = ops.cast(self.weight * self.likelihood.share(size), dtype)
        mask, sample_weight = (
            None if w is None else _of_axes(ops.cast(w, dtype), terms) for w in weights
        )
        given = [w for w in (mask, sample_weight) if w is not None]
        product = math.prod(given[1:], start=given[0]) if given else None
        if self.reduction == "sum":
            c = c / ops.cast(fraction, dtype)
        elif self.reduction == "mean_with_sample_weight" and given:
            total = ops.sum(product)
            c = c / ops.where(total == 0, ops.ones_like(total), total)
        else:
            c = c / ops.cast(ops.prod(ops.convert_to_tensor(terms, "int32")), dtype)
            if mask is not None:
                counted = ops.mean(mask)
                c = c / ops.where(counted == 0, ops.ones_like(counted), counted)
        return ops.sqrt(c if product is None else c * product)


def _of_axes(weights, terms):
    """Weights with as many axes as the terms that they are of."""
    extra = len(terms) - len(weights.shape)
    if extra < 0:
        return ops.reshape(weights, terms)
    return ops.reshape(weights, (*ops.shape(weights), *(1,) * extra))


def terms_of(model, outputs):
    """Returns pairs of an output's number and a term, for each loss of a model.

    Which loss is whose is as Keras has it: one is for all outputs, those of a list for
    one each, those of a dictionary for the outputs with these keys or names.

    Args:
        model: A compiled model.
        outputs: Its outputs, whose numbers are those of `keras.tree.flatten`.
    """
    losses = model.loss
    if losses is None:
        raise ValueError(
            "expected a model that is compiled with a loss, from which its likelihood "
            f"is read. Received: loss=None of {model.name}"
        )
    weights = model._compile_loss._user_loss_weights
    if not isinstance(outputs, dict):
        losses, weights = (_by_name(model, given) for given in (losses, weights))
    flat = keras.tree.flatten(losses)
    weights = [None] * len(flat) if weights is None else keras.tree.flatten(weights)
    if len(weights) != len(flat):
        raise ValueError(
            "expected a weight for each loss. Received: "
            f"loss_weights={model._compile_loss._user_loss_weights} of loss={losses}"
        )
    terms = [
        None if loss is None else Term(loss, weight)
        for loss, weight in zip(flat, weights, strict=True)
    ]
    numbers = range(len(keras.tree.flatten(outputs)))
    return list(
        _pairs(
            keras.tree.pack_sequence_as(losses, terms),
            keras.tree.pack_sequence_as(outputs, list(numbers)),
        )
    )


def _pairs(terms, numbers):
    """Yields the pairs of nested terms and numbers of outputs."""
    flat = keras.tree.flatten(numbers)
    if terms is None:
        return
    if isinstance(terms, Term):
        yield from ((number, terms) for number in flat)
    elif isinstance(terms, dict):
        for key, term in terms.items():
            if not isinstance(numbers, dict) or key not in numbers:
                raise ValueError(
                    "expected losses with the keys of the model's outputs. Received: "
                    f"{key!r} of {list(terms)}"
                )
            yield from _pairs(term, numbers[key])
    elif len(terms) == len(flat) and not any(map(keras.tree.is_nested, terms)):
        for number, term in zip(flat, terms, strict=True):
            yield from _pairs(term, number)
    elif isinstance(numbers, type(terms)) and len(terms) == len(numbers):
        for part, term in zip(numbers, terms, strict=True):
            yield from _pairs(term, part)
    else:
        raise ValueError(
            f"expected one loss for each output. Received: {len(terms)} losses for "
            f"{len(flat)} outputs"
        )


def of_each_output(model, outputs, given, numbers):
    """Returns the list of what is given for the outputs, with None for others.

    Args:
        model: A compiled model.
        outputs: Its outputs.
        given: Labels or sample weights: like the outputs, by their names, a list of
            those of outputs with a loss, or None.
        numbers: Of the outputs that have a loss.
    """
    count = len(keras.tree.flatten(outputs))
    if given is None:
        return [None] * count
    if isinstance(outputs, dict) and isinstance(given, dict):
        given = {key: given.get(key) for key in outputs}
    elif isinstance(given, dict) and set(given) == set(_names(model)):
        given = _by_name(model, given)
    given, numbers = keras.tree.flatten(given), sorted(set(numbers))
    if len(given) == count:
        return given
    if len(given) != len(numbers):
        raise ValueError(
            f"expected labels and weights of {len(numbers)} outputs of {model.name}. "
            f"Received: {len(given)}"
        )
    found = dict(zip(numbers, given, strict=True))
    return [found.get(number) for number in range(count)]


def _by_name(model, given):
    """Returns the list of a dictionary's values, in the order of a model's outputs."""
    if not isinstance(given, dict):
        return given
    names = _names(model)
    if set(names) != set(given):
        raise ValueError(
            f"expected the names of the outputs of {model.name}, {names}. Received: "
            f"{list(given)}"
        )
    return [given[name] for name in names]


def _names(model):
    return getattr(model, "output_names", None) or []


def _wide(outputs):
    """Outputs in float32 at least."""
    if keras.backend.standardize_dtype(outputs.dtype) == "float64":
        return outputs
    return ops.cast(outputs, "float32")
