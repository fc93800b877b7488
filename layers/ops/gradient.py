"""Gradients of a function, which `keras.ops` does not have."""

import keras
from keras import ops


def gradients(function, tensors):
    """Returns the gradients of a scalar function of tensors.

    Args:
        function: Takes the tensors, one an argument, and returns a scalar.
        tensors: List of floating tensors.

    Returns:
        List of tensors of their shapes; zeros for what the scalar does not depend on.
    """
    if not tensors:
        return []
    if keras.backend.backend() == "jax":
        import jax

        tensors = [ops.convert_to_tensor(tensor) for tensor in tensors]
        return list(jax.grad(function, tuple(range(len(tensors))))(*tensors))
    import tensorflow as tf

    tensors = [tf.convert_to_tensor(tensor) for tensor in tensors]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(tensors)
        value = function(*tensors)
    found = tape.gradient(
        value, tensors, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    # Of an embedding's table TensorFlow gives the rows that were read.
    return [tf.convert_to_tensor(gradient) for gradient in found]
