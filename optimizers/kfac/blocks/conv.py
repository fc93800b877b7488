"""Convolutions: a kernel multiplies the patch of the input at each position."""

import itertools
import math

import keras
from keras import ops

from .base import CurvatureBlock, positions, register_curvature_block


class SpatialBlock(CurvatureBlock):
    """What convolutions of all kinds have in common.

    With T positions, F ≈ T A ⊗ G with A and G averaged over them (KFC): in the factors'
    convention A is an average over positions, and G a sum.

    Reference: Grosse, Martens, "A Kronecker-factored approximate Fisher matrix for
    convolution layers", 2016. https://arxiv.org/abs/1602.01407
    """

    def channels_last(self, x):
        """Returns inputs or outputs of the layer with channels on their last axis."""
        first = self.layer.data_format == "channels_first"
        return ops.moveaxis(x, 1, -1) if first else x

    def groups_first(self, x):
        """Channels, group by group, as `[groups, N, R, n]`."""
        groups, x = self.shape[0], positions(x)
        n, r = x.shape[-1] // groups, x.shape[1]
        shape = (-1, r, groups, n) if r else (*ops.shape(x)[:2], groups, n)
        return ops.transpose(ops.reshape(x, shape), (2, 0, 1, 3))

    def rows(self, inputs):
        """Returns the patches, in the order of the kernel's axes, group by group."""
        layer, (groups, n, _) = self.layer, self.shape
        x = patches(
            self.channels_last(inputs),
            layer.kernel_size,
            layer.strides,
            layer.padding,
            layer.dilation_rate,
        )
        # From [..., taps, channels] to those of a group side by side.
        *lead, taps, channels = ops.shape(x)
        x = ops.reshape(x, (*lead, taps, groups, channels // groups))
        x = ops.reshape(ops.swapaxes(x, -3, -2), (*lead, groups * n))
        return self.groups_first(x)

    def derivatives(self, derivatives):
        """Returns the derivatives at every position, group by group."""
        return self.groups_first(self.channels_last(derivatives))

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


@register_curvature_block(keras.layers.DepthwiseConv1D)
@register_curvature_block(keras.layers.DepthwiseConv2D)
class DepthwiseConvBlock(SpatialBlock):
    """A depthwise convolution: a matrix for each channel of the input."""

    @property
    def shape(self):
        """`(channels, n, m)` with n the numbers in a patch of one channel."""
        *patch, channels, m = self.kernel.shape
        return (channels, math.prod(patch), m)


def patches(x, size, strides, padding, dilation):
    """Cuts out what a convolution's kernel meets at each of its positions.

    Args:
        x: Inputs, `[N, *spatial, channels]`.
        size: Of the kernel, along each spatial axis.
        strides: As Keras's convolutions have them.
        padding: `"valid"`, `"same"` or `"causal"`.
        dilation: The kernel's.

    Returns:
        Tensor `[N, *positions, prod(size), channels]`.
    """
    pads, counts = [(0, 0)], []
    for length, k, s, d in zip(
        ops.shape(x)[1:-1], size, strides, dilation, strict=True
    ):
        reach = (k - 1) * d
        if padding == "same":
            counts.append((length - 1) // s + 1)
            more = (counts[-1] - 1) * s + reach + 1 - length
            # A length that is not known until then is a tensor.
            more = max(more, 0) if isinstance(more, int) else ops.maximum(more, 0)
            pads.append((more // 2, more - more // 2))
        else:
            pads.append((reach if padding == "causal" else 0, 0))
            counts.append((length + pads[-1][0] - reach - 1) // s + 1)
    x = ops.pad(x, [*pads, (0, 0)])
    taps = itertools.product(
        *(range(0, k * d, d) for k, d in zip(size, dilation, strict=True))
    )
    found = []
    for tap in taps:
        of_axes = zip(tap, counts, strides, strict=True)
        at = [slice(start, start + (n - 1) * s + 1, s) for start, n, s in of_axes]
        found.append(x[(slice(None), *at)])
    return ops.stack(found, axis=-2)
