import keras
import numpy as np
import pytest
from keras import ops

from kzoo.layers import (
    Conv2DFlipout,
    Conv2DLocalReparameterization,
    Conv2DReparameterization,
    DenseBatchEnsemble,
    DenseFlipout,
    DenseLocalReparameterization,
    DenseReparameterization,
    EinsumDenseFlipout,
    MeanFieldNormal,
    PosteriorMean,
    PosteriorSamples,
    TileMembers,
)
from kzoo.layers.ops.batch_ensemble import split_members

DENSE = [DenseFlipout, DenseReparameterization, DenseLocalReparameterization]
CONV = [Conv2DFlipout, Conv2DReparameterization, Conv2DLocalReparameterization]
rng = np.random.default_rng(0)
X = rng.normal(size=(5, 4)).astype("float32")


def numpy(tensor):
    return ops.convert_to_numpy(tensor)


def network(layer=DenseFlipout, **kwargs):
    options = {"kernel_posterior_fn": wide(), "bias_posterior_fn": wide(), **kwargs}
    layers = [layer(6, "tanh", **options), layer(3, **options)]
    return keras.Sequential([keras.Input((4,)), *layers])


def wide():
    return MeanFieldNormal(
        loc_initializer=keras.initializers.RandomNormal(0.0, 1.0),
        untransformed_scale_initializer="zeros",
    )


@pytest.mark.parametrize("layer", DENSE)
def test_the_mean_is_the_plain_network_of_the_means(layer):
    model = network(layer)
    plain = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(6, "tanh"), keras.layers.Dense(3)]
    )
    posteriors = [
        q for x in model.layers for q in (x.kernel_posterior, x.bias_posterior)
    ]
    plain.set_weights([numpy(q.mean()) for q in posteriors])
    mean = PosteriorMean(model)
    for _ in range(2):
        np.testing.assert_allclose(numpy(mean(X)), numpy(plain(X)), 1e-5, 1e-5)
    np.testing.assert_allclose(mean.predict(X, verbose=0), numpy(plain(X)), 1e-5, 1e-5)
    # Outside of it the model draws as before.
    assert not np.allclose(numpy(model(X)), numpy(plain(X)))


