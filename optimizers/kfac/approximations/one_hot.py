"""The curvature of a table, whose rows are picked."""

from keras import ops

from ..damping import damped_inverse, factored_damping
from .diagonal import Diagonal
from .eigenvalues import new_basis, spectrum
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


class OneHotEigenvalueCorrected(OneHotKronecker):
    """F ≈ (I ⊗ U_G) diag(S) (I ⊗ U_G)ᵀ: EK-FAC, as A is diagonal in the unit vectors.

        S = E_n[(∇W_n U_G)²],   U = [(∇W U_G) / (S + λ)] U_Gᵀ.

    Args:
        shape: As OneHotKronecker's.
        sharing: As OneHotKronecker's, for A and G; gradients are always an example's.
    """

    refreshes = ("S",)

    def __init__(self, shape, sharing="expand"):
        super().__init__(shape)
        n, m = shape
        self.factors = {**self.factors, "S": (n, m)}
        self.statistics = {**self.statistics, "S": (n, m)}
        self.caches = {"G_basis": (m, m)}

    def measure(self, a, g, weights, caches):
        """Returns Kronecker's statistics, and S in the basis as it is."""
        (of_g,) = caches
        s = squared_gradients(a, ops.matmul(g, of_g), self.size)
        return [*super().measure(a, g, weights, caches), s]

    def average(self, a, g, positions, s):
        """Returns the batch's factors."""
        return [*super().average(a, g, positions), s]

    def refresh(self, factors, caches, damping):
        """Returns the factors and the basis of G."""
        a, g, s = factors
        of_g, old_g = new_basis(g, *caches)
        turned = ops.matmul(s, ops.transpose(ops.square(old_g)))
        first = ops.all(caches[0] == 0)
        s = ops.where(first, a[:, None] * spectrum(g, of_g), turned)
        return [a, g, s], [of_g]

    def precondition(self, gradient, factors, caches, damping):
        """Returns U, of the gradient ∇W."""
        (of_g,), s = caches, factors[-1]
        turned = ops.matmul(gradient, of_g) / (s + ops.cast(damping, s.dtype))
        return ops.matmul(turned, ops.transpose(of_g))


class OneHotDiagonal(Diagonal):
    """F ≈ diag(D) of a table, from the gradients of single examples.

    Args:
        shape: `(rows of the table, m)`.
        sharing: Nothing, as Diagonal's.
    """

    def measure(self, a, g, weights, caches):
        """Returns what one application of the layer adds to Σ_n (∇W_n)²."""
        return [squared_gradients(a, g, self.factors["D"][0])]


def squared_gradients(a, g, size):
    """Σ_n (Σ_r g_nr)² over the positions r that pick a row v, `[size, m]`.

    With s_nr the sum over the c_nr positions of n that pick what r does, that is
    Σ s_nr² / c_nr over all n and r that pick v. (Σ g_nr s_nr, which is the same, may be
    less than 0 by rounding.)
    """
    numbers = ops.cast(a, "int32")
    same = ops.cast(ops.equal(numbers, ops.swapaxes(numbers, -1, -2)), g.dtype)
    shares = ops.square(ops.matmul(same, g)) / ops.sum(same, axis=-1, keepdims=True)
    return ops.segment_sum(rows(shares), ops.reshape(numbers, (-1,)), num_segments=size)
