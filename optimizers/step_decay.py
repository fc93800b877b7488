"""A learning rate that warms up and then falls in steps."""

from collections.abc import Iterable

import keras
from keras import ops

from ..layers.ops.arguments import integer, positive


@keras.saving.register_keras_serializable(package="kzoo")
class StepDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that grows linearly for a while and then falls in steps.

    With the peak η, w steps of warm-up and the boundaries b_1 < b_2 < ..., the learning
    rate of step t = 0, 1, 2, ... is

        η(t) = η min(1, t / w) ρ^k(t),   k(t) the number of boundaries b_i <= t.

    Reference: Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1
    Hour", 2017. https://arxiv.org/abs/1706.02677

    Args:
        peak: η, the greatest learning rate, above 0.
        boundaries: b_1, b_2, ..., the first steps that have the next lower learning
            rate, in ascending order.
        factor: ρ, above 0, what the learning rate is multiplied by at each of them.
        warmup_steps: w; with 0 the first step has η.

    Raises:
        ValueError: If `peak` or `factor` is not above 0, or steps are no integers of at
            least 0, no list of them, or not in ascending order.

    Example:

    >>> from kzoo.optimizers import StepDecay
    >>> rate = StepDecay(1.0, boundaries=[6, 8], factor=0.5, warmup_steps=2)
    >>> [float(rate(step)) for step in (0, 1, 2, 5, 6, 7, 8)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.5, 0.25]
    """

    def __init__(self, peak, boundaries, factor, warmup_steps=0):
        self.peak = positive("peak", peak)
        if not isinstance(boundaries, Iterable):
            raise ValueError(
                "expected `boundaries` to be a list of steps. Received: "
                f"boundaries={boundaries!r}"
            )
        self.boundaries = [integer("boundaries", b, least=0) for b in boundaries]
        if self.boundaries != sorted(self.boundaries):
            raise ValueError(
                "expected `boundaries` in ascending order. Received: "
                f"boundaries={boundaries}"
            )
        self.factor = positive("factor", factor)
        self.warmup_steps = integer("warmup_steps", warmup_steps, least=0)

    def __call__(self, step):
        """Returns the learning rate of a step."""
        t = ops.cast(step, "float32")
        rate = ops.convert_to_tensor(self.peak, "float32")
        if self.warmup_steps:
            rate = rate * ops.minimum(1.0, t / self.warmup_steps)
        for boundary in self.boundaries:
            rate = rate * ops.where(t >= boundary, self.factor, 1.0)
        return rate

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            "peak": self.peak,
            "boundaries": self.boundaries,
            "factor": self.factor,
            "warmup_steps": self.warmup_steps,
        }
