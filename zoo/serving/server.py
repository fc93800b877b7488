"""A local server with TensorFlow Serving's REST and gRPC API.

    with Server({"digits": "saved_models/digits"}) as server:
        print(server.rest_url)

It is for development, tests and small deployments: what works against it works against
TensorFlow Serving with the same folders. docs/serving.md names the differences.
"""

import logging
import os
import signal
import threading
from pathlib import Path

from . import rest
from .models import MODEL_NAME, Model, ModelConfig, State
from .servable import Servable
from .status import Code, ServingError, invalid

__all__ = ["ModelConfig", "Server", "read_model_config"]

LOG = logging.getLogger("kzoo.serving")


class Server:
    """Serves models over REST and gRPC, until it is stopped.

    Args:
        models: {name: the folder of a model's version folders, or a ModelConfig}.
        host: The address to listen on; other machines reach it only when changed.
        rest_port: The REST port; 0 for a free one, None for no REST.
        grpc_port: The gRPC port; 0 for a free one, None for no gRPC. gRPC needs the
            extra `kzoo[serve]`.
        poll_seconds: How often to look for new and removed versions; None for never.
        timeout: Seconds that a request may compute.
        max_request_bytes: The largest request taken.
        threads: How many requests are worked on at once, over each API; None for four
            a processor.
        xla: Whether to serve signatures that need XLA, as `serving_xla`. TensorFlow
            Serving does not unless told, and neither does this.
        allow_any_ops: Whether to load models with operations beyond those that
            compute, which may read and write files.

    Attributes:
        rest_url: As `http://127.0.0.1:8501`, once started; else None.
        grpc_target: As `127.0.0.1:8500`, once started; else None.

    Raises:
        ValueError: An argument is not as described.
    """

    def __init__(
        self,
        models,
        *,
        host="127.0.0.1",
        rest_port=0,
        grpc_port=None,
        poll_seconds=1.0,
        timeout=30.0,
        max_request_bytes=64 << 20,
        threads=None,
        xla=False,
        allow_any_ops=False,
    ):
        self.host = host
        self.timeout = timeout
        self.max_request_bytes = max_request_bytes
        self.rest_url = self.grpc_target = None
        self._ports = {"rest": rest_port, "grpc": grpc_port}
        self._poll_seconds = poll_seconds
        self._threads = threads or 4 * (os.cpu_count() or 1)
        self._options = {"xla": xla, "allow_any_ops": allow_any_ops}
        self._models = {
            name: Model(name, _config(name, config), self._load)
            for name, config in dict(models).items()
        }
        if not self._models:
            raise ValueError("Expected at least one model to serve. Received: none")
        self._started = False
        self._front_ends = []
        self._poller = None
        self._stop = threading.Event()

    def start(self):
        """Loads the models and starts to answer.

        Returns:
            The server itself.

        Raises:
            ValueError: A model has no version, none of any model loads, or a label
                names a version that is not available.
            ImportError: gRPC was asked for and is not installed.
            OSError: A port cannot be had.
            RuntimeError: It was started before.
        """
        if self._started:
            raise RuntimeError("A Server is started once. Make another one.")
        self._started = True
        try:
            for model in self._models.values():
                model.refresh()
                if _available(model):
                    model.set_labels(model.labels)
            if not any(map(_available, self._models.values())):
                raise ValueError(_problems(self._models.values()))
            if self._ports["rest"] is not None:
                front = rest.RestServer(
                    self, self.host, self._ports["rest"], self._threads
                )
                self._front_ends.append(front)
                self.rest_url = f"http://{_host_port(self.host, front.port)}"
            if self._ports["grpc"] is not None:
                from . import grpc

                front = grpc.GrpcServer(
                    self, self.host, self._ports["grpc"], self._threads
                )
                self._front_ends.append(front)
                self.grpc_target = _host_port(self.host, front.port)
        except BaseException:
            for front in self._front_ends:
                front.start()  # what never ran cannot be stopped
            self.stop(0)
            raise
        for front in self._front_ends:
            front.start()
        if self._poll_seconds is not None:
            self._poller = threading.Thread(
                target=self._poll, name="kzoo-poll", daemon=True
            )
            self._poller.start()
        return self

    def stop(self, grace=10.0):
        """Stops: takes no new request, answers those under way, frees the models.

        Args:
            grace: Seconds that requests under way get.
        """
        self._stop.set()
        if self._poller:
            self._poller.join()
            self._poller = None
        for front in self._front_ends:
            front.stop(grace)
        self._front_ends = []
        self.rest_url = self.grpc_target = None
        for model in self._models.values():
            model.close()

    def __enter__(self):
        """Starts the server."""
        return self.start()

    def __exit__(self, *error):
        """Stops the server."""
        self.stop()

    def run(self):
        """Starts, prints the addresses and serves until SIGINT or SIGTERM."""
        signals = (signal.SIGINT, signal.SIGTERM)
        asked = threading.Event()
        before = {s: signal.signal(s, lambda *_: asked.set()) for s in signals}
        try:
            with self:
                for name in self._models:
                    for number, state, _, message in self.status(name):
                        print(
                            f"{name} version {number}: {state.name} {message}".rstrip()
                        )
                if self.rest_url:
                    print(f"REST: {self.rest_url}/v1/models/{next(iter(self._models))}")
                if self.grpc_target:
                    print(f"gRPC: {self.grpc_target}")
                print("Stop with Ctrl-C.", flush=True)
                # A signal just before a wait would not end one that has no end.
                while not asked.wait(timeout=1):
                    pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        print("Stopped.", flush=True)

    def set_labels(self, name, labels):
        """Replaces a model's version labels at once; no request is dropped.

        Args:
            name: The model's name.
            labels: {label: version}, of versions that are available.

        Raises:
            ValueError: One of them is not available.
            ServingError: There is no such model.
        """
        self._model(name).set_labels(labels)

    def lend(self, name, version=None, label=None):
        """Lends a version of a model for the time of a `with` block.

        Args:
            name: The model's name.
            version: An integer, or None for the newest.
            label: A label instead.

        Returns:
            A context manager that gives (version, Servable).

        Raises:
            ServingError: There is no such model, or no such version.
        """
        if name not in self._models:
            which = f"Latest({name})"
            if version is not None:
                which = f"Specific({name}, {version})"
            raise ServingError(
                Code.NOT_FOUND, f"Servable not found for request: {which}"
            )
        return self._models[name].lend(version, label)

    def status(self, name, version=None, label=None):
        """Returns the states of a model's versions, newest first.

        Args:
            name: The model's name.
            version: An integer, or None for all.
            label: A label instead.

        Returns:
            A list of (version, State, Code, message).

        Raises:
            ServingError: There is no such model, or no such version.
        """
        return self._model(name).status(version, label)

    def refuse_method(self, signature, method):
        """Raises the error of a classify or regress request.

        Keras models have predict signatures, to which TensorFlow Serving answers as
        here. Signatures of the older kinds are not implemented.

        Args:
            signature: The SignatureDef asked for.
            method: Its `method_name` if it could answer.

        Raises:
            ServingError: Always.
        """
        if signature.method_name != method:
            kind = {"classify": "classification", "regress": "regression"}
            raise invalid(
                f"Expected {kind[method.rpartition('/')[2]]} signature method_name to "
                f"be {method}. Was: {signature.method_name}"
            )
        raise ServingError(Code.UNIMPLEMENTED, f"{method} is not implemented")

    def _model(self, name):
        if name not in self._models:
            raise ServingError(
                Code.NOT_FOUND, f"Could not find any versions of model {name}"
            )
        return self._models[name]

    def _load(self, path):
        servable = Servable(path, **self._options)
        try:
            servable.warm_up(path)
        except ImportError as error:
            LOG.info("no warm-up of %s: %s", path, error)
        except BaseException:
            servable.close()
            raise
        return servable

    def _poll(self):
        while not self._stop.wait(self._poll_seconds):
            for model in self._models.values():
                try:
                    model.refresh()
                except Exception:
                    # The versions that are loaded must go on being served.
                    LOG.exception("looking for versions of %s failed", model.name)


