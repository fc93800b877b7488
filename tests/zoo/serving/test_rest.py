"""The REST API: TensorFlow Serving's answers, and its errors to whatever is sent."""

import base64
import concurrent.futures
import contextlib
import gzip
import json
import math
import random
import socket
import threading
import time

import numpy as np
import pytest

from kzoo.zoo.serving import rest

pytestmark = pytest.mark.tensorflow

RIGHT = {"instances": [1.5, -2.0]}, {"predictions": [3.0, -4.0]}
KINDS = {
    "text": ["a", "é"],
    "count": [1, -2],
    "flag": [True, False],
    "point": [[1.0, 2.0], [3.0, 4.5]],
    "level": [0, 255],
}


def rows(columns):
    return [
        dict(zip(columns, row, strict=True))
        for row in zip(*columns.values(), strict=True)
    ]


@pytest.fixture(autouse=True)
def still_serving(raw):
    """Whatever a test sent, afterwards the server answers as before."""
    yield
    assert raw.predict(RIGHT[0]) == (200, RIGHT[1])


class TestPredict:
    def test_rows_and_columns_of_one_input(self, raw):
        assert raw.predict({"instances": [1, 2.5]}) == (200, {"predictions": [2, 5]})
        assert raw.predict({"instances": [{"x": 1}, {"x": 2}]}) == (
            200,
            {"predictions": [2, 4]},
        )
        assert raw.predict({"inputs": [1, 2.5]}) == (200, {"outputs": [2, 5]})
        assert raw.predict({"inputs": {"x": [1]}}) == (200, {"outputs": [2]})

    def test_every_type_in_columns(self, raw):
        status, answer = raw.predict({"signature_name": "kinds", "inputs": KINDS})
        assert status == 200
        assert answer["outputs"] == {
            "text": ["aa", "éé"],
            "text_bytes": [
                {"b64": base64.b64encode(text.encode()).decode()} for text in "aé"
            ],
            "count": [2, -1],
            "flag": [False, True],
            "point": [[1 / 3, 2 / 3], [1.0, 1.5]],
            "level": [0, 255],
        }

    def test_every_type_in_rows(self, raw):
        columns = raw.predict({"signature_name": "kinds", "inputs": KINDS})[1]
        answer = raw.predict({"signature_name": "kinds", "instances": rows(KINDS)})
        assert answer == (200, {"predictions": rows(columns["outputs"])})

    def test_binary_strings(self, raw):
        data = base64.b64encode(b"\x00\xff").decode()
        request = {
            "signature_name": "kinds",
            "inputs": KINDS | {"text": [{"b64": data}] * 2},
        }
        status, answer = raw.predict(request)
        # The output "text" is not UTF-8 then, and JSON cannot hold it.
        assert status == 400 and "text" in answer["error"]

    def test_not_a_number_and_infinity(self, raw):
        body = b'{"instances": [NaN, Infinity, -Infinity]}'
        status, answer = raw.predict(body)
        nan, infinity, minus = answer["predictions"]
        assert status == 200
        assert math.isnan(nan) and infinity == math.inf and minus == -math.inf
        ((_, _, text),) = raw.send(
            b"POST /v1/models/module:predict HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s"
            % (len(body), body)
        )
        assert text == b'{"predictions": [NaN, Infinity, -Infinity]}'

    def test_a_classifier(self, raw, probabilities):
        x = np.float32([[1, 2, 3, 4], [0, 0, 0, 1]])
        status, answer = raw.predict({"instances": x.tolist()}, "classifier")
        assert status == 200
        got = [row["probabilities"] for row in answer["predictions"]]
        np.testing.assert_allclose(got, probabilities(x), atol=1e-6)
        row = answer["predictions"][0]
        p = np.float64(got[0])
        np.testing.assert_allclose(row["member_probabilities"], [p], atol=1e-6)
        entropy = -(p * np.log(p)).sum()
        np.testing.assert_allclose(row["predictive_entropy"], entropy, atol=1e-5)
        np.testing.assert_allclose(row["mutual_information"], 0, atol=1e-6)

    def test_columns_may_have_different_batches(self, raw):
        inputs = KINDS | {"count": [5]}
        status, answer = raw.predict({"signature_name": "kinds", "inputs": inputs})
        assert status == 200
        assert answer["outputs"]["count"] == [6]
        assert answer["outputs"]["flag"] == [False, True]

    def test_an_output_without_a_batch_needs_columns(self, raw):
        request = {"signature_name": "spin", "inputs": 3}
        assert raw.predict(request) == (200, {"outputs": 100.0})

    def test_an_answer_in_rows_needs_a_batch(self, raw):
        request = {"signature_name": "join", "instances": ["a", "b"]}
        status, answer = raw.predict(request)
        assert status == 400 and "column format" in answer["error"]
        request = {"signature_name": "join", "inputs": ["a", "b"]}
        assert raw.predict(request) == (200, {"outputs": "ab"})

    def test_versions_and_labels(self, raw):
        request, answer = RIGHT
        for place in ("/versions/1", "/labels/stable"):
            assert raw.predict(request, rest=place) == (200, answer)

    def test_an_escaped_name(self, raw):
        assert raw.predict(RIGHT[0], "%6dodule") == (200, RIGHT[1])
        assert raw.ask("POST", "/V1/Models/module:predict", RIGHT[0]) == (200, RIGHT[1])

    def test_a_query_and_an_absolute_address(self, raw):
        for path in (
            "/v1/models/module:predict?x=1",
            "http://h/v1/models/module:predict",
        ):
            assert raw.ask("POST", path, RIGHT[0]) == (200, RIGHT[1])


