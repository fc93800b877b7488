import warnings
from functools import partial

import keras
import numpy as np
import pytest
from keras import ops

from kzoo.layers import (
    Conv2DFlipout,
    Conv2DReparameterization,
    DenseFlipout,
    DenseLocalReparameterization,
    DenseReparameterization,
    EinsumDenseFlipout,
    GRUFlipout,
    LSTMReparameterization,
    PosteriorMean,
    from_bayesian,
    to_bayesian,
)
from kzoo.layers.variational.base import variational_layers
from kzoo.layers.variational.conversion import METHODS
from kzoo.zoo import build

rng = np.random.default_rng(0)


def numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def plain():
    """Convolutions, a shared layer, a nested model, two outputs."""
    image, row = keras.Input((6, 6, 3), name="image"), keras.Input((4,), name="row")
    x = keras.layers.Conv2D(4, 3, strides=2, activation="relu", name="conv")(image)
    x = keras.layers.BatchNormalization()(x)
    inner = keras.Sequential(
        [
            keras.Input((2, 2, 4)),
            keras.layers.Conv2D(4, 2, padding="same", groups=2, use_bias=False),
            keras.layers.Flatten(),
            keras.layers.Dense(4, "tanh"),
        ],
        name="inner",
    )
    shared = keras.layers.Dense(4, kernel_regularizer="l2", name="shared")
    x = keras.layers.Add()([shared(inner(x)), shared(row)])
    y = keras.layers.Reshape((2, 2))(x)
    y = keras.layers.EinsumDense("abc,cd->abd", (None, 3), bias_axes="d")(y)
    head = keras.layers.Dense(2, name="head")
    head.trainable = False
    model = keras.Model({"image": image, "row": row}, [y, head(x)])
    for w in model.weights:
        draw = rng.normal if "kernel" in w.path else partial(rng.uniform, 0.1, 1)
        w.assign(draw(size=w.shape))
    return model


INPUTS = {
    "image": rng.normal(size=(3, 6, 6, 3)).astype("float32"),
    "row": rng.normal(size=(3, 4)).astype("float32"),
}


@pytest.mark.parametrize(
    "method, dense",
    [
        ("flipout", DenseFlipout),
        ("reparameterization", DenseReparameterization),
        ("local_reparameterization", DenseLocalReparameterization),
    ],
)
def test_the_twin_is_the_plain_model_at_its_mean(method, dense):
    model = plain()
    twin = to_bayesian(model, method, num_examples=7, seed=1)
    for ours, theirs in zip(
        PosteriorMean(twin)(INPUTS), model(INPUTS, training=False), strict=True
    ):
        np.testing.assert_allclose(numpy(ours), numpy(theirs), 1e-5, 1e-5)
    assert type(twin.get_layer("shared")) is dense
    assert type(twin.get_layer("inner").layers[-1]) is dense
    assert twin.get_layer("shared").num_examples == 7
    assert not twin.get_layer("head").trainable
    assert twin.get_layer("inner").layers[0].bias is None
    assert len(twin.get_layer("shared")._inbound_nodes) == 2
    names = [layer.name for layer in model._flatten_layers()]
    assert [layer.name for layer in twin._flatten_layers()] == names
    seeds = [
        x.seed for x in twin._flatten_layers() if getattr(x, "seed", None) is not None
    ]
    assert len(seeds) == len(set(seeds)) == 6
    # It draws, and what is drawn is seeded.
    again = to_bayesian(model, method, num_examples=7, seed=1)
    first, second = (numpy(m(INPUTS)[0]) for m in (twin, again))
    np.testing.assert_allclose(first, second, 1e-5, 1e-5)
    assert not np.allclose(first, numpy(model(INPUTS)[0]))


def test_scales():
    model = plain()
    kernel = numpy(model.get_layer("shared").kernel)
    twin = to_bayesian(model, stddev=0.25)
    found = numpy(twin.get_layer("shared").kernel_posterior.stddev())
    np.testing.assert_allclose(found, 0.25, rtol=1e-5)
    twin = to_bayesian(model, relative_stddev=0.1)
    found = numpy(twin.get_layer("shared").kernel_posterior.stddev())
    np.testing.assert_allclose(found, 0.1 * np.abs(kernel), rtol=1e-4)


def test_a_weight_of_zero_has_a_finite_scale():
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, kernel_initializer="zeros")]
    )
    twin = to_bayesian(model, relative_stddev=0.1)
    assert all(np.isfinite(w).all() for w in twin.get_weights())
    assert float(numpy(twin.layers[0].kernel_posterior.stddev()).max()) < 1e-6


def test_regularizers_go_over_and_the_divergence_is_added():
    model = plain()
    twin = to_bayesian(model, num_examples=7)
    layer = twin.get_layer("shared")
    kernel = numpy(model.get_layer("shared").kernel)
    expected = 0.01 * (kernel**2).sum() + numpy(layer.kernel.divergence()) / 7
    np.testing.assert_allclose(numpy(sum(layer.losses)), expected, rtol=1e-5)


