"""The steps of a sequence, forwards, and backwards from what the last one leaves.

A reversible cell's state has parts, h¹ and h² for instance. A step is a few couplings,
one after the other, each of which updates one part p by what it makes of others:

    p' = z ∘ p + v        or, if the cell mixes,        p' = z ∘ p + (1 - z) ∘ v,

with a gate z and v functions of the step's inputs and of other parts alone. So these,
p' and the bits that z forgets give p again. What they make is computed by the very same
function in both directions, one step at a time, and rounded to integers at once:
gates that differed in their last bit could make other integers.
"""

from functools import partial
from typing import NamedTuple

import keras
from keras import ops

from ..ops.loops import at_step, barrier, isolated, kept, scan, vjp


class Coupling(NamedTuple):
    """Which part is updated, which are read for that, and by how many gates."""

    part: int
    reads: tuple
    gates: int


def run(cell, tensors, **options):
    """Runs a cell over sequences, with a gradient that needs no state but the last.

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
        List of the last state's parts and, with `all_steps`, of the outputs.
    """

    @ops.custom_gradient
    def function(*flat):
        given = keras.tree.pack_sequence_as(tensors, flat)
        loop = Loop(cell, given, **options)
        last, words, outputs = loop.forwards(loop.training)

        def gradient(*upstream):
            if loop.training:
                end = last, words
            else:  # Nothing was kept.
                end = loop.forwards(True)[:2]
            found = loop.backwards(*end, keras.tree.flatten(upstream))
            # None of masks.
            found |= dict.fromkeys(given.keys() - found.keys())
            return tuple(keras.tree.flatten(found))

        return (*map(cell.decode, last), *outputs), gradient

    return list(function(*keras.tree.flatten(tensors)))


