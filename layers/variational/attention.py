"""Multi-head attention with distributions over the weights of its projections."""

import keras
import numpy as np

from ..attention import ProjectedAttention
from .base import BayesianLayer
from .distributions import (
    MEAN_FIELD_NORMAL,
    POINT,
    STANDARD_NORMAL,
    kl_divergence,
)
from .einsum_dense import (
    EinsumDenseFlipout,
    EinsumDenseLocalReparameterization,
    EinsumDenseReparameterization,
)

# Keras's arguments in whose place the posteriors' functions are.
NOT_TAKEN = (
    "use_bias",
    "kernel_initializer",
    "bias_initializer",
    "kernel_regularizer",
    "bias_regularizer",
    "kernel_constraint",
    "bias_constraint",
)


class MultiHeadAttentionVariational(ProjectedAttention):
    """Attention whose projections draw their weights: `projection` is their class."""

    projection = None
    limits = BayesianLayer.limits

    def __init__(
        self,
        num_heads,
        key_dim,
        value_dim=None,
        dropout=0.0,
        *,
        output_shape=None,
        attention_axes=None,
        sliding_window=None,
        flash_attention=None,
        use_gate=False,
        activity_regularizer=None,
        kernel_posterior_fn=MEAN_FIELD_NORMAL,
        kernel_prior_fn=STANDARD_NORMAL,
        kernel_divergence_fn=kl_divergence,
        bias_posterior_fn=POINT,
        bias_prior_fn=None,
        bias_divergence_fn=kl_divergence,
        num_examples=None,
        seed=None,
        **kwargs,
    ):
        for name in NOT_TAKEN:
            if name in kwargs:
                raise ValueError(
                    "expected `kernel_posterior_fn` and `bias_posterior_fn` in place "
                    f"of `{name}`. Received: {name}={kwargs[name]!r}"
                )
        super().__init__(
            num_heads,
            key_dim,
            value_dim=value_dim,
            dropout=dropout,
            output_shape=output_shape,
            attention_axes=attention_axes,
            sliding_window=sliding_window,
            flash_attention=flash_attention,
            use_gate=use_gate,
            activity_regularizer=activity_regularizer,
            seed=seed,
            **kwargs,
        )
        seeds = np.random.default_rng(self.seed)

        def project(**arguments):
            return self.projection(
                **arguments,
                activity_regularizer=self._activity_regularizer,
                kernel_posterior_fn=kernel_posterior_fn,
                kernel_prior_fn=kernel_prior_fn,
                kernel_divergence_fn=kernel_divergence_fn,
                bias_posterior_fn=bias_posterior_fn,
                bias_prior_fn=bias_prior_fn,
                bias_divergence_fn=bias_divergence_fn,
                num_examples=num_examples,
                seed=None if seed is None else int(seeds.integers(2**31)),
                dtype=self.dtype_policy,
            )

        self._make_projections(project)

    @property
    def num_examples(self):
        """N, what the divergences are divided by."""
        return self._query_dense.num_examples

    def get_config(self):
        """Returns the constructor's arguments."""
        config = super().get_config()
        for name in NOT_TAKEN:
            del config[name]
        of_projection = self._query_dense.get_config().items()
        return {
            **config,
            **{name: value for name, value in of_projection if name.endswith("_fn")},
            "num_examples": self.num_examples,
        }

    @classmethod
    def from_config(cls, config):
        """Makes a layer from what `get_config` returns."""
        return super().from_config(cls.projection.with_functions(config))


