"""Small SavedModels, and plain HTTP without a client that would tidy it up."""

import json
import socket

import keras
import numpy as np
import pytest

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    class Module(tf.Module):
        """Signatures whose answers a reader can compute."""

        def __init__(self, factor=2.0):
            super().__init__()
            self.factor = tf.Variable(factor)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
        def scale(self, x):
            return {"y": self.factor * x}

        @tf.function(
            input_signature=[
                tf.TensorSpec([None], tf.string, "text"),
                tf.TensorSpec([None], tf.int32, "count"),
                tf.TensorSpec([None], tf.bool, "flag"),
                tf.TensorSpec([None, 2], tf.float64, "point"),
                tf.TensorSpec([None], tf.uint8, "level"),
            ]
        )
        def kinds(self, text, count, flag, point, level):
            return {
                "text": tf.strings.join([text, text]),
                "text_bytes": text,
                "count": count + 1,
                "flag": ~flag,
                "point": point / 3.0,
                "level": level,
            }

        @tf.function(input_signature=[tf.TensorSpec([2, 3], tf.int64, "x")])
        def fixed(self, x):
            return {"y": tf.reduce_sum(x, 1)}

        @tf.function(input_signature=[tf.TensorSpec([], tf.int32, "times")])
        def spin(self, times):
            """Takes as long as it is told to."""
            x = tf.eye(100)
            for _ in tf.range(times):
                x = tf.matmul(x, x)
            return {"trace": tf.linalg.trace(x)}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "text")])
        def join(self, text):
            return {"joined": tf.strings.reduce_join(text)}

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float16, "x")])
        def half(self, x):
            return {"y": x}

        def write(self, path):
            names = ("scale", "kinds", "fixed", "spin", "join", "half")
            functions = {name: getattr(self, name) for name in names}
            functions["serving_default"] = functions["scale"]
            tf.saved_model.save(self, str(path), functions)


@pytest.fixture(scope="session")
def module_path(tmp_path_factory):
    """A base folder with version 1 of `Module`."""
    base = tmp_path_factory.mktemp("module")
    Module().write(base / "1")
    return base


@pytest.fixture(scope="session")
def classifier():
    """A classifier of four numbers, its weights drawn from a fixed seed."""
    x = keras.Input((4,), name="x")
    kernel = keras.initializers.RandomNormal(seed=1)
    return keras.Model(
        x, keras.layers.Dense(3, kernel_initializer=kernel)(x), name="classifier"
    )


@pytest.fixture(scope="session")
def classifier_path(classifier, tmp_path_factory):
    """A folder with version 1 of the classifier as kzoo exports it."""
    from kzoo.zoo.export import export

    return export(classifier, tmp_path_factory.mktemp("models")).parent


@pytest.fixture(scope="session")
def server(module_path, classifier_path):
    """A server of both, that looks for no new versions."""
    from kzoo.zoo.serving.server import ModelConfig, Server

    models = {
        "module": ModelConfig(module_path, labels={"stable": 1}),
        "classifier": classifier_path,
    }
    with Server(
        models, grpc_port=0, poll_seconds=None, max_request_bytes=1 << 20
    ) as server:
        yield server


@pytest.fixture
def grpc_channel(server):
    import grpc

    with grpc.insecure_channel(server.grpc_target) as channel:
        yield channel


@pytest.fixture(scope="session")
def probabilities(classifier):
    """What the classifier must answer to x, computed in NumPy."""
    kernel, bias = classifier.get_weights()

    def softmax(x):
        logits = x @ kernel + bias
        exp = np.exp(logits - logits.max(-1, keepdims=True))
        return exp / exp.sum(-1, keepdims=True)

    return softmax


class Raw:
    """Sends bytes as they are to a server and parses what comes back."""

    def __init__(self, server):
        host, _, port = server.rest_url.removeprefix("http://").partition(":")
        self.address = host, int(port)

    def send(self, data, half_close=True):
        """Sends bytes; returns a list of (status, headers, body)."""
        with socket.create_connection(self.address, timeout=10) as connection:
            try:
                connection.sendall(data)
                if half_close:
                    connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # refused before it was sent: the answer is there to be read
            received = b""
            while chunk := connection.recv(1 << 16):
                received += chunk
        return _answers(received)

    def ask(self, method, path, body=b"", **headers):
        """Sends one well-formed HTTP request; returns (status, parsed JSON)."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers = {"Content-Length": len(body), **headers}
        lines = [f"{k.replace('_', '-')}: {v}" for k, v in headers.items()]
        head = "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *lines, "", ""])
        ((status, _, text),) = self.send(head.encode() + body)
        return status, json.loads(text) if text else None

    def predict(self, body, model="module", rest=""):
        """Asks for a prediction."""
        return self.ask("POST", f"/v1/models/{model}{rest}:predict", body)


@pytest.fixture
def raw(server):
    return Raw(server)


@pytest.fixture
def raw_to():
    """Makes a Raw for another server."""
    return Raw


def _answers(received):
    answers = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        status = int(first.split()[1])
        size = int(headers.get("Content-Length", 0))
        answers.append((status, headers, received[:size]))
        received = received[size:]
    return answers
