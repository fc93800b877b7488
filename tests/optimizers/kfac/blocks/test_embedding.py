import keras
import numpy as np
import pytest
from keras import ops

from kzoo.optimizers import KFAC
from kzoo.optimizers.kfac.approximations.one_hot import (
    OneHotKronecker,
    squared_gradients,
)


@pytest.mark.parametrize("mask_zero", [False, True])
def test_a_table_is_a_dense_layer_of_unit_vectors(mask_zero):
    ids = np.array([[1, 2, 0], [2, 0, 0], [4, 2, 1], [3, 1, 1]])
    hot = np.eye(6, dtype="float32")[ids]
    if mask_zero:
        hot[ids == 0] = 0
    table = np.random.default_rng(0).normal(size=(6, 2)).astype("float32")
    if mask_zero:
        table[0] = 0
    steps, found = [], []
    for given, first in (
        (ids, keras.layers.Embedding(6, 2, mask_zero=mask_zero)),
        (hot, keras.layers.Dense(2, use_bias=False)),
    ):
        last = keras.layers.Dense(
            2, kernel_initializer=keras.initializers.GlorotNormal(seed=0)
        )
        x = keras.Input(given.shape[1:], dtype=given.dtype)
        h = first(x)
        # Its own, for Keras would leave masked positions out of the loss.
        h = keras.layers.Lambda(lambda h: h * 1.0)(h) if mask_zero else h
        model = keras.Model(x, last(keras.layers.Activation("tanh")(h)))
        first.set_weights([table])
        optimizer = KFAC(model, 1.0, damping=0.1, momentum=0.0, fisher="exact", seed=0)
        model.compile(optimizer, "mse", run_eagerly=True)
        optimizer.build(model.trainable_variables)
        optimizer.observe(ops.convert_to_tensor(given))
        a, g = (v.numpy() for v in next(iter(optimizer.factors.values())).values())
        found.append((a if a.ndim == 2 else np.diag(a), g))
        gradients = [ops.ones(v.shape) for v in model.trainable_variables]
        optimizer.apply(gradients, model.trainable_variables)
        steps.append(first.get_weights()[0] - table)
    for one, other in zip(*found, strict=True):
        scale = 1.0
        if mask_zero and one.shape == (6, 6):  # The Dense layer counts all positions.
            scale = (ids != 0).mean()
        np.testing.assert_allclose(scale * one, other, rtol=1e-5, atol=1e-6)
    if not mask_zero:
        np.testing.assert_allclose(steps[0], steps[1], rtol=1e-4)


@pytest.mark.parametrize("mask_zero", [False, True])
@pytest.mark.parametrize("approximation", ["diagonal", "ekfac"])
def test_of_a_table_examples_gradients_are_those_of_unit_vectors(
    approximation, mask_zero
):
    # 1 is picked twice by one example, 0 by none, or masked, and 2 by two.
    ids, found, steps = np.array([[3, 1, 1], [2, 4, 2], [4, 5, 2]]), [], []
    if mask_zero:
        ids = np.array([[3, 1, 1, 0], [2, 4, 2, 5], [4, 0, 2, 0]])
    hot = np.eye(6, dtype="float32")[ids]
    if mask_zero:
        hot[ids == 0] = 0
    table = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
    for given, first in (
        (ids, keras.layers.Embedding(6, 3, mask_zero=mask_zero)),
        (hot, keras.layers.Dense(3, use_bias=False)),
    ):
        last = keras.layers.Dense(
            2, kernel_initializer=keras.initializers.GlorotNormal(seed=0)
        )
        x = keras.Input(given.shape[1:], dtype=given.dtype)
        h = x
        if mask_zero and isinstance(first, keras.layers.Dense):
            h = keras.layers.Masking()(h)
        h = keras.layers.Activation("tanh")(first(h))
        if mask_zero:  # It leaves out what is masked.
            h = keras.layers.GlobalAveragePooling1D()(h)
        else:
            h = keras.layers.Flatten()(h)
        model = keras.Model(x, last(h))
        first.set_weights([table])
        optimizer = KFAC(
            model,
            1.0,
            damping=0.1,
            momentum=0.0,
            inverse_update_period=1,
            fisher="exact",
            approximation=approximation,
        )
        model.compile(optimizer, "mse", run_eagerly=True)
        optimizer.build(model.trainable_variables)
        gradients = [
            ops.reshape(ops.arange(np.prod(v.shape), dtype="float32"), v.shape) / 40
            for v in model.trainable_variables
        ]
        for _ in range(3):  # The basis changes, with which S is measured next.
            optimizer.observe(ops.convert_to_tensor(given))
            optimizer.apply(gradients, model.trainable_variables)
        factors = optimizer.factors[first.weights[0].path]
        found.append(factors["D" if approximation == "diagonal" else "S"].numpy())
        steps.append(first.get_weights()[0] - table)
    if approximation == "ekfac":  # Of A's eigenvectors, the unit vectors, in any order.
        found = [np.sort(s, axis=None) for s in found]
    else:
        assert (found[0][0] == 0).all() and (found[0][1:] > 0).all()
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(*steps, rtol=1e-4)


def test_the_squares_of_gradients_that_cancel_are_not_below_0():
    g = np.random.default_rng(2).normal(size=(2000, 33, 1)).astype("float32")
    g[:, -1] = -g[:, :-1].sum(axis=1)
    numbers = np.repeat(np.arange(2000), 33).reshape(2000, 33, 1)
    found = squared_gradients(*map(ops.convert_to_tensor, (numbers, g)), 2000)
    found = ops.convert_to_numpy(found)
    assert (found >= 0).all() and found.max() < 1e-9


def test_both_inverses_are_of_the_same_time():
    approximation = OneHotKronecker((4, 2))
    a, g = np.array([0.5, 0.25, 0.25, 0.0]), np.array([[2.0, 0.5], [0.5, 1.0]])
    factors = [ops.convert_to_tensor(f.astype("float32")) for f in (a, g)]
    _, caches = approximation.refresh(factors, [], 0.04)
    # π² = (1/4) / (3/2), and λ with it is no part of what comes later.
    pi = (1 / 6) ** 0.5
    z = np.random.default_rng(0).normal(size=(4, 2)).astype("float32")
    later = [ops.zeros_like(f) for f in factors]
    found = approximation.precondition(ops.convert_to_tensor(z), later, caches, 9.0)
    expected = z / (a + 0.2 * pi)[:, None] @ np.linalg.inv(g + 0.2 / pi * np.eye(2))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
