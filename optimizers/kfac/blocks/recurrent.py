"""Recurrent cells: at each step a matrix multiplies the input and the state."""

import keras
from keras import ops

from .base import CurvatureBlock, attributes, register_curvature_block


class CellBlock(CurvatureBlock):
    """What cells have in common: a sum that ends with a bias, s = ... + b.

    There the tap is put: around the bias, which stands for s, as ∂s/∂b is 1. Of the
    steps each counts as a position, as if they were independent: F ≈ T A ⊗ G.

    Cells with dropout, or that multiply gate by gate (`implementation=1`), have none.
    """

    @classmethod
    def of(cls, layer):
        """Returns the cell's blocks."""
        plain = not (layer.dropout or layer.recurrent_dropout)
        fits = plain and getattr(layer, "implementation", 2) == 2
        return super().of(layer) if fits else []

    def tapped_call(self, call, tap):
        """Returns the cell's call with a tap around its bias."""
        cell = self.layer

        def tapped(inputs, states, *args, **kwargs):
            h = states[0] if isinstance(states, (list, tuple)) else states
            bias = cell.bias
            if bias is None:
                bias = ops.zeros(self.shape_of_bias, h.dtype)
            bias = self.tapped_bias(ops.cast(bias, h.dtype), inputs, h, tap)
            with attributes(cell, bias=bias, use_bias=True):
                return call(inputs, states, *args, **kwargs)

        return tapped

    @property
    def shape_of_bias(self):
        """The shape of the cell's bias, had it one."""
        return (self.layer.kernel.shape[-1],)


@register_curvature_block(keras.layers.SimpleRNNCell)
@register_curvature_block(keras.layers.LSTMCell)
class JointBlock(CellBlock):
    """s = x W + h U + b: one matrix, that of W, U and b, multiplies [x, h, 1]."""

    @property
    def variables(self):
        """The kernels and the bias."""
        kernels = [self.layer.kernel, self.layer.recurrent_kernel]
        return kernels if self.bias is None else [*kernels, self.bias]

    @property
    def shape(self):
        """`(size of x + size of h, m)`."""
        n, m = self.layer.kernel.shape
        return (n + self.layer.units, m)

    def tapped_bias(self, bias, x, h, tap):
        """Returns the bias of every example, tapped with [x, h]."""
        bias = ops.broadcast_to(bias, (ops.shape(h)[0], bias.shape[-1]))
        return tap(ops.concatenate([x, h], axis=-1), bias)

    def join(self, tensors):
        """Returns tensors like the variables as one like W."""
        kernel = ops.concatenate(tensors[:2], axis=0)
        return super().join([kernel, *tensors[2:]])

    def split(self, matrix):
        """Returns a tensor like W as tensors like the variables."""
        size = self.layer.kernel.shape[0]
        kernel, recurrent = matrix[:size], matrix[size : size + self.layer.units]
        rest = [] if self.bias is None else [matrix[-1]]
        return [kernel, recurrent, *rest]


@register_curvature_block(keras.layers.GRUCell)
class GRUBlock(CellBlock):
    """One of the two matrices of a GRU that applies the reset gate after U.

    The sums x W + b and h U + b' have derivatives of their own, so each matrix has a
    block. The biases, which are one variable, are not part of them.

    Args:
        layer: A built GRUCell.
        side: 0 for W, 1 for U.
    """

    def __init__(self, layer, side=0):
        self.side = side
        super().__init__(layer)

    @classmethod
    def of(cls, layer):
        """Returns the blocks of W and of U."""
        fits = layer.reset_after and super().of(layer)
        return [cls(layer, 0), cls(layer, 1)] if fits else []

    def find_kernel(self, layer):
        """Returns W or U."""
        return layer.recurrent_kernel if self.side else layer.kernel

    def find_bias(self, layer):
        """Returns None."""
        return None

    @property
    def shape_of_bias(self):
        """The shape of both biases."""
        return (2, self.layer.kernel.shape[-1])

    def tapped_bias(self, bias, x, h, tap):
        """Returns the biases of every example, one of them tapped."""
        if len(bias.shape) == 2:
            bias = bias[:, None]
        count = ops.shape(h)[0]
        both = [ops.broadcast_to(b, (count, b.shape[-1])) for b in (bias[0], bias[1])]
        both[self.side] = tap((x, h)[self.side], both[self.side])
        return ops.stack(both)