class Loop:
    """A cell's steps over given sequences.

    Args:
        cell: A `ReversibleCell`.
        tensors: A dict, as `run` takes it.
        go_backwards: Whether to run from the last step to the first.
        all_steps: Whether to return the outputs of all steps.
        training: Whether a gradient is wanted, for which the bits are to be kept that
            the gates forget. If not, a gradient runs forwards once more.
    """

    def __init__(self, cell, tensors, *, go_backwards, all_steps, training):
        self.cell, self.fixed = cell, cell.fixed
        self.go_backwards, self.all_steps = go_backwards, all_steps
        self.training = training
        self.x, self.mask = tensors["x"], tensors.get("mask")
        self.drop_inputs = tensors.get("drop_inputs")
        self.drop_state = tensors.get("drop_state")
        self.first = [self.fixed.encode(part) for part in tensors["parts"]]
        self.weights = cell.cast(tensors["weights"])
        matmul, *activations = cell.functions
        self.functions = [
            lambda *pair: kept(matmul(*pair)),
            *(isolated(f) for f in activations),
        ]
        self.steps = ops.shape(self.x)[1]

    def plan(self, remember):
        """How many steps a word's bits are enough for, and how many words that makes.

        The words are about as full as each other: together they may be for a few
        steps more than there are.
        """
        if not remember or not self.fixed.forget_bits:
            return self.steps, 1
        most = self.fixed.steps_per_word
        words = -(-self.steps // most)
        return (-(-self.steps // words) if isinstance(words, int) else most), words

    def forwards(self, remember):
        """Runs all steps.

        Args:
            remember: Whether to keep what the gates forget.

        Returns:
            Integers of the last state's parts; the words of each part, of which the
            first axis is time; a list of the outputs, `[B, T, units]`, if wanted.
        """
        of_word, count = self.plan(remember)
        parts = range(len(self.first) if remember and self.fixed.forget_bits else 0)
        outputs = [self.cell.compute_dtype] if self.all_steps else []

        def step(carry, t):
            state, words = map(list, carry)
            x, mask = self.inputs(t, of_word * count)
            for number, coupling in enumerate(self.cell.couplings):
                part = coupling.part
                given = barrier((x, self.read(state, coupling), self.weights[number]))
                v, *gate = barrier(self.couple(number, *given))
                z, increment = self.cell.integers(v, gate, mask)
                if z is not None:
                    state[part], digit = self.fixed.multiply(state[part], z)
                    if words:
                        words[part] = self.fixed.push(words[part], digit)
                state[part] = state[part] + increment
            return (state, words), tuple(self.output(state) for _ in outputs)

        def word(state, i):
            empty = [ops.zeros_like(state[part], dtype="uint32") for part in parts]
            (state, words), found = scan(
                lambda carry, j: step(carry, i * of_word + j),
                (state, empty),
                of_word,
                outputs,
            )
            return state, (*words, *found)

        last, found = scan(word, self.first, count, ["uint32" for _ in parts] + outputs)
        outputs = [self.batch_first(y) for y in found[len(parts) :]]
        return last, list(found[: len(parts)]), outputs

    def backwards(self, last, words, upstream):
        """Runs all steps back.

        Args:
            last: As `forwards` returns it.
            words: As `forwards` returns them.
            upstream: List of the gradients of what `run` returns.

        Returns:
            A dict of the gradients of what `run` takes.
        """
        of_word, count = self.plan(True)
        *d_last, d_outputs = upstream if self.all_steps else [*upstream, None]
        zeros = keras.tree.map_structure(
            lambda w: ops.zeros_like(w, dtype=self.cell.wide_dtype), self.weights
        )

        def step(carry, t):
            state, words, d_state, d_weights = map(list, carry)
            x, mask = self.inputs(t, of_word * count)
            if d_outputs is not None:
                d_state = self.add_output(d_state, d_outputs, t)
            d_x = 0
            for number, coupling in reversed([*enumerate(self.cell.couplings)]):
                part = coupling.part
                given = barrier((x, self.read(state, coupling), self.weights[number]))
                made, pull = vjp(partial(self.couple, number), *given)
                v, *gate = barrier(made)
                z, increment = self.cell.integers(v, gate, mask)
                state[part] = state[part] - increment
                if z is not None:
                    words[part], digit = self.fixed.pop(words[part])
                    state[part] = self.fixed.divide(state[part], z, digit)
                d_state[part], *d_made = self.derivatives(
                    d_state[part], state[part], v, z, mask
                )
                d_x_part, d_reads, d_own = pull(tuple(d_made))
                d_x = d_x + d_x_part
                for read, d in zip(coupling.reads, d_reads, strict=True):
                    d_state[read] = d_state[read] + d
                d_weights[number] = keras.tree.map_structure(
                    lambda total, d: total + ops.cast(d, total.dtype),
                    d_weights[number],
                    d_own,
                )
            if self.drop_inputs is not None:
                d_x = d_x * self.drop_inputs
            return (state, words, d_state, d_weights), (ops.cast(d_x, self.x.dtype),)

        def word(carry, i):
            state, d_state, d_weights = carry
            (state, _, d_state, d_weights), (d_x,) = scan(
                lambda carry, j: step(carry, i * of_word + j),
                (state, [w[i] for w in words], d_state, d_weights),
                of_word,
                [self.x.dtype],
                reverse=True,
            )
            return (state, d_state, d_weights), (d_x,)

        (first, d_first, d_weights), (d_x,) = scan(
            word, (last, d_last, zeros), count, [self.x.dtype], reverse=True
        )
        d_x = self.batch_first(d_x)
        found = {
            "x": ops.flip(d_x, axis=1) if self.go_backwards else d_x,
            "parts": d_first,
            "weights": d_weights,
        }
        return keras.tree.map_structure(partial(self.unless_lost, first), found)

    def unless_lost(self, first, d):
        """A gradient, or NaN if the way back has not ended where the way there began.

        So it would be if any gate were made in another way than it was: no gradient
        were right then, and nothing else would tell.
        """
        same = [ops.all(n == m) for n, m in zip(first, self.first, strict=True)]
        nan = ops.cast(float("nan"), d.dtype)
        return ops.where(ops.all(ops.stack(same)), d, nan)

    def inputs(self, t, planned):
        """The inputs of step t, some dropped, and which rows are not masked, or None.

        Args:
            t: The step's number.
            planned: How many steps are planned; those past the last are masked.
        """
        mask, at = None, t
        if not isinstance(self.steps, int) or planned > self.steps:
            mask, at = t < self.steps, ops.minimum(t, self.steps - 1)
        if self.go_backwards:
            at = self.steps - 1 - at
        x = ops.cast(at_step(self.x, at), self.cell.compute_dtype)
        if self.drop_inputs is not None:
            x = x * self.drop_inputs
        if self.mask is not None:
            own = ops.expand_dims(at_step(self.mask, at), -1)
            mask = own if mask is None else ops.logical_and(own, mask)
        return x, mask

    def couple(self, number, x, reads, weights):
        """What a coupling makes of a step's inputs and of parts."""
        return self.cell.couple(
            number, x, reads, weights, self.functions, self.drop_state
        )

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
        """The output of a step: h¹ and h² side by side."""
        h = ops.concatenate([self.cell.decode(n) for n in state[:2]], axis=-1)
        return ops.cast(h, self.cell.compute_dtype)

    def add_output(self, d_state, d_outputs, t):
        """Adds what the output of step t had an influence on."""
        d = ops.cast(
            at_step(d_outputs, ops.minimum(t, self.steps - 1)), self.cell.wide_dtype
        )
        d = ops.where(t < self.steps, d, ops.zeros_like(d))
        d = ops.split(d, 2, axis=-1)
        return [d_state[0] + d[0], d_state[1] + d[1], *d_state[2:]]

    def batch_first(self, stacked):
        """What the steps of all words give, `[words, steps, B, ...]`: `[B, T, ...]`."""
        words, of_word, *shape = ops.shape(stacked)
        stacked = ops.reshape(stacked, (words * of_word, *shape))
        if not isinstance(self.steps, int) or words * of_word > self.steps:
            stacked = stacked[: self.steps]
        return ops.transpose(stacked, (1, 0, 2))
