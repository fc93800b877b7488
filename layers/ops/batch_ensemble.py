"""BatchEnsemble's maths: one shared linear map, M members' fast weights around it.

Batches are member-major: of M * B rows the first B belong to member 0, the next B
to member 1, and so on (the order `tile` gives).
"""

import math
import operator

import keras
from keras import ops


def batch_ensemble(
    linear, x, alpha, gamma, bias=None, axis=-1, out_axis=None, bias_axis=None
):
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
        alpha: r, `[M, in]`, or `[K, M, in]` for rank K. It may have a row for each
            row of x, as if each were a member.
        gamma: s, `[M, out]`, or `[K, M, out]`, likewise.
        bias: b, `[M, out]`, or None.
        axis: Axis of x that r scales, not the first; or a tuple of axes, in rising
            order: r is then `[M, *sizes]`, each size the axis's or 1.
        out_axis: Likewise of the linear map's output, for s. Defaults to `axis`.
        bias_axis: Likewise for b. Defaults to `out_axis`.

    Returns:
        Member-major tensor, shaped as `linear(x)`.

    Raises:
        ValueError: If M does not divide the number of rows (see `split_members`).
    """
    out_axis = axis if out_axis is None else out_axis
    bias_axis = out_axis if bias_axis is None else bias_axis
    *rank, members = _lead(alpha, axis)
    x, rows = _check_members(x, members)
    # With rank K, K scaled copies of the batch lie one behind the other: [K * M * B].
    scaled = _combine(operator.mul, x, (alpha,), axis, rows)
    inner = ops.shape(x)[1:]
    y = linear(ops.reshape(scaled, (math.prod(rank) * rows, *inner)))
    y = ops.reshape(y, (*rank, rows, *ops.shape(y)[1:]))
    out = _combine(operator.mul, y, (gamma,), out_axis, rows, lead=len(rank))
    if rank:
        out = ops.sum(out, axis=0)
    if bias is not None:
        out = _combine(operator.add, out, (bias,), bias_axis, rows)
    return out


def per_member(function, x, *weights, axis=-1):
    """Applies an elementwise function, each row with its own member's weights.

    Args:
        function: Elementwise function of a tensor and of the weights.
        x: Member-major tensor `[M * B, ...]`.
        *weights: Tensors `[M, size]`, or None in the place of one.
        axis: Axis of x that the weights have, not the first; or a tuple of axes, in
            rising order: the weights are then `[M, *sizes]`, each size the axis's or 1.

    Returns:
        Member-major tensor, shaped as x.

    Raises:
        ValueError: If M does not divide the number of rows (see `split_members`).
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return function(x, *weights)
    x, rows = _check_members(x, *_lead(given[0], axis))
    return _combine(function, x, weights, axis, rows)


def batch_ensemble_step(kernel, x, r, s, bias=None):
    """As `batch_ensemble` of a matrix, with a row of fast weights for each row of x.

    For the steps of a loop, out of which `repeat_members` is taken: there is nothing
    here that XLA could not differentiate in one whose number of rows TensorFlow learns
    late.

    Args:
        kernel: W, `[in, out]`.
        x: Tensor `[rows, in]`.
        r: `[rows, in]`, or `[K, rows, in]` for rank K.
        s: `[rows, out]`, or `[K, rows, out]`.
        bias: b, `[rows, out]`, or None.

    Returns:
        sum_k ((x ∘ r_k) W) ∘ s_k + b, `[rows, out]`.
    """
    *rank, _, outputs = s.shape
    y = ops.matmul(ops.reshape(x * r, (-1, x.shape[-1])), kernel)
    y = ops.reshape(y, (*rank, -1, outputs)) * s
    if rank:
        y = ops.sum(y, axis=0)
    return y if bias is None else y + bias


def repeat_members(weights, rows):
    """Gives each row of a member-major batch its member's weights.

    Args:
        weights: Tensor `[..., M, n]`.
        rows: M * B, an integer or, on TensorFlow, a scalar tensor.

    Returns:
        Tensor `[..., M * B, n]`.

    Raises:
        ValueError: If M does not divide the number of rows, as `split_members`.
    """
    *lead, members, size = weights.shape
    rows = _check_split(rows, members)
    repeated = ops.repeat(weights, rows // members, axis=-2)
    # XLA drops assertions, but cannot compile this if the rows do not split.
    return ops.reshape(repeated, (*lead, rows, size))


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
    rows, *rest = ops.shape(x)
    rows = _check_split(rows, ensemble_size)
    return ops.reshape(x, (ensemble_size, rows // ensemble_size, *rest))


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
    """Returns x and the number of its rows, once it is sure that they split."""
    rows, *rest = ops.shape(x)
    rows = _check_split(rows, ensemble_size)
    if isinstance(rows, int):
        return x, rows
    # XLA drops assertions, but cannot compile this if the rows do not split.
    return ops.reshape(split_members(x, ensemble_size), (rows, *rest)), rows


def _check_split(rows, ensemble_size):
    """Returns the number of rows, once it is sure that they split.

    In a TensorFlow graph what computes with the number that is returned waits for the
    assertion, so that no other operation fails first, with a message of its own.
    """
    check_rows(rows, ensemble_size)
    if isinstance(rows, int) or keras.backend.backend() != "tensorflow":
        return rows
    import tensorflow as tf

    assertion = tf.debugging.assert_equal(
        rows % ensemble_size, 0, message=_explain(ensemble_size)
    )
    with tf.control_dependencies([assertion]):
        return tf.identity(rows)


def _lead(weights, axis):
    """The first sizes of weights, before those of the axes: M, or K and M."""
    axes = 1 if isinstance(axis, int) else len(axis)
    return ops.shape(weights)[: len(weights.shape) - axes]


# What is elementwise runs over [..., M * positions, channels, ...], with each member's
# weights repeated for its positions: XLA's CPU sums the gradients of r, s and b, which
# are sums over positions, far faster than those of a product that broadcasts over an
# axis.


def _combine(function, x, weights, axis, rows, lead=0):
    """function(x, *weights) for x `[..., M * B, ...]` with `lead` axes before the rows.

    The weights are `[..., M, *sizes]`; what stands before M comes first in the result.
    """
    ndim = len(x.shape) - lead
    axes = (axis,) if isinstance(axis, int) else axis
    axes = [i % ndim - ndim for i in axes]  # From the end: axes may come before.
    first = min(axes, default=0)
    before, rest = ops.shape(x)[:lead], ops.shape(x)[lead:]
    inner = rest[ndim + first :]
    positions = math.prod([rows, *rest[1 : ndim + first]])
    flat = ops.reshape(x, (*before, -1, *inner))

    def at_positions(weight):
        if weight is None:
            return None
        *before, members = _lead(weight, axis)
        sizes = dict(zip(axes, ops.shape(weight)[len(before) + 1 :], strict=True))
        repeated = ops.repeat(weight, positions // members, axis=len(before))
        broadcast = [sizes.get(i, 1) for i in range(first, 0)]
        return ops.reshape(repeated, (*before, positions, *broadcast))

    out = function(flat, *map(at_positions, weights))
    after = len(out.shape) - 1 - len(inner)
    return ops.reshape(out, (*ops.shape(out)[:after], *rest))
