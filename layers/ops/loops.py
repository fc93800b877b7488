"""A loop over steps, arrays that it fills, and the derivative of a step."""

import keras
from keras import ops


def loop(step, carry, turns):
    """Runs a step again and again: carry = step(i, carry) for i = 0 ... turns - 1.

    Args:
        step: Function of the turn's number i and of the carry, which returns the next
            carry.
        carry: Structure of tensors and arrays (`array`), the first carry.
        turns: How many turns: an integer or a scalar tensor.

    Returns:
        The last carry.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.fori_loop(0, turns, step, carry)
    import tensorflow as tf

    shapes = [getattr(tensor, "shape", None) for tensor in keras.tree.flatten(carry)]

    def body(i, flat):
        new = keras.tree.flatten(step(i, keras.tree.pack_sequence_as(carry, flat)))
        for tensor, shape in zip(new, shapes, strict=True):
            if shape is not None:
                tensor.set_shape(shape)
        return i + 1, new

    _, flat = tf.while_loop(
        lambda i, _: i < turns, body, (tf.constant(0), keras.tree.flatten(carry))
    )
    return keras.tree.pack_sequence_as(carry, flat)


def array(length, like):
    """An array of tensors, for a loop to read and write one at a turn.

    Written to, none is copied but the one, also where each operation is run by itself.

    Args:
        length: How many tensors: an integer or, on TensorFlow, a scalar tensor.
        like: A tensor of the same shape and dtype as each.

    Returns:
        The array, filled with zeros.
    """
    zeros = ops.zeros((length, *ops.shape(like)), dtype=like.dtype)
    if keras.backend.backend() == "jax":
        return zeros
    import tensorflow as tf

    empty = tf.TensorArray(like.dtype, length, clear_after_read=False)
    return empty.unstack(zeros)


def read(array, i):
    """Tensor i of an array."""
    if keras.backend.backend() == "jax":
        return array[i]
    return array.read(i)


def write(array, i, tensor):
    """The array with this as its tensor i."""
    if keras.backend.backend() == "jax":
        return array.at[i].set(tensor)
    return array.write(i, tensor)


def stacked(array):
    """The tensors of an array along a new first axis."""
    return array if keras.backend.backend() == "jax" else array.stack()


def compiled_once(function):
    """The function, which JAX, run eagerly, does not compile at each call anew.

    Args:
        function: Function of structures of tensors.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    return function


def vjp(function, *args):
    """What a function gives, and how its gradient is pulled back to its arguments.

    Args:
        function: Function of structures of floating tensors, which returns a tuple.
        *args: Its arguments.

    Returns:
        The function's outputs, and a function that takes the outputs' gradients, a
        tuple, and returns the arguments'.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.vjp(function, *args)
    import tensorflow as tf

    flat = keras.tree.flatten(args)
    with tf.GradientTape() as tape:
        tape.watch(flat)
        outputs = function(*args)

    def pull(gradients):
        found = tape.gradient(
            list(outputs), flat, list(gradients), unconnected_gradients="zero"
        )
        return keras.tree.pack_sequence_as(args, found)

    return outputs, pull


def at_step(sequences, t):
    """Returns step t, a scalar tensor, of sequences `[B, T, ...]`."""
    shape = ops.shape(sequences)
    start = [0, t] + [0] * (len(shape) - 2)
    return ops.squeeze(ops.slice(sequences, start, [shape[0], 1, *shape[2:]]), 1)
