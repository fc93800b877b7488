"""Derivatives of a function, which `keras.ops` does not have."""

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


def with_gradient(function, gradient):
    """Returns a function with a gradient of its own; no tape records its inside.

    Where a gradient is taken inside of what is differentiated again, what the function
    gives has its own gradient there too. (With `keras.ops.custom_gradient` it would
    have, on JAX, that of the function's inside.)

    Args:
        function: Takes tensors, and returns a tuple of tensors.
        gradient: Takes a tuple of these tensors and one of the gradients of what the
            function returns, and returns the tensors' gradients, None of those without.

    Returns:
        A function as the first.
    """
    if keras.backend.backend() == "jax":
        import jax

        whole = jax.custom_vjp(function)
        whole.defvjp(lambda *given: (whole(*given), given), gradient)
        return whole
    import tensorflow as tf

    @tf.custom_gradient
    def whole(*given):
        outputs = function(*map(tf.stop_gradient, given))
        return outputs, lambda *upstream: gradient(given, upstream)

    return whole


def jacobian_products(function, tensors, vectors):
    """Returns what a function changes by along vectors: its Jacobian J times each.

    Jᵀu, which the gradient gives, is linear in u, so that its gradient by u along v is
    J v: layers with a gradient of their own, or with loops, need no other derivative.

    Args:
        function: Takes the tensors, one an argument, and returns a tensor.
        tensors: List of floating tensors.
        vectors: List of vectors, each a list of tensors of their shapes.

    Returns:
        Tensor `[len(vectors), ...]`, with further axes of the function's value.
    """
    vectors = [
        [ops.cast(v, t.dtype) for v, t in zip(vector, tensors, strict=True)]
        for vector in vectors
    ]
    if keras.backend.backend() == "jax":
        import jax

        value, transposed = jax.vjp(function, *tensors)
        _, product = jax.vjp(transposed, ops.zeros_like(value))
        columns = [ops.stack(column) for column in zip(*vectors, strict=True)]
        return jax.vmap(lambda *vector: product(vector)[0])(*columns)
    import tensorflow as tf

    zero = tf.UnconnectedGradients.ZERO
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as outer:
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch(tensors)
            value = function(*tensors)
        u = tf.zeros_like(value)
        outer.watch(u)
        found = inner.gradient(value, tensors, u, unconnected_gradients=zero)
        found = [tf.convert_to_tensor(gradient) for gradient in found]
    return ops.stack(
        [outer.gradient(found, u, v, unconnected_gradients=zero) for v in vectors]
    )
