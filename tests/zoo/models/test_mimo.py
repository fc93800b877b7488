"""MIMO: which member sees what, and that its batches are the paper's."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from harness.fresh import record_answer, record_case
from harness.session import get
from kzoo.zoo import evaluate, export, train
from kzoo.zoo.models.mimo import MembersApart, MembersSideBySide, mimo, mimo_batches
from kzoo.zoo.predictive import classification

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 2, 4)).astype("float32")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def dense(input_shape, logits):
    x = keras.Input(input_shape, name="x")
    h = layers.Dense(16, "tanh")(layers.Flatten()(x))
    return keras.Model(x, layers.Dense(logits)(h), name="inner")


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_at_test_all_members_see_all_rows():
    model = mimo(dense, (2, 4), 3, members=2)
    inner = model.get_layer("inner")
    wide = np.concatenate([X, X], axis=-1)
    probs = softmax(inner.predict(wide, verbose=0).reshape(6, 2, 3))
    members, predict = classification(model)
    assert members == 2
    found = {name: numpy(value) for name, value in predict(X).items()}
    np.testing.assert_allclose(found["member_probabilities"], probs, 1e-5, 1e-6)
    np.testing.assert_allclose(found["probabilities"], probs.mean(1), 1e-5, 1e-6)
    logits = model.predict(X, batch_size=4, verbose=0)
    np.testing.assert_allclose(softmax(logits), probs.mean(1), 1e-5, 1e-6)


def test_in_training_a_row_holds_an_example_of_each_member():
    model = mimo(dense, (2, 4), 3, members=2)
    inner = model.get_layer("inner")
    # Rows 0, 1, 2 are member 0's, rows 3, 4, 5 member 1's.
    wide = np.concatenate([X[:3], X[3:]], axis=-1)
    logits = inner.predict(wide, verbose=0).reshape(3, 2, 3)
    expected = softmax(np.concatenate([logits[:, 0], logits[:, 1]]))
    found = np.exp(numpy(model(X, training=True)))
    np.testing.assert_allclose(found, expected, 1e-5, 1e-6)


def test_one_member_is_the_plain_network():
    model = mimo(dense, (2, 4), 3, members=1)
    plain = model.get_layer("inner").predict(X, verbose=0)
    for training in (False, True):
        found = softmax(numpy(model(X, training=training)))
        np.testing.assert_allclose(found, softmax(plain), 1e-5, 1e-6)


def regrouped(rows=6, epochs=1, **options):
    """x of each epoch's batches, `[epochs, batches, M, columns]`; y goes with it."""
    examples = tf.data.Dataset.from_tensor_slices(
        {"x": np.arange(2 * rows), "y": 10 * np.arange(2 * rows)}
    )
    batches = mimo_batches(examples.batch(rows), 3, **options)
    found = []
    for _ in range(epochs):
        found.append([batch["x"].numpy() for batch in batches])
        for batch in batches:
            np.testing.assert_array_equal(batch["y"], 10 * batch["x"])
    found = np.array(found)
    return found.reshape(epochs, 2, 3, -1)


def test_every_member_has_every_example_as_often_in_an_order_of_its_own():
    found = regrouped(batch_repetitions=4)
    assert found.shape == (1, 2, 3, 24)
    for b, batch in enumerate(found[0]):
        expected = np.repeat(np.arange(6 * b, 6 * b + 6), 4)
        np.testing.assert_array_equal(np.sort(batch, axis=1), np.tile(expected, (3, 1)))
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert (batch[one] != batch[other]).any()


def test_a_share_of_the_columns_has_one_example_for_all():
    found = regrouped(batch_repetitions=50, input_repetition=0.6, seed=3)[0, 0]
    same = (found == found[0]).all(0)
    # 0.6 of them, and those that are the same by chance: 1/36 of the others.
    assert same[-180:].all()
    assert same.mean() == pytest.approx(0.6 + 0.4 / 36, abs=0.04)
    kept = np.bincount(found[0][-180:], minlength=6)
    assert 15 < kept.min() < kept.max()  # Which columns these are is drawn too.
    assert (np.bincount(found[1], minlength=6) == 50).all()


