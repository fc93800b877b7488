"""The client: the same questions over REST and gRPC, and errors one can read."""

import contextlib
import socket
import socketserver
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from kzoo.zoo.serving.client import connect
from kzoo.zoo.serving.status import Code, ServingError

pytestmark = pytest.mark.tensorflow


@pytest.fixture(params=["REST", "gRPC"])
def client(request, server):
    address = {"REST": server.rest_url, "gRPC": server.grpc_target}[request.param]
    client = connect(address)
    yield client
    client.close()


def test_predict(client, probabilities):
    x = np.float32([[1, 2, 3, 4], [0, 0, 0, 1]])
    answer = client.predict("classifier", {"x": x})
    assert {name: a.shape for name, a in answer.items()} == {
        "probabilities": (2, 3),
        "member_probabilities": (2, 1, 3),
        "predictive_entropy": (2,),
        "mutual_information": (2,),
    }
    assert all(array.dtype == np.float32 for array in answer.values())
    np.testing.assert_allclose(answer["probabilities"], probabilities(x), atol=1e-6)


@pytest.mark.parametrize("x", [[1.5, -2], np.float64([1.5, -2]), {"x": [1.5, -2]}])
def test_one_input_and_one_output(client, x):
    for where in ({}, {"version": 1}, {"label": "stable"}):
        answer = client.predict("module", x, **where)
        assert answer.keys() == {"y"} and answer["y"].dtype == np.float32
        np.testing.assert_array_equal(answer["y"], [3, -4])


def test_every_type(client):
    answer = client.predict(
        "module",
        {
            "text": ["a", "é"],
            "count": [1, -2],
            "flag": [True, False],
            "point": [[1, 2], [3, 4.5]],
            "level": [0, 255],
        },
        signature="kinds",
    )
    assert answer["text"].tolist() == [b"aa", "éé".encode()]
    assert answer["text_bytes"].tolist() == [b"a", "é".encode()]
    assert answer["count"].tolist() == [2, -1] and answer["count"].dtype == np.int32
    assert answer["flag"].tolist() == [False, True]
    np.testing.assert_array_equal(answer["point"], np.array([[1, 2], [3, 4.5]]) / 3)
    assert answer["level"].tolist() == [0, 255]


def test_not_a_number_and_infinity(client):
    x = np.float32([np.nan, np.inf, -np.inf, 1e-30])
    np.testing.assert_array_equal(client.predict("module", x)["y"], 2 * x)


def test_a_scalar(client):
    answer = client.predict("module", 2, signature="spin")
    assert answer["trace"].shape == () and answer["trace"] == 100


def test_a_single_string(client):
    answer = client.predict("module", ["a", "\0", "b\0"], signature="join")
    assert answer["joined"].shape == () and answer["joined"].item() == b"a\0b\0"


def test_metadata_and_status(client):
    metadata = client.metadata("module")
    assert metadata["version"] == 1
    assert metadata["signatures"]["fixed"] == {
        "inputs": {"x": {"dtype": "DT_INT64", "shape": [2, 3]}},
        "outputs": {"y": {"dtype": "DT_INT64", "shape": [2]}},
    }
    assert metadata["signatures"]["scale"]["inputs"]["x"]["shape"] == [None]
    assert client.status("module") == {1: "AVAILABLE"}
    assert client.status("module", version=1) == {1: "AVAILABLE"}


@pytest.mark.parametrize(
    "inputs, options, words",
    [
        ({"z": [1.0]}, {}, r"\['x'\].*\['z'\]"),
        ({}, {}, r"\['x'\].*\[\]"),
        ([[1.0], [1.0, 2.0]], {}, "ragged"),
        (["a"], {}, "float32.*'x'"),
        ([True], {}, "float32.*bool"),
        ([1.0], {"signature": "other"}, "'serving_default'.*'other'"),
        ([1.0], {"signature": "kinds"}, "dict with the inputs"),
        ([[1.5] * 3] * 2, {"signature": "fixed"}, "int64.*float64"),
        (2**40, {"signature": "spin"}, "int32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_they_are_sent(
    client, inputs, options, words
):
    with pytest.raises(ValueError, match=words):
        client.predict("module", inputs, **options)


@pytest.mark.parametrize(
    "ask, code, words",
    [
        (lambda c: c.predict("other", [1.0]), Code.NOT_FOUND, "other"),
        (lambda c: c.predict("module", [1.0], version=7), Code.NOT_FOUND, "7"),
        (lambda c: c.predict("module", [1.0], label="a"), Code.INVALID_ARGUMENT, "a"),
        (lambda c: c.status("other"), Code.NOT_FOUND, "other"),
        (lambda c: c.metadata("other/../x"), Code.NOT_FOUND, "other/../x"),
        (lambda c: c.predict("module", [[1.0]]), Code.INVALID_ARGUMENT, "shape"),
        (
            lambda c: c.predict("classifier", np.zeros((1 << 17, 4))),
            Code.RESOURCE_EXHAUSTED,
            "1048576",
        ),
    ],
)
def test_what_the_server_refuses_is_told(client, ask, code, words):
    with pytest.raises(ServingError, match=words) as caught:
        ask(client)
    assert caught.value.code is code


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_no_server(scheme):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    client = connect(f"{scheme}127.0.0.1:{port}", timeout=5)
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port}"):
        client.status("module")
    client.close()


def test_too_large_an_answer_is_refused(server):
    for address in (server.rest_url, server.grpc_target):
        with contextlib.closing(connect(address, max_answer_bytes=20_000)) as client:
            assert len(client.predict("module", [0.5] * 1000)["y"]) == 1000
            with pytest.raises(ServingError, match="larger than") as caught:
                client.predict("module", [0.5] * 10_000)
        assert caught.value.code is Code.RESOURCE_EXHAUSTED


def test_an_answer_that_drips_is_given_up():
    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1 << 16)
            self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.request.sendall(b" ")
                    time.sleep(0.05)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.handle_request).start()
        client = connect(f"http://127.0.0.1:{other.server_address[1]}", timeout=0.3)
        with pytest.raises(ServingError, match="0.3 s") as caught:
            client.status("module")
    assert caught.value.code is Code.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    "said, error",
    [
        (b"", ConnectionError),
        (b"SSH-2.0-x\r\n", ConnectionError),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 4\r\n\r\n<p>x", ServingError),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{", ConnectionError),
    ],
)
def test_what_is_not_such_a_server(said, error):
    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1 << 16)
            self.request.sendall(said)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as other:
        threading.Thread(target=other.handle_request).start()
        client = connect(f"http://127.0.0.1:{other.server_address[1]}", timeout=5)
        with pytest.raises(error):
            client.status("module")


def test_a_server_that_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = connect(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.1)
        with pytest.raises(ServingError, match="0.1 s") as caught:
            client.status("module")
    assert caught.value.code is Code.DEADLINE_EXCEEDED


@pytest.mark.parametrize("address", ["ftp://x", "http://"])
def test_bad_addresses_are_refused(address):
    with pytest.raises(ValueError, match="Received"):
        connect(address)


def test_the_rest_client_needs_only_numpy():
    code = (
        "import sys; from kzoo.zoo.serving.client import connect;"
        "connect('http://127.0.0.1:1');"
        "print([m for m in ('tensorflow', 'keras', 'grpc') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout == "[]\n", out.stderr
