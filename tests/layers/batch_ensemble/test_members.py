import keras
import numpy as np
import pytest
import scipy.special
from keras import ops

from harness import check_layer
from kzoo.layers import AverageMembers, DenseBatchEnsemble, TileMembers

M, CLASSES = 4, 3
rng = np.random.default_rng(0)


def normal(*shape):
    return rng.normal(size=shape).astype("float32")


def values(tensor):
    return ops.convert_to_numpy(tensor)


def nll(probs, labels):
    return -np.log(probs[np.arange(len(labels)), labels])


def classifier():
    """A small ensemble whose members differ from the start."""
    inputs = keras.Input((5,), name="x")
    x = TileMembers(M)(inputs)
    x = DenseBatchEnsemble(
        7,
        ensemble_size=M,
        activation="tanh",
        alpha_initializer=keras.initializers.RandomNormal(1.0, 0.5, seed=1),
        gamma_initializer=keras.initializers.RandomNormal(1.0, 0.5, seed=2),
        bias_initializer=keras.initializers.RandomNormal(0.0, 0.5, seed=3),
    )(x)
    x = keras.layers.Dense(CLASSES, name="logits")(x)
    model = keras.Model(inputs, AverageMembers(M)(x))
    model.compile(
        keras.optimizers.SGD(0.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def member_probs(model, x):
    """The members' probabilities for the same rows, [M, B, C], by hand in NumPy."""
    layer = model.layers[2]
    alpha, gamma, bias = (
        values(w.value) for w in (layer.alpha, layer.gamma, layer.bias)
    )
    kernel = values(layer.kernel.value)
    weights, bias_out = model.get_layer("logits").get_weights()
    hidden = [
        np.tanh(x @ (kernel * np.outer(alpha[m], gamma[m])) + bias[m]) for m in range(M)
    ]
    return scipy.special.softmax(np.stack(hidden) @ weights + bias_out, -1)


@pytest.mark.slow
def test_contract():
    check_layer(TileMembers, {"ensemble_size": 3}, (4, 5))
    check_layer(AverageMembers, {"ensemble_size": 3}, (6, 5))


def test_tile_order_is_member_major():
    x = np.arange(6.0).reshape(3, 2)
    tile = TileMembers(2)
    np.testing.assert_array_equal(values(tile(x)), np.concatenate([x, x]))
    np.testing.assert_array_equal(values(tile(x, training=True)), x)


@pytest.mark.parametrize("dtype", ("int32", "uint8", "float16", "bool"))
def test_tile_keeps_dtype(dtype):
    x = ops.cast(np.ones((2, 3)), dtype)
    layer = TileMembers(2, dtype="float16" if dtype == "float16" else None)
    assert keras.backend.standardize_dtype(layer(x).dtype) == dtype
    assert layer(keras.KerasTensor((2, 3), dtype)).dtype == dtype


def test_average_is_the_mean_of_probabilities():
    logits = 3 * normal(M * 5, CLASSES)
    probs = scipy.special.softmax(logits.astype("float64"), -1).reshape(M, 5, CLASSES)
    output = values(AverageMembers(M)(logits))
    np.testing.assert_allclose(output, np.log(probs.mean(0)), atol=1e-6)
    # The output is a logit vector for that very probability.
    np.testing.assert_allclose(
        scipy.special.softmax(output, -1), probs.mean(0), atol=1e-6
    )
    # It is neither the mean of logits nor of log probabilities.
    geometric = scipy.special.softmax(np.log(probs).mean(0), -1)
    assert np.abs(np.exp(output) - geometric).max() > 0.01


def test_average_in_training_is_each_members_own():
    logits = 3 * normal(M * 5, CLASSES)
    np.testing.assert_allclose(
        values(AverageMembers(M)(logits, training=True)),
        scipy.special.log_softmax(logits, -1),
        atol=1e-6,
    )


def test_outputs_that_are_no_logits_are_averaged_as_they_are():
    x, layer = normal(M * 2, CLASSES), AverageMembers(M, from_logits=False)
    np.testing.assert_array_equal(values(layer(x, training=True)), x)
    expected = x.reshape(M, 2, CLASSES).mean(0)
    np.testing.assert_allclose(values(layer(x)), expected, atol=1e-6)


def test_average_over_sequences():
    logits = normal(M * 2, 6, CLASSES)
    probs = scipy.special.softmax(logits, -1).reshape(M, 2, 6, CLASSES).mean(0)
    output = values(AverageMembers(M)(logits))
    assert output.shape == (2, 6, CLASSES)
    np.testing.assert_allclose(np.exp(output), probs, atol=1e-6)


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("policy", ("mixed_float16", "mixed_bfloat16", "float32"))
def test_average_in_float32(policy, training):
    layer = AverageMembers(2, dtype=policy)
    # A logit that float16 cannot hold, and differences that bfloat16 cannot.
    logits = np.array([[1e5, 1e5 + 1.0], [100.0, 100.1]], "float32")
    output = layer(logits, training=training)
    assert keras.backend.standardize_dtype(output.dtype) == "float32"
    expected = scipy.special.log_softmax(logits.astype("float64"), -1)
    if not training:
        expected = scipy.special.logsumexp(expected, 0, keepdims=True) - np.log(2)
    np.testing.assert_allclose(values(output), expected, atol=1e-5)
    half = layer(ops.cast(logits / 1e3, "float16"), training=training)
    assert keras.backend.standardize_dtype(half.dtype) == "float32"
    assert layer(keras.KerasTensor((2, 2), "float16")).dtype == "float32"


def test_symbolic_shapes():
    assert TileMembers(3)(keras.Input((5,))).shape == (None, 5)
    assert TileMembers(3)(keras.Input((5,), batch_size=2)).shape == (6, 5)
    assert AverageMembers(3)(keras.Input((5,))).shape == (None, 5)
    assert AverageMembers(3)(keras.Input((5,), batch_size=6)).shape == (2, 5)


def test_masks_follow_the_rows():
    class Seen(keras.layers.Layer):
        supports_masking = True

        def call(self, x, mask=None):
            self.mask = mask
            return x

    mask = np.array([[True, True, False], [True, False, False]])
    x = normal(2, 3, CLASSES) * mask[..., None]
    tiled = np.tile(mask, (M, 1))
    masking = keras.layers.Masking()
    for training in (False, True):
        seen = Seen()
        seen(TileMembers(M)(masking(x), training=training))
        expected = mask if training else tiled
        np.testing.assert_array_equal(values(seen.mask), expected)
        seen = Seen()
        seen(AverageMembers(M)(masking(np.tile(x, (M, 1, 1))), training=training))
        expected = tiled if training else mask
        np.testing.assert_array_equal(values(seen.mask), expected)


def test_masks_in_a_functional_model(tmp_path):
    tokens = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(9, 4, mask_zero=True)(tokens)
    x = TileMembers(2)(x)
    x = keras.layers.LSTM(4, return_sequences=True, name="lstm")(x)
    x = keras.layers.GlobalAveragePooling1D()(AverageMembers(2)(x))
    model = keras.Model(tokens, x)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    rows = np.array(
        [[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [6, 7, 8, 1, 2], [3, 0, 0, 0, 0]]
    )

    def expected():
        """Without masks, each row by itself without its padding; members agree."""
        embedding, lstm = model.layers[1], model.get_layer("lstm")
        logits = [values(lstm(embedding(r[None, r > 0]))) for r in rows]
        return np.concatenate(
            [scipy.special.log_softmax(x, -1).mean(1) for x in logits]
        )

    def check(model):
        for training in (False, True):
            output = values(model(rows, training=training))
            np.testing.assert_allclose(output, expected(), atol=1e-6)
        np.testing.assert_allclose(model.predict_on_batch(rows), expected(), atol=1e-6)

    y = normal(4, 4)
    loss = np.square(expected() - y).mean()
    history = model.fit(rows, y, batch_size=4, verbose=0)
    assert history.history["loss"][0] == pytest.approx(loss, rel=1e-5)
    check(model)
    model.save(tmp_path / "model.keras")
    check(keras.models.load_model(tmp_path / "model.keras"))


def test_the_mask_of_an_average_in_a_functional_model():
    tokens = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(9, CLASSES, mask_zero=True)(tokens)
    x = AverageMembers(2)(x)
    # Averages the positions that are not masked.
    model = keras.Model(tokens, keras.layers.GlobalAveragePooling1D()(x))
    # Both members have the same mask.
    rows = np.array(
        [[1, 2, 3, 0, 0], [4, 5, 0, 0, 0], [6, 7, 8, 0, 0], [3, 2, 0, 0, 0]]
    )
    logits = values(model.layers[1].embeddings.value)[rows]
    mask = (rows > 0)[..., None]

    def pooled(log_probs, mask):
        return (log_probs * mask).sum(1) / mask.sum(1)

    own = pooled(scipy.special.log_softmax(logits, -1), mask)
    probs = scipy.special.softmax(logits, -1).reshape(2, 2, 5, CLASSES).mean(0)
    mean = pooled(np.log(probs), mask[:2])
    np.testing.assert_allclose(values(model(rows)), mean, atol=1e-6)
    np.testing.assert_allclose(model.predict_on_batch(rows), mean, atol=1e-6)
    np.testing.assert_allclose(values(model(rows, training=True)), own, atol=1e-6)


@pytest.mark.parametrize("jit", (True, False))
def test_fit_on_a_tiled_batch_gives_the_mean_of_members_nlls(jit):
    model = classifier()
    model.compile(loss=model.loss, optimizer=model.optimizer, jit_compile=jit)
    x, y = normal(6, 5), rng.integers(CLASSES, size=6)
    probs = member_probs(model, x)
    expected = np.mean([nll(probs[m], y) for m in range(M)])
    history = model.fit(
        np.tile(x, (M, 1)), np.tile(y, M), batch_size=6 * M, shuffle=False, verbose=0
    )
    assert history.history["loss"][0] == pytest.approx(expected, rel=1e-5)
    assert expected > nll(probs.mean(0), y).mean() + 1e-3  # Jensen


def test_fit_on_a_split_batch_shows_each_member_its_own_rows():
    model = classifier()
    x, y = normal(6 * M, 5), rng.integers(CLASSES, size=6 * M)
    probs = np.concatenate(
        [member_probs(model, x)[m, 6 * m : 6 * m + 6] for m in range(M)]
    )
    history = model.fit(x, y, batch_size=6 * M, shuffle=False, verbose=0)
    assert history.history["loss"][0] == pytest.approx(nll(probs, y).mean(), rel=1e-5)


@pytest.mark.parametrize("jit", (True, False))
def test_evaluate_and_predict_average_probabilities(jit):
    model = classifier()
    model.compile(loss=model.loss, optimizer=model.optimizer, jit_compile=jit)
    x, y = normal(7, 5), rng.integers(CLASSES, size=7)
    mean = member_probs(model, x).mean(0)
    # Batches of 4 and 3 rows: any number of rows will do.
    loss = model.evaluate(x, y, batch_size=4, verbose=0)
    assert loss == pytest.approx(nll(mean, y).mean(), rel=1e-5)
    predicted = model.predict(x, batch_size=4, verbose=0)
    np.testing.assert_allclose(np.exp(predicted), mean, atol=1e-6)


def test_average_refuses_rows_that_do_not_split():
    with pytest.raises(ValueError, match="ensemble_size=4. Received: a batch of 6"):
        AverageMembers(4)(np.zeros((6, 3)))
    with pytest.raises(ValueError, match="ensemble_size=4. Received: a batch of 6"):
        AverageMembers(4)(keras.Input((3,), batch_size=6))


def test_one_logit_is_none():
    for x in (np.zeros((4, 1)), keras.Input((1,))):
        with pytest.raises(ValueError, match="two classes.*Received: inputs of shape"):
            AverageMembers(2)(x)
    assert AverageMembers(2, from_logits=False)(np.zeros((4, 1))).shape == (2, 1)


@pytest.mark.parametrize("layer", (TileMembers, AverageMembers))
@pytest.mark.parametrize("size", (0, -2, 1.5, None, True))
def test_bad_ensemble_size(layer, size):
    with pytest.raises(ValueError, match=f"Received: ensemble_size={size}"):
        layer(size)
