"""The JSON of a request to predict and of its answer, as TensorFlow Serving's.

It comes in rows, `{"instances": [...]}` and `{"predictions": [...]}`, one value or
object an example; or in columns, `{"inputs": ...}` and `{"outputs": ...}`, one value
a tensor.
"""

from tensorflow.core.framework.types_pb2 import DataType

from . import tensors
from .status import ServingError, invalid


def read(document, infinities, servable):
    """Reads a request.

    Args:
        document: The request, as `tensors.parse` returns it,
        infinities: and how often it says Infinity.
        servable: The Servable that it is for.

    Returns:
        (the inputs, {name: numpy.ndarray}; the signature's name, empty for the
        default; whether the request is in rows).

    Raises:
        ServingError: It does not fit the signature.
    """
    signature_name, definition = signature(document, servable)
    in_rows = "instances" in document
    if in_rows == ("inputs" in document):
        raise invalid(
            "Not formatted correctly expecting only one of 'inputs' or "
            "'instances' keys to exist"
            if in_rows
            else "Missing 'inputs' or 'instances' key"
        )
    if not definition.inputs:
        raise invalid(f"Failed to get input map for signature: {signature_name}")
    if in_rows:
        values = _rows(document["instances"], sorted(definition.inputs))
    else:
        values = _columns(document["inputs"], sorted(definition.inputs))
    inputs = {
        key: tensors.from_json(value, DataType.Name(definition.inputs[key].dtype), key)
        for key, value in values.items()
    }
    if tensors.count_infinities(inputs.values()) > infinities:
        raise invalid("JSON Parse error: Number too big to be stored in double")
    return inputs, signature_name, in_rows


def signature(document, servable):
    """Returns the name and the definition of the signature that a request asks.

    Args:
        document: The request, as a dict.
        servable: The Servable that it is for.

    Raises:
        ServingError: There is none of that name.
    """
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise invalid("'signature_name' key must be a string value.")
    try:
        return name, servable.signature(name)
    except ServingError as error:
        raise invalid(error.message) from None


def write(outputs, in_rows):
    """Returns the answer, as something for `json.dumps`.

    Args:
        outputs: {name: numpy.ndarray}.
        in_rows: Whether the request was in rows.

    Raises:
        ServingError: The outputs have no form in JSON, or none in rows.
    """
    return _row_answer(outputs) if in_rows else _column_answer(outputs)


def _rows(instances, names):
    """{input: list of its values} of the row format."""
    if not isinstance(instances, list) or not instances:
        raise invalid("Expecting 'instances' to be a list/array with values")

    def is_object(value):
        return isinstance(value, dict) and not tensors.is_base64(value)

    objects = is_object(instances[0])
    for item, value in enumerate(instances):
        if is_object(value) != objects:
            raise invalid(
                "Expecting only objects or only values/lists, but got another at item "
                f"{item} of input list"
            )
        if objects and value.keys() != set(names):
            raise invalid(
                f"Failed to process element: {item} of 'instances' list. JSON object "
                f"keys must be equal to: {','.join(names)}"
            )
    if objects:
        return {name: [value[name] for value in instances] for name in names}
    if len(names) > 1:
        raise invalid(
            "instances is a plain list, but expecting list of objects as multiple "
            f"input tensors are required: {','.join(names)}"
        )
    return {names[0]: instances}


def _columns(inputs, names):
    """{input: its value} of the column format."""
    if isinstance(inputs, dict) and not tensors.is_base64(inputs):
        missing = sorted(set(names) - inputs.keys())
        extra = sorted(inputs.keys() - set(names))
        if missing:
            raise invalid(f"Missing named input: {missing[0]} in 'inputs' object.")
        if extra:
            raise invalid(
                f"JSON object: does not have named input: {extra[0]}. Expected: "
                f"{','.join(names)}"
            )
        return inputs
    if len(names) > 1:
        raise invalid(
            "inputs is a plain value/list, but expecting an object as multiple input "
            f"tensors are required: {','.join(names)}"
        )
    return {names[0]: inputs}


def _row_answer(outputs):
    sizes = {name: array.shape[:1] for name, array in outputs.items()}
    if len(set(sizes.values())) != 1 or () in sizes.values():
        raise invalid(
            "Outputs have inconsistent batch sizes; ask in the column format "
            f"('inputs'): { {name: list(size) for name, size in sizes.items()} }"
        )
    values = {name: tensors.to_json(array, name) for name, array in outputs.items()}
    if len(values) == 1:
        return {"predictions": next(iter(values.values()))}
    rows = zip(*values.values(), strict=True)
    return {"predictions": [dict(zip(values, row, strict=True)) for row in rows]}


def _column_answer(outputs):
    values = {name: tensors.to_json(array, name) for name, array in outputs.items()}
    if len(values) == 1:
        return {"outputs": next(iter(values.values()))}
    return {"outputs": values}
