"""One loaded version of a model: checks a request against a signature and runs it."""

import os
import threading
from pathlib import Path

import numpy as np
import tensorflow as tf

from . import graph
from .status import Code, ServingError, invalid

DEFAULT_SIGNATURE = "serving_default"
INIT_SIGNATURE = "__saved_model_init_op"
WARMUP_REQUESTS = Path("assets.extra") / "tf_serving_warmup_requests"
MAX_WARMUP_REQUESTS = 1000
MAX_WARMUP_BYTES = 64 << 20  # of one input


class Servable:
    """A SavedModel in a session of its own, as TensorFlow Serving runs it.

    The graph that is checked is the graph that runs: `saved_model.pb` is read once.

    Args:
        path: The SavedModel's folder.
        allow_any_ops: Whether to load a model that has operations beyond
            `graph.ALLOWED_OPS`: such a model may read and write files.
        xla: Whether requests to a signature that needs XLA are run. TensorFlow
            Serving refuses them unless started with
            `--xla_cpu_compilation_enabled=true` or the flag for GPUs.

    Raises:
        ValueError: The folder holds no SavedModel for serving.
        ServingError: The model has forbidden operations, or does not load.
    """

    def __init__(self, path, allow_any_ops=False, xla=False):
        saved_model = graph.read(path)
        self.meta_graph = graph.serving_graph(saved_model)
        forbidden = graph.forbidden_ops(saved_model)
        if forbidden and not allow_any_ops:
            raise ServingError(
                Code.PERMISSION_DENIED,
                f"{os.fspath(path)} has operations that a model has no use for: "
                f"{', '.join(forbidden)}. It was not loaded. allow_any_ops=True loads "
                "it, if you trust whoever made it with all of your files",
            )
        self._signatures = {
            name: signature
            for name, signature in self.meta_graph.signature_def.items()
            if not name.startswith("__saved_model")
        }
        self._refused = set()
        if not xla:
            self._refused = {
                name
                for name in self._signatures
                if graph.needs_xla(self.meta_graph, name)
            }
        self._session = _session(Path(path), self.meta_graph)
        self._users = 0
        self._condition = threading.Condition()

    def signature(self, name=""):
        """Returns a signature's SignatureDef.

        Args:
            name: The signature's name; empty for `serving_default`.

        Returns:
            The SignatureDef.

        Raises:
            ServingError: There is none of that name.
        """
        name = name or DEFAULT_SIGNATURE
        if name not in self._signatures:
            raise ServingError(
                Code.FAILED_PRECONDITION,
                f'Serving signature key "{name}" not found. The model has: '
                f"{', '.join(sorted(self._signatures))}",
            )
        return self._signatures[name]

    def predict(self, inputs, signature="", outputs=(), timeout=None):
        """Runs a signature.

        Args:
            inputs: {name: numpy.ndarray}, exactly the signature's inputs, with its
                types and shapes; strings as bytes in arrays of objects.
            signature: The signature's name; empty for `serving_default`.
            outputs: Names of the outputs wanted; empty for all.
            timeout: Seconds after which to give up, or None.

        Returns:
            {name: numpy.ndarray}.

        Raises:
            ServingError: The request does not fit the signature, or running failed.
        """
        definition = self.signature(signature)
        name = signature or DEFAULT_SIGNATURE
        if name in self._refused:
            raise ServingError(
                Code.INTERNAL,
                f"XLA compilation disabled: signature {name!r} needs it. Ask "
                f"{DEFAULT_SIGNATURE!r}, or start the server with XLA",
            )
        feeds = _feeds(definition, inputs)
        fetches = _fetches(definition, outputs)
        options = None
        if timeout is not None:
            options = tf.compat.v1.RunOptions(timeout_in_ms=max(1, int(timeout * 1e3)))
        try:
            answers = self._session.run(fetches, feeds, options=options)
        except tf.errors.OpError as error:
            raise ServingError(error.error_code, _cause(error)) from error
        # A single string comes as bytes, which NumPy would cut at a zero byte.
        return {
            name: np.asarray(value, object if isinstance(value, bytes) else None)
            for name, value in answers.items()
        }

    def warm_up(self, path):
        """Replays the warm-up requests that come with the model, if there are any.

        Args:
            path: The SavedModel's folder.

        Returns:
            The number of requests replayed.

        Raises:
            ServingError: One of them failed, or there are too many.
            ImportError: There are some, and tensorflow-serving-api is not installed.
        """
        file = Path(path) / WARMUP_REQUESTS
        if not file.exists():
            return 0
        from google.protobuf.message import DecodeError
        from tensorflow_serving.apis import prediction_log_pb2

        count = 0
        try:
            for record in tf.data.TFRecordDataset(os.fspath(file)).as_numpy_iterator():
                if (count := count + 1) > MAX_WARMUP_REQUESTS:
                    raise invalid(
                        "Number of warmup records exceeds the maximum "
                        f"({MAX_WARMUP_REQUESTS}) at {file}"
                    )
                log = prediction_log_pb2.PredictionLog.FromString(record)
                request = log.predict_log.request
                self.predict(
                    {
                        name: from_proto(proto, name, MAX_WARMUP_BYTES)
                        for name, proto in request.inputs.items()
                    },
                    request.model_spec.signature_name,
                )
        except (tf.errors.OpError, DecodeError) as error:
            raise invalid(f"{file} cannot be read: {_cause(error)}") from error
        return count

    def __enter__(self):
        """Keeps the servable loaded until the end of the `with` block."""
        with self._condition:
            self._users += 1
        return self

    def __exit__(self, *error):
        """Lets `close` proceed."""
        with self._condition:
            self._users -= 1
            self._condition.notify_all()

    def close(self):
        """Waits for those who use it, then frees its memory."""
        with self._condition:
            self._condition.wait_for(lambda: not self._users)
        self._session.close()


