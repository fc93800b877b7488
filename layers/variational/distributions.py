"""Distributions of weights: posteriors with trained parameters, and priors.

As in TensorFlow Probability's layers, a layer takes functions of `(dtype, shape,
name, trainable, add_variable_fn)` that make them. The ones here work on every backend
and are saved with the layer. On TensorFlow such a function may return any
`tfp.distributions.Distribution` instead.
"""

import math

import keras
import numpy as np
from keras import ops

from ..ops.arguments import finite, is_number, positive
from ..ops.random import normal, own_initializer


class WeightDistribution:
    """What makes a distribution of a layer's weights, and is saved with the layer."""

    @classmethod
    def from_config(cls, config):
        """Makes one from what `get_config` returns."""
        return cls(**config)


@keras.saving.register_keras_serializable(package="kzoo")
class MeanFieldNormal(WeightDistribution):
    """Makes independent normal distributions with trained means and scales.

    Each entry of the weight has W ~ N(μ, σ²), with σ = ε + softplus(ρ), where ε is
    the spacing of the dtype's numbers at 1, and μ (`loc`) and ρ
    (`untransformed_scale`) are trained.

    Takes `tfp.layers.default_mean_field_normal_fn`'s arguments, with its defaults,
    and is called as what that returns is.

    Args:
        is_singular: Whether all of the distribution is at μ: there is no ρ.
        loc_initializer: For μ. Defaults to N(0, 0.1²).
        untransformed_scale_initializer: For ρ. Defaults to N(-3, 0.1²), which makes
            σ about 0.05.
        loc_regularizer: Of μ, beside the divergence.
        untransformed_scale_regularizer: Of ρ, beside the divergence.
        loc_constraint: On μ.
        untransformed_scale_constraint: On ρ.

    Example:

    >>> from kzoo.layers import DenseFlipout, MeanFieldNormal
    >>> wide = MeanFieldNormal(untransformed_scale_initializer="zeros")
    >>> layer = DenseFlipout(3, kernel_posterior_fn=wide)
    """

    def __init__(
        self,
        is_singular=False,
        loc_initializer=None,
        untransformed_scale_initializer=None,
        loc_regularizer=None,
        untransformed_scale_regularizer=None,
        loc_constraint=None,
        untransformed_scale_constraint=None,
    ):
        self.is_singular = is_singular
        initializers = keras.initializers
        self.loc_initializer = initializers.get(
            loc_initializer or initializers.RandomNormal(0.0, 0.1)
        )
        self.untransformed_scale_initializer = initializers.get(
            untransformed_scale_initializer or initializers.RandomNormal(-3.0, 0.1)
        )
        self.loc_regularizer = keras.regularizers.get(loc_regularizer)
        self.untransformed_scale_regularizer = keras.regularizers.get(
            untransformed_scale_regularizer
        )
        self.loc_constraint = keras.constraints.get(loc_constraint)
        self.untransformed_scale_constraint = keras.constraints.get(
            untransformed_scale_constraint
        )

    def __call__(self, dtype, shape, name, trainable, add_variable_fn):
        """Makes the variables, and returns their `Normal`."""
        loc = add_variable_fn(
            name=f"{name}_loc",
            shape=shape,
            dtype=dtype,
            trainable=trainable,
            initializer=own_initializer(self.loc_initializer),
            regularizer=self.loc_regularizer,
            constraint=self.loc_constraint,
        )
        if self.is_singular:
            return Normal(loc, None, shape, dtype)
        untransformed_scale = add_variable_fn(
            name=f"{name}_untransformed_scale",
            shape=shape,
            dtype=dtype,
            trainable=trainable,
            initializer=own_initializer(self.untransformed_scale_initializer),
            regularizer=self.untransformed_scale_regularizer,
            constraint=self.untransformed_scale_constraint,
        )
        return Normal(loc, lambda: softplus(untransformed_scale), shape, dtype)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            "is_singular": self.is_singular,
            **{
                name: keras.saving.serialize_keras_object(getattr(self, name))
                for name in (
                    "loc_initializer",
                    "untransformed_scale_initializer",
                    "loc_regularizer",
                    "untransformed_scale_regularizer",
                    "loc_constraint",
                    "untransformed_scale_constraint",
                )
            },
        }


