"""Repeats, on this process's backend, what another backend computed.

Usage: other_backend.py FOLDER ANSWERS. Writes `{case: null or what is wrong}`.
"""

import importlib
import importlib.util
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import keras
import numpy as np

from harness.check import Check, arrays
from harness.training import QUICK, attach, forward, set_mode


def load_classes(imports):
    """Imports the modules that register a case's classes."""
    for module, file in imports:
        if module in sys.modules:
            continue
        if file is None:
            importlib.import_module(module)
            continue
        spec = importlib.util.spec_from_file_location(module, file)
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])


def leaves(values, prefix):
    """The arrays under `prefix/0`, `prefix/1`, ..."""
    found = []
    while f"{prefix}/{len(found)}" in values:
        found.append(values[f"{prefix}/{len(found)}"])
    return found


def repeat(case):
    """Raises unless this backend finds one case's numbers again."""
    load_classes(json.loads((case / "imports.json").read_text()))
    values = np.load(case / "expected.npz")
    model = attach(keras.saving.load_model(case / "model.keras"))
    set_mode(model, QUICK)

    def pair(prefix):
        x, y = leaves(values, f"{prefix}/x"), leaves(values, f"{prefix}/y")
        return (
            keras.tree.pack_sequence_as(model.input, x),
            keras.tree.pack_sequence_as(model.output, y),
        )

    def compare(kind, what, received, expected):
        if kind in values["random"]:
            check.finite(what, received)
            received, expected = (
                [a.shape for a in arrays(v)] for v in (received, expected)
            )
            check.equal(f"the shapes of {what}", received, expected)
        else:
            check.close(what, received, expected, float(values["tol"]))

    with Check("other backend") as check:
        asked = 0
        if "outputs/x/0" in values:
            x, y = pair("outputs")
            compare("outputs", "outputs", forward(model, x, False)[0], y)
            asked += 1
        if "logs/values" in values:
            x, y = leaves(values, "logs/x"), leaves(values, "logs/y")
            logs = model.test_on_batch(x[0], y[0])
            compare("logs", "metrics", np.array(logs), values["logs/values"])
            asked += 1
        losses = []
        while f"steps/{len(losses)}/x/0" in values:
            loss = model.train_on_batch(*pair(f"steps/{len(losses)}"))
            losses.append(np.asarray(loss).ravel()[0])
        if losses:
            weights = leaves(values, "weights")
            compare("steps", "losses", np.array(losses), values["losses"])
            compare(
                "steps", f"weights after {len(losses)} steps", model.weights, weights
            )
            asked += 1
        check.that(asked, "expected something to repeat", "nothing")


def main():
    """Repeats every case and writes what is wrong with each."""
    folder, answers = map(pathlib.Path, sys.argv[1:])
    found = {}
    for case in sorted(folder.iterdir()):
        try:
            repeat(case)
            found[case.name] = None
        except Exception as error:  # Reported, and the next case still runs.
            found[case.name] = f"{type(error).__name__}: {error}"
    answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
