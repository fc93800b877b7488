"""TensorFlow Serving's gRPC API: PredictionService, ModelService and health."""

import logging
from concurrent import futures

import numpy as np
import tensorflow as tf

from .servable import from_proto
from .status import Code, ServingError, invalid

try:
    import grpc
    from google.protobuf import wrappers_pb2
    from tensorflow_serving.apis import (
        get_model_metadata_pb2,
        get_model_status_pb2,
        model_service_pb2_grpc,
        predict_pb2,
        prediction_service_pb2_grpc,
    )
except ImportError as error:
    raise ImportError(
        "gRPC needs grpcio and tensorflow-serving-api: pip install 'kzoo[serve]'"
    ) from error

LOG = logging.getLogger("kzoo.serving")
STATUS = {code.value[0]: code for code in grpc.StatusCode}
MAX_MESSAGE = 1024
SERVING = 1
SERVICES = (
    "",
    "tensorflow.serving.PredictionService",
    "tensorflow.serving.ModelService",
)

# Where a TensorProto keeps the values of a type, as TensorFlow Serving answers them.
FIELDS = {
    tf.float32: "float_val",
    tf.float64: "double_val",
    tf.int8: "int_val",
    tf.uint8: "int_val",
    tf.int16: "int_val",
    tf.uint16: "int_val",
    tf.int32: "int_val",
    tf.uint32: "uint32_val",
    tf.int64: "int64_val",
    tf.uint64: "uint64_val",
    tf.bool: "bool_val",
    tf.string: "string_val",
}


class GrpcServer:
    """Answers gRPC requests.

    Args:
        core: The Server whose models it serves.
        host: The address to listen on.
        port: The port; 0 for a free one, then found in `port`.
        threads: How many requests are worked on at once.

    Raises:
        OSError: The address cannot be listened on.
    """

    def __init__(self, core, host, port, threads):
        self._server = grpc.server(
            futures.ThreadPoolExecutor(threads, thread_name_prefix="kzoo-grpc"),
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", core.max_request_bytes),
                ("grpc.max_send_message_length", -1),
            ],
        )
        prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
            _Prediction(core), self._server
        )
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            _Status(core), self._server
        )
        self._server.add_generic_rpc_handlers([_health()])
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"Cannot listen on {address}: {error}") from error

    def start(self):
        """Starts to accept requests."""
        self._server.start()

    def stop(self, grace):
        """Stops: no new request, and `grace` seconds for those under way.

        Args:
            grace: Seconds; requests still under way then are cancelled.
        """
        self._server.stop(grace).wait()


def _answers(method):
    """Turns a ServingError into the call's status; nothing ends the server."""

    def answer(self, request, context):
        try:
            return method(self, request, context)
        except ServingError as error:
            code, message = error.code, error.message
        except Exception as error:
            LOG.exception("a gRPC request failed")
            code, message = Code.INTERNAL, type(error).__name__
        if len(message) > MAX_MESSAGE:
            message = message[:MAX_MESSAGE] + "...TRUNCATED"
        context.abort(STATUS[int(code)], message)

    return answer


