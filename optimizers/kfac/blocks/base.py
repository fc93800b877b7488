"""A layer's weights as one matrix, and which layers have such a block."""

import contextlib
import math

import keras
from keras import ops

from ..approximations.diagonal import Diagonal
from ..approximations.eigenvalues import EigenvalueCorrected
from ..approximations.kronecker import Kronecker

_BLOCKS = {}


def register_curvature_block(layer_class):
    """Decorates the `CurvatureBlock` of a class of layers, so that KFAC uses it.

    Layers of that class have it, and of its subclasses that do not override `call`.

    Args:
        layer_class: A class of layers.

    Returns:
        The decorator, which returns the block as it is.

    Raises:
        ValueError: If `layer_class` is no class of layers.

    Example:

    >>> import keras
    >>> from kzoo.optimizers import CurvatureBlock, register_curvature_block
    >>> class Doubled(keras.layers.Dense):
    ...     def call(self, inputs, training=None):
    ...         return super().call(2 * inputs)
    >>> @register_curvature_block(Doubled)
    ... class DoubledBlock(CurvatureBlock):
    ...     def rows(self, inputs):
    ...         return super().rows(2 * inputs)
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, keras.Layer)):
        raise ValueError(
            f"expected a class of layers. Received: layer_class={layer_class!r}"
        )

    def register(block_class):
        _BLOCKS[layer_class] = block_class
        return block_class

    return register


def find_blocks(layer):
    """Returns the list of a layer's blocks, of which there may be none."""
    for layer_class in type(layer).__mro__:
        if layer_class in _BLOCKS:
            same = type(layer).call is layer_class.call
            # What else makes a kernel is not the kernel alone.
            plain = not getattr(layer, "lora_enabled", False)
            plain = plain and getattr(layer, "quantization_mode", None) is None
            return _BLOCKS[layer_class].of(layer) if same and plain else []
    return []


@contextlib.contextmanager
def attributes(layer, **values):
    """Gives a layer attributes for a while, past what Keras keeps account of."""
    own, missing = vars(layer), object()
    before = {name: own.get(name, missing) for name in values}
    own.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is missing:
                del own[name]
            else:
                own[name] = value


