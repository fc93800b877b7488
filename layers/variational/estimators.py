"""How a layer's outputs are estimated from the distribution of its kernel.

A layer has an estimator, and asks it twice: `draw` makes what is random, which a
recurrent layer does once a sequence, and `apply` maps inputs with it. Nothing drawn,
`noise=None`, stands for the posterior's mean.
"""

from keras import ops

from ..ops.random import normal, random_sign
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
        """Draws ΔW̃, and signs s and r of the two shapes.

        Args:
            posterior: q of the kernel.
            sign_shapes: Shapes that broadcast with the inputs and with the outputs;
                None for the inputs', if r alone turns the sign of every entry.
            seed: As `kzoo.layers.ops.random` takes it.
            dtype: What to compute in.
        """
        if posterior.is_point:
            return None
        perturbation = ops.cast(posterior.perturbation(seed), dtype)
        signs = [
            None if shape is None else random_sign(shape, seed, dtype)
            for shape in sign_shapes
        ]
        return perturbation, *signs

    @staticmethod
    def apply(linear, x, posterior, noise):
        """Returns linear(x, W) with each row's own W.

        Args:
            linear: Function of a tensor and a kernel, linear in both.
            x: Tensor.
            posterior: q of the kernel.
            noise: What `draw` returned, or None.
        """
        mean = ops.cast(posterior.mean(), x.dtype)
        return linear(x, mean) if noise is None else flipout(linear, x, mean, *noise)


class Reparameterization:
    """One kernel for all rows."""

    @staticmethod
    def check(posterior):
        """Takes any posterior."""

    @staticmethod
    def draw(posterior, sign_shapes, seed, dtype):
        """Draws W."""
        return ops.cast(posterior.sample(seed), dtype)

    @staticmethod
    def apply(linear, x, posterior, noise):
        """Returns linear(x, W)."""
        if noise is None:
            noise = ops.cast(posterior.mean(), x.dtype)
        return linear(x, noise)


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
        """Returns what draws ε, once the outputs' shape is known."""
        if posterior.is_point:
            return None
        return lambda shape: normal(shape, seed, posterior.dtype)

    @staticmethod
    def apply(linear, x, posterior, noise):
        """Returns linear(x, W̄) + ε ∘ sqrt(linear(x², σ²))."""
        mean = ops.cast(posterior.mean(), x.dtype)
        if noise is None:
            return linear(x, mean)
        return local_reparameterization(linear, x, mean, posterior.stddev(), noise)