@keras.saving.register_keras_serializable(package="kzoo")
class NormalPrior(WeightDistribution):
    """Makes the prior N(loc, scale²), the same for every entry of the weight.

    With its defaults the standard normal distribution, as
    `tfp.layers.default_multivariate_normal_fn`.

    Args:
        loc: The mean, a number.
        scale: The standard deviation, a number above 0.
        learnable: Whether the scale is trained with the posterior (empirical Bayes),
            one number for the whole weight that starts at `scale`.

    Raises:
        ValueError: If `scale` is not above 0, or a number is not finite.

    Example:

    >>> from kzoo.layers import DenseFlipout, NormalPrior
    >>> layer = DenseFlipout(3, kernel_prior_fn=NormalPrior(scale=0.1))
    """

    def __init__(self, loc=0.0, scale=1.0, learnable=False):
        self.loc, self.scale = finite("loc", loc), positive("scale", scale)
        self.learnable = learnable

    def __call__(self, dtype, shape, name, trainable, add_variable_fn):
        """Makes the variable, if there is one, and returns the `Normal`."""
        if not self.learnable:
            return Normal(self.loc, lambda: self.scale, shape, dtype)
        # softplus⁻¹(scale) = scale + log(1 - exp(-scale)).
        start = self.scale + math.log(-math.expm1(-self.scale))
        untransformed_scale = add_variable_fn(
            name=f"{name}_untransformed_scale",
            shape=(),
            dtype=dtype,
            trainable=trainable,
            initializer=keras.initializers.Constant(start),
        )
        return Normal(self.loc, lambda: softplus(untransformed_scale), shape, dtype)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {"loc": self.loc, "scale": self.scale, "learnable": self.learnable}


class Density(WeightDistribution):
    """A prior without variables that is known by its density alone."""

    is_point = False

    def __call__(self, dtype, shape, name, trainable, add_variable_fn):
        """Returns the prior."""
        return self


@keras.saving.register_keras_serializable(package="kzoo")
class ScaleMixturePrior(Density):
    """Makes the prior π N(0, σ₁²) + (1 - π) N(0, σ₂²) of each entry.

    Its divergence has no closed form and is estimated by one sample a step.

    Reference: Blundell, Cornebise, Kavukcuoglu, Wierstra, "Weight Uncertainty in
    Neural Networks", 2015. https://arxiv.org/abs/1505.05424

    Args:
        pi: π, the weight of the first component, between 0 and 1.
        sigma1: σ₁, above 0.
        sigma2: σ₂, above 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    >>> from kzoo.layers import DenseFlipout, ScaleMixturePrior
    >>> layer = DenseFlipout(3, kernel_prior_fn=ScaleMixturePrior(0.5, 1.0, 0.01))
    """

    def __init__(self, pi=0.5, sigma1=1.0, sigma2=0.0025):
        if not is_number(pi) or not 0 < pi < 1:
            raise ValueError(f"expected 0 < pi < 1. Received: pi={pi!r}")
        self.pi = float(pi)
        self.sigma1 = positive("sigma1", sigma1)
        self.sigma2 = positive("sigma2", sigma2)

    def log_prob(self, value):
        """The logarithm of the density, summed over the entries."""
        parts = [
            math.log(weight / sigma) - 0.5 * ops.square(value / sigma)
            for weight, sigma in ((self.pi, self.sigma1), (1 - self.pi, self.sigma2))
        ]
        return ops.sum(ops.logaddexp(*parts) - 0.5 * math.log(2 * math.pi))

    def get_config(self):
        """Returns the constructor's arguments."""
        return {"pi": self.pi, "sigma1": self.sigma1, "sigma2": self.sigma2}


@keras.saving.register_keras_serializable(package="kzoo")
class CauchyPrior(Density):
    """Makes the Cauchy distribution around `loc` the prior of each entry.

    p(w) = 1 / (π γ (1 + ((w - loc) / γ)²)), with tails so heavy that entries which the
    data need far away may stay there. Its divergence has no closed form and is
    estimated by one sample a step.

    Reference: Dusenberry, Jerfel, Wen, Ma, Snoek, Heller, Lakshminarayanan, Tran,
    "Efficient and Scalable Bayesian Neural Nets with Rank-1 Factors", 2020.
    https://arxiv.org/abs/2005.07186

    Args:
        loc: The median, a number.
        scale: γ, half the distance of the quartiles, a number above 0.

    Raises:
        ValueError: If `scale` is not above 0, or a number is not finite.

    Example:

    >>> from kzoo.layers import CauchyPrior, DenseFlipout
    >>> layer = DenseFlipout(3, kernel_prior_fn=CauchyPrior(scale=0.1))
    """

    def __init__(self, loc=0.0, scale=1.0):
        self.loc, self.scale = finite("loc", loc), positive("scale", scale)

    def log_prob(self, value):
        """The logarithm of the density, summed over the entries."""
        z = (value - self.loc) / self.scale
        return -ops.sum(ops.log1p(ops.square(z)) + math.log(math.pi * self.scale))

    def get_config(self):
        """Returns the constructor's arguments."""
        return {"loc": self.loc, "scale": self.scale}


