"""False positives where most examples out of distribution are found: FPR95."""

import keras
from keras import ops

from ...layers.ops.arguments import share
from .ranking import ROUNDING, OutOfDistributionMetric, before


@keras.saving.register_keras_serializable(package="kzoo")
class OutOfDistributionFPR(OutOfDistributionMetric):
    """False positive rate where a share of what is out of distribution is found.

    An example counts as out of distribution if its score is at least a threshold τ.
    With u the scores in distribution and v those out of it,

        FPR = P(u >= τ) at the largest τ with P(v >= τ) >= r:

    with the recall r = 0.95 what is known as FPR95, 0 at best. If all examples are of
    one kind it is NaN.

    Thresholds are the ends of 65,536 cells of the score, in which examples are counted:
    as equal if they agree in their first digits, to 0.8 %. The value is thus at most
    the weight too high of the examples in distribution in one cell.

    Reference: Liang, Li, Srikant, "Enhancing The Reliability of Out-of-distribution
    Image Detection in Neural Networks", 2018. https://arxiv.org/abs/1706.02690

    Args:
        recall: r, above 0 and at most 1. Defaults to 0.95.
        score: What should be larger out of distribution: the predictive `"entropy"`,
            `"max_probability"`, the log-odds against the most probable class, the
            `"mutual_information"` of members, or `"raw"`, the predictions themselves.
            Defaults to `"entropy"`.
        from_logits: Whether predictions are logits. Defaults to False.
        name: Name of the metric. Defaults to `"out_of_distribution_fpr"`.
        dtype: Dtype of the metric's state. Defaults to float32.

    Call arguments:
        y_true: 1 or True for an example that is out of distribution, else 0; `[B]` or
            `[B, 1]`. Anything else makes the result NaN.
        y_pred: Probabilities or logits, `[B, C]` or, of M members, `[B, M, C]`; raw
            scores `[B]` or `[B, 1]`.
        sample_weight: None, or weights `[B]` or `[B, 1]`. An example of weight 0
            is absent, whatever it holds; a weight below 0 makes the result NaN.

    Raises:
        ValueError: If `recall` or `score` is out of range, or labels or predictions
            have another shape.

    Example:

    >>> from kzoo.zoo.metrics import OutOfDistributionFPR
    >>> fpr = OutOfDistributionFPR()
    >>> fpr.update_state([0, 0, 1], [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    >>> float(fpr.result())
    0.5
    """

    def __init__(
        self,
        recall=0.95,
        score="entropy",
        from_logits=False,
        name="out_of_distribution_fpr",
        dtype=None,
    ):
        super().__init__(score, from_logits, name, dtype)
        self.recall = share("recall", recall)

    def result(self):
        """Returns the rate: NaN of one kind alone, 0 before any example."""
        all_out, all_inside = ops.sum(self.with_event), ops.sum(self.without)
        found = all_out - before(self.with_event)
        enough = found >= self.recall * all_out * (1 - ROUNDING)
        # `found` falls from cell to cell.
        last = ops.sum(ops.cast(enough, "int32")) - 1
        false = all_inside - ops.take(before(self.without), last)
        return self.if_both(ops.divide_no_nan(false, all_inside))

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "recall": self.recall}
