"""The last layer of a network that predicts a normal distribution."""

import keras
import numpy as np
from keras import ops

from .ops.uncertainty import at_least_float32


@keras.saving.register_keras_serializable(package="kzoo")
class MeanAndVariance(keras.layers.Layer):
    """Turns 2T numbers into the means and variances of T normal distributions.

    Of the 2T inputs the first T are a, the last T are b, and

        μ = loc + scale ∘ a,    σ² = scale² ∘ (softplus(b) + floor),

    so that a network which gives numbers of about 1 predicts targets of mean `loc`
    and standard deviation `scale`, in their own units. The floor keeps the variance
    away from 0, where the likelihood of one target has no bound. The output is float32
    also under mixed precision (float64 if the inputs are).

    Reference: Lakshminarayanan, Pritzel, Blundell, "Simple and Scalable Predictive
    Uncertainty Estimation using Deep Ensembles", 2016, section 2.2.
    https://arxiv.org/abs/1612.01474

    Args:
        loc: What a = 0 stands for: a number, or one for each target.
        scale: The unit of a, above 0: a number, or one for each target.
        floor: The least variance, above 0, in units of `scale` squared.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: a and b.

    Input shape:
        `[B, ..., 2T]`.

    Output shape:
        `[B, ..., T, 2]`: mean and variance, as
        `kzoo.zoo.losses.GaussianNegativeLogLikelihood` takes them.

    Raises:
        ValueError: If `scale` or `floor` is not above 0; when built, if the number of
            inputs is odd, or `loc` or `scale` is not one number or T of them.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import MeanAndVariance
    >>> layer = MeanAndVariance(loc=100.0, scale=10.0)
    >>> np.asarray(layer(np.array([[0.5, 0.0]], "float32"))).round(2)
    array([[[105.  ,  69.31]]], dtype=float32)
    """

    def __init__(self, loc=0.0, scale=1.0, floor=1e-6, **kwargs):
        # Without autocast, float32 inputs keep their digits under mixed precision.
        super().__init__(autocast=False, **kwargs)
        self.loc = np.asarray(loc, "float64").tolist()
        self.scale = np.asarray(scale, "float64").tolist()
        self.floor = float(floor)
        if not (np.min(self.scale) > 0 and self.floor > 0):
            raise ValueError(
                "expected `scale` and `floor` to be above 0. "
                f"Received: scale={scale!r}, floor={floor!r}"
            )
        self.input_spec = keras.InputSpec(min_ndim=2)

    def build(self, input_shape):
        """Checks the arguments against the number of inputs."""
        targets, odd = divmod(input_shape[-1], 2)
        shapes = {np.shape(self.loc), np.shape(self.scale)}
        if odd or not shapes <= {(), (targets,)}:
            raise ValueError(
                "expected an even number of inputs, 2T, and one `loc` and `scale` or T "
                f"of them. Received: inputs of shape {tuple(input_shape)}, "
                f"loc={self.loc}, scale={self.scale}"
            )

    def call(self, inputs):
        """Returns means and variances."""
        a, b = ops.split(at_least_float32(inputs), 2, axis=-1)
        scale = ops.convert_to_tensor(self.scale, a.dtype)
        mean = ops.convert_to_tensor(self.loc, a.dtype) + scale * a
        variance = ops.square(scale) * (ops.softplus(b) + self.floor)
        return ops.stack([mean, variance], axis=-1)

    def compute_output_shape(self, input_shape):
        """Returns the input's shape with T and 2 for its last axis."""
        return (*input_shape[:-1], input_shape[-1] // 2, 2)

    def compute_output_spec(self, inputs):
        """Returns the output's symbolic tensor."""
        dtype = "float64" if inputs.dtype == "float64" else "float32"
        return keras.KerasTensor(self.compute_output_shape(inputs.shape), dtype=dtype)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "loc": self.loc,
            "scale": self.scale,
            "floor": self.floor,
        }
