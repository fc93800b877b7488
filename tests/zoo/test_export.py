"""Exports: what is in the folder, what it answers, and that it is whole or absent."""

import os
import signal
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
from keras import layers

from kzoo.layers import AverageMembers, DenseBatchEnsemble, TileMembers
from kzoo.zoo import placing
from kzoo.zoo.export import export
from kzoo.zoo.hub import versions as versions_of
from kzoo.zoo.serving import graph

TENSORFLOW = pytest.mark.tensorflow
# `kzoo.zoo.export` is the function of that name.
export_module = sys.modules["kzoo.zoo.export"]

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    from kzoo.zoo.serving.servable import WARMUP_REQUESTS, Servable


def classifier(name="classifier"):
    x = keras.Input((4,), name="x")
    return keras.Model(x, layers.Dense(3)(x), name=name)


def ensemble(members=4):
    x = keras.Input((4,), name="x")
    h = TileMembers(members)(x)
    h = DenseBatchEnsemble(8, ensemble_size=members, activation="relu")(h)
    h = DenseBatchEnsemble(3, ensemble_size=members)(h)
    model = keras.Model(x, AverageMembers(members)(h), name="ensemble")
    rng = np.random.default_rng(1)
    model.set_weights([rng.normal(size=w.shape) for w in model.weights])
    return model


def answer(path, inputs, signature=""):
    servable = Servable(path, xla=True)
    try:
        return servable.predict(inputs, signature)
    finally:
        servable.close()


def batch(rows=5):
    return np.random.default_rng(3).normal(size=(rows, 4)).astype("float32")


