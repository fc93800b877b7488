"""The curvature of a table, whose rows are picked."""

from keras import ops

from ..damping import damped_inverse, factored_damping
from .diagonal import Diagonal
from .kronecker import Kronecker, rows, square


class OneHotKronecker(Kronecker):
    """F ≈ diag(A) ⊗ G: rows a with one 1 and else 0 are orthogonal.

    A holds how often each row of the table is picked. a is the row's number.

    Args:
        shape: `(rows of the table, m)`.
        sharing: `"expand"`; nothing else is diagonal.
    """

    def __init__(self, shape, sharing="expand"):
        n, m = shape
        super().__init__(shape)
        self.factors = {"A": (n,), "G": (m, m)}
        self.statistics = {**self.factors, "positions": ()}
        self.caches = {"A_inverse": (n,), "G_inverse": (m, m)}
        self.size = n

    def measure(self, a, g, weights, caches):
        """Returns what one application of the layer adds to the statistics."""
        numbers = ops.reshape(ops.cast(a, "int32"), (-1,))
        weights = ops.reshape(weights, (-1,))
        counts = ops.segment_sum(weights, numbers, num_segments=self.size)
        return [counts, square(rows(g)), ops.sum(weights)]

    def refresh(self, factors, caches, damping):
        """Returns the factors, as they are, and the inverses of them, damped."""
        a, g = factors
        # Of A, π sees the mean only.
        of_a, of_g = factored_damping(ops.mean(a)[None, None], g, damping)
        return factors, [1 / (a + of_a), damped_inverse(g, of_g)]

    def precondition(self, gradient, factors, caches, damping):
        """Returns U, of the gradient ∇W."""
        a_inverse, g_inverse = caches
        return ops.matmul(a_inverse[:, None] * gradient, g_inverse)


class OneHotDiagonal(Diagonal):
    """F ≈ diag(D) of a table: D_v = Σ_n (Σ_r g_nr)² over the positions r that pick v.

    With s_nr the sum over the positions of n that pick what r does, that is Σ g_nr s_nr
    over all n and r that pick v.
    """

    def measure(self, a, g, weights, caches):
        """Returns what one application of the layer adds to the statistics."""
        numbers = ops.cast(a, "int32")
        same = ops.cast(ops.equal(numbers, ops.swapaxes(numbers, -1, -2)), g.dtype)
        squares, numbers = rows(g * ops.matmul(same, g)), ops.reshape(numbers, (-1,))
        size, _ = self.factors["D"]
        return [ops.segment_sum(squares, numbers, num_segments=size)]
