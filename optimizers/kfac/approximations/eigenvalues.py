"""The curvature of a weight matrix with Kronecker's basis and its own eigenvalues."""

from keras import ops

from .diagonal import squared_gradients
from .kronecker import Kronecker


class EigenvalueCorrected(Kronecker):
    """F ≈ (U_A ⊗ U_G) diag(S) (U_A ⊗ U_G)ᵀ: EK-FAC.

    The basis is that of A ⊗ G, A = U_A diag(s_A) U_Aᵀ, and G likewise; but S, which
    would be s_A s_Gᵀ there, is measured in it, from the gradients of single examples:

        S = E_n[(U_Aᵀ ∇W_n U_G)²],   U = U_A [(U_Aᵀ ∇W U_G) / (S + λ)] U_Gᵀ.

    Of all diagonals in that basis, S is the nearest to F. When the basis changes from
    U to U', S is taken over as the diagonal of what it was, S' = R_A² S (R_G²)ᵀ, with
    the squares of the single numbers of R = U'ᵀ U. At first S is s_A s_Gᵀ.

    Reference: George et al., "Fast Approximate Natural Gradient Descent in a
    Kronecker-factored Eigenbasis", 2018. https://arxiv.org/abs/1806.03884

    Args:
        shape: As Kronecker's.
        sharing: As Kronecker's, for A and G; gradients are always an example's.
    """

    refreshes = ("S",)

    def __init__(self, shape, sharing="expand"):
        super().__init__(shape, sharing)
        *lead, n, m = shape
        self.factors = {**self.factors, "S": (*lead, n, m)}
        self.statistics = {**self.statistics, "S": (*lead, n, m)}
        self.caches = {"A_basis": (*lead, n, n), "G_basis": (*lead, m, m)}

    def measure(self, a, g, weights, caches):
        """Returns Kronecker's statistics, and S in the basis as it is."""
        of_a, of_g = caches
        # A basis for the last axis, in all its leading axes and positions.
        s = squared_gradients(_turn(a, of_a), _turn(g, of_g))
        return [*super().measure(a, g, weights, caches), s]

    def average(self, a, g, positions, s):
        """Returns the batch's factors."""
        return [*super().average(a, g, positions), s]

    def refresh(self, factors, caches, damping):
        """Returns the factors and the basis of A and G."""
        a, g, s = factors
        of_a, old_a = new_basis(a, caches[0])
        of_g, old_g = new_basis(g, caches[1])
        turned = _apply(ops.square(old_a), s, ops.square(old_g))
        s_a, s_g = spectrum(a, of_a), spectrum(g, of_g)
        first = ops.all(caches[1] == 0)
        s = ops.where(first, s_a[..., :, None] * s_g[..., None, :], turned)
        return [a, g, s], [of_a, of_g]

    def precondition(self, gradient, factors, caches, damping):
        """Returns U, of the gradient ∇W."""
        of_a, of_g = caches
        s = factors[-1]
        turned = _apply(_transpose(of_a), gradient, _transpose(of_g))
        return _apply(of_a, turned / (s + ops.cast(damping, s.dtype)), of_g)


def _turn(x, basis):
    """Rows `[*lead, N, R, n]` in another basis."""
    return ops.matmul(x, basis[..., None, :, :])


def _apply(left, x, right):
    """left x rightᵀ."""
    return ops.matmul(ops.matmul(left, x), _transpose(right))


def _transpose(x):
    return ops.swapaxes(x, -1, -2)


def new_basis(matrix, old):
    """A symmetric matrix's eigenvectors, and R, what the old basis is in them."""
    _, basis = ops.eigh(matrix)
    return basis, ops.matmul(_transpose(basis), old)


def spectrum(matrix, basis):
    """A matrix's eigenvalues, of its eigenvectors; rounding makes none less than 0."""
    return ops.maximum(ops.sum(basis * ops.matmul(matrix, basis), axis=-2), 0)
