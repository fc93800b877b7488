"""Layers at every step: as the same layer that is given all steps at once."""

import keras
import numpy as np
import pytest

from kzoo.optimizers.kfac.blocks.time_distributed import TimeDistributedBlock
from tests.harness.curvature import observed

N, T = 5, 3
X = np.random.default_rng(0).normal(size=(N, T, 4, 2)).astype("float32")


def made(inside, distributed, shape, masked=False):
    """A network whose first weights are of a layer at each step, or of all steps."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input(shape)
    if masked:
        x = keras.layers.Masking()(x)
    x = keras.layers.TimeDistributed(inside)(x) if distributed else inside(x)
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(2, kernel_initializer="ones")(x))


def check_same_factors(one, other, x, **arguments):
    """Checks that the first part of a model's curvature is that of another."""
    (part, found), *_ = observed(one, x, **arguments)
    assert isinstance(part.block, TimeDistributedBlock)
    (_, expected), *_ = observed(other, x, **arguments)
    assert len(found) == len(expected) and np.abs(expected[0]).max() > 0.1
    for each, wanted in zip(found, expected, strict=True):
        each = each.reshape(
            wanted.shape
        )  # A convolution has one matrix for each group.
        np.testing.assert_allclose(each, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("approximation", ["kronecker", "ekfac", "diagonal"])
def test_dense(approximation, sharing):
    """Dense reads the last axis alone, so it needs no TimeDistributed."""
    networks = [
        made(keras.layers.Dense(3, "tanh", kernel_initializer="ones"), d, X.shape[1:3])
        for d in (True, False)
    ]
    arguments = {"approximation": approximation, "sharing": sharing}
    check_same_factors(*networks, X[..., 0], **arguments)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("positions", [False, True])
def test_masked_steps_count_nowhere(sharing, positions):
    """They are left out of a layer that is given them all, and that takes a mask."""
    x = np.array(X if positions else X[..., 0])
    x[0, 1:] = 0
    x[2] = 0
    networks = [
        made(
            keras.layers.Dense(3, kernel_initializer="ones"),
            d,
            x.shape[1:],
            masked=True,
        )
        for d in (True, False)
    ]
    check_same_factors(*networks, x, sharing=sharing)


def test_a_masked_step_masks_all_of_its_positions():
    inputs = keras.Input((T, 8))
    x = keras.layers.Masking()(inputs)
    x = keras.layers.TimeDistributed(keras.layers.Reshape((4, 2)))(x)
    x = keras.layers.TimeDistributed(keras.layers.Dense(3))(x)
    model = keras.Model(inputs, keras.layers.Flatten()(x))
    data = X.reshape(N, T, 8).copy()
    data[0, 1:] = data[2] = 0
    ((_, (a, _)),) = observed(model, data)
    rows = X[[0, *[1, 3, 4] * T], [0, *np.repeat(range(T), 3)]].reshape(-1, 2)
    rows = np.concatenate([rows, np.ones_like(rows[:, :1])], axis=1)
    np.testing.assert_allclose(a, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_positions_of_a_convolution_are_those_of_all_steps():
    """Of kernel size 1 a convolution is a Dense layer at each position."""
    networks = [
        made(keras.layers.Conv1D(3, 1, kernel_initializer="ones"), True, X.shape[1:]),
        made(keras.layers.Dense(3, kernel_initializer="ones"), False, X.shape[1:]),
    ]
    for sharing in ("expand", "reduce"):
        check_same_factors(*networks, X, sharing=sharing)


def test_a_layer_that_is_called_by_itself_too():
    """One step is then one example's, beside those of TimeDistributed."""
    inside = keras.layers.Dense(3, kernel_initializer="ones")
    inputs = keras.Input(X.shape[1:3])
    at_each = keras.layers.TimeDistributed(inside)(inputs)
    once = inside(keras.layers.Flatten()(inputs[:, :1]))
    outputs = keras.layers.Flatten()(at_each) + keras.layers.Concatenate()([once] * T)
    ((_, (a, _)),) = observed(keras.Model(inputs, outputs), X[..., 0])
    rows = np.concatenate([X[..., 0].reshape(-1, 4), X[:, 0, :, 0]])
    rows = np.concatenate([rows, np.ones_like(rows[:, :1])], axis=1)
    np.testing.assert_allclose(a, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)


def test_what_mixes_examples_is_measured_at_each_step():
    model = made(keras.layers.BatchNormalization(), True, X.shape[1:3])
    (part, _), *_ = observed(model, X[..., 0])
    assert not isinstance(part.block, TimeDistributedBlock)
