"""Einstein summations with a distribution over their weights."""

import keras
from keras import ops

from ..ops.einsum import bias_shape, einsum_shapes
from .base import VariationalLayer
from .estimators import Flipout, LocalReparameterization, Reparameterization


class EinsumDenseVariational(VariationalLayer):
    """y = φ(einsum(x, W) + b), with W and b drawn from posteriors."""

    def __init__(
        self,
        equation,
        output_shape,
        activation=None,
        bias_axes=None,
        **kwargs,
    ):
        super().__init__(activation=activation, **kwargs)
        self.equation = equation
        self.partial_output_shape = output_shape
        self.bias_axes = bias_axes

    def build(self, input_shape):
        """Makes the parameters of the posteriors and priors."""
        equation, _, _ = self._shapes(input_shape)
        inputs, rest = equation.split(",")
        # Axes that the equation sums over, and the kernel has not, are summed first:
        # all their positions meet the same weight.
        self._summed = [i for i, x in enumerate(inputs) if x not in rest]
        inputs = "".join(x for x in inputs if x in rest)
        self._full_equation = f"{inputs},{rest}"
        self.input_spec = keras.layers.InputSpec(ndim=len(input_shape))
        super().build(input_shape)

    def call(self, inputs):
        """Returns outputs for one draw of the bias and of each row's kernel."""
        return super().call(ops.sum(inputs, self._summed) if self._summed else inputs)

    def _shapes(self, input_shape):
        return einsum_shapes(self.equation, input_shape, self.partial_output_shape)

    def _weight_shapes(self, input_shape):
        equation, kernel, output = self._shapes(input_shape)
        if not self.bias_axes:
            return kernel, None
        return kernel, bias_shape(equation, output, self.bias_axes)

    def _sign_shapes(self, input_shape):
        letters, output = self._full_equation.split("->")
        letters, kernel = letters.split(",")
        sizes = dict(zip(kernel, self.kernel.shape, strict=True))
        sizes |= dict(zip(letters, input_shape, strict=True))
        return input_shape, tuple(sizes[x] for x in output)

    def _bias_at_channels(self, bias):
        return bias

    def linear(self, x, kernel):
        """einsum(x, W)."""
        return ops.einsum(self._full_equation, x, kernel)

    def compute_output_shape(self, input_shape):
        """Returns the output's shape."""
        return self._shapes(input_shape)[2]

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            "equation": self.equation,
            "output_shape": self.partial_output_shape,
            "bias_axes": self.bias_axes,
            **super().get_config(),
        }


@keras.saving.register_keras_serializable(package="kzoo")
class EinsumDenseFlipout(EinsumDenseVariational):
    """An Einstein summation with a distribution over its weights, by Flipout.

    The kernel W is drawn from a posterior q with mean W̄. One perturbation ΔW̃ = W - W̄
    is drawn for the whole batch, and its signs are turned by random tensors s and r of
    -1 and +1, shaped as input and output, so that each row, and each position that
    the equation keeps apart, has signs of its own:

        y = φ(einsum(x, W̄) + einsum(x ∘ s, ΔW̃) ∘ r + b).

    All else is as `kzoo.layers.DenseFlipout` says. Takes `keras.layers.EinsumDense`'s
    first arguments; all after `bias_axes` go by name.

    Reference: Wen, Vicol, Ba, Tran, Grosse, "Flipout: Efficient Pseudo-Independent
    Weight Perturbations on Mini-Batches", 2018. https://arxiv.org/abs/1803.04386

    Args:
        equation: `input,kernel->output`, such as `"abc,cd->abd"` or `"...x,xy->...y"`.
        output_shape: Sizes of the output's axes, without the batch and those that
            dots stand for: an integer or a tuple, in which None is the input's size.
        activation: φ. Defaults to none.
        bias_axes: The output's axes that the bias has, such as `"d"`. None: no bias.
        activity_regularizer: Of the output.
        kernel_posterior_fn: As `kzoo.layers.DenseFlipout`'s, and so the following.
        kernel_prior_fn: Makes the kernel's prior.
        kernel_divergence_fn: Its divergence.
        bias_posterior_fn: Makes the bias's posterior.
        bias_prior_fn: Makes the bias's prior. Defaults to none.
        bias_divergence_fn: Its divergence.
        num_examples: N, what the divergences are divided by.
        seed: An integer, for the same draws again.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Tensor.

    Input shape:
        What the equation says.

    Output shape:
        What the equation says.

    Raises:
        ValueError: When built, if the equation does not fit the shapes, or as
            `DenseFlipout`.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import EinsumDenseFlipout
    >>> layer = EinsumDenseFlipout("abc,cde->abde", (None, 2, 3), bias_axes="de")
    >>> layer(np.ones((4, 7, 5), "float32")).shape == (4, 7, 2, 3)
    True
    """

    estimator = Flipout


@keras.saving.register_keras_serializable(package="kzoo")
class EinsumDenseReparameterization(EinsumDenseVariational):
    """An Einstein summation with a distribution over its weights, drawn once a call.

    All rows share one draw of the kernel, W ~ q: y = φ(einsum(x, W) + b). See
    `EinsumDenseFlipout`, which differs in the estimator alone.

    Reference: Blundell, Cornebise, Kavukcuoglu, Wierstra, "Weight Uncertainty in
    Neural Networks", 2015. https://arxiv.org/abs/1505.05424

    Args:
        **kwargs: `EinsumDenseFlipout`'s arguments.

    Call arguments:
        inputs: Tensor.

    Input shape:
        What the equation says.

    Output shape:
        What the equation says.

    Raises:
        ValueError: As `EinsumDenseFlipout`, but any posterior is taken.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import EinsumDenseReparameterization
    >>> layer = EinsumDenseReparameterization("...x,xy->...y", 3)
    >>> layer(np.ones((4, 7, 5), "float32")).shape == (4, 7, 3)
    True
    """

    estimator = Reparameterization


@keras.saving.register_keras_serializable(package="kzoo")
class EinsumDenseLocalReparameterization(EinsumDenseVariational):
    """An Einstein summation with a distribution over its weights; outputs are drawn.

    Each output has the distribution it has under a normal posterior N(W̄, σ²), and is
    drawn for itself, with ε ~ N(0, 1):

        y = φ(einsum(x, W̄) + ε ∘ sqrt(einsum(x², σ²)) + b).

    See `EinsumDenseFlipout`, which differs in the estimator alone.

    Reference: Kingma, Salimans, Welling, "Variational Dropout and the Local
    Reparameterization Trick", 2015. https://arxiv.org/abs/1506.02557

    Args:
        **kwargs: `EinsumDenseFlipout`'s arguments.

    Call arguments:
        inputs: Tensor.

    Input shape:
        What the equation says.

    Output shape:
        What the equation says.

    Raises:
        ValueError: As `EinsumDenseFlipout`; when built, if the posterior is not normal.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import EinsumDenseLocalReparameterization
    >>> layer = EinsumDenseLocalReparameterization("...x,xy->...y", 3)
    >>> layer(np.ones((4, 7, 5), "float32")).shape == (4, 7, 3)
    True
    """

    estimator = LocalReparameterization
