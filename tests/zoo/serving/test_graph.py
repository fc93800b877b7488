"""The check of a SavedModel's operations."""

import os

import pytest
import tensorflow as tf
from tensorflow.python.framework import op_def_registry

from kzoo.zoo.serving import graph
from kzoo.zoo.serving.servable import Servable
from kzoo.zoo.serving.status import Code, ServingError

pytestmark = pytest.mark.tensorflow

# Stateful operations may do anything; these keep their state in memory.
KEEPS_STATE_IN_MEMORY = (
    "Variable", "Resource", "Table", "TensorArray", "Random", "Rng", "Stateful",
    "If", "While", "Case", "TruncatedNormal", "VarHandle", "VarIs", "Multinomial",
    "NonDeterministicInts", "Assert", "CheckNumerics", "Empty", "DeepCopy",
    "DisableCopyOnRead", "Inplace",
)  # fmt: skip


def saved(function, path, xla_part=None):
    module = tf.Module()
    spec = tf.TensorSpec([None], tf.float32, "x")
    module.f = tf.function(function, input_signature=[spec])
    tf.saved_model.save(module, str(path), {"serving_default": module.f})
    return graph.read(path)


def test_every_allowed_op_exists():
    for name in graph.ALLOWED_OPS | graph.SAVE_OPS:
        assert op_def_registry.get(name) is not None, name


def test_allowed_stateful_ops_keep_their_state_in_memory():
    for name in graph.ALLOWED_OPS:
        if op_def_registry.get(name).is_stateful:
            assert any(part in name for part in KEEPS_STATE_IN_MEMORY), name


@pytest.mark.parametrize(
    "name",
    [
        "ReadFile", "WriteFile", "MatchingFiles", "PyFunc", "EagerPyFunc",
        "PyFuncStateless", "SaveV2", "RestoreV2", "MergeV2Checkpoints", "PrintV2",
        "InitializeTableFromTextFileV2", "ImmutableConst", "LoadAndRemapMatrix",
        "GenerateVocabRemapping", "DecodeProtoV2", "FixedUnigramCandidateSampler",
        "RpcCall", "Send", "Recv", "_HostSend", "RemoteCall", "DebugIdentityV2",
        "TextLineDataset", "TFRecordDatasetV2", "IteratorV2", "LMDBReader", "Abort",
        "XlaCustomCallV2", "XlaCallModule", "DumpTensor", "FileSystemSetConfiguration",
    ],
)  # fmt: skip
def test_ops_that_reach_out_are_not_allowed(name):
    assert name not in graph.ALLOWED_OPS


def test_a_model_that_computes_passes(module_path, classifier_path):
    for path in (module_path, classifier_path):
        assert graph.forbidden_ops(graph.read(path / "1")) == []


def test_an_op_in_the_graph_or_in_a_function_is_found(tmp_path):
    def direct(x):
        tf.io.write_file(str(tmp_path / "out"), "text")
        return {"y": x}

    @tf.function
    def deep(x):
        return tf.cond(
            tf.reduce_sum(x) > 0,
            lambda: tf.strings.to_number(tf.io.read_file("/etc/hostname")) + x,
            lambda: x,
        )

    assert graph.forbidden_ops(saved(direct, tmp_path / "a")) == ["WriteFile"]
    assert graph.forbidden_ops(saved(lambda x: {"y": deep(x)}, tmp_path / "b")) == [
        "ReadFile"
    ]
    assert not (tmp_path / "out").exists()


def test_saving_and_restoring_may_not_be_reached_by_a_signature(tmp_path):
    def save(x):
        tf.raw_ops.SaveV2(
            prefix=str(tmp_path / "stolen"),
            tensor_names=["x"],
            shape_and_slices=[""],
            tensors=[x],
        )
        return {"y": x}

    def restore(x):
        read = tf.raw_ops.RestoreV2(
            prefix="/else", tensor_names=["x"], shape_and_slices=[""], dtypes=["float"]
        )
        return {"y": x + read[0]}

    assert graph.forbidden_ops(saved(save, tmp_path / "a")) == ["SaveV2"]
    assert graph.forbidden_ops(saved(restore, tmp_path / "b")) == ["RestoreV2"]


def test_saving_may_not_be_reached_by_restoring(module_path):
    saved_model = graph.read(module_path / "1")
    saver = saved_model.meta_graphs[0].saver_def
    saver.restore_op_name = saver.save_tensor_name.split(":")[0]
    assert "SaveV2" in graph.forbidden_ops(saved_model)


def test_an_initializer_is_looked_at(module_path):
    saved_model = graph.read(module_path / "1")
    meta_graph = saved_model.meta_graphs[0]
    save = meta_graph.saver_def.save_tensor_name
    outputs = meta_graph.signature_def["__saved_model_init_op"].outputs
    outputs["__saved_model_init_op"].name = "^" + save.split(":")[0]
    assert "SaveV2" in graph.forbidden_ops(saved_model)


def stand_in(meta_graph, function, name="stand_in"):
    """A copy of a function, which Grappler may put in its place."""
    copy = meta_graph.graph_def.library.function.add()
    copy.CopyFrom(function)
    copy.signature.name = name
    for twin in (function, copy):
        twin.attr["api_implements"].s = b"one"
    copy.attr["api_preferred_device"].s = b"CPU"
    return copy


