"""From a Keras model to a SavedModel that TensorFlow Serving can serve.

export(model, "saved_models")  # writes saved_models/<model.name>/1/
"""

import contextlib
import hashlib
import os
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np

from . import placing

TENSOR_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# The names that Keras counts up for inputs that were given none.
UNNAMED = re.compile(r"(keras_tensor|input_layer)(_[0-9]+)?")
HALF = ("float16", "bfloat16")
# The inputs of the signature `sampling` beside the model's, with an example of each.
SAMPLING_INPUTS = {"samples": np.int32(2), "seed": np.int32(0)}
MAX_SAMPLES = 1024
# What a server must answer as the live model does: plainly; compiled, where XLA adds
# in another order; compiled in half precision.
TOLERANCE, XLA_TOLERANCE, HALF_TOLERANCE = 1e-5, 1e-4, 3e-2


def export(
    model,
    base_path,
    version=None,
    *,
    name=None,
    function=None,
    example=None,
    xla=True,
    overwrite=False,
):
    """Writes a model as a SavedModel, in TensorFlow Serving's layout.

    The folder `base_path/name/version/` has two signatures, `serving_default` and
    `serving_xla`, which compute the same from the same variables; the second is
    compiled by XLA and needs a server that was started with XLA. A model with
    distributions over its weights, or `kzoo.layers.MonteCarloDropout`, computes with
    their means there, and has a third signature, `sampling`, with two more inputs:
    `samples`, K, and `seed`, both scalars. It computes with K draws of the weights,
    which take the place of members in the outputs of classifiers and regressors; those
    of another `function` have an axis of K after the batch's. Equal seeds give equal
    draws. Inputs keep their names and shapes: a batch of unknown size stays so.
    `float16` and `bfloat16` inputs and outputs become float32, which every client can
    send and read. The folder also holds warm-up requests for `serving_default`, which
    servers replay while loading.

    The SavedModel is written where no server looks, loaded again, compared with the
    live model, and then renamed into place: at any moment a server finds the whole of
    it or nothing.

    Of an encoder-decoder its `translator` is exported, from `source` to `ids` and
    `scores`, unless there is a `function`.

    An input without a name is called by its place: `input`, or `input_0`, `input_1`
    and so on.

    Args:
        model: A built Functional or Sequential `keras.Model`.
        base_path: The folder of all models.
        version: An integer; None for one more than the largest there is.
        name: The model's name in requests. Defaults to `model.name`.
        function: A function from the model's inputs, as the model takes them, to a
            dict of tensors. The default is `kzoo.zoo.predictive.classification(model)`:
            `probabilities`, `member_probabilities`, `predictive_entropy` and
            `mutual_information` of a classifier that ends in logits `[B, C]`; or, for
            a model that ends in `kzoo.layers.MeanAndVariance`,
            `kzoo.zoo.predictive.regression(model)`; or, for one from ids `[B, T]` to
            logits `[B, T, V]`, `kzoo.zoo.predictive.language_modelling(model)`; or, for
            a model that gives a dict of tensors, the model itself.
        example: {input: array}, a valid batch, with which the SavedModel is compared
            and warmed up. The default is drawn: floats uniform in [0, 1), zeros for
            integers, empty strings, False.
        xla: Whether to write `serving_xla` too. Models on strings cannot have it.
        overwrite: Whether a version that is already there may be replaced.

    Returns:
        Path of the version's folder.

    Raises:
        ValueError: The model, or an argument, is not as described; the version is
            there; the model needs an operation that a server should not run; or the
            SavedModel does not answer as the model does.
        RuntimeError: Keras does not run on TensorFlow.

    Example:

    >>> import keras, tempfile
    >>> from kzoo.zoo.export import export
    >>> image = keras.Input((4,), name="image")
    >>> logits = keras.layers.Dense(3)(image)
    >>> model = keras.Model(image, logits, name="tiny")
    >>> if keras.backend.backend() == "tensorflow":
    ...     path = export(model, tempfile.mkdtemp(), xla=False)
    ...     assert path.parts[-2:] == ("tiny", "1")
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        raise RuntimeError(
            "SavedModels are written on the TensorFlow backend. On another one save "
            "the model with `model.save('model.keras')`; in a process with "
            "KERAS_BACKEND=tensorflow load it with `keras.saving.load_model` and "
            f"export it. Received: backend {keras.backend.backend()!r}"
        )
    from .models.attention_seq2seq import is_attention_seq2seq, translator

    name = model.name if name is None else name
    if function is None and is_attention_seq2seq(model):
        model = translator(model)
    if not placing.is_model_name(name):
        raise ValueError(
            "Expected a name of at most 128 letters, digits, '_', '.' and '-', not a "
            f"number. Received: name={name!r}"
        )
    if version is not None and placing.version_of(str(version)) is None:
        raise ValueError(
            f"Expected an integer from 0 to {placing.MAX_VERSION}. Received: "
            f"version={version!r}"
        )
    specs = _specs(model)
    sampling = _sampling(model, function, specs)
    function = _prediction(model) if function is None else function
    example = _example(specs) if example is None else _checked(example, specs)

    folder = Path(base_path) / name
    folder.mkdir(parents=True, exist_ok=True)
    with placing.locked(folder):
        target = folder / str(_version(folder, version, overwrite))
        partial = folder / f".{target.name}.partial"
        try:
            _write(model, function, sampling, specs, example, xla, partial)
            placing.place(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


# What goes in and comes out.


def _specs(model):
    """{input name: TensorSpec}, in the order of `model.inputs`."""
    import tensorflow as tf

    inputs = getattr(model, "inputs", None)
    if not inputs:
        raise ValueError(
            "Expected a built Functional or Sequential model, whose inputs are known. "
            "Wrap another one: `x = keras.Input(..., name=...); "
            f"keras.Model(x, model(x))`. Received: {type(model).__name__}"
        )
    specs = {}
    for tensor, name in zip(inputs, _input_names(model), strict=True):
        if getattr(tensor, "sparse", False) or getattr(tensor, "ragged", False):
            raise ValueError(
                f"Expected dense inputs, as requests hold. Received: {tensor}"
            )
        if not TENSOR_NAME.fullmatch(name):
            raise ValueError(
                "Expected input names of letters, digits and underscores. Received: "
                f"{name!r}"
            )
        if name in specs:
            raise ValueError(f"Expected distinct input names. Received: {name!r} twice")
        dtype = "float32" if tensor.dtype in HALF else tensor.dtype
        specs[name] = tf.TensorSpec(tensor.shape, dtype, name)
    return specs


def _input_names(model):
    import keras

    structure = _structure(model)
    if isinstance(structure, dict):
        return [path[-1] for path, _ in keras.tree.flatten_with_path(structure)]
    given = [tensor.name for tensor in model.inputs]
    places = [f"input_{i}" for i in range(len(given))]
    if len(given) == 1:
        places = ["input"]
    return [
        place if UNNAMED.fullmatch(name) else name
        for name, place in zip(given, places, strict=True)
    ]


def _structure(model):
    """The model's inputs as it takes them: a tensor, a list or a dict."""
    import keras

    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def _prediction(model):
    """The default function, of regressors and of what looks like classifiers."""
    from .predictive import (
        classification,
        is_regressor,
        labels_ids,
        language_modelling,
        regression,
    )

    if is_regressor(model):
        return regression(model)
    # Sequential models have no `output`.
    if isinstance(getattr(model, "output", None), dict):
        return partial(model, training=False)
    if labels_ids(model):
        return language_modelling(model)
    outputs = model.outputs
    tensor = outputs[0]
    if len(outputs) != 1 or len(tensor.shape) != 2 or (tensor.shape[1] or 0) < 2:
        raise ValueError(
            "Expected a classifier, with one output of logits [B, C], a regressor that "
            "ends in kzoo.layers.MeanAndVariance, or an argument "
            "`function` from the model's inputs to a dict of outputs, as `lambda x: "
            f"{{'y': model(x, training=False)}}`. Received: outputs {outputs}"
        )
    return classification(model)[1]


