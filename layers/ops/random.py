"""Random draws that do not change when a function is compiled.

What draws takes the shape, the seed and the dtype of what it draws. A seed is

- a `keras.random.SeedGenerator`, which advances: each draw is a new one;
- an integer or a pair of integers (a tensor of shape `[2]`, such as a
  SeedGenerator's `next()`), which always gives the same draw.

Only the bits come from the backend: Philox on TensorFlow, Threefry on JAX. What is
made of them is written here, once, because TensorFlow's own float draws differ
between XLA and its other kernels. So draws are equal with and without jit: uniforms,
signs and Bernoullis exactly, normals up to the rounding of erfinv. The two backends
draw different numbers of the same distribution.
"""

import functools
import math
import operator

import keras
import numpy as np
from keras import ops

from .arguments import is_integer

# Bits of the significand: so many random bits make a uniform number exactly.
_SIGNIFICAND_BITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}


def uniform(shape, seed, dtype=None):
    """Draws from the uniform distribution on [0, 1).

    All multiples of 2^-b, b the bits of the dtype's significand, are equally likely;
    1 is never drawn, in half precision neither.

    Args:
        shape: Tuple of integers or, on TensorFlow, scalar tensors.
        seed: SeedGenerator, integer, or tensor of two integers.
        dtype: Floating dtype. Defaults to `keras.config.floatx()`.

    Returns:
        Tensor of the shape and dtype.

    Raises:
        ValueError: If the dtype is not a floating one, or the seed or the shape
            cannot be used.
    """
    dtype = _float_dtype(dtype)
    bits = _SIGNIFICAND_BITS[dtype]
    return _integers(shape, seed, bits, dtype) * 2.0**-bits


def normal(shape, seed, dtype=None):
    """Draws from the normal distribution with mean 0 and variance 1.

    Args:
        shape: Tuple of integers or, on TensorFlow, scalar tensors.
        seed: SeedGenerator, integer, or tensor of two integers.
        dtype: Floating dtype. Defaults to `keras.config.floatx()`.

    Returns:
        Tensor of the shape and dtype.

    Raises:
        ValueError: If the dtype is not a floating one, or the seed or the shape
            cannot be used.
    """
    return _central_normal(shape, seed, dtype, probability=1.0)


def truncated_normal(shape, seed, dtype=None):
    """Draws from the normal distribution cut to [-2, 2], not rescaled.

    Its mean is 0 and its standard deviation 0.8796.

    Args:
        shape: Tuple of integers or, on TensorFlow, scalar tensors.
        seed: SeedGenerator, integer, or tensor of two integers.
        dtype: Floating dtype. Defaults to `keras.config.floatx()`.

    Returns:
        Tensor of the shape and dtype.

    Raises:
        ValueError: If the dtype is not a floating one, or the seed or the shape
            cannot be used.
    """
    return _central_normal(shape, seed, dtype, probability=math.erf(math.sqrt(2.0)))


