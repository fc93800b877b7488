"""Models, metrics, data, training, export and serving built on kzoo layers."""

import importlib

from .export import export
from .registry import ModelInfo, build, info, list_models, register_model

# Loaded on first use, so that listing models needs neither tensorflow-datasets nor
# whatever else the function would bring with it. (Not `export`, which its own module
# of that name would hide once it is imported.)
_LAZY = {
    "EvolutionStrategies": ".training",
    "Lifelong": ".training",
    "MemberMetrics": ".training",
    "OutOfDistribution": ".training",
    "classification": ".predictive",
    "diversity_report": ".diversity",
    "download": ".hub",
    "evaluate": ".training",
    "fit_temperature": ".calibration",
    "load": ".datasets",
    "resolve": ".hub",
    "train": ".training",
}

__all__ = [
    "EvolutionStrategies",
    "Lifelong",
    "MemberMetrics",
    "ModelInfo",
    "OutOfDistribution",
    "build",
    "classification",
    "datasets",
    "diversity_report",
    "download",
    "evaluate",
    "export",
    "fit_temperature",
    "info",
    "list_models",
    "load",
    "losses",
    "metrics",
    "models",
    "register_model",
    "resolve",
    "train",
    "training",
]


def __getattr__(name):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    if name in __all__:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
