import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from kzoo import __version__
from kzoo.layers import DenseFlipout
from kzoo.zoo import cli, hub, registry
from kzoo.zoo.cli import main
from kzoo.zoo.serving.servable import Servable

pytestmark = pytest.mark.tensorflow

NAME = "resnet8_batch_ensemble_digits"
KZOO = [sys.executable, "-m", "kzoo.zoo.cli"]


def run(capsys, *argv):
    """Exit code, standard output and standard error of a command."""
    code = main([str(a) for a in argv])
    return (code, *capsys.readouterr())


def only(capsys, *argv):
    """Standard output of a command that must succeed."""
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small run, its SavedModel, and the data, made by the command itself."""
    place = tmp_path_factory.mktemp("cli")
    small = ["width=2", "ensemble_size=2", "--epochs", "1", "--batch-size", "128"]
    train = ["train", NAME, *small, "--seed", "3", "--run-dir", str(place / "run")]
    patch = pytest.MonkeyPatch()
    patch.setenv("TFDS_DATA_DIR", str(place / "data"))
    patch.setenv("KZOO_HOME", str(place / "home"))
    patch.chdir(place)
    assert main(train) == 0
    export = ["export", str(place / "run"), "--no-xla"]
    assert main(export) == 0
    yield place
    patch.undo()


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(place / "data"))
    monkeypatch.setenv("KZOO_HOME", str(place / "home"))
    monkeypatch.chdir(place)
    return place


# What it says of itself, and fast.


def test_version_and_help_import_nothing_heavy():
    code = (
        "import sys; from kzoo.zoo.cli import main; code = main([{!r}]); "
        "heavy = {{'keras', 'tensorflow', 'jax', 'requests'}}; "
        "sys.exit(code or sorted(heavy & sys.modules.keys()) or 0)"
    )
    for option, expected in (("--version", f"kzoo {__version__}"), ("-h", "COMMAND")):
        done = subprocess.run(
            [sys.executable, "-c", code.format(option)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nosuch"],
        ["train"],
        ["train", NAME, "--epochs", "0"],
        ["train", NAME, "--members", "some"],
        ["train", NAME, "--max-shift", "-1"],
        ["predict", "x", "--examples", "-1"],
        ["serve", NAME, "--port", "99999"],
        ["serve", NAME, "--grpc-port", "-1"],
        ["download"],
        ["list", "--nosuch"],
    ],
)
def test_wrong_usage(argv, capsys):
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    assert err.startswith("usage: kzoo") and "error: " in err.splitlines()[-1]


# Errors: one line on standard error, code 1, no traceback.


@pytest.mark.parametrize(
    "argv, message",
    [
        (["info", "resnet8_digit"], "kzoo info: .*'resnet8_digits'.*Received: "),
        (["list", "z*"], "kzoo list: Expected a pattern.*Received: 'z*'"),
        (["train", NAME, "width"], "kzoo train: Expected KEY=VALUE. Received: 'width'"),
        (["train", NAME, "depht=8"], "kzoo train: TypeError: .*depht"),
        (["train", "rev_gru_python_source", "units=4"], "language models are trained"),
        (["evaluate", "nowhere.keras"], "Expected a .keras file.*'nowhere.keras'"),
        (["evaluate", "nowhere"], "Expected the name of a carried or downloaded"),
        (["export", "nowhere"], "Expected a .keras file, or the folder of a finished"),
        (["predict", "nowhere"], "Known models: "),
        (["predict", "x.keras"], "kzoo predict: Expected the name of"),
        (["serve"], "kzoo serve: Expected a model, or --config"),
        (["serve", "nowhere"], "kzoo serve: Expected the name of"),
        (["download", "../x"], "kzoo download: Expected the name of a model"),
        (["download", "x", "--from", "ftp://x"], "kzoo download: Expected a mirror"),
        (["download", "x", "--from", "nowhere"], "nowhere/index.json is not a file"),
    ],
)
def test_errors_are_one_line(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("KZOO_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 1
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    assert re.search(message.replace("z*", r"z\*"), err), err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("content", ["{", "[]", ""])
@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_a_malformed_runs_configuration(command, content, here, capsys, tmp_path):
    (tmp_path / "config.json").write_text(content)
    argv = ["evaluate", tmp_path]
    if command == "train":
        argv = ["train", NAME, "--run-dir", tmp_path]
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1 and "Error" not in err
    assert re.search("Expected a run's configuration.*config.json", err), err


def test_traceback_when_asked():
    with pytest.raises(ValueError, match="Expected KEY=VALUE"):
        main(["train", NAME, "width", "--traceback"])


# The commands.


@pytest.mark.slow
def test_list_and_info(here, capsys):
    out = only(capsys, "list", "*ensemble_digits")
    assert len(out.splitlines()) == 2 and out.splitlines()[1].startswith(NAME)
    rows = json.loads(only(capsys, "list", "--json"))
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    assert {"resnet8_digits", NAME} <= {row["name"] for row in rows}
    parameters = registry.build("resnet8_digits").count_params()
    out = only(capsys, "info", "resnet8_digits")
    assert re.search(rf"^parameters +{parameters}$", out, re.MULTILINE)
    facts = json.loads(only(capsys, "info", "resnet8_digits", "--json"))
    assert facts["parameters"] == parameters
    assert facts["input_shape"] == [8, 8, 1]


@pytest.mark.slow
def test_train_again_reuses_the_run_and_refuses_another(here, capsys):
    small = ["train", NAME, "--epochs", 1, "--batch-size", 128, "ensemble_size=2"]
    before = (here / "run/history.json").read_bytes()
    out = only(capsys, *small, "--seed", 3, "width=2", "--run-dir", "run")
    assert "finished already" in out
    assert re.search(r"^val_nll +[0-9]\.[0-9]{4}$", out, re.MULTILINE)
    code, out, err = run(capsys, *small, "--seed", 3, "width=3", "--run-dir", "run")
    assert code == 1 and "another configuration" in err
    assert re.search(r"Received: model\.\S*layers\S+=3 instead of 2", err), err
    assert (here / "run/history.json").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--flip"], {"flip": True, "epochs": 160}),
        (["--recipe", "cifar", "--no-flip"], {"flip": False, "recipe": "cifar"}),
    ],
)
def test_train_takes_the_models_recipe_or_another(
    here, capsys, monkeypatch, argv, expected
):
    from kzoo.zoo import training

    asked = {}

    def train(model, **arguments):
        asked.update(arguments)
        return training.TrainResult(model, {"loss": [1.0]}, here, 1.0, False)

    monkeypatch.setattr(training, "train", train)
    only(capsys, "train", "resnet8_digits", "width=1", *argv)
    names = ("flip", "recipe", "epochs", "learning_rate")
    found = {name: asked[name] for name in names if name in asked}
    rest = {"learning_rate": 1e-2} if "epochs" in expected else {}
    assert found == {**expected, **rest} and asked["dataset"] == "digits"


@pytest.mark.slow
def test_train_counts_the_examples(here, capsys, monkeypatch):
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))

    @registry.register_model(
        "tiny_flipout",
        description="Tiny.",
        dataset="digits",
        input_shape=(8, 8, 1),
        paper="https://example.org",
    )
    def tiny_flipout(num_examples=7, name="tiny_flipout"):
        image = keras.Input((8, 8, 1), name="image")
        layer = DenseFlipout(10, num_examples=num_examples)
        return keras.Model(image, layer(keras.layers.Flatten()(image)), name=name)

    for given, expected in (([], 1258), (["num_examples=9"], 9)):
        folder = here / f"of{expected}"
        train = ["train", "tiny_flipout", *given, "--epochs", 1, "--run-dir", folder]
        only(capsys, *train)
        model = keras.saving.load_model(folder / "model.keras")
        assert model.layers[-1].num_examples == expected


@pytest.mark.slow
def test_evaluate_agrees_on_a_run_and_its_savedmodel(here, capsys):
    figures = json.loads(only(capsys, "evaluate", "run", "--json"))
    assert figures["dataset"] == "digits" and figures["split"] == "validation"
    assert figures["examples"] == 180 and figures["members"] == 2
    history = json.loads((here / "run/history.json").read_text())["history"]
    assert figures["accuracy"] == pytest.approx(history["val_accuracy"][-1], abs=1e-6)
    assert figures["nll"] == pytest.approx(history["val_nll"][-1], abs=1e-5)
    file = json.loads(
        only(capsys, "evaluate", "run/model.keras", "--dataset", "digits", "--json")
    )
    assert file == figures
    saved = json.loads(only(capsys, "evaluate", f"models/{NAME}", "--json"))
    for key, value in saved.items():
        if isinstance(value, float):
            assert value == pytest.approx(figures[key], abs=1e-5), key
        else:
            assert value == figures[key]
    text = only(capsys, "evaluate", "run", "--split", "test", "--diversity")
    assert re.search(r"^examples +359$", text, re.MULTILINE)
    assert re.search(r"^2 members, 359 examples\npairs that dis", text, re.MULTILINE)
    found = json.loads(only(capsys, "evaluate", "run", "--diversity", "--json"))
    assert found["diversity"]["ensemble_nll"] == pytest.approx(figures["nll"], abs=1e-5)


@pytest.mark.slow
def test_evaluate_needs_a_data_set(here, capsys):
    code, _, err = run(capsys, "evaluate", "run/model.keras")
    assert code == 1 and "Expected --dataset" in err


@pytest.mark.slow
def test_export_places_versions(here, capsys, tmp_path):
    to = ["--to", tmp_path, "--name", "net", "--no-xla"]
    for version in ("1", "2"):
        out = only(capsys, "export", "run/model.keras", *to)
        assert out == f"{tmp_path / 'net' / version}\n"
    code, _, err = run(capsys, "export", "run", *to, "--version", 2)
    assert code == 1 and "is already there" in err
    only(capsys, "export", "run", *to, "--version", 2, "--overwrite")
    assert hub.versions(tmp_path / "net") == [1, 2]


@pytest.mark.slow
def test_export_leaves_the_carried_models_alone(place, here):
    default = cli._parser().parse_args(["export", "run"]).to
    assert (place / default / NAME / "1").is_dir()
    ignored = (Path(cli.__file__).parents[1] / ".gitignore").read_text().split()
    assert f"/{default}/" in ignored


@pytest.mark.slow
def test_predict_examples_and_files(here, capsys, tmp_path):
    out = only(capsys, "predict", f"models/{NAME}", "--examples", 3)
    assert len(out.splitlines()) == 4
    assert out.split()[:2] == ["example", "label"]
    answer = json.loads(
        only(capsys, "predict", f"models/{NAME}", "--examples", 3, "--json")
    )["predictions"]
    assert len(answer) == 3
    probabilities = np.array([row["probabilities"] for row in answer])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.array([row["member_probabilities"] for row in answer]).shape == (3, 2, 10)


@pytest.mark.slow
def test_every_form_of_input_means_the_same(here, capsys, tmp_path):
    images = np.random.default_rng(0).integers(0, 17, (4, 8, 8, 1))
    np.save(tmp_path / "a.npy", images.astype("uint8"))
    np.savez(tmp_path / "a.npz", image=images)
    for name, content in {
        "list": images.tolist(),
        "inputs": {"inputs": images.tolist()},
        "named": {"inputs": {"image": images.tolist()}},
        "instances": {"instances": images.tolist()},
        "rows": {"instances": [{"image": image} for image in images.tolist()]},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    servable = Servable(here / f"models/{NAME}/1")
    for file in sorted(tmp_path.iterdir()):
        inputs, _ = cli._read_inputs(file, servable)
        assert inputs.keys() == {"image"} and inputs["image"].dtype == np.float32
        np.testing.assert_array_equal(inputs["image"], images)
    expected = servable.predict({"image": images.astype("float32")})
    servable.close()

    npy = ["--input", tmp_path / "a.npy"]
    answer = json.loads(only(capsys, "predict", f"models/{NAME}/1", *npy, "--json"))
    for key, values in expected.items():
        got = np.array([row[key] for row in answer["predictions"]], "float32")
        np.testing.assert_array_equal(got, values)
    table = only(capsys, "predict", f"models/{NAME}", *npy)
    assert "label" not in table and len(table.splitlines()) == 5


def test_json_means_what_it_means_to_a_server(tmp_path):
    """Strings of bytes, scalars, a signature by name, and infinity said so."""
    module = tf.Module()
    text = tf.TensorSpec([None], tf.string, "text")
    number = tf.TensorSpec([], tf.float32, "number")
    signatures = {
        "serving_default": tf.function(
            lambda text: {"length": tf.strings.length(text)}
        ).get_concrete_function(text),
        "twice": tf.function(
            lambda number: {"twice": 2 * number}
        ).get_concrete_function(number),
    }
    tf.saved_model.save(module, str(tmp_path / "1"), signatures)
    servable = Servable(tmp_path / "1")
    file = tmp_path / "x.json"

    def answer(content):
        file.write_text(content)
        (array,) = servable.predict(*cli._read_inputs(file, servable)).values()
        return array.tolist()

    coded = '{"b64": "AP8="}'
    assert answer(f'{{"instances": [{coded}, "abc"]}}') == [2, 3]
    assert answer(f'{{"instances": [{{"text": {coded}}}]}}') == [2]
    assert answer(f'[{coded}, "é"]') == [2, 2]
    assert answer(f'{{"inputs": {{"text": [{coded}]}}}}') == [2]
    assert answer('{"signature_name": "twice", "inputs": 1.5}') == 3
    assert answer('{"signature_name": "twice", "inputs": -Infinity}') == -np.inf
    servable.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, content, message",
    [
        ("a.json", '{"inputs": {"img": [1]}}', "Missing named input: image"),
        ("a.json", '{"inputs": {"image": [1], "x": 1}}', "not have named input: x"),
        ("a.json", '{"instances": [{"image": 1, "x": 1}]}', "element: 0.*: image$"),
        ("a.json", '{"instances": [{"image": 1}, {}]}', "element: 1.*: image$"),
        ("a.json", '{"instances": [{"image": 1}, 2]}', "got another at item 1"),
        ("a.json", '{"instances": [{"b64": "AA=="}]}', "not of expected type: DT_FL"),
        ("a.json", '{"instances": []}', "Expecting 'instances' to be a list"),
        ("a.json", '{"instances": 1}', "Expecting 'instances' to be a list"),
        ("a.json", '{"instances": [1], "inputs": [1]}', "expecting only one of"),
        ("a.json", '{"image": [1]}', "Missing 'inputs' or 'instances' key"),
        ("a.json", '{"signature_name": "x", "inputs": 1}', 'key "x" not found'),
        ("a.json", '{"inputs": 1}', "expects shape"),
        ("a.json", '{"inputs": 1e999}', "Number too big"),
        ("a.json", '{"inputs": 1e39}', "too large for DT_FLOAT"),
        ("a.json", "1", "Is not object"),
        ("a.json", "[[1, 2], [3]]", "all lists of a level must have one length"),
        ("a.json", '["a"]', "not of expected type: DT_FLOAT"),
        ("a.json", "[1, 2]", "expects shape"),
        ("a.json", "{", "Expecting"),
        ("a.json", '[1], "signature_name": "x"', "Extra data"),
        ("a.npz", "", "(?i)pickle|magic|cannot|no data"),
        ("a.npy", "no array", "(?i)pickle|magic|cannot"),
        ("a.txt", "", "Expected .npy, .npz or .json"),
    ],
)
def test_predict_refuses_other_input(file, content, message, here, capsys, tmp_path):
    (tmp_path / file).write_text(content)
    code, out, err = run(
        capsys, "predict", f"models/{NAME}", "--input", tmp_path / file
    )
    assert (code, out) == (1, "")
    assert err.count("\n") == 1 and re.search(message, err), err
    assert "Error: " not in err and "INVALID_ARGUMENT" not in err


def test_probabilities_of_sequences_are_printed_as_json(capsys):
    cli._print_answer({"probabilities": np.full((1, 2, 2), 0.5)}, None, False)
    (answer,) = json.loads(capsys.readouterr().out)["predictions"]
    assert answer == {"probabilities": [[0.5, 0.5], [0.5, 0.5]]}


def test_a_table_without_rows_is_its_header(capsys):
    cli._print_table(["label", "p"], [])
    assert capsys.readouterr().out == "label  p\n"


@pytest.mark.slow
def test_download_from_a_mirror_then_predict_by_name(here, capsys, tmp_path):
    mirror = tmp_path / "mirror"
    (mirror / "net").mkdir(parents=True)
    only(capsys, "export", "run", "--to", mirror, "--name", "net", "--no-xla")
    (mirror / "net/README.md").write_text("# net\n")
    hub.write_index(mirror)
    out = only(capsys, "download", "net", "--from", mirror)
    assert out == f"{here / 'home/net/1'}\n"
    out = only(capsys, "predict", "net", "--dataset", "digits", "--examples", 1)
    assert len(out.splitlines()) == 2
    code, _, err = run(capsys, "predict", "net")
    assert code == 1 and "Expected --dataset" in err
    code, _, err = run(capsys, "download", "net", "--from", mirror, "--version", 2)
    assert code == 1 and "Expected version 1" in err


# As a process.


@pytest.mark.slow
def test_a_reader_that_leaves(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*KZOO, "list"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def wait_for(path, process):
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_an_interruption_is_said_in_one_line(here, tmp_path):
    process = subprocess.Popen(
        [*KZOO, "train", NAME, "width=2", "--run-dir", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(tmp_path / "run/config.json", process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == "" and "Traceback" not in err
    assert err.endswith("\nkzoo: interrupted\n")


@pytest.mark.slow
def test_serve_answers_until_interrupted(here):
    process = subprocess.Popen(
        [*KZOO, "serve", f"digits=models/{NAME}", "--port", "0", "--grpc-port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watch = threading.Timer(120, process.kill)
    watch.start()
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        url = re.fullmatch(
            r"REST: (http://127\.0\.0\.1:\d+)/v1/models/digits\n", lines[1]
        )
        assert url, lines
        assert re.fullmatch(r"gRPC: 127\.0\.0\.1:\d+\n", lines[2])
        body = json.dumps({"instances": np.zeros((1, 8, 8, 1)).tolist()}).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{url[1]}/v1/models/digits:predict", body, 30) as answer:
            (row,) = json.load(answer)["predictions"]
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        watch.cancel()
        process.kill()
    assert (process.returncode, out, err) == (0, "Stopped.\n", "")
