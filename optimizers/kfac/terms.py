"""The Fisher information: the terms of a loss, and a function f that samples it.

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
from .likelihoods import likelihood_of

REDUCTIONS = ("sum", "mean", "sum_over_batch_size", "mean_with_sample_weight")
KINDS = ("sampled", "empirical", "exact")


class Term:
    """The likelihood of one output, and how the loss weighs it.

    Args:
        loss: A Keras loss, or its name.
        weight: The loss's weight.
    """

    def __init__(self, loss, weight=None):
        known, found = likelihood_of(loss), keras.losses.get(loss)
        config = found.get_config() if isinstance(found, keras.losses.Loss) else {}
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
        self.smoothing = config.get("label_smoothing", 0.0)
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
            labels = ops.convert_to_tensor(labels)
            if kind == "empirical" and self.smoothing:
                labels = self.likelihood.smoothed(labels, outputs, self.smoothing)
            losses = self.likelihood.loss(labels, outputs)
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
            averaged = terms[: len(terms) - self.likelihood.summed_axes]
            c = c / ops.cast(ops.prod(ops.convert_to_tensor(averaged, "int32")), dtype)
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
    losses = getattr(model, "loss", None)
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
