"""Coverage at a risk: how much can be answered with so few errors?"""

import keras
from keras import ops

from ...layers.ops.arguments import rate
from .ranking import ROUNDING, SelectiveMetric


@keras.saving.register_keras_serializable(package="kzoo")
class CoverageAtRisk(SelectiveMetric):
    """Largest share of the examples that are answered with at most so many errors.

    A classifier that answers where its score is at most a threshold τ covers a share of
    the examples, and errs on a share of its answers, the selective risk:

        coverage(τ) = |{n : u_n <= τ}| / N,
        risk(τ) = |{n : u_n <= τ, wrong}| / |{n : u_n <= τ}|.

    The metric is the largest coverage(τ) of those with risk(τ) <= r, also if a smaller
    coverage has a higher risk; 0 if there is none.

    Thresholds are the ends of 65,536 cells of the score, in which examples are counted:
    as equal if they agree in their first digits, to 0.8 %.

    Reference: Geifman, El-Yaniv, "Selective Classification for Deep Neural Networks",
    2017. https://arxiv.org/abs/1705.08500

    Args:
        risk: r, from 0 and below 1. Defaults to 0.05.
        score: u, what certainty is measured by, lowest first: `"max_probability"`, the
            log-odds against the most probable class, the predictive `"entropy"`, or the
            `"mutual_information"` of members. Defaults to `"max_probability"`.
        from_logits: Whether predictions are logits. Defaults to False.
        name: Name of the metric. Defaults to `"coverage_at_risk"`.
        dtype: Dtype of the metric's state. Defaults to float32.

    Call arguments:
        y_true: Class indices `[B]` or `[B, 1]`, or one-hot labels `[B, C]`. A NaN,
            or an index that is none of 0 ... C - 1, makes the result NaN.
        y_pred: Probabilities or logits, `[B, C]` or, of M members, `[B, M, C]`.
        sample_weight: None, or weights `[B]` or `[B, 1]`. An example of weight 0
            is absent, whatever it holds; a weight below 0 makes the result NaN.

    Raises:
        ValueError: If `risk` or `score` is out of range, or labels or predictions have
            another shape.

    Example:

    >>> from kzoo.zoo.metrics import CoverageAtRisk
    >>> coverage = CoverageAtRisk(risk=0.05)
    >>> coverage.update_state([0, 1], [[0.9, 0.1], [0.6, 0.4]])  # the second is wrong
    >>> float(coverage.result())
    0.5
    """

    def __init__(
        self,
        risk=0.05,
        score="max_probability",
        from_logits=False,
        name="coverage_at_risk",
        dtype=None,
    ):
        super().__init__(score, from_logits, name, dtype)
        self.risk = rate("risk", risk)

    def result(self):
        """Returns the coverage, 0 before any example."""
        errors = ops.cumsum(self.with_event)
        examples = ops.cumsum(self.with_event + self.without)
        total = examples[-1]
        allowed = errors <= self.risk * examples * (1 + ROUNDING)
        covered = ops.max(ops.where(allowed, examples, 0.0))
        # The total is NaN if an example is.
        return ops.divide_no_nan(covered, total) + 0.0 * total

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "risk": self.risk}
