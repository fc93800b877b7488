"""Loading: where, in what order, and what interruptions and rivals leave behind."""

import os
import random
import signal
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from kzoo.zoo.datasets import load
from kzoo.zoo.datasets.digits import Digits

pytestmark = pytest.mark.tensorflow


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    load("digits", data_dir=folder)
    return folder


def labels(dataset):
    return [int(label) for _, label in dataset.as_numpy_iterator()]


def test_order_is_fixed(data_dir):
    first = labels(load("digits", "train", data_dir=data_dir)[0])
    assert labels(load("digits", "train", data_dir=data_dir)[0]) == first
    assert first != sorted(first)  # mixed once, when prepared


def test_preparing_again_gives_the_same_order(data_dir, tmp_path):
    first = labels(load("digits", "test", data_dir=data_dir)[0])
    assert labels(load("digits", "test", data_dir=tmp_path)[0]) == first


def test_splits_as_asked(data_dir):
    every, _ = load("digits", data_dir=data_dir)
    assert set(every) == {"train", "validation", "test"}
    part, rest = load("digits", ["train[:25%]", "train[25%:]"], data_dir=data_dir)[0]
    assert labels(part) + labels(rest) == labels(every["train"])
    with pytest.raises(ValueError, match="dev"):
        load("digits", "dev", data_dir=data_dir)


def test_dicts_on_request(data_dir):
    dataset, _ = load("digits", "test", data_dir=data_dir, as_supervised=False)
    example = next(dataset.as_numpy_iterator())
    assert set(example) == {"image", "label"}


def test_a_prepared_data_set_is_not_prepared_again(data_dir, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("prepared again")

    monkeypatch.setattr(Digits, "_split_generators", fail)
    assert len(labels(load("digits", "test", data_dir=data_dir)[0])) == 359


@pytest.mark.slow
def test_loads_without_this_package(data_dir):
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        f"n = len(list(tfds.load('digits', split='test', data_dir={str(data_dir)!r})))"
        "\nsys.exit(0 if n == 359 and 'kzoo' not in sys.modules else 1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_folder_comes_from_the_environment_unless_given(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "environment"))
    load("digits", "test")
    assert (tmp_path / "environment" / "digits").is_dir()
    load("digits", "test", data_dir=tmp_path / "given")
    assert (tmp_path / "given" / "digits").is_dir()


def test_other_names_go_the_same_way(tmp_path):
    with tfds.testing.mock_data(num_examples=3):
        dataset, info = load("mnist", "train", data_dir=tmp_path)
        images = [image for image, _ in dataset.as_numpy_iterator()]
    assert info.name == "mnist" and len(images) == 3
    assert images[0].shape == (28, 28, 1)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(tfds.core.DatasetNotFoundError, match="digitz"):
        load("digitz", data_dir=tmp_path)


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    generate = Digits._generate_examples

    def interrupted(self, images, targets, indices):
        for count, example in enumerate(generate(self, images, targets, indices)):
            if count == 100:
                raise KeyboardInterrupt
            yield example

    with monkeypatch.context() as patch:
        patch.setattr(Digits, "_generate_examples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load("digits", data_dir=tmp_path)
    assert os.listdir(tmp_path / "digits") == []
    assert len(labels(load("digits", "test", data_dir=tmp_path)[0])) == 359


SLOW_PREPARATION = """
import sys, time
from kzoo.zoo.datasets.digits import Digits
from kzoo.zoo.datasets import load
generate = Digits._generate_examples
def slow(self, images, labels, indices):
    for count, example in enumerate(generate(self, images, labels, indices)):
        if count == 100:
            print("half-way", flush=True)
            sys.stdin.readline()
        yield example
Digits._generate_examples = slow
dataset, info = load("digits", "test", data_dir=sys.argv[1])
print("examples", sum(1 for _ in dataset), flush=True)
"""


def preparing(folder):
    """Starts a process that waits in the middle of each split for a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_PREPARATION, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    while "half-way" not in (line := process.stdout.readline()):
        assert line, "the process ended early"
    return process


@pytest.mark.slow
def test_a_killed_preparation_is_made_again(tmp_path):
    process = preparing(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert not (tmp_path / "digits" / "1.0.0").exists()
    assert len(labels(load("digits", "test", data_dir=tmp_path)[0])) == 359


@pytest.mark.slow
def test_two_processes_prepare_at_once(tmp_path):
    rival = preparing(tmp_path)
    load("digits", data_dir=tmp_path)  # in place before the rival is done
    before = {
        p: p.stat().st_mtime_ns for p in (tmp_path / "digits").rglob("*.tfrecord*")
    }
    output, _ = rival.communicate("\n" * 3, timeout=120)
    assert rival.returncode == 0 and "examples 359" in output
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert os.listdir(tmp_path / "digits") == ["1.0.0"]


def test_a_rival_is_done_before_this_process_starts(tmp_path, monkeypatch):
    prepare = Digits.download_and_prepare

    def late(self, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(Digits, "download_and_prepare", prepare)
            load("digits", data_dir=tmp_path)
        prepare(self, **kwargs)

    monkeypatch.setattr(Digits, "download_and_prepare", late)
    assert len(labels(load("digits", "test", data_dir=tmp_path)[0])) == 359


def test_a_real_error_is_reported(tmp_path):
    (tmp_path / "digits").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="digits"):
        load("digits", data_dir=tmp_path)


def test_seeded_processes_prepare_in_folders_of_their_own(tmp_path, monkeypatch):
    prepare, drawn = tfds.core.DatasetBuilder.download_and_prepare, []

    def observed(builder, **options):
        drawn.append(random.getrandbits(64))
        return prepare(builder, **options)

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", observed)
    for folder in ("one", "other"):
        random.seed(0)
        load("diabetes", data_dir=tmp_path / folder)
        left = random.random()
    random.seed(0)
    assert left == random.random()
    assert drawn[0] != drawn[1]
