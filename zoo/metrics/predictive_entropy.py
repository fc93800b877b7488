"""Mean predictive entropy of an ensemble: its total uncertainty."""

import keras

from ...layers.ops.uncertainty import predictive_entropy
from .inputs import member_probabilities
from .mean_over_examples import MeanOverExamples


@keras.saving.register_keras_serializable(package="kzoo")
class PredictiveEntropy(MeanOverExamples):
    """Mean entropy of the members' mean probability, in nats.

    With p_n = (1/M) sum_m p_nm the mean over members for example n,

        H = -(1/N) sum_n sum_c p_n(c) log p_n(c),

    between 0 and log C. Labels do not enter.

    Reference: Depeweg et al., "Decomposition of Uncertainty in Bayesian Deep
    Learning for Efficient and Risk-sensitive Learning", 2018.
    https://arxiv.org/abs/1710.07283

    Args:
        from_logits: Whether predictions are logits. Defaults to False.
        name: Name of the metric. Defaults to `"predictive_entropy"`.
        dtype: Dtype of the metric's state. Defaults to float32.

    Call arguments:
        y_true: Ignored.
        y_pred: Probabilities or logits of M members, `[B, M, C]`, or of one model,
            `[B, C]`.
        sample_weight: None, or weights `[B]` or `[B, 1]`. An example of weight 0
            is absent, whatever it holds; a weight below 0 makes the result NaN.

    Raises:
        ValueError: If predictions have another shape.

    Example:

    >>> from kzoo.zoo.metrics import PredictiveEntropy
    >>> entropy = PredictiveEntropy()
    >>> entropy.update_state(None, [[[1.0, 0.0], [0.0, 1.0]]])  # log 2
    >>> round(float(entropy.result()), 4)
    0.6931
    """

    def __init__(self, from_logits=False, name="predictive_entropy", dtype=None):
        super().__init__(from_logits, name, dtype)

    def values(self, y_true, y_pred):
        """Returns H[p] of every example."""
        return predictive_entropy(member_probabilities(y_pred, self.from_logits))
