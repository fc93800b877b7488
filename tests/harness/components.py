"""What is public, which check each kind of component gets, and where its test is."""

import inspect
import pathlib

import keras

import kzoo.layers
import kzoo.optimizers
import kzoo.zoo
import kzoo.zoo.losses
import kzoo.zoo.metrics

from .check import Check

ROOT = pathlib.Path(__file__).parents[2]
INDEXES = {
    "layers": kzoo.layers,
    "optimizers": kzoo.optimizers,
    "zoo": kzoo.zoo,
    "zoo/losses": kzoo.zoo.losses,
    "zoo/metrics": kzoo.zoo.metrics,
}
# The kinds of components, with the harness's check of each.
# (A model around another one is not built from arguments alone: it has its own tests.)
KINDS = {
    keras.Model: ("model", None),
    keras.layers.Layer: ("layer", "check_layer"),
    keras.optimizers.Optimizer: ("optimizer", "check_optimizer"),
    keras.metrics.Metric: ("metric", "check_metric"),
    keras.losses.Loss: ("loss", "check_loss"),
}


def public(index):
    """The public names of an index that are the package's own."""
    names = getattr(index, "__all__", None) or [
        n for n in vars(index) if not n.startswith("_")
    ]
    for name in names:
        thing = getattr(index, name)
        if not inspect.ismodule(thing) and thing.__module__.startswith("kzoo."):
            yield name, thing


PUBLIC = {
    f"{index}:{name}": thing
    for index, module in INDEXES.items()
    for name, thing in public(module)
    if name != "require_supported"
}


def kind_of(thing):
    """The kind of a public name: what its docstring must have, and its check."""
    if not inspect.isclass(thing):
        return "function", None
    for base, kind in KINDS.items():
        if issubclass(thing, base):
            return kind
    return "class", None


def mirrored(thing):
    """The tests of a thing's module, and of those of its bases, that there are."""
    modules = [base.__module__ for base in getattr(thing, "__mro__", (thing,))]
    files = [mirror(name) for name in modules if name.startswith("kzoo.")]
    return [file for file in dict.fromkeys(files) if file.exists()]


def mirror(module):
    """Where the test of a module of the package must be."""
    *folders, name = module.split(".")[1:]
    return ROOT.joinpath("tests", *folders, f"test_{name}.py")


def check_everything(where, files):
    """Requires each component whose tests have run to have been checked.

    Args:
        where: The session.
        files: The test files that have run as a whole.
    """
    from kzoo.zoo import info, list_models

    tested = {
        thing.__name__: mirrored(thing)
        for thing in PUBLIC.values()
        if kind_of(thing)[1] is not None
    }
    tested |= {name: mirrored(info(name).entry_point) for name in list_models()}
    with Check("everything") as check:
        missing = [
            name
            for name, tests in tested.items()
            if set(tests) <= set(files) and name not in where.checked
        ]
        check.that(
            not missing, "expected a contract call of every public component", missing
        )