# The defaults of the layers.
MEAN_FIELD_NORMAL = MeanFieldNormal()
POINT = MeanFieldNormal(is_singular=True)
STANDARD_NORMAL = NormalPrior()


class Normal:
    """Independent N(loc, scale²) for each entry of a weight.

    Args:
        loc: The means: a variable, or a number.
        scale: A function without arguments that gives the standard deviations, or
            None if all of the distribution is at loc.
        shape: The weight's shape.
        dtype: Its dtype.
    """

    is_symmetric = True

    def __init__(self, loc, scale, shape, dtype):
        self._loc, self._scale = loc, scale
        self.shape, self.dtype = tuple(shape), keras.backend.standardize_dtype(dtype)

    @property
    def is_point(self):
        """Whether all of the distribution is at its mean."""
        return self._scale is None

    def mean(self):
        """W̄."""
        return ops.broadcast_to(ops.cast(self._loc, self.dtype), self.shape)

    def stddev(self):
        """σ."""
        if self._scale is None:
            return ops.zeros(self.shape, self.dtype)
        return ops.broadcast_to(ops.cast(self._scale(), self.dtype), self.shape)

    def perturbation(self, seed, samples=None):
        """Draws ΔW ~ N(0, σ²), or `samples` of them along a new first axis."""
        shape = self.shape if samples is None else (samples, *self.shape)
        if self._scale is None:
            return ops.zeros(shape, self.dtype)
        return self.stddev() * normal(shape, seed, self.dtype)

    def sample(self, seed, samples=None):
        """Draws W = W̄ + ΔW, or `samples` of them along a new first axis."""
        if self._scale is None and samples is None:
            return self.mean()
        return self.mean() + self.perturbation(seed, samples)

    def log_prob(self, value):
        """The logarithm of the density, summed over the entries."""
        if self._scale is None:
            return ops.zeros((), self.dtype)  # Of the point, with respect to itself.
        z = (value - self.mean()) / self.stddev()
        log_scale = ops.log(self.stddev())
        return -ops.sum(0.5 * ops.square(z) + log_scale + 0.5 * math.log(2 * math.pi))

    def divergence(self, prior):
        """KL(self, prior) to another `Normal`, in nats; of a point, -log prior(loc)."""
        if self._scale is None:
            return -prior.log_prob(self.mean())
        ratio = ops.square(self.stddev() / prior.stddev())
        distance = ops.square((self.mean() - prior.mean()) / prior.stddev())
        return 0.5 * ops.sum(ratio + distance - 1 - ops.log(ratio))


@keras.saving.register_keras_serializable(package="kzoo")
def kl_divergence(posterior, prior, sample):
    """KL(q, p) = E_q[log q(W) - log p(W)], in nats.

    In closed form where one is known, else estimated by the sample.

    Args:
        posterior: q.
        prior: p.
        sample: W drawn from q.

    Returns:
        Scalar tensor.
    """
    closed = closed_form(posterior, prior)
    if closed is not None:
        return closed
    return sampled_kl_divergence(posterior, prior, sample)


@keras.saving.register_keras_serializable(package="kzoo")
def sampled_kl_divergence(posterior, prior, sample):
    """log q(W) - log p(W), an unbiased estimate of KL(q, p) from one sample W of q.

    Args:
        posterior: q.
        prior: p.
        sample: W.

    Returns:
        Scalar tensor.
    """
    return posterior.log_prob(sample) - prior.log_prob(sample)


def closed_form(posterior, prior):
    """KL(q, p), or None if it is known neither here nor to TensorFlow Probability."""
    if isinstance(posterior, Normal) and isinstance(prior, Normal):
        return posterior.divergence(prior)
    if isinstance(prior, Density):
        return -prior.log_prob(posterior.mean()) if posterior.is_point else None
    from . import tfp

    return tfp.kl_divergence(posterior, prior)


def softplus(untransformed_scale):
    """σ = ε + log(1 + exp(ρ)), with ε the spacing of the dtype's numbers at 1."""
    dtype = keras.backend.standardize_dtype(untransformed_scale.dtype)
    eps = float(np.finfo(dtype).eps)
    return eps + ops.softplus(untransformed_scale)


def inverse_softplus(stddev, dtype):
    """ρ of σ = ε + softplus(ρ), as a NumPy array; of σ = 2 ε where σ is less.

    Args:
        stddev: σ, a NumPy array.
        dtype: The dtype that ρ is for, which has the ε.
    """
    eps = float(np.finfo(keras.backend.standardize_dtype(dtype)).eps)
    # softplus⁻¹(s) = s + log(1 - exp(-s)) of s = σ - ε.
    s = np.maximum(stddev.astype("float64") - eps, eps)
    return s + np.log(-np.expm1(-s))
