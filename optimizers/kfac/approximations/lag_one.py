"""The curvature of a recurrent matrix, whose steps are a chain of symmetric links."""

import keras
from keras import ops

from ..damping import damped_root, factored_damping
from .kronecker import Kronecker, rows, square


class LagOne(Kronecker):
    """F ≈ Σ_d (1 - |d|/T) V_d over |d| < T, with V_d = Ψ^d V_0: steps are a chain.

    A gradient is a sum over T steps, w = Σ_t w_t, w_t = a_tᵀ g_t. Were w_t Gaussian,
    each linear in the one before, w_{t+1} = Ψ w_t + noise, all their covariances would
    follow from two, that of a step and that of neighbours, which are Kronecker products
    if a and g are independent:

        V_0 = A ⊗ G,   V_1 = A_next ⊗ G_next = Ψ V_0,   A_next = E[a_{t+1}ᵀ a_t]

    and G_next likewise, averaged over as many steps as A and G are. With Ψ̂ = V_0^-½ V_1
    V_0^-½ made symmetric, which is what two matrices B diagonalize,

        B_Aᵀ (A + d_A I) B_A = I,   B_Aᵀ (A_next + A_nextᵀ) / 2 B_A = diag(ψ_A)

        U = B_A [(B_Aᵀ ∇W B_G) ⊙ γ(ψ_A ψ_Gᵀ)] B_Gᵀ

    where 1 / γ(x) = Σ_d (1 - |d|/T) x^|d|. Where neighbours are not correlated, γ is 1,
    and U that of `Kronecker`.

    Reference: Martens, Ba, Johnson, "Kronecker-factored Curvature Approximations for
    Recurrent Neural Networks", 2018, option 1. https://openreview.net/forum?id=HyMTkQZAb
    (There γ has a mean over the lengths T; here T is the mean length, rounded.)

    Args:
        shape: `(n, m)`, the shape of the matrix W.
        sharing: `"expand"`; with `"reduce"` there would be one step.
    """

    def __init__(self, shape, sharing="expand"):
        super().__init__(shape)
        n, m = shape
        of_next = {"A_next": (n, n), "G_next": (m, m)}
        self.statistics = {**self.statistics, "examples": (), **of_next}
        self.factors = {**self.factors, "T": (), **of_next}
        self.caches = {
            "A_basis": (n, n),
            "A_links": (n,),
            "G_basis": (m, m),
            "G_links": (m,),
        }

    def measure(self, a, g, weights, caches):
        """Returns Kronecker's statistics, those of neighbours, and the examples."""
        examples = ops.sum(ops.max(weights, axis=1))
        # What does not count is nobody's neighbour.
        a, g = (x * weights[..., None] for x in (a, g))
        of_next = [ops.matmul(_columns(x[:, 1:]), rows(x[:, :-1])) for x in (a, g)]
        found = [square(rows(a)), square(rows(g)), ops.sum(weights)]
        return [*found, examples, *of_next]

    def average(self, a, g, positions, examples, a_next, g_next):
        """Returns the batch's factors."""
        count = ops.maximum(positions, 1)
        length = positions / ops.maximum(examples, 1)
        return [a / count, g, length, a_next / count, g_next]

    def refresh(self, factors, caches, damping):
        """Returns the factors, as they are, and B and ψ of both."""
        a, g, _, *of_next = factors
        found = []
        dampings = factored_damping(a, g, damping)
        for of_one, d, link in zip((a, g), dampings, of_next, strict=True):
            found += self.chain(damped_root(of_one, d), link)
        return factors, found

    def chain(self, root, link):
        """Returns B and ψ, of R with Rᵀ R = C⁻¹ and the neighbours' moments."""
        links = within(root, 0.5 * (link + ops.transpose(link)))
        psi, turn = eigenvectors(links)
        return [ops.matmul(ops.transpose(root), turn), psi]

    def precondition(self, gradient, factors, caches, damping):
        """Returns U, of the gradient ∇W."""
        of_a, psi_a, of_g, psi_g = caches
        turned = within(ops.transpose(of_a), gradient, ops.transpose(of_g))
        turned = turned * gamma(psi_a[:, None] * psi_g[None], factors[2])
        return within(of_a, turned, of_g)


def gamma(x, length):
    """γ(x), the reciprocal of Σ (1 - |d|/T) x^|d| over |d| < T.

    x is kept so far from ±1, where γ is 0/0 or infinite, that rounding and that change
    it alike.

    Args:
        x: Tensor, with numbers from -1 to 1.
        length: T, which is rounded, and is at least 1.
    """
    length = ops.cast(ops.maximum(ops.round(length), 1), x.dtype)
    x = clipped(x)
    # 1 - |x|^T, of whose first digits the difference below leaves none.
    rest = -ops.expm1(length * ops.log1p(ops.abs(x) - 1))
    negative = ops.logical_and(x < 0, ops.mod(length, 2) == 1)
    rest = ops.where(negative, 2 - rest, rest)
    below = length * (1 - x) * (1 + x) - 2 * x * rest
    return length * ops.square(1 - x) / below


def eigenvectors(x):
    """The eigenvalues and eigenvectors of x; of what is not finite, those of 0."""
    return ops.eigh(ops.where(ops.isfinite(x), x, ops.zeros_like(x)))


def clipped(x):
    """x, not nearer to ±1 than the root of what rounding may change."""
    dtype = keras.backend.standardize_dtype(x.dtype)
    most = 1 - (2.0**-26 if dtype == "float64" else 2.0**-11)
    return ops.clip(x, -most, most)


def within(left, x, right=None):
    """left x rightᵀ; without another on the right, the same."""
    right = left if right is None else right
    return ops.matmul(ops.matmul(left, x), ops.transpose(right))


def _columns(x):
    return ops.transpose(rows(x))
