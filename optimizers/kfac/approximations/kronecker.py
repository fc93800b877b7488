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

    Attributes:
        statistics: The shapes of what is collected from a batch.
        factors: The shapes of what is made of that and averaged over batches.
        caches: The shapes of what is made of the factors when that is due.
        refreshes: The names of the factors that are changed then.
    """

    refreshes = ()

    def __init__(self, shape, sharing="expand"):
        *lead, n, m = shape
        self.reduces = sharing == "reduce"
        self.factors = {"A": (*lead, n, n), "G": (*lead, m, m)}
        self.statistics = {**self.factors, "positions": ()}
        self.caches = {"A_inverse": (*lead, n, n), "G_inverse": (*lead, m, m)}

    def measure(self, a, g, weights, caches):
        """Returns what one application of the layer adds to the statistics.

        Args:
            a: What is multiplied by the matrix, `[*lead, N, R, n]`.
            g: The derivatives by what comes of it, `[*lead, N, R, m]`.
            weights: 1 for positions that count and 0 for others, `[N, R]`.
            caches: The caches as they are.
        """
        a = a * weights[..., None]
        if self.reduces:
            count = ops.sum(weights, axis=1, keepdims=True)
            a = ops.sum(a, axis=-2) / ops.maximum(count, 1)
            examples = ops.sum(ops.minimum(count, 1))
            return [square(a), square(ops.sum(g, axis=-2)), examples]
        return [square(rows(a)), square(rows(g)), ops.sum(weights)]

    def average(self, a, g, positions):
        """Returns the batch's factors; what they multiply to is the mean loss's.

        g carries the root of its share in the loss, so G is a sum.
        """
        return [a / ops.maximum(positions, 1), g]

    def refresh(self, factors, caches, damping):
        """Returns the factors, as they are, and the inverses of them, damped."""
        a, g = factors
        of_a, of_g = factored_damping(a, g, damping)
        return factors, [damped_inverse(a, of_a), damped_inverse(g, of_g)]

    def precondition(self, gradient, factors, caches, damping):
        """Returns U, of the gradient ∇W."""
        a_inverse, g_inverse = caches
        return ops.matmul(ops.matmul(a_inverse, gradient), g_inverse)


def rows(x):
    """Every position as a row: `[*lead, N, R, n]` to `[*lead, N R, n]`."""
    return ops.reshape(x, (*x.shape[:-3], -1, x.shape[-1]))


def square(x):
    """xᵀ x."""
    return ops.matmul(ops.swapaxes(x, -1, -2), x)
