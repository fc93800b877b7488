"""The estimators against explicit kernels, one for each row, in float64."""

import keras
import numpy as np
import pytest
from keras import ops

from harness.backends import gradients
from kzoo.layers.ops.random import normal, random_sign
from kzoo.layers.ops.variational import (
    flipout,
    local_reparameterization,
)

B, IN, OUT = 6, 5, 4
rng = np.random.default_rng(0)
DTYPE = "float64" if keras.backend.backend() == "tensorflow" else "float32"
TOL = 1e-12 if DTYPE == "float64" else 1e-5


def draw(*shape):
    return rng.normal(size=shape).astype(DTYPE)


def signs(*shape):
    return rng.choice([-1.0, 1.0], size=shape).astype(DTYPE)


def conv(x, kernel):
    return ops.conv(x, kernel, strides=1, padding="same", data_format="channels_last")


def numpy(tensor):
    return ops.convert_to_numpy(tensor)


def test_flipout_is_a_kernel_of_its_own_for_each_row():
    x, mean, delta = draw(B, IN), draw(IN, OUT), draw(IN, OUT)
    s, r = signs(B, IN), signs(B, OUT)
    expected = [x[n] @ (mean + delta * np.outer(s[n], r[n])) for n in range(B)]
    y = numpy(flipout(ops.matmul, x, mean, delta, s, r))
    np.testing.assert_allclose(y, expected, TOL, TOL)


def test_flipout_without_signs_of_the_inputs():
    x, mean, delta, r = draw(B, IN), draw(IN, OUT), draw(IN, OUT), signs(B, OUT)
    expected = [x[n] @ (mean + delta * r[n]) for n in range(B)]
    y = numpy(flipout(ops.matmul, x, mean, delta, None, r))
    np.testing.assert_allclose(y, expected, TOL, TOL)


def test_flipout_of_a_convolution():
    x, mean, delta = draw(B, 7, 7, IN), draw(3, 3, IN, OUT), draw(3, 3, IN, OUT)
    s, r = signs(B, 1, 1, IN), signs(B, 1, 1, OUT)
    expected = [
        numpy(conv(x[n : n + 1], mean + delta * np.outer(s[n], r[n])))[0]
        for n in range(B)
    ]
    y = numpy(flipout(conv, x, mean, delta, s, r))
    np.testing.assert_allclose(y, expected, TOL, TOL)


def test_limits_of_flipout():
    x, mean, delta = draw(B, IN), draw(IN, OUT), draw(IN, OUT)
    s, r = signs(B, IN), signs(B, OUT)
    plain = flipout(ops.matmul, x, mean, 0 * delta, s, r)
    np.testing.assert_allclose(numpy(plain), x @ mean, TOL, TOL)
    shared = flipout(ops.matmul, x, mean, delta, np.abs(s), np.abs(r))
    np.testing.assert_allclose(numpy(shared), x @ (mean + delta), TOL, TOL)


DRAWS = 20000


def samples(estimator):
    """Many batches of outputs `[DRAWS, B, OUT]`, with the kernel's W̄ and σ."""
    x, mean = draw(B, IN), draw(IN, OUT)
    stddev = np.exp(draw(IN, OUT))
    delta = stddev * numpy(normal((DRAWS, IN, OUT), 1, "float32"))
    rows = np.broadcast_to(x, (DRAWS, B, IN))
    if estimator == "flipout":
        s = numpy(random_sign((DRAWS, B, IN), 2, "float32"))
        r = numpy(random_sign((DRAWS, B, OUT), 3, "float32"))
        y = flipout(ops.matmul, rows, mean, delta.astype(DTYPE), s, r)
    elif estimator == "reparameterization":
        y = ops.matmul(rows, mean + delta.astype(DTYPE))
    else:
        y = local_reparameterization(
            ops.matmul, rows, mean, stddev, lambda shape: normal(shape, 4, DTYPE)
        )
    return numpy(y), x, mean, stddev


@pytest.mark.parametrize("estimator", ["flipout", "reparameterization", "local"])
def test_mean_and_covariance_of_the_outputs(estimator):
    """All are unbiased and have equal variances; rows covary only if they share W."""
    y, x, mean, stddev = samples(estimator)
    variance = x**2 @ stddev**2
    error = 5 * np.sqrt(variance / DRAWS)
    assert (np.abs(y.mean(0) - x @ mean) < error).all()
    np.testing.assert_allclose(y.var(0), variance, rtol=0.08)
    # Cov(y_n, y_m) = sum_i x_ni x_mi σ_i² with one kernel, and 0 without.
    centered = y - y.mean(0)
    covariance = np.einsum("tno,tmo->nmo", centered, centered) / DRAWS
    shared = np.einsum("ni,mi,io->nmo", x, x, stddev**2)
    expected = shared if estimator == "reparameterization" else shared * 0
    expected[np.arange(B), np.arange(B)] = variance
    scale = np.sqrt(variance[:, None] * variance[None])
    assert (np.abs(covariance - expected) < 0.06 * scale).all()


def test_rows_of_flipout_share_magnitudes():
    """Uncorrelated but not independent: the squares of the rows correlate."""
    y, x, mean, _ = samples("flipout")
    squares = ((y - x @ mean) ** 2).reshape(DRAWS, -1)
    correlation = np.corrcoef(squares[:, 0], squares[:, OUT])[0, 1]
    independent = np.corrcoef(squares[:, 0], np.roll(squares[:, OUT], 1))[0, 1]
    assert correlation > 0.05 > abs(independent)


def test_local_reparameterization_where_nothing_is_drawn():
    """Rows of zeros, and points, have finite gradients."""
    x = draw(B, IN)
    x[0] = 0

    def loss(x, stddev):
        mean = ops.ones((IN, OUT), DTYPE)
        y = local_reparameterization(
            ops.matmul, x, mean, stddev, lambda shape: ops.ones(shape, DTYPE)
        )
        return ops.sum(y)

    for gradient, expected in zip(
        gradients(loss, x, np.zeros((IN, OUT), DTYPE)), (OUT, 0), strict=True
    ):
        np.testing.assert_array_equal(gradient, np.full_like(gradient, expected))
