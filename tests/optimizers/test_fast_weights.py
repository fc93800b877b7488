"""The step along fast weights is a multiple of the optimizer's, and decays nothing."""

import keras
import numpy as np
import pytest

from harness.training import QUICK
from kzoo.layers import (
    BatchNormalizationBatchEnsemble,
    DenseBatchEnsemble,
    LSTMBatchEnsemble,
)
from kzoo.optimizers import (
    KFAC,
    Adaptation,
    Lookahead,
    ScaledSchedule,
    with_fast_weights,
)

X = np.random.default_rng(0).normal(size=(8, 3, 4)).astype("float32")
Y = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")
FAST = ("alpha", "gamma", "recurrent_alpha", "recurrent_gamma")


def network(ensemble_size=2):
    """Fast weights, normalizations whose γ are none, and plain layers."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((3, 4)),
            LSTMBatchEnsemble(3, ensemble_size=ensemble_size, name="lstm"),
            keras.layers.BatchNormalization(name="norm"),
            BatchNormalizationBatchEnsemble(ensemble_size, name="own_norm"),
            DenseBatchEnsemble(2, ensemble_size=ensemble_size, name="dense"),
            keras.layers.Dense(2, name="plain"),
        ]
    )


def moved(optimizer, steps=1, make=network):
    """How far each weight moves, by its path, and whether it is a fast weight."""
    model = make()
    model.compile(optimizer(model), "mse", **QUICK)
    start = [v.numpy() for v in model.trainable_variables]
    for _ in range(steps):
        model.train_on_batch(X, Y)
    pairs = zip(model.trainable_variables, start, strict=True)
    # Without the model's name, another each time.
    return {v.path.partition("/")[2]: v.numpy() - before for v, before in pairs}


def is_fast(path):
    return path.split("/")[-1] in FAST and "norm" not in path


def test_adam_s_step_is_multiplied():
    whole = moved(lambda model: keras.optimizers.Adam(0.01))
    apart = moved(
        lambda model: with_fast_weights(keras.optimizers.Adam(0.01), model, 0.3)
    )
    assert sum(map(is_fast, whole)) == 6
    for path, step in whole.items():
        factor = 0.3 if is_fast(path) else 1
        np.testing.assert_allclose(apart[path], factor * step, rtol=1e-4, atol=1e-7)
    # Of a gradient the factor would be lost: Adam's first step is its rate, and a sign.
    fast = np.concatenate([np.ravel(apart[path]) for path in apart if is_fast(path)])
    np.testing.assert_allclose(np.median(np.abs(fast)), 0.003, rtol=1e-3)


def test_fast_weights_do_not_decay():
    def adam(decay):
        def make(model):
            inner = keras.optimizers.AdamW(0.01, weight_decay=decay)
            return with_fast_weights(inner, model, 1.0)

        return make

    without, decayed = moved(adam(0.0)), moved(adam(0.5))
    for path, step in decayed.items():
        if is_fast(path):
            np.testing.assert_allclose(step, without[path], rtol=1e-6)
    kernel = next(path for path in decayed if path.endswith("dense/shared/kernel"))
    assert np.abs(decayed[kernel] - without[kernel]).max() > 1e-4


def test_a_schedule_is_scaled():
    def make(model):
        schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.1, 0.0])
        return with_fast_weights(keras.optimizers.SGD(schedule), model, 0.5)

    whole, found = moved(lambda model: keras.optimizers.SGD(0.1)), moved(make)
    for path, step in whole.items():
        factor = 0.5 if is_fast(path) else 1
        np.testing.assert_allclose(found[path], factor * step, rtol=1e-5, atol=1e-6)
    schedule = ScaledSchedule(keras.optimizers.schedules.CosineDecay(2.0, 4), 0.25)
    again = keras.optimizers.schedules.deserialize(
        keras.optimizers.schedules.serialize(schedule)
    )
    for step in range(5):
        assert float(again(step)) == pytest.approx(
            0.25 * (1 + np.cos(step * np.pi / 4))
        )


@pytest.mark.slow
@pytest.mark.parametrize("around", [lambda x: x, lambda x: Lookahead(x, sync_period=2)])
def test_resumed_it_goes_on(around, tmp_path):
    model = network()
    adam = keras.optimizers.Adam(0.01)
    model.compile(around(with_fast_weights(adam, model)), "mse")
    for _ in range(3):
        model.train_on_batch(X, Y)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    losses = [[m.train_on_batch(X, Y) for _ in range(3)] for m in (model, loaded)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    "around", [lambda x: x, Lookahead, keras.optimizers.LossScaleOptimizer]
)
def test_a_learning_rate_that_changes_keeps_the_multiplier(around):
    model = network()
    both = with_fast_weights(keras.optimizers.SGD(0.1), model, 0.5)
    model.compile(around(both), "mse")
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.3 * rate)
    scheduler.set_model(model)
    scheduler.on_epoch_begin(0)
    rates = [float(one.learning_rate) for one in both.optimizers]
    assert rates == pytest.approx([0.015, 0.03])


def test_layers_of_one_name_in_two_models():
    def inside(name, *layers):
        return keras.Sequential([keras.Input((4,)), *layers], name=name)

    def dense():
        return DenseBatchEnsemble(4, ensemble_size=2, name="same")

    sgd, x = keras.optimizers.SGD(), keras.Input((4,))
    model = keras.Model(x, inside("b", dense())(inside("a", dense())(x)))
    optimizer = with_fast_weights(sgd, model)
    optimizer.build(model.trainable_variables)
    paths = [v.path for v in optimizer.optimizers[0]._trainable_variables]
    assert paths == [f"{n}/same/{w}" for n in "ab" for w in ("alpha", "gamma")]
    # PReLU's slopes are called alpha too.
    slopes = inside("b", keras.layers.PReLU(name="same"))
    model = keras.Model(x, slopes(inside("a", dense())(x)))
    with pytest.raises(ValueError, match=r"Received: \['b/same/alpha'\]"):
        with_fast_weights(sgd, model)


def test_refusals():
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    adam = keras.optimizers.Adam()
    with pytest.raises(ValueError, match="Received: .*with \\['Dense'\\]"):
        with_fast_weights(adam, plain)
    for multiplier in (0, -1, "half"):
        with pytest.raises(ValueError, match="Received: multiplier="):
            with_fast_weights(adam, network(), multiplier)
    with pytest.raises(ValueError, match="Received: optimizer=Lookahead"):
        with_fast_weights(Lookahead(adam), network())
    with pytest.raises(ValueError, match="Received: optimizer='adam'"):
        with_fast_weights("adam", network())
    with pytest.raises(ValueError, match="Received: model=None"):
        with_fast_weights(adam, None)


def dense_network():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((3, 4)),
            keras.layers.Flatten(),
            DenseBatchEnsemble(2, ensemble_size=2, name="dense"),
            keras.layers.Dense(2, name="plain"),
        ]
    )


def kfac(model, **arguments):
    return KFAC(model, fisher="exact", momentum=0.0, seed=0, **arguments)


def test_both_copies_of_kfac_have_the_model(tmp_path):
    whole = moved(kfac, make=dense_network)
    apart = moved(
        lambda model: with_fast_weights(kfac(model), model, 0.3), make=dense_network
    )
    assert sum(map(is_fast, whole)) == 2
    for path, step in whole.items():
        assert np.abs(step).max() > 0
        factor = 0.3 if is_fast(path) else 1
        np.testing.assert_allclose(apart[path], factor * step, rtol=1e-3, atol=1e-7)
    # Loaded, both have it again by one call.
    model = dense_network()
    model.compile(with_fast_weights(kfac(model), model), "mse", **QUICK)
    model.train_on_batch(X, Y)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert KFAC.resume(loaded) is loaded.optimizer.optimizers[-1]
    losses = [[m.train_on_batch(X, Y) for _ in range(2)] for m in (model, loaded)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_kfac_without_a_learning_rate_is_refused():
    model = dense_network()
    with pytest.raises(ValueError, match="KFAC with a learning rate.*Received: adapt"):
        with_fast_weights(kfac(model, adaptation=Adaptation()), model)