def test_orders_are_the_seeds_and_change_from_epoch_to_epoch():
    one, other = (regrouped(epochs=2, batch_repetitions=2, seed=5) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert (one[0] != one[1]).any()
    assert (one[0, 0] + 6 != one[0, 1]).any()
    assert (one != regrouped(epochs=2, batch_repetitions=2, seed=6)).any()


def test_members_come_to_ignore_each_others_inputs():
    """The sign of the mean: output m must be that of input m alone."""
    keras.utils.set_random_seed(0)
    x = RNG.normal(size=(512, 2, 2)) + RNG.choice([-1, 1], (512, 1, 1))
    x = x.astype("float32")
    y = (x.mean((1, 2)) > 0).astype("int32")
    model = mimo(dense, (2, 2), 2, members=2)
    model.compile(keras.optimizers.Adam(0.02), LOSS)
    examples = tf.data.Dataset.from_tensor_slices((x, y))
    batches = mimo_batches(examples.shuffle(512, 0).batch(64), 2, seed=0)
    model.fit(batches, epochs=6, shuffle=False, verbose=0)
    rows = np.exp(numpy(model(x, training=True)))  # Two different inputs a row.
    assert (rows.argmax(-1) == y).mean() > 0.9
    assert (model.predict(x, verbose=0).argmax(-1) == y).mean() > 0.93


def test_saved_loaded_and_answered_elsewhere(tmp_path):
    model = mimo(dense, (2, 4), 3)
    y = RNG.integers(0, 3, 6)
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    model.fit(X, y, batch_size=6, verbose=0)
    expected = model.predict(X, verbose=0)
    record_case(
        "mimo",
        model,
        [MembersSideBySide, MembersApart],
        outputs=(X, expected),
        steps=lambda: ([(X, y)], np.array([model.train_on_batch(X, y)])),
        tol=1e-4,
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        loaded.predict(X, verbose=0), model.predict(X, verbose=0), 1e-5, 1e-6
    )
    if keras.backend.backend() == "tensorflow":
        folder = get().new("exports", "mimo")
        export(model, tmp_path).rename(folder / "saved_model")
        answer = classification(model)[1](X)
        answer = {name: numpy(value) for name, value in answer.items()}
        for signature in ("serving_default", "serving_xla"):
            record_answer(folder, signature, 0, {"x": X}, answer)


@pytest.mark.slow
def test_in_the_zoo(data_dir, tmp_path):
    def make(input_shape, logits):
        image = keras.Input(input_shape, name="image")
        x = layers.Flatten()(layers.Rescaling(1 / 16)(image))
        return keras.Model(image, layers.Dense(logits)(layers.Dense(64, "relu")(x)))

    model = mimo(make, (8, 8, 1), 10, members=2)
    options = {"epochs": 3, "batch_size": 64, "learning_rate": 0.02}
    options |= {"run_dir": tmp_path, "data_dir": data_dir, "verbose": False}
    result = train(model, members="split", **options)
    assert result.history["val_accuracy"][-1] > 0.5
    figures = evaluate(result.model, split="validation", data_dir=data_dir)
    assert figures["members"] == 2


@pytest.mark.tensorflow
def test_channels_are_known_for_batches_of_unknown_size():
    shapes = []

    @tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 3))])
    def training(x):
        shapes.append(MembersSideBySide(2)(x, training=True).shape)
        return model(x, training=True)

    def convolution(input_shape, logits):
        x = keras.Input(input_shape)
        y = layers.GlobalAveragePooling2D()(layers.Conv2D(2, 3)(x))
        return keras.Model(x, layers.Dense(logits)(y))

    model = mimo(convolution, (4, 4, 3), 3, members=2)
    graph = training.get_concrete_function().graph
    assert shapes[0][1:] == (4, 4, 6)
    inner = graph.as_graph_def().library.function
    # Grouped convolutions Keras compiles by themselves.
    assert not [f.signature.name for f in inner if "_XlaMustCompile" in f.attr]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="`members`.*Received: members=0"):
        mimo(dense, (2, 4), 3, members=0)
    with pytest.raises(ValueError, match=r"to 9 logits. Received.*\(3,\)"):
        mimo(lambda shape, logits: dense(shape, 3), (2, 4), 3)
    with pytest.raises(ValueError, match=r"from \(2, 12\).*Received.*\(2, 4\)"):
        mimo(lambda shape, logits: dense((2, 4), logits), (2, 4), 3)

    def probabilities(shape, logits):
        inner = dense(shape, logits)
        return keras.Model(inner.input, layers.Softmax()(inner.output))

    with pytest.raises(ValueError, match="logits, not in probabilities"):
        mimo(probabilities, (2, 4), 3)
    batches = tf.data.Dataset.from_tensors((X, X))
    for options in (
        {"members": 0},
        {"batch_repetitions": 0},
        {"input_repetition": 1.0},
    ):
        (name,) = options
        with pytest.raises(ValueError, match=f"`{name}`.*Received"):
            mimo_batches(batches, **options)
