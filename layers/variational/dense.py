"""Dense layers with a distribution over their weights."""

import keras
from keras import ops

from ..ops.arguments import integer
from .base import VariationalLayer
from .estimators import Flipout, LocalReparameterization, Reparameterization


class DenseVariational(VariationalLayer):
    """y = φ(x W + b), with W and b drawn from posteriors."""

    def __init__(
        self,
        units,
        activation=None,
        **kwargs,
    ):
        super().__init__(activation=activation, **kwargs)
        self.units = integer("units", units)
        self.supports_masking = True

    def build(self, input_shape):
        """Makes the parameters of the posteriors and priors."""
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: input_shape[-1]})
        super().build(input_shape)

    def _weight_shapes(self, input_shape):
        return (input_shape[-1], self.units), (self.units,)

    def _sign_shapes(self, input_shape):
        return input_shape, (*input_shape[:-1], self.units)

    def _bias_at_channels(self, bias):
        return bias

    def linear(self, x, kernel):
        """x W."""
        return ops.matmul(x, kernel)

    def compute_output_shape(self, input_shape):
        """Returns the input's shape with `units` for its last axis."""
        return (*input_shape[:-1], self.units)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {"units": self.units, **super().get_config()}


@keras.saving.register_keras_serializable(package="kzoo")
class DenseFlipout(DenseVariational):
    """A dense layer with a distribution over its weights, estimated by Flipout.

    The kernel W is drawn from a posterior q with mean W̄. One perturbation ΔW̃ = W - W̄
    is drawn for the whole batch, and each row n turns its signs by random vectors s_n
    and r_n of -1 and +1, so that the rows' perturbations are uncorrelated, at the
    cost of two products instead of one for each row:

        y_n = φ(x_n W̄ + ((x_n ∘ s_n) ΔW̃) ∘ r_n + b).

    So the variance of a batch's gradient falls as that of independent draws does,
    but for the part that the magnitudes |ΔW̃| carry. Draws are made in inference too;
    `call` of the same seed and state gives the same ones.

    The divergence KL(q, p) from the prior p is added to the model's losses once a
    step, however often the layer is called, and divided by `num_examples`: give the
    number of training examples, where the loss is a mean over examples. Without it
    the divergence is not scaled.

    Takes `tfp.layers.DenseFlipout`'s arguments, with its defaults. On TensorFlow the
    functions may be TensorFlow Probability's own, or return other distributions of
    its; on JAX, where it does not run, they must be `MeanFieldNormal`, `NormalPrior`
    or `ScaleMixturePrior`. What differs:

    - the divergence counts once a step, not once a call, and can be scaled;
    - `kernel_divergence_fn` gets a draw of the kernel where TFP gives None;
    - all arguments but `units` and `activation` go by name;
    - there are no `kernel_posterior_tensor_fn` and `bias_posterior_tensor_fn`;
    - a posterior need not be normal: independent entries that are symmetric about
      their mean are enough;
    - the configuration holds `num_examples`, and functions are saved by name, never
      as code.

    Reference: Wen, Vicol, Ba, Tran, Grosse, "Flipout: Efficient Pseudo-Independent
    Weight Perturbations on Mini-Batches", 2018. https://arxiv.org/abs/1803.04386

    Args:
        units: Size of the output's last axis.
        activation: φ. Defaults to none.
        activity_regularizer: Of the output.
        kernel_posterior_fn: Makes q, as `MeanFieldNormal`'s instances do: a function
            of `(dtype, shape, name, trainable, add_variable_fn)`.
        kernel_prior_fn: Makes p, likewise. None: no divergence.
        kernel_divergence_fn: Function of q, p and a draw from q. Defaults to KL(q, p)
            in nats.
        bias_posterior_fn: Makes the bias's posterior. Defaults to a single point,
            which is an ordinary bias. None: no bias.
        bias_prior_fn: Makes the bias's prior. Defaults to none.
        bias_divergence_fn: As `kernel_divergence_fn`.
        num_examples: N, what the divergences are divided by.
        seed: An integer, for the same draws again.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Tensor. Its mask is passed on.

    Input shape:
        `[B, ..., input_dim]`. Each position of the axes between has signs of its own.

    Output shape:
        `[B, ..., units]`.

    Raises:
        ValueError: If `units` or `num_examples` is not above 0, or on JAX if a
            function is not one of kzoo's; when built, if q is not symmetric about its
            mean with independent entries: the signs would change its distribution.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import DenseFlipout
    >>> layer = DenseFlipout(3, num_examples=1000, seed=0)
    >>> x = np.ones((8, 5), "float32")
    >>> layer(x).shape == (8, 3)
    True
    >>> layer.count_params()  # μ and ρ of 5 * 3 weights, 3 biases, the KL's weight
    34
    """

    estimator = Flipout


@keras.saving.register_keras_serializable(package="kzoo")
class DenseReparameterization(DenseVariational):
    """A dense layer with a distribution over its weights, drawn once a call.

    All rows share one draw of the kernel, W ~ q:

        y = φ(x W + b),

    so the gradient's variance has a part that does not fall with the batch's size.
    See `DenseFlipout`, which differs in the estimator alone.

    Takes `tfp.layers.DenseReparameterization`'s arguments, with its defaults.

    Reference: Blundell, Cornebise, Kavukcuoglu, Wierstra, "Weight Uncertainty in
    Neural Networks", 2015. https://arxiv.org/abs/1505.05424

    Args:
        **kwargs: `DenseFlipout`'s arguments.

    Call arguments:
        inputs: Tensor. Its mask is passed on.

    Input shape:
        `[B, ..., input_dim]`.

    Output shape:
        `[B, ..., units]`.

    Raises:
        ValueError: As `DenseFlipout`, but any posterior is taken.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import DenseReparameterization
    >>> x = np.ones((2, 5), "float32")
    >>> y = np.asarray(DenseReparameterization(3, seed=0)(x))
    >>> bool((y[0] == y[1]).all())  # equal rows, equal weights
    True
    """

    estimator = Reparameterization


@keras.saving.register_keras_serializable(package="kzoo")
class DenseLocalReparameterization(DenseVariational):
    """A dense layer with a distribution over its weights, whose outputs are drawn.

    Under a posterior N(W̄, σ²) of independent entries each output is normal too, and
    is drawn for itself, with ε ~ N(0, 1):

        y = φ(x W̄ + ε ∘ sqrt(x² σ²) + b).

    So the rows' kernels are independent (a bias that is drawn is shared). See
    `DenseFlipout`, which differs in the estimator alone.

    Takes `tfp.layers.DenseLocalReparameterization`'s arguments, with its defaults.

    Reference: Kingma, Salimans, Welling, "Variational Dropout and the Local
    Reparameterization Trick", 2015. https://arxiv.org/abs/1506.02557

    Args:
        **kwargs: `DenseFlipout`'s arguments.

    Call arguments:
        inputs: Tensor. Its mask is passed on.

    Input shape:
        `[B, ..., input_dim]`.

    Output shape:
        `[B, ..., units]`.

    Raises:
        ValueError: As `DenseFlipout`; when built, if the posterior is not normal.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import DenseLocalReparameterization
    >>> x = np.ones((2, 5), "float32")
    >>> y = np.asarray(DenseLocalReparameterization(3, seed=0)(x))
    >>> bool((y[0] == y[1]).any())
    False
    """

    estimator = LocalReparameterization
