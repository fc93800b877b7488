"""Negative log-likelihood of an ensemble's mean probability."""

import keras
import numpy as np
from keras import ops

from ...layers.ops.uncertainty import ensemble_log_probs
from .inputs import label_probabilities, member_predictions
from .mean_over_examples import MeanOverExamples


@keras.saving.register_keras_serializable(package="kzoo")
class EnsembleNegativeLogLikelihood(MeanOverExamples):
    """Mean negative log-likelihood of the labels under the members' mean, in nats.

    With p_nm the probabilities that member m gives to example n with label y_n,

        NLL = -(1/N) sum_n log (1/M) sum_m p_nm(y_n),

    which by Jensen's inequality is at most the mean of the members' own NLLs.

    Given logits, the mean is taken in the log domain and no probability underflows.
    Given probabilities, a mean below the smallest normal number of its dtype
    (1.2e-38 in float32) counts as that number, so that one certain and wrong
    prediction costs 87.3 nats and not infinity.

    Reference: Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty
    Estimation using Deep Ensembles", 2017. https://arxiv.org/abs/1612.01474

    Args:
        from_logits: Whether predictions are logits. Defaults to False.
        name: Name of the metric. Defaults to
            `"ensemble_negative_log_likelihood"`.
        dtype: Dtype of the metric's state. Defaults to float32.

    Call arguments:
        y_true: Class indices `[B]` or `[B, 1]`, or one-hot labels `[B, C]`. For
            rows that are distributions the cross-entropy is taken. A NaN, or an
            index that is none of 0 ... C - 1, makes the result NaN.
        y_pred: Probabilities or logits of M members, `[B, M, C]`, or of one model,
            `[B, C]`.
        sample_weight: None, or weights `[B]` or `[B, 1]`. An example of weight 0
            is absent, whatever it holds; a weight below 0 makes the result NaN.

    Raises:
        ValueError: If labels or predictions have another shape.

    Example:

    >>> from kzoo.zoo.metrics import EnsembleNegativeLogLikelihood
    >>> nll = EnsembleNegativeLogLikelihood()
    >>> nll.update_state([0], [[[0.75, 0.25], [0.25, 0.75]]])  # mean: 1/2
    >>> round(float(nll.result()), 4)
    0.6931
    """

    def __init__(
        self, from_logits=False, name="ensemble_negative_log_likelihood", dtype=None
    ):
        super().__init__(from_logits, name, dtype)

    def values(self, y_true, y_pred):
        """Returns -log p(y) of every example."""
        members = member_predictions(y_pred)
        if self.from_logits:
            log_probs = ensemble_log_probs(members)
        else:
            probs = ops.mean(members, axis=-2)
            tiny = np.finfo(keras.backend.standardize_dtype(probs.dtype)).tiny
            log_probs = ops.log(ops.maximum(probs, tiny))
        labels = label_probabilities(y_true, log_probs)
        # Where a label has no mass, a log-probability of -inf must not give NaN.
        return -ops.sum(
            ops.where(
                ops.equal(labels, 0),
                0.0,
                ops.cast(labels, log_probs.dtype) * log_probs,
            ),
            axis=-1,
        )
