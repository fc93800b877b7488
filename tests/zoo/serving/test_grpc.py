"""The gRPC API: TensorFlow Serving's answers and status codes."""

import concurrent.futures
import random

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.tensorflow

if keras.backend.backend() == "tensorflow":
    import grpc
    import tensorflow as tf
    from google.protobuf import wrappers_pb2
    from tensorflow_serving.apis import (
        classification_pb2,
        get_model_metadata_pb2,
        get_model_status_pb2,
        inference_pb2,
        model_management_pb2,
        model_service_pb2_grpc,
        predict_pb2,
        prediction_service_pb2_grpc,
        regression_pb2,
    )

PREDICT = "/tensorflow.serving.PredictionService/Predict"


@pytest.fixture
def prediction(grpc_channel):
    return prediction_service_pb2_grpc.PredictionServiceStub(grpc_channel)


@pytest.fixture
def status(grpc_channel):
    return model_service_pb2_grpc.ModelServiceStub(grpc_channel)


@pytest.fixture(autouse=True)
def still_serving(prediction):
    yield
    assert doubled(prediction, [1.5, -2.0]) == [3.0, -4.0]


def request(model="module", signature="", version=None, label=None, **inputs):
    message = predict_pb2.PredictRequest()
    message.model_spec.name = model
    message.model_spec.signature_name = signature
    if version is not None:
        message.model_spec.version.value = version
    if label is not None:
        message.model_spec.version_label = label
    for name, value in inputs.items():
        message.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return message


def doubled(prediction, x, **options):
    response = prediction.Predict(request(x=np.float32(x), **options), timeout=10)
    return list(response.outputs["y"].float_val)


def refused(call, message, code, word=""):
    with pytest.raises(grpc.RpcError) as caught:
        call(message, timeout=10)
    assert caught.value.code() is code
    assert word in caught.value.details()


def test_predict(prediction):
    response = prediction.Predict(request(x=np.float32([1.5])), timeout=10)
    assert response.model_spec.name == "module"
    assert response.model_spec.version.value == 1
    assert response.model_spec.signature_name == "serving_default"
    assert list(response.outputs) == ["y"]
    assert response.outputs["y"].dtype == tf.float32.as_datatype_enum
    assert [d.size for d in response.outputs["y"].tensor_shape.dim] == [1]
    assert doubled(prediction, [1.0], version=1) == [2.0]
    assert doubled(prediction, [1.0], label="stable") == [2.0]


def test_every_type(prediction):
    inputs = {
        "text": np.array([b"a", b"\xff"], object),
        "count": np.int32([1, -2]),
        "flag": np.array([True, False]),
        "point": np.float64([[1, 2], [3, 4.5]]),
        "level": np.uint8([0, 255]),
    }
    response = prediction.Predict(request(signature="kinds", **inputs), timeout=10)
    outputs = {k: tf.make_ndarray(v) for k, v in response.outputs.items()}
    assert outputs.keys() == inputs.keys() | {"text_bytes"}
    assert outputs["text"].tolist() == [b"aa", b"\xff\xff"]
    assert outputs["text_bytes"].tolist() == [b"a", b"\xff"]
    assert outputs["count"].tolist() == [2, -1] and outputs["count"].dtype == np.int32
    assert outputs["flag"].tolist() == [False, True]
    np.testing.assert_array_equal(outputs["point"], inputs["point"] / 3)
    assert outputs["level"].tolist() == [0, 255] and outputs["level"].dtype == np.uint8


def test_types_that_only_grpc_has(prediction):
    x = np.float16([1.5, np.inf])
    response = prediction.Predict(request(signature="half", x=x), timeout=10)
    np.testing.assert_array_equal(tf.make_ndarray(response.outputs["y"]), x)


def test_a_scalar_and_an_empty_batch(prediction):
    response = prediction.Predict(
        request(signature="spin", times=np.int32(2)), timeout=10
    )
    assert tf.make_ndarray(response.outputs["trace"]) == 100
    assert doubled(prediction, np.zeros((0,))) == []


def test_a_value_given_once_fills_the_tensor(prediction):
    proto = tf.make_tensor_proto(np.float32([7, 7, 7]))
    proto.ClearField("tensor_content")
    proto.float_val[:] = [7]
    message = request()
    message.inputs["x"].CopyFrom(proto)
    response = prediction.Predict(message, timeout=10)
    assert list(response.outputs["y"].float_val) == [14, 14, 14]


def test_chosen_outputs(prediction):
    x = np.float32([[1, 2, 3, 4]])
    message = request("classifier", x=x)
    message.output_filter[:] = ["predictive_entropy"]
    response = prediction.Predict(message, timeout=10)
    assert list(response.outputs) == ["predictive_entropy"]
    message.output_filter[:] = ["entropy"]
    code = grpc.StatusCode.INVALID_ARGUMENT
    refused(prediction.Predict, message, code, "alias not found in signature: entropy")
    message.output_filter[:] = ["predictive_entropy"] * 2
    refused(prediction.Predict, message, code, "duplicate")