def from_proto(proto, name, limit):
    """Makes an array of a TensorProto that came from outside.

    Args:
        proto: The TensorProto.
        name: The input's name, for errors.
        limit: The most bytes that the array may take: a proto of some bytes can
            describe a tensor of any size.

    Returns:
        numpy.ndarray.

    Raises:
        ServingError: It is larger, or it contradicts itself.
    """
    sizes = [dim.size for dim in proto.tensor_shape.dim]
    if proto.tensor_shape.unknown_rank or any(size < 0 for size in sizes):
        raise invalid(f"tensor parsing error: {name}: the shape is not known")
    try:
        dtype = tf.as_dtype(proto.dtype)
        if int(np.prod(sizes, dtype=object)) * dtype.size > limit:
            raise invalid(f"tensor parsing error: {name}: more than {limit} bytes")
        return tf.make_ndarray(proto)
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise invalid(f"tensor parsing error: {name}: {error}") from None


def _session(path, meta_graph):
    """A session with the graph imported, its variables restored, its tables filled."""
    config = tf.compat.v1.ConfigProto()
    # Several models share one GPU.
    config.gpu_options.allow_growth = True
    with tf.Graph().as_default() as imported:
        session = tf.compat.v1.Session(graph=imported, config=config)
        try:
            tf.import_graph_def(meta_graph.graph_def, name="")
            saver = meta_graph.saver_def
            if saver.restore_op_name and (path / "variables/variables.index").exists():
                prefix = os.fspath(path / "variables" / "variables")
                session.run(saver.restore_op_name, {saver.filename_tensor_name: prefix})
            assets = {
                asset.tensor_info.name: os.fspath(path / "assets" / asset.filename)
                for asset in meta_graph.asset_file_def
            }
            _check_signatures(imported, meta_graph)
            for name in _initializers(meta_graph):
                session.run(name, assets)
        except (tf.errors.OpError, TypeError, ValueError, KeyError, OSError) as error:
            session.close()
            code = getattr(error, "error_code", Code.DATA_LOSS)
            raise ServingError(
                code, f"{path} does not load: {_cause(error)}"
            ) from error
    return session


