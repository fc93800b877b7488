"""Models on disk, their versions loaded and unloaded while requests go on."""

import contextlib
import enum
import logging
import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from .. import placing
from .servable import Servable
from .status import Code, ServingError, invalid

LOG = logging.getLogger("kzoo.serving")
# As TensorFlow Serving's URLs can name them.
MODEL_NAME = re.compile(r"[^/:\s]+")
LABEL = re.compile(r"\w+", re.ASCII)


class State(enum.Enum):
    """The states of a version, as in TensorFlow Serving's status answers."""

    START = 10
    LOADING = 20
    AVAILABLE = 30
    UNLOADING = 40
    END = 50


@dataclass(frozen=True)
class ModelConfig:
    """What to serve of one model.

    Args:
        base_path: The folder that holds the model's version folders, which are named
            by integers.
        versions: None for the newest one, `"all"`, or a sequence of integers.
        labels: {label: version}; a request may name a label instead of a version.

    Raises:
        ValueError: An argument is not as described.
    """

    base_path: str | os.PathLike
    versions: str | tuple | None = None
    labels: dict = field(default_factory=dict)

    def __post_init__(self):
        """Checks the arguments."""
        if self.versions is not None and self.versions != "all":
            valid = not isinstance(self.versions, str | int)
            if not (valid and self.versions and all(map(_is_version, self.versions))):
                raise ValueError(
                    "versions: expected None (the newest), 'all', or a sequence of "
                    f"integers. Received: {self.versions!r}"
                )
            object.__setattr__(self, "versions", tuple(self.versions))
        for label, version in self.labels.items():
            if not LABEL.fullmatch(label) or not _is_version(version):
                raise ValueError(
                    "labels: expected {letters, digits and underscores: an integer}. "
                    f"Received: {self.labels!r}"
                )


@dataclass
class Version:
    """One version of a model: its state, and the servable while it is available."""

    state: State = State.START
    error: ServingError | None = None
    servable: Servable | None = None
    # What the folder looked like when loading it failed.
    failed: tuple | None = None


