"""TensorFlow Probability's layers and distributions, on the TensorFlow backend."""

import keras
import numpy as np
import pytest

from kzoo import layers
from kzoo.layers import (
    Conv2DFlipout,
    DenseFlipout,
    DenseLocalReparameterization,
    DenseReparameterization,
    NormalPrior,
)
from kzoo.layers.variational import distributions, estimators

pytestmark = pytest.mark.tensorflow

rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tfp():
    return pytest.importorskip("tensorflow_probability")


def given(monkeypatch, signs, noise):
    """Lets our draws be given ones; the signs of both shapes are one."""
    flat = np.concatenate([s.ravel() for s in signs])
    monkeypatch.setattr(estimators, "random_sign", lambda *_: flat)
    monkeypatch.setattr(distributions, "normal", lambda *_: noise)


@pytest.mark.parametrize("kind", ["dense", "conv"])
def test_flipout_equals_the_layer_of_tfp(tfp, monkeypatch, kind):
    """Given the same weights, signs and noise, in the outputs and the divergence."""
    import tensorflow as tf

    if kind == "dense":
        module = tfp.python.layers.dense_variational
        x = rng.normal(size=(6, 5)).astype("float32")
        shape, signs = (5, 3), [(6, 5), (6, 3)]
        arguments, theirs, ours = (3, "tanh"), tfp.layers.DenseFlipout, DenseFlipout
    else:
        module = tfp.python.layers.conv_variational
        x = rng.normal(size=(6, 7, 7, 2)).astype("float32")
        shape, signs = (3, 3, 2, 4), [(6, 1, 1, 2), (6, 1, 1, 4)]
        arguments = (4, 3, (2, 2), "same")
        theirs, ours = tfp.layers.Convolution2DFlipout, Conv2DFlipout
    signs = [rng.choice([-1.0, 1.0], size=s).astype("float32") for s in signs]
    noise = rng.normal(size=shape).astype("float32")

    flat = iter(
        [s.reshape(s.shape[0], s.shape[-1]) if kind == "conv" else s for s in signs]
    )
    monkeypatch.setattr(
        module.tfp_random, "rademacher", lambda *_, **__: tf.constant(next(flat))
    )
    theirs = theirs(*arguments, kernel_posterior_tensor_fn=lambda d: d.scale * noise)
    expected = theirs(x)
    ours = ours(*arguments)
    ours.build(x.shape)
    for a, b in zip(ours.trainable_weights, theirs.trainable_weights, strict=True):
        assert a.path.split("/")[-1] == b.name.split("/")[-1].split(":")[0]
        a.assign(b.numpy())
    given(monkeypatch, signs, noise)
    np.testing.assert_allclose(ours(x).numpy(), expected.numpy(), 1e-5, 1e-5)
    np.testing.assert_allclose(
        sum(ours.losses).numpy(), sum(theirs.losses).numpy(), rtol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer", [DenseFlipout, DenseReparameterization, DenseLocalReparameterization]
)
def test_takes_the_functions_of_tfp(tfp, layer):
    tfd = tfp.distributions
    layer = layer(
        3,
        kernel_posterior_fn=tfp.layers.default_mean_field_normal_fn(),
        kernel_prior_fn=tfp.layers.default_multivariate_normal_fn,
        kernel_divergence_fn=lambda q, p, _: tfd.kl_divergence(q, p),
        bias_posterior_fn=tfp.layers.default_mean_field_normal_fn(is_singular=True),
    )
    model = keras.Sequential([keras.Input((5,)), layer])
    names = [w.path.split("/")[-1] for w in model.trainable_weights]
    assert names == [
        "kernel_posterior_loc",
        "kernel_posterior_untransformed_scale",
        "bias_posterior_loc",
    ]
    q, p = layer.kernel_posterior, layer.kernel_prior
    expected = tfd.kl_divergence(
        tfd.Normal(q.mean(), q.stddev()), tfd.Normal(0.0, 1.0)
    ).numpy()
    assert np.all(p.stddev().numpy() == 1)
    np.testing.assert_allclose(sum(model.losses), expected.sum(), rtol=1e-5)
    before = model.get_weights()
    model.compile("adam", "mse", jit_compile=True)
    model.train_on_batch(np.ones((4, 5), "float32"), np.ones((4, 3), "float32"))
    for old, new in zip(before[:3], model.get_weights()[:3], strict=True):
        assert np.all(old != new)


def laplace(dtype, shape, name, trainable, add_variable_fn):
    from tensorflow_probability import distributions as tfd

    loc = add_variable_fn(name=f"{name}_loc", shape=shape, initializer="ones")
    return tfd.Independent(tfd.Laplace(loc, 0.5), len(shape))


def gumbel(dtype, shape, name, trainable, add_variable_fn):
    from tensorflow_probability import distributions as tfd

    loc = add_variable_fn(name=f"{name}_loc", shape=shape, initializer="ones")
    return tfd.Independent(tfd.Gumbel(loc, 0.5), len(shape))


