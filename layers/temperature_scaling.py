"""The layer that makes a classifier's confidence right by one number."""

import math

import keras
from keras import ops

from .ops.arguments import positive
from .ops.uncertainty import at_least_float32


@keras.saving.register_keras_serializable(package="kzoo")
class TemperatureScaling(keras.layers.Layer):
    """Divides logits by a temperature T > 0.

    With z the logits,

        p(c) = softmax(z / T)(c):

    above 1 the temperature flattens the probabilities, below 1 it sharpens them, and
    the most probable class stays what it is. T is kept as log T in a weight that `fit`
    does not train; `kzoo.zoo.fit_temperature` finds it on validation data.

    Behind `kzoo.layers.AverageMembers` it calibrates the ensemble and not its members:
    the members' mean probability p becomes p^(1/T), normalised. (Members that are
    calibrated one by one average to too little confidence: Rahaman and Thiery,
    "Uncertainty Quantification and Deep Ensembles", 2021,
    https://arxiv.org/abs/2007.08792.)

    The output is float32 also under mixed precision (float64 if the logits are).

    Reference: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks",
    2017. https://arxiv.org/abs/1706.04599

    Args:
        temperature: T to start with.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: z; a mask passes through.

    Input shape:
        `[B, ..., C]`.

    Output shape:
        The input's.

    Raises:
        ValueError: If `temperature` is not a finite number above 0.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import TemperatureScaling
    >>> layer = TemperatureScaling(temperature=2.0)
    >>> np.asarray(layer(np.array([[1.0, -4.0]], "float32"))).round(4).tolist()
    [[0.5, -2.0]]
    """

    def __init__(self, temperature=1.0, **kwargs):
        # Without autocast, float32 logits keep their digits under mixed precision.
        super().__init__(autocast=False, **kwargs)
        self._initial = positive("temperature", temperature)
        self.supports_masking = True

    def build(self, input_shape):
        """Makes the weight, log T."""
        self.log_temperature = self.add_weight(
            name="log_temperature",
            shape=(),
            initializer=keras.initializers.Constant(math.log(self._initial)),
            trainable=False,
            autocast=False,
        )

    @property
    def temperature(self):
        """T, a tensor."""
        return ops.exp(self.log_temperature)

    def call(self, inputs):
        """Returns z / T."""
        logits = at_least_float32(inputs)
        return logits * ops.exp(-ops.cast(self.log_temperature, logits.dtype))

    def compute_output_shape(self, input_shape):
        """Returns the input's shape."""
        return input_shape

    def compute_output_spec(self, inputs):
        """Returns the output's symbolic tensor."""
        dtype = "float64" if inputs.dtype == "float64" else "float32"
        return keras.KerasTensor(inputs.shape, dtype=dtype)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "temperature": self._initial}