@keras.saving.register_keras_serializable(package="kzoo")
class MultiHeadAttentionFlipout(MultiHeadAttentionVariational):
    """Multi-head attention with distributions over its weights, estimated by Flipout.

    Query, key and value are projected to heads h, attention weighs the values, and the
    heads are projected to the output:

        Q_h = x_q W_h^Q,   K_h = x_k W_h^K,   V_h = x_v W_h^V,
        y = Σ_h softmax(Q_h K_hᵀ / sqrt(d_k)) V_h W_h^O,

    and biases b. Each of the four weights W (five with `use_gate`) is drawn from a
    posterior of its own and estimated as `kzoo.layers.EinsumDenseFlipout` does, which
    the projections are: `layer.query_dense`, `key_dense`, `value_dense`,
    `output_dense`. They have signs of their own for each row and each position, so
    that two positions of a sequence are projected by weights that are uncorrelated,
    not by one weight. (By one weight in all positions, where that matters:
    `MultiHeadAttentionReparameterization`, or `kzoo.layers.PosteriorSamples`.) The
    softmax is not linear: the output's mean is not the output at the means.

    The divergence of each weight is added to the model's losses once a step, as
    `kzoo.layers.DenseFlipout` says. Takes `keras.layers.MultiHeadAttention`'s
    arguments, those after `dropout` by name, but for `use_bias` and the initializers,
    regularizers and constraints, which the functions of the posteriors have. What is
    not as in Keras: on JAX values may have another size than keys; the scores'
    symbolic shape is right if T is not S; what dropout draws is saved, and is the same
    when compiled.

    Reference: Wen, Vicol, Ba, Tran, Grosse, "Flipout: Efficient Pseudo-Independent
    Weight Perturbations on Mini-Batches", 2018. https://arxiv.org/abs/1803.04386;
    Vaswani et al., "Attention Is All You Need", 2017.
    https://arxiv.org/abs/1706.03762

    Args:
        num_heads: Number of heads.
        key_dim: d_k, a head's size of query and key.
        value_dim: A head's size of value. Defaults to `key_dim`.
        dropout: Rate at which attention's weights are dropped in training.
        output_shape: Sizes of the output's last axes. Defaults to the query's last.
        attention_axes: Axes that are attended over. Defaults to all between the
            batch's and the last.
        sliding_window: How far a position attends, as Keras counts it. Defaults to any.
        flash_attention: Whether to use the backend's flash attention.
        use_gate: Whether a projection of the query gates the heads.
        activity_regularizer: Of the projections' outputs.
        kernel_posterior_fn: As `kzoo.layers.DenseFlipout`'s, and so the following:
            makes q of each of the projections' kernels.
        kernel_prior_fn: Makes the kernels' priors.
        kernel_divergence_fn: Their divergence.
        bias_posterior_fn: Makes the biases' posteriors. None: no biases.
        bias_prior_fn: Makes the biases' priors. Defaults to none.
        bias_divergence_fn: Their divergence.
        num_examples: N, what the divergences are divided by.
        seed: An integer of at least 0, for the same draws again: each projection gets
            a seed of its own from it.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        query: Tensor.
        value: Tensor.
        key: Tensor. Defaults to `value`.
        attention_mask: Where a position may attend to another, `[B, T, S]`; beside the
            masks that the tensors have.
        return_attention_scores: Whether to return attention's weights too.
        training: Whether to drop weights out.
        use_causal_mask: Whether to hide later positions.

    Input shape:
        Query `[B, T, channels]`; value and key `[B, S, channels]`, each with channels
        of its own.

    Output shape:
        `[B, T, query's channels]`, or `[B, T, *output_shape]`; attention's weights
        `[B, num_heads, T, S]`.

    Raises:
        ValueError: If an argument is out of range; when built, as `DenseFlipout`.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import MultiHeadAttentionFlipout
    >>> layer = MultiHeadAttentionFlipout(num_heads=2, key_dim=4, num_examples=1000)
    >>> x = np.ones((3, 7, 5), "float32")
    >>> layer(x, x, use_causal_mask=True).shape == (3, 7, 5)
    True
    """

    projection = EinsumDenseFlipout


@keras.saving.register_keras_serializable(package="kzoo")
class MultiHeadAttentionReparameterization(MultiHeadAttentionVariational):
    """Multi-head attention with distributions over its weights, drawn once a call.

    All rows and positions share one draw of each weight, W ~ q. See
    `MultiHeadAttentionFlipout`, which differs in the estimator alone.

    Reference: Blundell, Cornebise, Kavukcuoglu, Wierstra, "Weight Uncertainty in
    Neural Networks", 2015. https://arxiv.org/abs/1505.05424

    Args:
        **kwargs: `MultiHeadAttentionFlipout`'s arguments.

    Call arguments:
        query: As `MultiHeadAttentionFlipout`'s, and so the others.

    Input shape:
        Query `[B, T, channels]`; value and key `[B, S, channels]`.

    Output shape:
        `[B, T, query's channels]`, or `[B, T, *output_shape]`.

    Raises:
        ValueError: As `MultiHeadAttentionFlipout`, but any posterior is taken.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import MultiHeadAttentionReparameterization
    >>> layer = MultiHeadAttentionReparameterization(num_heads=2, key_dim=4)
    >>> x = np.ones((3, 7, 5), "float32")
    >>> layer(x, x).shape == (3, 7, 5)
    True
    """

    projection = EinsumDenseReparameterization


@keras.saving.register_keras_serializable(package="kzoo")
class MultiHeadAttentionLocalReparameterization(MultiHeadAttentionVariational):
    """Multi-head attention with distributions over its weights; projections are drawn.

    Each number that is projected has the distribution it has under a normal posterior
    N(W̄, σ²), and is drawn for itself: x W̄ + ε ∘ sqrt(x² σ²), with ε ~ N(0, 1). See
    `MultiHeadAttentionFlipout`, which differs in the estimator alone.

    Reference: Kingma, Salimans, Welling, "Variational Dropout and the Local
    Reparameterization Trick", 2015. https://arxiv.org/abs/1506.02557

    Args:
        **kwargs: `MultiHeadAttentionFlipout`'s arguments.

    Call arguments:
        query: As `MultiHeadAttentionFlipout`'s, and so the others.

    Input shape:
        Query `[B, T, channels]`; value and key `[B, S, channels]`.

    Output shape:
        `[B, T, query's channels]`, or `[B, T, *output_shape]`.

    Raises:
        ValueError: As `MultiHeadAttentionFlipout`; when built, if a posterior is not
            normal.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import MultiHeadAttentionLocalReparameterization
    >>> layer = MultiHeadAttentionLocalReparameterization(num_heads=2, key_dim=4)
    >>> x = np.ones((3, 7, 5), "float32")
    >>> layer(x, x).shape == (3, 7, 5)
    True
    """

    projection = EinsumDenseLocalReparameterization
