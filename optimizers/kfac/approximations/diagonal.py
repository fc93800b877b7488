"""The curvature of weights as a diagonal."""

from keras import ops


class Diagonal:
    """F ≈ diag(D), with D from the gradients of single examples: U = ∇W / (D + λ).

    Args:
        shape: The shape of the matrix W.
        sharing: Nothing: an example's gradient is the sum over its positions.
    """

    refreshes = ()

    def __init__(self, shape, sharing="expand"):
        self.factors = self.statistics = {"D": tuple(shape)}
        self.caches = {}

    def measure(self, a, g, weights, caches):
        """Returns what one application of the layer adds to Σ_n (∇W_n)²."""
        return [squared_gradients(a, g)]

    def average(self, d):
        """Returns the batch's factor, which is the sum."""
        return [d]

    def refresh(self, factors, caches, damping):
        """Returns the factor: dividing needs no preparation."""
        return factors, caches

    def precondition(self, gradient, factors, caches, damping):
        """Returns U, of the gradient ∇W."""
        (d,) = factors
        return gradient / (d + ops.cast(damping, d.dtype))


class DiagonalOfSum(Diagonal):
    """D for weights of any layer, from the gradient of the whole batch.

    The scores of N examples with labels drawn from the model are independent and have
    the mean 0, so of their sum, which is the gradient of the sampled loss f,

        E[(Σ_n ∇_n)²] = Σ_n E[∇_n²] = D.

    (With other labels than drawn ones, f gives every example a random sign, of which
    the same holds.)

    Args:
        shape: The shape of the weights.
    """

    def average(self, gradient):
        """Returns the batch's factor, of the gradient of f."""
        return [ops.square(gradient)]


def squared_gradients(a, g):
    """Σ_n (Σ_r a_nrᵀ g_nr)², `[*lead, n, m]`."""
    if a.shape[-2] == 1:
        a, g = (ops.square(x[..., 0, :]) for x in (a, g))
        return ops.matmul(ops.swapaxes(a, -1, -2), g)
    gradients = ops.matmul(ops.swapaxes(a, -1, -2), g)
    return ops.sum(ops.square(gradients), axis=-3)
