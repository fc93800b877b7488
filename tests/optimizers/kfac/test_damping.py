import keras
import numpy as np
import pytest
from keras import ops

from harness.backends import compiled
from kzoo.optimizers.kfac.damping import damped_inverse, factored_damping


def factor(n, seed, scale=1.0):
    rows = np.random.default_rng(seed).normal(size=(3 * n, n))
    return (scale * rows.T @ rows / len(rows)).astype("float32")


def test_factored_damping_has_pi():
    a, g = factor(4, 0, 7.0), factor(3, 1, 0.01)
    pi = np.sqrt((np.trace(a) / 4) / (np.trace(g) / 3))
    of_a, of_g = factored_damping(ops.convert_to_tensor(a), ops.convert_to_tensor(g), 9)
    np.testing.assert_allclose([of_a, of_g], [pi * 3, 3 / pi], rtol=1e-5)


def test_factored_damping_does_not_see_how_a_product_is_split():
    a, g = map(ops.convert_to_tensor, (factor(4, 0), factor(3, 1)))
    of_a, of_g = factored_damping(a, g, 0.5)
    other_a, other_g = factored_damping(a * 1e12, g / 1e12, 0.5)
    np.testing.assert_allclose(other_a / 1e12, of_a, rtol=1e-5)
    np.testing.assert_allclose(other_g * 1e12, of_g, rtol=1e-5)


@pytest.mark.parametrize("zero", ["a", "g", "both"])
def test_with_a_trace_of_zero_pi_is_one(zero):
    a = factor(4, 0) * (zero == "g")
    g = factor(3, 1) * (zero == "a")
    found = factored_damping(ops.convert_to_tensor(a), ops.convert_to_tensor(g), 0.25)
    np.testing.assert_allclose(found, [0.5, 0.5])


def test_damped_inverse_times_the_damped_matrix_is_the_identity():
    # Two matrices, each with its own damping.
    matrices = np.stack([factor(5, 0), factor(5, 1, 10.0)])
    damping = np.array([0.1, 2.0], "float32")
    found = damped_inverse(*map(ops.convert_to_tensor, (matrices, damping)))
    damped = matrices + damping[:, None, None] * np.eye(5)
    np.testing.assert_allclose(found @ damped, [np.eye(5)] * 2, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("n", [3, 200])
def test_a_singular_matrix_with_hardly_any_damping_has_an_inverse(n, scale):
    row = scale * np.random.default_rng(0).normal(1.0, 1.0, size=(1, n))
    matrix = ops.convert_to_tensor((row.T @ row).astype("float32"))
    found = ops.convert_to_numpy(damped_inverse(matrix, ops.zeros(()) + 1e-30))
    assert np.isfinite(found).all()
    assert keras.backend.standardize_dtype(found.dtype) == "float32"


@pytest.mark.parametrize("n", [4, 256])
def test_the_least_damping_grows_with_the_root_of_the_size(n):
    # ε √n tr: XLA's decomposition of singular matrices like the second one may fail
    # with ε tr.
    matrix = 3.0 * np.eye(1, n, dtype="float32").T @ np.eye(1, n, dtype="float32")
    found = damped_inverse(ops.convert_to_tensor(matrix), ops.zeros(()))
    np.testing.assert_allclose(found[1, 1], 2.0**23 / (3 * n**0.5), rtol=1e-5)
    rows = np.random.default_rng(0).normal(size=(8, n))
    matrix = ops.convert_to_tensor((rows.T @ rows / 8).astype("float32"))
    found = compiled(lambda x: damped_inverse(x, ops.zeros(())))(matrix)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("jit", [False, True])
def test_damping_grows_tenfold_until_there_is_an_inverse(jit):
    # Of three matrices the first needs no more; the second, with an eigenvalue of
    # -0.02, needs 0.05, and the third, with -3, needs 10.
    matrices = [np.diag([1.0, 2.0]), np.diag([1.0, -0.02]), np.diag([1.0, -3.0])]
    matrices = np.stack(matrices).astype("float32")
    damping = np.array([1e-3, 5e-4, 1e-3], "float32")
    inverse = compiled(damped_inverse) if jit else damped_inverse
    found = inverse(*map(ops.convert_to_tensor, (matrices, damping)))
    expected = [
        np.diag([1 / 1.001, 1 / 2.001]),
        np.diag([1 / 1.05, 1 / 0.03]),
        np.diag([1 / 11.0, 1 / 7.0]),
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30])
def test_where_no_damping_helps_only_that_inverse_is_not_finite(value):
    matrices = np.stack([np.eye(3), np.diag([1.0, value, 1.0])]).astype("float32")
    damping = np.array([1.0, 1e-3], "float32")
    found = damped_inverse(*map(ops.convert_to_tensor, (matrices, damping)))
    np.testing.assert_allclose(found[0], np.eye(3) / 2, rtol=1e-6)
    assert not np.isfinite(found[1]).any()
