"""Arithmetic on fixed-point numbers that can be undone to the bit.

A gated update h' = z h + v loses bits wherever z < 1: many h have one h'. Reversible
networks (MacKay et al., 2018) hold h in fixed point, so that what is lost is known,
and keep that alone: about -log2 z bits a step instead of h and all that led to it.

With R_z = `gate_bits`, z is a multiple of 2^-R_z and stands as the integer
2^R_z z in 1 ... 2^R_z. With R_h = `state_bits`, h stands as the integer n = 2^R_h h.
All integers have 32 bits, which is all that JAX has by default.
"""

from dataclasses import dataclass

import numpy as np
from keras import ops

WORD_BITS = 32
# The largest float32 below 2^31.
LARGEST = 2.0**31 - 2.0**7


@dataclass(frozen=True)
class FixedPoint:
    """Numbers of fixed point, and updates of them that forget at most so many bits.

    The paper multiplies n by z with the bits forgotten before in place of those that
    are missing, so that one buffer of 64 bits takes exactly -log2 z bits from each
    step. Here n' is z n rounded, which depends on n and z alone: states are equal
    whether a buffer is kept or not, and differ from those of the float network by
    2^-R_h rather than by 2^(R_z - R_h) a step. What is forgotten is then j, which of
    the numbers that give n' was n. There are at most 2^k of them if z >= 2^-k, so that
    j has k bits. On average it takes -log2 z bits, and at most 0.087 more.

    Args:
        state_bits: R_h, bits of h after the point, from 1 to 30.
        gate_bits: R_z, bits of z after the point, from 1 to 15.
        forget_bits: k, from 0 to R_z: gates are at least 2^-k. With 0 nothing is
            ever forgotten.
    """

    state_bits: int = 23
    gate_bits: int = 10
    forget_bits: int = 10

    @property
    def one(self):
        """The integer that stands for a gate of 1."""
        return 1 << self.gate_bits

    @property
    def least(self):
        """The integer that stands for the smallest gate, 2^-k."""
        return 1 << (self.gate_bits - self.forget_bits)

    @property
    def steps_per_word(self):
        """How many steps' digits fit into one word; WORD_BITS if they have no bits."""
        return WORD_BITS // max(self.forget_bits, 1)

    def encode(self, h):
        """n = round(2^R_h h); |h| is cut to what 32 bits hold, 2^(31 - R_h)."""
        scaled = ops.clip(h * 2.0**self.state_bits, -LARGEST, LARGEST)
        return ops.cast(ops.round(scaled), "int32")

    def decode(self, n, dtype="float32"):
        """h = 2^-R_h n."""
        return ops.cast(n, dtype) * 2.0**-self.state_bits

    def gate(self, s):
        """z = 2^-k + (1 - 2^-k) s as an integer, of s in [0, 1]."""
        z = ops.round(s * float(self.one - self.least))
        return ops.clip(ops.cast(z, "int32") + self.least, self.least, self.one)

    def value(self, z, dtype="float32"):
        """The number that a gate's integer stands for."""
        return ops.cast(z, dtype) * (1.0 / self.one)

    def multiply(self, n, z):
        """z n, rounded, and the digit j that it forgets.

        With n = a 2^R_z + b, 0 <= b < 2^R_z, no product has more than 32 bits:

            z n + 2^R_z / 2 = a z 2^R_z + p,   p = b z + 2^R_z / 2,
            n' = floor(z n / 2^R_z + 1/2) = a z + floor(p / 2^R_z).

        The numbers n, n - 1, ... that give n' are those that leave p mod 2^R_z at
        least 0 when it falls by z each time: j = floor((p mod 2^R_z) / z) of them are
        less than n.

        Args:
            n: Integers.
            z: Gates as integers.

        Returns:
            n' and j, below 2^k.
        """
        a, b = ops.right_shift(n, self.gate_bits), ops.bitwise_and(n, self.one - 1)
        p = b * z + self.one // 2
        digit = quotient(ops.bitwise_and(p, self.one - 1), z)
        return a * z + ops.right_shift(p, self.gate_bits), digit

    def divide(self, n, z, digit):
        """The number of which `multiply` has made n and the digit.

        With n' = a z + r, 0 <= r < z, the smallest that gives n' is

            ceil((2^R_z n' - 2^R_z / 2) / z)
                = a 2^R_z + ceil((2^R_z r - 2^R_z / 2) / z).

        Args:
            n: n'.
            z: The gates.
            digit: j.

        Returns:
            Integers.
        """
        a = quotient(n, z)
        r = n - a * z
        rest = quotient(r * self.one + (z - 1 - self.one // 2), z)
        return a * self.one + rest + digit

    def push(self, word, digit):
        """A word of bits and one more digit: B' = 2^k B + j.

        The radix 2^k is at least the number of digits there can be. A smaller one
        would leave B smaller, but free no memory: that of a compiled loop is fixed
        before, for the gates that forget most.
        """
        shifted = ops.left_shift(word, self.forget_bits)
        return ops.bitwise_or(shifted, ops.cast(digit, "uint32"))

    def pop(self, word):
        """The word before `push`, and the digit."""
        digit = ops.bitwise_and(word, np.uint32((1 << self.forget_bits) - 1))
        return ops.right_shift(word, self.forget_bits), ops.cast(digit, "int32")


def quotient(n, z):
    """floor(n / z), for 0 < z <= 2^15, of which floats only give an estimate.

    A compiled division of integers takes one at a time, and XLA for CPUs lets a program
    stop at what lies beside them in a register. Here what an estimate leaves of n, at
    most z and 2^-22 n, is divided again; that quotient is off by one at most.
    """
    q, divisor = 0, ops.cast(z, "float32")
    for _ in range(2):
        estimate = ops.floor(ops.cast(n, "float32") / divisor)
        estimate = ops.cast(ops.clip(estimate, -LARGEST, LARGEST), "int32")
        q, n = q + estimate, n - estimate * z
    return q + ops.cast(n >= z, "int32") - ops.cast(n < 0, "int32")