def correlated(dtype, shape, name, trainable, add_variable_fn):
    from tensorflow_probability import distributions as tfd

    loc = add_variable_fn(name=f"{name}_loc", shape=shape, initializer="ones")
    rows = tfd.MultivariateNormalTriL(loc, np.tri(shape[-1], dtype="float32"))
    return tfd.Independent(rows, len(shape) - 1)


def low_rank(dtype, shape, name, trainable, add_variable_fn):
    from tensorflow_probability import distributions as tfd

    loc = add_variable_fn(name=f"{name}_loc", shape=shape, initializer="ones")
    ones = np.ones((shape[-1], 1), "float32")
    rows = tfd.MultivariateNormalDiagPlusLowRankCovariance(loc, ones[:, 0], ones)
    return tfd.Independent(rows, len(shape) - 1)


def matrix_variate(dtype, shape, name, trainable, add_variable_fn):
    from tensorflow.linalg import LinearOperatorLowerTriangular
    from tensorflow_probability import distributions as tfd

    loc = add_variable_fn(name=f"{name}_loc", shape=shape, initializer="ones")
    rows, columns = (
        LinearOperatorLowerTriangular(np.tri(n, dtype="float32")) for n in shape
    )
    return tfd.MatrixNormalLinearOperator(loc, rows, columns)


def test_a_symmetric_posterior_that_is_not_normal():
    layer = DenseFlipout(2, kernel_posterior_fn=laplace, bias_posterior_fn=None)
    y = layer(np.eye(4, dtype="float32").repeat(2000, 0)).numpy()
    # The rows of one batch share |ΔW̃|: 1 ± that.
    q, perturbations = layer.kernel_posterior, np.abs(y - 1).reshape(4, 2000, 2)
    np.testing.assert_allclose(
        perturbations, perturbations[:, :1].repeat(2000, 1), atol=1e-5
    )
    assert abs(np.sign(y - 1).mean()) < 0.1
    assert q.stddev().shape == (4, 2)


@pytest.mark.parametrize("posterior", [gumbel, correlated, low_rank, matrix_variate])
def test_flipout_refuses_what_signs_would_change(posterior):
    x = np.ones((2, 4), "float32")
    with pytest.raises(ValueError, match="symmetric about its"):
        DenseFlipout(3, kernel_posterior_fn=posterior)(x)
    assert DenseReparameterization(3, kernel_posterior_fn=posterior)(x).shape == (2, 3)
    with pytest.raises(ValueError, match="normal posterior"):
        DenseLocalReparameterization(3, kernel_posterior_fn=posterior)(x)


@pytest.mark.slow
def test_a_divergence_that_tfp_knows_or_does_not(tfp):
    tfd = tfp.distributions
    layer = DenseReparameterization(
        3, kernel_posterior_fn=laplace, kernel_prior_fn=laplace, seed=0
    )
    layer.build((None, 4))
    assert abs(float(layer.kernel.divergence())) < 1e-4
    layer = DenseReparameterization(3, kernel_posterior_fn=gumbel, seed=0)
    layer.build((None, 4))
    found = [float(layer.kernel.divergence()) for _ in range(300)]
    w = tfd.Gumbel(1.0, 0.5).sample(200_000, seed=1)
    expected = 12 * np.mean(
        tfd.Gumbel(1.0, 0.5).log_prob(w) - tfd.Normal(0.0, 1.0).log_prob(w)
    )
    assert abs(np.mean(found) - expected) < 5 * np.std(found) / 300**0.5


def test_a_model_that_is_built_by_fit(tfp):
    layer = DenseFlipout(
        3,
        kernel_posterior_fn=tfp.layers.default_mean_field_normal_fn(),
        kernel_prior_fn=laplace,
        num_examples=8,
    )
    model = keras.Sequential([layer])
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mse"])
    x, y = np.ones((8, 5), "float32"), np.zeros((8, 3), "float32")
    logs = [model.fit(x, y, epochs=2, verbose=0).history for _ in range(2)][-1]
    assert logs["loss"][-1] > logs["mse"][-1] and np.isfinite(logs["loss"]).all()


def test_the_prior_of_tfp_is_saved_as_ours(tfp):
    prior = tfp.layers.default_multivariate_normal_fn
    layer = DenseFlipout(3, kernel_prior_fn=prior)
    again = DenseFlipout.from_config(layer.get_config())
    for made in (layer, again):
        assert isinstance(made.kernel_prior_fn, NormalPrior)
        assert made.kernel_prior_fn.get_config() == NormalPrior().get_config()


@keras.saving.register_keras_serializable(package="test_tfp")
def fixed_loc(dtype, shape, name, trainable, add_variable_fn):
    from tensorflow_probability import distributions as tfd
    from tensorflow_probability import util

    loc = add_variable_fn(name=f"{name}_loc", shape=shape, trainable=False)
    scale = add_variable_fn(name=f"{name}_scale", shape=shape, initializer="ones")
    return tfd.Independent(tfd.Normal(loc, util.DeferredTensor(scale, abs)), len(shape))


