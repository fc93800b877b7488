"""Tensors as JSON: the mapping of TensorFlow Serving's REST API, both ways."""

import base64
import binascii
import itertools
import json
import math

import numpy as np

from .status import Code, ServingError, invalid

# The types that the REST API knows; names as in a signature's metadata.
NUMPY_TYPES = {
    "DT_FLOAT": np.float32,
    "DT_DOUBLE": np.float64,
    "DT_INT8": np.int8,
    "DT_UINT8": np.uint8,
    "DT_INT16": np.int16,
    "DT_INT32": np.int32,
    "DT_UINT32": np.uint32,
    "DT_INT64": np.int64,
    "DT_UINT64": np.uint64,
    "DT_BOOL": np.bool_,
    "DT_STRING": np.object_,
}
# More dimensions than NumPy arrays can have.
MAX_RANK = 32
SHOWN = 256


def parse(text):
    """Parses a request's JSON object.

    As TensorFlow Serving does, and unlike the standard, it accepts the tokens NaN,
    Infinity and -Infinity. It refuses what has no single meaning: a key given twice,
    a number beyond any float, text after the object.

    Args:
        text: The body, as bytes.

    Returns:
        (the object as a dict, how often it says Infinity or -Infinity).

    Raises:
        ServingError: It is not a JSON object.
    """
    infinities = []

    def constant(token):
        infinities.extend([token] * (token != "NaN"))
        return float(token.replace("Infinity", "inf"))

    if not text:
        raise invalid("JSON Parse error: The document is empty")
    try:
        document = json.loads(
            text.decode(), parse_constant=constant, object_pairs_hook=_unique_keys
        )
    except RecursionError:
        raise invalid("JSON Parse error: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, long integers
        raise invalid(f"JSON Parse error: {error}") from None
    if not isinstance(document, dict):
        raise invalid(f"JSON Value: {_shown(document)} Is not object")
    return document, len(infinities)


def from_json(value, dtype, name):
    """Makes a tensor from nested lists.

    Args:
        value: What `parse` found: a scalar, or lists nested to any depth.
        dtype: The type, as `DT_FLOAT`.
        name: The input's name, for messages.

    Returns:
        numpy.ndarray. Strings are bytes in an array of objects.

    Raises:
        ServingError: The lists are ragged, or a value is not of the type.
    """
    if dtype not in NUMPY_TYPES:
        raise ServingError(
            Code.UNIMPLEMENTED, f"Conversion of JSON to input {name!r} of type {dtype}"
        )
    numpy_type = NUMPY_TYPES[dtype]
    shape, values = _flatten(value, name)
    kinds = set(map(type, values))
    if dtype == "DT_STRING":
        array = np.empty(len(values), object)
        array[:] = [_to_bytes(v, name) for v in values]
        return array.reshape(shape)
    if dtype == "DT_BOOL":
        allowed = {bool}
    elif dtype in ("DT_FLOAT", "DT_DOUBLE"):
        allowed = {int, float}
    else:
        allowed = {int}
    if kinds - allowed:
        wrong = next(v for v in values if type(v) not in allowed)
        raise invalid(
            f"Input {name!r}: JSON Value: {_shown(wrong)} is not of expected type: "
            f"{dtype}"
        )
    if allowed == {int} and values:
        limits = np.iinfo(numpy_type)
        if min(values) < limits.min or max(values) > limits.max:
            raise invalid(f"Input {name!r}: a number is out of the range of {dtype}")
    try:
        wide = np.array(values, np.float64 if float in allowed else numpy_type)
    except OverflowError:
        raise invalid(f"Input {name!r}: a number is too large for {dtype}") from None
    with np.errstate(over="ignore"):
        array = wide.astype(numpy_type)
    if float in allowed and np.any(np.isinf(array) & ~np.isinf(wide)):
        raise invalid(f"Input {name!r}: a number is too large for {dtype}")
    return array.reshape(shape)


def typed(name, value, dtype):
    """Makes an array of an input's type, if nothing is lost but precision.

    Args:
        name: The input's name, for errors.
        value: Array or nested lists.
        dtype: The input's type, named as in a signature's metadata. Of one that is
            not in `NUMPY_TYPES`, the array stays as it is.

    Returns:
        numpy.ndarray; strings as `bytes` in an array of objects.

    Raises:
        ValueError: The value is ragged, of another kind, or does not fit.
    """
    try:
        # NumPy's own strings would lose zero bytes at their ends.
        array = np.asarray(value, object if dtype == "DT_STRING" else None)
    except ValueError:
        raise ValueError(
            f"Expected lists of equal lengths for input {name!r}. Received: ragged ones"
        ) from None
    if dtype == "DT_STRING":
        flat = [v.encode() if isinstance(v, str) else v for v in array.ravel().tolist()]
        if not all(isinstance(v, bytes) for v in flat):
            raise ValueError(
                f"Expected strings for input {name!r}. Received: {array.dtype}"
            )
        result = np.empty(len(flat), object)
        result[:] = flat
        return result.reshape(array.shape)
    if dtype not in NUMPY_TYPES:
        return array
    wanted = np.dtype(NUMPY_TYPES[dtype])
    # Python numbers come as int64 and float64; whole numbers may become smaller ones
    # as long as their values fit.
    if array.dtype != wanted:
        fits = array.dtype.kind == "f" and wanted.kind == "f"
        if array.dtype.kind in "iu" and wanted.kind in "iuf":
            limits = np.iinfo(wanted) if wanted.kind in "iu" else None
            fits = limits is None or (
                not array.size
                or (array.min() >= limits.min and array.max() <= limits.max)
            )
        if not fits and array.size:
            raise ValueError(
                f"Expected {wanted.name} for input {name!r}. Received: "
                f"{array.dtype.name}"
            )
    return array.astype(wanted)


def to_json(array, name):
    """Makes nested lists of a tensor, ready for `json.dumps`.

    A float32 becomes the shortest decimal number that reads back as the same float32.

    Args:
        array: numpy.ndarray; strings as bytes in an array of objects.
        name: The output's name. Strings whose name ends in `_bytes` become
            `{"b64": ...}`, other strings must be UTF-8.

    Returns:
        A scalar or nested lists.

    Raises:
        ServingError: JSON has no form for it.
    """
    array = np.asarray(array)
    if array.dtype.kind in "OSU":
        encode = _base64 if name.endswith("_bytes") else _text
        flat = np.empty(array.size, object)
        flat[:] = [encode(value, name) for value in array.ravel()]
        return flat.reshape(array.shape).tolist()
    if array.dtype not in NUMPY_TYPES.values():
        raise invalid(
            f"Failed to write JSON value for output {name!r} of type {array.dtype}"
        )
    if array.dtype == np.float32:
        array = array.astype("U").astype(np.float64)
    return array.tolist()


def is_base64(value):
    """Whether a JSON value is binary data: an object with the one key `b64`."""
    return (
        isinstance(value, dict)
        and value.keys() == {"b64"}
        and isinstance(value["b64"], str)
    )


def count_infinities(arrays):
    """How many infinite numbers there are in some tensors."""
    return sum(int(np.isinf(a).sum()) for a in arrays if a.dtype.kind == "f")


def _flatten(value, name):
    """(shape, the values in row-major order) of nested lists."""
    shape, values = [], [value]
    while values:
        kinds = set(map(type, values))
        if list not in kinds:
            break
        lengths = set(map(len, values)) if kinds == {list} else set()
        if len(lengths) != 1:
            raise invalid(
                f"Input {name!r}: Encountered list at unexpected size at level "
                f"{len(shape)}: all lists of a level must have one length, and all "
                "values must be at one level"
            )
        shape.append(lengths.pop())
        if len(shape) > MAX_RANK:
            raise invalid(f"Input {name!r}: Encountered list at unexpected level")
        values = list(itertools.chain.from_iterable(values))
    return shape, values


def _unique_keys(pairs):
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("an object has a key twice")
    return result


def _to_bytes(value, name):
    if isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError:
            raise invalid(f"Input {name!r}: a string is not Unicode text") from None
    if not isinstance(value, dict):
        raise invalid(
            f"Input {name!r}: JSON Value: {_shown(value)} is not of expected type: "
            "DT_STRING"
        )
    if not is_base64(value):
        raise invalid(
            f"Input {name!r}: JSON Value: {_shown(value)} not formatted correctly for "
            "base64 data"
        )
    try:
        return base64.b64decode(value["b64"], validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"Input {name!r}: Unable to base64 decode") from None


def _base64(value, name):
    return {"b64": base64.b64encode(_bytes(value)).decode()}


def _text(value, name):
    try:
        return _bytes(value).decode()
    except UnicodeDecodeError:
        raise invalid(
            f"Output {name!r} is not UTF-8 text. An output of binary data needs a "
            "name that ends in '_bytes'"
        ) from None


def _bytes(value):
    return value.encode() if isinstance(value, str) else bytes(value)


def _shown(value):
    """A value's JSON, cut short."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = json.dumps(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
