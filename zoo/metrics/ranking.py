"""The shared half of the metrics that ask in which order a score puts examples."""

import keras
import numpy as np
from keras import ops

from ...layers.ops.uncertainty import (
    ensemble_log_probs,
    mutual_information,
    predictive_entropy,
)
from .inputs import (
    cell_sums,
    example_weights,
    label_probabilities,
    member_predictions,
    member_probabilities,
)

SCORES = ("max_probability", "entropy", "mutual_information")
# The leading bits of a float32: the sign, the exponent and 7 bits of the fraction.
BITS = 16
# How far a float32 sum may fall short of a share of the whole that it does reach.
ROUNDING = 1e-6


class RankingMetric(keras.metrics.Metric):
    """A function of the examples' order by a score, and of which have an event.

    So that the metric streams in constant memory, examples are counted in 65,536 cells
    of the score: those share a cell, and count as equal, whose scores agree as float32
    numbers in sign, exponent and the first 7 bits of the fraction, that is to 0.8 %.

    A subclass says what the event is (`events`) and what is made of the counts
    (`result`).

    Args:
        score: One of `scores`.
        from_logits: Whether predictions are logits.
        name: Name of the metric.
        dtype: Dtype of the metric's state.
    """

    scores = SCORES

    def __init__(self, score, from_logits, name, dtype):
        super().__init__(name=name, dtype=dtype)
        if score not in self.scores:
            raise ValueError(
                f"expected `score` to be one of {list(self.scores)}. "
                f"Received: score={score!r}"
            )
        self.score = score
        self.from_logits = from_logits
        # The weights in each cell, the lowest score first.
        self.with_event = self._counts("with_event")
        self.without = self._counts("without")

    def _counts(self, name):
        return self.add_weight(shape=(1 << BITS,), initializer="zeros", name=name)

    def events(self, y_true, y_pred):
        """Returns 1 where an example has the event, 0 where not, a tensor `[B]`."""
        raise NotImplementedError

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds a batch, whose examples weigh `sample_weight` or else 1."""
        y_pred = ops.convert_to_tensor(y_pred)
        score = uncertainty(y_pred, self.score, self.from_logits)
        event = ops.cast(self.events(y_true, y_pred), score.dtype)
        event = ops.where(ops.isnan(score), float("nan"), event)
        weight = example_weights(sample_weight, score)
        cell = cells(score)
        for variable, part in ((self.with_event, event), (self.without, 1.0 - event)):
            # With weight 0 an example is absent, also one that is NaN.
            values = ops.where(ops.equal(weight, 0), 0.0, weight * part)
            variable.assign_add(cell_sums(values, cell, variable))

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "score": self.score,
            "from_logits": self.from_logits,
        }


class SelectiveMetric(RankingMetric):
    """Of predictions from certain to uncertain: which are wrong."""

    def events(self, y_true, y_pred):
        """Returns 1 where the most probable class is not the label."""
        probs = ops.mean(member_probabilities(y_pred, self.from_logits), axis=-2)
        labels = label_probabilities(y_true, probs)
        wrong = ops.not_equal(ops.argmax(probs, axis=-1), ops.argmax(labels, axis=-1))
        # A label that is no class is NaN.
        return ops.cast(wrong, labels.dtype) + ops.sum(0.0 * labels, axis=-1)


class OutOfDistributionMetric(RankingMetric):
    """Of examples from certain to uncertain: which are out of distribution."""

    scores = (*SCORES, "raw")

    def events(self, y_true, y_pred):
        """Returns the labels, which are 1 out of distribution and 0 in it."""
        y_true = ops.convert_to_tensor(y_true)
        shape, rows = tuple(y_true.shape), tuple(y_pred.shape)[0]
        if len(shape) == 2 and shape[1] == 1:
            y_true = ops.squeeze(y_true, 1)
        if len(y_true.shape) != 1 or None not in (rows, shape[0]) and rows != shape[0]:
            raise ValueError(
                "`y_true` must hold one label an example, [B] or [B, 1]. Received: "
                f"y_true with shape {shape} and y_pred with {rows} rows"
            )
        label = ops.cast(y_true, "float32")
        is_label = ops.logical_or(ops.equal(label, 0), ops.equal(label, 1))
        # A compiled program cannot raise, and no number would be right.
        return ops.where(is_label, label, float("nan"))

    def if_both(self, value):
        """Returns a value; NaN if one kind alone was seen, 0 before any example."""
        out, inside = ops.sum(self.with_event), ops.sum(self.without)
        value = ops.where(ops.logical_and(out > 0, inside > 0), value, float("nan"))
        return ops.where(ops.equal(out + inside, 0), 0.0, value)


def uncertainty(y_pred, score, from_logits):
    """Returns one number an example, the larger the less a prediction is certain.

    Args:
        y_pred: Predictions `[B, C]` or, of M members, `[B, M, C]`; for `"raw"` the
            scores themselves, `[B]` or `[B, 1]`.
        score: `"max_probability"`: the log-odds against the most probable class,
            log (1 - max_c p(c)) - log max_c p(c), which tell confidences close to 1
            apart; `"entropy"`: of the members' mean; `"mutual_information"`; or
            `"raw"`.
        from_logits: Whether predictions are logits.

    Returns:
        Tensor `[B]`, at least float32.

    Raises:
        ValueError: If predictions have another shape.
    """
    if score == "raw":
        if len(y_pred.shape) == 2 and y_pred.shape[1] == 1:
            y_pred = ops.squeeze(y_pred, 1)
        if len(y_pred.shape) != 1:
            raise ValueError(
                "`y_pred` must hold one score an example, [B] or [B, 1]. "
                f"Received: y_pred with shape {tuple(y_pred.shape)}"
            )
        return ops.cast(y_pred, "float32")
    if score == "entropy":
        return predictive_entropy(member_probabilities(y_pred, from_logits))
    if score == "mutual_information":
        return mutual_information(member_probabilities(y_pred, from_logits))
    members = member_predictions(y_pred)
    if from_logits:
        log_probs = ensemble_log_probs(members)
    else:
        probs = ops.mean(members, axis=-2)
        tiny = np.finfo(keras.backend.standardize_dtype(probs.dtype)).tiny
        log_probs = ops.log(ops.maximum(probs, tiny))
    classes = log_probs.shape[-1]
    is_top = ops.one_hot(ops.argmax(log_probs, axis=-1), classes, dtype="bool")
    top = ops.max(log_probs, axis=-1, initial=-float("inf"))
    others = ops.where(is_top, -float("inf"), log_probs)
    return ops.logsumexp(others, axis=-1) - top


def cells(score):
    """Returns the cell of each score: an integer that grows with it."""
    score = ops.cast(score, "float32")
    score = ops.where(ops.equal(score, 0), 0.0, score)  # There is a -0.
    bits = _as_integers(score)
    # As integers, floats above 0 are in order; those below are in the opposite one.
    bits = ops.where(bits < 0, ops.bitwise_xor(bits, 0x7FFFFFFF), bits)
    return ops.right_shift(bits, 32 - BITS) + (1 << (BITS - 1))


def _as_integers(x):
    """Returns the bits of float32 numbers."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.bitcast(x, "int32")  # `ops.view` must know how many there are.
    return ops.view(x, "int32")


def before(counts):
    """Returns, for every cell, the weight in the cells below it."""
    return ops.cumsum(counts) - counts
