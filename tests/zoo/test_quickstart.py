import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from matplotlib.image import imread

from kzoo.zoo import build, hub, quickstart
from kzoo.zoo.serving.servable import Servable

pytestmark = pytest.mark.tensorflow

# The quickstart with networks that train in a moment.
TINY = """
import keras
from kzoo.layers import AverageMembers, DenseBatchEnsemble, TileMembers
from kzoo.zoo import quickstart, register_model
from kzoo.zoo.interruption import leave

facts = dict(dataset="digits", input_shape=(8, 8, 1), paper="-", description="-")

@register_model("tiny_single", **facts)
def tiny_single():
    image = keras.Input((8, 8, 1), name="image")
    return keras.Model(
        image, keras.layers.Dense(10)(keras.layers.Flatten()(image)), name="tiny_single"
    )

@register_model("tiny_ensemble", **facts)
def tiny_ensemble():
    image = keras.Input((8, 8, 1), name="image")
    x = TileMembers(2)(keras.layers.Flatten()(image))
    x = AverageMembers(2)(DenseBatchEnsemble(10, ensemble_size=2)(x))
    return keras.Model(image, x, name="tiny_ensemble")

quickstart.SINGLE, quickstart.ENSEMBLE = "tiny_single", "tiny_ensemble"
leave(quickstart.main())
"""
STEPS = [
    "1/7  Data",
    "2/7  Training",
    "3/7  Measured on the test split",
    "4/7  Export",
    "5/7  A fresh process",
    "6/7  A local server",
    "7/7  Figure",
]


def table(out):
    """{model: cells} of what step 3 printed."""
    rows = re.findall(r"^     (\w+)((?: +[0-9.,]+){6})$", out, re.MULTILINE)
    return {name: cells.split() for name, cells in rows}


def require_whole(folder):
    """Whatever a server would find is a whole model that answers."""
    for place in folder.glob("saved_models/*/*"):
        if place.name.isdigit():
            servable = Servable(place)
            answer = servable.predict({"image": np.zeros((1, 8, 8, 1), "float32")})
            servable.close()
            np.testing.assert_allclose(answer["probabilities"].sum(), 1, atol=1e-5)


@pytest.mark.slow
def test_the_whole_quickstart_twice(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert quickstart.main(["--epochs", "1"]) == 0
    out, err = capfd.readouterr()
    folder = tmp_path / "runs/quickstart"
    found = re.findall(r"^\d/7 .*$", out, re.MULTILINE)
    assert len(found) == 7
    for line, expected in zip(found, STEPS, strict=True):
        assert line.startswith(expected)
    assert "E0000" not in err and "I0000" not in err and "Traceback" not in err
    assert "resnet8_digits: 100%" in err

    results = json.loads((folder / "results.json").read_text())
    rows = table(out)
    assert (
        list(rows)
        == list(results["test"])
        == [
            "resnet8_digits",
            "resnet8_batch_ensemble_digits",
        ]
    )
    for name, cells in rows.items():
        figures = results["test"][name]
        assert cells[:4] == [
            f"{figures[key]:.4f}" for key in ("accuracy", "nll", "brier", "ece")
        ]
        assert figures["examples"] == 359
    assert results["fresh_process_difference"] <= 1e-5
    assert results["weight_bytes"] <= 1.05 * results["parameter_bytes"]
    parameters = build("resnet8_batch_ensemble_digits").count_params()
    assert results["parameter_bytes"] == 4 * parameters

    base = folder / "saved_models/resnet8_batch_ensemble_digits"
    assert hub.versions(base) == [1]
    assert imread(folder / "figure.png").shape[2] == 4
    rest, grpc = re.findall(r"^ +\d+ +\d +\d +[01]\.\d{4} +(\S+) +(\S+)$", out, re.M)[0]
    assert rest == grpc
    assert out.count("\n     stopped\n") == 1

    # Again: the same figures, no training, no second version.
    weights = (base / "1/variables/variables.data-00000-of-00001").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert quickstart.main(["--epochs", "1"]) == 0
    again, err = capfd.readouterr()
    assert table(again) == rows
    assert again.count("trained by an earlier run") == 2
    assert "Traceback" not in err and "epoch" not in err
    assert hub.versions(base) == [1]
    assert (base / "1/variables/variables.data-00000-of-00001").read_bytes() == weights
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "data",
        "figure.png",
        "quickstart.lock",
        "results.json",
        "saved_models",
        "tensorflow.log",
        "training",
    ]

    # Another number of epochs is another run, which is said.
    assert quickstart.main(["--epochs", "2"]) == 1
    err = capfd.readouterr().err
    assert "another configuration" in err and "--fresh" in err


