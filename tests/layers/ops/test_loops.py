import numpy as np
from keras import ops

from harness.backends import compiled
from kzoo.layers.ops.loops import array, at_step, loop, read, stacked, vjp, write


def test_loop_with_an_array():
    """h' = 2 h + i, with all h and i kept; as many turns as the run says."""

    def run(h, turns):
        def step(i, carry):
            h, pairs = carry
            return 2 * h + i, write(pairs, i, ops.stack([h, i]))

        h, pairs = loop(step, (h, array(5, ops.stack([h, h]))), turns)
        return h, read(pairs, 1), stacked(pairs)

    given = [ops.convert_to_tensor(np.int32(n)) for n in (3, 4)]
    expected = [[3, 0], [6, 1], [13, 2], [28, 3], [0, 0]]
    for function in (run, compiled(run)):
        h, pair, pairs = function(*given)
        assert int(h) == 59
        np.testing.assert_array_equal(ops.convert_to_numpy(pairs), expected)
        np.testing.assert_array_equal(ops.convert_to_numpy(pair), expected[1])


def test_vjp():
    def function(x, pair):
        return ops.sin(x), x * pair[0]  # Of pair[1] nothing is made.

    x, y = (ops.convert_to_tensor(np.float32([1, 2]) * i) for i in (1, 3))
    outputs, pull = vjp(function, x, [y, y + 1])
    np.testing.assert_allclose(outputs[1], [3, 12])
    d_x, (d_y, nothing) = pull((ops.ones_like(x), 2 * ops.ones_like(x)))
    np.testing.assert_allclose(d_x, np.cos([1, 2]) + 2 * np.array([3, 6]), rtol=1e-6)
    np.testing.assert_allclose(d_y, [2, 4])
    np.testing.assert_array_equal(nothing, 0)


def test_at_step():
    x = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(at_step(ops.convert_to_tensor(x), 1), x[:, 1])
    mask = ops.convert_to_tensor(x[..., 0] > 4)
    np.testing.assert_array_equal(at_step(mask, 2), [True, True])
