"""A client of this project's server and of TensorFlow Serving, over REST and gRPC."""

import contextlib
import http.client
import json
import time
import urllib.parse

from . import tensors
from .status import HTTP_STATUS, Code, ServingError

DEFAULT_SIGNATURE = "serving_default"
MAX_ANSWER_BYTES = 1 << 28


def connect(address, timeout=30.0, max_answer_bytes=MAX_ANSWER_BYTES):
    """Returns a client of a server's address.

    Args:
        address: `http://host:port` for REST, `host:port` for gRPC.
        timeout: Seconds to wait for an answer.
        max_answer_bytes: The largest answer taken.

    Returns:
        A RestClient or a GrpcClient, which are asked in the same way.

    Raises:
        ImportError: The address is for gRPC, which is not installed.
    """
    if "://" in address:
        return RestClient(address, timeout, max_answer_bytes)
    return GrpcClient(address, timeout, max_answer_bytes)


class _Client:
    """What both clients share: a request is checked and typed by the signature."""

    def predict(self, name, inputs, *, version=None, label=None, signature=""):
        """Asks a model.

        Args:
            name: The model's name.
            inputs: {input: array-like}, or one array-like if there is one input.
                Numbers are converted to the input's type; strings may be str or bytes.
            version: An integer, or None for the newest.
            label: A version label instead.
            signature: The signature's name; empty for `serving_default`.

        Returns:
            {output: numpy.ndarray}; strings as bytes in arrays of objects.

        Raises:
            ValueError: The inputs do not fit the signature.
            ServingError: The server refused.
            ConnectionError: No server answers.
        """
        key = signature or DEFAULT_SIGNATURE
        signatures = self.metadata(name, version=version, label=label)["signatures"]
        if key not in signatures:
            raise ValueError(
                f"Expected one of the signatures {sorted(signatures)}. Received: "
                f"{key!r}"
            )
        expected = signatures[key]["inputs"]
        if not isinstance(inputs, dict):
            if len(expected) != 1:
                raise ValueError(
                    f"Expected a dict with the inputs {sorted(expected)}. Received: "
                    f"{type(inputs).__name__}"
                )
            inputs = {next(iter(expected)): inputs}
        if inputs.keys() != expected.keys():
            raise ValueError(
                f"Expected the inputs {sorted(expected)}. Received: {sorted(inputs)}"
            )
        arrays = {
            input: tensors.typed(input, value, expected[input]["dtype"])
            for input, value in inputs.items()
        }
        return self._predict(name, arrays, version, label, key, signatures[key])


