"""The models of the zoo by name: register, list, describe, build."""

import difflib
import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass, field

_MODELS = {}


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a registered model without building it.

    Attributes:
        name: The name to `build` it by.
        entry_point: The function that builds it; its arguments are `build`'s
            overrides.
        description: One sentence.
        dataset: Name of the data set it is made for, as `kzoo.zoo.load` takes it.
        task: What it predicts.
        input_shape: Shape of one example.
        paper: Address of the paper that the model comes from.
        backends: The Keras backends it runs on.
        recipe: The arguments of `kzoo.zoo.train` it was tuned with.
    """

    name: str
    entry_point: Callable
    description: str
    dataset: str
    task: str
    input_shape: tuple
    paper: str
    backends: tuple = ("tensorflow", "jax")
    recipe: dict = field(default_factory=dict)


def register_model(
    name,
    *,
    description,
    dataset,
    input_shape,
    paper,
    task="classification",
    backends=("tensorflow", "jax"),
    recipe=None,
):
    """Decorates a function that returns a Keras model, to be built by name.

    Args:
        name: The model's name: lower-case letters, digits and underscores. It also
            names folders and, in serving, addresses.
        description: One sentence.
        dataset: Name of the data set the model is made for.
        input_shape: Shape of one example, as the data set gives it.
        paper: Address of the paper.
        task: What the model predicts. Defaults to `"classification"`, whose models
            end in logits; those of `"regression"` end in
            `kzoo.layers.MeanAndVariance`; those of `"translation"` are what
            `kzoo.zoo.models.attention_seq2seq.translator` takes, and examples are
            sources; those of `"language modelling"` go from ids `[B, T]` to logits
            `[B, T, V]` of the ids that follow.
        backends: The Keras backends it runs on. Defaults to all that kzoo supports.
        recipe: dict of arguments of `kzoo.zoo.train`, which are then its defaults
            for this model.

    Returns:
        A decorator that returns the function as it is.

    Raises:
        ValueError: If the name is malformed or already taken.

    Example:

    An entry point is a function of keyword arguments with defaults:

        @register_model("resnet8_wide_digits", description=..., dataset="digits", ...)
        def resnet8_wide_digits(width=64, **overrides):
            return resnet((8, 8, 1), 10, depth=8, width=width, **overrides)

    >>> from kzoo.zoo import info
    >>> info("resnet8_digits").entry_point.__name__
    'resnet8_digits'
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", name):
        raise ValueError(
            "A model's name must consist of lower-case letters, digits and "
            f"underscores. Received: name={name!r}"
        )

    def register(entry_point):
        if name in _MODELS and not _is_same(_MODELS[name].entry_point, entry_point):
            other = _MODELS[name].entry_point
            raise ValueError(
                "A model's name can be registered once. Received: "
                f"name={name!r}, which {other.__module__}.{other.__qualname__} has"
            )
        _MODELS[name] = ModelInfo(
            name=name,
            entry_point=entry_point,
            description=description,
            dataset=dataset,
            task=task,
            input_shape=tuple(input_shape),
            paper=paper,
            backends=tuple(backends),
            recipe=dict(recipe or {}),
        )
        return entry_point

    return register


def _is_same(one, other):
    """Whether two entry points are one: a notebook's cell may be run again."""
    return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)


def list_models(pattern="*"):
    """Returns the sorted names of the registered models that match a pattern.

    Args:
        pattern: As in a shell: `*` and `?` stand for any characters.

    Example:

    >>> from kzoo.zoo import list_models
    >>> list_models("lenet5*")
    ['lenet5_digits', 'lenet5_flipout_digits']
    """
    _load()
    return sorted(fnmatch.filter(_MODELS, pattern))


def info(name):
    """Returns the `ModelInfo` of a registered model.

    Args:
        name: The model's name.

    Raises:
        ValueError: If there is no such model; it names similar ones.

    Example:

    >>> from kzoo.zoo import info
    >>> info("resnet8_digits").input_shape
    (8, 8, 1)
    """
    _load()
    if name in _MODELS:
        return _MODELS[name]
    similar = difflib.get_close_matches(str(name), _MODELS, n=3, cutoff=0.5)
    hint = " or ".join(map(repr, similar)) if similar else f"one of {list_models()}"
    raise ValueError(f"No model has this name. Expected {hint}? Received: {name!r}")


def build(name, /, **overrides):
    """Builds a registered model, with fresh weights.

    Args:
        name: The model's name.
        **overrides: Arguments of its entry point, in place of its defaults.

    Returns:
        A `keras.Model`.

    Raises:
        ValueError: If there is no such model; it names similar ones.
        TypeError: If the entry point knows no such argument.

    Example:

    >>> from kzoo.zoo import build
    >>> build("resnet8_digits", width=4).output_shape
    (None, 10)
    """
    return info(name).entry_point(**overrides)


def _load():
    """Imports the modules whose models register themselves."""
    from . import models  # noqa: F401