def read_model_config(path):
    """Reads a model config file of TensorFlow Serving, for `Server(models)`.

    Args:
        path: A file with a ModelServerConfig protocol buffer in text form, as given to
            `tensorflow_model_server --model_config_file`.

    Returns:
        {name: ModelConfig}.

    Raises:
        ValueError: The file is not one, or it asks for what this server has not.
        ImportError: tensorflow-serving-api is not installed.
    """
    from google.protobuf import text_format

    try:
        from tensorflow_serving.config import model_server_config_pb2
    except ImportError as error:
        raise ImportError(
            "A model config file needs tensorflow-serving-api: pip install "
            "'kzoo[serve]'"
        ) from error
    try:
        config = text_format.Parse(
            Path(path).read_text(), model_server_config_pb2.ModelServerConfig()
        )
    except text_format.ParseError as error:
        raise ValueError(f"Expected a model config file. Received: {error}") from None
    models = {}
    for model in config.model_config_list.config:
        policy = model.model_version_policy
        choice = policy.WhichOneof("policy_choice")
        versions = {"all": "all", "specific": tuple(policy.specific.versions)}
        if choice == "latest" and policy.latest.num_versions > 1:
            raise ValueError(
                "Expected the version policy latest {num_versions: 1}, all or "
                f"specific. Received: {policy.latest.num_versions} versions of "
                f"{model.name!r}"
            )
        models[model.name] = ModelConfig(
            model.base_path, versions.get(choice), dict(model.version_labels)
        )
    return models


def _config(name, config):
    if not isinstance(name, str) or not MODEL_NAME.fullmatch(name):
        raise ValueError(
            f"Expected model names without '/', ':' and white space. Received: {name!r}"
        )
    if not isinstance(config, ModelConfig):
        config = ModelConfig(config)
    base = Path(config.base_path)
    if (base / "saved_model.pb").exists():
        raise ValueError(
            "Expected the folder that holds the version folders, named by integers. "
            f"Received: a SavedModel itself, {os.fspath(base)!r}"
        )
    if not base.is_dir():
        raise ValueError(f"Expected a folder. Received: {os.fspath(base)!r}")
    return config


def _available(model):
    """Tells whether a version of a model was loaded, of those that must be there."""
    try:
        return any(state is State.AVAILABLE for _, state, *_ in model.status())
    except ServingError:
        raise ValueError(
            f"Expected a version folder of {model.name!r}, named by an integer, in "
            f"{os.fspath(model.config.base_path)!r}. Received: none that fits "
            f"{model.config.versions!r}"
        ) from None


def _problems(models):
    return "; ".join(
        f"No version of {model.name!r} could be loaded: "
        + "; ".join(f"version {n}: {m}" for n, _, _, m in model.status())
        for model in models
    )


def _host_port(host, port):
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
