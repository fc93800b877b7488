import inspect

import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from harness.backends import gradients
from kzoo.layers import DenseBatchEnsemble

M, B, IN, UNITS = 3, 2, 5, 4
FAST = ("alpha", "gamma", "bias")
rng = np.random.default_rng(0)

# edward2 0.1, edward2/tensorflow/layers/dense.py
EDWARD2 = {
    "units": inspect.Parameter.empty,
    "rank": 1,
    "ensemble_size": 4,
    "activation": None,
    "use_bias": True,
    "alpha_initializer": "ones",
    "gamma_initializer": "ones",
    "kernel_initializer": "glorot_uniform",
    "bias_initializer": "zeros",
    "kernel_regularizer": None,
    "bias_regularizer": None,
    "activity_regularizer": None,
    "kernel_constraint": None,
    "bias_constraint": None,
}


def normal(*shape):
    return rng.normal(size=shape).astype("float32")


def values(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def make(input_dim=IN, **kwargs):
    """A built layer with random weights."""
    layer = DenseBatchEnsemble(UNITS, **{"ensemble_size": M, **kwargs})
    layer.build((None, input_dim))
    layer.set_weights([normal(*weight.shape) for weight in layer.weights])
    return layer


def explicit(layer, x):
    """Each member's own dense layer on its own rows, in float64."""
    alpha, gamma = (
        values(weight.value).reshape(layer.rank, layer.ensemble_size, -1)
        for weight in (layer.alpha, layer.gamma)
    )
    outputs = []
    for m, rows in enumerate(np.split(x.astype("float64"), layer.ensemble_size)):
        fast = sum(np.outer(alpha[k, m], gamma[k, m]) for k in range(layer.rank))
        y = rows @ (values(layer.kernel.value) * fast)
        outputs.append(y if layer.bias is None else y + values(layer.bias.value)[m])
    return np.concatenate(outputs)


def test_contract():
    check_layer(
        DenseBatchEnsemble,
        {
            "units": 4,
            "rank": 2,
            "ensemble_size": 3,
            "activation": "tanh",
            "alpha_initializer": {
                "class_name": "kzoo>RandomSign",
                "config": {"probs": 0.7, "seed": 1},
            },
            "gamma_initializer": keras.initializers.RandomNormal(1.0, 0.5, seed=2),
            "kernel_initializer": "he_normal",
            "bias_initializer": "ones",
            "kernel_regularizer": "l2",
            "bias_regularizer": "l1",
            "kernel_constraint": "max_norm",
            "bias_constraint": "non_neg",
        },
        (6, 5),
    )
    check_layer(
        DenseBatchEnsemble,
        {"units": 2, "ensemble_size": 2, "use_bias": False},
        (4, 3, 5),
    )


def test_arguments_are_edward2s():
    parameters = inspect.signature(DenseBatchEnsemble).parameters
    found = {name: parameter.default for name, parameter in parameters.items()}
    assert found.pop("kwargs") is inspect.Parameter.empty
    assert list(found.items()) == list(EDWARD2.items())


@pytest.mark.parametrize("shape", ((M * B, IN), (M, IN), (M * B, 7, IN), (M, 2, 3, IN)))
@pytest.mark.parametrize("rank", (1, 2))
def test_equals_explicit_kernels(rank, shape):
    x = normal(*shape)
    layer = make(rank=rank)
    np.testing.assert_allclose(
        values(layer(x)), explicit(layer, x), rtol=1e-4, atol=1e-5
    )
    layer = make(rank=rank, use_bias=False)
    np.testing.assert_allclose(
        values(layer(x)), explicit(layer, x), rtol=1e-4, atol=1e-5
    )
    layer = make(rank=rank, activation="tanh")
    expected = np.tanh(explicit(layer, x))
    np.testing.assert_allclose(values(layer(x)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.tensorflow
def test_equals_explicit_kernels_in_float64():
    x = rng.normal(size=(M * B, IN))
    layer = make(rank=2, dtype="float64")
    np.testing.assert_allclose(values(layer(x)), explicit(layer, x), rtol=1e-12)


def test_ones_are_the_plain_layer():
    x = normal(M * B, IN)
    plain = keras.layers.Dense(UNITS, activation="relu", bias_initializer="normal")
    expected = values(plain(x))
    layer = DenseBatchEnsemble(UNITS, ensemble_size=M, activation="relu")
    layer.build(x.shape)
    layer.kernel.assign(plain.kernel)
    layer.bias.assign(np.tile(values(plain.bias.value), (M, 1)))
    np.testing.assert_allclose(values(layer(x)), expected, rtol=1e-5, atol=1e-6)


def test_one_member():
    x = normal(7, IN)
    layer = make(ensemble_size=1)
    np.testing.assert_allclose(
        values(layer(x)), explicit(layer, x), rtol=1e-4, atol=1e-5
    )


def test_rank_one_is_rank_k_with_zeros():
    x = normal(M * B, IN)
    one, three = make(rank=1), make(rank=3)
    three.kernel.assign(one.kernel)
    three.bias.assign(one.bias)
    three.gamma.assign(
        np.concatenate([values(one.gamma.value)[None], normal(2, M, UNITS)])
    )
    three.alpha.assign(np.stack([values(one.alpha.value), *np.zeros((2, M, IN))]))
    np.testing.assert_allclose(values(three(x)), values(one(x)), rtol=1e-4, atol=1e-5)


def test_members_are_isolated():
    layer, x = make(rank=2), normal(M * B, IN)
    before = values(layer(x)).reshape(M, B, UNITS)
    for m in range(M):
        other = x.copy()
        other[m * B : (m + 1) * B] += 1
        changed = values(layer(other)).reshape(M, B, UNITS) != before
        np.testing.assert_array_equal(changed.any((1, 2)), np.arange(M) == m)
        for name in FAST:
            weight = getattr(layer, name)
            old = values(weight.value)
            new = np.moveaxis(old.copy(), -2, 0)
            new[m] += 1
            weight.assign(np.moveaxis(new, 0, -2))
            changed = values(layer(x)).reshape(M, B, UNITS) != before
            np.testing.assert_array_equal(changed.any((1, 2)), np.arange(M) == m)
            weight.assign(old)


def test_gradients_are_isolated():
    layer, x = make(rank=2), normal(M * B, IN)
    for m in range(M):

        def loss(x, *weights, m=m):
            outputs, _ = layer.stateless_call(weights, [], x)
            return ops.sum(ops.square(outputs[m * B : (m + 1) * B]))

        weights = [values(v.value).astype("float32") for v in layer.trainable_variables]
        dx, *found = gradients(loss, x, *weights)
        own = np.arange(M) == m
        np.testing.assert_array_equal((dx != 0).reshape(M, -1).any(1), own)
        for variable, gradient in zip(layer.trainable_variables, found, strict=True):
            if variable.name in FAST:
                moved = np.moveaxis(gradient != 0, -2, 0).reshape(M, -1)
                np.testing.assert_array_equal(moved.all(1), own)
                np.testing.assert_array_equal(moved.any(1), own)
            else:  # the shared kernel learns from every member
                assert (gradient != 0).all()


@pytest.mark.parametrize("ensemble_size", (1, 4))
def test_parameter_count(ensemble_size):
    layer = make(ensemble_size=ensemble_size)
    base = IN * UNITS + UNITS
    expected = base + ensemble_size * (IN + 2 * UNITS) - UNITS
    assert layer.count_params() == expected
    layer = make(ensemble_size=ensemble_size, rank=3, use_bias=False)
    assert layer.count_params() == IN * UNITS + 3 * ensemble_size * (IN + UNITS)


def test_weights_and_their_initial_values():
    layer = DenseBatchEnsemble(UNITS, ensemble_size=M)
    layer.build((None, IN))
    shapes = {weight.name: tuple(weight.shape) for weight in layer.weights}
    assert shapes == {
        "alpha": (M, IN),
        "gamma": (M, UNITS),
        "bias": (M, UNITS),
        "kernel": (IN, UNITS),
    }
    np.testing.assert_array_equal(values(layer.alpha.value), 1)
    np.testing.assert_array_equal(values(layer.gamma.value), 1)
    np.testing.assert_array_equal(values(layer.bias.value), 0)
    kernel = values(layer.kernel.value)
    assert 0 < np.abs(kernel).max() <= np.sqrt(6 / (IN + UNITS))
    layer = DenseBatchEnsemble(UNITS, rank=2, ensemble_size=M, use_bias=False)
    layer.build((None, IN))
    shapes = {weight.name: tuple(weight.shape) for weight in layer.weights}
    assert shapes == {
        "alpha": (2, M, IN),
        "gamma": (2, M, UNITS),
        "kernel": (IN, UNITS),
    }


def test_each_initializer_makes_its_own_weight():
    constants = {"alpha": 2.0, "gamma": 3.0, "kernel": 4.0, "bias": 5.0}
    layer = DenseBatchEnsemble(
        UNITS,
        **{
            f"{name}_initializer": keras.initializers.Constant(value)
            for name, value in constants.items()
        },
    )
    layer.build((None, IN))
    for name, value in constants.items():
        np.testing.assert_array_equal(values(getattr(layer, name).value), value)


def test_regularizers_and_constraints():
    def l2(scale):
        return keras.regularizers.L2(scale)

    layer = DenseBatchEnsemble(
        UNITS,
        ensemble_size=M,
        kernel_regularizer=l2(1.0),
        bias_regularizer=l2(10.0),
        activity_regularizer=l2(100.0),
        activation="tanh",
        kernel_constraint="non_neg",
        bias_constraint="unit_norm",
    )
    layer.build((None, IN))
    layer.set_weights([normal(*weight.shape) for weight in layer.weights])
    output = values(layer(normal(M * B, IN)))
    expected = [
        np.sum(values(layer.kernel.value) ** 2),
        10 * np.sum(values(layer.bias.value) ** 2),
        100 * np.sum(output**2) / (M * B),  # Keras's mean over the batch
    ]
    losses = sorted(float(loss) for loss in layer.losses)
    np.testing.assert_allclose(losses, sorted(expected), rtol=1e-5)
    assert isinstance(layer.kernel.constraint, keras.constraints.NonNeg)
    assert isinstance(layer.bias.constraint, keras.constraints.UnitNorm)
    assert layer.alpha.constraint is None and layer.gamma.constraint is None
    assert layer.alpha.regularizer is None and layer.gamma.regularizer is None


def test_config_holds_every_argument():
    given = {
        "units": 7,
        "rank": 2,
        "ensemble_size": 3,
        "activation": "tanh",
        "use_bias": False,
        "alpha_initializer": keras.initializers.RandomNormal(1.0, 0.5, seed=1),
        "gamma_initializer": keras.initializers.RandomNormal(1.0, 0.5, seed=2),
        "kernel_initializer": keras.initializers.HeNormal(seed=3),
        "bias_initializer": keras.initializers.Constant(2.0),
        "kernel_regularizer": keras.regularizers.L1(0.1),
        "bias_regularizer": keras.regularizers.L2(0.2),
        "activity_regularizer": keras.regularizers.L1L2(0.3, 0.4),
        "kernel_constraint": keras.constraints.MaxNorm(3.0),
        "bias_constraint": keras.constraints.NonNeg(),
    }
    assert set(given) == set(EDWARD2)
    config = DenseBatchEnsemble(**given).get_config()
    assert DenseBatchEnsemble.from_config(config).get_config() == config
    for name, value in given.items():
        if hasattr(value, "get_config"):
            assert config[name]["class_name"] == type(value).__name__
            assert config[name]["config"] == value.get_config()
        else:
            assert config[name] == value


def test_mask_passes_through():
    class Seen(keras.layers.Layer):
        supports_masking = True

        def call(self, x, mask=None):
            self.mask = mask
            return x

    mask = np.array([[True, True, False], [True, False, False], [True, True, True]])
    seen = Seen()
    x = normal(M, 3, IN) * mask[..., None]
    seen(make()(keras.layers.Masking()(x)))
    np.testing.assert_array_equal(ops.convert_to_numpy(seen.mask), mask)


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_mixed_precision(dtype):
    layer, x = make(rank=2, dtype=f"mixed_{dtype}"), normal(M * B, IN)
    for weight in layer.weights:
        assert weight.dtype == "float32"
    output = layer(x)
    assert keras.backend.standardize_dtype(output.dtype) == dtype
    expected = explicit(layer, x)
    error = {"float16": 2e-2, "bfloat16": 1e-1}[dtype]
    np.testing.assert_allclose(
        values(output), expected, atol=error * abs(expected).max()
    )


def test_shared_kernel_can_be_frozen_by_itself():
    """Lifelong learning: later tasks train the fast weights only."""
    layer = make()
    layer.shared.trainable = False
    assert {weight.name for weight in layer.trainable_weights} == set(FAST)
    model = keras.Sequential([keras.Input((IN,)), layer])
    model.compile("sgd", "mse")
    before = {weight.name: values(weight.value) for weight in layer.weights}
    model.fit(normal(M * B, IN), normal(M * B, UNITS), batch_size=M * B, verbose=0)
    for weight in layer.weights:
        changed = (values(weight.value) != before[weight.name]).any()
        assert changed == (weight.name in FAST)


def test_shared_kernel_takes_lora():
    layer, x = make(), normal(M * B, IN)
    expected = values(layer(x))
    layer.shared.enable_lora(2)
    np.testing.assert_allclose(values(layer(x)), expected, rtol=1e-5, atol=1e-5)
    layer.shared.lora_kernel_b.assign(normal(2, UNITS))
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer(x)),
        explicit_of_kernel(layer, x),
        rtol=1e-4,
        atol=1e-4,
    )


def explicit_of_kernel(layer, x):
    kernel = values(layer.kernel)
    plain = make()
    for name in FAST:
        getattr(plain, name).assign(getattr(layer, name))
    plain.kernel.assign(kernel)
    return explicit(plain, x)


def test_shared_kernel_can_be_quantized():
    layer = make(input_dim=64)
    model = keras.Sequential([keras.Input((64,)), layer])
    x = normal(M * 20, 64)
    expected = values(model(x))
    model.quantize("int8")
    assert keras.backend.standardize_dtype(layer.shared.kernel.dtype) == "int8"
    error = values(model(x)) - expected
    assert 0 < error.std() < 0.03 * expected.std()


@pytest.mark.parametrize("shape", ((7, IN), (1, IN), (M + 1, 3, IN)))
def test_rows_that_do_not_split(shape):
    message = f"ensemble_size={M}. Received: a batch of {shape[0]} rows"
    with pytest.raises(ValueError, match=message):
        make()(np.zeros(shape))
    with pytest.raises(ValueError, match=message):
        make()(keras.Input(shape[1:], batch_size=shape[0]))


@pytest.mark.tensorflow
def test_rows_that_do_not_split_in_predict():
    import tensorflow as tf

    model = keras.Sequential([keras.Input((IN,)), make()])
    # Two batch sizes make TensorFlow trace one function for all.
    for rows in (M, 2 * M):
        model.predict(np.zeros((rows, IN)), verbose=0)
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"ensemble_size={M}"):
        model.predict(np.zeros((7, IN)), verbose=0)


@pytest.mark.parametrize("name", ("units", "rank", "ensemble_size"))
@pytest.mark.parametrize("value", (0, -1, 1.5, "2", True))
def test_bad_sizes(name, value):
    with pytest.raises(ValueError, match=f"Received: {name}="):
        DenseBatchEnsemble(**{"units": 3, name: value})


def test_bad_inputs():
    with pytest.raises(ValueError, match="ndim"):
        DenseBatchEnsemble(3)(np.zeros((8,)))
    layer = make()
    with pytest.raises(ValueError, match="axis -1"):
        layer(np.zeros((M, IN + 1)))
    with pytest.raises(ValueError, match="Unrecognized keyword"):
        DenseBatchEnsemble(3, lora_rank=2)


@pytest.mark.parametrize("dtype", ("int32", "uint8"))
def test_integers_are_taken_as_floats(dtype):
    layer = DenseBatchEnsemble(3, ensemble_size=2)
    x = np.arange(np.prod((4, 5))).reshape((4, 5)).astype(dtype)
    output = layer(x)
    assert keras.backend.standardize_dtype(output.dtype) == "float32"
    expected = keras.ops.convert_to_numpy(layer(x.astype("float32")))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(output), expected)
