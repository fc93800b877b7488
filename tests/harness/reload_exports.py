"""Answers every SavedModel of a folder, in a process that knows only TensorFlow.

Usage: reload_exports.py FOLDER ANSWERS. Writes `{case: null or what is wrong}`.
"""

import json
import pathlib
import sys

import numpy as np

sys.modules["kzoo"] = None  # An import of it fails from here on.
import tensorflow as tf  # noqa: E402

sys.modules["keras"] = None  # TensorFlow imports it; nobody else shall.


def wrong(case):
    """What is wrong with one export, or None."""
    loaded = tf.saved_model.load(str(case / "saved_model"))
    questions = sorted(case.glob("*.npz"))
    if not questions:
        return "no question was recorded for it"
    for question in questions:
        values = np.load(question)
        part = {
            kind: {
                key.removeprefix(f"{kind}/"): values[key]
                for key in values.files
                if key.startswith(f"{kind}/")
            }
            for kind in ("inputs", "outputs")
        }
        signature = loaded.signatures[question.name.split(".")[0]]
        answer = signature(**{k: tf.constant(v) for k, v in part["inputs"].items()})
        if set(answer) != set(part["outputs"]):
            return f"outputs {sorted(answer)}, expected {sorted(part['outputs'])}"
        for name, expected in part["outputs"].items():
            received = tf.cast(answer[name], expected.dtype).numpy()
            if received.shape != expected.shape:
                return f"{name} has shape {received.shape}, expected {expected.shape}"
            tol = float(values["tol"])
            same = np.isclose(received, expected, rtol=tol, atol=tol, equal_nan=True)
            if not same.all():
                gap = np.abs(received - expected).max()
                return f"{question.name}: {name} differs by up to {gap:g}"
    return None


def main():
    """Answers every case and writes what is wrong with each."""
    folder, answers = map(pathlib.Path, sys.argv[1:])
    found = {}
    for case in sorted(folder.iterdir()):
        try:
            found[case.name] = wrong(case)
        except Exception as error:  # Reported, and the next case still runs.
            found[case.name] = f"{type(error).__name__}: {error}"
    answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
