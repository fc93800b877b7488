"""Uncertainty of an ensemble of classifiers, from its members' predictions.

Members lie on the axis before the classes: `[..., M, C]`. All quantities are in
nats. With p_m(c) the probability member m gives to class c and p = (1/M) sum_m p_m,

    H[p] = -sum_c p(c) log p(c)           predictive entropy (total uncertainty)
    (1/M) sum_m H[p_m]                    what the members agree is noise
    I = H[p] - (1/M) sum_m H[p_m]         mutual information: their disagreement

Half precision is raised to float32 before anything is summed or logged.

Reference: Depeweg et al., "Decomposition of Uncertainty in Bayesian Deep Learning
for Efficient and Risk-sensitive Learning", 2018. https://arxiv.org/abs/1710.07283
"""

import keras
import numpy as np
from keras import ops


def entropy(probs):
    """Entropy of distributions over the last axis, in nats.

    Args:
        probs: Probabilities, `[..., C]`. `0 log 0` counts as 0, and the gradient
            stays finite there.

    Returns:
        Tensor `[...]`, at least float32.
    """
    probs = at_least_float32(probs)
    # log of the smallest normal number instead of log 0: the value p log p is 0
    # either way, and the derivative -log p - 1 becomes large instead of infinite.
    tiny = np.finfo(keras.backend.standardize_dtype(probs.dtype)).tiny
    return ops.sum(probs * -ops.log(ops.maximum(probs, tiny)), axis=-1)


def predictive_entropy(member_probs):
    """Entropy of the mean of the members' probabilities, in nats.

    Args:
        member_probs: Members' probabilities, `[..., M, C]`.

    Returns:
        Tensor `[...]`, between 0 and log C.
    """
    return entropy(ops.mean(at_least_float32(member_probs), axis=-2))


def mutual_information(member_probs):
    """Mutual information between the label and the choice of member, in nats.

    Args:
        member_probs: Members' probabilities, `[..., M, C]`.

    Returns:
        Tensor `[...]`, between 0 (the members agree) and min(log M, log C).
    """
    member_probs = at_least_float32(member_probs)
    members_entropy = ops.mean(entropy(member_probs), axis=-1)
    # Entropy is concave, so the difference is never negative but by rounding.
    return ops.maximum(predictive_entropy(member_probs) - members_entropy, 0.0)


def ensemble_log_probs(member_logits):
    """Log of the mean of the members' probabilities.

    log p(c) = logsumexp_m log p_m(c) - log M, so that no probability is formed
    that could underflow.

    Args:
        member_logits: Members' logits, `[..., M, C]` (log probabilities are logits
            of themselves, and may be given too).

    Returns:
        Tensor `[..., C]`, at least float32.
    """
    log_probs = ops.log_softmax(at_least_float32(member_logits), axis=-1)
    return ops.logsumexp(log_probs, axis=-2) - ops.log(
        ops.cast(member_logits.shape[-2], log_probs.dtype)
    )


def at_least_float32(x):
    """Returns x as a float tensor of 32 bits or, if it has them, more."""
    x = ops.convert_to_tensor(x)
    if keras.backend.standardize_dtype(x.dtype) == "float64":
        return x
    return ops.cast(x, "float32")
