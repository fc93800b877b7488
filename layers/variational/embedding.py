"""Embeddings with a distribution over their table."""

import keras
from keras import ops

from ..ops.arguments import integer
from .base import VariationalLayer
from .estimators import Flipout, LocalReparameterization, Reparameterization
from .mode import Samples, mode


class EmbeddingVariational(VariationalLayer):
    """y = W[id], with the table W drawn from a posterior."""

    def __init__(self, input_dim, output_dim, mask_zero=False, **kwargs):
        for name in ("activation", "bias_posterior_fn", "bias_prior_fn"):
            if kwargs.get(name) not in (None, "linear"):
                raise ValueError(
                    f"expected no `{name}`: an embedding is a look-up alone. "
                    f"Received: {name}={kwargs[name]!r}"
                )
        super().__init__(**{**kwargs, "bias_posterior_fn": None})
        self.input_dim = integer("input_dim", input_dim)
        self.output_dim = integer("output_dim", output_dim)
        self.mask_zero = self.supports_masking = bool(mask_zero)
        self.autocast = False  # Half precision does not tell all ids apart.

    def _weight_shapes(self, input_shape):
        return (self.input_dim, self.output_dim), None

    def _sign_shapes(self, input_shape):
        positions = [1] * (len(input_shape) - 1)
        return None, (input_shape[0], *positions, self.output_dim)

    def linear(self, ids, kernel):
        """W[id]."""
        return ops.take(kernel, ids, axis=0)

    def call(self, inputs):
        """Returns rows of a table that is drawn as the estimator does."""
        ids, now = inputs, mode()
        if ids.dtype not in ("int32", "int64"):
            ids = ops.cast(ids, "int32")
        if isinstance(now, Samples):
            return self._of_samples(ids, now)
        kernel = self._drawn(self.kernel, self._sign_shapes(ops.shape(ids)))

        def linear(one, kernel):
            # e_id W, with `one` the entry of the one-hot vector e_id that is not 0.
            return one * self.linear(ids, kernel)

        one = ops.ones((), self.compute_dtype)
        return self.estimator.apply(linear, one, kernel)

    def compute_mask(self, inputs, mask=None):
        """Returns where the ids are not 0, if that stands for padding."""
        return ops.not_equal(inputs, 0) if self.mask_zero else None

    def compute_output_shape(self, input_shape):
        """Returns the ids' shape with `output_dim` after it."""
        return (*input_shape, self.output_dim)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            "input_dim": self.input_dim,
            "output_dim": self.output_dim,
            "mask_zero": self.mask_zero,
            **super().get_config(),
        }


@keras.saving.register_keras_serializable(package="kzoo")
class EmbeddingFlipout(EmbeddingVariational):
    """An embedding with a distribution over its table, estimated by Flipout.

    A look-up is the product of a one-hot vector and the table, W[id] = e_id W. The
    table W is drawn from a posterior q with mean W̄. One perturbation ΔW̃ = W - W̄ is
    drawn for the whole batch, and each example n turns its signs by a random vector
    r_n of -1 and +1, one number a column, the same at all its positions:

        y_n = W̄[id] + ΔW̃[id] ∘ r_n.

    So an example has one table, W̄ + ΔW̃ ∘ (1 r_nᵀ), in which an id that comes twice
    has one row. Signs s_n of the table's rows, as Flipout's other layers have for their
    inputs, are not needed. The entries of ΔW̃ are independent and symmetric about 0, so
    the table has the distribution of ΔW̃ whatever the r_n; and of two examples

        E[ΔW̃_ij r_nj ΔW̃_kl r_ml] = E[ΔW̃_ij ΔW̃_kl] E[r_nj] E[r_ml] = 0,

    as r_n and r_m are independent. Rows of the batch are examples: unlike in
    `DenseFlipout` the positions of an example have no signs of their own.

    Each call draws a perturbation of the whole table, `input_dim * output_dim`
    numbers, however few ids it looks up; the gradient is dense, as the divergence's is.

    All else is as `kzoo.layers.DenseFlipout` says, whose kernel is the table here.
    Takes `keras.layers.Embedding`'s arguments `input_dim`, `output_dim` and
    `mask_zero`. There is neither bias nor activation.

    Reference: Wen, Vicol, Ba, Tran, Grosse, "Flipout: Efficient Pseudo-Independent
    Weight Perturbations on Mini-Batches", 2018. https://arxiv.org/abs/1803.04386

    Args:
        input_dim: Number of ids, the table's rows.
        output_dim: Size of the vectors.
        mask_zero: Whether the id 0 is padding, which later layers do not see.
        activity_regularizer: Of the output.
        kernel_posterior_fn: As `kzoo.layers.DenseFlipout`'s, and so the following: it
            makes q, of the table.
        kernel_prior_fn: Makes the table's prior.
        kernel_divergence_fn: Its divergence.
        num_examples: N, what the divergence is divided by.
        seed: An integer, for the same draws again.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Tensor of integers from 0 to `input_dim - 1`, of any dtype.

    Input shape:
        `[B, ...]`.

    Output shape:
        `[B, ..., output_dim]`.

    Raises:
        ValueError: If `input_dim` or `output_dim` is not above 0, or a bias or an
            activation is given; when built, as `DenseFlipout`.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import EmbeddingFlipout
    >>> layer = EmbeddingFlipout(10, 4, num_examples=1000)
    >>> y = np.asarray(layer(np.array([[1, 2, 1], [1, 5, 0]])))
    >>> y.shape
    (2, 3, 4)
    >>> bool((y[0, 0] == y[0, 2]).all())  # one id, one vector in an example
    True
    """

    estimator = Flipout


