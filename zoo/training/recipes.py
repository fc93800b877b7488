"""Named ways to train: what `train` does unless it is asked for something else."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import keras

from ...layers.batch_ensemble.base import fast_weights
from ...optimizers import Lookahead, StepDecay, with_fast_weights

WARMUP = 0.05  # share of the steps


@dataclass(frozen=True)
class Recipe:
    """What `kzoo.zoo.train` takes from a recipe.

    Attributes:
        arguments: dict of arguments of `train`.
        schedule: Function of a learning rate, of the number of epochs and of their
            steps to the schedule of it.
        optimizer: Function of a learning rate or schedule and a model to the
            optimizer.
        scales: Whether the learning rate is that of the recipe's batch size, and that
            of others in proportion.
    """

    arguments: dict
    schedule: Callable
    optimizer: Callable
    scales: bool = False


def cosine(learning_rate, epochs, steps):
    """Up to a learning rate within 5 % of the steps, and along half a cosine to 0.

    Args:
        learning_rate: The peak.
        epochs: Number of epochs.
        steps: Number of steps in each.
    """
    steps = epochs * steps
    warmup = int(WARMUP * steps)
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warmup else learning_rate,
        decay_steps=steps - warmup,
        warmup_target=learning_rate if warmup else None,
        warmup_steps=warmup,
    )


def falls_in_steps(learning_rate, epochs, steps, parts):
    """Up to a learning rate within an epoch; a fifth of it after each of these parts.

    Args:
        learning_rate: The peak.
        epochs: Number of epochs.
        steps: Number of steps in each.
        parts: Parts of the epochs, from 0 to 1, in ascending order.
    """
    boundaries = [round(part * epochs * steps) for part in parts]
    return StepDecay(learning_rate, boundaries, factor=0.2, warmup_steps=steps)


def lookahead_adam(learning_rate, model):
    """`Lookahead(Adam(learning_rate))`.

    Args:
        learning_rate: Number or schedule.
        model: The model to train.
    """
    return Lookahead(keras.optimizers.Adam(learning_rate))


def nesterov(learning_rate, model):
    """SGD with Nesterov's momentum, whose steps along fast weights are half as long.

    Args:
        learning_rate: Number or schedule.
        model: The model to train.
    """
    sgd = keras.optimizers.SGD(learning_rate, momentum=0.9, nesterov=True)
    return with_fast_weights(sgd, model, 0.5) if fast_weights(model) else sgd


_CIFAR = {
    "dataset": "cifar10",
    "batch_size": 128,
    "learning_rate": 0.1,
    # uncertainty-baselines repeats the batch for each member, and pads images by two
    # pixels on each side.
    "members": "tile",
    "max_shift": 2,
    "flip": True,
}
RECIPES = {
    "default": Recipe(
        {
            "dataset": "digits",
            "epochs": 40,
            "batch_size": 64,
            "learning_rate": 1e-3,
            "members": "split",
            "max_shift": 0,
        },
        cosine,
        lookahead_adam,
    ),
    # What uncertainty-baselines has for CIFAR. There an ensemble's epochs of decay, 80,
    # 160 and 180, are of 200, and made 100, 200 and 225 of 250.
    "cifar": Recipe(
        {**_CIFAR, "epochs": 200},
        partial(falls_in_steps, parts=(0.3, 0.6, 0.8)),
        nesterov,
        scales=True,
    ),
    "cifar_batch_ensemble": Recipe(
        {**_CIFAR, "epochs": 250},
        partial(falls_in_steps, parts=(0.4, 0.8, 0.9)),
        nesterov,
        scales=True,
    ),
}
