import numpy as np
import pytest
from keras import ops

from harness.backends import compiled, gradients
from kzoo.layers.ops.loops import at_step, barrier, isolated, scan, vjp


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan(length, reverse):
    """h' = 2 h + i, with outputs that are not shaped as the carry."""

    def step(carry, i):
        (h,) = carry
        new = 2 * h + ops.cast(i, "int32")
        return [new], (ops.stack([h, new]), ops.cast(i, "float32"))

    def run(h):
        return scan(step, [h], length, ["int32", "float32"], reverse)

    expected, h = {}, 3
    for i in reversed(range(length)) if reverse else range(length):
        expected[i] = [h, 2 * h + i]
        h = 2 * h + i
    for function in (run, compiled(run)):
        (last,), (pairs, numbers) = function(ops.convert_to_tensor(np.int32(3)))
        assert int(last) == h
        np.testing.assert_array_equal(
            ops.convert_to_numpy(pairs), [expected[i] for i in range(length)]
        )
        np.testing.assert_array_equal(ops.convert_to_numpy(numbers), range(length))


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


def test_what_is_isolated_is_as_it_was():
    x = np.float32([[0.5, -2]])

    def loss(x):
        (x,) = barrier([x]) if not tape else (x,)
        return ops.sum(isolated(ops.tanh)(x) * np.float32([1, 3]))

    tape = False
    expected = np.tanh(x) @ [[1], [3]]
    for function in (loss, compiled(loss)):
        found = function(ops.convert_to_tensor(x))
        np.testing.assert_allclose(found, expected[0, 0], rtol=1e-6)
    tape = True  # TensorFlow has no gradient of a barrier.
    for function in (loss, compiled(loss)):
        (found,) = gradients(function, x)
        np.testing.assert_allclose(found, (1 - np.tanh(x) ** 2) * [1, 3], rtol=1e-5)


def test_at_step():
    x = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(at_step(ops.convert_to_tensor(x), 1), x[:, 1])
    mask = ops.convert_to_tensor(x[..., 0] > 4)
    np.testing.assert_array_equal(at_step(mask, 2), [True, True])
