"""Monte Carlo dropout: masks in training, draws in prediction, and whole models."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from harness import check_layer
from kzoo.layers import (
    AverageMembers,
    DenseBatchEnsemble,
    MonteCarloDropout,
    PosteriorMean,
    PosteriorSamples,
    TileMembers,
    to_monte_carlo_dropout,
)
from kzoo.layers.variational.mode import at_posterior_mean, at_posterior_samples
from kzoo.zoo import export, fit_temperature
from kzoo.zoo.predictive import classification, sampled_classification

RNG = np.random.default_rng(0)
X = RNG.normal(size=(7, 4)).astype("float32")


def numpy(tensor):
    return ops.convert_to_numpy(tensor)


def masks(layer, shape, samples, seed=3):
    """z / (1 - p) of K draws, `[K, ...]`, read off rows of ones."""
    ones = np.ones((5, *shape), "float32")
    found = numpy(at_posterior_samples(layer, ones, samples, seed))
    for row in found[1:]:
        np.testing.assert_array_equal(row, found[0])  # One mask for all rows.
    return found[0]


def network():
    return keras.Sequential(
        [
            keras.Input((4,), name="x"),
            layers.Dense(16, "tanh"),
            layers.Dropout(0.5, name="first"),
            layers.Dense(16, "tanh"),
            layers.Dropout(0.25, name="second"),
            layers.Dense(3),
        ]
    )


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_in_training_each_row_has_a_mask_of_its_own(rate):
    x = RNG.normal(size=(200, 50)).astype("float32")
    layer = MonteCarloDropout(rate, seed=0)
    y = numpy(layer(x, training=True))
    left = y != 0
    np.testing.assert_allclose(y[left], x[left] / (1 - rate), rtol=1e-6)
    # The standard deviation of the share is at most 0.005.
    assert left.mean() == pytest.approx(1 - rate, abs=0.02)
    assert abs(left.mean(0) - (1 - rate)).max() < 0.2
    again = numpy(layer(x, training=True))
    assert ((again != 0) != left).any()


def test_predicts_with_all_units_until_draws_are_asked_for():
    layer = MonteCarloDropout(0.9)
    np.testing.assert_array_equal(numpy(layer(X)), X)
    for training in (False, True):
        found = at_posterior_mean(layer, X, training=training)
        np.testing.assert_array_equal(numpy(found), X)


def test_a_draw_is_one_mask_for_all_rows():
    layer = MonteCarloDropout(0.25)
    z = masks(layer, (20,), 400)
    np.testing.assert_allclose(np.unique(z), [0, 1 / 0.75], rtol=1e-6)
    assert z.mean() == pytest.approx(1, abs=0.03)
    assert len(np.unique(z, axis=0)) > 390  # Draws differ.
    correlation = np.corrcoef(z.T) - np.eye(20)
    assert abs(correlation).max() < 0.25  # So do units.
    x = RNG.normal(size=(6, 20)).astype("float32")
    found = numpy(at_posterior_samples(layer, x, 400, 3))
    np.testing.assert_allclose(found, x[:, None] * z, rtol=1e-6)
    assert (masks(layer, (20,), 400, seed=4) != z).any()


@pytest.mark.parametrize("noise_shape", [(None, 1, None), (None, 3, 1), (1, 1, 4)])
def test_noise_shape(noise_shape):
    layer = MonteCarloDropout(0.5, noise_shape, seed=1)
    shape = [n or size for n, size in zip(noise_shape, (50, 3, 4), strict=True)]
    found = numpy(layer(np.ones((50, 3, 4), "float32"), training=True))
    z = found[tuple(slice(n) for n in shape)]
    np.testing.assert_array_equal(found, np.broadcast_to(z, found.shape))
    assert 0.3 < (z != 0).mean() < 0.7 or z.size < 50
    drawn = masks(layer, (3, 4), 100)
    z = drawn[(slice(None), *(slice(n) for n in shape[1:]))]
    np.testing.assert_array_equal(drawn, np.broadcast_to(z, drawn.shape))
    assert 0.3 < (z != 0).mean() < 0.7


def test_layers_draw_masks_of_their_own_and_a_shared_one_the_same():
    first, second = MonteCarloDropout(0.5), MonteCarloDropout(0.5)
    x = keras.Input((30,))
    outputs = layers.Concatenate()([first(x), second(x), first(x)])
    one, other, same = np.split(masks(keras.Model(x, outputs), (30,), 8), 3, axis=-1)
    assert (one != other).any()
    np.testing.assert_array_equal(one, same)


def test_samples_of_a_network_are_networks_without_some_units():
    plain = network()
    model = to_monte_carlo_dropout(plain)
    found = PosteriorSamples(model, 6, seed=3).predict(X, batch_size=3, verbose=0)

    def explicit(x):
        places = {}  # The layers in their order, as the draws count them.
        for layer in model.layers:
            x = layer(x)
            if isinstance(layer, MonteCarloDropout):
                places[layer.name] = x
        return places

    hidden = numpy(at_posterior_samples(lambda x: explicit(x)["first"], X, 6, 3))
    z = hidden / numpy(plain.layers[0](X))[:, None]
    np.testing.assert_allclose(np.unique(z.round(4)), [0, 2])
    last = numpy(at_posterior_samples(lambda x: explicit(x)["second"], X, 6, 3))
    before = np.tanh(hidden @ numpy(plain.layers[2].kernel))
    z = last / before
    # Quotients of float32, which are nowhere near a number that rounding splits.
    np.testing.assert_allclose(np.where(z > 0.5, z - 4 / 3, z), 0, atol=1e-3)
    assert (z > 0.5).any() and (z < 0.5).any()
    np.testing.assert_allclose(found, last @ numpy(plain.layers[4].kernel), 1e-4, 1e-5)
    assert found.std(1).min() > 1e-4


def test_converted_it_keeps_weights_and_predictions():
    plain = network()
    model = to_monte_carlo_dropout(plain, seed=7)
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds == ["Dense", "MonteCarloDropout"] * 2 + ["Dense"]
    assert [layer.name for layer in model.layers] == [x.name for x in plain.layers]
    assert [model.layers[i].rate for i in (1, 3)] == [0.5, 0.25]
    assert [model.layers[i].seed for i in (1, 3)] == [7, 8]
    expected = plain.predict(X, verbose=0)
    for found in (model, PosteriorMean(model)):
        np.testing.assert_allclose(found.predict(X, verbose=0), expected, 1e-5, 1e-6)
    plain.layers[0].kernel.assign(0 * plain.layers[0].kernel)
    assert not np.allclose(plain.predict(X, verbose=0), model.predict(X, verbose=0))


@pytest.mark.parametrize(
    "layer, shape, same",
    [
        (layers.SpatialDropout1D(0.5), (6, 3), (0,)),
        (layers.SpatialDropout2D(0.5, "channels_last"), (4, 5, 3), (0, 1)),
        (layers.SpatialDropout2D(0.5, "channels_first"), (3, 4, 5), (1, 2)),
        (layers.SpatialDropout3D(0.5, "channels_last"), (2, 2, 2, 3), (0, 1, 2)),
    ],
)
def test_spatial_dropout_drops_whole_channels(layer, shape, same):
    x = keras.Input(shape)
    z = masks(to_monte_carlo_dropout(keras.Model(x, layer(x))), shape, 60)
    assert 0.3 < (z != 0).mean() < 0.7
    same = tuple(axis + 1 for axis in same)
    np.testing.assert_array_equal(z.max(same), z.min(same))
    (channels,) = set(range(1, len(shape) + 1)) - set(same)
    by_channel = np.moveaxis(z, channels, 1).reshape(60, 3, -1)[..., 0]
    assert len(np.unique(by_channel, axis=0)) == 8


def test_members_of_a_batch_ensemble_share_a_mask():
    x = keras.Input((4,))
    y = layers.Dropout(0.5)(TileMembers(2)(x))
    y = DenseBatchEnsemble(
        3,
        ensemble_size=2,
        alpha_initializer=keras.initializers.RandomNormal(1, 1, seed=1),
    )(y)
    model = keras.Model(x, AverageMembers(2)(y))
    plain = classification(model)[1]
    mc = to_monte_carlo_dropout(model)
    z = masks(mc.layers[2], (4,), 5)
    found = sampled_classification(mc)(X, 5, seed=3)
    for k in range(5):
        expected = plain(X * z[k])["probabilities"]
        drawn = numpy(found["member_probabilities"])[:, k]
        np.testing.assert_allclose(drawn, numpy(expected), 1e-4, 1e-5)


def test_what_stays_off_is_named():
    x = keras.Input((5, 4))
    y = layers.LSTM(4, dropout=0.5, name="recurrent")(layers.Dropout(0.5)(x))
    y = layers.GaussianDropout(0.5, name="gaussian")(layers.LSTM(3, name="dry")(x) + 1)
    model = keras.Model(x, [y, layers.LSTM(4, dropout=0.5, name="wet")(x)])
    with pytest.raises(ValueError, match="expected a model with at least one"):
        to_monte_carlo_dropout(model)
    model = keras.Model(x, [*model.outputs, layers.Dropout(0.5)(x)])
    with pytest.warns(UserWarning) as caught:
        to_monte_carlo_dropout(model)
    text = str(caught[-1].message)
    assert "LSTM 'wet'" in text and "GaussianDropout 'gaussian'" in text
    assert "dry" not in text and "Dropout 'dropout" not in text


def test_what_does_not_fit_is_refused():
    for rate in (-0.1, 1.0, True, "0.5"):
        with pytest.raises(ValueError, match="`rate`.*Received: rate="):
            MonteCarloDropout(rate)
    for noise_shape in ((None, 0), (None, 1.5)):
        with pytest.raises(ValueError, match="`noise_shape`.*Received: noise_shape="):
            MonteCarloDropout(0.5, noise_shape)
    with pytest.raises(ValueError, match="or with `MonteCarloDropout`. Received"):
        PosteriorSamples(network(), 4)


def test_its_draws_have_a_temperature():
    model = to_monte_carlo_dropout(network())
    drawn = PosteriorSamples(model, 8, seed=0).predict(X, verbose=0)
    said = drawn.mean(1).argmax(-1)
    labels = np.where(np.arange(7) < 5, said, (said + 1) % 3)
    t = [
        float(fit_temperature(model, X, labels, samples=k).layers[-1].temperature)
        for k in (None, 8)
    ]
    assert abs(t[0] - t[1]) > 1e-3


@pytest.mark.tensorflow
def test_exported_with_a_signature_that_samples(tmp_path):
    import tensorflow as tf

    model = to_monte_carlo_dropout(network())
    path = export(model, tmp_path, name="net")
    served = tf.saved_model.load(path).signatures
    assert sorted(served) == ["sampling", "serving_default", "serving_xla"]
    drawn = numpy(ops.softmax(PosteriorSamples(model, 16, seed=7)(X)))
    answer = served["sampling"](
        x=tf.constant(X), samples=tf.constant(16), seed=tf.constant(7)
    )
    np.testing.assert_allclose(answer["member_probabilities"], drawn, 1e-4, 1e-5)
    np.testing.assert_allclose(answer["probabilities"], drawn.mean(1), 1e-4, 1e-5)
    plain = numpy(ops.softmax(model(X)))
    for signature in ("serving_default", "serving_xla"):
        answer = served[signature](x=tf.constant(X))
        np.testing.assert_allclose(answer["probabilities"], plain, 1e-4, 1e-5)


@pytest.mark.slow
def test_contract():
    arguments = {"rate": 0.4, "noise_shape": (None, 1, None), "seed": 3}
    check_layer(MonteCarloDropout, arguments, (6, 3, 4))
