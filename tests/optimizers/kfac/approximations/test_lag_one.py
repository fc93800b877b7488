import keras
import numpy as np
import pytest
from keras import ops

from kzoo.optimizers.kfac.approximations.kronecker import Kronecker
from kzoo.optimizers.kfac.approximations.lag_one import LagOne, clipped, gamma
from kzoo.optimizers.kfac.approximations.lag_one_limit import LagOneLimit
from kzoo.optimizers.kfac.damping import factored_damping

DTYPE = "float64" if keras.backend.backend() == "tensorflow" else "float32"
TOL = 1e-9 if DTYPE == "float64" else 1e-3
DAMPING = 0.05


def chain(rng, size, count=40, steps=6, keep=0.7):
    """Rows of which each is like the one before, `[count, steps, size]`."""
    x = [rng.normal(size=(count, size))]
    turn = keep * np.linalg.qr(rng.normal(size=(size, size)))[0]
    for _ in range(steps - 1):
        x.append(x[-1] @ turn + 0.5 * rng.normal(size=(count, size)))
    return np.stack(x, axis=1)


def measured(approximation, weights=None):
    """What an approximation makes of a batch of chains, and these."""
    rng = np.random.default_rng(0)
    a, g = chain(rng, 3), chain(rng, 2, keep=-0.8)
    weights = np.ones(a.shape[:2]) if weights is None else weights
    given = [ops.convert_to_tensor(x.astype(DTYPE)) for x in (a, g, weights)]
    return approximation.average(*approximation.measure(*given, [])), a, g


def divided(approximation, factors, z, damping=DAMPING):
    """U of a gradient, in NumPy."""
    factors, caches = approximation.refresh(factors, [], damping)
    z = ops.cast(z, factors[0].dtype)
    found = approximation.precondition(z, factors, caches, damping)
    return ops.convert_to_numpy(found)


def moments(factors):
    """V_0 with damping, and V_1, as dense matrices of the gradient row by row."""
    a, g, _, a_next, g_next = (ops.convert_to_numpy(f) for f in factors)
    dampings = map(ops.convert_to_numpy, factored_damping(a, g, DAMPING))
    a, g = (f + d * np.eye(len(f)) for f, d in zip((a, g), dampings, strict=True))
    return np.kron(a, g), (a_next, g_next)


def check(found, expected, tolerance=TOL):
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found / largest, expected / largest, atol=tolerance)


Z = np.random.default_rng(1).normal(size=(3, 2))


@pytest.mark.parametrize("length", [1, 2, 5, 6])
def test_symmetric_links_divide_by_the_sum_of_all_covariances(length):
    approximation = LagOne((3, 2))
    factors, *_ = measured(approximation)
    factors[2] = ops.convert_to_tensor(float(length), DTYPE)
    v_0, of_next = moments(factors)
    v_1 = np.kron(*((f + f.T) / 2 for f in of_next))
    psi = v_1 @ np.linalg.inv(v_0)
    curvature = v_0.copy()
    for d in range(1, length):
        v_d = np.linalg.matrix_power(psi, d) @ v_0
        curvature += (1 - d / length) * (v_d + v_d.T)
    found = divided(approximation, factors, Z)
    expected = np.linalg.solve(curvature, Z.ravel()).reshape(Z.shape)
    check(found, expected)
    alone = np.linalg.solve(v_0, Z.ravel()).reshape(Z.shape)
    assert (np.abs(expected / alone - 1).max() > 0.1) == (length > 1)


def test_chains_without_ends_divide_by_the_sum_of_all_covariances():
    approximation = LagOneLimit((3, 2))
    factors, *_ = measured(approximation)
    v_0, of_next = moments(factors)
    psi = np.kron(*of_next) @ np.linalg.inv(v_0)
    assert np.abs(psi - psi.T).max() > 0.1
    curvature, v_d = v_0.copy(), v_0
    for _ in range(300):
        v_d = psi @ v_d
        curvature += v_d + v_d.T
    assert np.abs(v_d).max() < 1e-12
    found = divided(approximation, factors, Z)
    expected = np.linalg.solve(curvature, Z.ravel()).reshape(Z.shape)
    check(found, expected)


