"""What all recurrent layers have in common whose weights are distributions."""

import threading
import weakref
from operator import attrgetter

import keras
from keras import ops

# Keras's recurrent layers call a cell of this class as a sequence begins and ends.
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell

from ..ops.arguments import integer, is_integer, rate
from ..ops.random import bernoulli
from .base import VariationalLayer
from .distributions import MEAN_FIELD_NORMAL, STANDARD_NORMAL, kl_divergence
from .mode import Samples, mode

OF_LAYER = ("autocast", "input_dim", "input_shape")


class _ByThread(threading.local):
    def __init__(self):
        self.sequences = weakref.WeakKeyDictionary()


# The sequence that a cell is in. Not kept in the cell: the replicas of a distributed
# step are traced side by side, each in a thread.
_HELD = _ByThread()


class Sequence:
    """What is drawn once a sequence and held over its steps.

    Args:
        cell: The `RecurrentCell`.
        rows: Number of sequences in the batch.
    """

    def __init__(self, cell, rows):
        width, features = cell.gates * cell.units, cell.kernel.shape[0]
        self._estimator, self._linear = cell.estimator, ops.matmul
        self._dtype = cell.compute_dtype
        # Signs of each row, the same at all steps.
        self._kernel = cell._drawn(cell.kernel, [(rows, features), (rows, width)])
        recurrent = cell._drawn(
            cell.recurrent_kernel, [(rows, cell.units), (rows, width)]
        )
        self._recurrent = [
            cell.estimator.of_outputs(part, recurrent) for part in cell.recurrent_parts
        ]
        bias = None if cell.bias is None else cell._drawn_bias()
        now = mode()
        if isinstance(now, Samples):
            self._linear = now.matmul
            if bias is not None:  # Row n has the bias n mod K.
                once = [1] * (len(bias.shape) - 1)
                bias = ops.tile(bias, (rows // now.count, *once))
        self._bias, self._recurrent_bias = cell._biases(bias)
        # Predictions by means or samples of the posteriors draw nothing else.
        rates = (cell.dropout, cell.recurrent_dropout) if now is None else (0.0, 0.0)
        self._masks = [
            _dropout(shape, p, cell.seed_generator, self._dtype)
            for shape, p in zip(
                ((rows, features), (rows, cell.units)), rates, strict=True
            )
        ]
        self.is_projected = False

    def project(self, inputs, training):
        """x W + b of all steps, `[B, T, features]`."""
        x = ops.cast(inputs, self._dtype)
        if training and self._masks[0] is not None:
            x = x * self._masks[0][:, None]
        kernel = self._estimator.over_steps(self._kernel)
        z = self._estimator.apply(self._linear, x, kernel)
        return z if self._bias is None else z + ops.expand_dims(self._bias, -2)

    def project_step(self, inputs, training):
        """x W + b of one step, `[B, features]`."""
        x = ops.cast(inputs, self._dtype)
        if training and self._masks[0] is not None:
            x = x * self._masks[0]
        z = self._estimator.apply(self._linear, x, self._kernel)
        return z if self._bias is None else z + self._bias

    def dropped(self, h, training):
        """The state, some of its units dropped."""
        return h * self._masks[1] if training and self._masks[1] is not None else h

    def project_state(self, h, part=0):
        """h U, and its own bias, if the cell has two."""
        u = self._estimator.apply(self._linear, h, self._recurrent[part])
        return u if self._recurrent_bias is None else u + self._recurrent_bias


def _dropout(shape, p, seed, dtype):
    """0 with probability p, else 1 / (1 - p)."""
    return bernoulli(shape, seed, 1 - p, dtype) / (1 - p) if p else None


class RecurrentCell(VariationalLayer, DropoutRNNCell):
    """A cell that draws W, U and b once a sequence and holds them over its steps.

    A subclass says what a step is (`_step`), how many `gates` the pre-activations
    have, and how W and U are estimated (`estimator`).
    """

    kinds = ("kernel", "recurrent_kernel", "bias")
    gates = 1
    recurrent_parts = (slice(None),)  # Outputs of U that are not computed together.

    def __init__(
        self,
        units,
        activation="tanh",
        *,
        dropout=0.0,
        recurrent_dropout=0.0,
        recurrent_kernel_posterior_fn=MEAN_FIELD_NORMAL,
        recurrent_kernel_prior_fn=STANDARD_NORMAL,
        recurrent_kernel_divergence_fn=kl_divergence,
        **kwargs,
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
        self._set_functions(
            recurrent_kernel_posterior_fn=recurrent_kernel_posterior_fn,
            recurrent_kernel_prior_fn=recurrent_kernel_prior_fn,
            recurrent_kernel_divergence_fn=recurrent_kernel_divergence_fn,
        )

    @property
    def state_size(self):
        """Units of the state, or of each of them."""
        return self.units

    @property
    def output_size(self):
        """Units of the output."""
        return self.units

    @property
    def recurrent_kernel_posterior(self):
        """q of the recurrent kernel."""
        return self.recurrent_kernel.posterior

    @property
    def recurrent_kernel_prior(self):
        """p of the recurrent kernel, or None."""
        return self.recurrent_kernel.prior

    def _weight_shapes(self, input_shape):
        width = self.gates * self.units
        return (input_shape[-1], width), (self.units, width), (width,)

    def _biases(self, bias):
        """The biases of the projected inputs and of the projected state."""
        return bias, None

    # What Keras's recurrent layers call before and after a sequence.

    def get_dropout_mask(self, step_input):
        """Begins a sequence, also after one that an exception ended: draws for it."""
        _HELD.sequences[self] = Sequence(self, ops.shape(step_input)[0])

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
        if held is None:
            raise ValueError(
                "expected the cell to be a step of a `keras.layers.RNN`, alone or in "
                "`keras.layers.StackedRNNCells`, which lets it draw its weights once a "
                "sequence: called by itself, or by a cell around it, it would draw "
                f"others at each step. Received: a call of {self.name}"
            )
        if held.is_projected:
            x = inputs
        else:
            x = held.project_step(inputs, training)
        h, *others = keras.tree.flatten(states)
        new = self._step(x, held, training, h, *others)
        return new[0], keras.tree.pack_sequence_as(states, new)

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


class RecurrentLayer(keras.layers.RNN):
    """A recurrent layer around a `RecurrentCell`, whose weights are its own."""

    cell_class = None
    limits = VariationalLayer.limits

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
    num_examples = property(attrgetter("cell.num_examples"))
    kernel_posterior = property(attrgetter("cell.kernel_posterior"))
    kernel_prior = property(attrgetter("cell.kernel_prior"))
    recurrent_kernel_posterior = property(attrgetter("cell.recurrent_kernel_posterior"))
    recurrent_kernel_prior = property(attrgetter("cell.recurrent_kernel_prior"))
    bias_posterior = property(attrgetter("cell.bias_posterior"))
    bias_prior = property(attrgetter("cell.bias_prior"))

    def set_divergence_weight(self, beta):
        """Sets β, the part of their weight that the divergences count for."""
        self.cell.set_divergence_weight(beta)

    def call(self, sequences, initial_state=None, mask=None, training=False):
        """Returns outputs for one draw of the weights of each row."""
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
        return cls(**cls.cell_class.with_functions(config))
