import inspect

import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from harness.backends import gradients
from kzoo.layers import Conv2DBatchEnsemble

M, B, IN, FILTERS = 3, 2, 4, 6
FAST = ("alpha", "gamma", "bias")
rng = np.random.default_rng(0)

# edward2 0.1, edward2/tensorflow/layers/convolutional.py; there the last two are
# keyword arguments of the Keras layer, and what is 1 here is (1, 1), which is the same.
EDWARD2 = {
    "filters": inspect.Parameter.empty,
    "kernel_size": inspect.Parameter.empty,
    "rank": 1,
    "ensemble_size": 4,
    "alpha_initializer": "ones",
    "gamma_initializer": "ones",
    "strides": 1,
    "padding": "valid",
    "data_format": None,
    "activation": None,
    "use_bias": True,
    "kernel_initializer": "glorot_uniform",
    "bias_initializer": "zeros",
    "kernel_regularizer": None,
    "bias_regularizer": None,
    "activity_regularizer": None,
    "kernel_constraint": None,
    "bias_constraint": None,
    "dilation_rate": 1,
    "groups": 1,
}
GEOMETRIES = (
    {},
    {"padding": "same"},
    {"padding": "same", "strides": 2},
    {"padding": "valid", "strides": (2, 3)},
    {"padding": "same", "dilation_rate": (2, 1)},
    {"padding": "valid", "dilation_rate": 2},
    {"padding": "same", "groups": 2},
    {"kernel_size": 1},
    {"kernel_size": (2, 4), "padding": "same", "strides": 2, "groups": 2},
)


def normal(*shape):
    return rng.normal(size=shape).astype("float32")