class _Prediction(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, core):
        self.core = core

    @_answers
    def Predict(self, request, context):
        name, version, label = _model(request)
        timeout = context.time_remaining()
        if timeout is None or timeout > self.core.timeout:
            timeout = self.core.timeout
        with self.core.lend(name, version, label) as (number, servable):
            signature = servable.signature(request.model_spec.signature_name)
            limit = self.core.max_request_bytes
            inputs = {
                key: _input(proto, signature.inputs, key, limit)
                for key, proto in request.inputs.items()
            }
            outputs = servable.predict(
                inputs,
                request.model_spec.signature_name,
                request.output_filter,
                timeout,
            )
        response = predict_pb2.PredictResponse()
        response.model_spec.name = name
        response.model_spec.version.value = number
        response.model_spec.signature_name = (
            request.model_spec.signature_name or "serving_default"
        )
        for key, array in outputs.items():
            response.outputs[key].CopyFrom(to_proto(array))
        return response

    @_answers
    def GetModelMetadata(self, request, context):
        name, version, label = _model(request)
        if list(request.metadata_field) != ["signature_def"]:
            raise invalid(
                "Expected metadata_field ['signature_def']. Received: "
                f"{list(request.metadata_field)}"
            )
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        signatures = get_model_metadata_pb2.SignatureDefMap()
        with self.core.lend(name, version, label) as (number, servable):
            for key, signature in servable.meta_graph.signature_def.items():
                signatures.signature_def[key].CopyFrom(signature)
        response.model_spec.name = name
        response.model_spec.version.value = number
        response.metadata["signature_def"].Pack(signatures)
        return response

    @_answers
    def Classify(self, request, context):
        self._refuse(request, "tensorflow/serving/classify")

    @_answers
    def Regress(self, request, context):
        self._refuse(request, "tensorflow/serving/regress")

    def _refuse(self, request, method):
        name, version, label = _model(request)
        with self.core.lend(name, version, label) as (_, servable):
            signature = servable.signature(request.model_spec.signature_name)
            self.core.refuse_method(signature, method)


class _Status(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, core):
        self.core = core

    @_answers
    def GetModelStatus(self, request, context):
        response = get_model_status_pb2.GetModelStatusResponse()
        for number, state, code, message in self.core.status(*_model(request)):
            version = response.model_version_status.add()
            version.version = number
            version.state = state.value
            version.status.error_code = int(code)
            version.status.error_message = message
        return response


def _input(proto, infos, name, limit):
    """Makes an array of a TensorProto that a client sent.

    Args:
        proto: The TensorProto.
        infos: The signature's inputs.
        name: The input's name.
        limit: The most bytes that the array may take: a proto of some bytes can
            describe a tensor of any size.

    Returns:
        numpy.ndarray.

    Raises:
        ServingError: It is not of the signature's type, or it contradicts itself.
    """
    if name not in infos:
        raise invalid(
            f"input {name!r} is not in the signature, which has: "
            f"{','.join(sorted(infos))}"
        )
    if proto.dtype != infos[name].dtype:
        raise invalid(
            f"input {name!r} expects to be {_type_name(infos[name].dtype)} but is "
            f"{_type_name(proto.dtype)}"
        )
    return from_proto(proto, name, limit)


def to_proto(array):
    """Makes the TensorProto of an array, values in their typed field.

    Args:
        array: numpy.ndarray.

    Returns:
        TensorProto.
    """
    array = np.asarray(array)
    field = FIELDS.get(tf.as_dtype(array.dtype))
    if field is None:
        return tf.make_tensor_proto(array)
    proto = tf.make_tensor_proto(np.zeros((0,), array.dtype))
    proto.ClearField("tensor_shape")
    for size in array.shape:
        proto.tensor_shape.dim.add().size = size
    getattr(proto, field).extend(array.ravel().tolist())
    return proto


def _type_name(dtype):
    try:
        return tf.as_dtype(dtype).name
    except TypeError:
        return f"type {dtype}"


def _model(request):
    """(name, version or None, label or None) of a request."""
    if not request.HasField("model_spec"):
        raise invalid("Missing ModelSpec")
    spec = request.model_spec
    if not spec.name:
        raise invalid("ModelSpec has no name specified.")
    choice = spec.WhichOneof("version_choice")
    return (
        spec.name,
        spec.version.value if choice == "version" else None,
        spec.version_label if choice == "version_label" else None,
    )


def _health():
    """The standard health service. Its two messages have one field each, so that the
    well-known wrapper types read and write them."""

    def check(request, context):
        if request.value not in SERVICES:
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return wrappers_pb2.Int32Value(value=SERVING)

    handler = grpc.unary_unary_rpc_method_handler(
        check,
        request_deserializer=wrappers_pb2.StringValue.FromString,
        response_serializer=wrappers_pb2.Int32Value.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(
        "grpc.health.v1.Health", {"Check": handler}
    )
