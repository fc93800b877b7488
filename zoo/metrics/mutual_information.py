"""Mean mutual information of an ensemble: how much its members disagree."""

import keras

from ...layers.ops.uncertainty import mutual_information
from .inputs import member_probabilities
from .mean_over_examples import MeanOverExamples


@keras.saving.register_keras_serializable(package="kzoo")
class MutualInformation(MeanOverExamples):
    """Mean mutual information between label and member, in nats.

    With p_nm the probabilities of member m for example n, p_n their mean over m and
    H the entropy,

        I = (1/N) sum_n ( H[p_n] - (1/M) sum_m H[p_nm] ),

    the part of the predictive entropy that stems from the members' disagreement: 0
    where they agree, at most min(log M, log C). Labels do not enter.

    Reference: Depeweg et al., "Decomposition of Uncertainty in Bayesian Deep
    Learning for Efficient and Risk-sensitive Learning", 2018.
    https://arxiv.org/abs/1710.07283

    Args:
        from_logits: Whether predictions are logits. Defaults to False.
        name: Name of the metric. Defaults to `"mutual_information"`.
        dtype: Dtype of the metric's state. Defaults to float32.

    Call arguments:
        y_true: Ignored.
        y_pred: Probabilities or logits of M members, `[B, M, C]`, or of one model,
            `[B, C]`, for which the value is 0.
        sample_weight: None, or weights `[B]` or `[B, 1]`. An example of weight 0
            is absent, whatever it holds; a weight below 0 makes the result NaN.

    Raises:
        ValueError: If predictions have another shape.

    Example:

    >>> from kzoo.zoo.metrics import MutualInformation
    >>> information = MutualInformation()
    >>> information.update_state(None, [[[1.0, 0.0], [0.0, 1.0]]])  # log 2
    >>> round(float(information.result()), 4)
    0.6931
    """

    def __init__(self, from_logits=False, name="mutual_information", dtype=None):
        super().__init__(from_logits, name, dtype)

    def values(self, y_true, y_pred):
        """Returns H[p] - (1/M) sum_m H[p_m] of every example."""
        return mutual_information(member_probabilities(y_pred, self.from_logits))