@pytest.mark.parametrize("layer", DENSE)
def test_a_sample_is_one_network_for_all_rows(layer):
    """Linear networks, so that each sample's kernel and bias can be read off."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layer(3, kernel_posterior_fn=wide(), bias_posterior_fn=wide()),
        ]
    )
    samples = PosteriorSamples(model, 2000, seed=1)
    x = np.concatenate([np.zeros((1, 4)), np.eye(4), X]).astype("float32")
    y = samples.predict(x, batch_size=4, verbose=0)
    assert y.shape == (10, 2000, 3)
    bias, kernel = y[0], y[1:5] - y[:1]
    own = np.einsum("bi,iko->bko", X, kernel) + bias
    np.testing.assert_allclose(y[5:], own, 1e-4, 1e-4)
    q = model.layers[0].kernel_posterior
    mean, std = numpy(q.mean()), numpy(q.stddev())
    assert (np.abs(kernel.mean(1) - mean) < 5 * std / 2000**0.5).all()
    np.testing.assert_allclose(kernel.std(1), std, rtol=0.1)
    # Entries, those of the bias too, and samples are independent.
    z = ((kernel - mean[:, None]) / std[:, None]).transpose(1, 0, 2).reshape(2000, -1)
    q = model.layers[0].bias_posterior
    bias = (bias - numpy(q.mean())) / numpy(q.stddev())
    np.testing.assert_allclose(bias.std(0), 1, rtol=0.1)
    z = np.concatenate([z, bias], axis=1)
    assert np.abs(np.corrcoef(z.T) - np.eye(15)).max() < 0.12
    assert abs(np.mean(z[1:] * z[:-1])) < 0.05


def test_samples_of_a_deep_network_are_functions():
    """Each is what an own network with its weights computes, nothing mixes them."""
    model = network()
    one = PosteriorSamples(model, 3, seed=5).predict(X, verbose=0)
    rows = PosteriorSamples(model, 3, seed=5).predict(X, batch_size=1, verbose=0)
    np.testing.assert_allclose(one, rows, 1e-4, 1e-5)
    assert not np.isclose(one[:, 0], one[:, 1]).any()


@pytest.mark.parametrize("layer", CONV)
def test_convolutions(layer):
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layer(4, 3, activation="tanh", kernel_posterior_fn=wide()),
            layer(3, 3, strides=2, kernel_posterior_fn=wide()),
        ]
    )
    x = rng.normal(size=(2, 6, 6, 2)).astype("float32")
    y = PosteriorSamples(model, 5, seed=2)(x)
    assert tuple(y.shape) == (2, 5, 1, 1, 3)
    one = PosteriorSamples(model, 5, seed=2)(x[1:])
    np.testing.assert_allclose(numpy(y)[1:], numpy(one), 1e-4, 1e-4)
    assert len(np.unique(numpy(y).round(4))) == 2 * 5 * 3
    mean = numpy(PosteriorMean(model)(x))
    np.testing.assert_allclose(mean, numpy(PosteriorMean(model)(x)), 1e-5)


def test_einsum_and_a_functional_model_of_two_inputs():
    a, b = keras.Input((4, 2), name="a"), keras.Input((2,), name="b")
    y = EinsumDenseFlipout("abc,cd->abd", (None, 3), bias_axes="d")(a)
    y = keras.layers.Concatenate()([keras.layers.Flatten()(y), b])
    model = keras.Model({"a": a, "b": b}, {"y": DenseFlipout(2)(y), "b": b})
    x = {"a": np.ones((3, 4, 2), "float32"), "b": np.arange(6.0).reshape(3, 2)}
    found = PosteriorSamples(model, 4).predict(x, verbose=0)
    assert found["y"].shape == (3, 4, 2)
    np.testing.assert_array_equal(found["b"], x["b"][:, None].repeat(4, 1))


def test_seeds():
    model = network()
    drawn = PosteriorSamples(model, 4, seed=3)
    np.testing.assert_array_equal(numpy(drawn(X)), numpy(drawn(X)))
    other = PosteriorSamples(model, 4, seed=4)
    assert not np.isclose(numpy(drawn(X)), numpy(other(X))).any()
    new = PosteriorSamples(model, 4)
    assert not np.isclose(numpy(new(X)), numpy(new(X))).any()


@pytest.mark.parametrize("jit_compile", [False, True])
def test_compiled_or_not(jit_compile):
    model = network()
    drawn = PosteriorSamples(model, 4, seed=3)
    drawn.compile(jit_compile=jit_compile)
    found = drawn.predict(X, verbose=0)
    np.testing.assert_allclose(found, numpy(drawn(X)), 1e-4, 1e-5)


@pytest.mark.parametrize(
    "make", [PosteriorMean, lambda m: PosteriorSamples(m, 4, seed=3)]
)
def test_saved_and_loaded(make, tmp_path):
    predictor = make(network())
    expected = predictor.predict(X, verbose=0)
    predictor.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(predictor)
    np.testing.assert_allclose(loaded.predict(X, verbose=0), expected, 1e-5, 1e-6)


def test_it_follows_the_training_of_its_model():
    model = network(num_examples=5)
    mean = PosteriorMean(model)
    before = mean.predict(X, verbose=0)
    model.compile("adam", "mse")
    model.fit(X, np.ones((5, 3)), epochs=2, verbose=0)
    assert not np.isclose(mean.predict(X, verbose=0), before).all()
    mean.compile(loss="mse")
    y = mean.predict(X, verbose=0)
    divergence = float(sum(model.losses))
    loss = mean.evaluate(X, np.ones((5, 3)), verbose=0)
    np.testing.assert_allclose(loss, ((y - 1) ** 2).mean() + divergence, rtol=1e-4)


def test_refuses():
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="distributions over their weights"):
        PosteriorMean(plain)
    with pytest.raises(ValueError, match="samples=0"):
        PosteriorSamples(network(), 0)


def test_a_layer_that_is_used_twice_has_one_weight_in_a_sample():
    x = keras.Input((4,))
    layer = DenseFlipout(3, kernel_posterior_fn=wide(), bias_posterior_fn=wide())
    other = DenseFlipout(3, kernel_posterior_fn=wide(), bias_posterior_fn=wide())
    difference = keras.layers.Subtract()([layer(x), layer(x)])
    model = keras.Model(x, [difference, layer(x) - other(x)])
    same, apart = PosteriorSamples(model, 4, seed=0).predict(X, verbose=0)
    np.testing.assert_allclose(same, 0, atol=1e-5)
    assert not np.isclose(apart, 0, atol=1e-3).any()


def test_layers_of_one_shape_have_weights_of_their_own():
    options = {"kernel_posterior_fn": wide(), "bias_posterior_fn": None}
    one, two = (DenseFlipout(3, **options) for _ in range(2))
    x = keras.Input((4,))
    model = keras.Model(x, [one(x), two(x)])
    for layer in (one, two):
        layer.kernel.variables[0].assign(np.zeros((4, 3)))
    first, second = PosteriorSamples(model, 8, seed=0).predict(X, verbose=0)
    assert not np.isclose(first, second).any()


def test_in_branches():
    """A weight's seed is not bound to the branch in which it was drawn first."""
    layer = DenseFlipout(3, kernel_posterior_fn=wide())
    layer.build((None, 4))

    class Branches(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = layer

        def call(self, x):
            positive = ops.sum(x) > 0
            return ops.cond(positive, lambda: layer(x), lambda: layer(-x)) + layer(x)

    drawn = PosteriorSamples(Branches(), 4, seed=0)
    y = drawn.predict(np.abs(X), verbose=0)
    alone = PosteriorSamples(keras.Sequential([keras.Input((4,)), layer]), 4, seed=0)
    expected = 2 * alone.predict(np.abs(X), verbose=0)
    np.testing.assert_allclose(y, expected, 1e-4, 1e-4)


@pytest.mark.parametrize("make", [PosteriorMean, lambda m: PosteriorSamples(m, 4, 3)])
def test_within_a_functional_model_that_is_saved(make, tmp_path):
    x = keras.Input((4,))
    model = keras.Model(x, make(network())(x))
    expected = model.predict(X, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(X, verbose=0), expected, 1e-5, 1e-6)


def test_every_member_of_an_ensemble_sees_every_sample():
    """A linear ensemble: its output is linear in each sample's own kernel."""
    flipout = DenseFlipout(3, kernel_posterior_fn=wide(), bias_posterior_fn=None)
    random = keras.initializers.RandomNormal(1.0, 0.5)
    ensemble = DenseBatchEnsemble(
        2, ensemble_size=4, alpha_initializer=random, gamma_initializer=random
    )
    x = keras.Input((4,))
    y = ensemble(flipout(TileMembers(4)(x)))
    y = keras.layers.Lambda(lambda y: ops.mean(split_members(y, 4), 0), (2,))(y)
    drawn = PosteriorSamples(keras.Model(x, y), 4, seed=3)
    kernels = PosteriorSamples(keras.Sequential([keras.Input((4,)), flipout]), 4, 3)
    h = kernels.predict(X, verbose=0).astype("float64")  # [B, K, 3]
    alpha, gamma = numpy(ensemble.alpha), numpy(ensemble.gamma)
    own = np.einsum("mi,io,mo->mio", alpha, numpy(ensemble.kernel), gamma).mean(0)
    expected = h @ own + numpy(ensemble.bias).mean(0)
    np.testing.assert_allclose(drawn.predict(X, verbose=0), expected, 1e-4, 1e-4)


@pytest.mark.slow
@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "make", [PosteriorMean, lambda m: PosteriorSamples(m, 4, seed=3)]
)
def test_exported_by_keras(make, tmp_path):
    import tensorflow as tf

    predictor = make(network())
    predictor(X)
    predictor.export(tmp_path / "model", verbose=False)
    served = tf.saved_model.load(tmp_path / "model")
    np.testing.assert_allclose(
        served.serve(X), predictor.predict(X, verbose=0), 1e-4, 1e-5
    )
