"""The curvature of a weight matrix as a Kronecker product."""

from keras import ops

from ..damping import damped_inverse, factored_damping


class Kronecker:
    """F ≈ A ⊗ G, the second moments of what goes in and of the loss's derivatives.

    Of a matrix W that multiplies rows a, s = a W, with g the derivative by s,

        A = E[aᵀ a],   G = E[gᵀ g],   U = (A + d_A I)⁻¹ ∇W (G + d_G I)⁻¹

    with the damping of `factored_damping`.

    Args:
        shape: `(*lead, n, m)`, the shape of the matrix W; of many, with leading axes.
        sharing: What to make of a matrix that is applied at R positions of an example:
            with `"expand"` each position is an example of its own, with `"reduce"` an
            example has the mean of its a and the sum of its g.
    """

    def __init__(self, shape, sharing):
        *lead, n, m = shape
        self.reduces = sharing == "reduce"
        # What is collected from a batch; then what averages of it are kept.
        self.statistics = {"A": (*lead, n, n), "G": (*lead, m, m), "positions": ()}
        self.factors = {"A": (*lead, n, n), "G": (*lead, m, m)}
        self.caches = {"A_inverse": (*lead, n, n), "G_inverse": (*lead, m, m)}

    def measure(self, a, g, weights):
        """Returns what one application of the layer adds to the statistics.

        Args:
            a: What is multiplied by the matrix, `[*lead, N, R, n]`.
            g: The derivatives by what comes of it, `[*lead, N, R, m]`.
            weights: 1 for positions that count and 0 for others, `[N, R]`.
        """
        if self.reduces:
            count = ops.maximum(ops.sum(weights, axis=1, keepdims=True), 1)
            a = ops.sum(a * weights[..., None], axis=-2) / count
            g = ops.sum(g, axis=-2)
            positions = ops.sum(ops.max(weights, axis=1))
        else:
            a = _rows(a * weights[..., None])
            g = _rows(g)
            positions = ops.sum(weights)
        return [_square(a), _square(g), positions]

    def average(self, a, g, positions):
        """Returns the batch's factors; what they multiply to is the mean loss's.

        g carries the root of its share in the loss, so G is a sum.
        """
        return [a / ops.maximum(positions, 1), g]

    def refresh(self, a, g, damping):
        """Returns the inverses of damped factors."""
        of_a, of_g = factored_damping(a, g, damping)
        return [damped_inverse(a, of_a), damped_inverse(g, of_g)]

    def precondition(self, gradient, factors, caches, damping):
        """Returns U, of the gradient ∇W."""
        a_inverse, g_inverse = caches
        return ops.matmul(ops.matmul(a_inverse, gradient), g_inverse)


def _rows(x):
    """Every position as a row: `[*lead, N, R, n]` to `[*lead, N R, n]`."""
    return ops.reshape(x, (*x.shape[:-3], -1, x.shape[-1]))


def _square(x):
    return ops.matmul(ops.swapaxes(x, -1, -2), x)