@pytest.mark.jax
def test_on_jax_the_error_says_how(tmp_path):
    with pytest.raises(RuntimeError, match=r"model\.save.*KERAS_BACKEND=tensorflow"):
        export(classifier(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@TENSORFLOW
class TestContent:
    def test_the_layout_is_tensorflow_servings(self, tmp_path):
        path = export(classifier(), tmp_path, xla=False)
        assert path == tmp_path / "classifier" / "1"
        files = sorted(str(f.relative_to(path)) for f in path.rglob("*") if f.is_file())
        assert files == [
            "assets.extra/tf_serving_warmup_requests",
            "fingerprint.pb",
            "saved_model.pb",
            "variables/variables.data-00000-of-00001",
            "variables/variables.index",
        ]

    def test_signatures_name_their_inputs_and_outputs(self, tmp_path):
        meta_graph = graph.serving_graph(graph.read(export(ensemble(), tmp_path)))
        for key in ("serving_default", "serving_xla"):
            signature = meta_graph.signature_def[key]
            assert signature.method_name == "tensorflow/serving/predict"
            shapes = {
                name: [d.size for d in info.tensor_shape.dim]
                for name, info in (
                    *signature.inputs.items(),
                    *signature.outputs.items(),
                )
            }
            assert shapes == {
                "x": [-1, 4],
                "probabilities": [-1, 3],
                "member_probabilities": [-1, 4, 3],
                "predictive_entropy": [-1],
                "mutual_information": [-1],
            }

    def test_only_serving_xla_has_an_xla_part(self, tmp_path):
        model = ensemble()
        # How a model was compiled for training is not how it is served.
        model.compile("sgd", "mse", jit_compile=True)
        meta_graph = graph.serving_graph(graph.read(export(model, tmp_path)))
        assert not graph.needs_xla(meta_graph, "serving_default")
        assert graph.needs_xla(meta_graph, "serving_xla")
        plain = (export(model, tmp_path, xla=False) / "saved_model.pb").read_bytes()
        assert b"_XlaMustCompile" not in plain
        assert (
            "serving_xla"
            not in graph.read(tmp_path / "ensemble/2").meta_graphs[0].signature_def
        )

    def test_what_is_served_names_no_device(self, tmp_path):
        meta_graph = graph.serving_graph(graph.read(export(ensemble(), tmp_path)))
        for signature in meta_graph.signature_def.values():
            names = [info.name for info in signature.outputs.values()]
            nodes, _ = graph._reached(meta_graph, names)
            assert {node.device for node in nodes} == {""}

    def test_weights_are_stored_once(self, tmp_path):
        x = keras.Input((100,), name="x")
        model = keras.Model(x, layers.Dense(10)(layers.Dense(500)(x)), name="m")
        path = export(model, tmp_path)
        stored = sum(f.stat().st_size for f in (path / "variables").iterdir())
        assert stored <= 1.05 * 4 * model.count_params()
        variables = tf.train.list_variables(str(path / "variables/variables"))
        names = [name for name, _ in variables]
        assert len([n for n in names if n.startswith("v/")]) == 4

    @pytest.mark.slow
    def test_the_zoo_s_models_keep_within_five_percent(self, tmp_path):
        from kzoo.zoo import build, list_models

        for name in list_models("*digits"):
            model = build(name)
            path = export(model, tmp_path, xla=False)
            stored = sum(f.stat().st_size for f in (path / "variables").iterdir())
            assert stored <= 1.05 * 4 * model.count_params(), name

    def test_warm_up_requests_parse_and_replay(self, tmp_path):
        from tensorflow_serving.apis import prediction_log_pb2

        path = export(classifier(), tmp_path, xla=False, example={"x": batch(3)})
        records = list(
            tf.data.TFRecordDataset(str(path / WARMUP_REQUESTS)).as_numpy_iterator()
        )
        rows = []
        for record in records:
            log = prediction_log_pb2.PredictionLog.FromString(record)
            assert log.WhichOneof("log_type") == "predict_log"
            request = log.predict_log.request
            assert request.model_spec.signature_name == "serving_default"
            assert list(request.inputs) == ["x"]
            rows.append(tf.make_ndarray(request.inputs["x"]))
            again = prediction_log_pb2.PredictionLog()
            again.CopyFrom(log)
            assert again.SerializeToString(deterministic=True) == record
        np.testing.assert_array_equal(rows[0], batch(3)[:1])
        np.testing.assert_array_equal(rows[1], batch(3))
        servable = Servable(path)
        assert servable.warm_up(path) == 2
        servable.close()

    def test_varints(self):
        wire = {0: "00", 127: "7f", 128: "8001", 300: "ac02", 1 << 35: "808080808001"}
        for value, text in wire.items():
            assert export_module._varint(value).hex() == text

    def test_it_has_only_operations_that_compute(self, tmp_path):
        assert graph.forbidden_ops(graph.read(export(ensemble(), tmp_path))) == []


@TENSORFLOW
class TestAnswers:
    def test_a_classifier_and_any_batch(self, tmp_path):
        model = classifier()
        path = export(model, tmp_path)
        for rows in (1, 5):
            x = batch(rows)
            logits = np.float64(model(x))
            p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            for signature in ("serving_default", "serving_xla"):
                got = answer(path, {"x": x}, signature)
                np.testing.assert_allclose(got["probabilities"], p, atol=1e-5)
                np.testing.assert_allclose(
                    got["member_probabilities"], p[:, None], atol=1e-5
                )
                entropy = -(p * np.log(p)).sum(-1)
                np.testing.assert_allclose(
                    got["predictive_entropy"], entropy, atol=1e-5
                )
                np.testing.assert_allclose(got["mutual_information"], 0, atol=1e-6)

    def test_an_ensemble(self, tmp_path):
        model = ensemble()
        path = export(model, tmp_path)
        x = batch()
        p = np.exp(np.float64(model(x)))  # AverageMembers: log of the mean
        for signature in ("serving_default", "serving_xla"):
            got = answer(path, {"x": x}, signature)
            np.testing.assert_allclose(got["probabilities"], p, atol=1e-5)
            members = np.float64(got["member_probabilities"])
            np.testing.assert_allclose(members.mean(1), p, atol=1e-5)
            entropy = -(p * np.log(p)).sum(-1)
            np.testing.assert_allclose(got["predictive_entropy"], entropy, atol=1e-5)
            information = entropy + (members * np.log(members)).sum(-1).mean(1)
            np.testing.assert_allclose(
                got["mutual_information"], information, atol=1e-5
            )
            assert (information > 1e-4).all()

    def test_a_function_of_one_s_own(self, tmp_path):
        x = keras.Input((4,), name="x")
        model = keras.Model(x, layers.Dense(1)(x), name="regression")
        with pytest.raises(ValueError, match="`function`"):
            export(model, tmp_path)
        path = export(
            model, tmp_path, function=lambda x: {"mean": model(x, training=False)[:, 0]}
        )
        got = answer(path, {"x": batch()})
        assert got.keys() == {"mean"}
        np.testing.assert_allclose(got["mean"], model(batch())[:, 0], atol=1e-5)

    def test_dropout_and_batch_normalization_are_as_in_inference(self, tmp_path):
        x = keras.Input((4,), name="x")
        h = layers.Dropout(0.5)(layers.BatchNormalization()(x))
        model = keras.Model(x, layers.Dense(3)(h), name="m")
        model.layers[1].set_weights([np.full(4, v, "float32") for v in (2, 1, 3, 4)])
        got = answer(export(model, tmp_path), {"x": batch()})
        p = keras.ops.softmax(model(batch(), training=False))
        np.testing.assert_allclose(got["probabilities"], p, atol=1e-5)

    @pytest.mark.parametrize("structure", ["list", "dict"])
    def test_several_inputs_of_several_types(self, tmp_path, structure):
        a = keras.Input((4,), name="a")
        b = keras.Input((2,), name="b", dtype="int32")
        c = keras.Input((), name="c", dtype="int64")
        h = layers.Concatenate()(
            [
                a,
                layers.Flatten()(layers.Embedding(9, 2)(b)),
                layers.Embedding(9, 2)(c),
            ]
        )
        inputs = [b, a, c] if structure == "list" else {"b": b, "a": a, "c": c}
        model = keras.Model(inputs, layers.Dense(3)(h), name="m")
        values = {
            "a": batch(3),
            "b": np.int32([[1, 2], [3, 4], [5, 6]]),
            "c": np.int64([8, 7, 0]),
        }
        path = export(model, tmp_path, example=values)
        x = values if structure == "dict" else [values[k] for k in "bac"]
        p = keras.ops.softmax(model(x))
        for signature in ("serving_default", "serving_xla"):
            got = answer(path, values, signature)
            np.testing.assert_allclose(got["probabilities"], p, atol=1e-5)

    def test_strings_and_tables(self, tmp_path):
        word = keras.Input((2,), name="word", dtype="string")
        number = keras.Input((2,), name="number", dtype="int64")
        h = [
            layers.Embedding(4, 2)(layers.StringLookup(vocabulary=["a", "b"])(word)),
            layers.Embedding(4, 2)(layers.IntegerLookup(vocabulary=[7, 8])(number)),
        ]
        h = layers.Flatten()(layers.Concatenate()(h))
        model = keras.Model([word, number], layers.Dense(3)(h), name="m")
        with pytest.raises(ValueError, match="xla=False"):
            export(model, tmp_path)
        path = export(model, tmp_path, xla=False)
        assert path.name == "1"
        words = np.array([["a", "zzz"], ["b", "a"]])
        numbers = np.array([[7, 9], [8, 8]])
        got = answer(
            path, {"word": words.astype("S").astype(object), "number": numbers}
        )
        p = keras.ops.softmax(model([tf.constant(words), tf.constant(numbers)]))
        np.testing.assert_allclose(got["probabilities"], p, atol=1e-5)

    def test_text_vectorization(self, tmp_path):
        text = keras.Input((), name="text", dtype="string")
        words = layers.TextVectorization(
            output_sequence_length=3, vocabulary=["a", "b"]
        )
        h = layers.Flatten()(layers.Embedding(4, 2)(words(text)))
        model = keras.Model(text, layers.Dense(3)(h), name="m")
        example = {"text": ["a B!", "c b a a"]}
        path = export(model, tmp_path, xla=False, example=example)
        got = answer(path, {"text": np.array([b"a B!", b"c b a a"], object)})
        p = keras.ops.softmax(model(tf.constant(example["text"])))
        np.testing.assert_allclose(got["probabilities"], p, atol=1e-5)

    def test_half_precision_models_answer_in_float32(self, tmp_path):
        policy = keras.dtype_policies.DTypePolicy("mixed_float16")
        x = keras.Input((4,), name="x", dtype="float16")
        h = layers.Dense(8, activation="relu", dtype=policy)(x)
        model = keras.Model(x, layers.Dense(3, dtype=policy)(h), name="m")
        functions = {"own": lambda x: {"y": model(x)}, "classes": None}
        for name, function in functions.items():
            path = export(model, tmp_path, name=name, function=function)
            got = answer(path, {"x": batch()})
            assert {a.dtype for a in got.values()} == {np.dtype("float32")}
        p = keras.ops.softmax(
            keras.ops.cast(model(batch().astype("float16")), "float32")
        )
        np.testing.assert_allclose(got["probabilities"], p, atol=1e-5)

    def test_random_layers_answer_as_the_live_model_would(self, tmp_path):
        from kzoo.layers.ops import random

        class Noise(layers.Layer):
            def __init__(self):
                super().__init__()
                self.seed_generator = keras.random.SeedGenerator(5)

            def call(self, x):
                return x + random.normal(keras.ops.shape(x), self.seed_generator)

        x = keras.Input((4,), name="x")
        noise = Noise()
        model = keras.Model(x, noise(x), name="m")
        before = noise.seed_generator.state.numpy()
        path = export(model, tmp_path, function=lambda x: {"y": model(x)})
        # Exporting draws nothing from the live model.
        np.testing.assert_array_equal(noise.seed_generator.state.numpy(), before)
        servable = Servable(path)
        draws = [servable.predict({"x": batch()})["y"] for _ in range(2)]
        servable.close()
        for draw in draws:
            np.testing.assert_allclose(draw, model(batch()), atol=1e-5)
        assert np.abs(draws[0] - draws[1]).max() > 0.1
        xla = answer(path, {"x": batch()}, "serving_xla")["y"]
        np.testing.assert_allclose(xla, draws[0], atol=1e-5)

    def test_a_model_built_under_a_strategy(self, tmp_path):
        with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
            model = classifier()
        got = answer(export(model, tmp_path, xla=False), {"x": batch()})
        p = keras.ops.softmax(model(batch()))
        np.testing.assert_allclose(got["probabilities"], p, atol=1e-5)

    @pytest.mark.parametrize("kind", ["functional", "sequential"])
    def test_inputs_without_names_are_named_by_place(self, tmp_path, kind):
        if kind == "functional":
            x = keras.Input((4,))
            model = keras.Model(x, layers.Dense(3)(x))
        else:
            model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
        path = export(model, tmp_path, name="m", xla=False)
        got = answer(path, {"input": batch()})
        p = keras.ops.softmax(model(batch()))
        np.testing.assert_allclose(got["probabilities"], p, atol=1e-5)

    def test_several_inputs_without_names(self, tmp_path):
        a, b = keras.Input((4,)), keras.Input((4,))
        model = keras.Model([a, b], layers.Dense(3)(a - b), name="m")
        path = export(model, tmp_path, xla=False)
        got = answer(path, {"input_0": batch(), "input_1": 2 * batch()})
        p = keras.ops.softmax(model([batch(), 2 * batch()]))
        np.testing.assert_allclose(got["probabilities"], p, atol=1e-5)

    def test_a_fixed_batch_and_an_unknown_length_stay(self, tmp_path):
        x = keras.Input(batch_shape=(2, None, 3), name="x")
        model = keras.Model(x, layers.Dense(3)(layers.GRU(4)(x)), name="m")
        path = export(model, tmp_path, xla=False)
        meta_graph = graph.serving_graph(graph.read(path))
        shape = meta_graph.signature_def["serving_default"].inputs["x"].tensor_shape
        assert [d.size for d in shape.dim] == [2, -1, 3]
        x = np.random.default_rng(0).normal(size=(2, 7, 3)).astype("float32")
        p = keras.ops.softmax(model(x))
        np.testing.assert_allclose(
            answer(path, {"x": x})["probabilities"], p, atol=1e-5
        )


@TENSORFLOW
class TestRefused:
    @pytest.fixture(autouse=True)
    def nothing_is_left(self, tmp_path):
        yield
        left = [p.name for p in tmp_path.rglob("*") if p.name != ".lock"]
        assert [name for name in left if name[0] == "." or name.isdigit()] == []

    def refused(self, words, model, tmp_path, **options):
        with pytest.raises(ValueError, match=words):
            export(model, tmp_path, **options)

    def test_models_whose_inputs_are_not_known(self, tmp_path):
        class Subclass(keras.Model):
            def call(self, x):
                return x

        self.refused("Functional or Sequential", Subclass(), tmp_path)
        unbuilt = keras.Sequential([layers.Dense(3)])
        self.refused("Functional or Sequential", unbuilt, tmp_path)

    def test_inputs_that_a_request_cannot_hold(self, tmp_path):
        x = keras.Input((4,), name="x", sparse=True)
        self.refused("dense", keras.Model(x, layers.Dense(3)(x)), tmp_path)
        x = keras.Input((4,), name="an input")
        self.refused("'an input'", keras.Model(x, layers.Dense(3)(x)), tmp_path)
        a, b = keras.Input((4,), name="input_1"), keras.Input((4,))
        self.refused("twice", keras.Model([a, b], layers.Dense(3)(a + b)), tmp_path)

    def test_models_that_are_no_classifiers(self, tmp_path):
        x = keras.Input((4,), name="x")
        for output in (
            layers.Dense(1)(x),
            [layers.Dense(3)(x), layers.Dense(3)(x)],
            layers.Reshape((2, 2))(x),
        ):
            self.refused("`function`", keras.Model(x, output), tmp_path)
        softmax = layers.Dense(3, activation="softmax")(x)
        self.refused("logits", keras.Model(x, softmax), tmp_path)

    @pytest.mark.parametrize(
        "words, function",
        [
            ("dict", lambda x: x),
            ("dict", lambda x: {}),
            ("dense tensor.*'y'", lambda x: {"y": {"z": x}}),
            ("dense tensor.*'y'", lambda x: {"y": [x, x]}),
            ("'a/b'", lambda x: {"a/b": x}),
            ("WriteFile", lambda x: tf.io.write_file("/x", "") or {"y": x}),
            ("ReadFile", lambda x: {"y": tf.io.read_file("/etc/hostname")}),
            ("PyFunc", lambda x: {"y": tf.numpy_function(abs, [x], tf.float32)}),
            ("PrintV2", lambda x: tf.print(x) or {"y": x}),
            ("jit_compile", lambda x: {"y": tf.function(abs, jit_compile=True)(x)}),
            (
                "(?s)serving_xla.*xla=False",
                lambda x: {"y": tf.linalg.det(x[:, :, None] * x[:, None])},
            ),
        ],
    )
    def test_functions(self, tmp_path, words, function):
        self.refused(words, classifier(), tmp_path, function=function)

    def test_a_vocabulary_in_a_file(self, tmp_path):
        file = tmp_path / "words"
        file.write_text("a\nb\n")
        text = keras.Input((1,), name="text", dtype="string")
        h = layers.StringLookup(vocabulary=str(file))(text)
        model = keras.Model(text, layers.Flatten()(layers.Embedding(4, 3)(h)))
        self.refused("list of words", model, tmp_path, xla=False)

    @pytest.mark.parametrize(
        "options",
        [
            {"version": -1},
            {"version": "one"},
            {"version": 1.0},
            {"version": True},
            {"version": "01"},
            {"version": 2**63},
            {"version": 10**19},
            {"name": "../m"},
            {"name": "a/b"},
            {"name": ".m"},
            {"name": ""},
            {"name": "7"},
            {"name": "m" * 129},
            {"example": {"z": [[1.0] * 4]}},
            {"example": [[1.0] * 4]},
            {"example": {"x": [[1.0] * 5]}},
        ],
    )
    def test_arguments(self, tmp_path, options):
        self.refused("Received", classifier(), tmp_path, **options)

    def test_an_example_that_the_model_cannot_take(self, tmp_path):
        ids = keras.Input((2,), name="ids", dtype="int32")
        h = layers.Flatten()(layers.Embedding(5, 2)(ids))
        model = keras.Model(ids, layers.Dense(3)(h), name="m")
        self.refused("`example`", model, tmp_path, example={"ids": [[7, 7]]})

    def test_a_saved_model_that_answers_otherwise(self, tmp_path, monkeypatch):
        predict = Servable.predict

        def wrong(self, inputs, signature="", *rest):
            got = predict(self, inputs, signature, *rest)
            return got | {"probabilities": got["probabilities"] + 3e-5}

        monkeypatch.setattr(Servable, "predict", wrong)
        self.refused("differs", classifier(), tmp_path, xla=False)


@TENSORFLOW
class TestVersions:
    def test_the_next_version(self, tmp_path):
        model = classifier()
        for version in ("1", "2"):
            assert export(model, tmp_path, xla=False).name == version
        (tmp_path / "classifier" / "tmp").mkdir()
        assert export(model, tmp_path, 10, xla=False).name == "10"
        assert export(model, tmp_path, xla=False).name == "11"
        assert export(model, tmp_path, 0, xla=False).name == "0"

    def test_none_follows_the_last_version(self, tmp_path):
        last = tmp_path / "classifier" / str(2**63 - 1)
        last.parent.mkdir()
        (tmp_path / "classifier" / str(10**18 - 1)).mkdir()
        path = export(classifier(), tmp_path, xla=False)
        assert path.name == str(10**18) and versions_of(path.parent)[-1] == 10**18
        last.mkdir()
        with pytest.raises(ValueError, match=f"follows {2**63 - 1}.*version=None"):
            export(classifier(), tmp_path, xla=False)
        assert list(last.iterdir()) == []

    def test_a_version_is_replaced_only_when_told(self, tmp_path):
        path = export(classifier(), tmp_path, 3, xla=False)
        before = answer(path, {"x": batch()})["probabilities"]
        with pytest.raises(ValueError, match="overwrite=True"):
            export(classifier(), tmp_path, 3, xla=False)
        np.testing.assert_array_equal(
            answer(path, {"x": batch()})["probabilities"], before
        )
        model = classifier()
        export(model, tmp_path, 3, xla=False, overwrite=True)
        got = answer(path, {"x": batch()})["probabilities"]
        assert np.abs(got - before).max() > 1e-3
        np.testing.assert_allclose(got, keras.ops.softmax(model(batch())), atol=1e-5)
        assert sorted(p.name for p in path.parent.iterdir()) == [".lock", "3"]

    def test_replacing_without_a_system_that_exchanges_names(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(placing, "exchange", lambda *_: False)
        self.test_a_version_is_replaced_only_when_told(tmp_path)

    def test_exchange(self, tmp_path):
        for name in "ab":
            (tmp_path / name).mkdir()
            (tmp_path / name / name).touch()
        if placing.exchange(tmp_path / "a", tmp_path / "b"):
            assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
        with pytest.raises(FileNotFoundError):
            placing.exchange(tmp_path / "a", tmp_path / "c")

    def test_equal_models_give_equal_weights_and_fingerprints_their_hashes(
        self, tmp_path
    ):
        model = classifier()
        one, two = (export(model, tmp_path, xla=False) for _ in range(2))
        for file in (one / "variables").iterdir():
            assert file.read_bytes() == (two / "variables" / file.name).read_bytes()
        assert (one / WARMUP_REQUESTS).read_bytes() == (
            two / WARMUP_REQUESTS
        ).read_bytes()
        fingerprint = tf.saved_model.experimental.read_fingerprint(str(one))
        assert fingerprint.singleprint()


EXPORT = """
import os, sys
import keras
import kzoo.zoo.export
module = sys.modules["kzoo.zoo.export"]

def wait(*args):
    print(sorted(os.listdir(sys.argv[1] + "/m")), flush=True)
    sys.stdin.read()

module._verify = wait
keras.utils.set_random_seed(1)
x = keras.Input((4,), name="x")
model = keras.Model(x, keras.layers.Dense(3)(x), name="m")
module.export(model, sys.argv[1], xla=False)
"""


def start(folder):
    """Exports in another process, which stops before it verifies and places."""
    return subprocess.Popen(
        [sys.executable, "-c", EXPORT, os.fspath(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"KERAS_BACKEND": "tensorflow"},
        text=True,
    )


def versions(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.isdigit())


def contents(folder):
    files = [f for f in folder.rglob("*") if f.is_file()]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


@TENSORFLOW
class TestCrash:
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("where", ["_write_warmup", "_verify", "place"])
    def test_an_exception_leaves_nothing(self, tmp_path, monkeypatch, where, error):
        def fail(*_):
            raise error

        module = placing if where == "place" else export_module
        monkeypatch.setattr(module, where, fail)
        with pytest.raises(error):
            export(classifier(), tmp_path, xla=False)
        assert [p.name for p in (tmp_path / "classifier").iterdir()] == [".lock"]

    def test_an_exception_leaves_the_version_that_was_there(
        self, tmp_path, monkeypatch
    ):
        path = export(classifier(), tmp_path, xla=False)
        before = (path / "saved_model.pb").read_bytes()

        def fail(*_):
            raise OSError

        monkeypatch.setattr(placing, "place", fail)
        with pytest.raises(OSError):
            export(classifier(), tmp_path, 1, xla=False, overwrite=True)
        assert (path / "saved_model.pb").read_bytes() == before
        assert sorted(p.name for p in path.parent.iterdir()) == [".lock", "1"]

    def test_a_kill_between_the_two_renames_is_repaired(self, tmp_path, monkeypatch):
        path = export(classifier(), tmp_path, xla=False)
        before = (path / "saved_model.pb").read_bytes()
        # What a kill would leave: the old version renamed, the new one not yet.
        path.rename(path.parent / ".1.replaced")
        (path.parent / ".1.partial").mkdir()
        assert export(classifier(), tmp_path, xla=False).name == "2"
        assert (path / "saved_model.pb").read_bytes() == before
        assert sorted(p.name for p in path.parent.iterdir()) == [".lock", "1", "2"]

    @pytest.mark.slow
    def test_processes_that_are_killed_interrupted_or_waited_for(self, tmp_path):
        folders = {how: tmp_path / how / "m" for how in ("kill", "interrupt", "wait")}
        processes = {how: start(folders[how].parent) for how in folders}
        try:
            for how, process in processes.items():
                # It has written everything and not yet placed it.
                line = process.stdout.readline()
                assert line == "['.1.partial', '.lock']\n", process.stderr.read()
                assert (folders[how] / ".1.partial" / "saved_model.pb").exists()
                assert versions(folders[how]) == []

            processes["kill"].kill()
            processes["interrupt"].send_signal(signal.SIGINT)
            for how in ("kill", "interrupt"):
                processes[how].communicate(timeout=30)
                assert processes[how].returncode != 0
                assert versions(folders[how]) == []
            # Interrupted it cleans up, killed it cannot.
            assert list(folders["interrupt"].iterdir()) == [
                folders["interrupt"] / ".lock"
            ]
            killed = contents(folders["kill"] / ".1.partial")

            thread = threading.Thread(
                target=export,
                args=(classifier("m"), folders["wait"].parent),
                kwargs={"xla": False},
            )
            thread.start()
            thread.join(0.5)
            assert thread.is_alive() and versions(folders["wait"]) == []
            processes["wait"].communicate("", timeout=30)
            thread.join(30)
            assert versions(folders["wait"]) == ["1", "2"]
        finally:
            for process in processes.values():
                process.kill()
                process.communicate()
        # Two processes that export the same model write the same bytes.
        assert contents(folders["wait"] / "1") == killed
        export(classifier("m"), folders["kill"].parent, xla=False)
        assert sorted(p.name for p in folders["kill"].iterdir()) == [".lock", "1"]


FRESH = """
import ctypes, os, sys
import numpy as np
import tensorflow as tf

path, x = sys.argv[1], np.load(sys.argv[2])
loaded = tf.saved_model.load(path)
answers = {
    f"{name}/{key}": value.numpy()
    for name, signature in loaded.signatures.items()
    for key, value in signature(x=tf.constant(x)).items()
}
np.savez(sys.argv[3], **answers)

# What a TensorFlow Serving without XLA flags does as it starts.
folder = os.path.dirname(tf.__file__)
library = ctypes.CDLL(os.path.join(folder, "libtensorflow_cc.so.2"))
library._ZN10tensorflow21DisableXlaCompilationEv()
v1 = tf.compat.v1
with v1.Session(graph=tf.Graph()) as session:
    meta_graph = v1.saved_model.load(session, ["serve"], path)
    for name in ("serving_default", "serving_xla"):
        signature = meta_graph.signature_def[name]
        feeds = {signature.inputs["x"].name: x[:3]}
        try:
            got = session.run(signature.outputs["probabilities"].name, feeds)
            same = np.allclose(got, answers[f"{name}/probabilities"][:3], atol=1e-5)
            print(name, same)
        except tf.errors.InternalError as error:
            print(name, "XLA compilation disabled" in error.message)
print([name for name in sys.modules if name.startswith("kzoo")])
"""


@TENSORFLOW
@pytest.mark.slow
def test_a_fresh_process_without_kzoo_and_a_server_without_xla(tmp_path):
    model = ensemble()
    path = export(model, tmp_path)
    np.save(tmp_path / "x.npy", batch(64))
    out = subprocess.run(
        [sys.executable, "-c", FRESH, path, tmp_path / "x.npy", tmp_path / "y.npz"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    # serving_default runs there and serving_xla is refused.
    expected = ["serving_default True", "serving_xla True", "[]"]
    assert out.stdout.splitlines() == expected, out.stderr
    answers = np.load(tmp_path / "y.npz")
    p = np.exp(np.float64(model(batch(64))))
    for name in ("serving_default", "serving_xla"):
        np.testing.assert_allclose(answers[f"{name}/probabilities"], p, atol=1e-5)
