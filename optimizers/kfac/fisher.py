"""The Fisher information: the loss's likelihood, and a function f that samples it.

A loss h is read as a mean of negative log-likelihoods, h = Σ_t c_t ℓ_t, where t runs
over the examples and the positions of outputs, and c_t holds all that stands before:
1 / (number of terms), sample weights, the loss's weight, and what the loss averages
over the last axis. The curvature of h is Σ_t c_t E[∇ℓ_t ∇ℓ_tᵀ] with labels drawn from
the model. So the derivatives of

    f = Σ_t √c_t ℓ_t

are such that their squares, summed over examples, are the curvature of h itself: this
is the one place where a mean's 1/N comes in.
"""

import keras
from keras import ops

from ...layers.ops import random

KINDS = ("sampled", "empirical", "exact")


class Categorical:
    """One of C classes, with the softmax of logits or with probabilities.

    Args:
        from_logits: Whether outputs are logits.
    """

    def __init__(self, from_logits):
        self.from_logits = from_logits

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

    def share(self, size):
        """Returns the part of ℓ that the loss of one position is."""
        return 1.0


class Bernoulli:
    """D independent events, with logits or probabilities; Keras averages over them."""

    def __init__(self, from_logits):
        self.from_logits = from_logits

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


class Gaussian:
    """D normal numbers with variance 1 around the outputs: ℓ = |y - ŷ|² / 2.

    Keras's mean squared error averages |y - ŷ|² over the last axis: it is 2/D ℓ.
    """

    def __init__(self, from_logits=False):
        pass

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


_LIKELIHOODS = {
    "MeanSquaredError": Gaussian,
    "mean_squared_error": Gaussian,
    "CategoricalCrossentropy": Categorical,
    "categorical_crossentropy": Categorical,
    "SparseCategoricalCrossentropy": Categorical,
    "sparse_categorical_crossentropy": Categorical,
    "BinaryCrossentropy": Bernoulli,
    "binary_crossentropy": Bernoulli,
}


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
        name = type(found).__name__ if is_loss else getattr(found, "__name__", "")
        thing = type(found) if is_loss else found
        known = _LIKELIHOODS.get(name)
        if known is None or getattr(keras.losses, name) is not thing:
            raise ValueError(
                "expected a loss whose likelihood is known, one of "
                f"{sorted(_LIKELIHOODS)}. Received: loss={loss!r}"
            )
        if config.get("axis", -1) != -1:
            raise ValueError(
                f"expected a loss along the last axis. Received: axis={config['axis']}"
            )
        self.likelihood = known(config.get("from_logits", False))
        self.is_sum = config.get("reduction") == "sum"
        self.weight = 1.0 if weight is None else float(weight)

    def f(self, kind, outputs, labels, sample_weight, seed):
        """Returns Σ_t √c_t ℓ_t of this output.

        Args:
            kind: One of `KINDS`.
            outputs: The model's output; for `"exact"`, of C copies of the batch.
            labels: The labels, which only `"empirical"` reads.
            sample_weight: Weights of the examples, or None.
            seed: Pair of integers.
        """
        outputs, size = _wide(outputs), outputs.shape[-1]
        if kind == "exact":
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
        return ops.sum(losses * self._root(terms, size, sample_weight, losses.dtype))

    def roots(self, outputs, sample_weight):
        """Returns functions r, `[..., C]`, with this output's curvature Σ ∇r ∇rᵀ.

        Args:
            outputs: The model's output.
            sample_weight: Weights of the examples, or None.
        """
        outputs = _wide(outputs)
        r = self.likelihood.roots(outputs)
        *terms, size = ops.shape(r)
        return self._root(terms, size, sample_weight, r.dtype)[..., None] * r

    def _root(self, terms, size, sample_weight, dtype):
        """Returns √c_t, of as many axes as there are `terms`, or a scalar."""
        c = self.weight * self.likelihood.share(size)
        if not self.is_sum:
            count = ops.prod(ops.convert_to_tensor(terms, "int32"))
            c = c / ops.cast(count, dtype)
        root = ops.sqrt(ops.cast(c, dtype))
        if sample_weight is not None:
            weight = ops.cast(sample_weight, dtype)
            extra = len(terms) - len(weight.shape)
            if extra < 0:
                weight = ops.reshape(weight, terms)
            weight = ops.reshape(weight, (*ops.shape(weight), *(1,) * max(extra, 0)))
            root = root * ops.sqrt(weight)
        return root


def terms_of(model):
    """Returns a term for each of a compiled model's outputs, None for those without."""
    losses = model.loss
    if losses is None:
        raise ValueError(
            "expected a model that is compiled with a loss, from which its likelihood "
            f"is read. Received: loss=None of {model.name}"
        )
    weights = model._compile_loss._user_loss_weights
    if isinstance(losses, dict):
        names = getattr(model, "output_names", None) or list(losses)
        losses = [losses.get(name) for name in names]
        if isinstance(weights, dict):
            weights = [weights.get(name) for name in names]
    if not isinstance(losses, (list, tuple)):
        losses = [losses]
    if not isinstance(weights, (list, tuple)):
        weights = [weights] * len(losses)
    return [
        None if loss is None else Term(loss, weight)
        for loss, weight in zip(losses, weights, strict=True)
    ]


def _wide(outputs):
    """Outputs in float32 at least."""
    if keras.backend.standardize_dtype(outputs.dtype) == "float64":
        return outputs
    return ops.cast(outputs, "float32")
