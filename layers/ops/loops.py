"""A loop over steps, and the derivative of one of them, on both backends."""

import keras
from keras import ops


def scan(step, carry, length, dtypes=(), reverse=False):
    """Runs a step again and again, and stacks what each gives.

    `keras.ops.scan` on TensorFlow wants outputs that are shaped as the carry; these
    may be any.

    Args:
        step: Function of the carry and of the step's number i, which returns the next
            carry and a tuple of outputs.
        carry: Structure of tensors, the first carry.
        length: How many steps: an integer or, on TensorFlow, a scalar tensor.
        dtypes: The dtypes of the outputs.
        reverse: Whether i runs from length - 1 to 0.

    Returns:
        The last carry, and a tuple of the outputs, those of step i at index i of a new
        first axis.
    """
    if isinstance(length, int) and length == 1:
        carry, outputs = step(carry, 0)
        return carry, tuple(ops.expand_dims(y, 0) for y in outputs)
    if keras.backend.backend() == "jax":
        import jax

        numbers = jax.numpy.arange(length, dtype="int32")
        return jax.lax.scan(step, carry, numbers, reverse=reverse)
    import tensorflow as tf

    first = [tf.convert_to_tensor(c) for c in keras.tree.flatten(carry)]

    def body(turn, flat, arrays):
        i = length - 1 - turn if reverse else turn
        new, outputs = step(keras.tree.pack_sequence_as(carry, flat), i)
        new = keras.tree.flatten(new)
        for tensor, like in zip(new, first, strict=True):
            tensor.set_shape(like.shape)
        arrays = [a.write(i, y) for a, y in zip(arrays, outputs, strict=True)]
        return turn + 1, new, arrays

    arrays = [tf.TensorArray(dtype, length) for dtype in dtypes]
    _, flat, arrays = tf.while_loop(
        lambda turn, *_: turn < length, body, (tf.constant(0), first, arrays)
    )
    carry = keras.tree.pack_sequence_as(carry, flat)
    return carry, tuple(array.stack() for array in arrays)


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


def barrier(tensors):
    """Keeps apart what is compiled before and after.

    What is made of the same tensors between two barriers is compiled in the same way
    wherever it stands. Merged with what is around it, it may differ in its last bits.

    Args:
        tensors: Structure of tensors.

    Returns:
        The tensors.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.optimization_barrier(tensors)
    import tensorflow as tf
    from tensorflow.compiler.tf2xla.ops.gen_xla_ops import xla_optimization_barrier
    from tensorflow.python.ops import control_flow_util

    flat = keras.tree.flatten(tensors)
    graph = tf.compat.v1.get_default_graph()
    if tf.executing_eagerly():
        return tensors
    if control_flow_util.GraphOrParentsInXlaContext(graph):
        kept = xla_optimization_barrier(input=flat)
    else:  # An identity that TensorFlow's own optimizer must leave where it stands.
        kept = [tf.raw_ops.PlaceholderWithDefault(input=x, shape=x.shape) for x in flat]
    for tensor, like in zip(kept, flat, strict=True):
        tensor.set_shape(like.shape)
    return keras.tree.pack_sequence_as(tensors, kept)


def kept(x):
    """A tensor behind a `barrier`, through which its gradient passes.

    So a product cannot be merged with a sum it goes into, which rounds but once.
    """

    @ops.custom_gradient
    def identity(x):
        def gradient(*upstream):
            return upstream[0]

        return barrier(x), gradient

    return identity(x)


def isolated(function):
    """A function of one tensor, compiled by itself wherever it stands.

    Args:
        function: Function of a tensor.

    Returns:
        The function, with a gradient that computes it anew.
    """

    @ops.custom_gradient
    def alone(x):
        def gradient(*upstream):
            _, pull = vjp(lambda x: (function(x),), barrier(x))
            return pull(upstream)[0]

        return barrier(function(barrier(x))), gradient

    return alone


def at_step(sequences, t):
    """Returns step t, a scalar tensor, of sequences `[B, T, ...]`."""
    shape = ops.shape(sequences)
    start = [0, t] + [0] * (len(shape) - 2)
    return ops.squeeze(ops.slice(sequences, start, [shape[0], 1, *shape[2:]]), 1)
