"""To an ensemble and back to each of its members, by outputs and weights."""

import keras
import numpy as np
import pytest
from keras import ops

import kzoo.layers
from kzoo.layers import (
    AverageMembers,
    BatchNormalizationBatchEnsemble,
    DenseBatchEnsemble,
    TileMembers,
    from_batch_ensemble,
    to_batch_ensemble,
)

M = 3
APART = {"alpha_initializer": "random_normal", "gamma_initializer": "random_normal"}
layers = keras.layers


def value(x):
    return ops.convert_to_numpy(x)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def randomize(model, seed=0):
    """Gives every weight a value of its own; variances stay positive."""
    numbers = np.random.default_rng(seed)
    for v in model.weights:
        size = numbers.normal(size=v.shape) * 0.3
        v.assign(np.abs(size) + 0.5 if "variance" in v.path else size)
    return model


def images():
    """Convolutions of all kinds, with a shared layer and a model inside the model."""
    x = keras.Input((8, 8, 2))
    inner = keras.Sequential(
        [
            keras.Input((4, 4, 4)),
            layers.SeparableConv2D(4, 3, padding="same"),
            layers.PReLU(shared_axes=[1, 2]),
        ],
        name="inner",
    )
    y = layers.Conv2D(4, 3, 2, padding="same", groups=2, activation="tanh")(x)
    y = layers.BatchNormalization()(y)
    shared = layers.DepthwiseConv2D(3, padding="same", name="twice")
    y = layers.Add()([shared(y), shared(ops.relu(inner(y)))])
    y = layers.Conv2DTranspose(3, 3, 2, padding="same")(y)
    y = layers.LayerNormalization()(layers.Flatten()(y))
    return keras.Model(x, layers.Dense(5)(y), name="images")


def words():
    """Layers for sequences, a mask, two inputs and two outputs."""
    ids, x = keras.Input((6,), dtype="int32", name="ids"), keras.Input((6, 4), name="x")
    y = layers.Embedding(7, 4, mask_zero=True)(ids)
    y = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(y)
    y = layers.MultiHeadAttention(2, 3, use_gate=True)(y, x)
    y = layers.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d")(y)
    y = layers.Conv1D(4, 2)(layers.GRU(4, return_sequences=True)(y))
    first = layers.Dense(3, name="first")(layers.SimpleRNN(4)(y))
    second = layers.Dense(2, name="second", use_bias=False)(y)
    return keras.Model({"ids": ids, "x": x}, [first, second], name="words")


def inputs_of(model, rows=2):
    if model.name == "words":
        ids = np.random.default_rng(0).integers(0, 7, (rows, 6))
        return {"ids": ids.astype("int32"), "x": normal(rows, 6, 4)}
    return normal(rows, *model.input_shape[1:])


