import keras
import numpy as np
import pytest
import scipy.stats
from keras import ops

from harness.backends import compiled
from kzoo.layers.ops import random

N = 400_000
FLOATS = ("float32", "float64", "float16", "bfloat16")
HALVES = ("float16", "bfloat16")


def biased(shape, seed, dtype=None):
    return random.bernoulli(shape, seed, 0.3, dtype)


FUNCTIONS = {
    "uniform": random.uniform,
    "normal": random.normal,
    "truncated_normal": random.truncated_normal,
    "random_sign": random.random_sign,
    "bernoulli": biased,
}
EXACT = ("uniform", "random_sign", "bernoulli")


def reference(name):
    """The distribution of the draws, by SciPy."""
    return {
        "uniform": scipy.stats.uniform(),
        "normal": scipy.stats.norm(),
        "truncated_normal": scipy.stats.truncnorm(-2, 2),
        "random_sign": scipy.stats.rv_discrete(values=([-1, 1], [0.5, 0.5])),
        "bernoulli": scipy.stats.bernoulli(0.3),
    }[name]


def numbers(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def seed_tensor(*pair):
    dtype = "uint32" if keras.backend.backend() == "jax" else "int64"
    return ops.convert_to_tensor(np.array(pair), dtype=dtype)


def z_of(values, expected, variance):
    return (np.mean(values) - expected) / np.sqrt(variance / np.size(values))


@pytest.mark.parametrize("dtype", ("float32", "float16"))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_moments(name, dtype):
    draws = numbers(FUNCTIONS[name]((N,), 7, dtype=dtype))
    target = reference(name)
    # What half precision rounds away is far below the standard errors here, but for
    # the uniform, whose 2^11 numbers k 2^-11 have a mean of 1/2 - 2^-12.
    mean = 0.5 - 2.0**-12 if (name, dtype) == ("uniform", "float16") else target.mean()
    for power in (1, 2, 3, 4):
        expected = target.expect(lambda x, p=power: (x - mean) ** p)
        second = target.expect(lambda x, p=power: (x - mean) ** (2 * p))
        variance = second - expected**2
        if variance < 1e-12:  # even powers of a sign do not vary
            np.testing.assert_allclose((draws - mean) ** power, expected)
        else:
            assert abs(z_of((draws - mean) ** power, expected, variance)) < 4.5, power


@pytest.mark.parametrize("name", ("uniform", "normal", "truncated_normal"))
def test_distribution_function(name):
    draws = numbers(FUNCTIONS[name]((N,), 11))
    assert scipy.stats.kstest(draws, reference(name).cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", FUNCTIONS)
def test_neighbours_are_independent(name):
    """Across positions, and across the successive draws of one generator."""
    generator = keras.random.SeedGenerator(3)
    draws = np.stack([numbers(FUNCTIONS[name]((50_000,), generator)) for _ in range(4)])
    target = reference(name)
    draws = (draws - target.mean()) / target.std()
    for lag in range(1, 70):  # two words of signs
        assert abs(z_of(draws[:, lag:] * draws[:, :-lag], 0.0, 1.0)) < 4.5, lag
    for i in range(4):
        for j in range(i):
            assert abs(z_of(draws[i] * draws[j], 0.0, 1.0)) < 4.5, (i, j)


def test_all_bits_of_a_word_of_signs_are_independent():
    signs = numbers(random.random_sign((20_000, 32), 5))
    correlations = signs.T @ signs / len(signs) - np.eye(32)
    assert np.abs(correlations).max() * np.sqrt(len(signs)) < 4.5
    assert np.abs(signs.mean(0)).max() * np.sqrt(len(signs)) < 4.5


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_equal_with_and_without_jit(name, dtype):
    def draw(seed):
        return FUNCTIONS[name]((1001, 7), seed, dtype=dtype)

    seed = seed_tensor(3, 5)
    plain, jitted = numbers(draw(seed)), numbers(compiled(draw)(seed))
    assert plain.std() > 0.28
    if name in EXACT:
        np.testing.assert_array_equal(plain, jitted)
    elif dtype in HALVES:  # one unit in the last place
        epsilon = {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
        np.testing.assert_allclose(plain, jitted, rtol=epsilon, atol=1e-7)
        assert np.mean(plain != jitted) < 0.01
    else:
        np.testing.assert_allclose(plain, jitted, rtol=1e-5, atol=1e-7)


def test_signs_of_every_size_equal_with_and_without_jit():
    """Less than a word, a whole one, a little more, and none."""
    for shape in ((), (31,), (32,), (33,), (0, 3), (3, 4, 5)):

        def draw(seed, shape=shape):
            return random.random_sign(shape, seed)

        plain, jitted = draw(seed_tensor(1, 2)), compiled(draw)(seed_tensor(1, 2))
        assert tuple(plain.shape) == shape
        np.testing.assert_array_equal(numbers(plain), numbers(jitted))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtype(dtype):
    # JAX has no float64 unless it is enabled.
    narrow = keras.backend.backend() == "jax" and dtype == "float64"
    expected = "float32" if narrow else dtype
    for draw in FUNCTIONS.values():
        result = draw((4,), 1, dtype=dtype)
        assert keras.backend.standardize_dtype(result.dtype) == expected
        assert keras.backend.standardize_dtype(draw((4,), 1).dtype) == "float32"


@pytest.mark.parametrize("dtype", ("int8", "int32"))
def test_integer_signs(dtype):
    signs = random.random_sign((1000,), 1, dtype)
    assert keras.backend.standardize_dtype(signs.dtype) == dtype
    np.testing.assert_array_equal(
        ops.convert_to_numpy(signs), numbers(random.random_sign((1000,), 1))
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_signs_are_plus_and_minus_one(dtype):
    signs = numbers(random.random_sign((77, 13), 2, dtype))
    assert set(signs.ravel()) == {-1.0, 1.0}


@pytest.mark.parametrize("dtype, levels", [("bfloat16", 2**8), ("float16", 2**11)])
def test_half_uniform_takes_every_level_below_one(dtype, levels):
    draws = numbers(random.uniform((N,), 5, dtype))
    np.testing.assert_array_equal(np.unique(draws), np.arange(levels) / levels)


def test_uniform_uses_all_bits():
    draws = numbers(random.uniform((N,), 5))
    assert draws.min() >= 0 and draws.max() < 1
    lowest = np.mod(draws * 2.0**24, 2)
    assert set(lowest) == {0.0, 1.0}
    assert abs(z_of(lowest, 0.5, 0.25)) < 4.5


@pytest.mark.tensorflow
def test_float64_uses_all_bits():
    draws = ops.convert_to_numpy(random.uniform((N,), 5, "float64"))
    integers = draws * 2.0**53
    np.testing.assert_array_equal(integers, np.floor(integers))
    for bit in range(53):
        on = np.mod(np.floor(integers / 2.0**bit), 2)
        assert abs(z_of(on, 0.5, 0.25)) < 4.5, bit
    normal = ops.convert_to_numpy(random.normal((N,), 5, "float64"))
    assert scipy.stats.kstest(normal, scipy.stats.norm().cdf).pvalue > 1e-3
    assert len(np.unique(normal)) == N


def test_truncated_normal_stays_inside_two():
    for dtype in FLOATS:
        draws = numbers(random.truncated_normal((N,), 3, dtype))
        assert np.abs(draws).max() <= 2
    assert np.abs(draws).max() > 1.99


def test_normal_has_tails():
    draws = numbers(random.normal((N,), 3))
    assert np.isfinite(draws).all()
    beyond = np.abs(draws) > 4
    p = 2 * scipy.stats.norm.sf(4)
    assert abs(z_of(beyond, p, p * (1 - p))) < 4.5


def test_bernoulli_probabilities():
    np.testing.assert_array_equal(numbers(random.bernoulli((1000,), 1, 0.0)), 0)
    np.testing.assert_array_equal(numbers(random.bernoulli((1000,), 1, 1.0)), 1)
    # A uniform number u below p: never where p is that very u, always just above.
    u = ops.convert_to_numpy(random.uniform((1000,), 1, "float32"))
    np.testing.assert_array_equal(numbers(random.bernoulli((1000,), 1, u)), 0)
    above = np.nextafter(u, np.float32(2))
    np.testing.assert_array_equal(numbers(random.bernoulli((1000,), 1, above)), 1)
    probabilities = np.array([0.0, 0.1, 0.5, 0.9, 1.0], "float32")
    draws = numbers(random.bernoulli((N // 5, 5), 1, probabilities))
    for column, p in zip(draws.T, probabilities.astype("float64"), strict=True):
        assert abs(z_of(column, p, p * (1 - p) + 1e-12)) < 4.5


def test_bernoulli_of_booleans():
    draws = random.bernoulli((100,), 1, 0.5, "bool")
    assert keras.backend.standardize_dtype(draws.dtype) == "bool"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_seeds(name):
    def draw(seed):
        return numbers(FUNCTIONS[name]((40,), seed))

    # An integer always gives the same draw.
    np.testing.assert_array_equal(draw(5), draw(5))
    assert (draw(5) != draw(6)).any()
    # Integers of any size and sign are all different seeds.
    seeds = [0, 1, -1, 2**31, 2**32, 2**32 + 1, -(2**40)]
    assert len({draw(seed).tobytes() for seed in seeds}) == len(seeds)
    np.testing.assert_array_equal(draw(np.int64(2**40)), draw(2**40))
    # A generator starts where its integer seed is, and advances.
    generator = keras.random.SeedGenerator(5)
    first, second = draw(generator), draw(generator)
    np.testing.assert_array_equal(first, draw(5))
    assert (second != first).any()
    # A pair of integers is what a generator gives.
    generator = keras.random.SeedGenerator(5)
    generator.next()
    np.testing.assert_array_equal(second, draw(generator.next()))
    np.testing.assert_array_equal(second, draw([5, 1]))
    np.testing.assert_array_equal(second, draw(seed_tensor(5, 1)))


@pytest.mark.tensorflow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_shape_known_only_at_run_time(name):
    import tensorflow as tf

    def draw(x, seed):
        batch, time = ops.shape(x)[:2]
        return FUNCTIONS[name]((batch, 3, time), seed)

    signature = [
        tf.TensorSpec([None, None, 2]),
        tf.TensorSpec([2], tf.int64),
    ]
    graph = tf.function(draw, input_signature=signature)
    xla = tf.function(draw, input_signature=signature, jit_compile=True)
    assert graph.get_concrete_function().output_shapes.as_list() == [None, 3, None]
    for batch, time in ((5, 7), (1, 1), (4, 9)):
        x, seed = tf.zeros([batch, time, 2]), seed_tensor(8, 0)
        expected = numbers(FUNCTIONS[name]((batch, 3, time), 8))
        for function in (graph, xla):
            np.testing.assert_allclose(
                numbers(function(x, seed)), expected, rtol=1e-5, atol=1e-7
            )


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("jit", (True, False))
def test_draws_inside_fit(name, jit):
    """A layer whose weight sums up what it draws: those are the eager draws."""

    class Remember(keras.layers.Layer):
        def build(self, input_shape):
            self.sum = self.add_weight(shape=(6,), initializer="zeros")
            self.seed_generator = keras.random.SeedGenerator(9)

        def call(self, x):
            noise = FUNCTIONS[name]((ops.shape(x)[0], 6), self.seed_generator)
            return x + noise * self.sum

        def compute_output_shape(self, input_shape):
            return input_shape

    model = keras.Sequential([keras.Input((6,)), Remember()])
    # The loss is the sum of the outputs, whose gradient in `sum` is the noise.
    model.compile(
        keras.optimizers.SGD(1.0), loss=lambda y, p: ops.sum(p, -1), jit_compile=jit
    )
    generator = model.layers[0].seed_generator
    start = ops.convert_to_numpy(generator.state.value).copy()
    x = np.zeros((12, 6), "float32")
    model.fit(x, x, batch_size=4, epochs=2, verbose=0)
    end = ops.convert_to_numpy(generator.state.value)
    assert list(end - start) == [0, 6]
    pairs = [[int(start[0]), int(start[1]) + step] for step in range(6)]
    draws = [numbers(FUNCTIONS[name]((4, 6), pair)) for pair in pairs]
    np.testing.assert_allclose(
        numbers(model.layers[0].sum.value),
        -np.sum([draw.mean(0) for draw in draws], 0),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("seed", (None, "1", 1.5, [1, 2, 3], np.zeros((2, 2))))
def test_bad_seed(seed):
    with pytest.raises(ValueError, match="`seed` must be .*Received: seed="):
        random.normal((3,), seed)


@pytest.mark.parametrize("draw", FUNCTIONS.values())
def test_bad_shape(draw):
    with pytest.raises(ValueError, match=r"Received: shape=\(None, 3\)"):
        draw((None, 3), 1)


@pytest.mark.parametrize("dtype", ("int32", "bool", "uint8"))
def test_bad_float_dtype(dtype):
    for draw in (random.uniform, random.normal, random.truncated_normal):
        with pytest.raises(ValueError, match=f"`dtype` must be .*'{dtype}'"):
            draw((3,), 1, dtype)


@pytest.mark.parametrize("dtype", ("bool", "uint8"))
def test_bad_sign_dtype(dtype):
    with pytest.raises(ValueError, match=f"`dtype` must hold -1.*'{dtype}'"):
        random.random_sign((3,), 1, dtype)


@pytest.mark.tensorflow
def test_words_are_philoxs():
    """Those that the authors of Philox4x32-10 give for the key 0 and counter 0."""
    expected = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert ops.convert_to_numpy(random._words((4,), (0, 0))).tolist() == expected


def test_keys_that_are_neighbours_are_independent():
    keys = [(s, c) for s in range(8) for c in range(8)]
    draws = np.stack(
        [ops.convert_to_numpy(random.normal((4096,), key)) for key in keys]
    )
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    # 2016 pairs, each of deviation 1 / 64.
    assert abs(correlation).max() < 4.5 / 64


@pytest.mark.tensorflow
def test_seeds_above_32_bits_differ():
    seeds = (1, 2**32 + 1, 2**40 + 1)
    for make in (int, keras.random.SeedGenerator):
        draws = [
            ops.convert_to_numpy(random.normal((4,), make(seed))) for seed in seeds
        ]
        assert len({ops.convert_to_numpy(d).tobytes() for d in draws}) == 3


def test_seeds_of_numpy():
    for seed in (np.int8(-3), np.int64(5)):
        same = random.normal((3,), int(seed))
        np.testing.assert_array_equal(random.normal((3,), seed), same)


def test_negative_sizes_are_refused():
    for draw in (random.random_sign, random.normal):
        with pytest.raises(ValueError, match="no negative sizes.*-1"):
            draw((-1,), 1)
