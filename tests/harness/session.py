"""What one test session gathers for the processes that run at its end."""

import functools
import json
import pathlib
import time

import keras


class Session:
    """A folder of cases and whether the full cross product was asked for.

    Args:
        folder: Where exports and cases go; a temporary folder of pytest's.
        full: Whether to run the full cross product (`--all`).
    """

    def __init__(self, folder, full=False):
        self.folder = pathlib.Path(folder)
        self.full = full
        self.counts = {"exports": 0, "cases": 0}
        self.seconds = []
        self.checked = set()
        # The backends agree if TensorFlow, run eagerly, finds JAX's numbers again; the
        # other way, for which JAX compiles everything, is for the full product.
        self.repeats = full or keras.backend.backend() == "jax"

    def new(self, kind, name):
        """Makes the folder of one more export or case."""
        self.counts[kind] += 1
        path = self.folder / kind / f"{self.counts[kind]:04d}_{name}"
        path.mkdir(parents=True)
        (path / "name.json").write_text(json.dumps(name))
        return path


current = None


def get():
    """The running session, which conftest sets."""
    if current is None:
        raise RuntimeError(
            "expected tests/conftest.py to have set harness.session.current; "
            "Received a call outside a pytest session"
        )
    return current


def noted(check):
    """Makes the running session note what a check was called of, and how long it took.

    Its first argument is a class, a registered name, or a function that makes one.
    """

    @functools.wraps(check)
    def call(thing, *args, **kwargs):
        start = time.perf_counter()
        check(thing, *args, **kwargs)
        get().seconds.append(time.perf_counter() - start)
        made = thing if isinstance(thing, (str, type)) else type(thing())
        get().checked.add(getattr(made, "__name__", made))

    return call
