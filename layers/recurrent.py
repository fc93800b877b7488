"""What recurrent layers have in common that project the inputs of all steps at once.

A layer is made of a cell, which owns the weights and makes a `Sequence` as one begins:
what is the same at all steps stands there, and is computed and drawn once.
"""

import threading
import weakref
from operator import attrgetter

import keras
import numpy as np
from keras import ops

# What Keras knows of a call while it lasts, set by the outermost layer that is called.
from keras.src.backend.common.global_state import get_global_attribute

# Keras's recurrent layers call a cell of this class as a sequence begins and ends.
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell
from keras.src.utils.tracking import no_automatic_dependency_tracking

from .ops.arguments import integer, is_integer, rate
from .ops.random import bernoulli
from .ops.recurrent import gru_step, lstm_step

OF_LAYER = ("autocast", "input_dim", "input_shape")


class _ByThread(threading.local):
    def __init__(self):
        self.sequences = weakref.WeakKeyDictionary()


# The sequence that a cell is in. Not kept in the cell: the replicas of a distributed
# step are traced side by side, each in a thread.
_HELD = _ByThread()


def _current_call():
    return get_global_attribute("current_call_ctx")


class Sequence:
    """What is the same at all steps of a sequence: weights, and what is dropped.

    A subclass says how inputs and states are projected (`_project`, `project_state`).

    Args:
        cell: The `RecurrentCell`.
        rows: Number of sequences in the batch.
        drops: Whether any inputs and units are dropped in training.
    """

    def __init__(self, cell, rows, drops=True):
        self._dtype = cell.compute_dtype
        self._masks = []
        for size, p in (
            (cell.kernel.shape[0], cell.dropout),
            (cell.units, cell.recurrent_dropout),
        ):
            mask = None
            if p and drops:  # 0 with probability p, else 1 / (1 - p).
                kept = bernoulli((rows, size), cell.seed_generator, 1 - p, self._dtype)
                mask = kept / (1 - p)
            self._masks.append(mask)
        self.is_projected = False
        now = _current_call()
        self._call = now and weakref.ref(now)

    def is_of_this_call(self):
        """Whether it began in the call that is going on, or outside of any."""
        return self._call is None or self._call() is _current_call()

    def project(self, inputs, training):
        """x W + b of one step, `[B, features]`, or of all, `[B, T, features]`."""
        x = ops.cast(inputs, self._dtype)
        mask = self._masks[0]
        if training and mask is not None:
            x = x * (mask if len(x.shape) == 2 else mask[:, None])
        return self._project(x)

    def dropped(self, h, training):
        """The state, some of its units dropped."""
        return h * self._masks[1] if training and self._masks[1] is not None else h

    def _project(self, x):
        raise NotImplementedError

    def project_state(self, h, part=0):
        """h U of a part of U's outputs, with its own bias if the cell has two."""
        raise NotImplementedError


