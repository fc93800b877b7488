"""MultiHeadAttentionBatchEnsemble."""

import keras

from ..attention import ProjectedAttention
from ..conversion import counterpart, holders
from ..ops.arguments import integer
from ..ops.batch_ensemble import check_rows
from ..ops.random import own_initializer
from .einsum_dense import EinsumDenseBatchEnsemble

# The arguments that Keras's layer has not, and each projection takes.
OF_MEMBERS = (
    "rank",
    "ensemble_size",
    "alpha_initializer",
    "gamma_initializer",
    "shared_trainable",
)


@keras.saving.register_keras_serializable(package="kzoo")
class MultiHeadAttentionBatchEnsemble(ProjectedAttention):
    """M layers of multi-head attention that share the kernels of their projections.

    Query, key and value are projected to heads h, attention weighs the values, and the
    heads are projected to the output:

        Q_h = x_q W_h^Q,   K_h = x_k W_h^K,   V_h = x_v W_h^V,
        y = Σ_h softmax(Q_h K_hᵀ / sqrt(d_k)) V_h W_h^O,

    and biases b. Each of the four projections (five with `use_gate`) is an
    `EinsumDenseBatchEnsemble` with fast weights of its own, in which member m's kernels
    are W ∘ (r_m s_mᵀ): `layer.query_dense`, `key_dense`, `value_dense`, `output_dense`.
    The fast weights of heads lie along both n, the heads, and h, a head's channels.
    Attention itself has no weights, and a row attends to its own positions alone, so
    members stay apart.

    Query, key and value are member-major, and all else is as
    `kzoo.layers.DenseBatchEnsemble` says. Takes `keras.layers.MultiHeadAttention`'s
    arguments, those after `key_dim` by name. What is not as in Keras: on JAX values
    may have another size than keys; the scores' symbolic shape is right if T is not S;
    what dropout draws is saved, and is the same when compiled.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715; Vaswani et
    al., "Attention Is All You Need", 2017. https://arxiv.org/abs/1706.03762

    Args:
        num_heads: Number of heads.
        key_dim: d_k, a head's size of query and key.
        rank: K, how many fast weights are summed.
        ensemble_size: M, the number of members.
        value_dim: A head's size of value. Defaults to `key_dim`.
        dropout: Rate at which attention's weights are dropped in training.
        use_bias: Whether the projections have biases, one for each member.
        output_shape: Sizes of the output's last axes. Defaults to the query's last.
        attention_axes: Axes that are attended over. Defaults to all between the
            batch's and the last.
        sliding_window: How far a position attends, as Keras counts it. Defaults to any.
        flash_attention: Whether to use the backend's flash attention.
        alpha_initializer: For each projection's `alpha`, r.
        gamma_initializer: For each projection's `gamma`, s.
        kernel_initializer: For each projection's `kernel`, W.
        bias_initializer: For each projection's `bias`, b.
        kernel_regularizer: Of the kernels W.
        bias_regularizer: Of the biases.
        activity_regularizer: Of the projections' outputs.
        kernel_constraint: On the kernels W.
        bias_constraint: On the biases.
        use_gate: Whether a projection of the query gates the heads.
        seed: An integer of at least 0, for the same dropout again.
        shared_trainable: Whether the shared kernels are trained, if the layer is.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        query: Tensor.
        value: Tensor.
        key: Tensor. Defaults to `value`.
        attention_mask: Where a position may attend to another, `[M * B, T, S]`; beside
            the masks that the tensors have.
        return_attention_scores: Whether to return attention's weights too.
        training: Whether to drop weights out.
        use_causal_mask: Whether to hide later positions.

    Input shape:
        Query `[M * B, T, channels]`; value and key `[M * B, S, channels]`, each with
        channels of its own.

    Output shape:
        `[M * B, T, query's channels]`, or `[M * B, T, *output_shape]`; attention's
        weights `[M * B, num_heads, T, S]`.

    Raises:
        ValueError: If an argument is out of range; when called, if M does not divide
            the number of rows.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import MultiHeadAttentionBatchEnsemble
    >>> layer = MultiHeadAttentionBatchEnsemble(2, key_dim=4, ensemble_size=3)
    >>> x = np.ones((6, 7, 5), "float32")  # two rows for each of the three members
    >>> layer(x, x, use_causal_mask=True).shape == (6, 7, 5)
    True
    >>> layer.count_params()  # 4 * 5 * 8 + 3 * (3 * (5 + 2 * 8) + 8 + 2 * 5)
    403
    """

    def __init__(
        self,
        num_heads,
        key_dim,
        *,
        rank=1,
        ensemble_size=4,
        value_dim=None,
        dropout=0.0,
        use_bias=True,
        output_shape=None,
        attention_axes=None,
        sliding_window=None,
        flash_attention=None,
        alpha_initializer="ones",
        gamma_initializer="ones",
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        use_gate=False,
        seed=None,
        shared_trainable=True,
        **kwargs,
    ):
        # Of all weights, which Keras's layer and each projection take.
        weights = {
            "kernel_initializer": kernel_initializer,
            "bias_initializer": bias_initializer,
            "kernel_regularizer": kernel_regularizer,
            "bias_regularizer": bias_regularizer,
            "activity_regularizer": activity_regularizer,
            "kernel_constraint": kernel_constraint,
            "bias_constraint": bias_constraint,
        }
        super().__init__(
            num_heads,
            key_dim,
            value_dim=value_dim,
            dropout=dropout,
            use_bias=use_bias,
            output_shape=output_shape,
            attention_axes=attention_axes,
            sliding_window=sliding_window,
            flash_attention=flash_attention,
            use_gate=use_gate,
            seed=seed,
            **weights,
            **kwargs,
        )

        def project(**arguments):
            own = {"kernel_initializer": own_initializer(kernel_initializer)}
            return EinsumDenseBatchEnsemble(
                **arguments,
                **{**weights, **own},
                rank=rank,
                ensemble_size=ensemble_size,
                alpha_initializer=alpha_initializer,
                gamma_initializer=gamma_initializer,
                shared_trainable=shared_trainable,
                dtype=self.dtype_policy,
            )

        self._make_projections(project)

    @property
    def rank(self):
        """K, how many fast weights are summed."""
        return self._query_dense.rank

    @property
    def ensemble_size(self):
        """M, the number of members."""
        return self._query_dense.ensemble_size

    def member(self, index):
        """Makes the plain Keras layer that one member is.

        Args:
            index: m, an integer from 0 to M - 1.

        Returns:
            A built layer whose projections have the member's own kernels and biases.

        Raises:
            ValueError: If the layer is not built, or there is no such member.
        """
        m = integer("index", index, 0, self.ensemble_size - 1)
        plain = counterpart(self, keras.layers.MultiHeadAttention)
        for one, other in zip(holders(self), holders(plain), strict=True):
            one._give_member(m, other)
        return plain

    def compute_output_shape(self, query_shape, value_shape, key_shape=None):
        """Returns the output's shape."""
        check_rows(query_shape[0], self.ensemble_size)
        return super().compute_output_shape(query_shape, value_shape, key_shape)

    def get_config(self):
        """Returns the constructor's arguments."""
        of_projection = self._query_dense.get_config()
        return {
            **super().get_config(),
            **{name: of_projection[name] for name in OF_MEMBERS},
        }