def _check_signatures(imported, meta_graph):
    """Requires every dense tensor of a signature to be in the graph, with its type."""
    for key, signature in meta_graph.signature_def.items():
        if key == INIT_SIGNATURE:  # names an operation
            continue
        for name, info in (*signature.inputs.items(), *signature.outputs.items()):
            if not _is_dense(info):  # refused when it is asked for
                continue
            expected = imported.get_tensor_by_name(info.name).dtype.base_dtype
            if tf.as_dtype(info.dtype).base_dtype != expected:
                raise ValueError(
                    f"Expected {expected.name} as the type of {name!r} in the "
                    f"signature {key!r}. Received: {tf.as_dtype(info.dtype).name}"
                )


def _initializers(meta_graph):
    if INIT_SIGNATURE in meta_graph.signature_def:
        outputs = meta_graph.signature_def[INIT_SIGNATURE].outputs
        yield outputs[INIT_SIGNATURE].name
    for key in ("saved_model_main_op", "legacy_init_op"):
        if key in meta_graph.collection_def:
            yield from meta_graph.collection_def[key].node_list.value


def _feeds(signature, inputs):
    """Tensor names with their values, every one checked."""
    expected = signature.inputs.keys()
    if inputs.keys() != expected:
        extra = ",".join(sorted(inputs.keys() - expected))
        missing = ",".join(sorted(expected - inputs.keys()))
        raise invalid(
            f"inputs do not match the signature's ({','.join(sorted(expected))}). "
            f"Sent extra: {{{extra}}}. Missing but required: {{{missing}}}."
        )
    feeds = {}
    for name, array in inputs.items():
        info = signature.inputs[name]
        if not _is_dense(info):
            raise ServingError(
                Code.UNIMPLEMENTED, f"input {name!r} is not a dense tensor"
            )
        dtype = tf.as_dtype(info.dtype)
        array = np.asarray(array)
        if array.dtype != dtype.as_numpy_dtype:
            raise invalid(
                f"input {name!r} expects to be {dtype.name} but is {array.dtype.name}"
            )
        shape = tf.TensorShape(info.tensor_shape)
        if not shape.is_compatible_with(array.shape):
            raise invalid(
                f"input {name!r} expects shape {_shape(shape)} but has shape "
                f"{_shape(array.shape)}"
            )
        feeds[info.name] = array
    return feeds


def _fetches(signature, outputs):
    unknown = [name for name in outputs if name not in signature.outputs]
    if unknown:
        raise invalid(
            f"output tensor alias not found in signature: {unknown[0]} Outputs "
            f"expected to be in the set {{{','.join(sorted(signature.outputs))}}}."
        )
    if len(set(outputs)) < len(outputs):
        raise invalid(f"duplicate output tensor alias in {','.join(outputs)}")
    fetches = {}
    for name in outputs or signature.outputs:
        info = signature.outputs[name]
        if not _is_dense(info):
            raise ServingError(
                Code.UNIMPLEMENTED, f"output {name!r} is not a dense tensor"
            )
        fetches[name] = info.name
    return fetches


def _is_dense(info):
    """Tells whether a signature's tensor is one that a request can hold."""
    handles = (tf.resource.as_datatype_enum, tf.variant.as_datatype_enum)
    return info.WhichOneof("encoding") == "name" and info.dtype not in handles


def _shape(shape):
    """A shape as `[?,8,8]`."""
    if isinstance(shape, tf.TensorShape):
        if shape.rank is None:
            return "[...]"
        shape = shape.as_list()
    return "[" + ",".join("?" if size is None else str(size) for size in shape) + "]"


def _cause(error):
    """What went wrong, without the stack of the graph's construction."""
    message = getattr(error, "message", None) or str(error)
    lines = [line for line in message.splitlines() if line.strip()]
    kept = [
        line
        for line in lines
        if not line.startswith(("Graph execution error", "Detected at node", "Node:"))
    ]
    return "\n".join(kept[:3]) or type(error).__name__