def test_malformed_predictions_are_refused(prediction):
    x = np.float32([1.0])
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    cases = [
        (predict_pb2.PredictRequest(), invalid, "Missing ModelSpec"),
        (request("", x=x), invalid, "no name"),
        (request("other", x=x), grpc.StatusCode.NOT_FOUND, "Latest(other)"),
        (request(version=2, x=x), grpc.StatusCode.NOT_FOUND, "Specific(module, 2)"),
        (request(version=-1, x=x), grpc.StatusCode.NOT_FOUND, "Specific(module, -1)"),
        (request(label="new", x=x), invalid, "label: new"),
        (
            request(signature="other", x=x),
            grpc.StatusCode.FAILED_PRECONDITION,
            '"other" not found',
        ),
        (request(), invalid, "Missing but required: {x}"),
        (request(x=x, z=x), invalid, "'z'"),
        (request(z=x), invalid, "'z'"),
        (request(x=np.float64([1])), invalid, "expects to be float32 but is float64"),
        (request(x=np.int32([1])), invalid, "expects to be float32 but is int32"),
        (request(x=np.array([b"1"])), invalid, "but is string"),
        (request(x=np.float32(1)), invalid, "shape [?]"),
        (request(x=np.float32([[1]])), invalid, "shape [?]"),
        (request(signature="fixed", x=np.int64([[1, 2, 3]])), invalid, "[2,3]"),
    ]
    for message, code, word in cases:
        refused(prediction.Predict, message, code, word)


def test_tensors_that_contradict_themselves_are_refused(prediction):
    def edited(edit):
        message = request(x=np.float32([1, 2]))
        edit(message.inputs["x"])
        return message

    def size(value):
        return lambda proto: setattr(proto.tensor_shape.dim[0], "size", value)

    def dtype(value):
        return lambda proto: setattr(proto, "dtype", value)

    cases = [
        size(3), size(-1), size(2**62), size(1 << 30),
        dtype(0), dtype(tf.resource.as_datatype_enum), dtype(999),
        lambda proto: setattr(proto.tensor_shape, "unknown_rank", True),
        lambda proto: setattr(proto, "tensor_content", b"abc"),
        lambda proto: proto.tensor_shape.dim.add(size=2**40),
        lambda proto: proto.ClearField("tensor_shape"),
        lambda proto: [proto.tensor_shape.dim.add(size=1) for _ in range(300)],
    ]  # fmt: skip
    for edit in cases:
        refused(prediction.Predict, edited(edit), grpc.StatusCode.INVALID_ARGUMENT)


def test_a_message_too_large_is_refused(prediction):
    message = request(x=np.zeros(1 << 19, np.float32))
    refused(prediction.Predict, message, grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_bytes_that_are_no_message(grpc_channel):
    """The seeded fuzz test."""
    rng = random.Random(0)
    good = request(x=np.float32([1, 2]), signature="scale").SerializeToString()
    call = grpc_channel.unary_unary(PREDICT)
    for _ in range(100):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            call(bytes(data), timeout=10)
        except grpc.RpcError as error:
            assert error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
            assert error.code() is not grpc.StatusCode.UNAVAILABLE


def test_a_deadline_is_kept(prediction):
    message = request(signature="spin", times=np.int32(2**31 - 1))
    with pytest.raises(grpc.RpcError) as caught:
        prediction.Predict(message, timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_metadata(prediction):
    message = get_model_metadata_pb2.GetModelMetadataRequest(
        metadata_field=["signature_def"]
    )
    message.model_spec.name = "classifier"
    response = prediction.GetModelMetadata(message, timeout=10)
    assert response.model_spec.version.value == 1
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    signature = signatures.signature_def["serving_default"]
    assert [d.size for d in signature.inputs["x"].tensor_shape.dim] == [-1, 4]
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    for fields in ([], ["graph_def"]):
        message.metadata_field[:] = fields
        refused(prediction.GetModelMetadata, message, invalid, "metadata_field")


def test_status(status):
    message = get_model_status_pb2.GetModelStatusRequest()
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    refused(status.GetModelStatus, message, invalid, "Missing ModelSpec")
    message.model_spec.name = "module"
    (version,) = status.GetModelStatus(message, timeout=10).model_version_status
    assert version.version == 1 and version.status.error_code == 0
    assert version.state == get_model_status_pb2.ModelVersionStatus.AVAILABLE
    message.model_spec.version.value = 9
    refused(status.GetModelStatus, message, grpc.StatusCode.NOT_FOUND, "version 9")


def test_methods_that_do_not_fit(prediction, status):
    invalid, missing = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED
    message = classification_pb2.ClassificationRequest()
    message.model_spec.name = "module"
    refused(prediction.Classify, message, invalid, "tensorflow/serving/classify")
    message = regression_pb2.RegressionRequest()
    message.model_spec.name = "module"
    refused(prediction.Regress, message, invalid, "tensorflow/serving/regress")
    message = inference_pb2.MultiInferenceRequest()
    refused(prediction.MultiInference, message, missing)
    message = model_management_pb2.ReloadConfigRequest()
    refused(status.HandleReloadConfigRequest, message, missing)


def test_health(grpc_channel):
    check = grpc_channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        wrappers_pb2.StringValue.SerializeToString,
        wrappers_pb2.Int32Value.FromString,
    )
    for service in ("", "tensorflow.serving.PredictionService"):
        serving = check(wrappers_pb2.StringValue(value=service), timeout=10)
        assert serving.value == 1
    unknown = wrappers_pb2.StringValue(value="other")
    refused(check, unknown, grpc.StatusCode.NOT_FOUND)


def test_parallel_clients_get_their_own_answers(prediction):
    def ask(client):
        values = [client * 1000.0 + i + 0.5 for i in range(20)]
        return [doubled(prediction, [v]) for v in values] == [[2 * v] for v in values]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))
