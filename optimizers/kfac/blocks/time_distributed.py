"""Layers that TimeDistributed applies at every step."""

import contextlib

import keras
from keras import ops
from keras.src.backend import get_keras_mask, set_keras_mask

from .base import BlockOfInside, attributes, find_blocks, register_curvature_block
from .conv import SpatialBlock
from .dense import DenseBlock
from .einsum_dense import EinsumDenseBlock

# What each example goes through by itself.
BY_ITSELF = (DenseBlock, EinsumDenseBlock, SpatialBlock)


@register_curvature_block(keras.layers.TimeDistributed)
class TimeDistributedBlock(BlockOfInside):
    """The matrix of the layer inside: the steps are positions of an example.

    While it is measured the layer is called once, with the steps as examples; so this
    is for layers alone to which one example is nothing to another. Steps that a mask
    leaves out do not count.

    Args:
        layer: A built TimeDistributed layer.
        inside: The block of the layer inside.
    """

    @classmethod
    def of(cls, layer):
        """Returns a block for that of the layer inside, if it has such a one."""
        blocks = find_blocks(layer.layer)
        return [cls(layer, block) for block in blocks if isinstance(block, BY_ITSELF)]

    def rows(self, inputs):
        """Returns what the kernel multiplies at all steps."""
        return self._positions(self.inside.rows(_folded(inputs)), inputs)

    def derivatives(self, derivatives):
        """Returns the derivatives by s at all steps."""
        of_steps = self.inside.derivatives(_folded(derivatives))
        return self._positions(of_steps, derivatives)

    def weights(self, inputs, mask):
        """Returns 1 for the positions of steps that count, and 0 for others."""
        if mask is None:
            return None
        mask = ops.cast(mask, "float32")
        if len(mask.shape) == 2:
            lead = len(self.shape) - 2
            count = ops.shape(self.inside.rows(_folded(inputs)))[lead + 1]
            mask = ops.repeat(mask, count, axis=1)
        return ops.reshape(mask, (ops.shape(mask)[0], -1))

    def _positions(self, rows, inputs):
        """`[*lead, N T, R, n]` as `[*lead, N, T R, n]`."""
        lead, n = rows.shape[:-3], rows.shape[-1]
        return ops.reshape(rows, (*lead, ops.shape(inputs)[0], -1, n))

    @contextlib.contextmanager
    def tapping(self, tap):
        """A context in which the layer's calls run all steps at once, with a tap."""
        layer, of_step, running = self.layer, self.layer.layer, []

        def at_once(inputs, training=None, mask=None):
            steps = ops.shape(inputs)[1]
            arguments = {"training": training} if of_step._call_has_training_arg else {}
            running.append((steps, mask))
            outputs = of_step.call(_folded(inputs), **arguments)
            running.pop()
            return _unfolded(outputs, steps)

        def of_steps(inputs, s):
            if running:
                steps, mask = running[-1]
            else:  # The layer inside was called by another than this one.
                steps, mask = 1, get_keras_mask(inputs)
                mask = None if mask is None else mask[:, None]
            inputs, s = (_unfolded(x, steps) for x in (inputs, s))
            if mask is not None:
                set_keras_mask(inputs, mask)
            return _folded(tap(inputs, s))

        with attributes(layer, call=at_once), self.inside.tapping(of_steps):
            yield


def _folded(x):
    """`[N, T, ...]` as `[N T, ...]`."""
    return ops.reshape(x, (-1, *ops.shape(x)[2:]))


def _unfolded(x, steps):
    """`[N T, ...]` as `[N, T, ...]`."""
    return ops.reshape(x, (-1, steps, *ops.shape(x)[1:]))