RANK = {"rank": 2, "ensemble_size": M}
GROUPS = {**RANK, "kernel_size": 3, "groups": 2}
DEPTH = {"kernel_size": 3, "depth_multiplier": 2, "ensemble_size": M}
# Class, arguments, shape of a row; M is the number of members.
LAYERS = [
    (kzoo.layers.DenseBatchEnsemble, {"units": 4, "activation": "tanh", **RANK}, (5,)),
    (kzoo.layers.Conv1DBatchEnsemble, {"filters": 4, **GROUPS}, (5, 4)),
    (kzoo.layers.Conv2DBatchEnsemble, {"filters": 4, **GROUPS}, (5, 5, 4)),
    (kzoo.layers.Conv3DBatchEnsemble, {"filters": 4, **GROUPS}, (4, 4, 4, 4)),
    (
        kzoo.layers.Conv2DTransposeBatchEnsemble,
        {"filters": 4, "kernel_size": 3, **RANK},
        (3, 3, 5),
    ),
    (kzoo.layers.DepthwiseConv2DBatchEnsemble, {**DEPTH, "rank": 2}, (4, 4, 3)),
    (kzoo.layers.SeparableConv2DBatchEnsemble, {"filters": 5, **DEPTH}, (4, 4, 3)),
    (
        kzoo.layers.EinsumDenseBatchEnsemble,
        {"equation": "abc,bcd->adb", "output_shape": (4, 2), "bias_axes": "d", **RANK},
        (2, 3),
    ),
    (kzoo.layers.SimpleRNNBatchEnsemble, {"units": 4, **RANK}, (3, 5)),
    (kzoo.layers.GRUBatchEnsemble, {"units": 4, "go_backwards": True, **RANK}, (3, 5)),
    (
        kzoo.layers.LSTMBatchEnsemble,
        {"units": 4, "return_sequences": True, "use_bias": False, **RANK},
        (3, 5),
    ),
    (
        kzoo.layers.BatchNormalizationBatchEnsemble,
        {"ensemble_size": M, "axis": 1, "center": False},
        (3, 4),
    ),
    (
        kzoo.layers.LayerNormalizationBatchEnsemble,
        {"ensemble_size": M, "axis": [1, 2]},
        (3, 4),
    ),
    (kzoo.layers.PReLUBatchEnsemble, {"ensemble_size": M, "shared_axes": [1]}, (3, 4)),
]


@pytest.mark.parametrize(
    "cls, kwargs, row", LAYERS, ids=lambda x: getattr(x, "__name__", "")
)
def test_each_member_of_a_layer(cls, kwargs, row):
    layer, x = cls(**kwargs), normal(2 * M, *row)
    with pytest.raises(ValueError, match="expected a built layer"):
        layer.member(0)
    layer.build(x.shape)
    randomize(layer)
    rows = np.split(value(layer(x)), M)
    for m, expected in enumerate(rows):
        plain = layer.member(m)
        assert type(plain).__name__ == cls.__name__.removesuffix("BatchEnsemble")
        found = value(plain(np.split(x, M)[m]))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    for m in (-1, M, 0.5):
        with pytest.raises(ValueError, match=f"from 0 to {M - 1}. Received: index="):
            layer.member(m)


def test_a_separable_map_of_rank_two_has_no_plain_member():
    layer = kzoo.layers.SeparableConv2DBatchEnsemble(3, 2, rank=2)
    layer.build((4, 3, 3, 2))
    with pytest.raises(ValueError, match="Received: rank=2"):
        layer.member(0)


MODELS = pytest.mark.parametrize("make", [images, words])


@MODELS
def test_ones_are_the_plain_model(make):
    plain = randomize(make())
    ensemble = to_batch_ensemble(plain, M, average="outputs")
    x = inputs_of(plain)
    expected = keras.tree.flatten(plain(x))
    for y, e in zip(keras.tree.flatten(ensemble(x)), expected, strict=True):
        np.testing.assert_allclose(value(y), value(e), rtol=1e-4, atol=1e-5)
    assert not {id(v) for v in ensemble.weights} & {id(v) for v in plain.weights}
    ours = sorted(layer.name for layer in plain.layers if layer.weights)
    assert ours == sorted(layer.name for layer in ensemble.layers if layer.weights)


