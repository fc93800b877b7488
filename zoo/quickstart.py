"""The main job, from real data to a served, calibrated model, in seven steps.

    python -m kzoo.zoo.quickstart

A second run reuses the finished training and replaces the rest; an interrupted one
goes on where it was.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import placing
from .interruption import INTERRUPTED, insistent_interrupts, leave
from .native_log import native_log_to

SINGLE, ENSEMBLE = "resnet8_digits", "resnet8_batch_ensemble_digits"
DATASET = "digits"
LOCK = "quickstart.lock"
TOLERANCE = 1e-5
COLUMNS = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "brier": "Brier",
    "ece": "ECE",
    "parameters": "parameters",
    "seconds": "seconds",
}

# All that the process of step 5 runs. tensorflow itself imports keras where it can;
# None in sys.modules makes any import of these fail.
CLIENT = """\
import sys
sys.modules.update(dict.fromkeys(["keras", "tf_keras", "kzoo"]))
import tensorflow as tf
path, folder = sys.argv[1:]
ask = tf.saved_model.load(path).signatures["serving_default"]
image = tf.io.parse_tensor(tf.io.read_file(folder + "/image"), tf.float32)
for name, answer in ask(image=image).items():
    tf.io.write_file(folder + "/" + name, tf.io.serialize_tensor(answer))
