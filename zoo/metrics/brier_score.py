"""Brier score: squared distance between predicted probabilities and the label."""

import keras
from keras import ops

from .inputs import label_probabilities, member_probabilities
from .mean_over_examples import MeanOverExamples


@keras.saving.register_keras_serializable(package="kzoo")
class BrierScore(MeanOverExamples):
    """Mean squared distance between predicted probabilities and one-hot labels.

    With p_n the probabilities of example n (of members: their mean) and y_n its
    one-hot label,

        BS = (1/N) sum_n sum_c (p_n(c) - y_n(c))^2,

    which is 0 for certain and right predictions and 2 for certain and wrong ones.
    It is a proper score. (Some write half of this for two classes.)

    Reference: Brier, "Verification of forecasts expressed in terms of probability",
    Monthly Weather Review 78, 1950.

    Args:
        from_logits: Whether predictions are logits. Defaults to False.
        name: Name of the metric. Defaults to `"brier_score"`.
        dtype: Dtype of the metric's state. Defaults to float32.

    Call arguments:
        y_true: Class indices `[B]` or `[B, 1]`, or one-hot labels `[B, C]`. A NaN,
            or an index that is none of 0 ... C - 1, makes the result NaN.
        y_pred: Probabilities or logits, `[B, C]` or, of M members, `[B, M, C]`.
        sample_weight: None, or weights `[B]` or `[B, 1]`. An example of weight 0
            is absent, whatever it holds; a weight below 0 makes the result NaN.

    Raises:
        ValueError: If labels or predictions have another shape.

    Example:

    >>> from kzoo.zoo.metrics import BrierScore
    >>> brier = BrierScore()
    >>> brier.update_state([0, 1], [[1.0, 0.0], [0.5, 0.5]])
    >>> float(brier.result())
    0.25
    """

    def __init__(self, from_logits=False, name="brier_score", dtype=None):
        super().__init__(from_logits, name, dtype)

    def values(self, y_true, y_pred):
        """Returns sum_c (p(c) - y(c))^2 of every example."""
        probs = ops.mean(member_probabilities(y_pred, self.from_logits), axis=-2)
        labels = ops.cast(label_probabilities(y_true, probs), probs.dtype)
        return ops.sum(ops.square(probs - labels), axis=-1)