class RecurrentCell(DropoutRNNCell):
    """A cell that holds over the steps of a sequence what its `sequence` says.

    A base of cells, to stand before a layer that takes an `activation` and a `seed`.
    One of the steps below says what the cell computes from x W + b and h U.
    """

    sequence = None  # The class of `Sequence`.
    bias_name = "bias"  # Its variable's.
    gates = 1
    recurrent_parts = (slice(None),)  # Outputs of U that are not computed together.

    def __init__(
        self, units, activation="tanh", *, dropout=0.0, recurrent_dropout=0.0, **kwargs
    ):
        super().__init__(activation=activation, **kwargs)
        if self.activity_regularizer is not None:
            raise ValueError(
                "expected `activity_regularizer` to be given to the layer around the "
                f"cell. Received: activity_regularizer={self.activity_regularizer!r}"
            )
        self.units = integer("units", units)
        self.dropout = rate("dropout", dropout)
        self.recurrent_dropout = rate("recurrent_dropout", recurrent_dropout)

    @property
    def state_size(self):
        """Units of the state, or of each of them."""
        return self.units

    @property
    def output_size(self):
        """Units of the output."""
        return self.units

    def _weight_shapes(self, input_shape):
        """Shapes of W, U and b, outputs of all gates side by side."""
        width = self.gates * self.units
        return (input_shape[-1], width), (self.units, width), (width,)

    def _biases(self, bias):
        """The biases of the projected inputs and of the projected state."""
        return bias, None

    # What Keras's recurrent layers call before and after a sequence.

    def get_dropout_mask(self, step_input):
        """Begins a sequence, also after one that an exception ended."""
        _HELD.sequences[self] = self.sequence(self, ops.shape(step_input)[0])

    def get_recurrent_dropout_mask(self, step_input):
        """Does nothing: the sequence has begun."""

    def reset_dropout_mask(self):
        """Ends the sequence."""
        _HELD.sequences.pop(self, None)

    def reset_recurrent_dropout_mask(self):
        """Does nothing: the sequence has ended."""

    def call(self, inputs, states, training=False):
        """Returns the output and the states after a step of the sequence."""
        held = _HELD.sequences.get(self)
        if held and not held.is_of_this_call():  # An exception ended it.
            self.reset_dropout_mask()
            held = None
        held = held or self._of_one_step(inputs)
        x = inputs if held.is_projected else held.project(inputs, training)
        h, *others = keras.tree.flatten(states)
        new = self._step(x, held, training, h, *others)
        return new[0], keras.tree.pack_sequence_as(states, new)

    def _of_one_step(self, inputs):
        """The sequence of a call that is none of a recurrent layer's."""
        return self.sequence(self, ops.shape(inputs)[0])

    def get_initial_state(self, batch_size=None):
        """Returns states of zeros."""
        sizes = keras.tree.flatten(self.state_size)
        return [ops.zeros((batch_size, size), self.compute_dtype) for size in sizes]

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            "units": self.units,
            "dropout": self.dropout,
            "recurrent_dropout": self.recurrent_dropout,
            **super().get_config(),
        }


class SimpleRNNStep:
    """h' = φ(x W + b + h U)."""

    def _step(self, x, held, training, h):
        return [self.activation(x + held.project_state(held.dropped(h, training)))]


class GRUStep:
    """A gated recurrent unit, its gates side by side: z, r, h."""

    gates = 3

    def __init__(
        self,
        units,
        activation="tanh",
        *,
        recurrent_activation="sigmoid",
        reset_after=True,
        **kwargs,
    ):
        super().__init__(units, activation, **kwargs)
        self.recurrent_activation = keras.activations.get(recurrent_activation)
        self.reset_after = reset_after

    @property
    def recurrent_parts(self):
        """Outputs of U: all, or the gates z and r before the candidate."""
        if self.reset_after:
            return (slice(None),)
        return slice(2 * self.units), slice(2 * self.units, None)

    def _weight_shapes(self, input_shape):
        kernel, recurrent_kernel, bias = super()._weight_shapes(input_shape)
        return kernel, recurrent_kernel, (2, *bias) if self.reset_after else bias

    def _biases(self, bias):
        if bias is None or not self.reset_after:
            return bias, None
        return bias[..., 0, :], bias[..., 1, :]

    def _step(self, x, held, training, h):
        dropped = held.dropped(h, training)

        def candidate(reset):
            return held.project_state(held.dropped(reset, training), 1)

        return [
            gru_step(
                x,
                held.project_state(dropped),
                h,
                self.activation,
                self.recurrent_activation,
                None if self.reset_after else candidate,
            )
        ]

    def get_config(self):
        """Returns the constructor's arguments."""
        gates = keras.activations.serialize(self.recurrent_activation)
        return {
            **super().get_config(),
            "recurrent_activation": gates,
            "reset_after": self.reset_after,
        }


