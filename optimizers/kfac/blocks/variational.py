"""The means of weights that are drawn, as Flipout's."""

from ....layers.variational.conv import ConvVariational
from ....layers.variational.dense import DenseVariational
from ....layers.variational.depthwise_conv import DepthwiseConvVariational
from ....layers.variational.einsum_dense import EinsumDenseVariational
from .base import register_curvature_block
from .conv import ConvBlock, DepthwiseConvBlock
from .dense import DenseBlock
from .einsum_dense import EinsumDenseBlock


class MeanBlock:
    """The mean W̄ of a drawn W = W̄ + ΔW: s = x W̄ + x ΔW has the derivatives of x W̄.

    So its block is that of the plain layer, with the derivatives by what was drawn. A
    bias that is a point is part of it. ρ, from which the standard deviation is made,
    has no block. Of posteriors other than `MeanFieldNormal` nothing has one.
    """

    @classmethod
    def of(cls, layer):
        """Returns the block of the layer's mean."""
        return super().of(layer) if _mean(layer.kernel) is not None else []

    def find_kernel(self, layer):
        """Returns W̄."""
        return _mean(layer.kernel)

    def find_bias(self, layer):
        """Returns the bias if it is not drawn."""
        point = layer.bias is not None and layer.bias.posterior.is_point
        return _mean(layer.bias) if point else None


@register_curvature_block(DenseVariational)
class DenseMeanBlock(MeanBlock, DenseBlock):
    """A dense layer's mean."""


@register_curvature_block(EinsumDenseVariational)
class EinsumDenseMeanBlock(MeanBlock, EinsumDenseBlock):
    """The mean of a product that is written as an Einstein summation."""


@register_curvature_block(ConvVariational)
class ConvMeanBlock(MeanBlock, ConvBlock):
    """A convolution's mean."""


@register_curvature_block(DepthwiseConvVariational)
class DepthwiseConvMeanBlock(MeanBlock, DepthwiseConvBlock):
    """A depthwise convolution's mean."""


def _mean(weight):
    """The variable of a weight's posterior mean, or None."""
    found = [v for v in weight.variables if v.name == f"{weight.kind}_posterior_loc"]
    return found[0] if found else None
