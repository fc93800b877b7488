"""Measured results as JSON lines: the figures, the versions and the machine."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path

PACKAGES = (
    "tensorflow",
    "keras",
    "jax",
    "numpy",
    "tensorflow-probability",
    "tf_keras",
)


def provenance():
    """Returns the versions and the machine that a measurement stands on.

    Returns:
        dict with `versions` (Python, kzoo and the numerical packages) and
        `machine` (operating system, processor, number of usable cores).
    """
    from .. import __version__

    versions = {"python": platform.python_version(), "kzoo": __version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that this environment does without
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return {
        "versions": versions,
        "machine": {
            "system": platform.system(),
            "cpu": cpu,
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
        },
    }


def read(path):
    """Returns the records of a JSON-lines file, oldest first; none if it is absent."""
    path = Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def append(path, record):
    """Adds `record` to a JSON-lines file as one line, with its provenance.

    The line is written by a single write, so that a reader or an interruption
    never sees half of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps({**record, **provenance()}, sort_keys=True) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