loaded = {name.partition(".")[0] for name in sys.modules if sys.modules[name]}
assert not loaded & {"keras", "tf_keras", "kzoo"}, loaded
"""


def main(argv=None):
    """Runs the quickstart.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit code: 0, 1 for a failure, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kzoo.zoo.quickstart",
        description="From real data to a served, calibrated model.",
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--epochs", type=int, help="default: each model's recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fresh", action="store_true", help="train anew")
    arguments = parser.parse_args(argv)
    try:
        with _own(arguments.run_dir, arguments.fresh) as folder:
            with insistent_interrupts(), native_log_to(folder / "tensorflow.log"):
                _run(folder, arguments.epochs, arguments.seed)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"\nquickstart: {error}", file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _own(folder, fresh):
    """Holds the run's folder; with `fresh`, empties it first."""
    if folder.is_dir() and not (folder / LOCK).exists() and any(folder.iterdir()):
        raise ValueError(
            "--run-dir must be a folder of an earlier quickstart, empty or new. "
            f"Received: {folder}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"Another quickstart is running in {folder}") from None
        stale = ["tensorflow.log"] + [p.name for p in folder.iterdir()] * fresh
        for path in (folder / name for name in stale if name != LOCK):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        yield folder


def _run(folder, epochs, seed):
    start = time.perf_counter()
    _title()
    images, labels = _data(folder / "data")
    results = {name: _train(name, folder, epochs, seed) for name in (SINGLE, ENSEMBLE)}
    figures = _measure(results, folder / "data")
    answers = {name: _answer(r.model, images) for name, r in results.items()}
    path, sizes = _export(results[ENSEMBLE].model, images, folder / "saved_models")
    difference = _fresh_process(path, images, answers[ENSEMBLE])
    _serve(path, images, labels, answers[ENSEMBLE])
    _figure(folder / "figure.png", images, labels, answers)
    _write_results(folder / "results.json", figures, sizes, difference)
    print(f"\nAll of it is in {folder}; it took {time.perf_counter() - start:.0f} s.")


def _title():
    import keras
    import tensorflow as tf

    from .. import __version__

    cores = len(os.sched_getaffinity(0))
    print(
        f"kzoo {__version__}  TensorFlow {tf.__version__}  Keras {keras.__version__}  "
        f"{cores} cores"
    )


def _step(number, text):
    print(f"\n{number}/7  {text}", flush=True)


def _say(text):
    print(f"     {text}".rstrip(), flush=True)


def _data(data_dir):
    """Step 1: the data set. Returns the test images and labels."""
    _step(1, "Data: handwritten digits, prepared with tensorflow-datasets")
    import numpy as np
    import tensorflow_datasets as tfds

    from .datasets import load

    for incomplete in data_dir.glob(f"{DATASET}/incomplete.*"):
        shutil.rmtree(incomplete)  # left by a killed run
    with _without_tfds_bars(tfds), contextlib.redirect_stdout(None):
        test, info = load(DATASET, "test", data_dir=data_dir)
    counts = {name: split.num_examples for name, split in info.splits.items()}
    height, width, _ = info.features["image"].shape
    _say(
        f"{sum(counts.values()):,} digits of {height}x{width} pixels: "
        + ", ".join(f"{counts[name]:,} {name}" for name in counts)
    )
    _say(f"{data_dir}")
    images, labels = zip(*test.as_numpy_iterator(), strict=True)
    return np.stack(images).astype("float32"), np.array(labels)


@contextlib.contextmanager
def _without_tfds_bars(tfds):
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        tfds.enable_progress_bar()


def _train(name, folder, epochs, seed):
    """Step 2, once for each network."""
    from .training import train

    if name == SINGLE:
        _step(2, "Training: Lookahead(Adam), the single network and the ensemble of 4")
    try:
        result = train(
            name,
            epochs=epochs,
            seed=seed,
            run_dir=folder / "training" / name,
            data_dir=folder / "data",
        )
    except ValueError as error:
        raise ValueError(f"{error} (Or start anew with --fresh.)") from error
    if result.reused:
        _say(f"{name}: trained by an earlier run, {result.seconds:.0f} s")
    return result


def _measure(results, data_dir):
    """Step 3: {name: {figure: number}} on the test split."""
    from .training import evaluate

    _step(3, "Measured on the test split")
    figures = {}
    for name, result in results.items():
        figures[name] = evaluate(result.model, DATASET, "test", data_dir=data_dir)
        figures[name]["seconds"] = result.seconds
    width = max(map(len, figures))
    _say(" " * width + "".join(f"{title:>12}" for title in COLUMNS.values()))
    for name, row in figures.items():
        cells = [
            f"{row[key]:,}"
            if key == "parameters"
            else f"{row[key]:.1f}"
            if key == "seconds"
            else f"{row[key]:.4f}"
            for key in COLUMNS
        ]
        _say(name.ljust(width) + "".join(f"{cell:>12}" for cell in cells))
    return figures


def _answer(model, images):
    """What the live model says, as NumPy arrays."""
    import keras

    from .predictive import classification

    outputs = classification(model)[1](images)
    return {key: keras.ops.convert_to_numpy(value) for key, value in outputs.items()}


def _export(model, images, base_path):
    """Step 4: the version's folder, and its sizes."""
    from .export import export

    _step(4, "Export: a SavedModel in TensorFlow Serving's layout")
    example = {"image": images[:2]}
    path = export(model, base_path, version=1, example=example, overwrite=True)
    files = {p: p.stat().st_size for p in path.rglob("*") if p.is_file()}
    sizes = {
        "saved_model_bytes": sum(files.values()),
        "weight_bytes": sum(
            size for p, size in files.items() if p.parent.name == "variables"
        ),
        "parameter_bytes": 4 * model.count_params(),
    }
    ratio = sizes["weight_bytes"] / sizes["parameter_bytes"]
    _say(f"{path}")
    _say(
        f"{sizes['saved_model_bytes']:,} bytes; its weights take "
        f"{sizes['weight_bytes']:,}, {ratio:.3f} x the parameters' "
        f"{sizes['parameter_bytes']:,}"
    )
    return path, sizes


def _fresh_process(path, images, expected):
    """Step 5: the largest difference between another process's answers and ours."""
    import numpy as np
    import tensorflow as tf

    _step(5, "A fresh process that imports only tensorflow answers the same")
    with tempfile.TemporaryDirectory() as folder:
        tf.io.write_file(f"{folder}/image", tf.io.serialize_tensor(images))
        done = subprocess.run(
            [sys.executable, "-I", "-c", CLIENT, path.absolute(), folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"The fresh process failed:\n{done.stdout}")
        difference = max(
            np.abs(
                tf.io.parse_tensor(tf.io.read_file(f"{folder}/{key}"), tf.float32)
                - value
            ).max()
            for key, value in expected.items()
        )
    _require_close(difference, "The fresh process")
    _say(
        f"{len(images)} test images: the largest difference in "
        f"{len(expected)} outputs is {difference:.1e}"
    )
    return float(difference)


def _serve(path, images, labels, expected):
    """Step 6: the local server, asked over both of its interfaces."""
    import numpy as np

    from .serving.client import connect
    from .serving.server import Server

    _step(6, "A local server, asked over REST and over gRPC")
    order = np.argsort(expected["predictive_entropy"])
    chosen = [*order[:2], *order[-3:]]  # two it is sure of, three it is not
    name = path.parent.name
    with Server({name: path.parent}, rest_port=0, grpc_port=0) as server:
        addresses = {"REST": server.rest_url, "gRPC": server.grpc_target}
        answers = {}
        for interface, address in addresses.items():
            client = connect(address)
            answers[interface] = client.predict(name, images[chosen])
            client.close()
    for interface, answer in answers.items():
        _say(f"{interface:4}  {addresses[interface]}")
        for key, value in answer.items():
            _require_close(np.abs(value - expected[key][chosen]).max(), interface)
    _say("")
    header = "".join(f"{f'entropy, {interface}':>15}" for interface in answers)
    _say(f"test digit  is  said  probability{header}")
    said = answers["REST"]["probabilities"].argmax(axis=1)
    for row, n in enumerate(chosen):
        probability = answers["REST"]["probabilities"][row, said[row]]
        entropies = "".join(
            f"{answer['predictive_entropy'][row]:>15.4f}" for answer in answers.values()
        )
        _say(f"{n:>10}{labels[n]:>4}{said[row]:>6}{probability:>13.4f}{entropies}")
    _say("stopped")


def _figure(path, images, labels, answers):
    """Step 7."""
    from .figures import draw

    _step(7, "Figure: how far to trust the confidence, and where the ensemble doubts")
    _say(f"{draw(path, images, labels, answers)}")


def _require_close(difference, who):
    if not difference <= TOLERANCE:
        raise RuntimeError(
            f"{who} answers otherwise than the model: expected a difference of at most "
            f"{TOLERANCE}. Received: {difference}"
        )


def _write_results(path, figures, sizes, difference):
    """Writes what was measured, whole or not at all."""
    from .results import provenance

    results = {
        "test": figures,
        **sizes,
        "fresh_process_difference": difference,
        **provenance(),
    }
    placing.write(path, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    leave(main())
