"""The steps of a sequence; and for gradients there and back, in one and the same loop.

A reversible cell's state has parts, h¹ and h² for instance. A step is a few couplings,
one after the other, each of which updates one part p by what it makes of others:

    p' = z ∘ p + v        or, if the cell mixes,        p' = z ∘ p + (1 - z) ∘ v,

with a gate z and v functions of the step's inputs and of other parts alone. So these,
p' and the bits that z forgets give p again, if the integers that stand for z and for
what is added are on the way back the very ones that they were on the way there. That
must not depend on a compiler. One formula that is compiled in two places may be merged
with other neighbours in each, and round at other points: numbers that differ in their
last bit may make other integers.

So there is one place. The gradient runs over the steps once more, there and back, in
one loop, whose body makes the integers of a coupling and then, depending on the turn,
does the coupling or undoes it. They are made by a branch of a conditional, which is a
function of its own in the compiled program, and one and the same in all turns. How many
turns there are and which branch is taken are known only as the program runs: no loop is
written out, no branch is merged with what follows, and its results stand in memory
before they are used. The same instructions, of the same numbers, give the same bits.
All else that the way back takes is integers, which are exact in any order, and
derivatives, which need not be.
"""

from functools import partial
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from ..ops.gradient import with_gradient
from ..ops.loops import array, at_step, loop, read, stacked, vjp, write


class Coupling(NamedTuple):
    """Which part is updated, which are read for that, and by how many gates."""

    part: int
    reads: tuple
    gates: int


def run(cell, tensors, **options):
    """Runs a cell over sequences, with a gradient that needs no state but the first.

    Args:
        cell: A `ReversibleCell`.
        tensors: A dict of tensors:
            x: The sequences, `[B, T, features]`.
            parts: List of the first state's parts.
            weights: List of dicts, the weights of each coupling.
            mask: Booleans `[B, T]`, if any steps are masked.
            drop_inputs, drop_state: What inputs and states are multiplied by, if any
                are dropped.
        **options: `Loop`'s options.

    Returns:
        List of the last state's parts and, with `output_units`, of the outputs.
    """

    def steps(given):
        return Loop(cell, keras.tree.pack_sequence_as(tensors, given), **options)

    def function(*given):
        last, outputs = steps(given).forwards()
        return (*map(cell.decode, last), *outputs)

    def gradient(given, upstream):
        by = keras.tree.pack_sequence_as(tensors, given)
        found = steps(given).backwards(keras.tree.flatten(upstream))
        by = {name: by[name] for name in found}
        floats = keras.tree.flatten(by)
        found = keras.tree.map_structure(
            lambda d, of: once_differentiable(ops.cast(d, of.dtype), *floats), found, by
        )
        # None of masks.
        found |= dict.fromkeys(tensors.keys() - found.keys())
        return tuple(keras.tree.flatten(found))

    return list(with_gradient(function, gradient)(*keras.tree.flatten(tensors)))


