"""K-FAC's adaptive mode: steps and damping by a quadratic model of the loss."""

import keras
from keras import ops

from ...layers.ops.arguments import finite, integer, is_number, positive, share

# Keras's arguments that change gradients or steps.
CHANGES = (
    "weight_decay",
    "clipnorm",
    "global_clipnorm",
    "clipvalue",
    "gradient_accumulation_steps",
)


@keras.saving.register_keras_serializable(package="kzoo")
class Adaptation:
    """How a `KFAC` sets the size of its steps, its momentum and its damping by itself.

    With Δ = -U, the gradient ∇h divided by the approximate curvature, and the last
    update δ0, the update δ is where a quadratic model of the loss h is lowest, which
    has the exact Fisher information F of the batch:

        M(δ) - M(0) = ∇hᵀδ + ½ δᵀCδ,   C = F + (λ + η) I
        δ = α Δ + μ δ0,   [α; μ] = -[ΔᵀCΔ, ΔᵀCδ0; ΔᵀCδ0, δ0ᵀCδ0]⁻¹ [∇hᵀΔ; ∇hᵀδ0]

    There M(δ) - M(0) = ½ ∇hᵀδ. The damping λ follows how well the model did, by the
    rule of Levenberg and Marquardt, at the first and then at every T1-th update:

        ρ = (h(θ + δ) - h(θ)) / (M(δ) - M(0))
        λ ← ω1 λ  if ρ > 3/4,   λ ← λ / ω1  if ρ < 1/4,   ω1 = ω^T1

    A loss that is no number raises λ. In the inverses, γ² stands for λ + η. γ begins as
    √(λ + η); at the first and then at every T2-th update each of γ, ω2 γ and γ / ω2,
    ω2 = ω^(T2/2), is tried, and that one kept of which the update's M(δ) is lowest.

        model.compile(optimizer=KFAC(model, damping=1.0, adaptation=Adaptation()), ...)

    (The paper begins with λ = 150, of a cross-entropy that sums over D outputs; Keras's
    averages over them, of which the same is 150 / D.)

    This is for batches that tell the whole loss: all examples, or thousands of them. On
    small ones noise counts as progress, and a fixed damping with a learning rate does
    better. Steps are as M has them: what else would change gradients or steps (a norm
    constraint, weight decay, clipping, accumulated gradients) is refused, and so is
    training in more than one of TensorFlow's replicas.

    Reference: Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored
    Approximate Curvature", 2015. https://arxiv.org/abs/1503.05671

    Args:
        damping_interval: T1, or None to keep λ as it is.
        gamma_interval: T2, or None for inverses with λ + η itself.
        momentum: Whether to take δ0 into the update; without, μ is 0.
        l2: η, the curvature of ℓ2 regularizers, which F lacks: 2 l if all weights have
            `keras.regularizers.L2(l)` (the paper's is 1e-5). It regularizes nothing
            itself.
        subsample: k: F is that of every k-th example of the batch (the paper's k is 4).
        decay: ω.
        thresholds: The bounds of ρ between which λ stays.
        bounds: The smallest and the largest λ, and γ².

    Raises:
        ValueError: If an argument is out of range.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.optimizers import KFAC, Adaptation
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(KFAC(model, damping=1e-6, adaptation=Adaptation()), "mse")
    >>> x = np.random.default_rng(0).normal(size=(32, 3)).astype("float32")
    >>> y = x @ np.array([[1.0], [-2.0], [3.0]], "float32") + 4
    >>> loss = model.fit(x, y, batch_size=32, epochs=8, verbose=0)
    >>> print(model.evaluate(x, y, verbose=0) < 1e-6)
    True
    """

    def __init__(
        self,
        damping_interval=5,
        gamma_interval=20,
        momentum=True,
        l2=0.0,
        subsample=1,
        decay=0.95,
        thresholds=(0.25, 0.75),
        bounds=(1e-8, 1e8),
    ):
        for name, value in (
            ("damping_interval", damping_interval),
            ("gamma_interval", gamma_interval),
        ):
            setattr(self, name, value if value is None else integer(name, value))
        self.momentum = bool(momentum)
        if finite("l2", l2) < 0:
            raise ValueError(f"expected `l2` to be at least 0. Received: l2={l2!r}")
        self.l2 = float(l2)
        self.subsample = integer("subsample", subsample)
        self.decay = share("decay", decay)
        self.thresholds = _pair(finite, "thresholds", thresholds)
        self.bounds = _pair(positive, "bounds", bounds)

    def damping(self, damping, ratio):
        """Returns λ after an update.

        Args:
            damping: λ.
            ratio: ρ.
        """
        omega = self.decay**self.damping_interval
        low, high = self.thresholds
        # What is no number is neither above nor between.
        factor = ops.where(
            ratio > high, omega, ops.where(ratio >= low, 1.0, 1.0 / omega)
        )
        return ops.clip(damping * ops.cast(factor, "float32"), *self.bounds)

    def gammas(self, gamma):
        """Returns the three values of γ to choose from, the present one first."""
        omega = self.decay ** (self.gamma_interval / 2)
        low, high = self.bounds
        factors = ops.convert_to_tensor([1.0, omega, 1.0 / omega], "float32")
        return ops.clip(gamma * factors, low**0.5, high**0.5)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            "damping_interval": self.damping_interval,
            "gamma_interval": self.gamma_interval,
            "momentum": self.momentum,
            "l2": self.l2,
            "subsample": self.subsample,
            "decay": self.decay,
            "thresholds": list(self.thresholds),
            "bounds": list(self.bounds),
        }

    @classmethod
    def from_config(cls, config):
        """Makes one from what `get_config` returns."""
        return cls(**config)


