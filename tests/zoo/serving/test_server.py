"""The server as a whole: start, new versions under load, stop."""

import concurrent.futures
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import keras
import numpy as np
import pytest

from kzoo.zoo.serving import graph
from kzoo.zoo.serving.client import connect
from kzoo.zoo.serving.server import ModelConfig, Server, read_model_config
from kzoo.zoo.serving.status import Code, ServingError

pytestmark = pytest.mark.tensorflow

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf


def write(base, version, factor):
    """Puts a version that multiplies by `factor` in place, all at once."""
    module = tf.Module()
    module.factor = tf.Variable(float(factor))
    module.f = tf.function(
        lambda x: {"y": module.factor * x},
        input_signature=[tf.TensorSpec([None], tf.float32, "x")],
    )
    part = base / f".{version}.partial"
    tf.saved_model.save(module, str(part), {"serving_default": module.f})
    part.rename(base / str(version))


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def test_versions_come_and_go_without_a_request_lost(tmp_path):
    write(tmp_path, 1, 1)
    stop = threading.Event()

    def ask(client):
        answers = []
        while not stop.is_set():
            answers.append(client.predict("m", [1.0])["y"].item())
        return answers

    with (
        Server({"m": tmp_path}, grpc_port=0, poll_seconds=0.01) as server,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        addresses = [server.rest_url, server.grpc_target] * 2
        futures = [pool.submit(ask, connect(address)) for address in addresses]
        client = connect(server.rest_url)
        for version in (2, 3):
            write(tmp_path, version, version)
            wait_for(lambda v=version: client.status("m").get(v) == "AVAILABLE")
            wait_for(lambda v=version: client.status("m")[v - 1] == "END")
        shutil.rmtree(tmp_path / "3")
        wait_for(lambda: client.status("m")[3] == "END")
        stop.set()
        for future in futures:
            answers = future.result(timeout=20)  # raises what a request raised
            # In this order, though a slow client may miss a version.
            order = iter([1, 2, 3, 2])
            runs = [value for value, _ in itertools.groupby(answers)]
            assert all(value in order for value in runs), runs
        assert client.status("m") == {3: "END", 2: "AVAILABLE", 1: "END"}


def test_several_models_versions_and_labels(tmp_path):
    for name, factor in (("a", 10), ("b", 20)):
        for version in (1, 2):
            (tmp_path / name).mkdir(exist_ok=True)
            write(tmp_path / name, version, factor + version)
    models = {
        "a": ModelConfig(tmp_path / "a", "all", {"stable": 1, "canary": 2}),
        "b": ModelConfig(tmp_path / "b", [1]),
    }
    with Server(models, poll_seconds=None) as server:
        client = connect(server.rest_url)

        def ask(name, **where):
            return client.predict(name, [1.0], **where)["y"].item()

        assert ask("a") == 12 and ask("a", version=1) == 11 and ask("b") == 21
        assert ask("a", label="stable") == 11 and ask("a", label="canary") == 12
        with pytest.raises(ServingError, match=r"Specific\(b, 2\)"):
            ask("b", version=2)
        server.set_labels("a", {"stable": 2})
        assert ask("a", label="stable") == 12
        with pytest.raises(ServingError, match="canary"):
            ask("a", label="canary")
        with pytest.raises(ServingError, match="other"):
            server.set_labels("other", {})


def test_a_version_that_does_not_load_is_told_and_the_old_one_served(tmp_path):
    write(tmp_path, 1, 1)
    with Server({"m": tmp_path}, poll_seconds=0.01) as server:
        client = connect(server.rest_url)
        shutil.copytree(tmp_path / "1", tmp_path / "partial")
        data = tmp_path / "partial/variables/variables.data-00000-of-00001"
        data.write_bytes(data.read_bytes()[:2])
        (tmp_path / "partial").rename(tmp_path / "2")
        wait_for(lambda: client.status("m").get(2) == "END")
        (state,) = server.status("m", 2)
        assert state[2] is not Code.OK and "does not load" in state[3]
        assert client.predict("m", [1.0])["y"] == 1


def change_signature(side, **fields):
    """Changes the one tensor of a side of `serving_default`."""

    def change(folder):
        saved_model = graph.read(folder)
        signature = saved_model.meta_graphs[0].signature_def["serving_default"]
        (info,) = getattr(signature, side).values()
        for key, value in fields.items():
            setattr(info, key, value)
        (folder / "saved_model.pb").write_bytes(saved_model.SerializeToString())

    return change


def no_file(folder):
    (folder / "saved_model.pb").unlink()
    (folder / "saved_model.pb").mkdir()


def no_warm_up(folder):
    (folder / "assets.extra" / "tf_serving_warmup_requests").mkdir(parents=True)


MALFORMED = {
    "an input that is not there": (change_signature("inputs", name="z:0"), "'z:0'"),
    "an output that is not there": (change_signature("outputs", name="z:0"), "'z:0'"),
    "an output beyond an operation's": (
        change_signature("outputs", name="StatefulPartitionedCall:7"), "does not exist",
    ),
    "a name that is no tensor's": (change_signature("inputs", name="^z"), "not a T"),
    "an empty name": (change_signature("outputs", name=""), "not a Tensor"),
    "another type": (change_signature("outputs", dtype=3), "Received: int32"),
    "a type that is none": (change_signature("inputs", dtype=999), "999"),
    "a folder for a file": (no_file, "SavedModel's folder"),
    "a folder for warm-up requests": (no_warm_up, "cannot be read"),
}  # fmt: skip


@pytest.fixture(scope="module")
def doubled(tmp_path_factory):
    base = tmp_path_factory.mktemp("doubled")
    write(base, 1, 2)
    return base


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_version_keeps_no_other_from_being_served(case, doubled, tmp_path):
    spoil, words = MALFORMED[case]
    shutil.copytree(doubled / "1", tmp_path / "m" / "1")
    for version in (tmp_path / "m" / "2", tmp_path / "bad" / "5"):
        shutil.copytree(doubled / "1", version)
        spoil(version)
    models = {"bad": tmp_path / "bad", "m": tmp_path / "m"}
    with Server(models, poll_seconds=None) as server:
        client = connect(server.rest_url)
        assert client.predict("m", [1.0])["y"] == 2
        assert client.status("m") == {2: "END", 1: "AVAILABLE"}
        with urllib.request.urlopen(f"{server.rest_url}/v1/models/bad") as answer:
            (told,) = json.load(answer)["model_version_status"]
        assert told["version"] == "5" and told["state"] == "END"
        assert told["status"]["error_code"] != "OK"
        assert words in told["status"]["error_message"]
        with pytest.raises(ServingError, match="not found") as caught:
            client.predict("bad", [1.0])
        assert caught.value.code is Code.NOT_FOUND


def test_a_model_that_does_not_load_is_served_once_it_does(doubled, tmp_path):
    (tmp_path / "1").mkdir()
    models = {"late": tmp_path, "m": doubled}
    with Server(models, poll_seconds=0.01) as server:
        client = connect(server.rest_url)
        assert client.status("late") == {1: "END"}
        shutil.copytree(doubled / "1", tmp_path / "2")
        wait_for(lambda: client.status("late").get(2) == "AVAILABLE")
        assert client.predict("late", [1.0])["y"] == 2


def test_a_tensor_that_no_request_can_hold_is_refused_when_asked_for(doubled, tmp_path):
    from kzoo.zoo.serving.servable import Servable

    shutil.copytree(doubled / "1", tmp_path / "1")
    saved_model = graph.read(tmp_path / "1")
    signature = saved_model.meta_graphs[0].signature_def["serving_default"]
    signature.outputs["sparse"].coo_sparse.values_tensor_name = "z:0"
    (tmp_path / "1" / "saved_model.pb").write_bytes(saved_model.SerializeToString())
    with contextlib.closing(Servable(tmp_path / "1")) as servable:
        x = {"x": np.float32([1.0])}
        assert servable.predict(x, outputs=["y"]) == {"y": 2}
        with pytest.raises(ServingError, match="'sparse' is not a dense") as caught:
            servable.predict(x)
    assert caught.value.code is Code.UNIMPLEMENTED


def test_a_model_that_writes_files_is_not_loaded_unless_told(tmp_path):
    module = tf.Module()
    out = tmp_path / "out"

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def f(x):
        tf.io.write_file(str(out), "text")
        return {"y": x}

    module.f = f
    tf.saved_model.save(module, str(tmp_path / "m" / "1"), {"serving_default": f})
    models = {"m": tmp_path / "m"}
    with pytest.raises(ValueError, match="WriteFile"), Server(models):
        pass
    with Server(models, allow_any_ops=True, poll_seconds=None) as server:
        connect(server.rest_url).predict("m", [1.0])
    assert out.exists()


class TestWarmUp:
    def write(self, path, requests):
        from tensorflow_serving.apis import prediction_log_pb2

        (path / "assets.extra").mkdir(exist_ok=True)
        file = path / "assets.extra" / "tf_serving_warmup_requests"
        with tf.io.TFRecordWriter(str(file)) as writer:
            for x in requests:
                log = prediction_log_pb2.PredictionLog()
                tensor = tf.make_tensor_proto(x)
                log.predict_log.request.inputs["x"].CopyFrom(tensor)
                writer.write(log.SerializeToString())
        return file

    def test_requests_are_replayed_while_loading(self, tmp_path, monkeypatch):
        from kzoo.zoo.serving.servable import Servable

        write(tmp_path, 1, 1)
        self.write(tmp_path / "1", [np.float32([1.0]), np.float32([2.0])])
        seen = []
        predict = Servable.predict
        monkeypatch.setattr(
            Servable, "predict", lambda s, x, *a: seen.append(x) or predict(s, x, *a)
        )
        with Server({"m": tmp_path}, poll_seconds=None):
            assert [x["x"].tolist() for x in seen] == [[1.0], [2.0]]

    def test_a_small_request_that_says_it_is_huge_is_refused(self, tmp_path):
        from kzoo.zoo.serving.servable import Servable

        write(tmp_path, 1, 1)
        file = self.write(tmp_path / "1", [])
        huge = tf.make_tensor_proto(np.float32([1.0]))
        huge.tensor_shape.dim[0].size = 1 << 40  # 4 TiB of ones
        from tensorflow_serving.apis import prediction_log_pb2

        log = prediction_log_pb2.PredictionLog()
        log.predict_log.request.inputs["x"].CopyFrom(huge)
        with tf.io.TFRecordWriter(str(file)) as writer:
            writer.write(log.SerializeToString())
        with contextlib.closing(Servable(tmp_path / "1")) as servable:
            with pytest.raises(ServingError, match="more than 67108864 bytes"):
                servable.warm_up(tmp_path / "1")

    def test_without_the_protocol_buffers_there_is_none(self, tmp_path, monkeypatch):
        write(tmp_path, 1, 1)
        self.write(tmp_path / "1", [np.int32([1])])
        for name in ("tensorflow_serving", "tensorflow_serving.apis"):
            monkeypatch.setitem(sys.modules, name, None)
        with Server({"m": tmp_path}, poll_seconds=None) as server:
            assert connect(server.rest_url).predict("m", [1.0])["y"] == 1

    def test_one_that_fails_keeps_the_version_from_loading(self, tmp_path):
        write(tmp_path, 1, 1)
        self.write(tmp_path / "1", [np.int32([1])])
        with pytest.raises(ValueError, match="float32 but is int32"):
            Server({"m": tmp_path}).start()

    def test_a_damaged_file_and_too_many_keep_it_from_loading(self, tmp_path):
        write(tmp_path, 1, 1)
        file = self.write(tmp_path / "1", [np.float32([1.0])])
        file.write_bytes(file.read_bytes()[:-3])
        with pytest.raises(ValueError, match="cannot be read"):
            Server({"m": tmp_path}).start()
        self.write(tmp_path / "1", [np.float32([1.0])] * 1001)
        with pytest.raises(ValueError, match="exceeds the maximum"):
            Server({"m": tmp_path}).start()


class TestStart:
    def test_addresses_are_of_the_loopback_and_known_while_it_runs(self, module_path):
        server = Server({"m": module_path}, grpc_port=0, poll_seconds=None)
        assert server.rest_url is None and server.grpc_target is None
        with server:
            assert server.rest_url.startswith("http://127.0.0.1:")
            assert server.grpc_target.startswith("127.0.0.1:")
            url = server.rest_url + "/v1/models/m"
            assert urllib.request.urlopen(url, timeout=10).status == 200
        assert server.rest_url is None and server.grpc_target is None
        with pytest.raises(OSError):
            urllib.request.urlopen(url, timeout=10)
        server.stop()  # twice is once
        with pytest.raises(RuntimeError, match="started once"):
            server.start()

    def test_either_api_alone(self, module_path):
        for options in ({"grpc_port": None}, {"grpc_port": 0, "rest_port": None}):
            with Server({"m": module_path}, poll_seconds=None, **options) as server:
                client = connect(server.rest_url or server.grpc_target)
                assert client.predict("m", [1.0])["y"] == 2
                client.close()

    def test_an_ipv6_address(self, module_path):
        with Server({"m": module_path}, host="::1", poll_seconds=None) as server:
            assert server.rest_url.startswith("http://[::1]:")
            assert connect(server.rest_url).predict("m", [1.0])["y"] == 2

    @pytest.mark.parametrize("api", ["rest_port", "grpc_port"])
    def test_a_port_in_use(self, module_path, api):
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            server = Server({"m": module_path}, **{api: port})
            with pytest.raises(OSError):
                server.start()
        assert server.rest_url is None
        names = [thread.name for thread in threading.enumerate()]
        assert "kzoo-poll" not in names

    def test_without_grpc_the_error_says_what_to_install(
        self, module_path, monkeypatch
    ):
        monkeypatch.delitem(sys.modules, "kzoo.zoo.serving.grpc", raising=False)
        monkeypatch.setitem(sys.modules, "grpc", None)
        import kzoo.zoo.serving

        monkeypatch.delattr(kzoo.zoo.serving, "grpc", raising=False)
        with pytest.raises(ImportError, match=r"kzoo\[serve\]"):
            Server({"m": module_path}, grpc_port=0).start()
        with Server({"m": module_path}, poll_seconds=None) as server:
            assert connect(server.rest_url).predict("m", [1.0])["y"] == 2

    def test_what_cannot_be_served_is_refused(self, tmp_path, module_path):
        def refused(words, models):
            with pytest.raises(ValueError, match=words):
                Server(models).start()

        refused("at least one", {})
        refused("folder", {"m": tmp_path / "missing"})
        refused("a SavedModel itself", {"m": module_path / "1"})
        refused("named by an integer", {"m": tmp_path})
        refused("none that fits", {"m": ModelConfig(module_path, [7])})
        refused("model names", {"a/b": module_path})
        refused("model names", {"a:b": module_path})
        refused("available versions", {"m": ModelConfig(module_path, labels={"a": 2})})
        (tmp_path / "1").mkdir()
        refused("SavedModel", {"m": tmp_path})


class TestModelConfigFile:
    def test_the_file_of_tensorflow_serving(self, tmp_path, module_path):
        file = tmp_path / "models.config"
        file.write_text(
            f"""
            model_config_list {{
              config {{
                name: "a"
                base_path: "{module_path}"
                model_platform: "tensorflow"
              }}
              config {{
                name: "b"
                base_path: "{module_path}"
                model_version_policy {{ specific {{ versions: 1 versions: 4 }} }}
                version_labels {{ key: "stable" value: 1 }}
              }}
              config {{
                name: "c"
                base_path: "{module_path}"
                model_version_policy {{ all {{}} }}
              }}
            }}
            """
        )
        models = read_model_config(file)
        path = str(module_path)
        assert models == {
            "a": ModelConfig(path),
            "b": ModelConfig(path, (1, 4), {"stable": 1}),
            "c": ModelConfig(path, "all"),
        }
        with Server(models, poll_seconds=None) as server:
            client = connect(server.rest_url)
            assert client.predict("b", [1.0], label="stable")["y"] == 2

    def test_what_is_none_or_asks_too_much(self, tmp_path):
        file = tmp_path / "models.config"
        file.write_text("model_config_list { config { name: 1 } }")
        with pytest.raises(ValueError, match="model config file"):
            read_model_config(file)
        file.write_text(
            'model_config_list { config { name: "a" base_path: "b" '
            "model_version_policy { latest { num_versions: 2 } } } }"
        )
        with pytest.raises(ValueError, match="2 versions"):
            read_model_config(file)


RUN = """
import sys
import tensorflow as tf
before = set(sys.modules)
from kzoo.zoo.serving.server import Server
servers = [Server({"m": sys.argv[1]}, grpc_port=0) for _ in range(2)]
new = set(sys.modules) - before
print([n for n in new if n.split(".")[0] == "keras" or n.startswith("kzoo.layers")])
for server in servers:
    server.run()
"""


@contextlib.contextmanager
def running(code, module_path):
    """A process that runs code, and has ended afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, os.fspath(module_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_run_serves_until_a_signal(module_path):
    with running(RUN, module_path) as process:
        # The server brings neither Keras nor our layers.
        assert process.stdout.readline() == "[]\n"
        for number in (signal.SIGINT, signal.SIGTERM):
            lines = [process.stdout.readline().strip() for _ in range(4)]
            assert lines[0] == "m version 1: AVAILABLE"
            assert lines[3] == "Stop with Ctrl-C."
            url = lines[1].removeprefix("REST: ").removesuffix("/v1/models/m")
            for address in (url, lines[2].removeprefix("gRPC: ")):
                client = connect(address)
                assert client.predict("m", [1.0])["y"] == 2
                client.close()
            process.send_signal(number)
            assert process.stdout.readline() == "Stopped.\n"
        _, err = process.communicate(timeout=20)
        assert process.returncode == 0 and "Traceback" not in err


STOPPED = """
import signal
import sys
import threading
from kzoo.zoo.serving.server import Server
def stop():
    sys.stdin.readline()
    # The waiting thread is not interrupted, as by a signal just before its wait.
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
threading.Thread(target=stop, daemon=True).start()
Server({"m": sys.argv[1]}, grpc_port=0).run()
"""


@pytest.mark.slow
def test_a_signal_that_does_not_interrupt_the_wait_stops_it_too(module_path):
    with running(STOPPED, module_path) as process:
        while process.stdout.readline() != "Stop with Ctrl-C.\n":
            assert process.poll() is None
        out, _ = process.communicate("\n", timeout=20)
        assert out == "Stopped.\n" and process.returncode == 0
