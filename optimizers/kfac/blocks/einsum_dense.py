"""Products that are written as an Einstein summation."""

import math
import string

import keras
from keras import ops

from .base import CurvatureBlock, register_curvature_block


@register_curvature_block(keras.layers.EinsumDense)
class EinsumDenseBlock(CurvatureBlock):
    """An EinsumDense layer, `input,kernel->output`.

    Of the kernel's axes those that only the input has are n, those that only the output
    has are m, and of those in both each index has a matrix of its own. A bias that does
    not lie along m alone is not part of the matrix.
    """

    def __init__(self, layer):
        super().__init__(layer)
        given, results = layer.equation.replace(" ", "").split("->")
        given, kernel = given.split(",")
        self.letters = given, kernel, results
        self.of_lead = "".join(x for x in results if x in kernel and x in given)
        self.of_n = "".join(x for x in kernel if x in given and x not in results)
        self.of_m = "".join(x for x in results if x in kernel and x not in given)
        sizes = dict(zip(kernel, self.kernel.shape, strict=True))
        words = self.of_lead, self.of_n, self.of_m
        self.order = "".join(words)
        self.sizes = [[sizes[x] for x in word] for word in words]
        along = "".join(x for x in results if x in (layer.bias_axes or ""))
        if self.of_lead or along != self.of_m:
            self.bias = None

    @property
    def shape(self):
        """`(*lead, n, m)`."""
        lead, n, m = self.sizes
        return (*lead, math.prod(n), math.prod(m))

    def rows(self, inputs):
        """Returns the input with n last, summed over what the output has not."""
        return self._lay_out(inputs, self.letters[0], self.of_n)

    def derivatives(self, derivatives):
        """Returns the derivatives with m last."""
        return self._lay_out(derivatives, self.letters[2], self.of_m)

    def _lay_out(self, x, letters, last):
        given, kernel, results = self.letters
        free = [x for x in string.ascii_letters if x not in given + kernel + results]
        dots = "".join(free[: len(x.shape) - len(letters.replace("...", ""))])
        kept = results.replace("...", dots)
        of_positions = "".join(x for x in kept if x not in kernel)
        letters = letters.replace("...", dots)
        x = ops.einsum(f"{letters}->{self.of_lead}{of_positions}{last}", x)
        lead, size = self.sizes[0], math.prod(x.shape[len(x.shape) - len(last) :])
        count = ops.shape(x)[len(lead)]
        return ops.reshape(x, (*lead, count, -1, size))

    def matrix(self, kernel):
        """Returns a kernel as matrices."""
        kernel = ops.einsum(f"{self.letters[1]}->{self.order}", kernel)
        return ops.reshape(kernel, self.shape)

    def kernel_of(self, matrix):
        """Returns matrices as a kernel."""
        kernel = ops.reshape(matrix, sum(self.sizes, []))
        return ops.einsum(f"{self.order}->{self.letters[1]}", kernel)