# (what is sent, TensorFlow Serving's status, a word of the message)
MALFORMED = {
    "not json": (b"<html>", 400, "JSON Parse error"),
    "nothing": (b"", 400, "The document is empty"),
    "a list": ([1.0], 400, "Is not object"),
    "no tensors": ({}, 400, "Missing 'inputs' or 'instances'"),
    "both formats": ({"instances": [1.0], "inputs": [1.0]}, 400, "only one of"),
    "empty instances": ({"instances": []}, 400, "'instances'"),
    "instances no list": ({"instances": 1.0}, 400, "list/array"),
    "instances an object": ({"instances": {"x": [1.0]}}, 400, "list/array"),
    "wrong type": ({"instances": ["1"]}, 400, "DT_FLOAT"),
    "null": ({"instances": [None]}, 400, "DT_FLOAT"),
    "a rank too many": ({"instances": [[1.0]]}, 400, "shape [?]"),
    "a rank too few": ({"inputs": 1.0}, 400, "shape [?]"),
    "ragged": ({"instances": [[1.0], [1.0, 2.0]]}, 400, "unexpected size"),
    "objects and values": ({"instances": [{"x": 1.0}, 1.0]}, 400, "at item 1"),
    "values and objects": ({"instances": [1.0, {"x": 1.0}]}, 400, "at item 1"),
    "wrong key": ({"instances": [{"z": 1.0}]}, 400, "keys must be equal to: x"),
    "extra key": ({"instances": [{"x": 1.0, "z": 1.0}]}, 400, "keys must be equal"),
    "missing key": ({"instances": [{}]}, 400, "keys must be equal"),
    "wrong column": ({"inputs": {"z": [1.0]}}, 400, "Missing named input: x"),
    "extra column": ({"inputs": {"x": [1.0], "z": [1.0]}}, 400, "named input: z"),
    "signature no string": ({"signature_name": 1, "instances": [1.0]}, 400, "string"),
    "unknown signature": ({"signature_name": "a", "instances": [1.0]}, 400, '"a"'),
    "hidden signature": (
        {"signature_name": "__saved_model_init_op", "instances": [1.0]}, 400, "init_op",
    ),
    "several inputs, a list": (
        {"signature_name": "kinds", "instances": [1.0]}, 400, "multiple",
    ),
    "several inputs, a column": (
        {"signature_name": "kinds", "inputs": [1.0]}, 400, "multiple",
    ),
    "a float for an int": (
        {"signature_name": "kinds", "inputs": KINDS | {"count": [1.0, 2.0]}},
        400, "DT_INT32",
    ),
    "an int out of range": (
        {"signature_name": "kinds", "inputs": KINDS | {"level": [0, 256]}},
        400, "range",
    ),
    "a bad base64": (
        {"signature_name": "kinds", "inputs": KINDS | {"text": [{"b64": "!"}] * 2}},
        400, "base64",
    ),
    "the wrong fixed batch": (
        {"signature_name": "fixed", "instances": [[1, 2, 3]]}, 400, "[2,3]",
    ),
    "the wrong fixed size": (
        {"signature_name": "fixed", "inputs": [[1, 2], [3, 4]]}, 400, "[2,3]",
    ),
    "a type that json lacks": (
        {"signature_name": "half", "instances": [1.0]}, 501, "DT_HALF",
    ),
    "a number too big": (b'{"instances": [1e999]}', 400, "too big"),
    "a number too big for float32": (b'{"instances": [1e39]}', 400, "too large"),
    "huge nesting": (
        b'{"instances": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400, "too deeply",
    ),
    "deep nesting": (
        b'{"instances": ' + b"[" * 90 + b"1" + b"]" * 90 + b"}", 400, "list",
    ),
    "text after it": (b'{"instances": [1.0]} x', 400, "Extra data"),
    "a key twice": (b'{"instances": [1.0], "instances": [2.0]}', 400, "twice"),
    "utf-16": (json.dumps(RIGHT[0]).encode("utf-16"), 400, "JSON Parse error"),
    "not utf-8": (b'{"instances": ["\xff"]}', 400, "JSON Parse error"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_predictions_are_refused(raw, case):
    body, status, word = MALFORMED[case]
    got, answer = raw.predict(body)
    assert got == status
    assert answer.keys() == {"error"} and word in answer["error"]


@pytest.mark.parametrize(
    "method, path, status, word",
    [
        ("POST", "/v1/models/other:predict", 404, "Latest(other)"),
        ("POST", "/v1/models/module/versions/2:predict", 404, "Specific(module, 2)"),
        ("POST", "/v1/models/module/labels/new:predict", 400, "label: new"),
        ("POST", f"/v1/models/module/versions/{2**63}:predict", 400, "to numeric"),
        ("POST", f"/v1/models/module/versions/{'9' * 5000}:predict", 400, "to numeric"),
        ("POST", "/v1/models/module/versions/x:predict", 400, "Malformed"),
        ("POST", "/v1/models/module/versions/-1:predict", 400, "Malformed"),
        (
            "POST",
            "/v1/models/module/versions/1/labels/stable:predict",
            400,
            "Malformed",
        ),
        ("POST", "/v1/models/module", 400, "Malformed"),
        ("POST", "/v1/models/module:explain", 400, "Malformed"),
        ("POST", "/v1/models/module:PREDICT", 400, "Malformed"),
        ("POST", "/v1/models/:predict", 400, "Malformed"),
        ("GET", "/v1/models/module:predict", 400, "Malformed"),
        ("GET", "/v1/models", 400, "Missing model name"),
        ("GET", "/v1/models/", 400, "Malformed"),
        ("GET", "/v1/models/other", 404, "any versions of model other"),
        ("GET", "/v1/models/module/versions/2", 404, "version 2 of model module"),
        ("GET", "/v1/models/module/labels/new", 400, "label: new"),
        ("GET", "/v1/models/other/metadata", 404, "Latest(other)"),
        ("GET", "/v1/models/module/versions/2/metadata", 404, "Specific(module, 2)"),
        ("GET", "/v1/models/module/variables", 400, "Malformed"),
        ("GET", "/v1/models/%ff", 400, "decode"),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404, "../../etc/passwd"),
        ("GET", "/v1/models/../../etc/passwd", 400, "Malformed"),
        ("GET", "/v1/../etc/passwd", 400, "Malformed"),
        ("GET", "/v1/models/module%00", 404, "module"),
        ("GET", "/", 404, "Not found"),
        ("GET", "/etc/passwd", 404, "Not found"),
        ("GET", "*", 404, "Not found"),
        ("PUT", "/v1/models/module", 400, "Malformed"),
        ("DELETE", "/v1/models/module", 400, "Malformed"),
        ("PATCH", "/v1/models/module:predict", 400, "Malformed"),
        ("OPTIONS", "/v1/models/module:predict", 400, "Malformed"),
    ],
)
def test_wrong_addresses_are_refused(raw, method, path, status, word):
    got, answer = raw.ask(method, path, RIGHT[0])
    assert got == status
    assert answer.keys() == {"error"} and word in answer["error"]


@pytest.mark.parametrize("method", ["classify", "regress"])
def test_classify_and_regress_are_refused_as_of_a_predict_signature(raw, method):
    request = {"examples": [{"x": 1.0}]}
    status, answer = raw.ask("POST", f"/v1/models/module:{method}", request)
    assert status == 400
    kind = "tensorflow/serving/"
    assert f"to be {kind}{method}. Was: {kind}predict" in answer["error"]
    assert raw.ask("POST", f"/v1/models/module:{method}", b"x")[0] == 400
    assert raw.ask("POST", f"/v1/models/other:{method}", request)[0] == 404


def test_status(raw):
    for path in ("", "/versions/1", "/labels/stable"):
        assert raw.ask("GET", f"/v1/models/module{path}") == (
            200,
            {
                "model_version_status": [
                    {
                        "version": "1",
                        "state": "AVAILABLE",
                        "status": {"error_code": "OK", "error_message": ""},
                    }
                ]
            },
        )


def test_metadata(raw):
    status, answer = raw.ask("GET", "/v1/models/module/metadata")
    assert status == 200
    assert answer["model_spec"] == {
        "name": "module",
        "signature_name": "",
        "version": "1",
    }
    signatures = answer["metadata"]["signature_def"]["signature_def"]
    assert signatures["fixed"]["inputs"]["x"] == {
        "dtype": "DT_INT64",
        "tensor_shape": {
            "dim": [{"size": "2", "name": ""}, {"size": "3", "name": ""}],
            "unknown_rank": False,
        },
        "name": "fixed_x:0",
    }
    assert signatures["fixed"]["method_name"] == "tensorflow/serving/predict"
    assert "__saved_model_init_op" in signatures


GET = b"GET /v1/models/module HTTP/1.1\r\n\r\n"


def hold(raw, count, begun=b""):
    """Connections that were answered once, and then have begun another request."""
    held = []

    def is_held():
        connection = socket.create_connection(raw.address, timeout=10)
        connection.sendall(GET)
        if not connection.recv(1 << 16).startswith(b"HTTP/1.1 200"):
            connection.close()  # The server still counts those of the test before.
            return False
        connection.sendall(begun)
        held.append(connection)
        return True

    for _ in range(count):
        wait_for(is_held)
    time.sleep(0.05 if begun else 0)  # for the server to have read it
    return held


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


class TestHttp:
    """What happens below JSON, over a raw socket."""

    def post(self, raw, body, *headers, **options):
        head = ["POST /v1/models/module:predict HTTP/1.1", "Host: x", *headers, "", ""]
        return raw.send("\r\n".join(head).encode() + body, **options)

    body = json.dumps(RIGHT[0]).encode()

    def test_several_requests_over_one_connection(self, raw):
        request = (
            b"POST /v1/models/module:predict HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s"
            % (len(self.body), self.body)
        )
        bad = request.replace(b'"instances"', b'"instancez"')
        get = b"GET /v1/models/module HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"
        answers = raw.send(request + bad + get + request)
        assert [status for status, *_ in answers] == [200, 400, 200, 200]
        assert json.loads(answers[3][2]) == RIGHT[1]

    def test_http_1_0(self, raw):
        request = b"GET /v1/models/module HTTP/1.0\r\n\r\n"
        ((status, headers, _),) = raw.send(request, half_close=False)
        assert status == 200 and headers["Connection"] == "close"

    def test_head_has_no_body(self, raw):
        ((status, headers, body),) = raw.send(
            b"HEAD /v1/models/module HTTP/1.1\r\n\r\n"
        )
        assert status == 400 and body == b"" and int(headers["Content-Length"]) > 0

    def test_chunked(self, raw):
        chunks = b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in self.body)
        ((status, _, text),) = self.post(
            raw, chunks + b"0\r\nTrailer: x\r\n\r\n", "Transfer-Encoding: chunked"
        )
        assert (status, json.loads(text)) == (200, RIGHT[1])

    def test_gzip(self, raw):
        body = gzip.compress(self.body)
        length = f"Content-Length: {len(body)}"
        ((status, _, text),) = self.post(raw, body, length, "Content-Encoding: gzip")
        assert (status, json.loads(text)) == (200, RIGHT[1])

    def test_expect_100_continue(self, raw):
        length = f"Content-Length: {len(self.body)}"
        answers = self.post(raw, self.body, length, "Expect: 100-continue")
        assert [status for status, *_ in answers] == [100, 200]
        length = f"Content-Length: {1 << 40}"
        ((status, _, _),) = self.post(raw, b"", length, "Expect: 100-continue")
        assert status == 413

    @pytest.mark.parametrize(
        "status, body, headers",
        [
            (400, body, ["Content-Length: x"]),
            (400, body, ["Content-Length: -1"]),
            (400, body, ["Content-Length: +5"]),
            (400, body, ["Content-Length: 1_0"]),
            (400, body, ["Content-Length: ٣"]),
            (400, body, ["Content-Length: 5", "Content-Length: 6"]),
            (400, body, ["Content-Length: 5, 5"]),
            (400, body, ["Content-Length:"]),
            (400, body, ["Content-Length: 1000"]),  # more than comes
            (400, body, []),  # no body at all, then
            (400, body, ["Content-Length: 5"]),  # cut in the middle
            (413, body, [f"Content-Length: {(1 << 20) + 1}"]),
            (413, body, ["Content-Length: 99999999999999999"]),
            (400, body, [f"Content-Length: {'9' * 100}"]),
            (400, body, ["Transfer-Encoding: chunked", f"Content-Length: {len(body)}"]),
            (501, body, ["Transfer-Encoding: gzip"]),
            (501, body, ["Transfer-Encoding: gzip, chunked"]),
            (400, body, ["Transfer-Encoding: chunked"]),  # no chunks
            (400, b"-5\r\nabc", ["Transfer-Encoding: chunked"]),
            (400, b"5\r\nabc", ["Transfer-Encoding: chunked"]),
            (400, b"3\r\nabcdef\r\n0\r\n\r\n", ["Transfer-Encoding: chunked"]),
            (413, b"fffffff\r\n", ["Transfer-Encoding: chunked"]),
            (400, b"f" * 5000, ["Transfer-Encoding: chunked"]),
            (400, body, [f"Content-Length: {len(body)}", "Content-Encoding: gzip"]),
        ],
    )
    def test_bodies_that_are_not_as_declared(self, raw, status, body, headers):
        if not headers:
            # The body is then read as the next request, which is none either.
            answers = self.post(raw, body, *headers)
            assert answers[0][0] == 400
            return
        (answer, *_) = self.post(raw, body, *headers)
        assert answer[0] == status
        assert json.loads(answer[2]).keys() == {"error"}

    def test_a_gzip_that_grows_too_large(self, raw):
        body = gzip.compress(b" " * (64 << 20))
        length = f"Content-Length: {len(body)}"
        ((status, _, _),) = self.post(raw, body, length, "Content-Encoding: gzip")
        assert status == 413

    def test_too_large_a_body_is_answered_while_it_is_sent(self, raw):
        length = f"Content-Length: {8 << 20}"
        ((status, _, text),) = self.post(raw, b" " * (8 << 20), length)
        assert status == 413 and "1048576" in json.loads(text)["error"]

    @pytest.mark.parametrize(
        "data, status",
        [
            (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS
            (b"GET\r\n\r\n", 400),
            (b"GET / HTTP/1.1 x\r\n\r\n", 400),
            (b"GET / HTTP/x\r\n\r\n", 400),
            (b"GET / HTTP/2.0\r\n\r\n", 505),
            (b"BREW / HTTP/1.1\r\n\r\n", 501),
            (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
            (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
            (b"GET / HTTP/1.1\r\na: " + b"b" * 70_000 + b"\r\n\r\n", 431),
        ],
    )
    def test_what_is_not_http(self, raw, data, status):
        (answer, *_) = raw.send(data)
        assert answer[0] == status
        assert json.loads(answer[2]).keys() == {"error"}

    @pytest.mark.parametrize(
        "data", [b"", b"\r\n", b"POST /v1/models/module:predict H"]
    )
    def test_a_client_that_goes_away(self, raw, data):
        raw.send(data)

    def test_a_client_that_resets(self, raw):
        import struct

        for data in (
            b"",
            b"GET /v1/models/module HTTP/1.1\r\n\r\n",
            b"POST / HTTP/1.1\r\nC",
        ):
            connection = socket.create_connection(raw.address)
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            connection.sendall(data)
            connection.close()

    def test_too_many_connections_are_refused_and_the_rest_served(
        self, raw, monkeypatch
    ):
        monkeypatch.setattr(rest, "MAX_CONNECTIONS", 4)
        held = hold(raw, 4, b"GET /v1/models/module HTTP/1.1\r\nA")
        start = time.monotonic()
        for _ in range(20):
            ((status, _, _),) = raw.send(GET)
            assert status == 503
        assert time.monotonic() - start < 1  # nobody was waited for
        for connection in held:
            connection.close()
        wait_for(lambda: raw.send(GET)[0][0] == 200)

    def test_refused_connections_do_not_keep_others_waiting(self, raw, monkeypatch):
        monkeypatch.setattr(rest, "MAX_CONNECTIONS", 2)
        monkeypatch.setattr(rest, "LINGER_SECONDS", 0.2)
        held = hold(raw, 2, b"GET /v1/models/module HTTP/1.1\r\nA")
        start = time.monotonic()
        silent = [socket.create_connection(raw.address) for _ in range(20)]
        assert raw.send(GET)[0][0] == 503
        held.pop().close()
        wait_for(lambda: raw.send(GET)[0][0] == 200)
        assert time.monotonic() - start < 1
        held.pop().close()
        for connection in silent:
            assert connection.makefile("rb").read().startswith(b"HTTP/1.1 503")

    def test_idle_connections_make_room_for_new_ones(self, raw, monkeypatch):
        monkeypatch.setattr(rest, "MAX_CONNECTIONS", 3)
        busy, *idle = hold(raw, 1, b"GET /v1/models/module HTTP/1.1\r\n") + hold(raw, 2)
        for _ in range(3):
            assert raw.send(GET)[0][0] == 200
        assert idle[0].recv(1) == b""  # the one that was idle longest
        busy.sendall(b"\r\n")
        assert busy.recv(1 << 16).startswith(b"HTTP/1.1 200")

    @pytest.mark.parametrize(
        "head, drop",
        [
            (b"", b"G"),
            (b"GET /v1/models/module HTTP/1.1\r\n", b"A"),
            (b"POST / HTTP/1.1\r\nContent-Length: 999\r\n\r\n", b" "),
            (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        ],
    )
    def test_a_client_that_drips_is_cut_off(self, raw, monkeypatch, head, drop):
        monkeypatch.setattr(rest, "IDLE_SECONDS", 0.2)
        monkeypatch.setattr(rest, "TRANSFER_SECONDS", 0.2)
        connection = socket.create_connection(raw.address, timeout=0.02)
        connection.sendall(head)
        start = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - start < 5:
                connection.sendall(drop)
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(1 << 16):
                        break
        assert 0.15 < time.monotonic() - start < 2

    def test_a_client_that_does_not_read_is_cut_off(self, raw, server, monkeypatch):
        body = json.dumps({"instances": [0.5] * 50_000}).encode()
        request = (
            b"POST /v1/models/module:predict HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s"
            % (len(body), body)
        )
        front = server._front_ends[0]
        before = set(front._connections)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(raw.address)
        connection.settimeout(10)
        monkeypatch.setattr(rest, "TRANSFER_SECONDS", 0.3)
        with contextlib.suppress(OSError):
            for _ in range(20):  # more answers than any buffer takes
                connection.sendall(request)
        wait_for(lambda: not front._connections.keys() - before)

    def test_large_bodies_wait_for_one_another_and_small_ones_do_not(
        self, raw, server, monkeypatch
    ):
        monkeypatch.setattr(rest, "SMALL_BODY_BYTES", 1000)
        rooms = threading.BoundedSemaphore(1)
        monkeypatch.setattr(server._front_ends[0], "large_bodies", rooms)
        (first,) = hold(raw, 1, b"POST / HTTP/1.1\r\nContent-Length: 1001\r\n\r\n ")
        wait_for(lambda: rooms._value == 0)
        large = {"instances": [1.0] * 1000}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(raw.predict, large)
            assert raw.predict(RIGHT[0]) == (200, RIGHT[1])
            assert not future.done()
            first.sendall(b" " * 1000)
            assert future.result(10) == (200, {"predictions": [2.0] * 1000})


def test_a_request_that_takes_too_long(module_path, raw_to):
    from kzoo.zoo.serving.server import Server

    with Server({"module": module_path}, timeout=0.2, poll_seconds=None) as server:
        raw = raw_to(server)
        request = {"signature_name": "spin", "inputs": 1_000_000_000}
        status, answer = raw.predict(request)
        assert status == 504 and answer.keys() == {"error"}
        assert raw.predict(RIGHT[0]) == (200, RIGHT[1])


def test_xla_signatures_need_a_server_with_xla(
    raw, raw_to, classifier_path, probabilities
):
    from kzoo.zoo.serving.server import Server

    x = np.float32([[1, 2, 3, 4]])
    request = {"signature_name": "serving_xla", "inputs": x.tolist()}
    status, answer = raw.predict(request, "classifier")
    assert status == 500 and "XLA compilation disabled" in answer["error"]
    with Server({"m": classifier_path}, xla=True, poll_seconds=None) as server:
        status, answer = raw_to(server).predict(request, "m")
    assert status == 200
    np.testing.assert_allclose(
        answer["outputs"]["probabilities"], probabilities(x), atol=1e-6
    )


def test_parallel_clients_get_their_own_answers(raw):
    def ask(client):
        wrong = []
        for i in range(20):
            x = [client * 1000.0 + i + 0.5] * (1 + i % 3)
            if raw.predict({"instances": x}) != (
                200,
                {"predictions": [2 * v for v in x]},
            ):
                wrong.append(i)
        return wrong

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == [[]] * 8


def test_a_defect_in_the_server_is_an_internal_error(raw, server, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(server, "lend", broken)
    assert raw.predict(RIGHT[0]) == (500, {"error": "ZeroDivisionError"})
    monkeypatch.undo()


def test_mutated_requests(raw):
    """The seeded fuzz test: any bytes get an HTTP answer or none, never a hang."""
    rng = random.Random(0)
    bodies = [
        json.dumps(body).encode()
        for body in (
            RIGHT[0],
            {"inputs": {"x": [1.0, 2.0]}},
            {"signature_name": "kinds", "inputs": KINDS},
            {"signature_name": "kinds", "instances": rows(KINDS)},
            {"signature_name": "fixed", "inputs": [[1, 2, 3], [4, 5, 6]]},
        )
    ]
    tokens = [b"[", b"]", b"{", b"}", b",", b":", b'"', b"null", b"NaN", b"-", b"1e9"]
    tokens += [
        b"true",
        b"\\u0000",
        b"\xff",
        b"\x00",
        b" ",
        b'"b64"',
        b"9" * 30,
        b"\r\n",
    ]
    seen = set()
    for i in range(300):
        body = bytearray(rng.choice(bodies))
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(body))
            body[start : start + rng.randint(0, 3)] = rng.choice(tokens)
        request = bytearray(
            b"POST /v1/models/module:predict HTTP/1.1\r\nHost: x\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)
        )
        if i % 3 == 0:  # not only the body
            start = rng.randrange(len(request))
            request[start : start + rng.randint(0, 3)] = rng.choice(tokens)
        for status, _, _ in raw.send(bytes(request + body)):
            seen.add(status)
    assert {200, 400} <= seen <= {200, 400, 404, 413, 414, 431, 501, 505}


def test_stop_lets_a_request_finish(module_path, raw_to):
    from kzoo.zoo.serving.server import Server

    server = Server({"module": module_path}, poll_seconds=None).start()
    raw = raw_to(server)
    idle = socket.create_connection(raw.address)
    answers = []
    request = {"signature_name": "spin", "inputs": 20_000}
    thread = threading.Thread(target=lambda: answers.append(raw.predict(request)))
    thread.start()
    front = server._front_ends[0]
    deadline = time.monotonic() + 10
    while len(front._connections) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    server.stop()
    thread.join(10)
    assert answers == [(200, {"outputs": 100.0})]
    assert idle.recv(1) == b""
    with pytest.raises(OSError):
        socket.create_connection(raw.address, timeout=1)