@keras.saving.register_keras_serializable(package="kzoo")
class EmbeddingReparameterization(EmbeddingVariational):
    """An embedding with a distribution over its table, drawn once a call.

    All examples share one draw of the table, W ~ q: y = W[id]. See
    `EmbeddingFlipout`, which differs in the estimator alone.

    Reference: Blundell, Cornebise, Kavukcuoglu, Wierstra, "Weight Uncertainty in
    Neural Networks", 2015. https://arxiv.org/abs/1505.05424

    Args:
        **kwargs: `EmbeddingFlipout`'s arguments.

    Call arguments:
        inputs: Tensor of integers from 0 to `input_dim - 1`, of any dtype.

    Input shape:
        `[B, ...]`.

    Output shape:
        `[B, ..., output_dim]`.

    Raises:
        ValueError: As `EmbeddingFlipout`, but any posterior is taken.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import EmbeddingReparameterization
    >>> y = np.asarray(EmbeddingReparameterization(10, 4)(np.array([[1, 2], [1, 0]])))
    >>> bool((y[0, 0] == y[1, 0]).all())  # equal ids, equal vectors
    True
    """

    estimator = Reparameterization


@keras.saving.register_keras_serializable(package="kzoo")
class EmbeddingLocalReparameterization(EmbeddingVariational):
    """An embedding with a distribution over its table, whose vectors are drawn.

    Each number looked up has the distribution it has under a normal posterior
    N(W̄, σ²), and is drawn for itself, with ε ~ N(0, 1):

        y = W̄[id] + ε ∘ σ[id].

    Only what is looked up is drawn, not the table. An id that comes twice in an example
    has one vector under the posterior; here it has two draws, as positions of a
    convolution have. See `EmbeddingFlipout`, which differs in the estimator alone.

    Reference: Kingma, Salimans, Welling, "Variational Dropout and the Local
    Reparameterization Trick", 2015. https://arxiv.org/abs/1506.02557

    Args:
        **kwargs: `EmbeddingFlipout`'s arguments.

    Call arguments:
        inputs: Tensor of integers from 0 to `input_dim - 1`, of any dtype.

    Input shape:
        `[B, ...]`.

    Output shape:
        `[B, ..., output_dim]`.

    Raises:
        ValueError: As `EmbeddingFlipout`; when built, if the posterior is not normal.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import EmbeddingLocalReparameterization
    >>> layer = EmbeddingLocalReparameterization(10, 4, num_examples=1000)
    >>> layer(np.array([[1, 2, 1], [1, 5, 0]])).shape == (2, 3, 4)
    True
    """

    estimator = LocalReparameterization
