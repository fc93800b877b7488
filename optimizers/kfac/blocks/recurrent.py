"""Recurrent layers and cells: at each step a matrix multiplies the input and state."""

import contextlib

import keras
from keras import ops
from keras.src.backend import set_keras_mask

from ..approximations.lag_one import LagOne
from ..approximations.lag_one_limit import LagOneLimit
from .base import (
    BlockOfInside,
    CurvatureBlock,
    attributes,
    find_blocks,
    register_curvature_block,
)


class CellBlock(CurvatureBlock):
    """What cells have in common: a sum that ends with a bias, s = ... + b.

    To it zeros are added that stand for s, as ∂s/∂b is 1: those the tap is put around.
    Of the steps each counts as an example of its own, F ≈ T A ⊗ G: a cell does not know
    which steps are one sequence's. A layer that runs it does, see `SequenceBlock`.

    Cells with dropout, or that multiply gate by gate (`implementation=1`), have none.

    Attributes:
        reads_state: Whether the matrix multiplies the state.
    """

    reads_state = True

    @classmethod
    def of(cls, layer):
        """Returns the cell's blocks."""
        plain = not (layer.dropout or layer.recurrent_dropout)
        fits = plain and getattr(layer, "implementation", 2) == 2
        return super().of(layer) if fits else []

    def tapped_call(self, call, tap):
        """Returns the cell's call with a tap of what is added to its sum."""

        def tapped(inputs, states, *args, **kwargs):
            h = states[0] if isinstance(states, (list, tuple)) else states
            a = self.multiplied(inputs, h)
            s = tap(a, ops.zeros((ops.shape(a)[0], self.shape[-1]), a.dtype))
            with self.added(s):
                return call(inputs, states, *args, **kwargs)

        return tapped

    def added(self, s):
        """Returns a context in which s, `[N, m]`, is added to the cell's sum."""
        cell = self.layer
        bias = cell.bias
        bias = ops.zeros(self.shape_of_bias) if bias is None else bias
        bias = self.bias_and(ops.cast(bias, s.dtype), s)
        return attributes(cell, bias=bias, use_bias=True)

    @property
    def shape_of_bias(self):
        """The shape of the cell's bias, had it one."""
        return (self.layer.kernel.shape[-1],)

    def bias_and(self, bias, s):
        """Returns the bias of every example, and s."""
        return bias + s


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

    def multiplied(self, x, h):
        """Returns [x, h]."""
        return ops.concatenate([x, h], axis=-1)

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
        self.reads_state = bool(side)
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

    def multiplied(self, x, h):
        """Returns x or h."""
        return h if self.side else x

    def bias_and(self, bias, s):
        """Returns the biases of every example, one of them and s."""
        both = [ops.zeros_like(s) + bias[0], ops.zeros_like(s) + bias[1]]
        both[self.side] = both[self.side] + s
        return ops.stack(both)


@register_curvature_block(keras.layers.RNN)
@register_curvature_block(keras.layers.SimpleRNN)
@register_curvature_block(keras.layers.LSTM)
@register_curvature_block(keras.layers.GRU)
class SequenceBlock(BlockOfInside):
    """A matrix of the cell that a layer runs, at all steps of each sequence.

    The rows a_t need h_{t-1}, which a run of the layer before gives. The zeros that are
    added to s_t stand beside x_t, from where each step of the cell takes its own. So
    steps are the positions of an example, which has one gradient, the sum over them;
    and it is known which step comes after which. Steps that a mask leaves out do not
    count.

    Where the cell is called by another than the layer, each step counts as an example.

    Args:
        layer: A built recurrent layer.
        inside: The block of its cell.
    """

    approximations = {
        **CurvatureBlock.approximations,
        "lag_one": LagOne,
        "lag_one_limit": LagOneLimit,
    }

    def __init__(self, layer, inside):
        self.running = False
        super().__init__(layer, inside)

    @classmethod
    def of(cls, layer):
        """Returns a block for each one of the layer's cell."""
        blocks = find_blocks(layer.cell)
        return [cls(layer, block) for block in blocks if isinstance(block, CellBlock)]

    @contextlib.contextmanager
    def tapping(self, tap):
        """A context in which the layer's calls have taps, and others of its cell."""
        cell = self.layer.cell
        by_itself, alone = cell.call, self.inside.tapped_call(cell.call, tap)

        def step(*args, **kwargs):
            return (by_itself if self.running else alone)(*args, **kwargs)

        with attributes(cell, call=step), super().tapping(tap):
            yield

    def tapped_call(self, call, tap):
        """Returns the layer's call with a tap of what is added to all steps' sums."""
        cell, size = self.layer.cell, self.shape[-1]

        def tapped(sequences, initial_state=None, mask=None, training=False):
            with attributes(self, running=True):
                # Beside x there may be what another block of the cell adds.
                a = x = sequences[..., : cell.kernel.shape[0]]
                if self.inside.reads_state:
                    h = self._states_before(sequences, initial_state, mask, training)
                    a = self.inside.multiplied(x, h)
                if mask is not None:
                    set_keras_mask(a, keras.tree.flatten(mask)[0])
                s = tap(a, ops.zeros((*ops.shape(a)[:-1], size), a.dtype))
                with attributes(cell, call=self._with_its_own(cell.call)):
                    return call(
                        ops.concatenate([sequences, s], axis=-1),
                        initial_state=initial_state,
                        mask=mask,
                        training=training,
                    )

        return tapped

    def _with_its_own(self, call):
        """Returns a call of the cell that adds the last part of its input to s."""
        size = self.shape[-1]

        def call_of_both(inputs, states, *args, **kwargs):
            with self.inside.added(inputs[..., -size:]):
                return call(inputs[..., :-size], states, *args, **kwargs)

        return call_of_both

    def _states_before(self, sequences, initial_state, mask, training):
        """Returns h_{t-1} for each x_t, `[N, T, units]`, in the order of x."""
        layer = self.layer
        if initial_state is None:
            count = ops.shape(sequences)[0]
            stateful = layer.stateful
            initial_state = layer.states if stateful else layer.get_initial_state(count)
        with attributes(
            layer,
            return_sequences=True,
            return_state=False,
            stateful=False,
            zero_output_for_mask=False,
        ):
            h = type(layer).call(
                layer,
                sequences,
                initial_state=initial_state,
                mask=mask,
                training=training,
            )
        first = ops.cast(keras.tree.flatten(initial_state)[0], h.dtype)[:, None]
        before = ops.concatenate([first, h[:, :-1]], axis=1)
        if mask is not None:
            # Until a step counts, a layer's outputs are 0, whatever its state.
            there = ops.cast(keras.tree.flatten(mask)[0], "int32")
            there = ops.flip(there, axis=1) if layer.go_backwards else there
            some = ops.cumsum(there, axis=1) - there > 0
            before = ops.where(some[..., None], before, first)
        before = ops.flip(before, axis=1) if layer.go_backwards else before
        return ops.stop_gradient(before)
