"""Registration and configuration: what layers, optimizers and metrics share."""

import copy
import inspect
import json

import keras

from .check import Check
from .docs import own_arguments


def check_registration(thing):
    """Requires `kzoo>Name`, which is what saved files refer to."""
    with Check("registration") as check:
        check.equal(
            "the name Keras registers it under",
            keras.saving.get_registered_name(thing),
            f"kzoo>{thing.__name__}",
        )


def check_config(instance, given, make):
    """Requires a complete config that rebuilds an equal object.

    Args:
        instance: The object, made with the arguments `given`.
        given: A dict of constructor arguments, or None when they are not known.
        make: A callable that makes another one from a dict of arguments, or
            None.
    """
    with Check("config") as check:
        config = instance.get_config()
        for name in constructor_arguments(type(instance)):
            check.that(
                name in config or is_refused(name, given, make),
                f"expected get_config to hold the constructor argument {name!r}",
                sorted(config),
            )
        for name, value in (given or {}).items():
            kept = config[name]
            if isinstance(value, (bool, int, float, str)) and isinstance(
                kept, (bool, int, float, str)
            ):
                check.equal(f"get_config()[{name!r}]", kept, value)
        for name, value in (given or {}).items():
            check_argument_is_kept(check, name, value, config, given, make)

        before = copy.deepcopy(config)
        rebuilt = type(instance).from_config(config)
        if not is_keras(type(instance).from_config):
            check.equal("the dict from_config was given, afterwards", config, before)
        check.equal("the rebuilt object's config", rebuilt.get_config(), before)

    with Check("serialization") as check:
        text = json.dumps(keras.saving.serialize_keras_object(instance))
        check.equal(
            "the registered name in the serialized form",
            json.loads(text)["registered_name"],
            f"kzoo>{type(instance).__name__}",
        )
        rebuilt = keras.saving.deserialize_keras_object(json.loads(text))
        check.that(
            type(rebuilt) is type(instance),
            f"expected deserialize to give a {type(instance).__name__}",
            type(rebuilt).__name__,
        )
        check.equal(
            "the config after serialize, JSON and deserialize",
            canonical(rebuilt.get_config()),
            canonical(config),
        )


def is_refused(name, given, make):
    """Whether a constructor does not take an argument that one of its bases takes."""
    try:
        make and make({**(given or {}), name: None})
    except TypeError:
        return True
    except ValueError:
        pass
    return False


def check_argument_is_kept(check, name, value, config, given, make):
    """Requires the config to differ from that of the argument's default."""
    if make is None:
        return
    try:
        default = make({k: v for k, v in given.items() if k != name})
    except (TypeError, ValueError):
        return  # The argument has no default, or none that fits the others.
    unlike = default.get_config()
    if not same_argument(type(default), name, value):
        check.that(
            canonical(config[name]) != canonical(unlike[name]),
            f"expected get_config to hold the given {name}={value!r}",
            f"{config[name]!r}, which is what the default gives",
        )


def same_argument(cls, name, value):
    """Whether `value` is the default that the constructor states for `name`."""
    for base in own_bases(cls):
        parameter = inspect.signature(base.__init__).parameters.get(name)
        if parameter is not None:
            return canonical(parameter.default) == canonical(value)
    return True


def constructor_arguments(cls):
    """Every argument that a component's own classes (not Keras's) take."""
    return [name for base in own_bases(cls) for name in own_arguments(base)]


def own_bases(cls):
    """The classes of the inheritance that define `__init__` and are not Keras's."""
    return [
        base
        for base in cls.__mro__
        if "__init__" in base.__dict__ and base is not object and not is_keras(base)
    ]


def is_keras(thing):
    """Whether a class or function is Keras's own."""
    return thing.__module__.split(".")[0] == "keras"


def canonical(config):
    """A config as text: tuples and lists are one thing, keys are sorted."""
    return json.dumps(
        keras.saving.serialize_keras_object(config), sort_keys=True, default=repr
    )


def mentions(config, key):
    """Whether a nested config has `key` anywhere."""
    if isinstance(config, dict):
        return key in config or any(mentions(v, key) for v in config.values())
    if isinstance(config, (list, tuple)):
        return any(mentions(v, key) for v in config)
    return False
