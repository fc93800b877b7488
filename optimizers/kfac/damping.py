"""Damped inverses of Kronecker factors."""

import keras
from keras import ops

_EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52}


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
    may fail (measured to n = 2048: from 2 ε tr at n = 256 to 4 ε tr).

    Args:
        matrix: `[..., n, n]`.
        damping: d, `[...]`.

    Returns:
        Tensor of the matrix's shape, not finite if the matrix is not, or fails still.
    """
    n = matrix.shape[-1]
    epsilon = _EPSILON[keras.backend.standardize_dtype(matrix.dtype)]
    least = epsilon * n**1.5 * _mean_diagonal(matrix)
    damping = ops.maximum(damping, least)
    identity = ops.eye(n, dtype=matrix.dtype)
    lower = _cholesky(matrix + damping[..., None, None] * identity)
    return ops.solve_triangular(
        lower, ops.broadcast_to(identity, matrix.shape), lower=True
    )


def _cholesky(matrix):
    """The decomposition, not finite where there is none: `ops.cholesky` raises."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.numpy.linalg.cholesky(matrix)
    import tensorflow as tf

    return tf.linalg.cholesky(matrix)


def _mean_diagonal(matrix):
    return ops.mean(ops.diagonal(matrix, axis1=-2, axis2=-1), axis=-1)