def test_of_long_chains_with_symmetric_links_both_are_the_same():
    symmetric, endless = LagOne((3, 2)), LagOneLimit((3, 2))
    factors, *_ = measured(symmetric)
    factors[2] = ops.convert_to_tensor(1e6, DTYPE)
    factors[3:] = [(f + ops.transpose(f)) / 2 for f in factors[3:]]
    one, other = (divided(which, factors, Z) for which in (symmetric, endless))
    check(one, other, 1e-4 + TOL)


@pytest.mark.parametrize("kind", [LagOne, LagOneLimit])
def test_without_correlation_of_neighbours_it_is_the_kronecker_product(kind):
    approximation, plain = kind((3, 2)), Kronecker((3, 2))
    factors, *_ = measured(approximation)
    factors[3:] = [ops.zeros_like(f) for f in factors[3:]]
    expected = divided(plain, factors[:2], Z)
    found = divided(approximation, factors, Z)
    check(found, expected)


def test_neighbours_are_those_that_count():
    weights = np.ones((40, 6))
    weights[::2, 4:] = 0  # Ends of sequences,
    weights[1::4, 2] = 0  # a gap,
    weights[3] = 0  # and a whole one.
    found, a, g = measured(LagOne((3, 2)), weights)
    count = weights.sum()
    expected = [0, 0, count / 39, 0, 0]
    for n in range(40):
        for t in range(6):
            here, then = weights[n, t], t < 5 and weights[n, t] * weights[n, t + 1]
            for i, x, share in ((0, a[n], count), (1, g[n], 1)):
                expected[i] = expected[i] + here * np.outer(x[t], x[t]) / share
                if then:
                    expected[3 + i] = expected[3 + i] + np.outer(x[t + 1], x[t]) / share
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_links_are_no_longer_than_one():
    # Of a chain that turns into its opposite at each step, with hardly any damping.
    rng = np.random.default_rng(0)
    approximation = LagOne((3, 2))
    signs = (-1.0) ** np.arange(50)[:, None]
    a, g = (np.repeat(rng.normal(size=(9, 1, n)), 50, 1) * signs for n in (3, 2))
    given = [x.astype("float32") for x in (a, g, np.ones((9, 50)))]
    statistics = approximation.measure(*map(ops.convert_to_tensor, given), [])
    factors = approximation.average(*statistics)
    _, (_, psi_a, _, psi_g) = approximation.refresh(factors, [], 1e-9)
    for psi in (psi_a, psi_g):
        np.testing.assert_allclose(psi, -0.98 * np.ones(len(psi)), rtol=1e-3)
    assert np.isfinite(divided(approximation, factors, Z, 1e-9)).all()


@pytest.mark.parametrize("length", [1, 2, 3, 10, 101])
def test_gamma_is_the_reciprocal_of_a_sum(length):
    x = np.concatenate([np.linspace(-0.99, 0.99, 45), [0.0, 1 - 1e-3]])
    d = np.arange(1, length)[:, None]
    expected = 1 / (1 + 2 * np.sum((1 - d / length) * x**d, axis=0))
    for of_x, tolerance in ((DTYPE, TOL), ("float32", 3e-3)):
        found = gamma(ops.convert_to_tensor(x.astype(of_x)), length + 0.3)
        np.testing.assert_allclose(found, expected, rtol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", DTYPE])
def test_at_its_ends_gamma_is_finite(dtype):
    x = ops.convert_to_tensor(np.array([-1.0, 1.0, 1.001], dtype))
    for length in (1, 2, 3, 30):
        found = ops.convert_to_numpy(gamma(x, length))
        np.testing.assert_allclose(found[1:], 1 / length, rtol=0.01)
        # 1 / γ(-1) is 1 / T if T is odd, 0 if it is even: at -1 + ε, ε.
        epsilon = 1 + ops.convert_to_numpy(clipped(x))[0]
        odd = length % 2
        np.testing.assert_allclose(found[0], length if odd else 1 / epsilon, rtol=0.2)
