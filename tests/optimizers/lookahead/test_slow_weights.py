"""The model with Lookahead's slow weights in it, and the fast ones back."""

import keras
import numpy as np
import pytest
from keras import optimizers

from kzoo.optimizers import Lookahead, SwapSlowWeights

NUMBERS = np.random.default_rng(0)
X = NUMBERS.normal(size=(30, 3)).astype("float32")
Y = NUMBERS.normal(size=(30, 2)).astype("float32")
STEPS = 5  # An epoch's: no multiple of the period.


def compiled(make=lambda: Lookahead(optimizers.Adam(0.05), 3), run_eagerly=True):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, activation="tanh", name="first"),
            keras.layers.Dense(2, name="second"),
        ]
    )
    model.compile(make(), loss="mse", run_eagerly=run_eagerly)
    return model


def fit(model, epochs=3, callbacks=(), **kwargs):
    return model.fit(
        X,
        Y,
        batch_size=len(X) // STEPS,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
        **kwargs,
    )


def state(model):
    return [v.numpy() for v in [*model.weights, *model.optimizer.variables]]


def equal(received, expected):
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def slow(model):
    return [v.numpy() for v in model.optimizer.slow_variables]


class AtEpochEnd(keras.callbacks.Callback):
    """Calls a function with the model."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def on_epoch_end(self, epoch, logs=None):
        self.act(self.model)


# The context.


def test_the_slow_weights_stand_in_the_model_within_the_context():
    model = compiled()
    fit(model, epochs=1)
    fast = model.get_weights()
    assert np.abs(fast[0] - slow(model)[0]).max() > 1e-3
    with model.optimizer.slow_weights():
        equal(model.get_weights(), slow(model))
        within = model.evaluate(X, Y, verbose=0)
        prediction = model.predict(X, verbose=0)
    equal(model.get_weights(), fast)

    other = compiled()
    other.set_weights(slow(model))
    np.testing.assert_allclose(within, other.evaluate(X, Y, verbose=0), rtol=1e-6)
    np.testing.assert_allclose(prediction, other.predict(X, verbose=0), rtol=1e-5)


def test_the_fast_weights_come_back_after_an_exception():
    model = compiled()
    fit(model, epochs=1)
    before = state(model)
    with pytest.raises(KeyboardInterrupt), model.optimizer.slow_weights():
        raise KeyboardInterrupt
    equal(state(model), before)


def test_contexts_within_contexts():
    model = compiled()
    fit(model, epochs=1)
    before = state(model)
    with model.optimizer.slow_weights():
        with model.optimizer.slow_weights():
            model.evaluate(X, Y, verbose=0, callbacks=[SwapSlowWeights()])
        equal(model.get_weights(), slow(model))
    equal(state(model), before)


def test_training_goes_on_as_if_there_had_been_no_context():
    model, plain = compiled(), compiled()
    for _ in range(2):
        fit(model, epochs=1)
        with model.optimizer.slow_weights():
            model.evaluate(X, Y, verbose=0)
        fit(plain, epochs=1)
    equal(state(model), state(plain))


def test_before_the_first_update_all_weights_are_slow():
    optimizer = Lookahead(optimizers.SGD(0.1))
    with optimizer.slow_weights():  # Not built.
        pass
    variable = keras.Variable([1.0])
    optimizer.build([variable])
    variable.assign([2.0])
    with optimizer.slow_weights():
        assert variable.numpy() == 2.0


def test_training_within_the_context_is_kept():
    model = compiled(run_eagerly=False)  # On JAX it donates the buffers.
    fit(model, epochs=1)
    with model.optimizer.slow_weights():
        fit(model, epochs=1)
        trained = model.get_weights()
    equal(model.get_weights(), trained)


def test_half_precision_and_variables_without_slow_weights():
    theta = keras.Variable([1.0], dtype="bfloat16")
    scale = keras.Variable([5.0])
    scale.overwrite_with_gradient = True
    optimizer = Lookahead(optimizers.SGD(2.0**-8), 2)
    optimizer.apply([keras.ops.ones(1), keras.ops.full((1,), 7.0)], [theta, scale])
    with optimizer.slow_weights():
        assert keras.ops.convert_to_numpy(theta) == 1.0
        assert scale.numpy() == 7.0
    assert keras.ops.convert_to_numpy(theta) == 1 - 2.0**-8


def test_what_is_saved_within_the_context_has_the_slow_weights(tmp_path):
    model = compiled()
    fit(model, epochs=1)
    with model.optimizer.slow_weights():
        model.save(tmp_path / "slow.keras")
    loaded = keras.saving.load_model(tmp_path / "slow.keras")
    equal(loaded.get_weights(), slow(model))


# The callback.


@pytest.mark.slow
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_validation_uses_the_slow_weights_and_training_the_fast_ones(run_eagerly):
    model, plain = compiled(run_eagerly=run_eagerly), compiled(run_eagerly=run_eagerly)
    expected = []

    def evaluate_slow(model):
        other = compiled()
        other.set_weights(slow(model))
        expected.append(other.evaluate(X, Y, verbose=0))

    history = fit(model, callbacks=[SwapSlowWeights()], validation_data=(X, Y))
    fit(plain, callbacks=[AtEpochEnd(evaluate_slow)], validation_data=(X, Y))
    np.testing.assert_allclose(history.history["val_loss"], expected, rtol=1e-5)
    equal(state(model), state(plain))


def test_evaluate_and_predict_with_the_callback():
    model = compiled()
    fit(model, epochs=1)
    before = state(model)
    with model.optimizer.slow_weights():
        loss, prediction = model.evaluate(X, Y, verbose=0), model.predict(X, verbose=0)
    swap = SwapSlowWeights()
    assert model.evaluate(X, Y, verbose=0, callbacks=[swap]) == loss
    equal(model.predict(X, verbose=0, callbacks=[swap]), prediction)
    equal(state(model), before)


@pytest.mark.slow
def test_the_best_model_is_the_one_that_was_measured(tmp_path):
    file = tmp_path / "best.keras"
    model, plain = compiled(), compiled()
    saved = []
    history = fit(
        model,
        validation_data=(X, Y),
        callbacks=[
            keras.callbacks.BackupAndRestore(tmp_path / "backup"),
            SwapSlowWeights(swap_on_epoch=True),
            keras.callbacks.ModelCheckpoint(file, save_best_only=True),
            AtEpochEnd(lambda model: saved.append(model.get_weights())),
        ],
    )
    best = keras.saving.load_model(file)
    losses = history.history["val_loss"]
    equal(best.get_weights(), saved[np.argmin(losses)])
    np.testing.assert_allclose(best.evaluate(X, Y, verbose=0), min(losses), rtol=1e-6)
    equal(saved[-1], slow(model))
    # Neither training nor what it ends with is changed.
    fit(plain)
    equal(state(model), state(plain))


def test_backups_listed_before_the_callback_resume_exactly(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise InterruptedError

    def callbacks(*more):
        return [
            keras.callbacks.BackupAndRestore(tmp_path / "backup"),
            SwapSlowWeights(swap_on_epoch=True),
            *more,
        ]

    with pytest.raises(InterruptedError):
        fit(compiled(), 4, callbacks(Stop()))
    model, plain = compiled(), compiled()
    fit(model, 4, callbacks())
    fit(plain, 4)
    for one, other in zip(state(model), state(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_training_goes_on_from_the_fast_weights_after_an_interrupted_validation():
    class Interrupt(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    model, plain = compiled(), compiled()
    swap = SwapSlowWeights()
    with pytest.raises(KeyboardInterrupt):
        fit(model, 1, [swap, Interrupt()], validation_data=(X, Y))
    fit(plain, 1)
    if keras.backend.backend() == "jax":
        equal(state(model), state(plain))
    fit(model, 1, [SwapSlowWeights()])
    fit(plain, 1)
    equal(state(model), state(plain))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda: optimizers.LossScaleOptimizer(Lookahead(optimizers.Adam(0.05), 3)),
        lambda: Lookahead(optimizers.LossScaleOptimizer(optimizers.Adam(0.05)), 3),
        lambda: Lookahead(Lookahead(optimizers.Adam(0.05), 2), 3),
        lambda: Lookahead(optimizers.Adam(0.05, use_ema=True), 3),
        lambda: optimizers.MultiOptimizer(
            optimizers.OptimizerMap(
                Lookahead(optimizers.Adam(0.05), 3),
                {".*second.*": Lookahead(optimizers.SGD(0.05), 2)},
            )
        ),
    ],
    ids=["loss scale above", "loss scale below", "nested", "average", "multi"],
)
def test_the_lookahead_is_found(make):
    model, plain = compiled(make, False), compiled(make, False)
    swapped = fit(model, 1, [SwapSlowWeights()], validation_data=(X, Y))
    fast = fit(plain, 1, validation_data=(X, Y))
    difference = swapped.history["val_loss"][0] - fast.history["val_loss"][0]
    assert abs(difference) > 1e-4
    equal(state(model), state(plain))


def test_a_model_without_lookahead_is_refused():
    model = compiled(optimizers.SGD)
    with pytest.raises(ValueError, match="compiled with a Lookahead.*Received"):
        fit(model, callbacks=[SwapSlowWeights()])
    with pytest.raises(ValueError, match="compiled with a Lookahead.*Received"):
        model.evaluate(X, Y, verbose=0, callbacks=[SwapSlowWeights()])
