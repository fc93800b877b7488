"""Which value tests JAX repeats by default."""

import keras


def leave_to_tensorflow(config, items, folder, kept):
    """Deselects on JAX the value tests of what draws nothing, unless asked for.

    Outputs, losses and weights after steps are compared with TensorFlow's by the
    contract, which runs on both. So these values run on TensorFlow alone, or with
    `--all`, or by name (`file.py::test`).

    Args:
        config: pytest's.
        items: The tests that were collected, some of which go.
        folder: Name of the folder of tests that this is about.
        kept: Parts of the ids of tests that stay.
    """
    if keras.backend.backend() != "jax" or asked_for(config):
        return
    gone = [
        item
        for item in items
        if item.path.parent.name == folder
        and not any(name in item.nodeid for name in kept)
    ]
    config.hook.pytest_deselected(items=gone)
    items[:] = [item for item in items if item not in gone]


def asked_for(config):
    """Whether everything was asked for, or tests by name."""
    return config.option.all or any("::" in argument for argument in config.args)
