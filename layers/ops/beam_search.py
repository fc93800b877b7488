"""Search for the sequence that a model gives the largest probability."""

import keras
from keras import ops

from .arguments import integer, nonnegative


def beam_search(step, state, *, beams, length, start, end, length_penalty=0.0):
    """Finds sequences of ids of large probability, each id after those before it.

    With K beams, the K best beginnings are kept of each row; each goes on with every
    id, and of all these again the best K are kept. A sequence ends with the id `end`,
    and stays among the best, or does not, while others go on. Best is what has the
    largest score,

        s(y) = log P(y) / lp(|y|)   with   lp(n) = ((5 + n) / 6)^α,

    of which |y| counts the end. With one beam that is greedy search, and with as many
    as there are sequences it finds the best of all. The id 0 is padding and is
    never chosen. The loop ends when all sequences have.

    Reference: Wu et al., "Google's Neural Machine Translation System", 2016.
    https://arxiv.org/abs/1609.08144

    Args:
        step: Function of ids `[B, K]` and a state to log-probabilities of the ids that
            follow, `[B, K, V]`, and the next state.
        state: The first state: a structure of tensors `[B * K, ...]`, whose row
            b K + k is that of beam k of row b. All beams of a row start alike.
        beams: K.
        length: How many ids a sequence has at most, its end counted.
        start: The id before the first one.
        end: The id of the end, below V.
        length_penalty: α, at least 0.

    Returns:
        ids `[B, K, length]`, best first, without the start and 0 after the end, and
        their scores `[B, K]`. Those that have no end yet, and are as long as may be,
        are among them. Where there are less than K sequences, ids are 0 and scores
        -inf.

    Raises:
        ValueError: If a number is not within its bounds.

    Example:

    A model to which 3 is likely at first, and the end, 2, thereafter:

    >>> import numpy as np
    >>> from keras import ops
    >>> from kzoo.layers.ops.beam_search import beam_search
    >>> table = np.log(np.array([[0, 0, 0.2, 0.8], [0, 0, 0.9, 0.1]], "float32") + 1e-9)
    >>> def step(ids, state):
    ...     return ops.take(table, ops.where(ids == 3, 1, 0), axis=0), state
    >>> ids, scores = beam_search(
    ...     step, [ops.zeros((2, 1))], beams=2, length=3, start=1, end=2
    ... )
    >>> ops.convert_to_numpy(ids)[0].tolist()
    [[3, 2, 0], [2, 0, 0]]
    """
    beams, length = integer("beams", beams), integer("length", length)
    start, end = integer("start", start), integer("end", end)
    alpha = nonnegative("length_penalty", length_penalty)
    lost = float("-inf")
    rows = ops.shape(keras.tree.flatten(state)[0])[0] // beams

    def score(log_p, lengths):
        return log_p / ((5 + ops.cast(lengths, "float32")) / 6) ** alpha

    def go_on(t, ids, last, log_p, lengths, has_ended, state):
        return ops.logical_and(
            t < length, ops.any(~ops.logical_or(has_ended, log_p == lost))
        )

    def turn(t, ids, last, log_p, lengths, has_ended, state):
        following, state = step(last, state)
        vocabulary = following.shape[-1]
        integer("end", end, 1, vocabulary - 1)
        is_padding = ops.arange(vocabulary) == 0
        # What has ended goes on with padding, all else with anything else.
        following = ops.where(
            has_ended[..., None],
            ops.where(is_padding, 0.0, lost),
            ops.where(is_padding, lost, ops.cast(following, "float32")),
        )
        log_p = log_p[..., None] + following
        lengths = lengths + ops.cast(~has_ended, "int32")
        scores = ops.reshape(score(log_p, lengths[..., None]), (rows, -1))
        best = ops.top_k(scores, beams)[1]
        log_p = ops.take_along_axis(ops.reshape(log_p, (rows, -1)), best, axis=1)
        beam, last = best // vocabulary, best % vocabulary
        of_state = ops.reshape(ops.arange(rows)[:, None] * beams + beam, (-1,))
        lengths, has_ended = (
            ops.take_along_axis(x, beam, axis=1) for x in (lengths, has_ended)
        )
        ids = ops.take_along_axis(ids, beam[..., None], axis=1)
        ids = ops.where(ops.arange(length) == t, last[..., None], ids)
        has_ended = ops.logical_or(has_ended, last == end)
        state = keras.tree.map_structure(lambda s: ops.take(s, of_state, axis=0), state)
        return t + 1, ids, last, log_p, lengths, has_ended, state

    first = (
        ops.convert_to_tensor(0),
        ops.zeros((rows, beams, length), "int32"),
        ops.full((rows, beams), start, "int32"),
        # One is enough of beams that start alike.
        ops.broadcast_to(ops.where(ops.arange(beams) == 0, 0.0, lost), (rows, beams)),
        ops.zeros((rows, beams), "int32"),
        ops.zeros((rows, beams), "bool"),
        state,
    )
    _, ids, _, log_p, lengths, _, _ = ops.while_loop(go_on, turn, first)
    ids = ops.where(log_p[..., None] == lost, 0, ids)
    return ids, score(log_p, lengths)