def attentive():
    """An embedding, attention of all kinds, and convolutions of other kinds."""
    ids = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(6, 4, mask_zero=True, embeddings_regularizer="l2")(ids)
    x = keras.layers.MultiHeadAttention(2, 3, kernel_regularizer="l1")(
        x, x, use_causal_mask=True
    )
    attention = keras.layers.MultiHeadAttention(
        1, 2, use_bias=False, use_gate=True, output_shape=8, dropout=0.5
    )
    x = keras.layers.Reshape((4, 4, 2))(attention(x, x))
    x = keras.layers.DepthwiseConv2D(
        2, depth_multiplier=2, activation="tanh", depthwise_regularizer="l2"
    )(x)
    x = keras.layers.DepthwiseConv2D(2, use_bias=False)(x)
    x = keras.layers.Conv2DTranspose(3, 2, strides=2, kernel_constraint="non_neg")(x)
    x = keras.layers.Conv2DTranspose(2, 2, padding="same", use_bias=False)(x)
    model = keras.Model(ids, x)
    for w in model.weights:
        w.assign(rng.normal(size=w.shape))
    return model


@pytest.mark.parametrize("method", list(METHODS))
def test_embeddings_attention_and_other_convolutions(method):
    model = attentive()
    ids = np.array([[1, 2, 5, 0], [3, 1, 0, 0]], "int32")
    twin = to_bayesian(model, method, num_examples=7, seed=1)
    ours, theirs = PosteriorMean(twin)(ids), model(ids, training=False)
    np.testing.assert_allclose(numpy(ours), numpy(theirs), 1e-4, 1e-4)
    assert not np.allclose(numpy(twin(ids)), numpy(theirs), 1e-4)
    kinds = [
        "Embedding",
        *["MultiHeadAttention"] * 2,
        *["DepthwiseConv2D"] * 2,
        *["Conv2DTranspose"] * 2,
    ]
    made = [type(x).__name__ for x in twin.layers if hasattr(x, "num_examples")]
    assert made == [kind + METHODS[method] for kind in kinds]
    assert all(x.num_examples == 7 for x in twin.layers if hasattr(x, "num_examples"))
    # The regularizers are those of the means, beside the divergences.
    divergences = sum(numpy(x.kernel.divergence()) for x in variational_layers(twin))
    expected = numpy(sum(model.losses)) + divergences / 7
    np.testing.assert_allclose(numpy(sum(twin.losses)), expected, 1e-4)
    attention = twin.layers[3]
    assert attention.query_dense.bias is None and attention.dropout == 0.5


@pytest.mark.parametrize("plain", [plain, attentive])
def test_there_and_back(plain):
    model = plain()
    back = from_bayesian(to_bayesian(model))
    for layer, other in zip(
        model._flatten_layers(), back._flatten_layers(), strict=True
    ):
        assert type(layer) is type(other) and layer.trainable == other.trainable
    for ours, theirs in zip(back.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    losses = [numpy(sum(m.losses)) for m in (back, model)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def recurrent():
    """Every recurrent layer, two of them in both directions, and a mask."""
    options = {"return_sequences": True, "unroll": True}
    x = inputs = keras.Input((3, 2))
    x = keras.layers.Masking()(x)
    x = keras.layers.LSTM(
        3, recurrent_regularizer="l2", activation="softsign", name="lstm", **options
    )(x)
    x = keras.layers.Bidirectional(
        keras.layers.GRU(3, reset_after=False, use_bias=False, **options),
        merge_mode="sum",
        name="both",
    )(x)
    x = keras.layers.SimpleRNN(3, go_backwards=True, dropout=0.2, unroll=True)(x)
    model = keras.Model(inputs, x)
    for w in model.trainable_weights:
        w.assign(rng.normal(size=w.shape))
    return model


def test_recurrent_layers_there_and_back():
    model, x = recurrent(), rng.normal(size=(3, 3, 2)).astype("float32")
    x[1, 2] = 0  # Masked.
    twin = to_bayesian(model, num_examples=7, seed=1)
    both = twin.get_layer("both")
    assert type(both.forward_layer) is type(both.backward_layer) is GRUFlipout
    assert both.forward_layer.seed != both.backward_layer.seed
    assert both.backward_layer.num_examples == 7
    np.testing.assert_allclose(
        numpy(PosteriorMean(twin)(x)), numpy(model(x)), 1e-5, 1e-5
    )
    back = from_bayesian(twin)
    for ours, theirs in zip(back.layers[2:], model.layers[2:], strict=True):
        assert type(ours) is type(theirs)
        assert ours.get_config() == theirs.get_config()
    for ours, theirs in zip(back.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    lstm = to_bayesian(model, "reparameterization").get_layer("lstm")
    assert type(lstm) is LSTMReparameterization
    with pytest.raises(ValueError, match="LSTM holds .*'local_reparameterization'"):
        to_bayesian(model, "local_reparameterization")


@pytest.mark.slow
def test_a_model_of_the_zoo_trains_saves_and_loads(tmp_path):
    model = build("resnet8_digits", width=4)
    twin = to_bayesian(model, num_examples=8, relative_stddev=0.1, seed=0)
    assert isinstance(twin.get_layer("stem_conv"), Conv2DFlipout)
    x = rng.integers(0, 17, size=(8, 8, 8, 1)).astype("float32")
    np.testing.assert_allclose(
        numpy(PosteriorMean(twin)(x)), numpy(model(x, training=False)), 1e-4, 1e-4
    )
    twin.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    twin.fit(x, np.arange(8), epochs=2, verbose=0)
    twin.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        numpy(PosteriorMean(loaded)(x)), numpy(PosteriorMean(twin)(x)), 1e-5, 1e-5
    )


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"method": "dropout"}, "method='dropout'"),
        ({"stddev": 0}, "Received: stddev=0"),
        ({"stddev": "a"}, "Received: stddev='a'"),
        ({"relative_stddev": -1}, "relative_stddev=-1"),
        ({"stddev": 0.1, "relative_stddev": 0.1}, "stddev=0.1, relative_stddev=0.1"),
        ({"seed": "x"}, "seed='x'"),
    ],
)
def test_refuses_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        to_bayesian(plain(), **kwargs)