def random_sign(shape, seed, dtype=None):
    """Draws -1 or +1, with equal probability.

    Args:
        shape: Tuple of integers or, on TensorFlow, scalar tensors.
        seed: SeedGenerator, integer, or tensor of two integers.
        dtype: Any signed dtype. Defaults to `keras.config.floatx()`.

    Returns:
        Tensor of the shape and dtype.

    Raises:
        ValueError: If the dtype has no -1, or the seed or the shape cannot be used.
    """
    dtype = _dtype(dtype)
    if dtype == "bool" or dtype.startswith("uint"):
        raise ValueError(f"`dtype` must hold -1. Received: {dtype!r}")
    size = functools.reduce(operator.mul, _check_shape(shape), 1)
    # One random word holds 32 signs.
    words = _words((-(-size // 32), 1), seed)
    bits = ops.bitwise_and(ops.right_shift(words, np.arange(32, dtype="uint32")), 1)
    bits = ops.reshape(ops.reshape(bits, (-1,))[:size], shape)
    return ops.cast(bits, dtype) * 2 - 1


def bernoulli(shape, seed, probability=0.5, dtype=None):
    """Draws 1 with the given probability, else 0.

    Args:
        shape: Tuple of integers or, on TensorFlow, scalar tensors.
        seed: SeedGenerator, integer, or tensor of two integers.
        probability: Probability of 1: a number or a tensor that broadcasts to the
            shape. 0 and 1 are exact, others are rounded up to a multiple of 2^-24.
        dtype: Any dtype, `"bool"` included. Defaults to `keras.config.floatx()`.

    Returns:
        Tensor of the shape and dtype.

    Raises:
        ValueError: If the seed or the shape cannot be used.
    """
    draws = uniform(shape, seed, "float32") < ops.cast(probability, "float32")
    return ops.cast(draws, _dtype(dtype))


def draw_together(draw, shapes, seed, dtype=None):
    """Draws tensors of many shapes at once, which compiles faster than one by one.

    Args:
        draw: One of this file's functions of shape, seed and dtype.
        shapes: List of shapes, or None in the place of one.
        seed: SeedGenerator, integer, or tensor of two integers.
        dtype: As `draw` takes it.

    Returns:
        List of tensors, and None where a shape is.
    """
    sizes = [0 if shape is None else math.prod(shape) for shape in shapes]
    flat = draw((sum(sizes),), seed, dtype)
    found, start = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        part = None if shape is None else ops.reshape(flat[start : start + size], shape)
        found.append(part)
        start += size
    return found


def own_initializer(initializer):
    """Returns an initializer that no other weight uses.

    Without a seed a Keras initializer draws one when it is made, and then gives the
    same numbers each time: given to two weights, it would make them equal.

    Args:
        initializer: Anything that `keras.initializers.get` takes.

    Returns:
        Initializer, with a seed of its own unless it was given one.
    """
    initializer = keras.initializers.get(initializer)
    if isinstance(initializer, keras.initializers.Initializer):
        return initializer.clone()
    return initializer


def seed_pair(seed):
    """Returns a seed as two integers, advancing a SeedGenerator.

    Under a `tf.distribute` strategy each replica gets a pair of its own, as its rows
    are not those of the others.

    Args:
        seed: SeedGenerator, integer, or tensor of two integers.

    Returns:
        Pair of integers, each of 32 bits.

    Raises:
        ValueError: If it is none of these.
    """
    if isinstance(seed, keras.random.SeedGenerator):
        return _of_replica(seed.next())
    if is_integer(seed):
        seed = int(seed)
        # Like a new SeedGenerator(seed)'s first pair, which is (seed, 0).
        return np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], "uint32")
    if ops.is_tensor(seed) or isinstance(seed, (np.ndarray, list, tuple)):
        if tuple(np.shape(seed)) == (2,):
            return seed
    raise ValueError(
        "`seed` must be a keras.random.SeedGenerator, an integer, or a tensor of two "
        f"integers. Received: seed={seed!r}"
    )


def nth_seed(seed, n):
    """Returns the n-th of many seeds that are made from one.

    Args:
        seed: Pair of integers or a tensor of two, as `seed_pair` returns.
        n: Integer of at least 0.

    Returns:
        Pair of integers; distinct for n below 2^32.
    """
    # Far from the pairs of a SeedGenerator, which count the second number by one.
    step = np.array([0, 0x9E3779B9 * n % 2**32], "uint32")
    return ops.bitwise_xor(ops.cast(seed, "uint32"), step)


def _central_normal(shape, seed, dtype, probability):
    """Draws from the part of the standard normal that holds the probability."""
    dtype = _float_dtype(dtype)
    # The inverse of the distribution function, z = sqrt(2) erfinv(x), with x uniform
    # on (-p, p). Half precision has too few x: it is drawn in float32 and rounded.
    wide = "float64" if dtype == "float64" else "float32"
    bits = _SIGNIFICAND_BITS[wide] - 1
    # x = (2 k + 1) / 2^b - 1 with k of b bits: symmetric about 0, exact, never +-1.
    x = (_integers(shape, seed, bits, wide) * 2 + 1) * 2.0**-bits - 1
    return ops.cast(ops.erfinv(x * probability) * math.sqrt(2.0), dtype)


def _integers(shape, seed, bits, dtype):
    """Draws integers of so many bits, as numbers of a dtype that holds them all."""
    if bits <= 32:
        return ops.cast(ops.right_shift(_words(shape, seed), 32 - bits), dtype)
    words = _words((2, *_check_shape(shape)), seed)
    high = ops.cast(ops.right_shift(words[0], 64 - bits), dtype)
    return high * 2.0**32 + ops.cast(words[1], dtype)


def _words(shape, seed):
    """Draws uniform 32-bit words."""
    shape, seed = _check_shape(shape), seed_pair(seed)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Philox with the seed for its key, as its authors allow: no two keys need be
        # far apart. tf.random would first mix the seed, in forty more operations.
        parts = tf.cast(seed, "int64") * np.array([1, 1 << 32])
        key = tf.reduce_sum(parts, keepdims=True)
        return tf.raw_ops.StatelessRandomUniformFullIntV2(
            shape=shape,
            key=tf.cast(key, "uint64"),
            counter=np.zeros(2, "uint64"),
            dtype=tf.uint32,
            alg=1,  # Philox.
        )
    import jax

    key = jax.random.wrap_key_data(ops.cast(seed, "uint32"), impl="threefry2x32")
    return jax.random.bits(key, shape, "uint32")


def _of_replica(pair):
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            # Steps of the golden ratio of 2^32 keep the replicas' keys apart.
            replica = tf.cast(context.replica_id_in_sync_group, "int64")
            key = tf.cast(pair[0], "int64") + replica * 0x9E3779B9
            return tf.stack([tf.cast(key % 2**32, pair.dtype), pair[1]])
    return pair


def _check_shape(shape):
    if any(is_integer(size) and size < 0 for size in shape):
        raise ValueError(
            f"`shape` must have no negative sizes. Received: shape={shape}"
        )
    if any(size is None for size in shape):
        raise ValueError(
            "`shape` must be known when drawing; `keras.ops.shape(x)` gives a "
            f"tensor's shape at run time. Received: shape={shape}"
        )
    return tuple(shape)


def _dtype(dtype):
    dtype = keras.backend.standardize_dtype(dtype or keras.config.floatx())
    if keras.backend.backend() == "jax":
        import jax

        # JAX has no 64-bit types unless they are enabled.
        return jax.dtypes.canonicalize_dtype(dtype).name
    return dtype


def _float_dtype(dtype):
    dtype = _dtype(dtype)
    if dtype in _SIGNIFICAND_BITS:
        return dtype
    raise ValueError(
        f"`dtype` must be one of {sorted(_SIGNIFICAND_BITS)}. Received: {dtype!r}"
    )
