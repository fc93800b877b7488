"""Normalizations: each channel has a scale and a shift."""

import math

import keras
from keras import ops

from ..approximations.diagonal import Diagonal
from .base import CurvatureBlock, attributes, positions, register_curvature_block


@register_curvature_block(keras.layers.BatchNormalization)
@register_curvature_block(keras.layers.LayerNormalization)
class NormalizationBlock(CurvatureBlock):
    """s = γ x̂ + β: for each channel a matrix of one column, whose rows are [x̂, 1].

    The curvature is their diagonal, from single examples' gradients, in all cases. A
    layer whose channels are not on the last axes, or have no scale, has none.
    """

    approximations = {
        "kronecker": Diagonal,
        "ekfac": Diagonal,
        "diagonal": Diagonal,
    }

    @classmethod
    def of(cls, layer):
        """Returns the layer's block, if it has one."""
        axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
        rank = len(layer.gamma.shape) if layer.gamma is not None else 0
        last = list(range(-rank, 0))
        return super().of(layer) if rank and sorted(axes) == last else []

    def find_kernel(self, layer):
        """Returns γ."""
        return layer.gamma

    def find_bias(self, layer):
        """Returns β."""
        return layer.beta

    @property
    def shape(self):
        """A number for each channel, `(channels, 1, 1)`."""
        return (math.prod(self.kernel.shape), 1, 1)

    def tapped_call(self, call, tap):
        """Returns the layer's call with a tap of x̂ and s."""
        layer = self.layer

        def tapped(inputs, *args, **kwargs):
            units = {"gamma": ops.ones(layer.gamma.shape, layer.gamma.dtype)}
            if layer.beta is not None:
                units["beta"] = ops.zeros(layer.beta.shape, layer.beta.dtype)
            with attributes(layer, **units):
                normalized = call(inputs, *args, **kwargs)
            return tap(normalized, call(inputs, *args, **kwargs))

        return tapped

    def rows(self, inputs):
        """Returns x̂ of every channel, `[channels, N, R, 1]`."""
        rank = len(self.kernel.shape)
        shape = ops.shape(inputs)[: len(inputs.shape) - rank]
        x = positions(ops.reshape(inputs, (*shape, self.shape[0])))
        return ops.moveaxis(x, -1, 0)[..., None]

    def derivatives(self, derivatives):
        """Returns the derivatives of every channel."""
        return self.rows(derivatives)

    def weights(self, inputs, mask):
        """Returns None: where g is 0 nothing counts."""
        return None
