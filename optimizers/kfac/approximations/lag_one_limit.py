"""The curvature of a recurrent matrix, whose steps are a chain without ends."""

from keras import ops

from .lag_one import LagOne, clipped, eigenvectors, within


class LagOneLimit(LagOne):
    """F ≈ Σ_d V_d over all d, V_d = Ψ^d V_0: `LagOne` of sequences of any length.

    What that has at both ends of a sequence is left out, and Ψ need not be symmetric:

        F = (I - Ψ)⁻¹ (V_0 - Ψ V_0 Ψᵀ) (I - Ψᵀ)⁻¹.

    With matrices B of which Bᵀ (A + d_A I) B = I, and P = Bᵀ A_next B the links along
    them, turned so that P Pᵀ = diag(μ),

        Z = B_Aᵀ ∇W B_G,   Y = (Z - P_A Z P_Gᵀ) / (1 - μ_A μ_Gᵀ)
        U = B_A (Y - P_Aᵀ Y P_G) B_Gᵀ.

    Reference: Martens, Ba, Johnson, "Kronecker-factored Curvature Approximations for
    Recurrent Neural Networks", 2018, option 2. https://openreview.net/forum?id=HyMTkQZAb

    Args:
        shape: As of `LagOne`.
        sharing: As of `LagOne`.
    """

    def __init__(self, shape, sharing="expand"):
        super().__init__(shape)
        n, m = shape
        self.caches = {**self.caches, "A_links": (n, n), "G_links": (m, m)}

    def chain(self, root, link):
        """Returns B and P, of R with Rᵀ R = C⁻¹ and the neighbours' moments."""
        links = within(root, link)
        _, turn = eigenvectors(ops.matmul(links, ops.transpose(links)))
        back = ops.transpose(turn)
        return [ops.matmul(ops.transpose(root), turn), within(back, links)]

    def precondition(self, gradient, factors, caches, damping):
        """Returns U, of the gradient ∇W."""
        of_a, p_a, of_g, p_g = caches
        z = within(ops.transpose(of_a), gradient, ops.transpose(of_g))
        mu_a, mu_g = (ops.sum(ops.square(p), axis=-1) for p in (p_a, p_g))
        y = (z - within(p_a, z, p_g)) / (1 - clipped(mu_a[:, None] * mu_g[None]))
        y = y - within(ops.transpose(p_a), y, ops.transpose(p_g))
        return within(of_a, y, of_g)
