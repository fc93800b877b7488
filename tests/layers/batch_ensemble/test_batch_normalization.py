import keras
import numpy as np
import pytest
from keras import ops

from harness import check_layer
from harness.members import (
    DTYPE,
    TOL,
    M,
    check_equal,
    check_isolated,
    each_on_its_own,
    normal,
    randomized,
    values,
)
from kzoo.layers import BatchNormalizationBatchEnsemble

SHAPE = (3 * M, 4, 5)
ARGUMENTS = (
    {},
    {"axis": 1, "epsilon": 0.1, "center": False},
    {"axis": 2, "momentum": 0.7, "scale": False},
)


def make(shape=SHAPE, **kwargs):
    """A built layer with random weights."""
    layer = BatchNormalizationBatchEnsemble(M, **{"dtype": DTYPE, **kwargs})
    randomized(layer, shape)
    layer.moving_variance.assign(values(layer.moving_variance) ** 2)
    return layer


def plain(**kwargs):
    layer = keras.layers.BatchNormalization(**{"dtype": DTYPE, **kwargs})
    layer.build(SHAPE)
    return layer


def plain_copies(layer, **kwargs):
    """A plain layer for each member, with its weights."""
    copies = []
    for m in range(M):
        copies.append(plain(**kwargs))
        copies[m].set_weights([values(w)[m] for w in layer.weights])
    return copies


def masks(shape=SHAPE):
    """Half of the positions; of the last member none."""
    mask = np.random.default_rng(5).integers(0, 2, shape[:-1]).astype(bool)
    mask[-3:] = False
    return mask


@pytest.mark.slow
def test_contract():
    check_layer(
        BatchNormalizationBatchEnsemble,
        {
            "ensemble_size": 2,
            "momentum": 0.8,
            "epsilon": 1e-2,
            "gamma_initializer": keras.initializers.RandomNormal(1.0, 0.5, seed=1),
            "beta_initializer": keras.initializers.RandomNormal(seed=2),
            "gamma_regularizer": "l2",
        },
        (6, 2, 3),
    )


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_equals_a_plain_layer_for_each_member(arguments, training):
    layer, simple = make(**arguments), plain(**arguments)
    assert layer.count_params() == M * simple.count_params()
    expected = each_on_its_own(layer, simple, training=training)
    check_equal(layer, expected, normal(*SHAPE), training=training)


@pytest.mark.parametrize("arguments", ARGUMENTS[:2], ids=str)
def test_equals_plain_layers_with_a_mask(arguments):
    layer, mask = make(**arguments), masks()
    expected = each_on_its_own(layer, plain(**arguments), mask=mask, training=True)
    check_equal(layer, expected, normal(*SHAPE), mask=mask, training=True)
    # As in Keras, whatever is not 0 counts once.
    numbers = 2 * mask.astype("int32")
    check_equal(layer, expected, normal(*SHAPE), mask=numbers, training=True)


@pytest.mark.parametrize("mask", (None, masks()), ids=("all", "mask"))
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_moving_statistics_are_those_of_plain_layers(arguments, mask):
    layer = make(**arguments)
    copies = plain_copies(layer, **arguments)
    for step in range(2):
        x = normal(*SHAPE, seed=step)
        layer(x, training=True, mask=mask)
        for m, copy in enumerate(copies):
            part = slice(3 * m, 3 * m + 3)
            own = None if mask is None else mask[part]
            copy(x[part], training=True, mask=own)
            for mine, its in zip(layer.weights, copy.weights, strict=True):
                np.testing.assert_allclose(values(mine)[m], values(its), TOL, TOL)
    before = [values(weight) for weight in layer.weights]
    layer(x)
    for weight, value in zip(layer.weights, before, strict=True):
        np.testing.assert_array_equal(values(weight), value)


def test_members_are_isolated():
    layer, x, other = make(), normal(*SHAPE), normal(*SHAPE, seed=1)
    for training in (False, True):
        check_isolated(layer, x, other, training=training)
    for m in range(M):
        both = []
        for changed in (False, True):
            rows = x.copy()
            if changed:
                rows[3 * m : 3 * m + 3] = other[3 * m : 3 * m + 3]
            layer = make()
            layer(rows, training=True)
            both.append([values(layer.moving_mean), values(layer.moving_variance)])
        for one, two in zip(*both, strict=True):
            np.testing.assert_array_equal((one != two).any(1), np.arange(M) == m)


def test_one_row_of_each_member():
    """Its variance is 0, and so is what is left of it without a mean."""
    layer = make((M, 5))
    output = values(layer(normal(M, 5), training=True))
    np.testing.assert_allclose(output, values(layer.beta), TOL, TOL)


def test_frozen_it_does_not_train():
    layer, x = make(), normal(*SHAPE)
    expected = values(layer(x))
    layer.trainable = False
    before = values(layer.moving_mean)
    np.testing.assert_array_equal(values(layer(x, training=True)), expected)
    np.testing.assert_array_equal(values(layer.moving_mean), before)


@pytest.mark.parametrize("mask", (None, masks()), ids=("all", "mask"))
def test_statistics_in_single_precision(mask):
    """Squares of these overflow in half precision."""
    x = (300 * normal(*SHAPE)).astype("float16")
    layer = make(dtype="mixed_float16")
    copies = plain_copies(layer, dtype="mixed_float16")
    output = layer(x, training=True, mask=mask)
    assert keras.backend.standardize_dtype(output.dtype) == "float16"
    for m, copy in enumerate(copies):
        part = slice(3 * m, 3 * m + 3)
        own = None if mask is None else mask[part]
        expected = ops.cast(copy(x[part], training=True, mask=own), "float32")
        found = ops.cast(output, "float32")[part]
        np.testing.assert_allclose(values(found), values(expected), 1e-2, 1e-2)
        np.testing.assert_allclose(
            values(layer.moving_variance)[m], values(copy.moving_variance), 1e-4
        )


@pytest.mark.parametrize("name", ("renorm", "synchronized"))
def test_refuses_arguments(name):
    with pytest.raises(ValueError, match=f"Received: {name}=True"):
        BatchNormalizationBatchEnsemble(**{name: True})


def test_refuses_calls():
    layer = make()
    with pytest.raises(ValueError, match="Received: mask of shape"):
        layer(normal(*SHAPE), training=True, mask=np.ones(3 * M, bool))
    with pytest.raises(ValueError, match="ensemble_size=3. Received: a batch of 7"):
        layer(normal(7, 4, 5), training=True)