def checked(adaptation, damping, norm_constraint, others):
    """Returns an optimizer's argument, having refused what has no part beside it.

    Args:
        adaptation: An `Adaptation`, or None.
        damping: λ.
        norm_constraint: c, or None.
        others: Dict of Keras's arguments.
    """
    if adaptation is None:
        return None
    if not isinstance(adaptation, Adaptation):
        raise ValueError(
            f"expected an Adaptation or None. Received: adaptation={adaptation!r}"
        )
    if not is_number(damping):
        raise ValueError(
            "expected a number, with which an adaptation begins. Received: "
            f"damping={damping!r}"
        )
    given = {"norm_constraint": norm_constraint}
    given |= {name: others.get(name) for name in CHANGES}
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"expected no `{name}` beside an adaptation, whose steps are as its "
                f"model of the loss has them. Received: {name}={value!r}"
            )
    return adaptation


def lowest(gradient, directions, curvature, damping):
    """Minimizes M along one or two directions.

    Args:
        gradient: ∇h, a list of tensors.
        directions: Δ, or Δ and δ0, each such a list. One that is zero, or nearly a
            multiple of the one before it, is left out.
        curvature: A function of such directions that returns vᵀFw of all pairs.
        damping: λ + η.

    Returns:
        Pair of δ and M(δ) - M(0).
    """
    # In one dtype, of float32 at least, whatever those of the weights; and of length 1,
    # so that neither products nor half precision lose what is small.
    given = [v.dtype for v in sum(directions, [])]
    dtype = keras.backend.result_type("float32", *given)
    gradient, *directions = [
        [ops.cast(v, dtype) for v in vector] for vector in (gradient, *directions)
    ]
    directions = [_unit(direction) for direction in directions]
    slopes = [_dot(gradient, direction) for direction in directions]
    inner = ops.stack([ops.stack([_dot(v, w) for w in directions]) for v in directions])
    f = ops.cast(curvature(directions), dtype)
    c = f + ops.cast(damping, dtype) * inner
    coefficients = _solve(c, slopes)
    change = [
        sum(alpha * v for alpha, v in zip(coefficients, of_variable, strict=True))
        for of_variable in zip(*directions, strict=True)
    ]
    return change, 0.5 * sum(c * s for c, s in zip(coefficients, slopes, strict=True))


def best_gamma(gammas, value):
    """Returns that γ of three for which a value is lowest; the first if none is lower.

    Args:
        gammas: Tensor `[3]`.
        value: A function of γ, which is not taken where it gives no number.
    """

    def compare(i, found):
        least, chosen = found
        gamma = ops.take(gammas, i)
        at = ops.cast(value(gamma), "float32")
        lower = at < least  # Which what is no number is not.
        return [ops.where(lower, at, least), ops.where(lower, gamma, chosen)]

    start = [ops.full((), float("inf"), "float32"), gammas[0]]
    return ops.fori_loop(0, 3, compare, start)[1]


def _solve(c, slopes):
    """Returns -C⁻¹ s, of one number or two, 0 for what C has no curvature of."""
    first = ops.where(c[0, 0] > 0, c[0, 0], float("inf"))
    if len(slopes) == 1:
        return [-slopes[0] / first]
    # What C has along δ0 that is not along Δ already; rounding makes it no smaller.
    rest = c[1, 1] - c[0, 1] ** 2 / first
    independent = rest > 1e-6 * c[1, 1]
    mu = -(slopes[1] - c[0, 1] * slopes[0] / first) / ops.where(independent, rest, 1.0)
    mu = ops.where(independent, mu, 0.0)
    return [-(slopes[0] + c[0, 1] * mu) / first, mu]


def _unit(direction):
    length = ops.sqrt(_dot(direction, direction))
    length = ops.where(length == 0, ops.ones_like(length), length)
    return [v / length for v in direction]


def _dot(one, other):
    return sum(ops.sum(v * w) for v, w in zip(one, other, strict=True))


def _pair(check, name, value):
    """Returns an argument that must be two numbers, the second one larger."""
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    if not (pair and all(map(is_number, value))) or value[0] >= value[1]:
        raise ValueError(
            f"expected `{name}` to be two numbers, the first one smaller. "
            f"Received: {name}={value!r}"
        )
    return tuple(check(name, number) for number in value)
