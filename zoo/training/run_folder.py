"""The folder of a training run: what was asked, how far it got, what came out.

    config.json            what was asked; one folder holds one configuration
    snapshots/epoch-0007/  everything training goes on from, after 7 epochs
    backup/                where keras.callbacks.BackupAndRestore works
    best.keras             the model of the epoch with the best validation NLL
    tensorboard/           for TensorBoard
    model.keras            the trained model
    history.json           figures of every epoch; present when the run is finished

Whatever a later run relies on appears in one rename.
"""

import contextlib
import fcntl
import itertools
import json
import os
import shutil
import time
from pathlib import Path

import keras
import numpy as np

from .. import placing

SHOWN = 5  # differences between two configurations


class RunFolder:
    """One run's folder.

    Args:
        path: The folder; made when it is opened.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.snapshots = self.path / "snapshots"
        self.backup = self.path / "backup"
        self.best = self.path / "best.keras"
        self.tensorboard = self.path / "tensorboard"
        self.model = self.path / "model.keras"
        self.history = self.path / "history.json"

    @contextlib.contextmanager
    def open(self, config, resume):
        """Holds the folder for a run with this configuration.

        Args:
            config: What JSON can hold.
            resume: Whether to go on from what is there, which must have the same
                configuration; else it is removed.

        Raises:
            ValueError: If the folder has another run's configuration, or files that
                are no run's at all.
            RuntimeError: If another process has the folder open.
        """
        if self.path.is_dir() and not self.config.exists():
            ours = {"lock", "config.json.partial"}
            others = sorted({x.name for x in self.path.iterdir()} - ours)
            if others:
                raise ValueError(
                    "`run_dir` must be a folder of an earlier run, empty, or new. "
                    f"Received: {str(self.path)!r}, which holds {others[:5]}"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(
                    f"Another process is training in {str(self.path)!r}."
                ) from None
            if self.config.exists():
                if not resume:
                    self._clear()
                self._check_same(config)
            write_json(self.config, config)
            yield self

    def _clear(self):
        # First in one step what a run could go on from, last the configuration: until
        # then the folder is known as a run's.
        self.history.unlink(missing_ok=True)
        discarded = self.path / "discarded"
        _remove(discarded)
        if self.snapshots.exists():
            os.rename(self.snapshots, discarded)
        for path in (discarded, self.backup, self.tensorboard):
            _remove(path)
        for path in (self.model, self.best, self.config):
            path.unlink(missing_ok=True)

    def _check_same(self, config):
        if not self.config.exists():
            return
        old, new = read_config(self.config), json.loads(json.dumps(config))
        changes = [
            f"{key}={_short(new)} instead of {_short(old)}"
            for key, old, new in _differences(old, new)
        ]
        if changes:
            more = len(changes) - SHOWN
            shown = changes[:SHOWN] + [f"{more} more"] * (more > 0)
            raise ValueError(
                f"{str(self.path)!r} holds a run with another configuration. Expected "
                "the same, another `run_dir`, or `resume=False` to start anew there. "
                f"Received: {', '.join(shown)}"
            )

    def finished(self):
        """Returns the record of the finished run, or None."""
        if not self.history.exists():
            return None
        return json.loads(self.history.read_text())

    def finish(self, model, record):
        """Puts the trained model and then its record in place."""
        # A name that Keras takes for its format, and that is not yet the model's.
        partial = self.path / "partial.keras"
        model.save(partial)
        placing.place(partial, self.model)
        write_json(self.history, record)
        for path in (self.snapshots, self.backup):
            _remove(path)

    def latest(self):
        """Returns the folder of the latest snapshot, or None."""
        return max(self.snapshots.glob("epoch-*"), default=None)

    def progress(self):
        """Returns the number of epochs that are done, and the record of them."""
        snapshot = self.latest()
        if snapshot is None:
            return 0, {"seconds": 0.0, "history": {}}
        record = json.loads((snapshot / "record.json").read_text())
        return int(snapshot.name.removeprefix("epoch-")), record


class Snapshots(keras.callbacks.BackupAndRestore):
    """Keras's backup, completed and made whole.

    `BackupAndRestore` writes its two files in place, one after the other, so an
    interruption between them, or within one, leaves a state that is none. Here a
    copy, made after both are closed, appears in one rename; training goes on from
    the copy. It also holds what Keras leaves out: the states of the layers' random
    generators and of `stateful` layers from here, and the figures of the epochs so far.

    Args:
        folder: The `RunFolder`.
        record: The record of the run so far, which is kept up to date.
    """

    def __init__(self, folder, record):
        super().__init__(str(folder.backup), delete_checkpoint=False)
        self.folder, self.record = folder, record

    def on_train_begin(self, logs=None):
        """Restores the latest snapshot."""
        _remove(self.folder.backup)
        snapshot = self.folder.latest()
        if snapshot:
            shutil.copytree(snapshot, self.folder.backup)
        super().on_train_begin(logs)
        if snapshot:
            states = np.load(snapshot / "random_states.npz")
            for name, variable in _random_states(self.model).items():
                variable.assign(states[name])
        self._since = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Makes a snapshot."""
        super().on_epoch_end(epoch, logs)
        now = time.perf_counter()
        self.record["seconds"] += now - self._since
        self._since = now
        for name, value in (logs or {}).items():
            self.record["history"].setdefault(name, []).append(float(value))
        partial = self.folder.snapshots / "partial"
        _remove(partial)
        shutil.copytree(self.folder.backup, partial)
        states = _random_states(self.model)
        np.savez(
            partial / "random_states.npz",
            **{k: keras.ops.convert_to_numpy(v) for k, v in states.items()},
        )
        write_json(partial / "record.json", self.record)
        snapshot = self.folder.snapshots / f"epoch-{epoch + 1:06}"
        placing.place(partial, snapshot)
        for old in self.folder.snapshots.iterdir():
            if old != snapshot:
                _remove(old)


def _random_states(model):
    """Returns the states of random generators and the like, which Keras saves not."""
    weights = {id(v) for v in model.weights}
    states = [v for v in model.variables if id(v) not in weights]
    return {f"state{i}": v for i, v in enumerate(states)}


def _remove(folder):
    if folder.exists():
        shutil.rmtree(folder)


def write_json(path, value):
    """Writes a JSON file that is there whole or not at all."""
    placing.write(path, json.dumps(value, indent=1) + "\n")


def read_config(path):
    """Returns the configuration of a run, a dict.

    Args:
        path: The run's `config.json`.

    Raises:
        ValueError: If the file holds something else.
    """
    try:
        config = json.loads(Path(path).read_bytes())
    except ValueError:  # also for bytes that are no text
        config = None
    if not isinstance(config, dict):
        raise ValueError(
            "Expected a run's configuration, a JSON object. "
            f"Received: {str(path)!r}, which holds none"
        )
    return config


def _differences(old, new, key=""):
    """Yields (key, old, new) for every value that differs, however deep it lies."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            below = f"{key}.{name}" if key else name
            yield from _differences(old.get(name), new.get(name), below)
    elif isinstance(old, list) and isinstance(new, list):
        for i, pair in enumerate(itertools.zip_longest(old, new)):
            yield from _differences(*pair, f"{key}[{i}]")
    elif old != new:
        yield key, old, new


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