def _sampling(model, function, specs):
    """The function of the signature `sampling`, or None for a model without draws."""
    import tensorflow as tf

    from ..layers.variational.mode import at_posterior_samples, can_sample
    from .predictive import (
        is_regressor,
        sampled_classification,
        sampled_regression,
    )

    if not can_sample(model):
        return None
    taken = specs.keys() & SAMPLING_INPUTS.keys()
    if taken:
        raise ValueError(
            f"Expected other names than those of the signature 'sampling', "
            f"{list(SAMPLING_INPUTS)}. Received: inputs {sorted(taken)}"
        )
    if function is None:
        sampled = sampled_regression if is_regressor(model) else sampled_classification
        predict = sampled(model)
    else:
        predict = partial(at_posterior_samples, function)

    def sample(inputs, samples, seed):
        assertions = [
            tf.debugging.assert_positive(samples, "`samples` must be at least 1"),
            tf.debugging.assert_less_equal(
                samples, MAX_SAMPLES, f"`samples` must be at most {MAX_SAMPLES}"
            ),
        ]
        with tf.control_dependencies(assertions):
            return predict(inputs, tf.identity(samples), tf.stack([seed, 0]))

    return sample


def _example(specs):
    """A batch of two for the signature, the same each time."""
    rng = np.random.default_rng(0)
    example = {}
    for name, spec in specs.items():
        rest = [1 if size is None else size for size in spec.shape[1:]]
        batch = spec.shape[:1].as_list() if spec.shape.rank else []
        shape = [2 if size is None else size for size in batch] + rest
        if spec.dtype.is_floating:
            example[name] = rng.random(shape).astype(spec.dtype.as_numpy_dtype)
        elif spec.dtype == "string":
            example[name] = np.full(shape, b"", object)
        else:
            example[name] = np.zeros(shape, spec.dtype.as_numpy_dtype)
    return example


