"""Training by plain `compile` and `fit`, resumable, from a data set's name."""

import contextlib
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from tqdm import tqdm

from ...layers.ops.arguments import integer
from ...layers.variational.base import variational_layers
from ...optimizers import Lookahead, SwapSlowWeights
from ..datasets import load
from ..losses import GaussianNegativeLogLikelihood, gaussian_negative_log_likelihood
from ..predictive import (
    ensemble_size,
    is_regressor,
    is_variational,
    refuse_language_model,
)
from ..registry import build, info
from .batches import training_batches
from .recipes import RECIPES
from .run_folder import RunFolder, Snapshots

VALIDATION_BATCH = 256


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        model: The trained model.
        history: dict of lists, one figure an epoch.
        run_dir: The run's folder.
        seconds: Wall time spent in `fit`.
        reused: Whether the run was already finished.
    """

    model: keras.Model
    history: dict
    run_dir: Path
    seconds: float
    reused: bool


def train(
    model,
    dataset=None,
    *,
    epochs=None,
    batch_size=None,
    learning_rate=None,
    optimizer=None,
    members=None,
    max_shift=None,
    flip=None,
    recipe=None,
    train_split="train",
    validation_split="auto",
    seed=0,
    run_dir=None,
    resume=True,
    data_dir=None,
    jit_compile=None,
    callbacks=(),
    verbose=True,
):
    """Trains a classifier that ends in logits, of sequences too, or a regressor.

    Compiles the model with the cross-entropy of its logits, or a model that ends in
    `kzoo.layers.MeanAndVariance` with the likelihood, and calls `fit`. With
    Lookahead it is the slow weights that are validated, kept and returned. The same
    call after an interruption goes on at the last complete epoch and ends up
    with the same weights; after the end, it returns the finished run.

    The divergences of posteriors (see `kzoo.layers.DenseFlipout`) are divided by the
    number of examples of `train_split`, which becomes the `num_examples` of all layers
    that have none; layers of a given model that have another keep it, with a warning.

    Arguments left out come from the recipe that the model was registered with, or from
    the one that is asked for:

    - `"default"`: Adam within Lookahead, its learning rate on half a cosine;
    - `"cifar"`: as uncertainty-baselines trains on CIFAR, for any images: SGD with
      Nesterov's momentum of 0.9 for 200 epochs; a learning rate of 0.1 for a batch of
      128 examples and in proportion for others, reached after an epoch and multiplied
      by 0.2 after 0.3, 0.6 and 0.8 of the epochs; images shifted by up to two pixels
      and mirrored. The ℓ2 penalty is the model's own;
    - `"cifar_batch_ensemble"`: the same for BatchEnsembles: 250 epochs, decays after
      0.4, 0.8 and 0.9 of them, all members have all examples of a batch, and half the
      learning rate for fast weights.

    Args:
        model: Name of a registered model, which is built after the global seeds are
            set to `seed`; or a `keras.Model`.
        dataset: Name of a data set, as `kzoo.zoo.load` takes it.
        epochs: Number of epochs.
        batch_size: Number of different examples in a batch.
        learning_rate: The peak of the recipe's schedule (by default it is reached
            after the first 5 % of the steps and falls to 0 along half a cosine), for
            the batch size as it is; or a
            `keras.optimizers.schedules.LearningRateSchedule`.
        optimizer: A function from that learning rate to an optimizer, such as
            `keras.optimizers.SGD`; or an optimizer, used as it is with its own
            learning rate. Defaults to the recipe's.
        members: How M members of an ensemble share a batch: `"split"` gives each
            `batch_size / M` examples of its own, `"tile"` all the same ones.
        max_shift: Images are shifted at random by up to so many pixels each way.
        flip: Whether half of the images, at random, are mirrored left to right.
        recipe: Name of a recipe, as above. Defaults to that of the model.
        train_split: Which examples to train on.
        validation_split: Which to validate on after every epoch; None for none. By
            default `"validation"`, where the data set has it.
        seed: Integer: the order of examples, shifts and, for a name, first weights.
        run_dir: Folder of the run. Defaults to `runs/<model's name>`.
        resume: Whether to go on with, or return, the run in `run_dir`; else what it
            holds is removed. A run with another configuration is never mixed with
            this one. (Weights that a given model has are not part of that.)
        data_dir: Folder of the data sets.
        jit_compile: Whether XLA compiles the step, as `compile` takes it. By
            default it does on an accelerator and on JAX; with TensorFlow on a CPU
            small models take longer to compile than they gain.
        callbacks: Further Keras callbacks.
        verbose: Whether to show a progress bar.

    Returns:
        A `TrainResult`. Its `run_dir` also has the model of the best epoch on the
        validation examples, `best.keras`, and a log for TensorBoard.

    Raises:
        ValueError: If the configuration makes no sense, `run_dir` holds another, or
            the model is a language model.
        RuntimeError: If another process is training in `run_dir`.

    Example:

    >>> import tempfile
    >>> from kzoo.zoo import train
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = train("resnet8_digits", epochs=1, run_dir=folder, verbose=False)
    >>> sorted(result.history)
    ['accuracy', 'loss', 'nll', 'val_accuracy', 'val_loss', 'val_nll']
    """
    registered, is_built_here = {}, isinstance(model, str)
    if is_built_here:
        registered = {"dataset": info(model).dataset}
        registered |= {} if recipe else info(model).recipe
        recipe = recipe or registered.get("recipe")
        keras.utils.set_random_seed(seed)
        model = build(model)
    refuse_language_model(model)
    named = _named(recipe or "default")
    asked = {
        "dataset": dataset,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "members": members,
        "max_shift": max_shift,
        "flip": flip,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    recipe = {"flip": False, **named.arguments, **registered, **asked}
    for name, least in (("epochs", 1), ("batch_size", 1), ("max_shift", 0)):
        recipe[name] = integer(name, recipe[name], least)
    if named.scales and learning_rate is None:
        recipe["learning_rate"] *= recipe["batch_size"] / named.arguments["batch_size"]
    copies = _copies(recipe["members"], ensemble_size(model), recipe["batch_size"])
    if learning_rate is not None and isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            "Give `learning_rate`, or an optimizer that has its own. Received: "
            f"learning_rate={learning_rate} and optimizer={optimizer}"
        )

    examples, data = load(recipe["dataset"], train_split, data_dir=data_dir)
    count = int(examples.cardinality())
    steps = count // recipe["batch_size"]
    if steps < 1:
        raise ValueError(
            f"`batch_size` must be at most {count}, the number of examples in "
            f"{train_split!r}. Received: batch_size={recipe['batch_size']}"
        )
    _check_images(examples, recipe)
    if validation_split == "auto":
        validation_split = "validation" if "validation" in data.splits else None
    validation = None
    if validation_split:
        validation, _ = load(recipe["dataset"], validation_split, data_dir=data_dir)
        validation = validation.batch(VALIDATION_BATCH)

    if not isinstance(optimizer, keras.optimizers.Optimizer):
        rate = _schedule(recipe["learning_rate"], recipe["epochs"], steps, named)
        optimizer = optimizer(rate) if optimizer else named.optimizer(rate, model)
    if is_variational(model):
        _scale_divergence(model, count, is_built_here)
    config = {
        "model": _canonical(model),
        "optimizer": _without_names(keras.optimizers.serialize(optimizer)),
        "dataset": data.full_name,
        "train_split": train_split,
        "validation_split": validation_split,
        "seed": seed,
        **{k: recipe[k] for k in ("epochs", "batch_size", "members", "max_shift")},
        # Runs of versions that mirrored no images have no such entry.
        **({"flip": True} if recipe["flip"] else {}),
    }
    model.compile(
        optimizer=optimizer,
        **_loss_and_metrics(model),
        jit_compile=_worth_compiling() if jit_compile is None else jit_compile,
    )
    with RunFolder(run_dir or Path("runs") / model.name).open(config, resume) as folder:
        record = folder.finished()
        reused = record is not None
        if not reused:
            first_epoch, record = folder.progress()
            batches = training_batches(
                examples,
                count,
                batch_size=recipe["batch_size"],
                copies=copies,
                max_shift=recipe["max_shift"],
                flip=recipe["flip"],
                seed=seed,
                # Also if no epoch is left: `fit` reads a batch before it sees that.
                first_epoch=min(first_epoch, recipe["epochs"] - 1),
                epochs=recipe["epochs"],
            )
            with tqdm(
                desc=model.name,
                total=recipe["epochs"],
                initial=first_epoch,
                unit="epoch",
                disable=not verbose,
            ) as bar:
                try:
                    model.fit(
                        batches,
                        epochs=recipe["epochs"],
                        steps_per_epoch=steps,
                        validation_data=validation,
                        shuffle=False,
                        callbacks=[
                            *_callbacks(model, folder, record, bar),
                            *callbacks,
                            Snapshots(folder, record),
                        ],
                        verbose=0,
                    )
                finally:
                    # Keras leaves the restored epoch on the model, and a later `fit`
                    # would start from there.
                    model._initial_epoch = None
            with _slow_weights(model):
                folder.finish(model, record)
        else:
            # So that the file's optimizer finds its place in this one.
            model.optimizer.build(model.trainable_variables)
        model.load_weights(folder.model)
    return TrainResult(
        model, record["history"], folder.path, record["seconds"], reused=reused
    )


def _named(recipe):
    """Returns a `Recipe` by its name."""
    if recipe not in RECIPES:
        raise ValueError(
            f"expected `recipe` to be one of {list(RECIPES)}. Received: {recipe=}"
        )
    return RECIPES[recipe]


def _check_images(examples, recipe):
    """Refuses to shift or mirror what has no height and width."""
    if not (recipe["max_shift"] or recipe["flip"]):
        return
    shape = getattr(examples.element_spec[0], "shape", None)  # None of dicts.
    if shape is None or shape.rank != 3:
        raise ValueError(
            "expected images [height, width, channels], or `max_shift=0` and "
            f"`flip=False`. Received: examples of shape {shape}, max_shift="
            f"{recipe['max_shift']} and flip={recipe['flip']}"
        )


def _copies(members, ensemble_size, batch_size):
    """Returns how often a batch goes in, one copy after the other."""
    if members not in ("split", "tile"):
        raise ValueError(
            f"`members` must be 'split' or 'tile'. Received: members={members!r}"
        )
    if members == "tile":
        return ensemble_size
    if batch_size % ensemble_size:
        raise ValueError(
            f"`batch_size` must be divisible by the {ensemble_size} members that "
            f"share a batch. Received: batch_size={batch_size}"
        )
    return 1


def _scale_divergence(model, count, is_built_here):
    """Divides the divergences by the number of examples, unless the user has."""
    layers = variational_layers(model)
    for layer in layers:
        if is_built_here or layer.num_examples is None:
            layer.num_examples = count
    others = {layer.num_examples for layer in layers} - {count}
    if others:
        warnings.warn(
            f"train: divergences of {model.name} are divided by num_examples="
            f"{', '.join(map(str, others))}, but it is trained on {count} examples",
            stacklevel=3,
        )


def _loss_and_metrics(model):
    """Returns the arguments of `compile` that the model's task decides."""
    if is_regressor(model):
        nll = keras.metrics.MeanMetricWrapper(
            gaussian_negative_log_likelihood, name="nll"
        )
        return {"loss": GaussianNegativeLogLikelihood(), "metrics": [nll]}
    return {
        "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "metrics": [
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
            keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="nll"),
        ],
    }


