import keras
import numpy as np
import pytest
from keras import ops

from kzoo.layers import (
    CauchyPrior,
    DenseFlipout,
    MeanFieldNormal,
    NormalPrior,
    ScaleMixturePrior,
    kl_divergence,
    sampled_kl_divergence,
)
from kzoo.layers.variational.distributions import inverse_softplus, softplus

IN, UNITS = 5, 3
rng = np.random.default_rng(0)


def numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def made(**kwargs):
    """A built layer with random means and scales."""
    layer = DenseFlipout(UNITS, seed=3, **kwargs)
    layer.build((None, IN))
    for weight in layer.trainable_weights[:2]:
        weight.assign(rng.normal(size=weight.shape))
    return layer


def test_a_scale_mixture_is_estimated_without_bias():
    prior = ScaleMixturePrior(0.25, 1.5, 0.1)
    layer = made(kernel_prior_fn=prior)
    mean, rho = (numpy(w) for w in layer.weights[:2])
    std = np.log1p(np.exp(rho))
    found = [numpy(layer.kernel.divergence()) for _ in range(400)]
    # By quadrature.
    z, weight = np.polynomial.hermite_e.hermegauss(200)
    w = mean[..., None] + std[..., None] * z
    density = 0.25 * np.exp(-0.5 * (w / 1.5) ** 2) / 1.5
    density += 0.75 * np.exp(-0.5 * (w / 0.1) ** 2) / 0.1
    log_p = (np.log(density / np.sqrt(2 * np.pi)) * weight).sum(-1) / weight.sum()
    entropy = np.log(std) + 0.5 * np.log(2 * np.pi * np.e)
    expected = -(entropy + log_p).sum()
    error = 4 * np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - expected) < error + 0.02 * abs(expected)


def test_the_density_of_a_cauchy_prior():
    w = np.array([[-3.0, 0.5], [2.5, 40.0]], "float32")
    density = 1 / (np.pi * 2 * (1 + ((w - 0.5) / 2) ** 2))
    found = numpy(CauchyPrior(0.5, 2.0).log_prob(w))
    np.testing.assert_allclose(found, np.log(density).sum(), rtol=1e-6)


def test_the_divergence_is_closed_where_that_is_known():
    layer = made()
    q, p = layer.kernel_posterior, layer.kernel_prior
    draws = [q.sample(seed) for seed in range(2)]
    closed = numpy(q.divergence(p))
    for draw in draws:
        np.testing.assert_allclose(numpy(kl_divergence(q, p, draw)), closed, 1e-6)
    first, second = (numpy(sampled_kl_divergence(q, p, draw)) for draw in draws)
    assert abs(first - second) > 1e-3
    mixture = ScaleMixturePrior()
    np.testing.assert_array_equal(
        numpy(kl_divergence(q, mixture, draws[0])),
        numpy(sampled_kl_divergence(q, mixture, draws[0])),
    )


def test_the_sampled_divergence_on_request():
    layer = made(kernel_divergence_fn=sampled_kl_divergence)
    closed = numpy(layer.kernel_posterior.divergence(layer.kernel_prior))
    found = [numpy(layer.kernel.divergence()) for _ in range(400)]
    assert np.std(found) > 0.1
    assert abs(np.mean(found) - closed) < 5 * np.std(found) / 20


def test_a_learnable_prior_becomes_the_posteriors_spread():
    """Its optimum is σ_p² = mean of μ² + σ²."""
    layer = DenseFlipout(UNITS, kernel_prior_fn=NormalPrior(scale=3.0, learnable=True))
    layer.build((None, IN))
    np.testing.assert_allclose(numpy(layer.kernel_prior.stddev()), 3.0, rtol=1e-5)
    prior = next(w for w in layer.trainable_weights if "kernel_prior" in w.path)
    mean, rho = (numpy(w) for w in layer.weights[:2])
    best = np.sqrt((mean**2 + np.log1p(np.exp(rho)) ** 2).mean())

    def divergence(scale):
        prior.assign(np.log(np.expm1(scale)))
        return numpy(layer.kernel.divergence())

    assert divergence(best) < min(divergence(0.97 * best), divergence(1.03 * best))


