"""Damped inverses of Kronecker factors."""

from functools import cache

import keras
from keras import ops

from ...layers.ops.loops import compiled_once

_EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52}
# How often d is made ten times as much, at most.
_ESCALATIONS = 8


def factored_damping(a, g, damping):
    """Splits a damping λ between the factors A and G (factored Tikhonov).

    Of A ⊗ G + λ I the part that is not a Kronecker product is shared out so that the
    error is small whatever the scales of A and G:

        A + π √λ I   and   G + √λ / π I,   π² = (tr A / dim A) / (tr G / dim G).

    A factor times any number and the other one divided by it are damped alike. With a
    trace of zero there is no such ratio, and π is 1.

    Args:
        a: A, `[..., n, n]`.
        g: G, `[..., m, m]`.
        damping: λ, a scalar.

    Returns:
        Pair of what is added to the diagonals, of the shapes `[...]`.
    """
    of_a, of_g = _mean_diagonal(a), _mean_diagonal(g)
    known = ops.logical_and(of_a > 0, of_g > 0)
    # Two roots, for the ratio of the largest to the smallest number overflows.
    root = ops.sqrt(ops.where(known, of_a, 1)) / ops.sqrt(ops.where(known, of_g, 1))
    damping = ops.sqrt(ops.cast(damping, a.dtype))
    return root * damping, damping / root


def damped_inverse(matrix, damping):
    """Inverts a symmetric matrix, no eigenvalue of which is below 0, plus d I.

    Args:
        matrix: `[..., n, n]`.
        damping: d, `[...]`; what is less than `damped_root` needs is made that.

    Returns:
        Tensor of the matrix's shape.
    """
    root = damped_root(matrix, damping)
    return ops.matmul(ops.swapaxes(root, -1, -2), root)


def damped_root(matrix, damping):
    """Returns a root R of that inverse: Rᵀ R (M + d I) = I, with R lower triangular.

    If d is less than what rounding may make of the matrix's smallest eigenvalue, about
    ε √n times the trace, that is added in its place: with less Cholesky's decomposition
    may fail (measured to n = 2048: from 2 ε tr at n = 256 to 4 ε tr). Where it fails
    still, since an eigenvalue is further below 0 than that, d is made ten times as much
    until it does not.

    Args:
        matrix: `[..., n, n]`.
        damping: d, `[...]`.

    Returns:
        Tensor of the matrix's shape; not finite where the matrix is not, or 10⁸ d is
        too little.
    """
    n = matrix.shape[-1]
    epsilon = _EPSILON[keras.backend.standardize_dtype(matrix.dtype)]
    least = epsilon * n**1.5 * _mean_diagonal(matrix)
    lower = _decomposition()(matrix, ops.maximum(damping, least))
    one = ops.where(_positive(lower), ops.ones((), matrix.dtype), float("nan"))
    identity = one[..., None, None] * ops.eye(n, dtype=matrix.dtype)
    return ops.solve_triangular(lower, identity, lower=True)


@cache
def _decomposition():
    return compiled_once(_decomposed)


def _decomposed(matrix, damping):
    """Cholesky's decomposition L of M + d I, with more of d where that fails."""
    identity = ops.eye(matrix.shape[-1], dtype=matrix.dtype)

    def fails(damping, lower):
        return ~ops.all(_positive(lower))

    def escalated(damping, lower):
        damping = ops.where(_positive(lower), damping, 10 * damping)
        return damping, _cholesky(matrix + damping[..., None, None] * identity)

    # A loop of no turns costs more than a branch that is not taken.
    lower = _cholesky(matrix + damping[..., None, None] * identity)
    return ops.cond(
        fails(damping, lower),
        lambda: ops.while_loop(
            fails, escalated, (damping, lower), maximum_iterations=_ESCALATIONS
        )[1],
        lambda: lower,
    )


def _positive(lower):
    """Whether a decomposition has not failed, `[...]`.

    From where it fails on, what is on its diagonal is no number.
    """
    diagonal = ops.diagonal(lower, axis1=-2, axis2=-1)
    return ops.all((diagonal > 0) & ops.isfinite(diagonal), axis=-1)


def _cholesky(matrix):
    """The decomposition, not finite where there is none: `ops.cholesky` raises."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.numpy.linalg.cholesky(matrix)
    import tensorflow as tf

    return tf.linalg.cholesky(matrix)


def _mean_diagonal(matrix):
    return ops.mean(ops.diagonal(matrix, axis1=-2, axis2=-1), axis=-1)
