"""How a layer's outputs are estimated from the distribution of its kernel.

A layer has an estimator, and asks it twice: `draw` makes a tuple of all that the
kernel stands for, which a recurrent layer does once a sequence, and `apply` maps
inputs with it. To every estimator a kernel alone, `(W,)`, is just that, such as the
posterior's mean.
"""

from keras import ops

from ..ops.random import draw_together, normal, random_sign
from ..ops.variational import flipout, local_reparameterization
from .distributions import Normal


class Flipout:
    """One perturbation for all rows, its signs turned by each row's own pattern."""

    @staticmethod
    def check(posterior):
        """Raises ValueError if turning signs would change the distribution."""
        if not posterior.is_symmetric:
            raise ValueError(
                "expected a posterior of independent entries, each symmetric about its "
                "mean: turning signs would change any other distribution. "
                f"Received: {posterior}"
            )

    @staticmethod
    def draw(posterior, sign_shapes, seed, dtype):
        """Returns W̄, ΔW̃, and signs s and r of the two shapes.

        Args:
            posterior: q of the kernel.
            sign_shapes: Shapes that broadcast with the inputs and with the outputs;
                None for the inputs', if r alone turns the sign of every entry.
            seed: As `kzoo.layers.ops.random` takes it.
            dtype: What to compute in.
        """
        mean = ops.cast(posterior.mean(), dtype)
        if posterior.is_point:
            return (mean,)
        perturbation = ops.cast(posterior.perturbation(seed), dtype)
        return mean, perturbation, *draw_together(random_sign, sign_shapes, seed, dtype)

    @staticmethod
    def apply(linear, x, kernel):
        """Returns linear(x, W) with each row's own W.

        Args:
            linear: Function of a tensor and a kernel, linear in both.
            x: Tensor.
            kernel: What `draw` returned, or `(W,)`.
        """
        mean, *noise = kernel
        return flipout(linear, x, mean, *noise) if noise else linear(x, mean)

    @staticmethod
    def of_outputs(part, kernel):
        """Returns the kernel of some outputs, a slice of them."""
        mean, *noise = kernel
        if not noise:
            return (mean[..., part],)
        perturbation, signs_in, signs_out = noise
        return mean[..., part], perturbation[..., part], signs_in, signs_out[..., part]

    @staticmethod
    def over_steps(kernel):
        """Returns the kernel of rows for those that have an axis of steps."""
        mean, *noise = kernel
        if not noise:
            return kernel
        perturbation, signs_in, signs_out = noise
        return mean, perturbation, signs_in[:, None], signs_out[:, None]


class Reparameterization:
    """One kernel for all rows."""

    @staticmethod
    def check(posterior):
        """Takes any posterior."""

    @staticmethod
    def draw(posterior, sign_shapes, seed, dtype):
        """Returns W."""
        return (ops.cast(posterior.sample(seed), dtype),)

    @staticmethod
    def apply(linear, x, kernel):
        """Returns linear(x, W)."""
        return linear(x, *kernel)

    @staticmethod
    def of_outputs(part, kernel):
        """Returns the kernel of some outputs, a slice of them."""
        return (kernel[0][..., part],)

    @staticmethod
    def over_steps(kernel):
        """Returns the kernel: it is that of all rows."""
        return kernel


class LocalReparameterization:
    """The outputs drawn in place of the kernel, for each row and position."""

    @staticmethod
    def check(posterior):
        """Raises ValueError if the outputs would not be normal."""
        if not isinstance(posterior, Normal):
            raise ValueError(
                "expected a normal posterior of independent entries: only then are "
                f"the outputs normal. Received: {posterior}"
            )

    @staticmethod
    def draw(posterior, sign_shapes, seed, dtype):
        """Returns W̄, σ, and what draws ε once the outputs' shape is known."""
        mean = ops.cast(posterior.mean(), dtype)
        if posterior.is_point:
            return (mean,)
        return mean, posterior.stddev(), lambda s: normal(s, seed, posterior.dtype)

    @staticmethod
    def apply(linear, x, kernel):
        """Returns linear(x, W̄) + ε ∘ sqrt(linear(x², σ²))."""
        mean, *noise = kernel
        if not noise:
            return linear(x, mean)
        return local_reparameterization(linear, x, mean, *noise)