def test_a_registered_function_is_saved_and_its_divergence_counts(tmp_path):
    layer = DenseFlipout(3, kernel_posterior_fn=fixed_loc, num_examples=2)
    model = keras.Sequential([keras.Input((5,)), layer])
    layer.kernel.variables[1].assign(rng.uniform(1, 2, size=(5, 3)))
    q = layer.kernel_posterior
    mean, std = q.mean().numpy(), q.stddev().numpy()
    expected = (0.5 * (std**2 + mean**2 - 1) - np.log(std)).sum() / 2
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for made in (model, loaded):
        np.testing.assert_allclose(sum(made.losses), expected, rtol=1e-5)


def own_variable(dtype, shape, name, trainable, add_variable_fn):
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    return tfd.Independent(tfd.Normal(tf.Variable(tf.zeros(shape)), 1.0), len(shape))


def eager_scale(dtype, shape, name, trainable, add_variable_fn):
    import tensorflow as tf
    from tensorflow_probability import distributions as tfd

    loc = add_variable_fn(name=f"{name}_loc", shape=shape)
    rho = add_variable_fn(name=f"{name}_rho", shape=shape)
    return tfd.Independent(tfd.Normal(loc, tf.nn.softplus(rho)), len(shape))


def normal_of_another_shape(dtype, shape, name, trainable, add_variable_fn):
    from tensorflow_probability import distributions as tfd

    return tfd.Normal(0.0, 1.0)


def no_distribution(dtype, shape, name, trainable, add_variable_fn):
    return add_variable_fn(name=name, shape=shape)


@pytest.mark.parametrize(
    "function, message",
    [
        (own_variable, "add_variable_fn"),
        (eager_scale, "DeferredTensor"),
        (normal_of_another_shape, r"shape \(4, 3\)"),
        (no_distribution, "tfp.distributions.Distribution"),
    ],
)
def test_refuses_functions(function, message):
    with pytest.raises(ValueError, match=message):
        DenseFlipout(3, kernel_posterior_fn=function).build((None, 4))


def one_laplace(dtype, shape, name, trainable, add_variable_fn):
    from tensorflow_probability import distributions as tfd

    return tfd.Laplace(0.0, 1.0)


def test_a_prior_may_be_one_distribution_for_all_entries(tfp):
    layer = DenseFlipout(3, kernel_prior_fn=one_laplace, seed=0)
    layer.build((None, 4))
    found = [float(layer.kernel.divergence()) for _ in range(300)]
    q, tfd = layer.kernel_posterior, tfp.distributions
    w = tfd.Normal(q.mean(), q.stddev()).sample(20_000, seed=1)
    log_q = tfd.Normal(q.mean(), q.stddev()).log_prob(w)
    expected = float(np.mean((log_q - tfd.Laplace(0.0, 1.0).log_prob(w)), 0).sum())
    assert abs(np.mean(found) - expected) < 5 * np.std(found) / 300**0.5 + 0.1


def heavy(dtype, shape, name, trainable, add_variable_fn):
    from tensorflow_probability import distributions as tfd

    loc = add_variable_fn(name=f"{name}_loc", shape=shape, initializer="ones")
    return tfd.Independent(tfd.StudentT(1.0, loc, 0.1), len(shape))


def skewed(dtype, shape, name, trainable, add_variable_fn):
    from tensorflow_probability import bijectors as tfb
    from tensorflow_probability import distributions as tfd

    loc = add_variable_fn(name=f"{name}_loc", shape=shape, initializer="ones")
    normal = tfd.Independent(tfd.Normal(loc, 0.5), len(shape))
    return tfd.TransformedDistribution(normal, tfb.Softplus())


def test_posteriors_without_a_mean():
    x = np.ones((2, 4), "float32")
    assert np.isfinite(DenseFlipout(3, kernel_posterior_fn=heavy)(x)).all()
    y = DenseReparameterization(3, kernel_posterior_fn=skewed)(x).numpy()
    assert (y > 0).all()


def test_the_divergence_of_a_correlated_posterior():
    """KL(N(1, L Lᵀ), N(0, I)) = ½ (tr(L Lᵀ) + |1|² - n - log det) for each row."""
    layer = DenseReparameterization(3, kernel_posterior_fn=correlated)
    layer.build((None, 4))
    expected = 4 * 0.5 * (6 + 3 - 3 - 0)
    np.testing.assert_allclose(layer.kernel.divergence(), expected, rtol=1e-5)


def test_a_function_without_a_name_is_not_saved(tfp, tmp_path):
    closure = tfp.layers.default_mean_field_normal_fn()
    layer = DenseFlipout(3, kernel_posterior_fn=closure, kernel_prior_fn=NormalPrior())
    model = keras.Sequential([keras.Input((5,)), layer])
    with pytest.raises(ValueError, match="MeanFieldNormal"):
        model.save(tmp_path / "model.keras")


def test_every_layer_of_tfp_has_its_counterpart(tfp):
    for name in ("Dense", "Convolution1D", "Convolution2D", "Convolution3D"):
        for estimator in ("Flipout", "Reparameterization"):
            ours = name.replace("olution", "") + estimator
            assert hasattr(tfp.layers, name + estimator) and hasattr(layers, ours)
