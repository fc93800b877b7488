"""Accuracy, calibration and uncertainty of a classifier, read in one pass."""

import keras
import numpy as np
import tensorflow as tf

from ...layers.ops.arguments import integer
from ..datasets import load
from ..metrics import (
    AreaUnderRiskCoverage,
    BrierScore,
    EnsembleNegativeLogLikelihood,
    ExpectedCalibrationError,
    MutualInformation,
    PredictiveEntropy,
)
from ..models.attention_seq2seq import is_attention_seq2seq, translator
from ..predictive import Predictions, refuse_language_model

OUTPUTS = ("probabilities", "member_probabilities")
# How far probabilities may be from summing to 1: what half precision makes of them.
TOLERANCE = 1e-2


def evaluate(
    model,
    dataset="digits",
    split="test",
    *,
    samples=None,
    batch_size=256,
    num_bins=15,
    data_dir=None,
):
    """Measures a classifier that ends in logits, or translations.

    Args:
        model: A `keras.Model`; of an ensemble that ends in `AverageMembers` the
            mean of the members' probabilities is measured, at its temperature if it
            has a `kzoo.layers.TemperatureScaling` behind it. Or a SavedModel that
            `kzoo.zoo.export` has written, as a `kzoo.zoo.serving.servable.Servable`.
        dataset: Name of a data set, as `kzoo.zoo.load` takes it.
        split: Which examples.
        samples: Of a model with distributions over its weights, or with
            `kzoo.layers.MonteCarloDropout`: K, for draws that take the place of the
            members, the same each time. None for the posterior's mean, which is what
            translations are searched for with.
        batch_size: Number of examples that are predicted at a time.
        num_bins: Bins of the expected calibration error.
        data_dir: Folder of the data sets.

    Returns:
        dict of numbers: `accuracy`; `nll`, negative log-likelihood in nats; `brier`,
        Brier score; `ece`, expected calibration error; `aurc`, area under the
        risk-coverage curve; `predictive_entropy` and `mutual_information`, means in
        nats; `members`, `parameters` (not of a SavedModel) and `examples`. Of an
        encoder-decoder `exact_match`, the share of sources that its `translator`, or
        the SavedModel of it, translates as the label is; of a Keras model also
        `accuracy` and `nll` of ids that follow right ones, and `parameters`.

    Raises:
        ValueError: If the model does not end in logits or is a language model, or a
            SavedModel's probabilities are none; if it has not the data set's number of
            classes; if `samples` is given for translations; if `batch_size` or
            `num_bins` is not an integer of at least 1; or if the split does not exist.
            What cannot be known before is checked on the first batch.

    Example:

    >>> from kzoo.zoo import build, evaluate
    >>> figures = evaluate(build("resnet8_digits"), split="validation")
    >>> figures["examples"], figures["members"], 0 <= figures["accuracy"] <= 1
    (180, 1, True)
    """
    if _translates(model):
        if samples is not None:
            raise ValueError(
                "expected `samples` to be None for translations. Received: "
                f"samples={samples!r}"
            )
        return _of_translations(model, dataset, split, batch_size, data_dir)
    metrics = {
        "accuracy": keras.metrics.SparseCategoricalAccuracy(),
        "nll": EnsembleNegativeLogLikelihood(),
        "brier": BrierScore(),
        "ece": ExpectedCalibrationError(num_bins),
        "aurc": AreaUnderRiskCoverage(),
        "predictive_entropy": PredictiveEntropy(),
        "mutual_information": MutualInformation(),
    }
    count = 0
    for y, outputs in answers(model, dataset, split, samples, batch_size, data_dir):
        for name, metric in metrics.items():
            of_members = name == "mutual_information"
            metric.update_state(
                y, outputs["member_probabilities" if of_members else "probabilities"]
            )
        count += len(y)
    figures = {name: float(metric.result()) for name, metric in metrics.items()}
    figures["members"] = outputs["member_probabilities"].shape[1]
    if isinstance(model, keras.Model):
        figures["parameters"] = model.count_params()
    figures["examples"] = count
    return figures


def _translates(model):
    """Whether a model or SavedModel gives sequences of ids."""
    if isinstance(model, keras.Model):
        return is_attention_seq2seq(model)
    return hasattr(model, "signature") and "ids" in model.signature().outputs