def _checked(example, specs):
    if not isinstance(example, dict) or example.keys() != specs.keys():
        raise ValueError(
            f"Expected an example of the inputs {sorted(specs)}. Received: "
            f"{sorted(example) if isinstance(example, dict) else type(example)}"
        )
    arrays = {}
    for name, spec in specs.items():
        if spec.dtype == "string":
            array = np.asarray(example[name], object)
            array = np.vectorize(_encoded, otypes=[object])(array)
        else:
            array = np.asarray(example[name]).astype(spec.dtype.as_numpy_dtype)
        if not spec.shape.is_compatible_with(array.shape):
            raise ValueError(
                f"Expected an example of {name!r} of shape {spec.shape}. Received: "
                f"shape {array.shape}"
            )
        arrays[name] = array
    return arrays


def _encoded(value):
    return value.encode() if isinstance(value, str) else value


# The SavedModel.


def _write(model, function, sampling, specs, example, xla, path):
    """Writes everything to `path` and checks it there."""
    import tensorflow as tf

    from .serving import graph

    signatures = {"serving_default": _traced(model, function, specs)}
    if xla:
        signatures["serving_xla"] = _traced(model, function, specs, "serving_xla", True)
    if sampling:
        more = {n: tf.TensorSpec([], "int32", n) for n in SAMPLING_INPUTS}
        signatures["sampling"] = _traced(model, sampling, specs | more, "sampling")
    module = tf.Module()
    # Everything the signatures read, each once: weights, states of random seeds,
    # tables. The model itself would bring its weights a second time. Their order is
    # always the same, so that the same model gives the same files.
    used = {v.ref() for f in signatures.values() for v in f.variables}
    known = [v.value.ref() for v in model.variables if v.value.ref() in used]
    others = sorted(used - set(known), key=lambda ref: ref.deref().name)
    module.v = [ref.deref() for ref in known + others]
    module.t = _tables(model)
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    tf.saved_model.save(module, os.fspath(path), signatures, options)
    saved_model = graph.read(path)
    forbidden = graph.forbidden_ops(saved_model)
    if forbidden:
        raise ValueError(
            "The model uses operations that a server should not run: "
            f"{', '.join(forbidden)}. (Reading a vocabulary from a file is one: give "
            "the layer the list of words instead.)"
        )
    if graph.needs_xla(graph.serving_graph(saved_model), "serving_default"):
        raise ValueError(
            "The model compiles a part of itself with XLA (`jit_compile=True`), which "
            "a server that was not started with XLA cannot run"
        )
    _fix_fingerprint(path)
    _write_warmup(example, specs, path)
    _verify(model, signatures, example, path)


def _traced(model, function, specs, name="serving_default", xla=False):
    """The concrete function of a signature."""
    import keras
    import tensorflow as tf

    from ..layers.variational.mode import at_posterior_mean

    structure = _structure(model)
    # The model's inputs come first.
    dtypes = {n: t.dtype for n, t in zip(specs, model.inputs, strict=False)}

    def serve(**inputs):
        tensors = [inputs.pop(n) for n in dtypes]
        tensors = [
            tf.cast(x, d) if d in HALF else x
            for x, d in zip(tensors, dtypes.values(), strict=True)
        ]
        tensors = keras.tree.pack_sequence_as(structure, tensors)
        # Weights that are distributions are at their means, unless the function draws.
        return _outputs(at_posterior_mean(function, tensors, **inputs))

    # The signature's name, which profiles and stack traces show.
    serve.__name__ = name
    traced = tf.function(serve, autograph=False, jit_compile=xla or None)
    return traced.get_concrete_function(**specs)


def _outputs(outputs):
    import tensorflow as tf

    if not isinstance(outputs, dict) or not outputs:
        raise ValueError(
            f"Expected `function` to return a dict of tensors. Received: {outputs}"
        )
    result = {}
    for name, value in outputs.items():
        if not isinstance(name, str) or not TENSOR_NAME.fullmatch(name):
            raise ValueError(
                "Expected output names of letters, digits and underscores. Received: "
                f"{name!r}"
            )
        if isinstance(value, dict | list | tuple | tf.RaggedTensor | tf.SparseTensor):
            raise ValueError(
                f"Expected a dense tensor as the output {name!r}. Received: {value}"
            )
        value = tf.convert_to_tensor(value)
        result[name] = tf.cast(value, "float32") if value.dtype.name in HALF else value
    return result