class CurvatureBlock:
    """The weights of one layer as a matrix W that multiplies rows: s = a W.

    With a bias a ends in 1, and W in the bias as its last row. As it stands, it is for
    layers whose kernel `[..., m]` multiplies the last axes of what they are given; a
    subclass says what differs. s is what goes into the layer's activation, or comes
    out of a layer that has none.

    Args:
        layer: A built layer.

    Attributes:
        layer: The layer.
        kernel: The variable whose rows a multiplies.
        bias: The variable that is added, or None.
        approximations: A class of approximations for each name that KFAC takes; its
            diagonal for those that are missing.
    """

    approximations = {
        "kronecker": Kronecker,
        "ekfac": EigenvalueCorrected,
        "diagonal": Diagonal,
    }

    def __init__(self, layer):
        self.layer = layer
        self.kernel = self.find_kernel(layer)
        self.bias = self.find_bias(layer)

    @classmethod
    def of(cls, layer):
        """Returns the list of the blocks of a layer; of none if it has no such form."""
        return [cls(layer)]

    def tapping(self, tap):
        """Returns a context in which the layer's calls have a tap.

        Args:
            tap: As of `tapped_call`.
        """
        # The call as it is now, which may have the tap of another block.
        return attributes(self.layer, call=self.tapped_call(self.layer.call, tap))

    def tapped_call(self, call, tap):
        """Returns the layer's call with a tap in it.

        Args:
            call: The layer's call as it is.
            tap: A function of a, or of what `rows` makes a of, and s. It returns s, to
                be used in its place.
        """
        layer = self.layer

        def tapped(inputs, *args, **kwargs):
            activation = getattr(layer, "activation", None)
            if activation is None:
                return tap(inputs, call(inputs, *args, **kwargs))
            with attributes(layer, activation=lambda s: activation(tap(inputs, s))):
                return call(inputs, *args, **kwargs)

        return tapped

    def find_kernel(self, layer):
        """Returns the layer's kernel, a variable."""
        return layer.kernel

    def find_bias(self, layer):
        """Returns the layer's bias, a variable, or None."""
        return getattr(layer, "bias", None)

    @property
    def variables(self):
        """The variables that W consists of."""
        return [self.kernel] if self.bias is None else [self.kernel, self.bias]

    @property
    def shape(self):
        """The shape of the kernel as a matrix, `(*lead, n, m)`, the bias left out.

        Leading axes are those of many matrices, each with rows of its own.
        """
        *rows, m = self.kernel.shape
        return (math.prod(rows), m)

    def rows(self, inputs):
        """Returns what the kernel multiplies, `[*lead, N, R, n]`.

        Args:
            inputs: What the layer is given.

        Returns:
            Tensor with the N examples and the R positions at which the layer is applied
            to each.
        """
        return positions(inputs)

    def derivatives(self, derivatives):
        """Returns the derivatives by s as rows, `[*lead, N, R, m]`.

        Args:
            derivatives: Those by the layer's output before its activation.
        """
        return positions(derivatives)

    def weights(self, inputs, mask):
        """Returns 1 for positions that count and 0 for others, `[N, R]`.

        Args:
            inputs: What the layer is given.
            mask: Its mask, or None.

        Returns:
            Tensor, or None if all count.
        """
        if mask is None or len(mask.shape) != len(inputs.shape) - 1:
            return None
        return ops.reshape(ops.cast(mask, "float32"), (ops.shape(mask)[0], -1))

    def matrix(self, kernel):
        """Returns a tensor of the kernel's shape as a matrix."""
        return ops.reshape(kernel, self.shape)

    def kernel_of(self, matrix):
        """Returns a matrix as a tensor of the kernel's shape."""
        return ops.reshape(matrix, self.kernel.shape)

    # What follows from these.

    @property
    def full_shape(self):
        """The shape of W, with the bias's row."""
        *lead, n, m = self.shape
        return (*lead, n + (self.bias is not None), m)

    def join(self, tensors):
        """Returns tensors like the variables as one like W."""
        matrix = self.matrix(tensors[0])
        if self.bias is None:
            return matrix
        row = ops.reshape(tensors[1], (*matrix.shape[:-2], 1, matrix.shape[-1]))
        return ops.concatenate([matrix, row], axis=-2)

    def split(self, matrix):
        """Returns a tensor like W as tensors like the variables."""
        if self.bias is None:
            return [self.kernel_of(matrix)]
        bias = ops.reshape(matrix[..., -1, :], self.bias.shape)
        return [self.kernel_of(matrix[..., :-1, :]), bias]

    def full_rows(self, inputs):
        """Returns a, with a 1 for the bias."""
        a = self.rows(inputs)
        if self.bias is None:
            return a
        return ops.concatenate([a, ops.ones_like(a[..., :1])], axis=-1)


class BlockOfInside(CurvatureBlock):
    """The block of a layer that runs another one, whose matrix is that of the latter.

    Args:
        layer: A built layer.
        inside: The block of the layer inside of it.
    """

    def __init__(self, layer, inside):
        self.inside = inside
        super().__init__(layer)

    def find_kernel(self, layer):
        """Returns the kernel of the layer inside."""
        return self.inside.kernel

    def find_bias(self, layer):
        """Returns the bias of the layer inside, or None."""
        return self.inside.bias

    @property
    def variables(self):
        """The variables that the matrix consists of."""
        return self.inside.variables

    @property
    def shape(self):
        """The shape of the matrix of the layer inside."""
        return self.inside.shape

    def join(self, tensors):
        """Returns tensors like the variables as one like W."""
        return self.inside.join(tensors)

    def split(self, matrix):
        """Returns a tensor like W as tensors like the variables."""
        return self.inside.split(matrix)


def positions(x):
    """A tensor `[N, ..., n]` as `[N, R, n]`."""
    middle = x.shape[1:-1]
    if None in middle:
        return ops.reshape(x, (ops.shape(x)[0], -1, x.shape[-1]))
    return ops.reshape(x, (-1, math.prod(middle), x.shape[-1]))
