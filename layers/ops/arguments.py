"""Checks of the arguments that constructors take."""

import numbers


def is_integer(value):
    """Whether a value is an integer, Python's or NumPy's; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def integer(name, value, least=1):
    """Returns an argument that must be an integer, as Python's.

    Args:
        name: The argument's name, for the message.
        value: What was given for it.
        least: The smallest value it may have.

    Raises:
        ValueError: If it is no integer, or less.
    """
    if is_integer(value) and value >= least:
        return int(value)
    raise ValueError(
        f"expected `{name}` to be an integer of at least {least}. "
        f"Received: {name}={value!r}"
    )