@MODELS
@pytest.mark.parametrize("own", [False, True])
def test_each_member_is_a_plain_model(make, own):
    ensemble = to_batch_ensemble(
        randomize(make()), M, average=None, own_normalization=own, **APART
    )
    randomize(ensemble, seed=1)
    x = inputs_of(ensemble)
    rows = [value(y) for y in keras.tree.flatten(ensemble(x))]
    members = [from_batch_ensemble(ensemble, m) for m in range(M)]
    for m, member in enumerate(members):
        assert not {type(x).__module__ for x in member.layers if "kzoo" in str(type(x))}
        for y, all_rows in zip(keras.tree.flatten(member(x)), rows, strict=True):
            expected = np.split(all_rows, M)[m]
            np.testing.assert_allclose(value(y), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(np.split(rows[0], M)[0], np.split(rows[0], M)[1], atol=1e-2)


def test_a_sequential_model_stays_one():
    plain = keras.Sequential(
        [keras.Input((4,), name="x"), layers.Dense(3, "relu"), layers.Dense(2)],
        name="mlp",
    )
    plain.layers[0].trainable = False
    ensemble = to_batch_ensemble(plain, M, rank=2, **APART)
    assert isinstance(ensemble, keras.Sequential) and ensemble.name == "mlp"
    kinds = [TileMembers, DenseBatchEnsemble, DenseBatchEnsemble, AverageMembers]
    assert [type(layer) for layer in ensemble.layers] == kinds
    assert [layer.trainable for layer in ensemble.layers[1:3]] == [False, True]
    assert {layer.rank for layer in ensemble.layers[1:3]} == {2}
    x = normal(5, 4)
    of_members = [
        value(ops.softmax(from_batch_ensemble(ensemble, m)(x))) for m in range(M)
    ]
    found = value(ops.softmax(ensemble(x)))
    np.testing.assert_allclose(found, np.mean(of_members, 0), rtol=1e-5, atol=1e-6)
    back = from_batch_ensemble(ensemble, 0)
    assert isinstance(back, keras.Sequential)
    assert [type(layer) for layer in back.layers] == [layers.Dense, layers.Dense]
    assert [layer.activation for layer in back.layers] == [
        layer.activation for layer in plain.layers
    ]


def test_own_normalization_starts_as_the_shared_one():
    plain = randomize(keras.Sequential([keras.Input((4,)), layers.Dense(3)]))
    plain.add(layers.BatchNormalization(momentum=0.5))
    randomize(plain)
    ensemble = to_batch_ensemble(plain, M, own_normalization=True)
    own, of_plain = ensemble.layers[2], plain.layers[1]
    assert type(own) is BatchNormalizationBatchEnsemble
    assert own.momentum == 0.5
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        expected = np.stack([value(getattr(of_plain, name))] * M)
        np.testing.assert_array_equal(value(getattr(own, name)), expected)


@pytest.mark.slow
@pytest.mark.tensorflow  # Compiling these on JAX takes minutes.
@pytest.mark.parametrize(
    "make, shape",
    [
        (keras.applications.MobileNetV2, (32, 32, 3)),
        (keras.applications.EfficientNetV2B0, (32, 32, 3)),
    ],
    ids=["MobileNetV2", "EfficientNetV2B0"],
)
def test_keras_applications(make, shape):
    plain = make(weights=None, input_shape=shape, classes=4)
    ensemble = to_batch_ensemble(plain, 2, average="outputs")
    x = 100 * np.abs(normal(2, *shape))
    np.testing.assert_allclose(value(ensemble(x)), value(plain(x)), atol=1e-5)
    member = from_batch_ensemble(ensemble, 1)
    np.testing.assert_allclose(value(member(x)), value(plain(x)), atol=1e-5)
    assert [type(layer) for layer in member.layers] == [
        type(layer) for layer in plain.layers
    ]


def test_saved_and_loaded(tmp_path):
    ensemble = to_batch_ensemble(randomize(words()), M, average=None, **APART)
    ensemble.save(tmp_path / "words.keras")
    loaded = keras.saving.load_model(tmp_path / "words.keras")
    x = inputs_of(ensemble)
    for y, e in zip(loaded(x), ensemble(x), strict=True):
        np.testing.assert_allclose(value(y), value(e), atol=1e-6)


def test_layers_that_are_left_plain_are_named():
    plain = keras.Sequential(
        [
            keras.Input((3, 4)),
            layers.TimeDistributed(layers.Dense(2), name="each"),
            layers.Dense(2),
        ]
    )
    with pytest.warns(UserWarning, match="TimeDistributed 'each'"):
        to_batch_ensemble(plain, M)


def test_what_is_no_logits_is_not_averaged_as_such():
    x = keras.Input((4,))
    for last in (
        [layers.Dense(1)],
        [layers.Dense(3, "softmax")],
        [layers.Dense(3), layers.Softmax()],
        [layers.Dense(2), kzoo.layers.MeanAndVariance()],
    ):
        plain = keras.Sequential([x, layers.Dense(4), *last])
        with pytest.raises(ValueError, match="expected `average='outputs'`"):
            to_batch_ensemble(plain, M)
        to_batch_ensemble(plain, M, average="outputs")
    outer = keras.Model(x, keras.Sequential([x, layers.Dense(3, "softmax")])(x))
    with pytest.raises(ValueError, match="expected `average='outputs'`"):
        to_batch_ensemble(outer, M)


def towers():
    """Two models inside of one, whose layers have the same names, and a shared one."""
    x = keras.Input((4,))
    inner = [
        keras.Sequential([keras.Input((4,)), layers.Dense(3, name="hidden")], name=n)
        for n in ("left", "right")
    ]
    last = layers.Dense(2, name="shared")
    return keras.Model(x, [last(one(x)) for one in inner], name="towers")


def test_layers_of_other_arguments_share_nothing():
    dense, conv = kzoo.layers.DenseBatchEnsemble, kzoo.layers.Conv2DBatchEnsemble
    for one, other, message in (
        (dense(3), dense(4), "units=3 to share with. Received: .* with units=4"),
        (conv(3, 2), conv(3, 2, strides=2), "Received: .* with strides="),
        (dense(3), conv(3, 2), "expected a DenseBatchEnsemble.*Received: Conv2D"),
    ):
        with pytest.raises(ValueError, match=message):
            one.share_with(other)
    one, other = dense(3), dense(3, kernel_initializer="ones", ensemble_size=2)
    other.build((2, 5))
    one.share_with(other)
    one.build((4, 5))
    assert one.kernel is other.kernel


def test_two_ensembles_share_one_kernel_of_each_layer():
    plain = randomize(towers())
    first = to_batch_ensemble(plain, M, average=None)
    for name in ("left", "right"):
        first.get_layer(name).get_layer("hidden").shared.trainable = False
    kernels = [w.numpy() for w in first.weights]
    second = to_batch_ensemble(plain, 2, average=None, share_with=first)
    for name in ("left", "right"):
        one, other = (m.get_layer(name).get_layer("hidden") for m in (first, second))
        assert one.shared is other.shared and not one.shared.trainable
        assert one.alpha is not other.alpha and other.trainable
    assert first.get_layer("shared").shared is second.get_layer("shared").shared
    for now, before in zip(first.weights, kernels, strict=True):
        np.testing.assert_array_equal(now.numpy(), before)
    x = normal(2, 4)
    for y, e in zip(second(x), plain(x), strict=True):
        np.testing.assert_allclose(value(y), np.tile(value(e), (2, 1)), rtol=1e-5)
    other = keras.Sequential([keras.Input((4,)), layers.Dense(2, name="other")])
    with pytest.raises(ValueError, match="without a layer 'other'"):
        to_batch_ensemble(other, 2, share_with=first)
    with pytest.raises(ValueError, match="Received: share_with=3"):
        to_batch_ensemble(other, 2, share_with=3)


@pytest.mark.parametrize("make", [images, words])
def test_frozen_kernels_stay_frozen(make, tmp_path):
    ensemble = to_batch_ensemble(make(), M, average=None)
    for layer in ensemble._flatten_layers():
        if hasattr(layer, "share_with"):
            layer.shared.trainable = False
    ensemble.save(tmp_path / "frozen.keras")
    names = [w.path.split("/")[-1] for w in ensemble.trainable_variables]
    assert "alpha" in names and "recurrent_kernel" not in names
    for again in (
        keras.saving.load_model(tmp_path / "frozen.keras"),
        keras.models.clone_model(ensemble),
    ):
        assert [w.path.split("/")[-1] for w in again.trainable_variables] == names


def test_a_compiled_model_is_converted_without_its_loss():
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    x = keras.Input((4,))
    model = keras.Model(x, plain(x))
    for one in (plain, model):
        one.compile("adam", loss=lambda y, p: keras.ops.sum(p - y))
    ensemble = to_batch_ensemble(model, M)
    member = from_batch_ensemble(ensemble, 0)
    assert model.compiled and plain.compiled
    assert not ensemble.compiled and not member.compiled


def test_layers_with_a_state_from_batch_to_batch_are_refused():
    x = keras.Input((3, 2), batch_size=4)
    plain = keras.Model(x, layers.Dense(2)(layers.GRU(3, stateful=True, name="s")(x)))
    with pytest.raises(ValueError, match="stateful.*Received: GRU 's'"):
        to_batch_ensemble(plain, 2)
    to_batch_ensemble(plain, 1)  # The same rows in training and outside.
    y = kzoo.layers.GRUBatchEnsemble(3, ensemble_size=2, stateful=True)(x)
    with pytest.raises(ValueError, match="stateful.*Received: GRUBatchEnsemble"):
        from_batch_ensemble(keras.Model(x, y), 0)


def test_members_that_would_be_left_are_refused():
    x = keras.Input((4,))
    inner = keras.Sequential([TileMembers(M), DenseBatchEnsemble(3, ensemble_size=M)])
    outer = keras.Model(x, AverageMembers(M)(inner(x)))
    with pytest.raises(ValueError, match="Received: TileMembers"):
        from_batch_ensemble(outer, 0)
    x = keras.Input((3, 4))
    y = DenseBatchEnsemble(3, ensemble_size=M)(TileMembers(M)(x))
    y = layers.RNN(kzoo.layers.GRUCellBatchEnsemble(2, ensemble_size=M))(y)
    with pytest.raises(ValueError, match="Received: GRUCellBatchEnsemble"):
        from_batch_ensemble(keras.Model(x, y), 0)


def test_a_bias_of_members_has_members():
    layer, x = kzoo.layers.BiasBatchEnsemble(M), normal(2 * M, 4)
    layer.build(x.shape)
    randomize(layer)
    rows = np.split(value(layer(x)), M)
    for m in range(M):
        found = value(layer.member(m)(np.split(x, M)[m]))
        np.testing.assert_array_equal(found, rows[m])


def test_each_output_has_its_average():
    assert len(to_batch_ensemble(towers(), M).outputs) == 2
    one = to_batch_ensemble(words(), M, average="outputs")
    assert one.output_names == ["average_first", "average_second"]


def test_ids_keep_their_digits_under_mixed_precision():
    ids = keras.Input((3,))  # Floats, as Keras's inputs are.
    plain = keras.Model(ids, layers.Embedding(5000, 2)(ids))
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        ensemble = to_batch_ensemble(plain, M, average="outputs")
    finally:
        keras.config.set_dtype_policy("float32")
    x = np.array([[4001.0, 4002.0, 257.0]])
    np.testing.assert_allclose(value(ensemble(x)), value(plain(x)), rtol=1e-6)


def test_refusals():
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    for arguments in ({"ensemble_size": 0}, {"rank": 1.5}, {"average": "mean"}):
        with pytest.raises(ValueError, match="Received: "):
            to_batch_ensemble(plain, **arguments)
    for model in (
        keras.Sequential([layers.Dense(2)]),  # Not built.
        keras.Sequential([keras.Input((4,)), layers.Dropout(0.5)]),
    ):
        with pytest.raises(ValueError, match="Received: "):
            to_batch_ensemble(model)
        with pytest.raises(ValueError, match="Received: "):
            from_batch_ensemble(model, 0)
    ensemble = to_batch_ensemble(plain, M)
    for member in (M, -1, 1.0):
        with pytest.raises(ValueError, match="Received: "):
            from_batch_ensemble(ensemble, member)


def test_augmentation_in_the_model_differs_from_member_to_member():
    # Of a batch that is tiled, each row is an image of one member, and layers of
    # augmentation draw for each row.
    shift = keras.layers.RandomTranslation(0.5, 0.5, fill_mode="constant", seed=1)
    image = keras.Input((6, 6, 1))
    shifted = shift(image)
    y = keras.layers.Dense(2)(keras.layers.Flatten()(shifted))
    model = to_batch_ensemble(keras.Model(image, y), ensemble_size=2)
    rows = keras.Model(model.input, model.get_layer(shift.name).output)
    x = np.random.default_rng(0).normal(size=(3, 6, 6, 1)).astype("float32")
    tiled = np.tile(x, (2, 1, 1, 1))
    of_first, of_second = np.split(np.asarray(rows(tiled, training=True)), 2)
    assert (of_first != of_second).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(rows(x, training=False), tiled)


def test_members_of_a_bidirectional_there_and_back():
    both = keras.layers.Bidirectional(
        keras.layers.GRU(3, return_sequences=True), name="both"
    )
    model = keras.Sequential([keras.Input((4, 2)), both, keras.layers.Dense(2)])
    signs = keras.initializers.RandomNormal(1.0, 0.5, seed=1)
    ensemble = to_batch_ensemble(model, 2, alpha_initializer=signs, average=None)
    x = np.random.default_rng(0).normal(size=(3, 4, 2)).astype("float32")
    rows = np.split(np.asarray(ensemble(x)), 2)
    for m in range(2):
        plain = from_batch_ensemble(ensemble, m)
        np.testing.assert_allclose(np.asarray(plain(x)), rows[m], atol=1e-5)
        layer = plain.get_layer("both")
        parts = (*layer.forward_layer.weights, *layer.backward_layer.weights)
        assert [id(v) for v in layer.weights] == [id(v) for v in parts]
    again = to_batch_ensemble(model, 2, average=None, share_with=ensemble)
    for part in ("forward_layer", "backward_layer"):
        one, other = (getattr(m.get_layer("both"), part) for m in (ensemble, again))
        assert one.cell.shared is other.cell.shared
    np.testing.assert_allclose(
        np.split(np.asarray(again(x)), 2)[1], np.asarray(model(x)), atol=1e-5
    )


def test_an_input_that_is_an_output_is_of_all_members():
    x = keras.Input((5,))
    model = keras.Model(x, [keras.layers.Dense(3)(x), x])
    batch = np.random.default_rng(0).normal(size=(3, 5)).astype("float32")
    for found, expected in zip(
        to_batch_ensemble(model, 2, average="outputs")(batch), model(batch), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_probabilities_are_no_logits_whatever_follows_or_holds_them():
    def ends_in(*last):
        return keras.Sequential([keras.Input((4, 5)), keras.layers.Flatten(), *last])

    softmax = keras.layers.Dense(3, "softmax")
    x, y = keras.Input((5,)), keras.Input((5,))
    h = keras.layers.Dense(4)(x)
    two = keras.Model(x, [keras.layers.Dense(3)(h), keras.layers.Softmax()(h)])
    for model in (
        ends_in(softmax, keras.layers.Activation("linear")),
        ends_in(softmax, keras.layers.Dropout(0.5), keras.layers.Reshape((3, 1))),
        ends_in(keras.layers.Dense(3), keras.layers.Activation("softmax")),
        keras.Model(y, two(y)[1]),
    ):
        with pytest.raises(ValueError, match="does not end in logits"):
            to_batch_ensemble(model, 2)
    to_batch_ensemble(keras.Model(y, two(y)[0]), 2)


def test_quantized_layers_and_those_with_low_rank_updates_are_refused():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    model.layers[0].enable_lora(2)
    with pytest.raises(ValueError, match="Received: Dense .* with low-rank updates"):
        to_batch_ensemble(model, 2)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    model.quantize("int8")
    with pytest.raises(ValueError, match="Received: Dense .* with int8"):
        to_batch_ensemble(model, 2)
