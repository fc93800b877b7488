"""Research layers and optimizers for Keras 3, composed into models you can serve."""

import importlib

from ._version import __version__

__all__ = ["__version__", "layers", "optimizers", "zoo"]


def __getattr__(name):
    # Loaded on first use: `import kzoo` alone must not cost the seconds that
    # importing a Keras backend takes.
    if name in ("layers", "optimizers", "zoo"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
