"""Weights' distributions from TensorFlow Probability, on the TensorFlow backend.

It is imported where such a distribution is met, as that takes a second.
"""

from keras import ops

from ..ops.random import seed_pair
from .distributions import Normal


class Distribution:
    """A `tfp.distributions.Distribution` of a weight.

    Args:
        distribution: It.
        dtype: The weight's dtype.
    """

    is_point = False

    def __init__(self, distribution, dtype):
        self.distribution, self.dtype = distribution, dtype
        entries = _entries(distribution)
        self.is_symmetric = isinstance(entries, _symmetric())
        # Some have no mean; the symmetric ones have a centre.
        self._centre = getattr(entries, "loc", None) if self.is_symmetric else None

    def __repr__(self):
        return repr(self.distribution)

    def mean(self):
        """W̄."""
        if self._centre is None:
            return self.distribution.mean()
        shape = (*self.distribution.batch_shape, *self.distribution.event_shape)
        return ops.broadcast_to(ops.convert_to_tensor(self._centre), shape)

    def stddev(self):
        """σ."""
        return self.distribution.stddev()

    def sample(self, seed, samples=None):
        """Draws W, or `samples` of them along a new first axis."""
        shape = () if samples is None else samples
        seed = ops.cast(seed_pair(seed), "int32")
        return self.distribution.sample(shape, seed=seed)

    def perturbation(self, seed):
        """Draws ΔW = W - W̄."""
        return self.sample(seed) - self.mean()

    def log_prob(self, value):
        """The logarithm of the density, summed over the entries."""
        return ops.sum(self.distribution.log_prob(value))


def from_tfp(distribution, shape, dtype, is_prior):
    """The same distribution as the layers use it: a `Normal` where it is one.

    Args:
        distribution: A `tfp.distributions.Distribution`.
        shape: The weight's shape.
        dtype: Its dtype.
        is_prior: Whether one distribution may stand for all entries.

    Raises:
        ValueError: If it is a distribution of something else.
    """
    from tensorflow_probability import distributions as tfd

    if not isinstance(distribution, tfd.Distribution):
        raise ValueError(
            "expected a `tfp.distributions.Distribution` or one of kzoo's functions. "
            f"Received: {distribution!r}"
        )
    drawn = (*distribution.batch_shape, *distribution.event_shape)
    if drawn != tuple(shape) and not (is_prior and drawn == ()):
        raise ValueError(
            f"expected a distribution of a weight of shape {tuple(shape)}. "
            f"Received: {distribution}"
        )
    entries = _entries(distribution)
    if isinstance(entries, tfd.MultivariateNormalDiag):
        return Normal(entries.loc, entries.stddev, shape, dtype)
    if isinstance(entries, tfd.Normal):
        return Normal(entries.loc, lambda: entries.scale, shape, dtype)
    if isinstance(entries, tfd.Deterministic):
        return Normal(entries.loc, None, shape, dtype)
    return Distribution(distribution, dtype)


def _symmetric():
    """Distributions whose entries are symmetric about their centre."""
    from tensorflow_probability import distributions as tfd

    return tfd.Laplace, tfd.StudentT, tfd.Cauchy, tfd.Logistic, tfd.Uniform


def to_tfp(distribution):
    """The same distribution as a `tfp.distributions.Distribution`, if there is one."""
    from tensorflow_probability import distributions as tfd

    if isinstance(distribution, Distribution):
        return distribution.distribution
    if not isinstance(distribution, Normal):
        return distribution
    if distribution.is_point:
        entries = tfd.Deterministic(distribution.mean())
    else:
        entries = tfd.Normal(distribution.mean(), distribution.stddev())
    return tfd.Independent(entries, len(distribution.shape))


def kl_divergence(posterior, prior):
    """KL(q, p) as TensorFlow Probability computes it, or None if it does not."""
    from tensorflow_probability import distributions as tfd

    q, p = to_tfp(posterior), to_tfp(prior)
    if isinstance(_entries(q), tfd.MultivariateNormalLinearOperator):
        if isinstance(prior, Normal) and not prior.is_point:
            rows = tfd.MultivariateNormalDiag(prior.mean(), prior.stddev())
            p = tfd.Independent(rows, len(prior.shape) - 1)
    try:
        found = tfd.kl_divergence(q, p)
    except (NotImplementedError, ValueError):  # Or of entries in another arrangement.
        return None
    return ops.sum(found)


def _entries(distribution):
    from tensorflow_probability import distributions as tfd

    while isinstance(distribution, tfd.Independent):
        distribution = distribution.distribution
    return distribution
