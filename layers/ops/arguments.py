"""Checks of the arguments that constructors take."""

import math
import numbers


def is_integer(value):
    """Whether a value is an integer, Python's or NumPy's; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value):
    """Whether a value is a real number, and not True or False."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def integer(name, value, least=1, most=math.inf):
    """Returns an argument that must be an integer, as Python's.

    Args:
        name: The argument's name, for the message.
        value: What was given for it.
        least: The smallest value it may have.
        most: The largest.

    Raises:
        ValueError: If it is no integer, or not within these bounds.
    """
    if is_integer(value) and least <= value <= most:
        return int(value)
    bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
    raise ValueError(
        f"expected `{name}` to be an integer {bounds}. Received: {name}={value!r}"
    )


def finite(name, value):
    """Returns an argument that must be a finite number, as a float.

    Args:
        name: The argument's name, for the message.
        value: What was given for it.

    Raises:
        ValueError: If it is none.
    """
    if is_number(value) and math.isfinite(value):
        return float(value)
    raise ValueError(
        f"expected `{name}` to be a finite number. Received: {name}={value!r}"
    )


def positive(name, value):
    """Returns an argument that must be a finite number above 0, as a float.

    Args:
        name: The argument's name, for the message.
        value: What was given for it.

    Raises:
        ValueError: If it is none.
    """
    if is_number(value) and 0 < value < math.inf:
        return float(value)
    raise ValueError(
        f"expected `{name}` to be a finite number above 0. Received: {name}={value!r}"
    )


def nonnegative(name, value):
    """Returns an argument that must be a finite number of at least 0, as a float.

    Args:
        name: The argument's name, for the message.
        value: What was given for it.

    Raises:
        ValueError: If it is none.
    """
    if is_number(value) and 0 <= value < math.inf:
        return float(value)
    raise ValueError(
        f"expected `{name}` to be a finite number of at least 0. "
        f"Received: {name}={value!r}"
    )


def rate(name, value):
    """Returns an argument that must be a part of 1, such as dropout's, as a float.

    Args:
        name: The argument's name, for the message.
        value: What was given for it.

    Raises:
        ValueError: If it is no number of at least 0 and below 1.
    """
    if is_number(value) and 0 <= value < 1:
        return float(value)
    raise ValueError(
        f"expected `{name}` to be a number of at least 0 and below 1. "
        f"Received: {name}={value!r}"
    )


def share(name, value):
    """Returns an argument that must be a part of 1 or all of it, as a float.

    Args:
        name: The argument's name, for the message.
        value: What was given for it.

    Raises:
        ValueError: If it is no number above 0 and at most 1.
    """
    if is_number(value) and 0 < value <= 1:
        return float(value)
    raise ValueError(
        f"expected `{name}` to be a number above 0 and at most 1. "
        f"Received: {name}={value!r}"
    )
