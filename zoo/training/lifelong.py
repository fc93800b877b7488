"""Lifelong learning with BatchEnsemble: tasks one after the other on shared weights."""

import json
import math
import os
import re
import warnings
from pathlib import Path

import keras

from ...layers import to_batch_ensemble
from ...layers.batch_ensemble.base import BatchEnsembleLayer
from ...layers.conversion import new_inputs
from .. import placing


class Lifelong:
    """A network that learns tasks one after the other and forgets none.

    The first task trains all: the weights W of each layer, the task's fast weights r
    and s, biases, normalizations and head. From then on W stay as they are, and each
    later task t trains only what is its own:

        W_t = W ∘ (r_t s_tᵀ),

    so that earlier tasks answer as before, to the bit. A task costs the parameters of
    its fast weights, biases, normalizations and head.

    Each task is a plain `keras.Model`, to be compiled, trained and evaluated as such.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        body: A built Sequential or functional `keras.Model` from an input to features
            `[B, F]`, without a head, whose layers with kernels all have counterparts
            (see `kzoo.layers.to_batch_ensemble`). Its weights are what the first task
            starts from, and its biases and normalizations what each does. W of layers
            that are frozen are not trained by the first task either.
        rank: K, how many fast weights are summed in each layer.
        alpha_initializer: For all r.
        gamma_initializer: For all s.

    Raises:
        ValueError: As `kzoo.layers.to_batch_ensemble`.

    Example:

    >>> import keras
    >>> from kzoo.zoo import Lifelong
    >>> body = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu")])
    >>> lifelong = Lifelong(body)
    >>> first = lifelong.add_task("odd or even", classes=2)
    >>> second = lifelong.add_task("prime or not", classes=2)
    >>> lifelong.growth()["tasks"]  # 8 + 16 + 16 fast weights and biases, 34 of a head
    {'odd or even': 74, 'prime or not': 74}
    """

    def __init__(
        self, body, *, rank=1, alpha_initializer="ones", gamma_initializer="ones"
    ):
        self._body = body
        self._arguments = {
            "rank": rank,
            "alpha_initializer": alpha_initializer,
            "gamma_initializer": gamma_initializer,
        }
        self._features = []  # Each task's network in front of its head.
        self._heads = []
        self.tasks = {}

    def add_task(self, name, classes=None, *, head=None):
        """Adds a task, and freezes what it shares with those before it.

        Args:
            name: A name of its own, also if only its letters and digits count.
            classes: C: the task's head is a dense layer from features to logits
                `[B, C]`.
            head: A layer in its place, not built.

        Returns:
            The task's `keras.Model`, not compiled. `lifelong.tasks[name]` is it.

        Raises:
            ValueError: If the name is taken or empty, neither or both of `classes` and
                `head` are given, or the head is no layer, or a built one.
        """
        taken = map(output_name, self.tasks)
        if not isinstance(name, str) or not name or output_name(name) in taken:
            raise ValueError(
                "expected `name` to be a text, its letters and digits not those of "
                f"another task, of {list(self.tasks)}. Received: name={name!r}"
            )
        if (classes is None) == (head is None):
            raise ValueError(
                "expected `classes` or `head`. "
                f"Received: classes={classes!r}, head={head!r}"
            )
        if head is None:
            head = keras.layers.Dense(classes, name="head")
        if not isinstance(head, keras.layers.Layer):
            raise ValueError(
                f"expected a head that is a layer. Received: head={head!r}"
            )
        if head.built:
            raise ValueError(
                "expected a head of this task alone, not built. "
                f"Received: head={head.name!r}, which is built"
            )
        features = self._new_features()
        inputs = new_inputs(features)
        outputs = head(features(inputs))
        model = keras.Model(inputs, outputs, name=f"task_{len(self.tasks)}")
        self._features.append(features)
        self._heads.append(head)
        self.tasks[name] = model
        if len(self.tasks) > 1:
            self.freeze_shared()
        return model

    def _new_features(self):
        """A task's network in front of its head."""
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="to_batch_ensemble: ")
            try:
                features = to_batch_ensemble(
                    self._body,
                    ensemble_size=1,
                    own_normalization=True,
                    average=None,
                    share_with=self._features[0] if self._features else None,
                    **self._arguments,
                )
            except UserWarning as warning:
                raise ValueError(
                    "expected a body whose layers with kernels all have counterparts, "
                    f"for their weights are shared. Received: {warning}"
                ) from None
        # A frozen body's W stay as they are; what is the task's own is trained.
        shared = [(layer.shared, layer.shared.trainable) for layer in members(features)]
        for layer in features._flatten_layers():
            layer.trainable = True
        for layer, trainable in shared:
            layer.trainable = trainable
        return features

    def freeze_shared(self):
        """Freezes W in all tasks, for good; `add_task` does so from the second on.

        A task that is compiled has a new optimizer from then on, of the same
        configuration, which knows nothing of W.
        """
        for name, features in zip(self.tasks, self._features, strict=True):
            model = self.tasks[name]
            layers = members(features)
            thawed = any(layer.shared.trainable for layer in layers)
            for layer in layers:
                layer.shared.trainable = False
            if thawed and model.compiled:
                config = keras.optimizers.serialize(model.optimizer)
                model.optimizer = keras.optimizers.deserialize(config)
                model.train_function = None

    def evaluate(self, data, **kwargs):
        """Evaluates tasks, each on its own data.

        Args:
            data: dict from a task's name to its examples: `(x, y)`, `(x, y, weights)`
                or what else `keras.Model.evaluate` takes for x.
            **kwargs: Further arguments of `keras.Model.evaluate`.

        Returns:
            dict from the name to the dict of the task's loss and metrics.

        Raises:
            ValueError: If there is no task of a name.
        """
        unknown = [name for name in data if name not in self.tasks]
        if unknown:
            raise ValueError(f"expected tasks {list(self.tasks)}. Received: {unknown}")
        found = {}
        for name, examples in data.items():
            given = dict(zip(("x", "y", "sample_weight"), examples, strict=False))
            if not isinstance(examples, tuple):
                given = {"x": examples}
            model = self.tasks[name]
            found[name] = model.evaluate(**given, return_dict=True, **kwargs)
        return found

    def growth(self):
        """Counts parameters.

        Returns:
            dict: `shared`, how many all tasks share; `tasks`, a dict of how many are
            each task's own; `growth`, all of them over those of the first task.
        """
        shared = {
            id(v): v
            for features in self._features
            for layer in members(features)
            for v in layer.shared.weights
        }
        tasks = {
            name: sum(math.prod(v.shape) for v in model.weights if id(v) not in shared)
            for name, model in self.tasks.items()
        }
        count = sum(math.prod(v.shape) for v in shared.values())
        whole = count + sum(tasks.values())
        first = count + next(iter(tasks.values()), 0)
        return {
            "shared": count,
            "tasks": tasks,
            "growth": whole / first if first else 1.0,
        }

    def as_model(self):
        """Makes one model of all tasks, to be exported or served.

        Returns:
            A `keras.Model` from the input to a dict of the tasks' outputs, each by the
            task's name with `_` for what is no letter or digit ("classes_0_1"), as
            `kzoo.zoo.export(model, folder, function=model)` takes it. It has the
            tasks' weights, not copies of them. (To go on later, `lifelong.save`: a
            `.keras` file does not keep that layers share W.)

        Raises:
            ValueError: If there is no task.
        """
        if not self.tasks:
            raise ValueError("expected a task to have been added. Received: none")
        inputs = new_inputs(self._body)
        outputs = {output_name(n): model(inputs) for n, model in self.tasks.items()}
        return keras.Model(inputs, outputs, name=self._body.name)

    def save(self, folder):
        """Writes tasks and weights, W once, to a folder that `load` reads.

        What was saved there before is replaced when all is written.

        Args:
            folder: Path of the folder.

        Raises:
            ValueError: If something else is there, or there is no task.
        """
        folder = Path(folder)
        if folder.exists() and not (folder / "lifelong.json").exists():
            raise ValueError(
                "expected a new folder, or one that `save` has written. "
                f"Received: {folder}"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        placing.remove(partial)
        try:
            partial.mkdir()
            serialize = keras.saving.serialize_keras_object
            config = {
                "body": without_state(serialize(self._body), {"compile_config"}),
                "arguments": serialize(self._arguments),
                "tasks": {
                    name: without_state(serialize(head))
                    for name, head in zip(self.tasks, self._heads, strict=True)
                },
            }
            (partial / "lifelong.json").write_text(json.dumps(config))
            self._body.save_weights(partial / "body.weights.h5")
            self.as_model().save_weights(partial / "lifelong.weights.h5")
            placing.place(partial, folder)
        finally:
            placing.remove(partial)

    @classmethod
    def load(cls, folder):
        """Reads what `save` has written.

        Args:
            folder: Path of the folder.

        Returns:
            A `Lifelong` with all tasks, whose models are not compiled.
        """
        config = json.loads((Path(folder) / "lifelong.json").read_text())
        deserialize = keras.saving.deserialize_keras_object
        body = deserialize(config["body"])
        body.load_weights(Path(folder) / "body.weights.h5")
        made = cls(body, **deserialize(config["arguments"]))
        for name, head in config["tasks"].items():
            made.add_task(name, head=deserialize(head))
        made.as_model().load_weights(Path(folder) / "lifelong.weights.h5")
        return made


def members(features):
    """The layers with fast weights of a network."""
    layers = features._flatten_layers()
    return [layer for layer in layers if isinstance(layer, BatchEnsembleLayer)]


def output_name(task):
    """A task's name as an output of a SavedModel may have it."""
    name = re.sub("[^A-Za-z0-9]+", "_", str(task))
    return f"_{name}" if name[:1].isdigit() else name


def without_state(config, names=("build_config", "compile_config")):
    """A configuration without how a layer or model, and what is inside, was built."""
    if isinstance(config, dict):
        kept = {n: value for n, value in config.items() if n not in names}
        return {n: without_state(value, names) for n, value in kept.items()}
    if isinstance(config, (list, tuple)):
        return [without_state(value, names) for value in config]
    return config
