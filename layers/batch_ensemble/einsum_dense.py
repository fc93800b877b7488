"""EinsumDenseBatchEnsemble."""

import re

import keras
import numpy as np

from ..ops.arguments import is_integer
from ..ops.batch_ensemble import check_rows
from ..ops.einsum import bias_shape, einsum_shapes
from .base import LinearBatchEnsemble


@keras.saving.register_keras_serializable(package="kzoo")
class EinsumDenseBatchEnsemble(LinearBatchEnsemble):
    """M Einstein summations that share one kernel.

    The kernel W has axes that are the input's, axes that are the output's, and maybe
    some that are both's. Member m's fast weights are a tensor r_m along the first and
    a tensor s_m along the second kind; an axis of both kinds belongs to both. Its
    kernel is W ∘ (r_m s_m), each number of W times the numbers of r_m and s_m there.
    With i the input's axes and o the output's, w those of W, the rest summed over,

        y_o = φ(Σ x_i W_w r_w∩i s_w∩o + b) = φ((Σ (x_i r_w∩i) W_w) s_w∩o + b),

    as r has axes of x alone, and s has none that is summed over. So all members' rows
    go through W in one product:

        y = φ(einsum(x ∘ r_m, W) ∘ s_m + b_m).

    For `"abc,cd->abd"` r is `[c]` and s `[d]`, as in `DenseBatchEnsemble`; for
    `"abc,cnh->abnh"`, which makes n heads, s is `[n, h]`; for `"abc,bcd->abd"`, which
    has a kernel for each b, r is `[b, c]` and s `[b, d]`: a product of rank one for
    each b. With rank K, member m's kernel is W ∘ (Σ_k r_mk s_mk).

    The first axis of input and output is the batch's, member-major, and the kernel has
    it not. All else is as `kzoo.layers.DenseBatchEnsemble` says.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        equation: `input,kernel->output`, such as `"abc,cd->abd"` or `"...x,xy->...y"`.
        output_shape: Sizes of the output's axes, without the batch and those that
            dots stand for: an integer or a tuple, in which None stands for the input's
            size of an axis that the kernel has not.
        rank: K, how many fast weights are summed.
        ensemble_size: M, the number of members.
        activation: φ. Defaults to none.
        bias_axes: The output's axes that each member's bias b_m has, such as `"d"`.
            None: no bias.
        alpha_initializer: For `alpha`, r: `[M, *sizes]`, the sizes in the order that
            the input has them in, or `[K, M, *sizes]`.
        gamma_initializer: For `gamma`, s: likewise, in the order of the output.
        kernel_initializer: For `kernel`, W.
        bias_initializer: For `bias`, b: `[M, *sizes]` with the shape of
            `keras.layers.EinsumDense`'s bias.
        kernel_regularizer: Of W.
        bias_regularizer: Of b.
        activity_regularizer: Of the output.
        kernel_constraint: On W.
        bias_constraint: On b.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Member-major tensor.

    Input shape:
        `[M * B, ...]`, as the equation says.

    Output shape:
        `[M * B, ...]`, as the equation says.

    Raises:
        ValueError: If `rank` or `ensemble_size` is not an integer of at least 1; when
            built, if the equation does not fit the shapes, or its batch is not the
            first axis; when called, if M does not divide the number of rows.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import EinsumDenseBatchEnsemble
    >>> layer = EinsumDenseBatchEnsemble(
    ...     "abc,cde->abde", (None, 2, 3), ensemble_size=2, bias_axes="de"
    ... )
    >>> x = np.ones((8, 7, 5), "float32")  # four rows for each of the two members
    >>> layer(x).shape == (8, 7, 2, 3)
    True
    >>> layer.count_params()  # 5 * 2 * 3 + 2 * (5 + 2 * 2 * 3)
    64
    """

    def __init__(
        self,
        equation,
        output_shape,
        rank=1,
        ensemble_size=4,
        activation=None,
        bias_axes=None,
        alpha_initializer="ones",
        gamma_initializer="ones",
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        super().__init__(
            rank=rank,
            ensemble_size=ensemble_size,
            activation=activation,
            alpha_initializer=alpha_initializer,
            gamma_initializer=gamma_initializer,
            bias_initializer=bias_initializer,
            bias_regularizer=bias_regularizer,
            bias_constraint=bias_constraint,
            activity_regularizer=activity_regularizer,
            **kwargs,
        )
        self.equation = equation
        self.bias_axes = bias_axes
        self._share(
            keras.layers.EinsumDense,
            {
                "equation": equation,
                "output_shape": (
                    (output_shape,) if is_integer(output_shape) else output_shape
                ),
                "kernel_initializer": kernel_initializer,
                "kernel_regularizer": kernel_regularizer,
                "kernel_constraint": kernel_constraint,
            },
        )

    @property
    def partial_output_shape(self):
        """The argument `output_shape`, which may change until the layer is built."""
        return self.shared.partial_output_shape

    @partial_output_shape.setter
    def partial_output_shape(self, sizes):
        self.shared.partial_output_shape = sizes

    def _shapes(self, input_shape):
        return einsum_shapes(self.equation, input_shape, self.partial_output_shape)

    def build(self, input_shape):
        """Creates the shared kernel, the fast weights and the members' biases."""
        super().build(input_shape)
        # Without dots: with them XLA on TensorFlow is a hundred times slower on a CPU.
        self.shared.equation, *_ = self._shapes(input_shape)

    def _axes(self, input_shape):
        equation, kernel_shape, output_shape = self._shapes(input_shape)
        inputs, kernel, outputs = re.split(",|->", equation)
        if outputs[0] != inputs[0] or inputs[0] in kernel:
            raise ValueError(
                "expected the first axis of input and output to be the batch's, which "
                f"the kernel has not. Received: equation={self.equation!r}"
            )
        sizes = dict(zip(kernel, kernel_shape, strict=True))
        of_r, of_s = (
            "".join(x for x in word if x in sizes) for word in (inputs, outputs)
        )
        self._outer_equation = f"{of_r},{of_s}->{kernel}"
        r, s = (
            {i: sizes[x] for i, x in enumerate(word) if x in sizes}
            for word in (inputs, outputs)
        )
        if not self.bias_axes:
            return r, s, None
        bias = bias_shape(equation, output_shape, self.bias_axes)
        return r, s, dict(enumerate(bias, len(outputs) - len(bias)))

    def _outer(self, r, s):
        return np.einsum(self._outer_equation, r, s)

    def compute_output_shape(self, input_shape):
        """Returns the output's shape."""
        check_rows(input_shape[0], self.ensemble_size)
        return self._shapes(input_shape)[2]

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "equation": self.equation,  # The shared layer's has no dots.
            "bias_axes": self.bias_axes,
        }