def test_layers_of_one_shape_start_differently():
    shared = MeanFieldNormal()
    one, two = (DenseFlipout(UNITS, kernel_posterior_fn=shared) for _ in range(2))
    for layer in (one, two):
        layer.build((None, IN))
    assert not np.isclose(numpy(one.weights[0]), numpy(two.weights[0])).any()
    first, second = (numpy(w) for w in one.weights[:2])
    assert not np.isclose(first, second + 3).any()


def test_the_default_start_is_that_of_tfp():
    layer = DenseFlipout(200)
    layer.build((None, 200))
    mean, rho = (numpy(w) for w in layer.weights[:2])
    assert abs(mean.mean()) < 0.003 and abs(mean.std() - 0.1) < 0.003
    assert abs(rho.mean() + 3) < 0.003 and abs(rho.std() - 0.1) < 0.003
    std = np.finfo("float32").eps + np.log1p(np.exp(rho))
    np.testing.assert_allclose(numpy(layer.kernel_posterior.stddev()), std, rtol=1e-5)


@pytest.mark.parametrize(
    "made_by",
    [
        MeanFieldNormal(
            loc_initializer="zeros",
            untransformed_scale_initializer=keras.initializers.Constant(-5.0),
            loc_regularizer="l2",
            untransformed_scale_regularizer="l1",
            loc_constraint="non_neg",
            untransformed_scale_constraint="max_norm",
        ),
        MeanFieldNormal(is_singular=True),
        NormalPrior(0.5, 2.0, learnable=True),
        ScaleMixturePrior(0.25, 2.0, 0.1),
        CauchyPrior(0.5, 2.0),
    ],
)
def test_configurations(made_by):
    serialize = keras.saving.serialize_keras_object
    again = keras.saving.deserialize_keras_object(serialize(made_by))
    assert type(again) is type(made_by)
    assert serialize(again)["config"] == serialize(made_by)["config"]
    given = made_by.get_config()
    assert set(given) == set(type(made_by)().get_config())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: NormalPrior(scale=0), "scale=0"),
        (lambda: NormalPrior(scale=float("inf")), "scale=inf"),
        (lambda: NormalPrior(scale="1"), "scale='1'"),
        (lambda: NormalPrior(loc=float("nan")), "loc=nan"),
        (lambda: ScaleMixturePrior(sigma1=float("inf")), "sigma1=inf"),
        (lambda: CauchyPrior(scale=0), "scale=0"),
        (lambda: CauchyPrior(loc=float("nan")), "loc=nan"),
        (lambda: ScaleMixturePrior(pi=1), "pi=1"),
        (lambda: ScaleMixturePrior(sigma1=0), "sigma1=0"),
        (lambda: ScaleMixturePrior(sigma2=-1), "sigma2=-1"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.jax
@pytest.mark.parametrize(
    "name", ["kernel_posterior_fn", "bias_prior_fn", "kernel_divergence_fn"]
)
def test_jax_refuses_functions_that_are_not_ours(name):
    def theirs(*_):
        raise AssertionError("never called")

    with pytest.raises(ValueError, match=f"{name}.*kzoo"):
        DenseFlipout(3, **{name: theirs})


@pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("float64", marks=pytest.mark.tensorflow)]
)
def test_scales_have_an_inverse(dtype):
    eps = np.finfo(dtype).eps
    std = np.array([2 * eps, 3e-4, 0.05, 1.0, 30.0, 1e4])
    rho = inverse_softplus(std, dtype)
    found = numpy(softplus(ops.convert_to_tensor(rho, dtype)))
    np.testing.assert_allclose(found, std, 2e-6)
    least = inverse_softplus(np.zeros(1), dtype)
    np.testing.assert_array_equal(least, inverse_softplus(np.full(1, 2 * eps), dtype))
