"""A run's folder: whatever line an interruption hits, a whole state is left."""

import json
import shutil
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras.src.callbacks import backup_and_restore

from kzoo.zoo.training import run_folder
from kzoo.zoo.training.run_folder import RunFolder, Snapshots

pytestmark = pytest.mark.tensorflow

WATCHED = {run_folder.__file__, backup_and_restore.__file__}
COPYING = {"copytree", "_copytree", "copy2", "copyfile"}  # of shutil


def interrupted_at_line(count, function):
    """Calls a function and raises at the count-th line of these files, or of a copy.

    Returns whether there were so many lines.
    """
    left = [count]

    def trace(frame, event, argument):
        code = frame.f_code
        copies = code.co_filename == shutil.__file__ and code.co_name in COPYING
        if code.co_filename not in WATCHED and not copies:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def network():
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(1), keras.layers.Dropout(0.5, seed=1)]
    )
    model.compile(keras.optimizers.SGD(momentum=0.9), loss="mse")
    model.optimizer.build(model.trainable_variables)
    return model


def fill(model, number):
    """Writes a number into every variable of a model and its optimizer."""
    for v in (*model.variables, *model.optimizer.variables):
        v.assign(keras.ops.full(v.shape, number, dtype=v.dtype))


def numbers(model):
    values = (*model.variables, *model.optimizer.variables)
    return {float(x) for v in values for x in np.ravel(keras.ops.convert_to_numpy(v))}


def callback(folder, model):
    _, record = folder.progress()
    snapshots = Snapshots(folder, record)
    snapshots.set_model(model)
    return snapshots


def train_epoch(snapshots, epoch):
    fill(snapshots.model, epoch + 1)
    snapshots.on_epoch_end(epoch, {"loss": epoch + 1.0})


def state(folder, model):
    """Returns the epochs that a new process would go on from."""
    fill(model, 0)
    model._initial_epoch = None
    snapshots = callback(folder, model)
    snapshots.on_train_begin()
    epochs, record = folder.progress()
    history = record["history"].get("loss", [])
    assert history == [i + 1.0 for i in range(epochs)]
    assert numbers(model) == {float(epochs)}
    assert (model._initial_epoch or 0) == epochs
    return epochs


@pytest.mark.slow
def test_every_interruption_of_a_snapshot_leaves_a_whole_one(tmp_path):
    model = network()
    first = RunFolder(tmp_path / "first")
    snapshots = callback(first, model)
    snapshots.on_train_begin()
    train_epoch(snapshots, 0)
    line, reached = 0, set()
    while True:
        line += 1
        folder = RunFolder(tmp_path / str(line))
        shutil.copytree(first.path, folder.path)
        snapshots = callback(folder, model)
        snapshots.on_train_begin()
        hit = interrupted_at_line(line, lambda s=snapshots: train_epoch(s, 1))
        epochs = state(folder, model)
        reached.add(epochs)
        if line % 10 == 0:
            # What is left does not stand in the way of the epochs that follow.
            snapshots = callback(folder, model)
            snapshots.on_train_begin()
            for epoch in range(epochs, 3):
                train_epoch(snapshots, epoch)
            assert state(folder, model) == 3
            assert len(list(folder.snapshots.iterdir())) == 1
        if not hit:
            break
    assert line > 60
    assert reached == {1, 2}


def test_every_interruption_of_the_end_leaves_a_snapshot_or_a_model(tmp_path):
    line, reached = 0, set()
    model = network()
    while True:
        line += 1
        folder = RunFolder(tmp_path / str(line))
        snapshots = callback(folder, model)
        snapshots.on_train_begin()
        train_epoch(snapshots, 0)
        record = snapshots.record
        hit = interrupted_at_line(line, lambda f=folder, r=record: f.finish(model, r))
        reached.add(folder.finished() is not None)
        if folder.finished():
            assert folder.finished() == record
            saved = keras.models.load_model(folder.model).get_weights()
            assert {float(x) for w in saved for x in np.ravel(w)} == {1.0}
        else:
            assert state(folder, model) == 1
        if not hit:
            break
    assert line > 5 and reached == {True, False}


def test_a_model_that_is_being_written_is_not_there(tmp_path, monkeypatch):
    def interrupted(self, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(keras.Model, "save", interrupted)
    folder = RunFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        folder.finish(network(), {})
    assert not folder.model.exists() and folder.finished() is None


def test_every_interruption_of_starting_anew_leaves_a_runs_folder(tmp_path):
    line = 0
    while True:
        line += 1
        folder = RunFolder(tmp_path / str(line))
        with folder.open({"epochs": 1}, resume=True):
            folder.history.write_text("{}")
            folder.model.write_text("")
            folder.snapshots.mkdir()

        def anew(folder=folder):
            with folder.open({"epochs": 2}, resume=False):
                pass

        hit = interrupted_at_line(line, anew)
        with folder.open({"epochs": 2}, resume=False):
            assert folder.finished() is None and not folder.model.exists()
            assert json.loads(folder.config.read_text()) == {"epochs": 2}
        if not hit:
            break
    assert line > 10


def test_another_configuration_is_said_by_the_values_that_differ(tmp_path):
    long = "x" * 80
    layers = [{"name": long, "units": n} for n in range(9)]
    old = {"dataset": "d/1", "model": {"layers": layers}, "seed": 0}
    folder = RunFolder(tmp_path)
    with folder.open(old, resume=True):
        pass

    def said(**changes):
        with pytest.raises(ValueError, match="another configuration") as error:
            with folder.open({**old, **changes}, resume=True):
                pass
        return str(error.value).partition("Received: ")[2]

    assert said(seed=1) == "seed=1 instead of 0"
    assert said(seed=None) == "seed=null instead of 0"
    wider = [*layers[:3], {"name": long, "units": 64}, *layers[4:]]
    assert said(model={"layers": wider}) == "model.layers[3].units=64 instead of 3"
    assert said(model={"layers": layers[:8]}).startswith("model.layers[8]=null instead")
    others = [{"name": long, "units": -n} for n in range(9)]
    text = said(model={"layers": others})
    assert text.count(" instead of ") == 5 and text.endswith(", 3 more")
    assert json.loads(folder.config.read_text()) == old


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"", b"NaN"])
def test_a_malformed_configuration_is_refused_or_starts_anew(content, tmp_path):
    folder = RunFolder(tmp_path)
    folder.config.write_bytes(content)
    with pytest.raises(ValueError, match="run's configuration.*config.json'"):
        with folder.open({"epochs": 1}, resume=True):
            pass
    assert folder.config.read_bytes() == content
    with folder.open({"epochs": 1}, resume=False):
        assert json.loads(folder.config.read_text()) == {"epochs": 1}
