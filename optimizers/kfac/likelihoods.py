"""Likelihoods: what losses say of the distributions that a model predicts."""

import keras
from keras import ops

from ...layers.ops import random

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


def likelihood_of(loss):
    """Returns the class of the likelihood of a loss, or of its name."""
    found = keras.losses.get(loss)
    key = type(found) if isinstance(found, keras.losses.Loss) else found
    if key not in _LIKELIHOODS:
        names = sorted(known.__name__ for known in _LIKELIHOODS)
        raise ValueError(
            f"expected a loss whose likelihood is known, one of {names}, or one of "
            f"your own with `register_likelihood`. Received: loss={loss!r}"
        )
    return _LIKELIHOODS[key]


class Likelihood:
    """What a loss says of the distribution p(y | outputs) that a model predicts.

    A loss is a mean of negative log-likelihoods ℓ = -log p(y | outputs), or of a share
    of them. KFAC needs ℓ as a function of the outputs of one position, whose
    distribution is along the last axis; labels drawn from p; and for the exact
    curvature functions r_c with the Fisher information E[∇ℓ ∇ℓᵀ] = Σ_c ∇r_c ∇r_cᵀ.

    Args:
        from_logits: The loss's own argument, or False.

    Attributes:
        summed_axes: Over how many of the axes before the last the loss sums ℓ, 0 unless
            a subclass says otherwise; over the others it averages.
    """

    summed_axes = 0

    def __init__(self, from_logits=False):
        self.from_logits = from_logits

    def loss(self, labels, outputs):
        """Returns ℓ, of labels as the loss takes them or as drawn.

        Args:
            labels: Tensor.
            outputs: Tensor `[..., C]`, float32 or float64.
        """
        raise NotImplementedError(f"{type(self).__name__} has no `loss`")

    def smoothed(self, labels, outputs, smoothing):
        """Returns labels as the loss smooths them.

        Args:
            labels: Tensor.
            outputs: Tensor.
            smoothing: The loss's `label_smoothing`, s: a part s of the labels is spread
                over all that there are.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no `smoothed`, which a loss with "
            "`label_smoothing` needs"
        )

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

    def smoothed(self, labels, outputs, smoothing):
        """Returns one-hot labels as the loss smooths them."""
        labels = ops.cast(labels, outputs.dtype)
        return labels * (1 - smoothing) + smoothing / outputs.shape[-1]

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

    def smoothed(self, labels, outputs, smoothing):
        """Returns labels as the loss smooths them."""
        return ops.cast(labels, outputs.dtype) * (1 - smoothing) + smoothing / 2

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