def _of_translations(model, dataset, split, batch_size, data_dir):
    """What `evaluate` says of translations."""
    batch_size = integer("batch_size", batch_size)
    examples, _ = load(dataset, split, data_dir=data_dir)
    is_ours = isinstance(model, keras.Model)
    length = examples.element_spec[1].shape[0]
    search = translator(model, length=length).predict_on_batch if is_ours else None
    metrics = {"exact_match": keras.metrics.Mean()}
    if is_ours:
        metrics["accuracy"] = keras.metrics.SparseCategoricalAccuracy()
        metrics["nll"] = keras.metrics.SparseCategoricalCrossentropy(from_logits=True)
    count = 0
    for x, y in examples.batch(batch_size).as_numpy_iterator():
        ids = search(x["source"]) if is_ours else model.predict({"source": x["source"]})
        # A SavedModel may search further than labels are long.
        ids = ids["ids"][:, :length], ids["ids"][:, length:]
        is_right = (ids[0] == y).all(1) & ~ids[1].any(1)
        metrics["exact_match"].update_state(is_right)
        if is_ours:
            logits = model.predict_on_batch(x)
            for name in ("accuracy", "nll"):
                metrics[name].update_state(y, logits, sample_weight=y != 0)
        count += len(y)
    if not count:
        raise ValueError(f"`split` must have examples. Received: split={split!r}")
    figures = {name: float(metric.result()) for name, metric in metrics.items()}
    if is_ours:
        figures["parameters"] = model.count_params()
    return {**figures, "examples": count}


def answers(model, dataset, split, samples, batch_size, data_dir):
    """Yields the labels of a data set's batches, and what a model says of them.

    Args:
        model: As `evaluate` takes it, and so are the others.
        dataset: Name of a data set.
        split: Which examples.
        samples: None or K.
        batch_size: Number of examples that are predicted at a time.
        data_dir: Folder of the data sets.

    Raises:
        ValueError: As `evaluate`.
    """
    batch_size = integer("batch_size", batch_size)
    predict, outputs = _predict(model, samples), None
    examples, data = load(dataset, split, data_dir=data_dir)
    for x, y in examples.batch(batch_size).as_numpy_iterator():
        is_first = outputs is None
        outputs = predict(x)
        if is_first:
            _check_outputs(outputs, data)
            _check_logits(model, x[:8])
        yield y, outputs
    if outputs is None:
        raise ValueError(f"`split` must have examples. Received: split={split!r}")


def _predict(model, samples):
    """Returns a function from a batch of inputs to a dict of predictions."""
    if isinstance(model, keras.Model):
        refuse_language_model(model)
        return Predictions(model, samples).predict_on_batch
    from ..serving.servable import Servable

    if not isinstance(model, Servable):
        raise ValueError(
            f"`model` must be a keras.Model or a loaded SavedModel. Received: {model!r}"
        )
    [(name, tensor)] = model.signature().inputs.items()
    dtype = tf.dtypes.as_dtype(tensor.dtype).as_numpy_dtype
    if samples is None:
        return lambda x: model.predict({name: x.astype(dtype)})
    drawn = {"samples": np.int32(samples), "seed": np.int32(0)}
    return lambda x: model.predict({name: x.astype(dtype), **drawn}, "sampling")


def _check_outputs(outputs, data):
    """Raises ValueError unless there are probabilities of the data set's classes."""
    if missing := [name for name in OUTPUTS if name not in outputs]:
        raise ValueError(
            f"The SavedModel must have the outputs {', '.join(OUTPUTS)}. "
            f"Received: {sorted(outputs)}, without {missing[0]}"
        )
    labels = data.features[data.supervised_keys[1]]
    classes = getattr(labels, "num_classes", None)
    for name in OUTPUTS:
        probs = outputs[name]
        if classes and probs.shape[-1] != classes:
            raise ValueError(
                f"The model must have as many classes as {data.full_name}, {classes}. "
                f"Received: {name} with shape {tuple(probs.shape)}"
            )
        if _distance_from_probabilities(probs) > TOLERANCE:
            raise ValueError(
                f"The model's {name} must be at least 0 and sum to 1. Received: "
                f"rows with sums from {probs.sum(-1).min():.4g} to "
                f"{probs.sum(-1).max():.4g}, and the least value {probs.min():.4g}"
            )


def _check_logits(model, x):
    """Raises ValueError if a Keras model gives probabilities for some inputs."""
    if isinstance(model, keras.Model):
        output = keras.ops.convert_to_numpy(model(x, training=False))
        if _distance_from_probabilities(output) <= TOLERANCE:
            raise ValueError(
                "The model must end in logits, not in probabilities. Received: model "
                f"{model.name!r}, whose outputs are at least 0 and sum to 1"
            )


def _distance_from_probabilities(rows):
    """Returns how far a row is below 0 or its sum from 1; NaN if there is a NaN."""
    return np.maximum(np.max(-rows), np.max(np.abs(np.sum(rows, axis=-1) - 1)))
