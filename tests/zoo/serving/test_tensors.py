"""JSON to tensors and back, by value."""

import json

import numpy as np
import pytest

from kzoo.zoo.serving import tensors
from kzoo.zoo.serving.status import Code, ServingError

pytestmark = pytest.mark.tensorflow


def refused(call, *words):
    with pytest.raises(ServingError) as caught:
        call()
    assert caught.value.code is Code.INVALID_ARGUMENT
    for word in words:
        assert word in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    "text, dtype, values",
    [
        ("3", "DT_INT32", np.int32(3)),
        ("[1, 2.5, -0.0]", "DT_FLOAT", np.float32([1, 2.5, -0.0])),
        ("[[1], [2]]", "DT_DOUBLE", np.float64([[1], [2]])),
        (
            "[NaN, Infinity, -Infinity]",
            "DT_FLOAT",
            np.float32([np.nan, np.inf, -np.inf]),
        ),
        ("[0, 255]", "DT_UINT8", np.uint8([0, 255])),
        ("[-9223372036854775808]", "DT_INT64", np.int64([-(2**63)])),
        ("[18446744073709551615]", "DT_UINT64", np.uint64([2**64 - 1])),
        ("[true, false]", "DT_BOOL", np.array([True, False])),
        ("[]", "DT_FLOAT", np.zeros((0,), np.float32)),
        ("[[], []]", "DT_FLOAT", np.zeros((2, 0), np.float32)),
        ('["a", {"b64": "AP8="}]', "DT_STRING", np.array([b"a", b"\0\xff"], object)),
        ('"é"', "DT_STRING", np.array("é".encode(), object)),
    ],
)
def test_values(text, dtype, values):
    document, _ = tensors.parse(b'{"v": ' + text.encode() + b"}")
    array = tensors.from_json(document["v"], dtype, "v")
    assert array.dtype == values.dtype and array.shape == values.shape
    np.testing.assert_array_equal(array, values)


@pytest.mark.parametrize(
    "text, dtype",
    [
        ("[1, [2]]", "DT_FLOAT"),  # a value and a list at one level
        ("[[1], [2, 3]]", "DT_FLOAT"),
        ("[[], [1]]", "DT_FLOAT"),
        ("[true]", "DT_FLOAT"),
        ('["1"]', "DT_FLOAT"),
        ("[null]", "DT_FLOAT"),
        ('{"b64": "AA=="}', "DT_FLOAT"),
        ("[1e39]", "DT_FLOAT"),  # larger than any float32
        ("[" + "1" * 400 + "]", "DT_DOUBLE"),
        ("[1.0]", "DT_INT32"),
        ("[1e0]", "DT_INT64"),
        ("[true]", "DT_INT32"),
        ("[2147483648]", "DT_INT32"),
        ("[256]", "DT_UINT8"),
        ("[-1]", "DT_UINT32"),
        ("[18446744073709551616]", "DT_UINT64"),
        ("[1]", "DT_BOOL"),
        ("[1]", "DT_STRING"),
        ('{"b64": 1}', "DT_STRING"),
        ('{"b64": "AA==", "x": 1}', "DT_STRING"),
        ('{"b64": "A"}', "DT_STRING"),
        ('{"b64": "A A="}', "DT_STRING"),
        (r'"\ud800"', "DT_STRING"),
        ("[" * 40 + "1" + "]" * 40, "DT_FLOAT"),
    ],
)
def test_values_refused(text, dtype):
    document, _ = tensors.parse(b'{"v": ' + text.encode() + b"}")
    refused(lambda: tensors.from_json(document["v"], dtype, "v"), "'v'")


def test_a_type_json_does_not_have_is_unimplemented():
    with pytest.raises(ServingError) as caught:
        tensors.from_json([1.0], "DT_HALF", "v")
    assert caught.value.code is Code.UNIMPLEMENTED


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"{} {}",
        b'{"a": 1, "a": 2}',
        b'{"a": 01}',
        b"{'a': 1}",
        b'{"a": \xff}',
        b"\xff\xfe{\x00}\x00",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_not_a_json_object_is_refused(text):
    refused(lambda: tensors.parse(text), "JSON")


def test_infinities_are_told_from_numbers_too_big():
    document, infinities = tensors.parse(b'{"v": [1e999, Infinity, -Infinity, NaN]}')
    assert infinities == 2
    array = tensors.from_json(document["v"], "DT_DOUBLE", "v")
    assert tensors.count_infinities([array]) == 3


def test_float32_is_written_short_and_reads_back_equal():
    values = np.float32([0.1, 1 / 3, 1e-45, 3.4028235e38, 16777216, -0.0])
    assert json.dumps(tensors.to_json(values, "y")).startswith(
        "[0.1, 0.33333334, 1e-45"
    )
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 10_000, np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    text = json.dumps(tensors.to_json(values, "y"))
    np.testing.assert_array_equal(np.float32(json.loads(text)), values)


def test_nan_and_infinity_are_written_as_tokens():
    values = np.float32([[np.nan, np.inf], [-np.inf, 1]])
    text = json.dumps(tensors.to_json(values, "y"))
    assert text == "[[NaN, Infinity], [-Infinity, 1.0]]"


def test_strings_are_text_or_binary_by_name():
    values = np.array([[b"a"], [b"\xc3\xa9"]], object)
    assert tensors.to_json(values, "y") == [["a"], ["é"]]
    assert tensors.to_json(values, "y_bytes") == [[{"b64": "YQ=="}], [{"b64": "w6k="}]]
    error = refused(lambda: tensors.to_json(np.array([b"\xff"], object), "y"), "'y'")
    assert "_bytes" in error.message


def test_types_without_a_json_form_are_refused():
    refused(lambda: tensors.to_json(np.zeros(1, np.complex64), "y"), "complex64")
    refused(lambda: tensors.to_json(np.zeros(1, np.float16), "y"), "float16")


@pytest.mark.parametrize(
    "value, dtype, expected",
    [
        ([3], "DT_UINT8", np.uint8([3])),
        ([127, -128], "DT_INT8", np.int8([127, -128])),
        ([1, 2], "DT_FLOAT", np.float32([1, 2])),
        (np.float64([0.1]), "DT_FLOAT", np.float32([0.1])),
        ([[True]], "DT_BOOL", np.array([[True]])),
    ],
)
def test_what_a_user_gives_becomes_the_inputs_type(value, dtype, expected):
    array = tensors.typed("x", value, dtype)
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


def test_strings_become_bytes_and_keep_their_zeros():
    array = tensors.typed("x", ["é", b"a\0"], "DT_STRING")
    assert array.tolist() == ["é".encode(), b"a\0"]


@pytest.mark.parametrize(
    "value, dtype",
    [
        ([300], "DT_INT8"),
        ([-1], "DT_UINT8"),
        ([0.5], "DT_INT32"),
        ([[1], [1, 2]], "DT_FLOAT"),
        ([1], "DT_STRING"),
        (["1"], "DT_FLOAT"),
    ],
)
def test_what_does_not_fit_an_input_is_refused(value, dtype):
    with pytest.raises(ValueError, match="'x'.*Received"):
        tensors.typed("x", value, dtype)
