"""The mean of the iterates, from when on, and what is refused."""

import keras
import numpy as np
import pytest

from harness import check_optimizer
from kzoo.optimizers import AveragedSGD, NonMonotonicTrigger


def iterates(optimizer, updates, at=None):
    """The weights of 0.5 w² before, and after each update; the mean after the last."""
    w = keras.Variable(np.array([8.0, -2.0], "float32"))
    optimizer.build([w])
    found = [w.numpy()]
    for k in range(updates):
        if k == at:
            optimizer.start_averaging()
            optimizer.start_averaging()
        optimizer.apply([w.value], [w])
        found.append(w.numpy())
    optimizer.finalize_variable_values([w])
    return np.array(found), w.numpy()


@pytest.mark.parametrize("momentum, start", [(0.0, 1), (0.9, 3), (0.5, 6)])
def test_is_the_mean_of_the_iterates(momentum, start):
    found, mean = iterates(AveragedSGD(0.1, momentum, start=start), 6)
    plain, _ = iterates(AveragedSGD(0.1, momentum), 6)
    np.testing.assert_array_equal(found, plain)
    w, v, expected = np.array([8.0, -2.0]), 0.0, []
    for k in range(7):
        if k >= start:
            expected.append(w)
        v = momentum * v - 0.1 * w
        w = w + v
    np.testing.assert_allclose(mean, np.mean(expected, 0), rtol=1e-5)


def test_before_it_starts_it_is_the_weights():
    found, mean = iterates(AveragedSGD(0.1), 4)
    np.testing.assert_allclose(mean, found[-1], rtol=1e-6)
    found, mean = iterates(AveragedSGD(0.1, start=9), 4)
    np.testing.assert_allclose(mean, found[-1], rtol=1e-6)


def test_starts_when_asked_to_with_the_weights_there_are():
    found, mean = iterates(AveragedSGD(0.1), 6, at=2)
    np.testing.assert_allclose(mean, found[2:].mean(0), rtol=1e-5)


def test_accumulated_gradients_count_once():
    optimizer = AveragedSGD(0.1, start=1, gradient_accumulation_steps=2)
    found, mean = iterates(optimizer, 8)
    np.testing.assert_array_equal(found[1::2], found[:-1:2])
    np.testing.assert_allclose(mean, found[2::2].mean(0), rtol=1e-5)


class Losses:
    """A model whose validation loss is as given, for a callback."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


@pytest.mark.parametrize(
    "patience, losses, started",
    [
        (0, [3, 2, 1, 2], 3),
        (2, [3, 2, 1, 2, 2], None),
        (2, [3, 2, 1, 2, 2.5], 4),
        (2, [1, 2, 3, 4], 3),
        (2, [3, 1, 2, 2, 2], 4),
        (5, [1, 2, 2, 2, 2, 2, 2], 6),
        (5, [7, 6, 5, 4, 3, 2, 1], None),
    ],
)
def test_the_trigger(patience, losses, started):
    optimizer = AveragedSGD(0.1)
    trigger = NonMonotonicTrigger(patience)
    trigger.set_model(Losses(optimizer))
    trigger.on_train_begin()
    found = None
    for epoch, loss in enumerate(losses):
        trigger.on_epoch_end(epoch, {"val_loss": loss})
        if found is None and optimizer.is_averaging:
            found = epoch
        # The paper's algorithm: logs of the epochs before, without the last n.
        least = min(losses[: max(epoch - patience, 0)], default=np.inf)
        assert not (loss > least and not optimizer.is_averaging)
    assert found == started


def test_in_fit_the_mean_is_evaluated_and_stays():
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    y = np.random.default_rng(1).normal(size=(16, 1)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(AveragedSGD(0.05), "mse")
    seen = []

    class See(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(model.get_weights())

    callbacks = [
        keras.callbacks.SwapEMAWeights(),
        NonMonotonicTrigger(0, monitor="lower"),
        See(),
    ]

    class Lower(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["lower"] = [3.0, 2.0, 2.5, 1.0, 1.0, 1.0][epoch]

    history = model.fit(
        *(x, y),
        batch_size=16,
        epochs=6,
        validation_data=(x, y),
        callbacks=[Lower(), *callbacks],
        verbose=0,
    )
    kernel = np.mean([w[0] for w in seen[2:]], axis=0)
    np.testing.assert_allclose(model.get_weights()[0], kernel, rtol=1e-5)
    loss = model.evaluate(x, y, verbose=0)
    assert history.history["val_loss"][-1] == pytest.approx(loss, rel=1e-5)
    model.fit(x, y, verbose=0)  # The mean and the weights are not one buffer.
    for variable in (*model.variables, *model.optimizer.variables):
        assert np.isfinite(variable.numpy()).all()


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [False, True])
def test_a_resumed_fit_goes_on_with_what_was_seen(tmp_path, scaled):
    """The loss of the third epoch is compared with that of the first one."""
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    figures = [2.0, 3.0, 2.5, 4.0, 1.0]

    class Given(keras.callbacks.Callback):
        def __init__(self, stop):
            super().__init__()
            self.stop = stop

        def on_epoch_begin(self, epoch, logs=None):
            if epoch == self.stop:
                raise KeyboardInterrupt

        def on_epoch_end(self, epoch, logs=None):
            logs["given"] = figures[epoch]

    def fit(folder, stop=None):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, "tanh")])
        model.set_weights([np.ones((3, 1)), np.zeros(1)])
        optimizer = AveragedSGD(0.5)
        inner = optimizer
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, 8.0)
        model.compile(optimizer, "mse")
        callbacks = [
            Given(stop),
            NonMonotonicTrigger(1, monitor="given"),
            keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False),
        ]
        model.fit(x, x[:, 0], epochs=5, callbacks=callbacks, verbose=0)
        assert int(inner._start) == 3  # Updates, of one an epoch.
        return model.get_weights()

    expected = fit(tmp_path / "whole")
    for stop in (1, 2):  # With one figure that is needed, and with two.
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / str(stop), stop)
        for one, other in zip(fit(tmp_path / str(stop)), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6)


def test_refuses():
    with pytest.raises(ValueError, match="Received: start=0"):
        AveragedSGD(0.1, start=0)
    with pytest.raises(ValueError, match=r"Received: \['ema_momentum'\]"):
        AveragedSGD(0.1, ema_momentum=0.9)
    with pytest.raises(ValueError, match="Received: patience="):
        NonMonotonicTrigger(-1)
    trigger = NonMonotonicTrigger()
    trigger.set_model(Losses(keras.optimizers.SGD()))
    with pytest.raises(ValueError, match="Received: optimizer="):
        trigger.on_train_begin()
    trigger.set_model(Losses(AveragedSGD()))
    with pytest.raises(ValueError, match="Received: monitor="):
        trigger.on_epoch_end(0, {"loss": 1.0})


@pytest.mark.slow
def test_contract():
    check_optimizer(lambda: AveragedSGD(0.05, 0.5, start=2))
