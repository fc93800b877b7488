"""Exports and saved models, answered again by fresh processes.

The checks leave their exports and saved models in the session's folder; at the
session's end one process that imports only TensorFlow answers every export, and one
process on the other backend repeats every saved model's outputs and training steps.
"""

import inspect
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np

from . import session
from .check import Check, ContractError, arrays

HERE = pathlib.Path(__file__).parent
OTHER_BACKEND = {"tensorflow": "jax", "jax": "tensorflow"}[keras.backend.backend()]


def record_export(name, model, batches):
    """Exports a model (TensorFlow only), with its answers to some inputs."""
    if keras.backend.backend() != "tensorflow":
        return
    import tensorflow as tf

    folder = session.get().new("exports", name)
    with Check("export"):
        signature = [tf.TensorSpec(x.shape, x.dtype, name=x.name) for x in model.inputs]

        @tf.function(input_signature=signature)
        def serve(*inputs):
            outputs = model(pack(model.input, inputs), training=False)
            return output_names(keras.tree.flatten(outputs))

        serve.get_concrete_function()
        archive = keras.export.ExportArchive()
        archive.add_endpoint("serve", serve)
        archive.write_out(str(folder / "saved_model"), verbose=False)
        for i, batch in enumerate(batches):
            names = [x.name for x in model.inputs]
            inputs = dict(zip(names, arrays(batch), strict=True))
            outputs = output_names(arrays(model(batch, training=False)))
            record_answer(folder, "serve", i, inputs, outputs)


def record_answer(folder, signature, i, inputs, outputs, tol=1e-5):
    """Writes what the SavedModel beside it must answer.

    Args:
        folder: A folder of the session, with the SavedModel in `saved_model/`.
        signature: The name of the signature to ask.
        i: The question's place: questions are asked in order.
        inputs: A dict of arrays by name.
        outputs: The dict of arrays it must answer.
        tol: The tolerance.
    """
    values = {f"inputs/{k}": v for k, v in inputs.items()}
    values |= {f"outputs/{k}": v for k, v in outputs.items()}
    np.savez(folder / f"{signature}.{i}.npz", tol=tol, **values)


def record_case(
    name, model, classes, *, outputs=None, steps=None, logs=None, random=(), tol=1e-5
):
    """Saves a compiled model with what the other backend must find again, if it is run.

    Args:
        name: The component's name.
        model: The model, in the state from which the other backend starts.
        classes: The classes that the other process must have imported.
        outputs: None, or `(x, y)`: what the model answers in inference.
        steps: None, or a callable that trains the model and returns the batches
            `(x, y)` and their losses.
        logs: None, or `(x, y, values)`: what `test_on_batch` gives.
        random: Which of "outputs" and "steps" draw random numbers: the other
            backend, which draws others, compares only their shapes.
        tol: The tolerance.
    """
    if not session.get().repeats:
        return
    folder = session.get().new("cases", name)
    with Check("save"):
        model.save(folder / "model.keras")
    imports = [
        [c.__module__, None if is_ours(c) else inspect.getsourcefile(c)]
        for c in classes
        if c.__module__.split(".")[0] != "keras"
    ]
    (folder / "imports.json").write_text(json.dumps(imports))
    values = {"tol": tol, "random": np.array(random, dtype="U")}
    if outputs is not None:
        values |= named("outputs/x", outputs[0]) | named("outputs/y", outputs[1])
    if steps is not None:
        batches, losses = steps()
        for i, (x, y) in enumerate(batches):
            values |= named(f"steps/{i}/x", x) | named(f"steps/{i}/y", y)
        values["losses"] = losses
        values |= named("weights", model.weights)
    if logs is not None:
        values |= named("logs/x", logs[0]) | named("logs/y", logs[1])
        values["logs/values"] = logs[2]
    np.savez(folder / "expected.npz", **values)


def check_exports(where=None):
    """Requires a process that imports only TensorFlow to answer every export."""
    where = where or session.get()
    # It compiles as a user's would, whatever `make test` asked of this one.
    users = {"XLA_FLAGS": ""}
    return ask("fresh process", where, "exports", "reload_exports.py", users)


def check_other_backend(where=None):
    """Requires a process on the other backend to find the same numbers."""
    where = where or session.get()
    other = {"KERAS_BACKEND": OTHER_BACKEND}
    return ask("other backend", where, "cases", "other_backend.py", other)


def ask(name, where, kind, script, environment):
    """Runs a script over all cases of a kind; requires every one to be answered."""
    with Check(name) as check:
        written = sorted(path.name for path in (where.folder / kind).iterdir())
        check.equal("the number of cases", len(written), where.counts[kind])
        answers = where.folder / f"{kind}.json"
        done = subprocess.run(
            [sys.executable, HERE / script, where.folder / kind, answers],
            env={**os.environ, **environment},
            cwd=where.folder,
            capture_output=True,
            text=True,
            timeout=600,
        )
        check.that(
            done.returncode == 0, f"expected {script} to run", done.stderr[-3000:]
        )
        found = json.loads(answers.read_text())
        check.equal("the cases that were answered", sorted(found), written)
        wrong = {case: error for case, error in found.items() if error is not None}
        if wrong:
            lines = "\n".join(f"  {case}: {error}" for case, error in wrong.items())
            raise ContractError(name, f"expected equal answers; Received\n{lines}")
    return len(found)


def output_names(flat):
    """The outputs of an export by name."""
    return {f"output_{i}": y for i, y in enumerate(flat)}


def named(prefix, structure):
    """A structure's leaves as arrays under `prefix/0`, `prefix/1`, ..."""
    return {f"{prefix}/{i}": a for i, a in enumerate(arrays(structure))}


def is_ours(cls):
    """Whether a class lives in the package."""
    return cls.__module__.split(".")[0] == "kzoo"


def pack(structure, flat):
    """The flat leaves in a structure."""
    return keras.tree.pack_sequence_as(structure, list(flat))
