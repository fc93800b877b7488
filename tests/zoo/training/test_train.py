"""Training: resumed runs equal uninterrupted ones, folders never mix two runs."""

import json
import sys
import types
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from kzoo.layers import (
    AverageMembers,
    DenseBatchEnsemble,
    DenseFlipout,
    RevGRU,
    TileMembers,
)
from kzoo.layers.variational.base import variational_layers
from kzoo.optimizers import Lookahead
from kzoo.zoo import evaluate, registry, train
from kzoo.zoo.training.run_folder import RunFolder

EPOCHS, BATCH = 3, 32
TRAIN, VALIDATION = "train[:130]", "validation[:60]"
STEPS = 130 // BATCH


def mlp():
    """A network with all that training changes: weights, statistics, random states."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            keras.layers.Rescaling(1 / 16),
            keras.layers.Flatten(),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.2, seed=1),
            keras.layers.Dense(10),
        ],
    )


def runner(data_dir, tmp_path):
    """Returns a function that trains a fresh network, from the same weights."""

    def run(folder="run", model=None, **changes):
        keras.utils.set_random_seed(7)
        model = model or mlp()
        arguments = {
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "max_shift": 1,
            "train_split": TRAIN,
            "validation_split": VALIDATION,
            "verbose": False,
            **changes,
        }
        return train(model, run_dir=tmp_path / folder, data_dir=data_dir, **arguments)

    return run


@pytest.fixture
def run(data_dir, tmp_path):
    return runner(data_dir, tmp_path)


@pytest.fixture(scope="module")
def uninterrupted(data_dir, tmp_path_factory):
    return runner(data_dir, tmp_path_factory.mktemp("whole"))()


class Interrupt(keras.callbacks.Callback):
    """Presses Ctrl-C at the beginning of a batch of an epoch."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.at, self.epoch = (epoch, batch), None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            raise KeyboardInterrupt


def assert_same_run(a, b):
    assert a.history.keys() == b.history.keys()
    for name in a.history:
        np.testing.assert_allclose(a.history[name], b.history[name], atol=1e-6)
        assert len(a.history[name]) == EPOCHS
    assert_same_weights(a.model, b.model)
    best = [keras.models.load_model(r.run_dir / "best.keras") for r in (a, b)]
    assert_same_weights(*best)


