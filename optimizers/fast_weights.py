"""Another step size for BatchEnsemble's fast weights than for what they share."""

import re

import keras

from ..layers.batch_ensemble.base import fast_weights
from ..layers.ops.arguments import positive
from .kfac.kfac import KFAC


@keras.saving.register_keras_serializable(package="kzoo")
class ScaledSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate schedule times a factor.

    Args:
        schedule: A `keras.optimizers.schedules.LearningRateSchedule`.
        factor: What its learning rates are multiplied by.

    Example:

    >>> import keras
    >>> from kzoo.optimizers import ScaledSchedule
    >>> whole = keras.optimizers.schedules.CosineDecay(1.0, decay_steps=10)
    >>> float(ScaledSchedule(whole, 0.5)(0))
    0.5
    """

    def __init__(self, schedule, factor):
        self.schedule = schedule
        self.factor = factor

    def __call__(self, step):
        """Returns the learning rate of a step."""
        return self.factor * self.schedule(step)

    def get_config(self):
        """Returns the constructor's arguments."""
        schedule = keras.optimizers.schedules.serialize(self.schedule)
        return {"schedule": schedule, "factor": self.factor}

    @classmethod
    def from_config(cls, config):
        """Makes a schedule from what `get_config` returns."""
        schedule = keras.optimizers.schedules.deserialize(config["schedule"])
        return cls(schedule, config["factor"])


@keras.saving.register_keras_serializable(package="kzoo", name="WithFastWeights")
class _WithFastWeights(keras.optimizers.MultiOptimizer):
    """Keras's, with a learning rate, which wrappers and their callbacks ask it for."""

    def __init__(self, optimizer_map, multiplier, **kwargs):
        super().__init__(optimizer_map, **kwargs)
        self.multiplier = multiplier

    @property
    def learning_rate(self):
        _, others = self.optimizers
        return others.learning_rate

    @learning_rate.setter
    def learning_rate(self, value):
        fast, others = self.optimizers
        fast.learning_rate = self.multiplier * value
        others.learning_rate = value

    def get_config(self):
        return {**super().get_config(), "multiplier": self.multiplier}


def with_fast_weights(optimizer, model, multiplier=0.5):
    """Makes an optimizer whose steps along BatchEnsemble's fast weights are others.

    Fast weights r and s multiply all inputs and outputs of the weights W that the
    members share. They are updated at `multiplier` times the learning rate η, and
    without weight decay (which would pull them, and with them all members, to 0
    where they are to stay near 1); all else is updated as before:

        W ← W + η Δ(W) - η λ W,   r ← r + multiplier · η Δ(r),   likewise s,

    with Δ(·) the optimizer's step, such as Adam's. The multiplier is of the update:
    gradients times a number would make no difference to Adam, whose steps do not
    depend on their size.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715 (The
    multiplier is not in the paper; 0.5, of the gradients of SGD, where that is the
    same, is in the authors' code for CIFAR and ImageNet.)

    Args:
        optimizer: A Keras optimizer with a learning rate or schedule of its own. Put
            wrappers around the result: `Lookahead(with_fast_weights(Adam(), model))`.
            (A copy of a `KFAC` is attached to the model too.)
        model: A built model with BatchEnsemble layers. It is recognised by the names
            of its layers.
        multiplier: What the learning rate of fast weights is multiplied by, above 0.

    Returns:
        A `keras.optimizers.MultiOptimizer` to be given to `compile`. Its `optimizers`
        are a copy of `optimizer` for the fast weights, and `optimizer` itself for all
        else. Its learning rate is that of all else, and a number assigned to it changes
        both. Clipping by global norm, if the optimizer has it, is over each one's
        gradients.

        What gives both one rate undoes the multiplier, as
        `keras.callbacks.LearningRateScheduler` does with a function of the epoch that
        leaves the rate so far aside. Give the optimizer a schedule instead, or the
        callback a function that returns a multiple of that rate.

    Raises:
        ValueError: If the multiplier is not above 0, the model has no fast weights, or
            others of its weights have the names of some and of their layers; if the
            optimizer is none of Keras's, wraps others, its learning rate is a function,
            or it is a `KFAC` with an `Adaptation`.

    Example:

    >>> import keras
    >>> from kzoo.layers import DenseBatchEnsemble
    >>> from kzoo.optimizers import with_fast_weights
    >>> model = keras.Sequential([keras.Input((5,)), DenseBatchEnsemble(3)])
    >>> adam = keras.optimizers.AdamW(1e-3, weight_decay=1e-2)
    >>> model.compile(with_fast_weights(adam, model), loss="mse")
    """
    multiplier = positive("multiplier", multiplier)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            f"expected an optimizer of Keras's. Received: optimizer={optimizer!r}"
        )
    if not isinstance(model, keras.Model):
        raise ValueError(f"expected a `keras.Model`. Received: model={model!r}")
    fast = fast_weights(model)
    if not fast:
        raise ValueError(
            "expected a built model with BatchEnsemble layers. Received: "
            f"{model.name}, with {sorted({type(x).__name__ for x in model.layers})}"
        )
    names = dict.fromkeys(map(_name, fast))
    ids = set(map(id, fast))
    others = [w for w in model.trainable_variables if id(w) not in ids]
    taken = [w.path for w in others if _name(w) in names]
    if taken:
        raise ValueError(
            "expected fast weights to be told from other weights by their names and "
            f"their layers': give those layers others. Received: {taken}"
        )
    if hasattr(optimizer, "inner_optimizer") or hasattr(optimizer, "optimizers"):
        raise ValueError(
            "expected an optimizer with its own update rule: put what wraps it around "
            f"the result. Received: optimizer={type(optimizer).__name__}"
        )
    if getattr(optimizer, "adaptation", None):
        raise ValueError(
            "expected a KFAC with a learning rate, of which the fast weights' is a "
            f"multiple. Received: adaptation={optimizer.adaptation!r}"
        )
    config = {**optimizer.get_config(), "name": f"{optimizer.name}_of_fast_weights"}
    rate, schedules = config["learning_rate"], keras.optimizers.schedules
    if callable(optimizer._learning_rate) and not isinstance(
        optimizer._learning_rate, schedules.LearningRateSchedule
    ):
        raise ValueError(
            "expected a learning rate that is a number or a schedule. Received: "
            f"learning_rate={optimizer._learning_rate!r}"
        )
    if isinstance(rate, dict):
        scaled = ScaledSchedule(schedules.deserialize(rate), multiplier)
        config["learning_rate"] = schedules.serialize(scaled)
    else:
        config["learning_rate"] = multiplier * rate
    if config.get("weight_decay") is not None:
        config["weight_decay"] = 0.0
    if isinstance(optimizer, KFAC):
        config["layout"] = None  # Of the curvature of all weights.
    copy = type(optimizer).from_config(config)
    if isinstance(optimizer, KFAC):
        copy.attach(model)
    # One key, for a key is an optimizer when it is loaded.
    key = f"(?:.*/)?(?:{'|'.join(map(re.escape, names))})"
    return _WithFastWeights(
        keras.optimizers.OptimizerMap(optimizer, {key: copy}),
        multiplier,
        loss_scale_factor=optimizer.loss_scale_factor,
    )


def _name(weight):
    """The end of a weight's path, which it has in a loaded model too: `layer/name`."""
    return "/".join(weight.path.split("/")[-2:])
