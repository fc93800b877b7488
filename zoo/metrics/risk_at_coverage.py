"""Risk at a coverage: how often is a classifier wrong where it is most certain?"""

import keras
from keras import ops

from ...layers.ops.arguments import share
from .ranking import ROUNDING, SelectiveMetric


@keras.saving.register_keras_serializable(package="kzoo")
class RiskAtCoverage(SelectiveMetric):
    """Share of errors among the part of the examples that is most certain.

    A classifier that answers where its score is at most a threshold τ covers a share of
    the examples, and errs on a share of its answers, the selective risk:

        coverage(τ) = |{n : u_n <= τ}| / N,
        risk(τ) = |{n : u_n <= τ, wrong}| / |{n : u_n <= τ}|.

    The metric is risk(τ) at the least τ with coverage(τ) >= c.

    Thresholds are the ends of 65,536 cells of the score, in which examples are counted:
    as equal if they agree in their first digits, to 0.8 %.

    Reference: Geifman, El-Yaniv, "Selective Classification for Deep Neural Networks",
    2017. https://arxiv.org/abs/1705.08500

    Args:
        coverage: c, above 0 and at most 1. Defaults to 0.8.
        score: u, what certainty is measured by, lowest first: `"max_probability"`, the
            log-odds against the most probable class, the predictive `"entropy"`, or the
            `"mutual_information"` of members. Defaults to `"max_probability"`.
        from_logits: Whether predictions are logits. Defaults to False.
        name: Name of the metric. Defaults to `"risk_at_coverage"`.
        dtype: Dtype of the metric's state. Defaults to float32.

    Call arguments:
        y_true: Class indices `[B]` or `[B, 1]`, or one-hot labels `[B, C]`. A NaN,
            or an index that is none of 0 ... C - 1, makes the result NaN.
        y_pred: Probabilities or logits, `[B, C]` or, of M members, `[B, M, C]`.
        sample_weight: None, or weights `[B]` or `[B, 1]`. An example of weight 0
            is absent, whatever it holds; a weight below 0 makes the result NaN.

    Raises:
        ValueError: If `coverage` or `score` is out of range, or labels or predictions
            have another shape.

    Example:

    >>> from kzoo.zoo.metrics import RiskAtCoverage
    >>> risk = RiskAtCoverage(coverage=0.5)
    >>> risk.update_state([0, 1], [[0.9, 0.1], [0.6, 0.4]])  # the second is wrong
    >>> float(risk.result())
    0.0
    """

    def __init__(
        self,
        coverage=0.8,
        score="max_probability",
        from_logits=False,
        name="risk_at_coverage",
        dtype=None,
    ):
        super().__init__(score, from_logits, name, dtype)
        self.coverage = share("coverage", coverage)

    def result(self):
        """Returns the risk, 0 before any example."""
        errors = ops.cumsum(self.with_event)
        examples = ops.cumsum(self.with_event + self.without)
        total = examples[-1]
        enough = examples >= self.coverage * total * (1 - ROUNDING)
        first = ops.argmax(ops.cast(enough, "int32"))
        risk = ops.divide_no_nan(ops.take(errors, first), ops.take(examples, first))
        # The total is NaN if an example is.
        return risk + 0.0 * total

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "coverage": self.coverage}