def values(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def make(**kwargs):
    """A built layer with random weights."""
    layer = Conv2DBatchEnsemble(
        FILTERS, **{"kernel_size": (3, 2), "ensemble_size": M, **kwargs}
    )
    first = layer.shared.data_format == "channels_first"
    layer.build((None, IN, 9, 8) if first else (None, 9, 8, IN))
    layer.set_weights([normal(*weight.shape) for weight in layer.weights])
    return layer


def convolve(x, kernel, strides, padding, dilation_rate, groups):
    """Convolution of `[rows, height, width, in]` by its definition, in NumPy."""
    pads, sizes = [], []
    for size, window, stride, spacing in zip(
        x.shape[1:3], kernel.shape[:2], strides, dilation_rate, strict=True
    ):
        extent = (window - 1) * spacing + 1
        if padding == "same":
            sizes.append(-(-size // stride))
            pad = max((sizes[-1] - 1) * stride + extent - size, 0)
        else:
            sizes.append((size - extent) // stride + 1)
            pad = 0
        pads.append((pad // 2, pad - pad // 2))
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    inputs, outputs = kernel.shape[2], kernel.shape[3] // groups
    y = np.zeros((len(x), *sizes, kernel.shape[3]))
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            for (di, dj), _ in np.ndenumerate(kernel[:, :, 0, 0]):
                pixel = x[
                    :,
                    i * strides[0] + di * dilation_rate[0],
                    j * strides[1] + dj * dilation_rate[1],
                ]
                for g in range(groups):
                    out = slice(g * outputs, (g + 1) * outputs)
                    inside = pixel[:, g * inputs : (g + 1) * inputs]
                    y[:, i, j, out] += inside @ kernel[di, dj, :, out]
    return y


def explicit(layer, x):
    """Each member's own convolution of its own rows, in float64, channels last."""
    shared = layer.shared
    alpha, gamma = (
        values(weight.value).reshape(layer.rank, layer.ensemble_size, -1)
        for weight in (layer.alpha, layer.gamma)
    )
    kernel, groups = values(layer.kernel.value), shared.groups
    outputs = []
    for m, rows in enumerate(np.split(x.astype("float64"), layer.ensemble_size)):
        fast = 0
        for k in range(layer.rank):
            # Of the kernel's input axis, group g reads the channels of group g.
            r = np.repeat(alpha[k, m].reshape(groups, -1), FILTERS // groups, axis=0)
            fast = fast + r.T * gamma[k, m]
        y = convolve(
            rows,
            kernel * fast,
            shared.strides,
            shared.padding,
            shared.dilation_rate,
            groups,
        )
        outputs.append(y if layer.bias is None else y + values(layer.bias.value)[m])
    return np.concatenate(outputs)


@pytest.mark.slow
def test_contract():
    check_layer(
        Conv2DBatchEnsemble,
        {
            "filters": 4,
            "kernel_size": (3, 2),
            "rank": 2,
            "ensemble_size": 3,
            "alpha_initializer": {
                "class_name": "kzoo>RandomSign",
                "config": {"probs": 0.7, "seed": 1},
            },
            "gamma_initializer": keras.initializers.RandomNormal(1.0, 0.5, seed=2),
            "strides": (2, 1),
            "padding": "same",
            "activation": "tanh",
            "kernel_initializer": "he_normal",
            "bias_initializer": "ones",
            "kernel_regularizer": "l2",
            "bias_regularizer": "l1",
            "kernel_constraint": "max_norm",
            "bias_constraint": "non_neg",
        },
        (6, 5, 4, 2),
    )


def test_arguments_are_edward2s():
    parameters = inspect.signature(Conv2DBatchEnsemble).parameters
    found = {name: parameter.default for name, parameter in parameters.items()}
    assert found.pop("kwargs") is inspect.Parameter.empty
    assert list(found.items()) == list(EDWARD2.items())
    config = Conv2DBatchEnsemble(8, 3).get_config()
    assert config["strides"] == config["dilation_rate"] == (1, 1)


@pytest.mark.parametrize("rank", (1, 2))
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_equals_explicit_kernels(geometry, rank):
    layer, x = make(rank=rank, **geometry), normal(M * B, 9, 8, IN)
    output = layer(x)
    assert tuple(output.shape) == layer.compute_output_shape(x.shape)
    np.testing.assert_allclose(values(output), explicit(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", (1, 2))
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_channels_first_equals_channels_last(geometry, rank):
    last = make(rank=rank, activation="tanh", **geometry)
    first = make(rank=rank, activation="tanh", data_format="channels_first", **geometry)
    first.set_weights(last.get_weights())
    x = normal(M * B, 9, 8, IN)
    output = first(x.transpose(0, 3, 1, 2))
    assert tuple(output.shape) == first.compute_output_shape((M * B, IN, 9, 8))
    np.testing.assert_allclose(
        values(output).transpose(0, 2, 3, 1), values(last(x)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.tensorflow
def test_equals_explicit_kernels_in_float64():
    x = rng.normal(size=(M * B, 9, 8, IN))
    layer = make(rank=2, padding="same", dtype="float64")
    np.testing.assert_allclose(values(layer(x)), explicit(layer, x), rtol=1e-10)


def test_without_bias_and_with_activation():
    x = normal(M, 9, 8, IN)  # one image for each member
    layer = make(use_bias=False, activation="relu")
    expected = np.maximum(explicit(layer, x), 0)
    np.testing.assert_allclose(values(layer(x)), expected, rtol=1e-4, atol=1e-4)


def test_ones_are_the_plain_layer():
    x = normal(M * B, 9, 8, IN)
    arguments = {"padding": "same", "strides": 2, "groups": 2, "activation": "relu"}
    plain = keras.layers.Conv2D(FILTERS, 3, bias_initializer="normal", **arguments)
    expected = values(plain(x))
    layer = Conv2DBatchEnsemble(FILTERS, 3, ensemble_size=M, **arguments)
    layer.build(x.shape)
    layer.kernel.assign(plain.kernel)
    layer.bias.assign(np.tile(values(plain.bias.value), (M, 1)))
    np.testing.assert_allclose(values(layer(x)), expected, rtol=1e-5, atol=1e-5)


def test_one_member():
    x = normal(5, 9, 8, IN)
    layer = make(ensemble_size=1)
    np.testing.assert_allclose(
        values(layer(x)), explicit(layer, x), rtol=1e-4, atol=1e-4
    )


def test_rank_one_is_rank_k_with_zeros():
    x = normal(M * B, 9, 8, IN)
    one, three = make(rank=1), make(rank=3)
    three.kernel.assign(one.kernel)
    three.bias.assign(one.bias)
    three.gamma.assign(
        np.concatenate([values(one.gamma.value)[None], normal(2, M, FILTERS)])
    )
    three.alpha.assign(np.stack([values(one.alpha.value), *np.zeros((2, M, IN))]))
    np.testing.assert_allclose(values(three(x)), values(one(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("data_format", ("channels_last", "channels_first"))
def test_members_are_isolated(data_format):
    layer = make(rank=2, data_format=data_format)
    x = normal(M * B, *((9, 8, IN) if data_format == "channels_last" else (IN, 9, 8)))
    before = values(layer(x)).reshape(M, -1)
    for m in range(M):
        own = np.arange(M) == m
        other = x.copy()
        other[m * B : (m + 1) * B] += 1
        changed = values(layer(other)).reshape(M, -1) != before
        np.testing.assert_array_equal(changed.any(1), own)
        for name in FAST:
            weight = getattr(layer, name)
            old = values(weight.value)
            new = np.moveaxis(old.copy(), -2, 0)
            new[m] += 1
            weight.assign(np.moveaxis(new, 0, -2))
            changed = values(layer(x)).reshape(M, -1) != before
            np.testing.assert_array_equal(changed.any(1), own)
            weight.assign(old)


def test_gradients_are_isolated():
    layer, x = make(rank=2), normal(M * B, 9, 8, IN)
    weights = [values(v.value).astype("float32") for v in layer.trainable_variables]
    for m in range(M):

        def loss(x, *weights, m=m):
            outputs, _ = layer.stateless_call(weights, [], x)
            return ops.sum(ops.square(outputs[m * B : (m + 1) * B]))

        dx, *found = gradients(loss, x, *weights)
        own = np.arange(M) == m
        np.testing.assert_array_equal((dx != 0).reshape(M, -1).any(1), own)
        for variable, gradient in zip(layer.trainable_variables, found, strict=True):
            if variable.name in FAST:
                moved = np.moveaxis(gradient != 0, -2, 0).reshape(M, -1)
                np.testing.assert_array_equal(moved.all(1), own)
                np.testing.assert_array_equal(moved.any(1), own)
            else:
                assert (gradient != 0).all()


@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("ensemble_size", (1, 4))
def test_parameter_count(ensemble_size, groups):
    layer = make(ensemble_size=ensemble_size, groups=groups)
    plain = keras.layers.Conv2D(FILTERS, (3, 2), groups=groups)
    plain.build((None, 9, 8, IN))
    expected = plain.count_params() + ensemble_size * (IN + 2 * FILTERS) - FILTERS
    assert layer.count_params() == expected


def test_weights_and_their_initial_values():
    layer = Conv2DBatchEnsemble(FILTERS, 3, rank=2, ensemble_size=M, groups=2)
    layer.build((None, 9, 8, IN))
    shapes = {weight.name: tuple(weight.shape) for weight in layer.weights}
    assert shapes == {
        "alpha": (2, M, IN),
        "gamma": (2, M, FILTERS),
        "bias": (M, FILTERS),
        "kernel": (3, 3, IN // 2, FILTERS),
    }
    np.testing.assert_array_equal(values(layer.alpha.value), 1)
    np.testing.assert_array_equal(values(layer.gamma.value), 1)
    np.testing.assert_array_equal(values(layer.bias.value), 0)
    constants = {"alpha": 2.0, "gamma": 3.0, "kernel": 4.0, "bias": 5.0}
    initializers = {
        f"{name}_initializer": keras.initializers.Constant(value)
        for name, value in constants.items()
    }
    layer = Conv2DBatchEnsemble(FILTERS, 3, **initializers)
    layer.build((None, 9, 8, IN))
    for name, value in constants.items():
        np.testing.assert_array_equal(values(getattr(layer, name).value), value)


def test_config_holds_every_argument():
    given = {
        "filters": 8,
        "kernel_size": (3, 2),
        "rank": 2,
        "ensemble_size": 3,
        "alpha_initializer": keras.initializers.RandomNormal(1.0, 0.5, seed=1),
        "gamma_initializer": keras.initializers.RandomNormal(1.0, 0.5, seed=2),
        "strides": (1, 1),
        "padding": "same",
        "data_format": "channels_first",
        "activation": "tanh",
        "use_bias": False,
        "kernel_initializer": keras.initializers.HeNormal(seed=3),
        "bias_initializer": keras.initializers.Constant(2.0),
        "kernel_regularizer": keras.regularizers.L1(0.1),
        "bias_regularizer": keras.regularizers.L2(0.2),
        "activity_regularizer": keras.regularizers.L1L2(0.3, 0.4),
        "kernel_constraint": keras.constraints.MaxNorm(3.0),
        "bias_constraint": keras.constraints.NonNeg(),
        "dilation_rate": (2, 3),
        "groups": 2,
    }
    assert set(given) == set(EDWARD2)
    config = Conv2DBatchEnsemble(**given).get_config()
    assert Conv2DBatchEnsemble.from_config(config).get_config() == config
    for name, value in given.items():
        if hasattr(value, "get_config"):
            assert config[name]["class_name"] == type(value).__name__
            assert config[name]["config"] == value.get_config()
        else:
            assert config[name] == value
    strided = Conv2DBatchEnsemble(8, 3, strides=(2, 3))
    assert strided.get_config()["strides"] == (2, 3)


def test_regularizers():
    layer = make(
        kernel_regularizer=keras.regularizers.L2(1.0),
        bias_regularizer=keras.regularizers.L2(10.0),
        activity_regularizer=keras.regularizers.L2(100.0),
    )
    output = values(layer(normal(M * B, 9, 8, IN)))
    expected = [
        np.sum(values(layer.kernel.value) ** 2),
        10 * np.sum(values(layer.bias.value) ** 2),
        100 * np.sum(output**2) / (M * B),
    ]
    losses = sorted(float(loss) for loss in layer.losses)
    np.testing.assert_allclose(losses, sorted(expected), rtol=1e-5)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_mixed_precision(dtype):
    layer, x = make(rank=2, dtype=f"mixed_{dtype}"), normal(M * B, 9, 8, IN)
    for weight in layer.weights:
        assert weight.dtype == "float32"
    output = layer(x)
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    expected = explicit(layer, x)
    error = {"float16": 1e-2, "bfloat16": 8e-2}[dtype]
    np.testing.assert_allclose(
        values(output), expected, atol=error * abs(expected).max()
    )


def test_images_of_unknown_size():
    inputs = keras.Input((None, None, IN))
    layer = make(padding="same", strides=2)
    outputs = layer(inputs)
    assert outputs.shape == (None, None, None, FILTERS)
    model = keras.Model(inputs, outputs)
    for size in ((9, 8), (4, 7)):
        x = normal(M * B, *size, IN)
        output = model.predict(x, verbose=0)
        np.testing.assert_allclose(output, explicit(layer, x), rtol=1e-4, atol=1e-4)


def test_rows_that_do_not_split():
    message = f"ensemble_size={M}. Received: a batch of 7 rows"
    with pytest.raises(ValueError, match=message):
        make()(np.zeros((7, 9, 8, IN)))
    with pytest.raises(ValueError, match=message):
        make()(keras.Input((9, 8, IN), batch_size=7))


@pytest.mark.tensorflow
@pytest.mark.parametrize("jit", (True, False))
def test_rows_that_do_not_split_in_predict(jit):
    import tensorflow as tf

    model = keras.Sequential([keras.Input((9, 9, IN)), make()])
    model.compile(jit_compile=jit)
    # Two batch sizes make TensorFlow trace one function for all.
    for rows in (3, 6):
        model.predict(np.zeros((rows, 9, 9, IN)), verbose=0)
    # 9 x 9 positions are divisible by 3; 7 rows are not.
    with pytest.raises(tf.errors.InvalidArgumentError):
        model.predict(np.zeros((7, 9, 9, IN)), verbose=0)


@pytest.mark.parametrize("name", ("filters", "rank", "ensemble_size"))
@pytest.mark.parametrize("value", (0, -1, 1.5, "2", True))
def test_bad_sizes(name, value):
    with pytest.raises(ValueError, match=f"Received: {name}="):
        Conv2DBatchEnsemble(**{"filters": 3, "kernel_size": 3, name: value})


@pytest.mark.parametrize(
    "bad",
    (
        {"filters": 0},
        {"groups": 4},
        {"strides": 2, "dilation_rate": 2},
        {"padding": "causal"},
        {"data_format": "channels"},
    ),
    ids=str,
)
def test_what_conv2d_refuses(bad):
    with pytest.raises(ValueError):
        Conv2DBatchEnsemble(**{"filters": 6, "kernel_size": 3, **bad})


def test_bad_inputs():
    with pytest.raises(ValueError, match="ndim"):
        make()(np.zeros((M, 9, IN)))
    with pytest.raises(ValueError, match="axis -1"):
        make()(np.zeros((M, 9, 8, IN + 1)))


@pytest.mark.parametrize("dtype", ("int32", "uint8"))
def test_integers_are_taken_as_floats(dtype):
    layer = Conv2DBatchEnsemble(3, 2, ensemble_size=2)
    x = np.arange(np.prod((4, 5, 5, 2))).reshape((4, 5, 5, 2)).astype(dtype)
    output = layer(x)
    assert keras.backend.standardize_dtype(output.dtype) == "float32"
    expected = keras.ops.convert_to_numpy(layer(x.astype("float32")))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(output), expected)