class Tiny:
    """The tiny quickstart as a process."""

    def __init__(self, folder, *argv):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", TINY, "--run-dir", str(folder), *argv],
            env=os.environ | {"KERAS_BACKEND": "tensorflow", "PYTHONFAULTHANDLER": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.out = ""

    def until(self, text):
        """Reads on until a line holds the text."""
        while text not in self.out.rpartition("\n")[2]:
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            self.out = self.out + "\n" + line.rstrip("\n")

    def until_there(self, pattern):
        end = time.monotonic() + 120
        while not list(self.folder.glob(pattern)):
            assert self.process.poll() is None and time.monotonic() < end
            time.sleep(0.002)

    def stop(self, number):
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, err

    def end(self):
        out, err = self.process.communicate(timeout=300)
        assert self.process.returncode == 0, err
        return self.out + out


@pytest.mark.slow
def test_interrupted_and_killed_at_any_moment_it_goes_on(tmp_path, pytestconfig):
    folder = tmp_path / "run"
    moments = [
        (lambda q: q.until_there("training/tiny_single/history.json"), signal.SIGINT),
        (lambda q: q.until_there("saved_models/*/.1.partial/saved_*"), signal.SIGKILL),
        (lambda q: q.until("6/7"), signal.SIGINT),
    ]
    if pytestconfig.option.all:  # By default test_load.py kills a preparation.
        preparing = "data/digits/incomplete*"
        moments.insert(0, (lambda q: q.until_there(preparing), signal.SIGKILL))
    for reach, number in moments:
        tiny = Tiny(folder, "--epochs", "3")
        reach(tiny)
        code, err = tiny.stop(number)
        if number == signal.SIGINT:
            assert code == 130, err
            assert "Traceback" not in err
            assert err.endswith("\nInterrupted. The same command goes on from here.\n")
        else:
            assert code == -signal.SIGKILL, err
        require_whole(folder)
    out = Tiny(folder, "--epochs", "3").end()
    assert out.count("trained by an earlier run") == 2
    assert hub.versions(folder / "saved_models/tiny_ensemble") == [1]
    require_whole(folder)
    assert not [p for p in folder.rglob("*") if "partial" in p.name]
    assert not list(folder.glob("data/digits/incomplete*"))


def test_a_folder_that_is_not_its_own_is_left_alone(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine").write_text("x")
    for option in ([], ["--fresh"]):
        assert quickstart.main(["--run-dir", str(tmp_path), *option]) == 1
        assert "--run-dir must be" in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*")] == ["data", "mine"]


def test_two_at_once_in_one_folder_are_refused(tmp_path, capsys):
    with quickstart._own(tmp_path / "run", fresh=False):
        assert quickstart.main(["--run-dir", str(tmp_path / "run")]) == 1
    assert "Another quickstart is running" in capsys.readouterr().err


def test_fresh_empties_its_own_folder(tmp_path):
    with quickstart._own(tmp_path, fresh=False) as folder:
        (folder / "training").mkdir()
        (folder / "training/x").touch()
        (folder / "figure.png").touch()
    with quickstart._own(tmp_path, fresh=True) as folder:
        assert [p.name for p in folder.iterdir()] == ["quickstart.lock"]


def test_a_difference_is_an_error():
    quickstart._require_close(1e-6, "x")
    for difference in (2e-5, float("nan")):
        with pytest.raises(RuntimeError, match="answers otherwise"):
            quickstart._require_close(difference, "x")