def test_refuses_models():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="Received: Own"):
        to_bayesian(Own())
    without = keras.Sequential([keras.Input((3,)), keras.layers.ReLU()], name="relu")
    with pytest.raises(ValueError, match="Received: relu, with"):
        to_bayesian(without)
    with pytest.raises(ValueError, match="distributions over their weights"):
        from_bayesian(without)


def test_every_kind_has_its_counterparts():
    model = plain()
    twin = to_bayesian(model, "reparameterization")
    assert type(twin.get_layer("conv")) is Conv2DReparameterization
    assert any(isinstance(x, EinsumDenseFlipout) for x in to_bayesian(model).layers)


def test_neither_model_depends_on_the_other():
    """On JAX a training step takes the arrays of what it trains."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    twin = to_bayesian(model)
    back = from_bayesian(twin)
    x, y = np.ones((4, 4), "float32"), np.ones((4, 3), "float32")
    expected = model.predict(x, verbose=0)
    for trained in (twin, back):
        trained.compile("adam", "mse")
        trained.fit(x, y, verbose=0)
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)
    model.compile("adam", "mse")
    model.fit(x, y, verbose=0)
    assert np.isfinite(twin.predict(x, verbose=0)).all()


def test_operations_and_what_was_adapted_stay():
    x = keras.Input((4,))
    normalization = keras.layers.Normalization()
    normalization.adapt(rng.normal(5, 3, size=(100, 4)))
    h = ops.relu(keras.layers.Dense(4)(normalization(x)) + 1)
    model = keras.Model(x, keras.layers.Dense(2, lambda y: y**2)(h))
    twin = to_bayesian(model)
    rows = rng.normal(5, 3, size=(3, 4)).astype("float32")
    expected = numpy(model(rows))
    for made in (PosteriorMean(twin), from_bayesian(twin)):
        np.testing.assert_allclose(numpy(made(rows)), expected, 1e-4, 1e-4)


def test_layers_that_get_no_distribution_are_named():
    cell = keras.layers.RNN(keras.layers.GRUCell(2), return_sequences=True)
    layers = [
        keras.layers.TimeDistributed(keras.layers.Dense(2), name="each"),
        keras.layers.Bidirectional(cell, name="both", trainable=False),
        keras.layers.LayerNormalization(axis=(1, 2)),
        keras.layers.Flatten(),
        keras.layers.Dense(3),
        DenseFlipout(1),
    ]
    model = keras.Sequential([keras.Input((3, 4)), *layers])
    named = "distribution: TimeDistributed 'each', Bidirectional 'both'$"
    with pytest.warns(UserWarning, match=named):
        to_bayesian(model)
    model = keras.Sequential([keras.Input((3, 4)), *layers[2:]])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        to_bayesian(model)


@pytest.mark.tensorflow
def test_vocabularies_stay():
    words = keras.Input((), dtype="string")
    lookup = keras.layers.StringLookup(output_mode="one_hot")
    lookup.adapt(["a", "b", "c"])
    model = keras.Model(words, keras.layers.Dense(2)(lookup(words)))
    import tensorflow as tf

    x = tf.constant(["b", "z", "c"])
    mean = PosteriorMean(to_bayesian(model))
    np.testing.assert_allclose(numpy(mean(x)), numpy(model(x)), 1e-5, 1e-5)