def _worth_compiling():
    """Whether XLA pays: on an accelerator, and on JAX, which has nothing else."""
    devices = keras.distribution.list_devices()
    on_accelerator = any(not device.startswith("cpu") for device in devices)
    return on_accelerator or keras.backend.backend() == "jax"


def _schedule(learning_rate, epochs, steps, recipe):
    """Returns the schedule for a peak learning rate."""
    if isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule):
        return learning_rate
    if not 0 < learning_rate < math.inf:
        raise ValueError(
            "`learning_rate` must be a positive, finite number or a schedule. "
            f"Received: learning_rate={learning_rate!r}"
        )
    return recipe.schedule(learning_rate, epochs, steps)


def _callbacks(model, folder, record, bar):
    """Yields the callbacks for what a run shows and keeps besides snapshots."""

    def show(epoch, logs):
        prefix = "val_" if "val_nll" in logs else ""
        names = [prefix + name for name in ("accuracy", "nll") if name in logs]
        bar.set_postfix({name: f"{logs[name]:.4f}" for name in names}, refresh=False)
        bar.update()

    yield keras.callbacks.LambdaCallback(on_epoch_end=show)
    yield keras.callbacks.TensorBoard(folder.tensorboard, write_graph=False)
    if _lookahead(model):
        yield SwapSlowWeights()
    yield _Best(folder, record)


