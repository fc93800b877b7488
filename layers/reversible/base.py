"""What reversible recurrent layers have in common."""

from functools import partial
from operator import attrgetter

import keras
from keras import ops

from ..ops.arguments import integer
from ..ops.loops import compiled_once
from ..ops.random import own_initializer
from ..ops.reversible import FixedPoint
from ..recurrent import _HELD, RecurrentCell, RecurrentLayer, Sequence
from ..seeded import SeededLayer
from .loop import run


class ReversibleSequence(Sequence):
    """The weights of each coupling, and what is dropped."""

    def __init__(self, cell, rows):
        super().__init__(cell, rows)
        self.weights = cell._weights_of_couplings()

    def _project(self, x):
        return x  # Each coupling projects them for itself.

    def masks(self, training):
        """A dict of what inputs and states are multiplied by, if any are dropped."""
        masks = zip(("drop_inputs", "drop_state"), self._masks, strict=True)
        return {name: m for name, m in masks if training and m is not None}


class KernelLayer(SeededLayer):
    """A layer with a kernel W, a recurrent kernel U, a bias b and activations.

    The weights stay in their own dtype: what learns from all steps is summed there.
    """

    def __init__(
        self,
        *,
        activation="tanh",
        recurrent_activation="sigmoid",
        use_bias=True,
        kernel_initializer="glorot_uniform",
        recurrent_initializer="orthogonal",
        bias_initializer="zeros",
        kernel_regularizer=None,
        recurrent_regularizer=None,
        bias_regularizer=None,
        kernel_constraint=None,
        recurrent_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.activation = keras.activations.get(activation)
        self.recurrent_activation = keras.activations.get(recurrent_activation)
        self.use_bias = use_bias
        self.kernel_initializer = own_initializer(kernel_initializer)
        self.recurrent_initializer = own_initializer(recurrent_initializer)
        self.bias_initializer = own_initializer(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.recurrent_regularizer = keras.regularizers.get(recurrent_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.recurrent_constraint = keras.constraints.get(recurrent_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)

    def _add_weights(self, kernel, recurrent_kernel, bias):
        """Adds W, U and, unless there is none, b, of these shapes."""
        self.bias = None
        for name, kind, shape in (
            ("kernel", "kernel", kernel),
            ("recurrent_kernel", "recurrent", recurrent_kernel),
            ("bias", "bias", bias),
        ):
            if name == "bias" and not self.use_bias:
                continue
            initializer = getattr(self, f"{kind}_initializer")
            weight = self.add_weight(
                name=name,
                shape=shape,
                initializer=self._first_bias if kind == "bias" else initializer,
                regularizer=getattr(self, f"{kind}_regularizer"),
                constraint=getattr(self, f"{kind}_constraint"),
                autocast=False,
            )
            setattr(self, name, weight)

    def _first_bias(self, shape, dtype=None):
        return self.bias_initializer(shape, dtype=dtype)

    def get_config(self):
        """Returns the constructor's arguments."""
        config = {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
            "recurrent_activation": keras.activations.serialize(
                self.recurrent_activation
            ),
            "use_bias": self.use_bias,
        }
        for kind in ("kernel", "recurrent", "bias"):
            for what, serialize in (
                ("initializer", keras.initializers.serialize),
                ("regularizer", keras.regularizers.serialize),
                ("constraint", keras.constraints.serialize),
            ):
                name = f"{kind}_{what}"
                config[name] = serialize(getattr(self, name))
        return config


class ReversibleCell(RecurrentCell, KernelLayer):
    """A cell whose state can be had again from the next one, to the bit.

    A subclass says which `couplings` make a step and what they make of inputs and
    parts (`make`). The parts are the halves of each state: h¹, h², c¹, c².
    """

    sequence = ReversibleSequence
    mixes = False  # Whether v counts for 1 - z.

    def __init__(
        self,
        units,
        activation="tanh",
        *,
        max_forget_bits=None,
        state_bits=23,
        gate_bits=10,
        **kwargs,
    ):
        super().__init__(units, activation, **kwargs)
        if self.units % 2:
            raise ValueError(
                "expected `units` to be even: each half of the state is updated by the "
                f"other. Received: units={units!r}"
            )
        self.state_bits = integer("state_bits", state_bits, 1, 30)
        self.gate_bits = integer("gate_bits", gate_bits, 1, 15)
        self.max_forget_bits = max_forget_bits
        if max_forget_bits is not None:
            self.max_forget_bits = integer(
                "max_forget_bits", max_forget_bits, 0, self.gate_bits
            )
        # Without a limit of its own a gate is one of 2^R_z, of at least 2^-R_z.
        forget_bits = self.max_forget_bits
        if forget_bits is None:
            forget_bits = self.gate_bits
        self.fixed = FixedPoint(self.state_bits, self.gate_bits, forget_bits)

    @property
    def couplings(self):
        """The couplings of a step, in their order."""
        raise NotImplementedError

    def make(self, number, x, reads, weights):
        """What a coupling makes: v and, if anything is forgotten, the gate in [0, 1].

        Args:
            number: Which coupling.
            x: The inputs of a step, in the compute dtype.
            reads: List of the parts that it reads, in the wide dtype.
            weights: A dict of its weights.
        """
        raise NotImplementedError

    @property
    def wide_dtype(self):
        """The dtype of what is not a product with weights."""
        return "float64" if self.compute_dtype == "float64" else "float32"

    @property
    def gates(self):
        """How often the weights have outputs for all units."""
        return sum(coupling.gates for coupling in self.couplings) // 2

    def build(self, input_shape):
        """Creates W, U and b, with the outputs of the couplings side by side."""
        kernel, _, bias = self._weight_shapes(input_shape)
        self._add_weights(kernel, (self.units // 2, *bias), bias)

    def _weights_of_couplings(self):
        """List of dicts of the couplings' weights."""
        found, start = [], 0
        for coupling in self.couplings:
            own = slice(start, start + coupling.gates * self.units // 2)
            weights = {"kernel": self.kernel[:, own]}
            parts = self.recurrent_kernel[:, own]
            weights["recurrent"] = [parts[:, part] for part in self.recurrent_parts]
            if self.use_bias:
                weights["bias"] = self.bias[own]
            found.append(weights)
            start = own.stop
        return found

    def _linear(self, x, weights):
        """x W + b, in the wide dtype."""
        z = ops.matmul(x, weights["kernel"])
        if "bias" in weights:
            z = z + weights["bias"]
        return ops.cast(z, self.wide_dtype)

    def _linear_of_state(self, h, kernel):
        """h U, in the wide dtype."""
        h = ops.cast(h, self.compute_dtype)
        return ops.cast(ops.matmul(h, kernel), self.wide_dtype)

    def parts_of(self, states):
        """The halves of all states."""
        return [
            ops.cast(half, self.wide_dtype)
            for state in states
            for half in ops.split(state, 2, axis=-1)
        ]

    def states_of(self, parts):
        """The states of which these are the halves."""
        pairs = zip(parts[::2], parts[1::2], strict=True)
        states = [ops.concatenate(pair, axis=-1) for pair in pairs]
        return [ops.cast(state, self.compute_dtype) for state in states]

    def couple(self, number, x, reads, weights, drop_state=None):
        """As `make`, some units of the state dropped for its product with U."""
        if drop_state is not None:
            first, *others = reads
            dropped = ops.split(drop_state, 2, axis=-1)
            dropped = dropped[self.couplings[number].reads[0]]
            reads = [first * ops.cast(dropped, first.dtype), *others]
        return self.make(number, x, reads, weights)

    def integers(self, v, gate, mask=None):
        """The gate z, if there is one, and what is added to z p, as integers.

        A masked row has a gate of 1, to which nothing is added: it stays as it is, and
        forgets nothing.

        Args:
            v: What a coupling makes.
            gate: List of its gate, or empty.
            mask: Which rows are not masked. None: all.
        """
        z = None
        if gate:
            z = self.fixed.gate(*gate)
            if mask is not None:
                z = ops.where(mask, z, self.fixed.one)
            if self.mixes:
                v = v * self.fixed.value(self.fixed.one - z, v.dtype)
        increment = self.fixed.encode(v)
        if mask is not None:
            increment = ops.where(mask, increment, 0)
        return z, increment

    def decode(self, n):
        """The number that an integer stands for."""
        return self.fixed.decode(n, self.wide_dtype)

    def cast(self, weights):
        """Weights in the compute dtype."""
        return keras.tree.map_structure(
            lambda w: ops.cast(w, self.compute_dtype), weights
        )

    def _step(self, x, held, training, *states):
        """One step that is differentiated as any other, straight through rounding."""
        fixed = self.fixed
        weights = self.cast(held.weights)
        drop_state = held.masks(training).get("drop_state")
        parts = [
            through(p, self.decode(fixed.encode(p))) for p in self.parts_of(states)
        ]
        for number, coupling in enumerate(self.couplings):
            p = parts[coupling.part]
            reads = [parts[part] for part in coupling.reads]
            v, *gate = self.couple(number, x, reads, weights[number], drop_state)
            z, increment = self.integers(v, gate)
            n = fixed.encode(p)
            if z is None:
                new = p + v
            else:
                n, _ = fixed.multiply(n, z)
                limited = (1 - 2.0**-fixed.forget_bits) * gate[0]
                z = through(limited, fixed.value(z, v.dtype))
                new = z * p + ((1 - z) * v if self.mixes else v)
            parts[coupling.part] = through(new, self.decode(n + increment))
        return self.states_of(parts)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "max_forget_bits": self.max_forget_bits,
            "state_bits": self.state_bits,
            "gate_bits": self.gate_bits,
        }


def through(number, value):
    """A value, with the gradient of a number that it is a rounding of."""
    return number + ops.stop_gradient(value - number)


class ReversibleLayer(RecurrentLayer):
    """A recurrent layer around a `ReversibleCell`."""

    max_forget_bits = property(attrgetter("cell.max_forget_bits"))

    def __init__(self, units, activation="tanh", *, output_units=None, **kwargs):
        super().__init__(units, activation, **kwargs)
        self.output_units = self.units if output_units is None else output_units
        self._runs = {}
        if self.unroll:
            raise ValueError(
                "expected `unroll` to be False: a loop that is written out keeps what "
                "this layer is there to do without. Received: unroll=True"
            )

    @property
    def output_units(self):
        """How many of the first units the outputs are; a layer not built may get it."""
        return self._output_units

    @output_units.setter
    def output_units(self, count):
        self._output_units = integer("output_units", count, 1, self.units)

    def inner_loop(self, sequences, initial_state, mask, training=False):
        """Runs over the steps; the gradient runs over them from the last state back."""
        cell, held = self.cell, _HELD.sequences[self.cell]
        tensors = {
            "x": ops.convert_to_tensor(sequences),
            "parts": cell.parts_of(keras.tree.flatten(initial_state)),
            "weights": held.weights,
            **held.masks(training),
        }
        if keras.tree.is_nested(mask):
            (mask,) = mask
        if mask is not None:
            tensors["mask"] = ops.cast(mask, "bool")
        options = {
            "go_backwards": self.go_backwards,
            "output_units": self.output_units if self.return_sequences else 0,
        }
        key = tuple(options.values())
        if key not in self._runs:
            self._runs[key] = compiled_once(partial(run, cell, **options))
        found = self._runs[key](tensors)
        count = len(tensors["parts"])
        states = cell.states_of(found[:count])
        last = outputs = states[0][:, : self.output_units]
        if self.return_sequences:
            (outputs,) = found[count:]
        if mask is not None and self.zero_output_for_mask:
            at = 0 if self.go_backwards else -1
            last = ops.where(mask[:, at, None], last, ops.zeros_like(last))
            if self.return_sequences:
                seen = ops.flip(mask, axis=1) if self.go_backwards else mask
                outputs = ops.where(seen[..., None], outputs, ops.zeros_like(outputs))
            else:
                outputs = last
        return last, outputs, states

    def compute_output_shape(self, sequences_shape, initial_state_shape=None):
        """Returns the outputs' shape, and those of the states if they are returned."""
        found = super().compute_output_shape(sequences_shape, initial_state_shape)
        output, *states = found if self.return_state else (found,)
        output = (*output[:-1], self.output_units)
        return (output, *states) if self.return_state else output

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "output_units": self.output_units}