class Model:
    """One model: finds its versions, loads and unloads them, lends them to requests.

    Args:
        name: The model's name in requests.
        config: A ModelConfig.
        load: Called with a version's folder; returns a loaded servable.
    """

    def __init__(self, name, config, load):
        self.name = name
        self.config = config
        self.versions = {}
        self.labels = dict(config.labels)
        self._load = load
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def lend(self, version=None, label=None):
        """Lends a version for the time of a `with` block; it stays loaded so long.

        Args:
            version: An integer, or None for the newest.
            label: A label instead.

        Yields:
            (version, servable).

        Raises:
            ServingError: No such version is available.
        """
        with self._lock:
            version = self._resolve(version, label)
            available = self._available()
            if version is None and available:
                version = max(available)
            if version not in available:
                raise ServingError(
                    Code.NOT_FOUND,
                    "Servable not found for request: "
                    + (
                        f"Latest({self.name})"
                        if version is None
                        else f"Specific({self.name}, {version})"
                    ),
                )
            servable = self.versions[version].servable
            servable.__enter__()
        try:
            yield version, servable
        finally:
            servable.__exit__()

    def status(self, version=None, label=None):
        """Returns the states of one version, or of all, newest first.

        Args:
            version: An integer, or None for all.
            label: A label instead.

        Returns:
            A list of (version, State, Code, message).

        Raises:
            ServingError: No such version was ever there.
        """
        with self._lock:
            version = self._resolve(version, label)
            chosen = {
                number: v
                for number, v in self.versions.items()
                if version in (None, number)
            }
            if not chosen:
                what = "any versions" if version is None else f"version {version}"
                raise ServingError(
                    Code.NOT_FOUND, f"Could not find {what} of model {self.name}"
                )
            return [
                (
                    number,
                    v.state,
                    v.error.code if v.error else Code.OK,
                    v.error.message if v.error else "",
                )
                for number, v in sorted(chosen.items(), reverse=True)
            ]

    def set_labels(self, labels):
        """Replaces the labels at once, for all requests that come after.

        Args:
            labels: {label: version}; the versions must be available, so that no
                request is dropped.

        Raises:
            ValueError: One of them is not.
        """
        labels = ModelConfig(self.config.base_path, labels=labels).labels
        with self._lock:
            for label, version in labels.items():
                if version not in self._available():
                    raise ValueError(
                        f"Expected labels of available versions of {self.name}: "
                        f"{sorted(self._available())}. Received: {label!r} for "
                        f"version {version}"
                    )
            self.labels = dict(labels)

    def refresh(self):
        """Looks at the folder once; loads what is new, unloads what is gone.

        A version is unloaded only when another one is available, or when the folder
        has no version left, and only after its last request. A version that did not
        load is tried again when its folder has changed. Where the newest one is wanted
        and does not load, an older one serves until it does.
        """
        found = self._found()
        if found is None:  # the whole folder is away: perhaps it comes back
            return
        wanted = self._wanted(found)
        for number in sorted(wanted, reverse=True):
            self._bring_up(number, found[number])
        if self.config.versions is None:
            for number in sorted(found, reverse=True):
                if self._available():
                    break
                self._bring_up(number, found[number])
        with self._lock:
            available = self._available()
            gone = available - wanted if not wanted or available & wanted else set()
            for number in self.versions.keys() - wanted - available:
                self.versions[number].state = State.END
        for number in sorted(gone):
            self._take_down(number)

    def close(self):
        """Unloads all versions, each after its last request."""
        with self._lock:
            available = self._available()
        for number in available:
            self._take_down(number)

    def _found(self):
        """{version: folder} on the disk, or None when there is no base folder."""
        base = Path(self.config.base_path)
        found = {}
        try:
            for entry in base.iterdir():
                # One spelling a version: "01" and "1" would be the same to a client.
                version = placing.version_of(entry.name)
                if version is not None and entry.is_dir():
                    found[version] = entry
        except OSError:
            return None
        return found

    def _wanted(self, found):
        if self.config.versions is None:
            return {max(found)} if found else set()
        if self.config.versions == "all":
            return set(found)
        return set(found) & set(self.config.versions)

    def _bring_up(self, number, folder):
        with self._lock:
            version = self.versions.setdefault(number, Version())
            if version.state is State.AVAILABLE:
                return
            looks = _looks(folder)
            if version.failed == looks:
                return
            version.state, version.error = State.LOADING, None
        try:
            servable = self._load(folder)
        except Exception as problem:
            # Whatever a folder holds, it must not keep others from being served.
            error = problem
            if not isinstance(problem, ServingError):
                bad = isinstance(problem, ValueError)
                code = Code.NOT_FOUND if bad else Code.UNKNOWN
                error = ServingError(code, str(problem) or type(problem).__name__)
            LOG.error("%s version %s: %s", self.name, number, error)
            LOG.debug("%s does not load", folder, exc_info=True)
            with self._lock:
                version.state, version.error = State.END, error
                version.failed = looks
            return
        with self._lock:
            version.servable, version.state = servable, State.AVAILABLE
            version.failed = None
        LOG.info("%s version %s is available", self.name, number)

    def _take_down(self, number):
        with self._lock:
            version = self.versions[number]
            version.state = State.UNLOADING
        version.servable.close()
        with self._lock:
            version.servable, version.state = None, State.END
        LOG.info("%s version %s is unloaded", self.name, number)

    def _available(self):
        return {n for n, v in self.versions.items() if v.state is State.AVAILABLE}

    def _resolve(self, version, label):
        if label is None:
            return version
        if label not in self.labels:
            raise invalid(f"Unrecognized servable version label: {label}")
        return self.labels[label]


def _is_version(value):
    return type(value) is int and 0 <= value <= placing.MAX_VERSION


def _looks(folder):
    """A folder's files with their sizes and times: changes when any of them does."""
    looks = []
    for root, folders, files in os.walk(folder):  # passes over what it cannot read
        for path in (os.path.join(root, name) for name in (*folders, *files)):
            with contextlib.suppress(OSError):  # removed meanwhile
                stat = os.stat(path)
                looks.append((path, stat.st_size, stat.st_mtime_ns))
    return tuple(sorted(looks))