def _tables(model):
    """The lookup tables of a model's layers."""
    import tensorflow as tf

    resource = tf.saved_model.experimental.TrackableResource
    return [
        value
        for layer in model._flatten_layers()
        for value in vars(layer).values()
        if isinstance(value, resource)
    ]


def _fix_fingerprint(path):
    """Replaces the random part of the fingerprint by one made of the rest of it.

    Then equal models, written by equal programs, are equal files.
    """
    from tensorflow.core.protobuf import fingerprint_pb2

    file = path / "fingerprint.pb"
    fingerprint = fingerprint_pb2.FingerprintDef.FromString(file.read_bytes())
    fingerprint.uuid = ""
    content = fingerprint.SerializeToString(deterministic=True)
    digest = hashlib.sha256(content).digest()[:16]
    fingerprint.uuid = str(int.from_bytes(digest, "big"))
    file.write_bytes(fingerprint.SerializeToString(deterministic=True))


def _write_warmup(example, specs, path):
    """Writes requests of one example and of the whole batch."""
    import tensorflow as tf

    from .serving.servable import WARMUP_REQUESTS

    requests = [example]
    if all(spec.shape.rank and spec.shape[0] is None for spec in specs.values()):
        requests.insert(0, {name: array[:1] for name, array in example.items()})
    file = path / WARMUP_REQUESTS
    file.parent.mkdir()
    with tf.io.TFRecordWriter(os.fspath(file)) as writer:
        for request in requests:
            writer.write(_prediction_log(request))


def _prediction_log(inputs):
    """A PredictionLog protocol buffer that asks for `serving_default`.

    Its few fields are written by hand, so that writing a model does not need the
    package of TensorFlow Serving's protocol buffers.
    """
    import tensorflow as tf

    request = _field(1, _field(3, b"serving_default"))  # model_spec.signature_name
    for name, array in sorted(inputs.items()):
        proto = tf.make_tensor_proto(array).SerializeToString(deterministic=True)
        request += _field(2, _field(1, name.encode()) + _field(2, proto))  # inputs
    return _field(6, _field(1, request))  # predict_log.request


def _field(number, content):
    """A length-delimited field of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value):
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _verify(model, signatures, example, path):
    """Requires a server's session to answer as the live model does."""
    import tensorflow as tf

    from .serving.servable import Servable
    from .serving.status import ServingError

    half = any(layer.compute_dtype in HALF for layer in model._flatten_layers())
    # A random draw moves its seed on: both sides start from the seed as it is saved,
    # and afterwards it is put back.
    states = [
        (v, v.numpy())
        for v in signatures["serving_default"].variables
        if not v.trainable
    ]
    for name in signatures:
        tolerance, live, request = TOLERANCE, signatures[name], example
        if name == "serving_xla":
            tolerance = HALF_TOLERANCE if half else XLA_TOLERANCE
            live = signatures["serving_default"]
        if name == "sampling":
            request = example | SAMPLING_INPUTS
        tensors = {n: tf.constant(array) for n, array in request.items()}
        try:
            with contextlib.closing(Servable(path, xla=True)) as servable:
                got = servable.predict(request, name)
            expected = live(**tensors)
        except (ServingError, tf.errors.OpError) as error:
            raise ValueError(
                f"The signature {name!r} does not run: {error}. Is `example` a batch "
                "that the model can take"
                + ("? If so, export with xla=False." if name == "serving_xla" else "?")
            ) from error
        finally:
            for variable, value in states:
                variable.assign(value)
        for key, value in expected.items():
            _require_equal(f"{name}/{key}", got[key], value.numpy(), tolerance)


def _require_equal(what, got, expected, tolerance):
    same = got.shape == expected.shape
    if same and expected.dtype.kind in "fc":
        same = np.allclose(got, expected, tolerance, tolerance, equal_nan=True)
    elif same:
        same = np.array_equal(got, expected)
    if not same:
        raise ValueError(
            f"The SavedModel's {what} differs from the model's by more than "
            f"{tolerance}. Expected: {expected.ravel()[:8]}. Received: "
            f"{got.ravel()[:8]}"
        )


# The folder.


def _version(folder, version, overwrite):
    taken = {placing.version_of(entry.name) for entry in folder.iterdir()} - {None}
    if version is None:
        newest = max(taken, default=0)
        if newest == placing.MAX_VERSION:
            raise ValueError(
                f"Expected an integer as the version, for none follows {newest}, which "
                f"is in {folder}. Received: version=None"
            )
        return newest + 1
    if int(version) in taken and not overwrite:
        raise ValueError(
            f"{folder / str(version)} is already there. Expected another version, None "
            "for the next one, or overwrite=True to replace it. Received: "
            f"version={version}"
        )
    return int(version)
