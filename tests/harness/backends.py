"""What value tests need and keras.ops does not have: XLA and gradients."""

import keras
import numpy as np
from keras import ops


def compiled(function):
    """Returns the function of tensors, compiled by XLA.

    What is to stay unknown to the compiler must be an argument: a constant is folded
    before XLA sees it.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, jit_compile=True)


def gradients(function, *arrays):
    """Returns the gradients of a scalar function, one NumPy array an argument."""
    tensors = [ops.convert_to_tensor(array) for array in arrays]
    if keras.backend.backend() == "jax":
        import jax

        found = jax.grad(function, argnums=tuple(range(len(tensors))))(*tensors)
    else:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = function(*tensors)
        found = tape.gradient(value, tensors)
    return [np.asarray(ops.convert_to_numpy(gradient)) for gradient in found]
