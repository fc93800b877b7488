"""Search: against all sequences there are, greedy, and what rows and beams keep."""

import itertools

import numpy as np
import pytest
from keras import ops

from harness.backends import compiled
from kzoo.layers.ops.beam_search import beam_search

V, T, START, END = 5, 3, 1, 2
ROWS = 2
ALL = sum(3**n for n in range(T)) + 3**T  # Ended after 1, ..., T; and not.
rng = np.random.default_rng(0)
# Log-probabilities that depend on the row and on all ids before, counted in base V.
TABLE = rng.normal(size=(ROWS, V**T, V)).astype("float32")
TABLE = TABLE - np.log(np.exp(TABLE).sum(-1, keepdims=True))


def search(beams, *, rows=range(ROWS), length=T, end=END, **kwargs):
    table = TABLE[list(rows)].reshape(-1, V)

    def step(ids, state):
        own, before = state
        before = before * V + ops.reshape(ids, (-1,)) % V
        found = ops.take(table, own * V**T + before % V**T, axis=0)
        return ops.reshape(found, (-1, beams, V)), [own, before]

    own = np.repeat(np.arange(len(rows)), beams).astype("int32")
    found = compiled(
        lambda own: beam_search(
            step,
            [own, ops.zeros_like(own)],
            beams=beams,
            length=length,
            start=START,
            end=end,
            **kwargs,
        )
    )(ops.convert_to_tensor(own))
    return [ops.convert_to_numpy(x) for x in found]


def sequences(row, alpha):
    """All sequences with their scores, the best first."""
    found = {}
    for ids in itertools.product(range(1, V), repeat=T):
        n = ids.index(END) + 1 if END in ids else T
        before, log_p = START, 0.0
        for i in ids[:n]:
            log_p += TABLE[row, before, i]
            before = (before * V + i) % V**T
        score = log_p / ((5 + n) / 6) ** alpha
        found[(*ids[:n], *[0] * (T - n))] = score
    return sorted(found.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_with_enough_beams_finds_all_sequences_in_order(alpha):
    ids, scores = search(ALL + 2, length_penalty=alpha)
    for row in range(ROWS):
        expected = sequences(row, alpha)
        assert len(expected) == ALL
        assert [tuple(found) for found in ids[row, :ALL].tolist()] == [
            found for found, _ in expected
        ]
        found = [score for _, score in expected]
        np.testing.assert_allclose(scores[row, :ALL], found, rtol=1e-5)
        # There are no more.
        assert (scores[row, ALL:] == -np.inf).all() and not ids[row, ALL:].any()


def test_with_one_beam_is_greedy():
    ids, scores = search(1)
    for row in range(ROWS):
        before, log_p, expected = START, 0.0, []
        while len(expected) < T and END not in expected:
            best = 1 + TABLE[row, before, 1:].argmax()
            log_p += TABLE[row, before, best]
            expected.append(best)
            before = before * V + best
        assert ids[row, 0].tolist() == expected + [0] * (T - len(expected))
        np.testing.assert_allclose(scores[row, 0], log_p, rtol=1e-5)


def test_beams_are_what_is_best_at_each_step():
    """Written out for two beams: all that they go on with, and the best two of it."""
    ids, scores = search(2)
    for row in range(ROWS):
        beams = [((), 0.0)]
        for _ in range(T):
            more = []
            for y, log_p in beams:
                if END in y:
                    more.append((y, log_p))
                    continue
                before = START
                for i in y:
                    before = before * V + i
                more += [((*y, i), log_p + TABLE[row, before, i]) for i in range(1, V)]
            beams = sorted(more, key=lambda beam: -beam[1])[:2]
        for k, (y, log_p) in enumerate(beams):
            assert ids[row, k].tolist() == [*y, *[0] * (T - len(y))]
            np.testing.assert_allclose(scores[row, k], log_p, rtol=1e-5)


def test_rows_stand_for_themselves():
    ids, scores = search(3)
    for row in range(ROWS):
        alone = search(3, rows=[row])
        np.testing.assert_array_equal(alone[0][0], ids[row])
        np.testing.assert_allclose(alone[1][0], scores[row], rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"beams": 0},
        {"length": 0},
        {"start": 0},
        {"end": -1},
        {"length_penalty": -0.5},
    ],
)
def test_refusals(change):
    ((name, value),) = change.items()
    arguments = {"beams": 1, "length": 2, "start": 1, "end": 2, **change}
    with pytest.raises(ValueError, match=f"Received: {name}={value}"):
        beam_search(None, None, **arguments)


def test_refuses_an_end_that_no_step_gives():
    with pytest.raises(ValueError, match=f"from 1 to {V - 1}. Received: end={V}"):
        search(1, end=V)
