"""Area under the risk-coverage curve: does confidence tell right from wrong?"""

import keras
from keras import ops

from .ranking import SelectiveMetric, before


@keras.saving.register_keras_serializable(package="kzoo")
class AreaUnderRiskCoverage(SelectiveMetric):
    """Area under the risk-coverage curve (AURC), or the generalized one (AUGRC).

    A classifier that answers only the share c of the N examples that it is most certain
    of, its coverage, errs on the share

        R(c) = E(c) / c

    of its answers, the selective risk, with N E(c) the number of errors among those N
    c. The area

        AURC = ∫_0^1 R(c) dc

    is the mean risk over all coverages, and 0 if nothing is wrong. In the generalized
    area errors count the same at any coverage,

        AUGRC = ∫_0^1 E(c) dc,

    which is the mean share of errors that are answered: at most 1/2 if all is wrong.

    Between two examples, and among those that a cell of the score holds (see below), E
    is linear, as the mean over the orders of equal scores is. The mean of the R(i/N),
    which others take for the AURC, differs by at most (1 + log N) / N.

    So that the metric streams in constant memory, examples are counted in 65,536 cells
    of the score, as equal if they agree in their first digits, to 0.8 %. Of w examples
    in a cell let e be wrong, and n those of lower score. Against a sort of all examples
    AUGRC is off by at most the sum over the cells of e (w - e) / (2 N²), and AURC by
    that of e (w - e) / (2 N n), or w / N where n is 0.

    References: Geifman, El-Yaniv, "Selective Classification for Deep Neural Networks",
    2017, https://arxiv.org/abs/1705.08500; AUGRC: Traub et al., "Overcoming Common
    Flaws in the Evaluation of Selective Classification Systems", 2024,
    https://arxiv.org/abs/2407.01032.

    Args:
        generalized: Whether to take AUGRC. Defaults to False.
        score: What certainty is measured by, lowest first: `"max_probability"`, the
            log-odds against the most probable class, the predictive `"entropy"`, or the
            `"mutual_information"` of members. Defaults to `"max_probability"`.
        from_logits: Whether predictions are logits. Defaults to False.
        name: Name of the metric. Defaults to `"area_under_risk_coverage"`.
        dtype: Dtype of the metric's state. Defaults to float32.

    Call arguments:
        y_true: Class indices `[B]` or `[B, 1]`, or one-hot labels `[B, C]`. A NaN,
            or an index that is none of 0 ... C - 1, makes the result NaN.
        y_pred: Probabilities or logits, `[B, C]` or, of M members, `[B, M, C]`.
        sample_weight: None, or weights `[B]` or `[B, 1]`. An example of weight 0
            is absent, whatever it holds; a weight below 0 makes the result NaN.

    Raises:
        ValueError: If `score` is none of these, or labels or predictions have another
            shape.

    Example:

    >>> from kzoo.zoo.metrics import AreaUnderRiskCoverage
    >>> area = AreaUnderRiskCoverage(generalized=True)
    >>> area.update_state([0, 1], [[0.9, 0.1], [0.6, 0.4]])  # only the second is wrong
    >>> float(area.result())
    0.125
    """

    def __init__(
        self,
        generalized=False,
        score="max_probability",
        from_logits=False,
        name="area_under_risk_coverage",
        dtype=None,
    ):
        super().__init__(score, from_logits, name, dtype)
        self.generalized = bool(generalized)

    def result(self):
        """Returns the area, 0 before any example."""
        wrong, weight = self.with_event, self.with_event + self.without
        errors, examples = before(wrong), before(weight)
        total = ops.sum(weight)
        if self.generalized:
            covered = ops.divide_no_nan(weight, total)
            areas = covered * (errors + wrong / 2)
        else:
            # ∫ (E + s (c - n)) / c dc over c = n ... n + w, with s = e / w.
            slope = ops.divide_no_nan(wrong, weight)
            growth = ops.log1p(ops.divide_no_nan(weight, examples))
            areas = wrong + (errors - slope * examples) * growth
        return ops.divide_no_nan(ops.sum(areas), total)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "generalized": self.generalized}
