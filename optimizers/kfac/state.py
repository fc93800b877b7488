"""Values of variables, and changes of them that are due at some updates only."""

import keras
from keras import ops


def tensors(variables):
    """The values of variables."""
    return [ops.convert_to_tensor(variable) for variable in variables]


def assign(variables, values):
    """Gives variables values."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def all_finite(values):
    """Whether all numbers of a list of tensors are finite."""
    found = [ops.all(ops.isfinite(value)) for value in values]
    return ops.all(ops.stack(found)) if found else ops.convert_to_tensor(True)


def where_due(due, new, old):
    """Returns `new()` if `due` is true, else `old`."""
    if keras.backend.backend() == "jax":
        import jax

        # Run eagerly, a conditional would be compiled anew each time.
        if not isinstance(due, jax.core.Tracer):
            return new() if due else old
    return new() if due is True else ops.cond(due, new, lambda: old)


def change_where_due(due, variables, new):
    """Gives variables the values `new()` if `due` is true."""
    assign(variables, where_due(due, new, tensors(variables)))
