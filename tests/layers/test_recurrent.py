"""What all recurrent layers carry from batch to batch, and where they keep it."""

from functools import partial

import keras
import numpy as np
import pytest

from harness.by_hand import value
from kzoo.layers import GRUFlipout, LSTMBatchEnsemble, MeanFieldNormal, RevGRU, RevLSTM

B, T, IN, H = 3, 4, 2, 6
rng = np.random.default_rng(0)
X = rng.normal(size=(B, 2 * T, IN)).astype("float32")
Y = rng.normal(size=(B, 2 * T, H)).astype("float32")
POINTS = dict.fromkeys(
    ("kernel_posterior_fn", "recurrent_kernel_posterior_fn"),
    MeanFieldNormal(is_singular=True),
)
GRU_FLIPOUT = partial(GRUFlipout, **POINTS)


def made(layer, stateful, around=lambda layer: layer, **compile_options):
    """A model of one layer, always with the same weights."""
    layer = around(layer(H, return_sequences=True, stateful=stateful, seed=0))
    model = keras.Sequential([keras.Input(batch_shape=(B, None, IN)), layer])
    numbers = np.random.default_rng(1)
    model.set_weights([numbers.normal(size=w.shape) for w in model.weights])
    model.compile(keras.optimizers.SGD(0.0), "mse", **compile_options)
    return model


def in_two(array):
    """The first halves of all sequences, and then the second ones."""
    return np.concatenate([array[:, :T], array[:, T:]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer, jit_compile",
    [
        (RevLSTM, True),
        (partial(LSTMBatchEnsemble, ensemble_size=1), False),
        (GRU_FLIPOUT, True),
    ],
    ids=["RevLSTM", "LSTMBatchEnsemble", "GRUFlipout"],
)
def test_states_are_carried_through_compiled_steps(layer, jit_compile):
    """Two batches are one of twice the steps, in fit, evaluate and predict."""
    carried, whole = (made(layer, s, jit_compile=jit_compile) for s in (True, False))
    (recurrent,) = carried.layers
    expected = whole.evaluate(X, Y, verbose=0)
    options = {"batch_size": B, "verbose": 0}
    begin = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda *_: recurrent.reset_state()
    )
    history = carried.fit(
        in_two(X), in_two(Y), epochs=2, shuffle=False, callbacks=[begin], **options
    ).history
    np.testing.assert_allclose(history["loss"], expected, rtol=1e-5)
    # Without a reset it goes on from where it was, which is elsewhere.
    assert abs(carried.evaluate(in_two(X), in_two(Y), **options) / expected - 1) > 1e-4
    recurrent.reset_states()
    found = carried.evaluate(in_two(X), in_two(Y), **options)
    assert found == pytest.approx(expected, rel=1e-5)
    recurrent.reset_state()
    np.testing.assert_allclose(
        carried.predict(in_two(X), **options),
        in_two(whole.predict(X, verbose=0)),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.slow
def test_states_of_both_directions_are_carried():
    around = partial(keras.layers.Bidirectional, merge_mode="concat")
    carried, whole = (made(RevLSTM, s, around) for s in (True, False))
    (both,) = carried.layers
    found = carried.predict(in_two(X), batch_size=B, verbose=0)
    np.testing.assert_allclose(
        found[..., :H], in_two(whole.predict(X, verbose=0)[..., :H]), atol=1e-6
    )
    # The other direction goes on from what it ended with, at the first step.
    (other,) = whole.layers
    state = keras.ops.zeros((B, H))
    _, *states = keras.layers.RNN(
        other.backward_layer.cell, go_backwards=True, return_state=True
    )(X[:, :T], initial_state=[state, state])
    expected = other.backward_layer(X[:, T:], initial_state=states)
    np.testing.assert_allclose(found[B:, ::-1, H:], expected, atol=1e-6)
    both.reset_state()
    again = carried.predict(in_two(X), batch_size=B, verbose=0)
    np.testing.assert_allclose(again, found, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [RevLSTM, GRU_FLIPOUT], ids=["RevLSTM", "GRUFlipout"])
def test_states_are_no_weights(layer, tmp_path):
    """A trained layer's weights are those of any batch size, and its files too."""
    stateful, plain = made(layer, True), made(layer, False)
    stateful.train_on_batch(X, Y)
    (recurrent,) = stateful.layers
    others = stateful.variables[len(plain.variables) :]
    assert list(map(id, others)) == list(map(id, recurrent.states))
    assert all(value(state).any() for state in recurrent.states)
    stateful.get_state_tree()  # Which refuses paths that are not unique.
    for v in plain.layers[0].trainable_variables:
        v.assign(np.zeros(v.shape))
    plain.set_weights(stateful.get_weights())
    stateful.save_weights(tmp_path / "of.weights.h5")
    stateful.save(tmp_path / "model.keras")
    one = layer(H, return_sequences=True, stateful=True)
    one = keras.Sequential([keras.Input(batch_shape=(1, None, IN)), one])
    one.load_weights(tmp_path / "of.weights.h5")
    expected = plain.predict(X, verbose=0)
    np.testing.assert_allclose(
        one.predict(X[:1], batch_size=1, verbose=0), expected[:1], atol=1e-6
    )
    # What is loaded or cloned begins anew.
    loaded = keras.models.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(stateful)
    clone.set_weights(stateful.get_weights())
    for other in (loaded, clone):
        np.testing.assert_allclose(other.predict(X, verbose=0), expected, atol=1e-6)


def test_states_under_mixed_precision_stay_in_float32():
    layer = RevGRU(H, stateful=True, dtype="mixed_bfloat16")
    model = keras.Sequential([keras.Input(batch_shape=(B, T, IN)), layer])
    model.compile("sgd", "mse", jit_compile=True)
    for _ in range(2):
        model.train_on_batch(X[:, :T], Y[:, 0])
        (state,) = layer.states
        assert state.dtype == "float32" and value(state).any()


def test_a_frozen_layer_carries_its_states():
    carried, whole = made(RevGRU, True), made(RevGRU, False)
    carried.trainable = False
    found = carried.predict(in_two(X), batch_size=B, verbose=0)
    np.testing.assert_allclose(found, in_two(whole.predict(X, verbose=0)), atol=1e-6)