class _Best(keras.callbacks.ModelCheckpoint):
    """Keeps the model of the best epoch, with the weights that were validated."""

    def __init__(self, folder, record):
        super().__init__(
            # Keras takes braces for fields to fill in.
            str(folder.best).replace("{", "{{").replace("}", "}}"),
            monitor="val_nll",
            mode="min",
            save_best_only=True,
            initial_value_threshold=min(record["history"].get("val_nll", [np.inf])),
        )

    def on_epoch_end(self, epoch, logs=None):
        if "val_nll" in logs:
            with _slow_weights(self.model):
                super().on_epoch_end(epoch, logs)


def _lookahead(model):
    """Returns the Lookahead that trains a model, under a loss scale too, or None."""
    optimizer = model.optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer if isinstance(optimizer, Lookahead) else None


def _slow_weights(model):
    """A context in which the model has the weights to evaluate and to keep."""
    lookahead = _lookahead(model)
    return lookahead.slow_weights() if lookahead else contextlib.nullcontext()


def _canonical(model):
    """Returns a model's configuration, equal for equal models.

    Layers that the user gave no name get one from a counter, which goes on from one
    model to the next; so names are numbered in the order in which they occur.
    """
    names = {}

    def number(value):
        if isinstance(value, dict):
            return {key: number(v) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [number(v) for v in value]
        return names.get(value, value) if isinstance(value, str) else value

    def collect(layers):
        for layer in layers:
            names.setdefault(layer.name, f"layer {len(names)}")
            collect(getattr(layer, "layers", ()))

    names[model.name] = "model"
    collect(model.layers)
    config = keras.saving.serialize_keras_object(model)
    config.pop("compile_config", None)  # from an earlier `compile`
    return number(config)


def _without_names(config):
    """Returns an optimizer's configuration without names, which Keras counts too."""
    if isinstance(config, dict):
        return {k: _without_names(v) for k, v in config.items() if k != "name"}
    return config
