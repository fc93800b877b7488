import numpy as np
import pytest
from keras import ops

from harness.backends import compiled
from kzoo.layers.ops.loops import array, loop, read, stacked, write
from kzoo.layers.ops.reversible import FixedPoint, quotient

rng = np.random.default_rng(0)
RADICES = [FixedPoint(23, 10, 3), FixedPoint(23, 10, 10), FixedPoint(30, 15, 15)]
each = pytest.mark.parametrize("fixed", RADICES, ids=str)


def numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("int64")


def drawn(fixed, count=20000):
    """Integers of all 32 bits, the extreme ones too, and gates."""
    n = rng.integers(-(2**31), 2**31, count)
    n[:2] = -(2**31), 2**31 - 1
    z = rng.integers(fixed.least, fixed.one + 1, count)
    z[:2], z[2:4] = fixed.one, fixed.least
    return n, z


def multiply(fixed, n, z):
    return map(numpy, fixed.multiply(n.astype("int32"), z.astype("int32")))


@each
def test_a_product_is_rounded_and_had_again(fixed):
    n, z = drawn(fixed)
    found, digit = multiply(fixed, n, z)
    np.testing.assert_array_equal(found, (n * z + fixed.one // 2) // fixed.one)
    assert digit.min() == 0 and digit.max() < 2**fixed.forget_bits
    back = fixed.divide(*(a.astype("int32") for a in (found, z, digit)))
    np.testing.assert_array_equal(numpy(back), n)


@each
def test_the_digit_counts_the_smaller_numbers_of_one_product(fixed):
    for z in (fixed.least, 3 * fixed.one // 4, fixed.one - 1, fixed.one):
        n = np.arange(-3 * fixed.one, 3 * fixed.one)
        found, digit = multiply(fixed, n, np.full(n.shape, z))
        first = np.searchsorted(found, found)  # The least of those with one product.
        inner = slice(fixed.one, -fixed.one)
        np.testing.assert_array_equal(digit[inner], (np.arange(len(n)) - first)[inner])
        if z == fixed.one:
            assert not digit.any()


def test_quotients_are_those_of_integers():
    """However far a float is from n / z."""
    n = np.r_[-(2**31), 2**31 - 1, -1, 0, 1, rng.integers(-(2**31), 2**31, 50)]
    for z in (1, 2, 3, 1023, 2**15 - 1, 2**15):
        near = np.clip(np.r_[n, n // z * z, n // z * z - 1], -(2**31), 2**31 - 1)
        found = numpy(quotient(near.astype("int32"), np.full_like(near, z, "int32")))
        np.testing.assert_array_equal(found, near // z)


def test_bits_are_those_that_a_gate_forgets():
    """On average -log2 z, and at most 0.087 more."""
    fixed = FixedPoint(23, 10, 5)
    for z in (32, 100, 341, 512, 739, 1000, 1024):
        n = rng.integers(-(2**24), 2**24, 4000)[:, None] + np.arange(-40, 41)
        found, _ = multiply(fixed, n, np.full(n.shape, z))
        preimages = (found == found[:, 40:41]).sum(1)
        bits, expected = np.log2(preimages).mean(), -np.log2(z / fixed.one)
        assert expected - 0.02 < bits < expected + 0.087 + 0.02
    assert bits == expected == 0


def test_ten_thousand_steps_there_and_back():
    """Updates with words that spill; rows that are masked stay as they are."""
    fixed = RADICES[0]
    of_word, count = fixed.steps_per_word, 10_000 // fixed.steps_per_word
    shape = (count, of_word, 8)
    n = rng.integers(-(2**24), 2**24, 8)
    z = rng.integers(fixed.least, fixed.one + 1, shape)
    add = rng.integers(-(2**23), 2**23, shape)
    masked = rng.random(shape) < 0.1
    z[masked], add[masked] = fixed.one, 0

    def there_and_back(n, z, add):
        def forwards(i, carry):
            def step(j, carry):
                n, word = carry
                n, digit = fixed.multiply(n, z[i, j])
                return n + add[i, j], fixed.push(word, digit)

            n, words, after = carry
            n, word = loop(step, (n, ops.zeros_like(n, dtype="uint32")), of_word)
            return n, write(words, i, word), write(after, i, n)

        def backwards(turn, carry):
            i = count - 1 - turn

            def step(turn, carry):
                j = of_word - 1 - turn
                n, word = carry
                word, digit = fixed.pop(word)
                return fixed.divide(n - add[i, j], z[i, j], digit), word

            n, words, before = carry
            n, word = loop(step, (n, read(words, i)), of_word)
            return n, write(words, i, word), write(before, i, n)

        words = array(count, ops.zeros_like(n, dtype="uint32"))
        last, words, after = loop(forwards, (n, words, array(count, n)), count)
        filled = stacked(words)
        carry = loop(backwards, (last, words, array(count, n)), count)
        first, left, before = carry
        return first, filled, stacked(left), stacked(after), stacked(before)

    given = (ops.convert_to_tensor(a.astype("int32")) for a in (n, z, add))
    found = compiled(there_and_back)(*given)
    first, words, left, after, before = map(ops.convert_to_numpy, found)
    np.testing.assert_array_equal(first, n)
    np.testing.assert_array_equal(before[1:], after[:-1])
    assert after.min() < 0 < after.max() and len(np.unique(after)) > 7 * count
    assert words.max() >= 2**29 and not left.any()


@each
def test_gates_and_numbers(fixed):
    s = np.array([0, 0.25, 1, -1, 2], "float32")
    z = numpy(fixed.gate(s)) / fixed.one
    least = 2.0**-fixed.forget_bits
    expected = least + (1 - least) * np.clip(s, 0, 1)
    np.testing.assert_allclose(z, expected, atol=0.5 / fixed.one + 1e-7)
    assert z[0] == least and z[2] == 1
    h = np.array([0.1, -0.1, 1.5 * 2.0**-fixed.state_bits, -1], "float32")
    n = numpy(fixed.encode(h))
    np.testing.assert_array_equal(
        n, np.round(h.astype("float64") * 2**fixed.state_bits)
    )
    largest = numpy(fixed.encode(np.float32([1e9, -1e9])))
    np.testing.assert_array_equal(largest, [2**31 - 128, 128 - 2**31])
    found = ops.convert_to_numpy(fixed.decode(n.astype("int32")))
    np.testing.assert_allclose(found, h, rtol=0, atol=2.0**-fixed.state_bits)
