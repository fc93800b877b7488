"""The curvature of weights as a diagonal, from the gradient of the sampled loss."""

from keras import ops


class Diagonal:
    """F ≈ diag(D), from the gradients by the weights themselves.

    The scores of N examples with labels drawn from the model are independent and have
    the mean 0, so of their sum, which is the gradient of the sampled loss f,

        E[(Σ_n ∇_n)²] = Σ_n E[∇_n²] = D,   U = ∇h / (D + λ),

    for weights of any layer. (With other labels than drawn ones, f gives every example
    a random sign, of which the same holds.)

    Args:
        shape: The shape of the weights.
    """

    def __init__(self, shape):
        self.factors = {"D": tuple(shape)}
        self.caches = {}

    def average(self, gradient):
        """Returns the batch's factor, of the gradient of f."""
        return [ops.square(gradient)]

    def refresh(self, d, damping):
        """Returns nothing: dividing needs no preparation."""
        return []

    def precondition(self, gradient, factors, caches, damping):
        """Returns U, of the gradient ∇h."""
        (d,) = factors
        return gradient / (d + ops.cast(damping, d.dtype))
