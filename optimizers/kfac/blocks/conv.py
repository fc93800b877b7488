"""Convolutions: a kernel multiplies the patch of the input at each position."""

import math

import keras
from keras import ops

from .base import CurvatureBlock, positions, register_curvature_block


class SpatialBlock(CurvatureBlock):
    """What convolutions of all kinds have in common.

    With T positions, F ≈ T A ⊗ G with A and G averaged over them (KFC): in the factors'
    convention A is an average over positions, and G a sum.

    A patch is the output of a like convolution whose kernel picks one of the patch's
    numbers for each channel, so it is cut by the same strides, padding and dilation.

    Reference: Grosse, Martens, "A Kronecker-factored approximate Fisher matrix for
    convolution layers", 2016. https://arxiv.org/abs/1602.01407
    """

    def groups_first(self, x):
        """Channels, group by group, as `[groups, N, R, n]`."""
        groups, first = self.shape[0], self.layer.data_format == "channels_first"
        x = positions(ops.moveaxis(x, 1, -1) if first else x)
        n, r = x.shape[-1] // groups, x.shape[1]
        shape = (-1, r, groups, n) if r else (*ops.shape(x)[:2], groups, n)
        return ops.transpose(ops.reshape(x, shape), (2, 0, 1, 3))

    def derivatives(self, derivatives):
        """Returns the derivatives at every position, group by group."""
        return self.groups_first(derivatives)

    def weights(self, inputs, mask):
        """Returns None: a patch has no mask."""
        return None

    def matrix(self, kernel):
        """Returns a kernel as a matrix for each group."""
        groups, n, m = self.shape
        return ops.transpose(ops.reshape(kernel, (n, groups, m)), (1, 0, 2))

    def kernel_of(self, matrix):
        """Returns matrices as a kernel."""
        return ops.reshape(ops.transpose(matrix, (1, 0, 2)), self.kernel.shape)


@register_curvature_block(keras.layers.Conv1D)
@register_curvature_block(keras.layers.Conv2D)
@register_curvature_block(keras.layers.Conv3D)
class ConvBlock(SpatialBlock):
    """A convolution, in groups or not: a matrix for each group of channels."""

    @property
    def shape(self):
        """`(groups, n, m)` with n the numbers in a patch of a group's channels."""
        *patch, m = self.kernel.shape
        return (self.layer.groups, math.prod(patch), m // self.layer.groups)

    def rows(self, inputs):
        """Returns the patches, in the order of the kernel's axes."""
        groups, n, _ = self.shape
        layer, padding = self.layer, self.layer.padding
        if padding == "causal":
            before = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
            pads = [(0, 0), (before, 0), (0, 0)]
            if layer.data_format == "channels_first":
                pads = [(0, 0), (0, 0), (before, 0)]
            inputs, padding = ops.pad(inputs, pads), "valid"
        pick = ops.reshape(ops.eye(n, dtype=inputs.dtype), (*self.kernel.shape[:-1], n))
        patches = ops.conv(
            inputs,
            ops.tile(pick, (*(1,) * (len(pick.shape) - 1), groups)),
            strides=list(layer.strides),
            padding=padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )
        return self.groups_first(patches)


@register_curvature_block(keras.layers.DepthwiseConv1D)
@register_curvature_block(keras.layers.DepthwiseConv2D)
class DepthwiseConvBlock(SpatialBlock):
    """A depthwise convolution: a matrix for each channel of the input."""

    @property
    def shape(self):
        """`(channels, n, m)` with n the numbers in a patch of one channel."""
        *patch, channels, m = self.kernel.shape
        return (channels, math.prod(patch), m)

    def rows(self, inputs):
        """Returns the patches of each channel."""
        channels, n, _ = self.shape
        layer = self.layer
        *patch, _, _ = self.kernel.shape
        pick = ops.reshape(ops.eye(n, dtype=inputs.dtype), (*patch, 1, n))
        patches = ops.depthwise_conv(
            inputs,
            ops.tile(pick, (*(1,) * len(patch), channels, 1)),
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )
        return self.groups_first(patches)