class LSTMStep:
    """Long short-term memory, its gates side by side: i, f, c, o."""

    gates = 4

    def __init__(
        self,
        units,
        activation="tanh",
        *,
        recurrent_activation="sigmoid",
        unit_forget_bias=True,
        **kwargs,
    ):
        super().__init__(units, activation, **kwargs)
        self.recurrent_activation = keras.activations.get(recurrent_activation)
        self.unit_forget_bias = unit_forget_bias

    @property
    def state_size(self):
        """Units of the state and of the carry."""
        return [self.units, self.units]

    def add_weight(self, *args, name=None, initializer=None, **kwargs):
        """Adds a weight; the forget gate's bias starts 1 higher."""
        if name == self.bias_name and self.unit_forget_bias:
            given = keras.initializers.get(initializer or "glorot_uniform")
            forget = np.repeat([0.0, 1.0, 0.0, 0.0], self.units)

            def initializer(shape, dtype=None):
                return given(shape, dtype=dtype) + ops.cast(forget, dtype)

        return super().add_weight(*args, name=name, initializer=initializer, **kwargs)

    def _step(self, x, held, training, h, c):
        z = x + held.project_state(held.dropped(h, training))
        return lstm_step(z, c, self.activation, self.recurrent_activation)

    def get_config(self):
        """Returns the constructor's arguments."""
        gates = keras.activations.serialize(self.recurrent_activation)
        return {
            **super().get_config(),
            "recurrent_activation": gates,
            "unit_forget_bias": self.unit_forget_bias,
        }


class RecurrentLayer(keras.layers.RNN):
    """A recurrent layer around a `RecurrentCell`, whose weights are its own.

    The states that a `stateful` one carries from batch to batch are kept as those of
    seeds are: among its variables, so that compiled steps return them on JAX too, and
    not among its weights, which fit any batch size.
    """

    cell_class = None

    def __init__(
        self,
        units,
        activation="tanh",
        *,
        return_sequences=False,
        return_state=False,
        go_backwards=False,
        stateful=False,
        unroll=False,
        zero_output_for_mask=False,
        activity_regularizer=None,
        seed=None,
        name=None,
        dtype=None,
        trainable=True,
        **kwargs,
    ):
        of_layer = {n: kwargs.pop(n) for n in OF_LAYER if n in kwargs}
        own_seed = seed
        if is_integer(seed) and go_backwards:
            # The layers of a `keras.layers.Bidirectional` are made from one
            # configuration, but draw apart; and so do replicas, by other steps.
            own_seed = seed ^ 0x5BD1E995
        cell = self.cell_class(
            units,
            activation,
            seed=own_seed,
            name="cell",
            dtype=dtype,
            trainable=trainable,
            **kwargs,
        )
        super().__init__(
            cell,
            return_sequences=return_sequences,
            return_state=return_state,
            go_backwards=go_backwards,
            stateful=stateful,
            unroll=unroll,
            zero_output_for_mask=zero_output_for_mask,
            activity_regularizer=activity_regularizer,
            name=name,
            dtype=dtype,
            trainable=trainable,
            **of_layer,
        )
        self.seed = int(seed) if is_integer(seed) else seed
        self.input_spec = keras.layers.InputSpec(ndim=3)

    units = property(attrgetter("cell.units"))
    activation = property(attrgetter("cell.activation"))

    @property
    def variables(self):
        """The weights, the states of seeds and those carried from batch to batch."""
        return [*super().variables, *(self.states or ())]

    @no_automatic_dependency_tracking  # Which would make weights of them.
    def _create_state_variables(self, batch_size):
        with keras.name_scope(self.name, caller=self):
            self.states = [
                keras.Variable(
                    state, dtype=self.variable_dtype, trainable=False, name=f"state{i}"
                )
                for i, state in enumerate(self.get_initial_state(batch_size))
            ]

    def call(self, sequences, initial_state=None, mask=None, training=False):
        """Returns the outputs, of the last step or of all."""
        try:
            return super().call(sequences, initial_state, mask, training)
        finally:  # Whatever happened, nothing drawn outlives the call.
            self.cell.reset_dropout_mask()

    def inner_loop(self, sequences, initial_state, mask, training=False):
        """Runs over the steps, the inputs of all of them projected before."""
        held = _HELD.sequences[self.cell]
        sequences = held.project(sequences, training)
        held.is_projected = True
        return super().inner_loop(sequences, initial_state, mask, training)

    def get_config(self):
        """Returns the constructor's arguments."""
        config = super().get_config()
        del config["cell"]
        regularizer = keras.regularizers.serialize(self.activity_regularizer)
        return {
            **self.cell.get_config(),
            **config,
            "activity_regularizer": regularizer,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        """Makes a layer from what `get_config` returns."""
        return cls(**config)
