"""Negative log-likelihood of targets under predicted normal distributions."""

import math

import keras
from keras import ops

from ...layers.ops import random
from ...layers.ops.uncertainty import at_least_float32
from ...optimizers import Likelihood, register_likelihood


@keras.saving.register_keras_serializable(package="kzoo")
def gaussian_negative_log_likelihood(y_true, y_pred):
    """Negative log-density of each example's targets, in nats.

    `GaussianNegativeLogLikelihood` has the equation and the shapes; as a function it
    serves as a metric too.

    Args:
        y_true: Targets.
        y_pred: Means and variances.

    Returns:
        Tensor `[B]`, at least float32.

    Raises:
        ValueError: If the shapes are others.

    Example:

    >>> from kzoo.zoo.losses import gaussian_negative_log_likelihood
    >>> values = gaussian_negative_log_likelihood([[1.0], [3.0]], [[[1.0, 1.0]]] * 2)
    >>> [round(float(v), 3) for v in values]  # log(2π) / 2, and 2² / 2 more
    [0.919, 2.919]
    """
    y_pred = at_least_float32(y_pred)
    y_true = ops.cast(ops.convert_to_tensor(y_true), y_pred.dtype)
    if len(y_true.shape) == 1:
        y_true = ops.expand_dims(y_true, -1)
    if len(y_pred.shape) != 3 or y_pred.shape[-1] != 2 or not _fits(y_true, y_pred):
        raise ValueError(
            "expected targets `y_true` of shape [B, T], or [B] if T is 1, and means "
            "and variances `y_pred` of shape [B, T, 2]. Received: y_true of shape "
            f"{tuple(y_true.shape)}, y_pred of shape {tuple(y_pred.shape)}"
        )
    mean, variance = y_pred[..., 0], y_pred[..., 1]
    # (y - μ) / σ before the square, whose overflow is that of the result alone.
    z = (y_true - mean) * ops.rsqrt(variance)
    values = 0.5 * (ops.square(z) + ops.log(variance) + math.log(2 * math.pi))
    return ops.sum(values, axis=-1)


def _fits(y_true, y_pred):
    return len(y_true.shape) == 2 and y_true.shape[-1] == y_pred.shape[-2]


@keras.saving.register_keras_serializable(package="kzoo")
class GaussianNegativeLogLikelihood(keras.losses.Loss):
    """Negative log-likelihood of T targets under normal distributions, in nats.

    With the predicted means μ and variances σ² of the targets y,

        -log p(y) = sum_t [(y_t - μ_t)² / σ_t² + log σ_t² + log 2π] / 2,

    for the last layer `kzoo.layers.MeanAndVariance`. Computes in float32 at least.

    Reference: Nix, Weigend, "Estimating the mean and variance of the target
    probability distribution", 1994. https://doi.org/10.1109/ICNN.1994.374138

    Args:
        reduction: As `keras.losses.Loss`'s. Defaults to the mean over the batch.
        name: Name of the loss.
        dtype: Dtype to compute in. Defaults to float32.

    Call arguments:
        y_true: Targets, `[B, T]`, or `[B]` if T is 1.
        y_pred: Means and variances, `[B, T, 2]`. Variances must be above 0.

    Raises:
        ValueError: If the shapes are others.

    Example:

    >>> import keras
    >>> from kzoo.layers import MeanAndVariance
    >>> from kzoo.zoo.losses import GaussianNegativeLogLikelihood
    >>> layers = [keras.Input((5,)), keras.layers.Dense(2), MeanAndVariance()]
    >>> model = keras.Sequential(layers)
    >>> model.compile("adam", loss=GaussianNegativeLogLikelihood())
    """

    def __init__(
        self,
        reduction="sum_over_batch_size",
        name="gaussian_negative_log_likelihood",
        dtype=None,
    ):
        super().__init__(name=name, reduction=reduction, dtype=dtype)

    def call(self, y_true, y_pred):
        """Returns one value an example, `[B]`."""
        return gaussian_negative_log_likelihood(y_true, y_pred)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "dtype": self.dtype}


@register_likelihood(GaussianNegativeLogLikelihood, gaussian_negative_log_likelihood)
class MeanAndVarianceLikelihood(Likelihood):
    """What K-FAC needs of the loss: of μ and σ² the Fisher information is a diagonal,

    E[∇ℓ ∇ℓᵀ] = diag(1 / σ², 1 / (2 σ⁴)).
    """

    summed_axes = 1  # Over the T targets.

    def loss(self, labels, outputs):
        """Returns ℓ of each target but for a constant, `[B, T]`."""
        mean, variance = outputs[..., 0], outputs[..., 1]
        labels = ops.reshape(ops.cast(labels, outputs.dtype), ops.shape(mean))
        z = (labels - mean) * ops.rsqrt(variance)
        return 0.5 * (ops.square(z) + ops.log(variance))

    def draw(self, outputs, seed):
        """Returns targets drawn from the model, `[B, T]`."""
        mean, variance = outputs[..., 0], outputs[..., 1]
        noise = random.normal(ops.shape(mean), seed, outputs.dtype)
        return mean + ops.sqrt(variance) * noise

    def roots(self, outputs):
        """Returns functions whose squared gradients sum to the Fisher information."""
        variance = ops.stop_gradient(outputs[..., 1])
        of_mean = outputs[..., 0] * ops.rsqrt(variance)
        return ops.stack([of_mean, outputs[..., 1] / (2**0.5 * variance)], axis=-1)