def assert_same_weights(a, b):
    for x, y in zip(a.get_weights(), b.get_weights(), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def files(folder):
    """Returns the content of every file of a folder, but for the lock."""
    return {
        p.relative_to(folder): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "lock"
    }


# What comes out.


@pytest.mark.slow
def test_learns_and_keeps_everything(run, data_dir):
    result = run(epochs=12, train_split="train", learning_rate=5e-2)
    assert not result.reused and result.seconds > 0
    assert result.history["val_accuracy"][-1] > 0.7
    assert result.history["nll"][-1] < 0.7 * result.history["nll"][0]
    folder = result.run_dir
    names = {"best.keras", "config.json", "history.json", "lock", "model.keras"}
    assert {p.name for p in folder.iterdir()} == {*names, "tensorboard"}
    record = json.loads((folder / "history.json").read_text())
    assert record == {"history": result.history, "seconds": result.seconds}
    assert_same_weights(keras.models.load_model(folder / "model.keras"), result.model)
    logs = [p.parent.name for p in (folder / "tensorboard").rglob("events*")]
    assert set(logs) == {"train", "validation"}

    best = int(np.argmin(result.history["val_nll"]))
    figures = evaluate(
        keras.models.load_model(folder / "best.keras"),
        split=VALIDATION,
        data_dir=data_dir,
    )
    assert figures["nll"] == pytest.approx(result.history["val_nll"][best], rel=1e-4)
    assert figures["accuracy"] == pytest.approx(result.history["val_accuracy"][best])


@pytest.mark.slow
def test_divergences_count_once_for_all_examples(tmp_path):
    def flipout(*num_examples):
        layers = [DenseFlipout(10, num_examples=n, seed=1) for n in num_examples]
        start = [keras.Input((8, 8, 1)), keras.layers.Flatten()]
        return keras.Sequential([*start, *layers], name="flipout")

    def examples(model):
        return [layer.num_examples for layer in variational_layers(model)]

    def run(model, folder):
        return train(
            model,
            "digits",
            epochs=1,
            batch_size=BATCH,
            train_split=TRAIN,
            validation_split=None,
            run_dir=tmp_path / folder,
            verbose=False,
        ).model

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for i, given in enumerate(((None,), (130,), (None, 130))):
            assert set(examples(run(flipout(*given), f"right{i}"))) == {130}
    with pytest.warns(UserWarning, match="num_examples=1300, .* on 130 examples"):
        assert examples(run(flipout(1300, None), "cold")) == [1300, 130]
    refused = flipout(None)
    with pytest.raises(ValueError, match="batch_size"):
        train(refused, "digits", batch_size=1000, train_split=TRAIN)
    assert examples(refused) == [None]
    name = "mlp_regressor_flipout"
    of_name = train(
        name, epochs=1, train_split="train[:64]", run_dir=tmp_path / name, verbose=False
    ).model
    assert set(examples(of_name)) == {64}


@pytest.mark.slow
def test_a_regressor_learns_by_its_likelihood(run):
    model = registry.build("mlp_regressor", hidden=(16,))
    result = run(
        model=model,
        dataset="diabetes",
        epochs=8,
        train_split="train",
        validation_split="validation",
        learning_rate=1e-2,
        max_shift=0,
    )
    assert sorted(result.history) == ["loss", "nll", "val_loss", "val_nll"]
    # A normal distribution with the training targets' moments, and no inputs.
    constant = 0.5 * (np.log(2 * np.pi * 75.0**2) + 1)
    assert result.history["nll"][-1] < constant - 0.2
    assert result.history["val_nll"][-1] < constant - 0.1
    assert_same_weights(
        keras.models.load_model(result.run_dir / "model.keras"), result.model
    )


@pytest.mark.slow
def test_a_tagger_learns_and_a_language_model_is_refused(run, monkeypatch):
    """Both go from ids to logits at each step, but of tags and of ids."""
    ids = np.random.default_rng(0).integers(0, 6, (64, 5))
    data = tf.data.Dataset.from_tensor_slices((ids, ids // 2))
    data = data, types.SimpleNamespace(full_name="tags", splits=["train"])
    module = sys.modules["kzoo.zoo.training.train"]
    monkeypatch.setattr(module, "load", lambda *args, **kwargs: data)
    layers = [keras.layers.Embedding(6, 8), RevGRU(8, return_sequences=True)]
    tagger, other = (
        keras.Sequential(
            [keras.Input((None,), dtype="int32"), *layers, keras.layers.Dense(n)]
        )
        for n in (3, 6)
    )
    options = {"dataset": "tags", "validation_split": None, "max_shift": 0}
    result = run(model=tagger, learning_rate=0.1, epochs=8, **options)
    assert result.history["accuracy"][-1] > 0.95
    with pytest.raises(ValueError, match="text_streams.*Received: model='sequential"):
        run("other", model=other, **options)


@pytest.mark.slow
def test_the_default_optimizer_is_lookahead_around_adam_on_a_cosine(run):
    result = run(learning_rate=0.1, epochs=10)
    optimizer = result.model.optimizer
    assert isinstance(optimizer, Lookahead)
    assert isinstance(optimizer.inner_optimizer, keras.optimizers.Adam)
    schedule = optimizer.inner_optimizer._learning_rate
    total, warmup = 10 * STEPS, 2  # 5 % of 40
    for step in (0, 1, 2, 10, 21, 40):
        if step < warmup:
            expected = 0.1 * step / warmup
        else:
            part = (step - warmup) / (total - warmup)
            expected = 0.05 * (1 + np.cos(np.pi * part))
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@pytest.mark.tensorflow
@pytest.mark.parametrize("kind", ["function", "instance", "schedule"])
def test_optimizers_as_asked(run, kind):
    constant = keras.optimizers.schedules.PiecewiseConstantDecay([1000], [0.5, 0.5])
    asked = {
        "function": {"optimizer": keras.optimizers.SGD, "learning_rate": 0.5},
        "instance": {"optimizer": keras.optimizers.SGD(0.5)},
        "schedule": {"optimizer": keras.optimizers.SGD, "learning_rate": constant},
    }[kind]
    optimizer = run(epochs=2, **asked).model.optimizer
    assert type(optimizer) is keras.optimizers.SGD
    config = optimizer.get_config()["learning_rate"]
    if kind == "instance":
        assert config == 0.5
    elif kind == "schedule":
        assert config["config"]["values"] == [0.5, 0.5]
    else:
        assert config["config"]["initial_learning_rate"] == 0.5  # no step to warm up


class Rows(keras.layers.Layer):
    """Remembers how many rows it was called with in training."""

    seen = None

    def call(self, inputs, training=False):
        if training:
            Rows.seen = inputs.shape[0]
        return inputs


def ensemble(members=4):
    image = keras.Input((8, 8, 1), name="image")
    x = TileMembers(members)(keras.layers.Rescaling(1 / 16)(image))
    x = keras.layers.Flatten()(Rows()(x))
    normal = keras.initializers.RandomNormal(1, 0.5)
    x = DenseBatchEnsemble(
        10, ensemble_size=members, alpha_initializer=normal, gamma_initializer=normal
    )(x)
    return keras.Model(image, AverageMembers(members)(x))


@pytest.mark.slow
@pytest.mark.parametrize(("members", "rows"), [("split", 32), ("tile", 128)])
def test_members_share_or_repeat_a_batch(run, data_dir, members, rows):
    result = run(
        model=ensemble(),
        members=members,
        learning_rate=1e-2,
        epochs=8,
        train_split="train",
    )
    assert Rows.seen == rows
    assert result.history["val_accuracy"][-1] > 0.6
    figures = evaluate(result.model, split=VALIDATION, data_dir=data_dir)
    assert figures["nll"] == pytest.approx(result.history["val_nll"][-1], rel=1e-4)


def linear():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Rescaling(1 / 16),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


def never_synced(learning_rate):
    """Lookahead whose slow weights stay the first ones."""
    return Lookahead(keras.optimizers.SGD(learning_rate), sync_period=10**6)


@pytest.mark.slow
def test_slow_weights_are_validated_kept_and_returned(run):
    model = linear()
    first = model.get_weights()
    arguments = {"optimizer": never_synced, "learning_rate": 0.5}
    result = run(model=model, **arguments)
    assert np.ptp(result.history["val_nll"]) == 0
    assert result.history["loss"][-1] < result.history["loss"][0] - 0.02
    saved = [
        keras.models.load_model(result.run_dir / name).get_weights()
        for name in ("best.keras", "model.keras")
    ]
    for weights in (model.get_weights(), *saved):
        for a, b in zip(first, weights, strict=True):
            np.testing.assert_array_equal(a, b)
    # Training goes on from the fast ones.
    with pytest.raises(KeyboardInterrupt):
        again = keras.models.clone_model(model)
        again.set_weights(first)
        run("again", model=again, callbacks=[Interrupt(2, 1)], **arguments)
    assert_same_run(run("again", model=again, **arguments), result)


@pytest.mark.slow
@pytest.mark.tensorflow
def test_a_registered_recipe_is_the_default(data_dir, tmp_path, monkeypatch):
    registry.list_models()
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    registry.register_model(
        "mlp_digits",
        description="A test model.",
        dataset="digits",
        input_shape=(8, 8, 1),
        paper="",
        recipe={"epochs": 2, "batch_size": 100, "learning_rate": 0.5},
    )(mlp)
    arguments = {"data_dir": data_dir, "verbose": False, "train_split": "train[:300]"}
    a = train("mlp_digits", run_dir=tmp_path / "a", **arguments)
    assert len(a.history["loss"]) == 2
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["batch_size"] == 100 and config["dataset"] == "digits/1.0.0"
    # The seed gives the first weights too, and what is asked for wins.
    b = train("mlp_digits", run_dir=tmp_path / "b", **arguments)
    assert_same_weights(a.model, b.model)
    c = train("mlp_digits", run_dir=tmp_path / "c", seed=1, epochs=1, **arguments)
    assert len(c.history["loss"]) == 1
    assert abs(a.history["loss"][0] - c.history["loss"][0]) > 1e-4


@pytest.mark.tensorflow
def test_without_validation(run):
    result = run(validation_split=None, epochs=1)
    assert set(result.history) == {"loss", "accuracy", "nll"}
    assert not (result.run_dir / "best.keras").exists()


# Interruptions.


@pytest.mark.slow
@pytest.mark.parametrize("at", [(0, 1), (1, 0), (2, 3)])
def test_the_same_command_goes_on(run, uninterrupted, tmp_path, at):
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[Interrupt(*at)])
    assert not (tmp_path / "run" / "model.keras").exists()
    seen = []
    note = keras.callbacks.LambdaCallback(on_epoch_begin=lambda e, _: seen.append(e))
    resumed = run(callbacks=[note])
    assert seen == list(range(at[0], EPOCHS))
    assert_same_run(resumed, uninterrupted)


@pytest.mark.slow
@pytest.mark.tensorflow
def test_goes_on_after_several_interruptions(run, uninterrupted):
    for at in ((1, 1), (1, 2), (2, 3)):
        with pytest.raises(KeyboardInterrupt):
            run(callbacks=[Interrupt(*at)])
    assert_same_run(run(), uninterrupted)


@pytest.mark.slow
@pytest.mark.tensorflow
def test_the_best_model_survives_an_interruption(run):
    rates = keras.optimizers.schedules.PiecewiseConstantDecay([STEPS], [0.1, 10.0])
    arguments = {"optimizer": keras.optimizers.SGD, "learning_rate": rates}
    whole = run("whole", **arguments)
    assert np.argmin(whole.history["val_nll"]) == 0
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[Interrupt(1, 1)], **arguments)
    assert_same_run(run(**arguments), whole)


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interruption_between_the_last_epoch_and_the_end(
    run, uninterrupted, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert_same_run(run(), uninterrupted)


@pytest.mark.slow
@pytest.mark.tensorflow
def test_weights_averaged_at_the_end_are_so_after_a_late_interruption(run, monkeypatch):
    def ema(learning_rate):
        return keras.optimizers.SGD(learning_rate, use_ema=True, ema_momentum=0.5)

    whole = run("whole", optimizer=ema, learning_rate=0.1)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(optimizer=ema, learning_rate=0.1)
    assert_same_run(run(optimizer=ema, learning_rate=0.1), whole)


@pytest.mark.slow
def test_a_later_fit_of_a_resumed_model_has_all_its_epochs(run):
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[Interrupt(2, 0)])
    model = run().model
    x, y = np.zeros((4, 8, 8, 1)), np.zeros(4, int)
    assert len(model.fit(x, y, epochs=3, verbose=0).epoch) == 3


# One folder, one run.


@pytest.mark.slow
def test_a_finished_run_is_returned_and_not_run_again(run, monkeypatch):
    first = run()
    before = files(first.run_dir)
    monkeypatch.setattr(keras.Model, "fit", None)
    again = run()
    assert again.reused and again.seconds == first.seconds
    assert_same_run(again, first)
    assert files(first.run_dir) == before


@pytest.mark.slow
@pytest.mark.tensorflow
def test_another_configuration_is_refused_or_starts_anew(run):
    first = run(epochs=1)
    before = files(first.run_dir)
    for key, change in {
        "epochs": {"epochs": 2},
        "batch_size": {"batch_size": 16},
        "seed": {"seed": 1},
        "max_shift": {"max_shift": 0},
        "flip": {"flip": True},
        "members": {"members": "tile"},
        "optimizer": {"learning_rate": 0.5},
        "train_split": {"train_split": "train[:140]"},
        "validation_split": {"validation_split": None},
        "model": {"model": ensemble()},
    }.items():
        with pytest.raises(
            ValueError, match=rf"another configuration.*Received: {key}[^ ]*="
        ):
            run(**{"epochs": 1, **change})
    assert files(first.run_dir) == before
    anew = run(epochs=2, resume=False)
    assert not anew.reused and len(anew.history["loss"]) == 2


@pytest.mark.slow
@pytest.mark.tensorflow
def test_starting_anew_repeats_a_run(run, uninterrupted):
    first = run(epochs=1)
    with pytest.raises(KeyboardInterrupt):
        run(resume=False, callbacks=[Interrupt(1, 0)])
    assert not (first.run_dir / "model.keras").exists()
    assert_same_run(run(), uninterrupted)


@pytest.mark.slow
@pytest.mark.tensorflow
def test_names_that_keras_counts_are_no_difference(run):
    first, again = run(epochs=1), run(epochs=1)
    assert first.model.layers[2].name != again.model.layers[2].name
    assert again.reused


@pytest.mark.tensorflow
def test_a_folder_that_is_no_runs_is_left_alone(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("the only copy")
    for resume in (True, False):
        with pytest.raises(ValueError, match="thesis.txt"):
            run(resume=resume)
    assert files(tmp_path / "run") == {Path("thesis.txt"): b"the only copy"}


@pytest.mark.slow
@pytest.mark.tensorflow
def test_two_processes_cannot_train_in_one_folder(run):
    with RunFolder(run(epochs=1).run_dir).open({}, resume=False):
        with pytest.raises(RuntimeError, match="Another process"):
            run(epochs=1)


# Bad input.


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": "share"}, "'split' or 'tile'.*Received.*'share'"),
        ({"batch_size": 131}, "at most 130.*Received: batch_size=131"),
        ({"batch_size": 0}, "Received: batch_size=0"),
        ({"epochs": 0}, "Received: epochs=0"),
        ({"max_shift": -1}, "at least 0. Received: max_shift=-1"),
        ({"train_split": "dev"}, "dev"),
        ({"validation_split": "dev"}, "dev"),
        ({"optimizer": keras.optimizers.SGD(), "learning_rate": 1.0}, "Received"),
        ({"learning_rate": 0.0}, "Received: learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "Received: learning_rate=nan"),
        ({"learning_rate": float("inf")}, "Received: learning_rate=inf"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    run, tmp_path, change, message
):
    with pytest.raises(ValueError, match=message):
        run(**change)
    assert not (tmp_path / "run").exists()


@pytest.mark.tensorflow
def test_members_must_share_a_batch_evenly(run):
    with pytest.raises(ValueError, match="divisible by the 4 members.*batch_size=30"):
        run(model=ensemble(), batch_size=30)