@pytest.mark.parametrize("op", ["SaveV2", "RestoreV2"])
def test_what_may_run_in_a_functions_place_is_looked_at(tmp_path, op):
    inner = tf.function(lambda x: x * 2)
    saved_model = saved(lambda x: {"y": inner(x)}, tmp_path)
    (meta_graph,) = saved_model.meta_graphs
    functions = meta_graph.graph_def.library.function
    copy = stand_in(
        meta_graph, next(f for f in functions if "lambda" in f.signature.name)
    )
    node = copy.node_def.add()
    node.name, node.op = "reaches_out", op
    assert graph.forbidden_ops(saved_model) == [op]
    copy.attr["api_implements"].s = b"another"
    assert graph.forbidden_ops(saved_model) == []


def test_needs_xla_looks_into_functions(tmp_path):
    inner = tf.function(lambda x: x * 2, jit_compile=True)
    outer = tf.function(lambda x: inner(x) + 1)
    with_xla = graph.serving_graph(saved(lambda x: {"y": outer(x)}, tmp_path / "a"))
    without = graph.serving_graph(saved(lambda x: {"y": x * 2}, tmp_path / "b"))
    assert graph.needs_xla(with_xla, "serving_default")
    assert not graph.needs_xla(without, "serving_default")


@pytest.mark.parametrize("content", [None, b"", b"not a protocol buffer"])
def test_what_is_not_a_saved_model_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "saved_model.pb").write_bytes(content)
    with pytest.raises(ValueError, match="Received"):
        graph.read(tmp_path)


@pytest.mark.parametrize("name", ["saved_model.pb", "variables"])
def test_what_reading_would_never_end_is_refused(tmp_path, name):
    (tmp_path / "saved_model.pb").write_bytes(b"")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"Expected files and folders.*{name}"):
        graph.read(tmp_path)


def test_a_graph_of_another_tag_is_refused(module_path):
    saved_model = graph.read(module_path / "1")
    saved_model.meta_graphs[0].meta_info_def.tags[:] = ["train"]
    with pytest.raises(ValueError, match=r"\['serve'\]"):
        graph.serving_graph(saved_model)


def test_a_forbidden_model_is_not_loaded_unless_told(tmp_path):
    def write(x):
        tf.io.write_file(str(tmp_path / "out"), "text")
        return {"y": x + 1}

    saved(write, tmp_path / "model")
    with pytest.raises(ServingError, match="WriteFile") as caught:
        Servable(tmp_path / "model")
    assert caught.value.code is Code.PERMISSION_DENIED
    servable = Servable(tmp_path / "model", allow_any_ops=True)
    assert not (tmp_path / "out").exists()
    servable.predict({"x": tf.constant([1.0]).numpy()})
    assert (tmp_path / "out").read_text() == "text"
    servable.close()


def traced_restore(saved_model):
    """The call of the function that restores, and that function."""
    meta_graph = saved_model.meta_graphs[0]
    nodes = {node.name: node for node in meta_graph.graph_def.node}
    functions = {f.signature.name: f for f in meta_graph.graph_def.library.function}
    call = nodes[meta_graph.saver_def.restore_op_name.partition(":")[0]]
    return call, functions[call.attr["f"].func.name], meta_graph


def constant(node, name):
    node.name, node.op = name, "Const"
    node.attr["dtype"].type = tf.string.as_datatype_enum
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto("/some/other/checkpoint"))
    return name


@pytest.mark.parametrize("where", ["call", "function", "through an identity"])
def test_restoring_another_file_is_forbidden(where, tmp_path):
    weight = tf.Variable([1.0])
    module = tf.Module()
    module.w = weight
    module.f = tf.function(
        lambda x: {"y": x * weight}, input_signature=[tf.TensorSpec([None], name="x")]
    )
    tf.saved_model.save(module, str(tmp_path), {"serving_default": module.f})
    saved_model = graph.read(tmp_path)
    assert graph.forbidden_ops(saved_model) == []
    call, function, meta_graph = traced_restore(saved_model)
    if where == "call":
        call.input[0] = constant(meta_graph.graph_def.node.add(), "elsewhere")
    else:
        name = constant(function.node_def.add(), "elsewhere") + ":output:0"
        if where == "through an identity":
            identity = function.node_def.add()
            identity.name, identity.op = "passed_on", "Identity"
            identity.input.append(name)
            name = "passed_on:output:0"
        (restore, *_) = [n for n in function.node_def if n.op == "RestoreV2"]
        restore.input[0] = name
    assert graph.forbidden_ops(saved_model) == ["RestoreV2"]


def test_restoring_another_file_in_a_functions_place_is_forbidden(module_path):
    saved_model = graph.read(module_path / "1")
    _, function, meta_graph = traced_restore(saved_model)
    copy = stand_in(meta_graph, function)
    name = constant(copy.node_def.add(), "elsewhere") + ":output:0"
    (restore, *_) = [n for n in copy.node_def if n.op == "RestoreV2"]
    restore.input[0] = name
    assert graph.forbidden_ops(saved_model) == ["RestoreV2"]
    copy.attr["api_implements"].s = b"another"
    assert graph.forbidden_ops(saved_model) == []


def test_a_function_that_takes_an_operations_name_is_forbidden(module_path):
    saved_model = graph.read(module_path / "1")
    function = saved_model.meta_graphs[0].graph_def.library.function.add()
    function.signature.name = "Identity"
    assert graph.forbidden_ops(saved_model) == ["Identity"]
