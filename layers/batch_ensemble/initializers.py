"""Initializers that make a BatchEnsemble's members differ."""

import random

import keras

from ..ops.arguments import finite, is_integer, is_number
from ..ops.random import bernoulli


@keras.saving.register_keras_serializable(package="kzoo")
class RandomSign(keras.initializers.Initializer):
    """Draws +1 with a given probability, else -1.

    Random signs as fast weights start the members far apart: r sᵀ then flips the
    signs of half of the shared kernel's entries, differently for each member.

    Takes `edward2.initializers.RandomSign`'s arguments, except: `probs` defaults to
    0.5 (edward2's 1.0 gives +1 only), there is no `dtype` (the weight's is used), and
    the config holds all that is needed to make the initializer again.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        probs: Probability of +1.
        seed: Integer, which always gives the same signs. Without one, a seed is
            drawn when the initializer is made (`keras.utils.set_random_seed`
            governs it).

    Raises:
        ValueError: If `probs` is not in [0, 1] or `seed` is not an integer.

    Example:

    >>> from kzoo.layers import RandomSign
    >>> signs = RandomSign(seed=1)((2, 50))
    >>> sorted(set(signs.__array__().ravel().tolist()))
    [-1.0, 1.0]
    """

    def __init__(self, probs=0.5, seed=None):
        if not (is_number(probs) and 0 <= probs <= 1):
            raise ValueError(
                f"`probs` must be a probability, in [0, 1]. Received: probs={probs!r}"
            )
        if not (seed is None or is_integer(seed)):
            raise ValueError(
                f"`seed` must be an integer or None. Received: seed={seed!r}"
            )
        self.probs = float(probs)
        self.seed = None if seed is None else int(seed)
        self._drawn_seed = random.randrange(2**31) if seed is None else self.seed

    def __call__(self, shape, dtype=None):
        """Returns a tensor of the shape, of +1 and -1."""
        return bernoulli(shape, self._drawn_seed, self.probs, dtype) * 2 - 1

    def get_config(self):
        """Returns the constructor's arguments."""
        return {"probs": self.probs, "seed": self.seed}


def batch_ensemble_initializer(value, seed=None):
    """Returns an initializer of fast weights from one number.

    - 0 < value <= 1: random signs, +1 with probability `value`;
    - value < 0: normal with mean 1 and standard deviation -value;
    - value = 0: ones, all members alike.

    uncertainty-baselines' ResNets for CIFAR and ImageNet use -0.5.

    Args:
        value: The number.
        seed: Integer, which always gives the same weights, so give each weight its
            own. Without one, a BatchEnsemble layer draws a new seed for each weight,
            also where one initializer is given to several.

    Returns:
        A `keras.initializers.Initializer`.

    Raises:
        ValueError: If `value` is no finite number, or greater than 1.

    Example:

    >>> from kzoo.layers import batch_ensemble_initializer
    >>> type(batch_ensemble_initializer(0.5)).__name__
    'RandomSign'
    >>> batch_ensemble_initializer(-0.5).get_config()["stddev"]
    0.5
    """
    value = finite("value", value)
    if value > 1:
        raise ValueError(
            "`value` must be a probability (up to 1), 0, or minus a standard "
            f"deviation. Received: value={value}"
        )
    if value > 0:
        return RandomSign(value, seed=seed)
    if value < 0:
        return keras.initializers.RandomNormal(mean=1.0, stddev=-value, seed=seed)
    return keras.initializers.Ones()
