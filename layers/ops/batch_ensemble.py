"""BatchEnsemble's maths: one shared linear map, M members' fast weights around it.

Batches are member-major: of M * B rows the first B belong to member 0, the next B
to member 1, and so on (the order `tile` gives).
"""

import math

import keras
from keras import ops


def batch_ensemble(linear, x, alpha, gamma, bias=None, axis=-1):
    """Applies each member's own linear map to its own rows, in one call.

    Member m has the kernel W ∘ (r_m s_mᵀ), r_m scaling the input's channels and s_m
    the output's; with rank K, the sum of K such products. It need not be formed:

        y = sum_k ((x ∘ r_k) W) ∘ s_k + b,

    each row with its own member's r, s and b. So the rows of all members go through
    `linear` together, between two elementwise products.

    Args:
        linear: Function of one tensor, `[rows, ...] -> [rows, ...]`: any map that
            is linear in its input and treats rows alike (dense, convolution, ...).
        x: Member-major tensor `[M * B, ...]`.
        alpha: r, `[M, in]`, or `[K, M, in]` for rank K.
        gamma: s, `[M, out]`, or `[K, M, out]`.
        bias: b, `[M, out]`, or None.
        axis: Axis of the channels, in x and in the linear map's output.

    Returns:
        Member-major tensor, shaped as `linear(x)`.

    Raises:
        ValueError: If M does not divide the number of rows (see `split_members`).
    """
    *rank, members, _ = alpha.shape
    axis = axis % len(x.shape) - len(x.shape)  # From the end: axes may come before.
    x = _check_members(x, members)
    rows, *inner = ops.shape(x)
    flat = _flatten(x, [], axis)
    # With rank K, K scaled copies of the batch lie one behind the other: [K * M * B].
    scaled = flat * _repeat(alpha, flat, axis)
    y = linear(ops.reshape(scaled, (math.prod(rank) * rows, *inner)))
    flat = _flatten(y, rank, axis)
    out = flat * _repeat(gamma, flat, axis)
    if rank:
        out = ops.sum(out, axis=0)
    if bias is not None:
        out = out + _repeat(bias, out, axis)
    return ops.reshape(out, (rows, *ops.shape(y)[1:]))


def split_members(x, ensemble_size):
    """Gives a member-major batch its member axis: `[M * B, ...] -> [M, B, ...]`.

    Args:
        x: Tensor `[M * B, ...]`.
        ensemble_size: M.

    Returns:
        Tensor `[M, B, ...]`.

    Raises:
        ValueError: If the number of rows is known and M does not divide it. If it
            is known only at run time, TensorFlow raises InvalidArgumentError then.
    """
    x = _check_members(x, ensemble_size)
    return ops.reshape(x, (ensemble_size, -1, *ops.shape(x)[1:]))


def merge_members(x):
    """Undoes `split_members`: `[M, B, ...] -> [M * B, ...]`."""
    return ops.reshape(x, (-1, *ops.shape(x)[2:]))


def check_rows(rows, ensemble_size):
    """Raises ValueError if a known number of rows does not split into members."""
    if isinstance(rows, int) and rows % ensemble_size:
        raise ValueError(f"{_explain(ensemble_size)} Received: a batch of {rows} rows")


def _explain(ensemble_size):
    return (
        "A member-major batch has the same number of rows for each member, so its "
        f"rows must be divisible by ensemble_size={ensemble_size}."
    )


def _check_members(x, ensemble_size):
    """Returns x, once it is sure that its rows split into members."""
    rows, *rest = ops.shape(x)
    check_rows(rows, ensemble_size)
    if isinstance(rows, int):
        return x
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        assertion = tf.debugging.assert_equal(
            rows % ensemble_size, 0, message=_explain(ensemble_size)
        )
        with tf.control_dependencies([assertion]):
            x = tf.identity(x)
    # XLA drops assertions, but cannot compile this if the rows do not split.
    return ops.reshape(ops.reshape(x, (ensemble_size, -1, *rest)), (rows, *rest))


# The products run over [..., M * positions, channels, ...], with each member's weights
# repeated for its positions: XLA's CPU sums the gradients of r, s and b, which are sums
# over positions, far faster than those of a product that broadcasts over an axis.


def _flatten(x, lead, axis):
    return ops.reshape(x, (*lead, -1, *ops.shape(x)[axis:]))


def _repeat(weights, like, axis):
    positions = ops.shape(like)[axis - 1] // weights.shape[-2]
    weights = ops.repeat(weights, positions, axis=-2)
    return ops.reshape(weights, (*ops.shape(weights), *[1] * (-axis - 1)))
