"""The Gaussian likelihood against SciPy, and inside of `compile`."""

import keras
import numpy as np
import pytest
from scipy import stats

from harness import check_loss
from kzoo.layers import MeanAndVariance
from kzoo.optimizers import KFAC
from kzoo.zoo.losses import (
    GaussianNegativeLogLikelihood,
    gaussian_negative_log_likelihood,
)

RNG = np.random.default_rng(0)
B, T = 12, 3
MEAN, VARIANCE = RNG.normal(size=(B, T)), np.exp(RNG.normal(size=(B, T)))
Y = RNG.normal(size=(B, T))
PREDICTED = np.stack([MEAN, VARIANCE], -1)
EXPECTED = -stats.norm.logpdf(Y, MEAN, np.sqrt(VARIANCE)).sum(-1)


def value(x):
    return keras.ops.convert_to_numpy(x)


def test_equals_scipy():
    found = value(gaussian_negative_log_likelihood(Y, PREDICTED.astype("float32")))
    assert found.shape == (B,)
    np.testing.assert_allclose(found, EXPECTED, rtol=1e-5, atol=1e-5)
    loss = GaussianNegativeLogLikelihood()(Y, PREDICTED)
    assert float(loss) == pytest.approx(EXPECTED.mean(), rel=1e-5)


def test_weights_of_examples():
    weights = RNG.uniform(size=B)
    found = GaussianNegativeLogLikelihood(reduction="sum")(Y, PREDICTED, weights)
    assert float(found) == pytest.approx((weights * EXPECTED).sum(), rel=1e-5)


def test_one_target_may_lack_its_axis():
    column = gaussian_negative_log_likelihood(Y[:, :1], PREDICTED[:, :1])
    flat = gaussian_negative_log_likelihood(Y[:, 0], PREDICTED[:, :1])
    np.testing.assert_array_equal(value(flat), value(column))
    whole = np.arange(3)  # labels that are integers
    found = gaussian_negative_log_likelihood(whole, np.ones((3, 1, 2), "float32"))
    expected = -stats.norm.logpdf(whole, 1, 1)
    np.testing.assert_allclose(value(found), expected, rtol=1e-6)


@pytest.mark.tensorflow  # JAX has no 64-bit types unless they are enabled.
def test_float64_stays_so():
    found = value(gaussian_negative_log_likelihood(Y, PREDICTED))
    np.testing.assert_allclose(found, EXPECTED, rtol=1e-13)


def test_extreme_numbers_stay_finite():
    # (y - μ)² overflows float32 where the quotient does not, and float16 far earlier.
    predicted = np.array([[[0.0, 1e30]], [[0.0, 1e-30]], [[0.0, 1.0]]], "float32")
    y = np.array([[1e22], [1e-20], [0.0]], "float32")
    expected = 0.5 * np.log(2 * np.pi) + np.array(
        [0.5 * 1e14 + 15 * np.log(10), 0.5 * 1e-10 - 15 * np.log(10), 0]
    )
    found = value(gaussian_negative_log_likelihood(y, predicted))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    half = PREDICTED.astype("float16")
    far = value(gaussian_negative_log_likelihood(np.full((B, T), 1e3), half))
    assert far.dtype == "float32" and np.isfinite(far).all() and far.min() > 1e4


def test_gradient_in_a_compiled_step():
    # Of a constant prediction μ = a, σ² = softplus(b) = v: with d = y - a,
    # ∂/∂a = -d / v and ∂/∂b = sigmoid(b) (1 / v - d² / v²) / 2.
    a, b = 3.0, 0.5
    head = keras.layers.Dense(2, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((1,)), head, MeanAndVariance(floor=1e-12)])
    head.bias.assign([a, b])
    optimizer = keras.optimizers.SGD(1.0)
    model.compile(optimizer, GaussianNegativeLogLikelihood(), jit_compile=True)
    y = RNG.normal(5.0, 2.0, size=(8, 1))
    loss = model.train_on_batch(np.zeros((8, 1)), y)
    v, d = np.log1p(np.exp(b)), y - a
    assert loss == pytest.approx(-stats.norm.logpdf(y, a, v**0.5).mean(), rel=1e-5)
    slope = 1 / (1 + np.exp(-b))
    expected = [np.mean(-d / v), slope * np.mean(1 / v - d**2 / v**2) / 2]
    np.testing.assert_allclose([a, b] - value(head.bias), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("true", "predicted"),
    [((4, 2), (4, 3, 2)), ((4,), (4, 3, 2)), ((4, 3), (4, 3)), ((4, 2), (4, 2, 3))],
)
def test_other_shapes_are_refused(true, predicted):
    with pytest.raises(ValueError, match="Received: y_true of shape"):
        GaussianNegativeLogLikelihood()(np.ones(true), np.ones(predicted))


@pytest.mark.slow
def test_contract():
    given = {"reduction": "sum", "name": "nll", "dtype": "float64"}
    check_loss(GaussianNegativeLogLikelihood, given, Y, PREDICTED)


def kfac_of(fisher, count):
    """A model of 2 targets of 3 numbers, `count` times the same, and its KFAC."""
    layers = [keras.Input((3,)), keras.layers.Dense(4), MeanAndVariance()]
    model = keras.Sequential(layers)
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    optimizer = KFAC(model, fisher=fisher, seed=0)
    model.compile(optimizer, GaussianNegativeLogLikelihood())
    optimizer.build(model.trainable_variables)
    x = np.repeat(rng.normal(size=(1, 3)), count, axis=0).astype("float32")
    optimizer.observe(keras.ops.convert_to_tensor(x))
    (factors,) = optimizer.factors.values()
    return model, x[:1], factors["G"].numpy()


def test_kfac_has_its_curvature():
    # The Fisher information is the second derivative of the expected loss, with targets
    # from the distribution at s.
    model, x, found = kfac_of("exact", 2000)
    dense, last = model.layers
    s = value(dense(x))[0].astype("float64")
    step = 2e-2

    def expected_loss(change):
        predicted = value(last((s + step * change)[None].astype("float32")))[0]
        there = value(last(s[None].astype("float32")))[0]
        mean, variance = predicted.T.astype("float64")
        square = (there[:, 0] - mean) ** 2 + there[:, 1]
        return 0.5 * np.sum(square / variance + np.log(variance))

    unit = np.eye(4)
    expected = np.array(
        [
            [
                sum(
                    i * j * expected_loss(i * unit[a] + j * unit[b])
                    for i in (1, -1)
                    for j in (1, -1)
                )
                / (4 * step**2)
                for a in range(4)
            ]
            for b in range(4)
        ]
    )
    np.testing.assert_allclose(np.diag(found), np.diag(expected), rtol=1e-3)
    # Each example gives its targets signs, of which the mean product is 0.
    np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())


def test_kfac_draws_its_targets():
    (*_, exact), (*_, sampled) = kfac_of("exact", 2000), kfac_of("sampled", 20000)
    np.testing.assert_allclose(sampled, exact, atol=0.05 * np.abs(exact).max())
