"""AUROC of the detection of examples that are out of distribution."""

import keras
from keras import ops

from .ranking import OutOfDistributionMetric, before


@keras.saving.register_keras_serializable(package="kzoo")
class OutOfDistributionAUROC(OutOfDistributionMetric):
    """Area under the ROC curve of telling examples that are out of distribution.

    With u the score of an example that is in distribution and v of one that is not,
    both drawn from those seen, it is the probability that they are in the right order,

        AUROC = P(v > u) + P(v = u) / 2:

    1 if a threshold separates the two kinds, 1/2 if the score knows nothing. Of one
    kind alone it is NaN, as scikit-learn has it (torchmetrics' is 0, with a warning).

    So that the metric streams in constant memory, examples are counted in 65,536 cells
    of the score, as equal if they agree in their first digits, to 0.8 %. Of cells with
    a examples in distribution and b out of it, of A and B in all, the sum of a b / (2 A
    B) is the most by which the value can differ from the exact one. (Raw scores with an
    offset that is large beside their differences lose these: subtract it.)

    Reference: Hendrycks, Gimpel, "A Baseline for Detecting Misclassified and
    Out-of-Distribution Examples in Neural Networks", 2017.
    https://arxiv.org/abs/1610.02136

    Args:
        score: What should be larger out of distribution: the predictive `"entropy"`,
            `"max_probability"`, the log-odds against the most probable class, the
            `"mutual_information"` of members, or `"raw"`, the predictions themselves.
            Defaults to `"entropy"`.
        from_logits: Whether predictions are logits. Defaults to False.
        name: Name of the metric. Defaults to `"out_of_distribution_auroc"`.
        dtype: Dtype of the metric's state. Defaults to float32.

    Call arguments:
        y_true: 1 or True for an example that is out of distribution, else 0; `[B]` or
            `[B, 1]`. Anything else makes the result NaN.
        y_pred: Probabilities or logits, `[B, C]` or, of M members, `[B, M, C]`; raw
            scores `[B]` or `[B, 1]`.
        sample_weight: None, or weights `[B]` or `[B, 1]`. An example of weight 0
            is absent, whatever it holds; a weight below 0 makes the result NaN.

    Raises:
        ValueError: If `score` is none of these, or labels or predictions have another
            shape.

    Example:

    >>> from kzoo.zoo.metrics import OutOfDistributionAUROC
    >>> auroc = OutOfDistributionAUROC()
    >>> auroc.update_state([0, 0, 1], [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    >>> float(auroc.result())
    0.5
    """

    def __init__(
        self,
        score="entropy",
        from_logits=False,
        name="out_of_distribution_auroc",
        dtype=None,
    ):
        super().__init__(score, from_logits, name, dtype)

    def result(self):
        """Returns the area: NaN of one kind alone, 0 before any example."""
        out, inside = self.with_event, self.without
        below = ops.divide_no_nan(before(inside) + inside / 2, ops.sum(inside))
        return self.if_both(ops.sum(ops.divide_no_nan(out, ops.sum(out)) * below))