class RestClient(_Client):
    """Asks over REST.

    Args:
        url: As `http://127.0.0.1:8501`.
        timeout: Seconds to wait for an answer.
        max_answer_bytes: The largest answer taken.

    Raises:
        ValueError: The URL is none.
    """

    def __init__(self, url, timeout=30.0, max_answer_bytes=MAX_ANSWER_BYTES):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"Expected http://host:port. Received: {url!r}")
        self._url = parts
        self._timeout = timeout
        self._limit = max_answer_bytes

    def metadata(self, name, *, version=None, label=None):
        """Returns what a model takes and gives.

        Args:
            name: The model's name.
            version: An integer, or None for the newest.
            label: A version label instead.

        Returns:
            {"version": int, "signatures": {signature: {"inputs": {name: {"dtype":
            "DT_FLOAT", "shape": [None, 8, 8, 1]}}, "outputs": ...}}}; a shape is None
            when not even the rank is known.

        Raises:
            ServingError: The server refused.
            ConnectionError: No server answers.
        """
        answer = self._ask("GET", _path(name, version, label) + "/metadata")
        signatures = answer["metadata"]["signature_def"]["signature_def"]
        return {
            "version": int(answer["model_spec"]["version"]),
            "signatures": {
                key: {
                    side: {
                        tensor: {
                            "dtype": info["dtype"],
                            "shape": _shape_from_json(info["tensor_shape"]),
                        }
                        for tensor, info in signature[side].items()
                    }
                    for side in ("inputs", "outputs")
                }
                for key, signature in signatures.items()
                if not key.startswith("__saved_model")
            },
        }

    def status(self, name, *, version=None, label=None):
        """Returns the states of a model's versions.

        Args:
            name: The model's name.
            version: An integer, or None for all.
            label: A version label instead.

        Returns:
            {version: state}, as `{2: "AVAILABLE", 1: "END"}`.

        Raises:
            ServingError: The server refused.
            ConnectionError: No server answers.
        """
        answer = self._ask("GET", _path(name, version, label))
        return {
            int(v["version"]): v["state"] for v in answer.get("model_version_status")
        }

    def close(self):
        """Does nothing: every request has a connection of its own."""

    def _predict(self, name, arrays, version, label, key, signature):
        request = {
            "signature_name": key,
            "inputs": {input: _to_json(array) for input, array in arrays.items()},
        }
        path = _path(name, version, label) + ":predict"
        answer = self._ask("POST", path, json.dumps(request))["outputs"]
        outputs = signature["outputs"]
        if len(outputs) == 1:
            answer = {next(iter(outputs)): answer}
        return {
            output: tensors.from_json(answer[output], info["dtype"], output)
            for output, info in outputs.items()
        }

    def _ask(self, method, path, body=None):
        connect = http.client.HTTPConnection
        if self._url.scheme == "https":
            connect = http.client.HTTPSConnection
        connection = connect(self._url.netloc, timeout=self._timeout)
        path = self._url.path.rstrip("/") + path
        headers = {"Content-Type": "application/json"}
        try:
            # A server may refuse a body before it has all of it.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body, headers)
            response = connection.getresponse()
            text = self._read(response)
        except TimeoutError:
            raise ServingError(
                Code.DEADLINE_EXCEEDED, f"no answer within {self._timeout} s"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionError(
                f"No server answers at {self._url.geturl()}: {error or type(error)}"
            ) from error
        finally:
            connection.close()
        try:
            answer = json.loads(text)
        except ValueError:
            answer = {"error": text[:200].decode(errors="replace")}
        if response.status != 200:
            message = answer.get("error", "") if isinstance(answer, dict) else ""
            raise ServingError(_code(response.status), message or response.reason)
        return answer

    def _read(self, response):
        """Reads an answer, within the limits of size and time."""
        end = time.monotonic() + self._timeout
        text = bytearray()
        while chunk := response.read1(1 << 16):
            text += chunk
            if len(text) > self._limit:
                raise ServingError(
                    Code.RESOURCE_EXHAUSTED,
                    f"the answer is larger than {self._limit} bytes",
                )
            if time.monotonic() > end:
                raise TimeoutError
        if response.length:
            raise http.client.IncompleteRead(bytes(text), response.length)
        return bytes(text)


class GrpcClient(_Client):
    """Asks over gRPC.

    Args:
        target: As `127.0.0.1:8500`.
        timeout: Seconds to wait for an answer.
        max_answer_bytes: The largest answer taken.

    Raises:
        ImportError: gRPC is not installed.
    """

    def __init__(self, target, timeout=30.0, max_answer_bytes=MAX_ANSWER_BYTES):
        from . import grpc as front

        self._front = front
        self._timeout = timeout
        self._target = target
        limits = [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", max_answer_bytes),
        ]
        self._channel = front.grpc.insecure_channel(target, limits)
        self._prediction = front.prediction_service_pb2_grpc.PredictionServiceStub(
            self._channel
        )
        self._model = front.model_service_pb2_grpc.ModelServiceStub(self._channel)

    def metadata(self, name, *, version=None, label=None):
        """Returns what a model takes and gives; see `RestClient.metadata`.

        Args:
            name: The model's name.
            version: An integer, or None for the newest.
            label: A version label instead.

        Returns:
            As `RestClient.metadata`.

        Raises:
            ServingError: The server refused.
            ConnectionError: No server answers.
        """
        apis = self._front.get_model_metadata_pb2
        request = apis.GetModelMetadataRequest(metadata_field=["signature_def"])
        _choose(request, name, version, label)
        answer = self._ask(self._prediction.GetModelMetadata, request)
        signatures = apis.SignatureDefMap()
        answer.metadata["signature_def"].Unpack(signatures)
        return {
            "version": answer.model_spec.version.value,
            "signatures": {
                key: {
                    "inputs": _infos(signature.inputs),
                    "outputs": _infos(signature.outputs),
                }
                for key, signature in signatures.signature_def.items()
                if not key.startswith("__saved_model")
            },
        }

    def status(self, name, *, version=None, label=None):
        """Returns the states of a model's versions; see `RestClient.status`.

        Args:
            name: The model's name.
            version: An integer, or None for all.
            label: A version label instead.

        Returns:
            As `RestClient.status`.

        Raises:
            ServingError: The server refused.
            ConnectionError: No server answers.
        """
        apis = self._front.get_model_status_pb2
        request = apis.GetModelStatusRequest()
        _choose(request, name, version, label)
        answer = self._ask(self._model.GetModelStatus, request)
        names = apis.ModelVersionStatus.State
        return {v.version: names.Name(v.state) for v in answer.model_version_status}

    def close(self):
        """Closes the connection."""
        self._channel.close()

    def _predict(self, name, arrays, version, label, key, signature):
        import tensorflow as tf

        request = self._front.predict_pb2.PredictRequest()
        _choose(request, name, version, label)
        request.model_spec.signature_name = key
        for input, array in arrays.items():
            request.inputs[input].CopyFrom(tf.make_tensor_proto(array))
        answer = self._ask(self._prediction.Predict, request)
        return {k: tf.make_ndarray(proto) for k, proto in answer.outputs.items()}

    def _ask(self, method, request):
        grpc = self._front.grpc
        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            code, message = Code(error.code().value[0]), error.details()
            if code is Code.UNAVAILABLE:
                raise ConnectionError(
                    f"No server answers at {self._target}: {message}"
                ) from error
            raise ServingError(code, message) from None


def _to_json(array):
    # Strings travel as binary data, which is right for text too.
    return tensors.to_json(array, "_bytes" if array.dtype == object else "")


def _path(name, version, label):
    path = f"/v1/models/{urllib.parse.quote(name, safe='')}"
    if version is not None:
        path += f"/versions/{version}"
    if label is not None:
        path += f"/labels/{urllib.parse.quote(label, safe='')}"
    return path


def _choose(request, name, version, label):
    request.model_spec.name = name
    if version is not None:
        request.model_spec.version.value = version
    if label is not None:
        request.model_spec.version_label = label


def _shape_from_json(shape):
    if shape.get("unknown_rank"):
        return None
    sizes = [int(dim["size"]) for dim in shape.get("dim", [])]
    return [None if size < 0 else size for size in sizes]


def _infos(infos):
    import tensorflow as tf
    from tensorflow.core.framework.types_pb2 import DataType

    return {
        name: {
            "dtype": DataType.Name(info.dtype),
            "shape": tf.TensorShape(info.tensor_shape).as_list()
            if not info.tensor_shape.unknown_rank
            else None,
        }
        for name, info in infos.items()
    }


def _code(status):
    """The likeliest canonical code of an HTTP status."""
    if status == 413:
        return Code.RESOURCE_EXHAUSTED
    return next((c for c, s in HTTP_STATUS.items() if s == status), Code.UNKNOWN)