class Loop:
    """A cell's steps over given sequences.

    Args:
        cell: A `ReversibleCell`.
        tensors: A dict, as `run` takes it.
        go_backwards: Whether to run from the last step to the first.
        output_units: Of how many units to return the outputs of all steps; 0: none.
    """

    def __init__(self, cell, tensors, *, go_backwards, output_units):
        self.cell, self.fixed = cell, cell.fixed
        self.go_backwards, self.output_units = go_backwards, output_units
        self.x, self.mask = tensors["x"], tensors.get("mask")
        self.drop_inputs = tensors.get("drop_inputs")
        self.drop_state = tensors.get("drop_state")
        self.first = [self.fixed.encode(part) for part in tensors["parts"]]
        self.weights = cell.cast(tensors["weights"])
        self.steps = ops.shape(self.x)[1]
        # How many hyperbolic tangents exceed 2: none, which only a run can tell, as one
        # of these is what a gradient is taken by, and no constant.
        given = keras.tree.flatten([self.x[:, :1], tensors["parts"], self.weights])
        beyond = [ops.tanh(ops.sum(a)) > 2 for a in given]
        self.none = sum(ops.cast(is_beyond, "int32") for is_beyond in beyond)

    def forwards(self):
        """Runs all steps, and keeps nothing of them.

        Returns:
            Integers of the last state's parts; a list of the outputs,
            `[B, T, output_units]`, if wanted.
        """
        outputs = [self.output(self.first)] if self.output_units else []

        def step(t, carry):
            state, outputs = map(list, carry)
            x, mask = self.inputs(t)
            for number, coupling in enumerate(self.cell.couplings):
                increment, *z = self.integers(number, x, mask, state)
                n = state[coupling.part]
                if z:
                    n, _ = self.fixed.multiply(n, *z)
                state[coupling.part] = n + increment
            return state, [write(y, t, self.output(state)) for y in outputs]

        outputs = [array(self.steps, y) for y in outputs]
        last, outputs = loop(step, (self.first, outputs), self.steps)
        return last, [ops.swapaxes(stacked(y), 0, 1) for y in outputs]

    def backwards(self, upstream):
        """Runs all steps there and back.

        Args:
            upstream: List of the gradients of what `run` returns.

        Returns:
            A dict of the gradients of what `run` takes.
        """
        *d_last, d_outputs = upstream if self.output_units else [*upstream, None]
        d_x = array(self.steps, at_step(self.x, 0))
        d_weights = keras.tree.map_structure(
            lambda w: ops.zeros_like(w, dtype=self.cell.wide_dtype), self.weights
        )
        of_word = self.fixed.steps_per_word
        zeros = [ops.zeros_like(n, dtype="uint32") for n in self.first]
        words = [
            array(-(-self.steps // of_word), w) for w in zeros if self.fixed.forget_bits
        ]

        def turn(i, carry):
            after, words, d_x, found = carry
            back = i >= self.steps
            t = ops.where(back, 2 * self.steps - 1 - i, i)
            state, own, made = self.there_or_back(
                back, t, after, [read(w, t // of_word) for w in words]
            )
            words = [
                write(w, t // of_word, one) for w, one in zip(words, own, strict=True)
            ]
            # The state is in the carry, where it needs no memory beside the turn's.
            _, d_x_t, *found = loop(
                lambda _, carry: self.derive(t, made, d_outputs, *carry),
                [after, at_step(self.x, 0), *found],
                ops.where(back, 1, 0),
            )
            return state, words, write(d_x, t, d_x_t), found

        first, _, d_x, (d_first, d_weights) = loop(
            turn,
            (self.first, words, d_x, [d_last, d_weights]),
            self.unforeseen(2 * self.steps),
        )
        d_x = ops.swapaxes(stacked(d_x), 0, 1)
        found = {
            "x": ops.flip(d_x, axis=1) if self.go_backwards else d_x,
            "parts": d_first,
            "weights": d_weights,
        }
        return keras.tree.map_structure(partial(self.unless_lost, first), found)

    def there_or_back(self, back, t, state, words):
        """Does the couplings of a step, or undoes them.

        Args:
            back: Whether to undo them.
            t: The step's number.
            state: List of the integers of the state's parts.
            words: List of the words with what the parts have forgotten, if anything is.

        Returns:
            The state and the words that this leaves, and an array of the parts that
            the couplings have updated or, on the way back, were to update.
        """
        parts = [coupling.part for coupling in self.cell.couplings]
        x, mask = self.inputs(t)

        def turn(i, carry):
            state, words, made = carry
            number = ops.where(back, len(parts) - 1 - i, i)
            branches = [
                partial(self.integers, number, x, mask, state)
                for number in range(len(parts))
            ]
            increment, *z = ops.switch(number, branches)
            part = ops.take(np.int32(parts), number)
            n = chosen(state, part)
            if z:
                given = n, chosen(words, part), increment, *z
                n, word = ops.cond(
                    back, lambda: self.undo(*given), lambda: self.do(*given)
                )
                words = replaced(words, part, word)
            else:
                n = n + ops.where(back, -increment, increment)
            return replaced(state, part, n), words, write(made, number, n)

        carry = state, words, array(len(parts), state[0])
        return loop(turn, carry, self.unforeseen(len(parts)))

    def do(self, n, word, increment, z):
        """z n plus the increment, and the word with what z forgets."""
        n, digit = self.fixed.multiply(n, z)
        return n + increment, self.fixed.push(word, digit)

    def undo(self, n, word, increment, z):
        """What `do` was given."""
        word, digit = self.fixed.pop(word)
        return self.fixed.divide(n - increment, z, digit), word

    def derive(self, t, made, d_outputs, state, _, d_state, d_weights):
        """Takes the gradients back over a step.

        Args:
            t: The step's number.
            made: As `there_or_back` gives it on the way back.
            d_outputs: The gradient of the outputs, if there are any.
            state: List of the integers of the state's parts after the step.
            d_state: List of the gradients of the state's parts.
            d_weights: The gradients of the weights.

        Returns:
            List of the state before the step, the gradient of the step's inputs, and
            those of the state's parts and the weights.
        """
        state, d_state, d_weights = list(state), list(d_state), list(d_weights)
        x, mask = self.inputs(t)
        if d_outputs is not None:
            d_state = self.add_output(d_state, d_outputs, t)
        d_x = 0
        couplings = self.cell.couplings
        for number, coupling in reversed([*enumerate(couplings)]):
            part = coupling.part
            reads = self.read(state, coupling)
            made_here, pull = vjp(
                partial(self.couple, number), x, reads, self.weights[number]
            )
            v, *gate = made_here
            z, _ = self.cell.integers(v, gate, mask)
            state[part] = read(made, number)
            d_state[part], *d_made = self.derivatives(
                d_state[part], state[part], v, z, mask
            )
            d_x_part, d_reads, d_own = pull(tuple(d_made))
            d_x = d_x + d_x_part
            for one, d_read in zip(coupling.reads, d_reads, strict=True):
                d_state[one] = d_state[one] + d_read
            d_weights[number] = keras.tree.map_structure(
                lambda total, d: total + ops.cast(d, total.dtype),
                d_weights[number],
                d_own,
            )
        if self.drop_inputs is not None:
            d_x = d_x * self.drop_inputs
        return [state, ops.cast(d_x, self.x.dtype), d_state, d_weights]

    def unforeseen(self, turns):
        """A number of turns that no compiler knows, and so cannot write out."""
        return turns + self.none

    def integers(self, number, x, mask, state):
        """What a coupling adds to a part and, if there is one, its gate: integers."""
        reads = self.read(state, self.cell.couplings[number])
        v, *gate = self.couple(number, x, reads, self.weights[number])
        z, increment = self.cell.integers(v, gate, mask)
        return [increment] if z is None else [increment, z]

    def unless_lost(self, first, d):
        """A gradient, or NaN if the way back has not ended where the way there began.

        So it would be if any gate were made in another way than it was: no gradient
        were right then, and nothing else would tell.
        """
        same = [ops.all(n == m) for n, m in zip(first, self.first, strict=True)]
        nan = ops.cast(float("nan"), d.dtype)
        return ops.where(ops.all(ops.stack(same)), d, nan)

    def inputs(self, t):
        """The inputs of step t, some dropped, and the rows not masked, or None."""
        at = self.steps - 1 - t if self.go_backwards else t
        x = ops.cast(at_step(self.x, at), self.cell.compute_dtype)
        if self.drop_inputs is not None:
            x = x * self.drop_inputs
        if self.mask is None:
            return x, None
        return x, ops.expand_dims(at_step(self.mask, at), -1)

    def couple(self, number, x, reads, weights):
        """What a coupling makes of a step's inputs and of parts."""
        return self.cell.couple(number, x, reads, weights, self.drop_state)

    def read(self, state, coupling):
        """The parts that a coupling reads, as numbers."""
        return [self.cell.decode(state[part]) for part in coupling.reads]

    def derivatives(self, d, n, v, z, mask):
        """Gradients of p, v and, if there is one, the gate, from that of p'.

        Those of z p + v, or of z p + (1 - z) v, straight through all rounding.
        """
        d_v = d if mask is None else ops.where(mask, d, ops.zeros_like(d))
        if z is None:
            return d, d_v
        p, z = self.cell.decode(n), self.fixed.value(z, d.dtype)
        d_gate = (1 - 2.0**-self.fixed.forget_bits) * d_v
        if self.cell.mixes:
            return z * d, (1 - z) * d_v, (p - v) * d_gate
        return z * d, d_v, p * d_gate

    def output(self, state):
        """The output of a step: the first units of h¹ and h² side by side."""
        h = ops.concatenate([self.cell.decode(n) for n in state[:2]], axis=-1)
        return ops.cast(h[:, : self.output_units], self.cell.compute_dtype)

    def add_output(self, d_state, d_outputs, t):
        """Adds what the output of step t had an influence on."""
        d = ops.cast(at_step(d_outputs, t), self.cell.wide_dtype)
        d = ops.pad(d, [(0, 0), (0, self.cell.units - self.output_units)])
        d = ops.split(d, 2, axis=-1)
        return [d_state[0] + d[0], d_state[1] + d[1], *d_state[2:]]


@ops.custom_gradient
def once_differentiable(gradient, *by):
    """A gradient by tensors; differentiated by them again it is NaN, where not 0.

    As it is made of integers, zeros or worse would be found.
    """

    def second(d):
        lost = ops.where(ops.any(d != 0), float("nan"), 0.0)
        return (d, *(ops.ones_like(t) * ops.cast(lost, t.dtype) for t in by))

    return gradient, second


def chosen(tensors, index):
    """The tensor of a list that is at an index known only as the program runs."""
    return ops.take(ops.stack(tensors), index, axis=0)


def replaced(tensors, index, new):
    """The list with another tensor at such an index."""
    return [ops.where(index == i, new, one) for i, one in enumerate(tensors)]
