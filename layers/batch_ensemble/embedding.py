"""EmbeddingBatchEnsemble."""

import keras
from keras import ops

from ..conversion import numpy
from ..ops.arguments import integer
from ..ops.batch_ensemble import split_members
from .base import BatchEnsembleLayer


@keras.saving.register_keras_serializable(package="kzoo")
class EmbeddingBatchEnsemble(BatchEnsembleLayer):
    """M embeddings that share one table.

    Member m's table is W ∘ (r_m s_mᵀ): the shared W with its rows, one an id, scaled
    by the member's fast weights r_m, and its columns by s_m. A look-up is the product
    of a one-hot vector e_id and the table, so no member's table is formed:

        y = ((e_id ∘ r_m) W) ∘ s_m = r_m[id] W[id] ∘ s_m.

    With rank K, y = W[id] ∘ Σ_k r_mk[id] s_mk.

    A model of M members has for each `input_dim + output_dim` weights more than one.
    The batch is member-major, and all else is as `kzoo.layers.DenseBatchEnsemble` says;
    there is neither bias nor activation.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        input_dim: Number of ids, the table's rows.
        output_dim: Size of the vectors.
        rank: K, how many fast weights are summed.
        ensemble_size: M, the number of members.
        alpha_initializer: For `alpha`, r: `[M, input_dim]`, or `[K, M, input_dim]`.
        gamma_initializer: For `gamma`, s: `[M, output_dim]`, or `[K, M, output_dim]`.
        embeddings_initializer: For `embeddings`, W: `[input_dim, output_dim]`.
        embeddings_regularizer: Of W.
        embeddings_constraint: On W.
        mask_zero: Whether the id 0 is padding, which later layers do not see.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Member-major tensor of integers from 0 to `input_dim - 1`, of any dtype.

    Input shape:
        `[M * B, ...]`.

    Output shape:
        `[M * B, ..., output_dim]`.

    Raises:
        ValueError: If `input_dim`, `output_dim`, `rank` or `ensemble_size` is not an
            integer of at least 1; when called, if M does not divide the number of rows.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import EmbeddingBatchEnsemble
    >>> layer = EmbeddingBatchEnsemble(10, 4, ensemble_size=2)
    >>> ids = np.array([[1, 2, 3], [4, 5, 0]])  # a row for each of the two members
    >>> layer(ids).shape == (2, 3, 4)
    True
    >>> layer.count_params()  # 10 * 4 + 2 * (10 + 4)
    68
    """

    def __init__(
        self,
        input_dim,
        output_dim,
        rank=1,
        ensemble_size=4,
        alpha_initializer="ones",
        gamma_initializer="ones",
        embeddings_initializer="uniform",
        embeddings_regularizer=None,
        embeddings_constraint=None,
        mask_zero=False,
        **kwargs,
    ):
        # Without autocast, a mixed precision policy does not round large ids, and the
        # gradients of r and s, sums over all ids, are summed in r's and s's precision.
        super().__init__(
            rank=rank,
            ensemble_size=ensemble_size,
            alpha_initializer=alpha_initializer,
            gamma_initializer=gamma_initializer,
            autocast=False,
            **kwargs,
        )
        self._share(
            keras.layers.Embedding,
            {
                "input_dim": integer("input_dim", input_dim),
                "output_dim": integer("output_dim", output_dim),
                "embeddings_initializer": embeddings_initializer,
                "embeddings_regularizer": embeddings_regularizer,
                "embeddings_constraint": embeddings_constraint,
                "mask_zero": mask_zero,
            },
        )
        self.supports_masking = mask_zero

    @property
    def embeddings(self):
        """The table W that all members share."""
        return self.shared.embeddings

    def build(self, input_shape):
        """Creates the shared table and the fast weights."""
        self._build_shared(input_shape)
        self._add_fast_weights((self.shared.input_dim,), (self.shared.output_dim,))

    def call(self, inputs):
        """Returns every member's vectors for its own rows."""
        members, ids_of_all = self.ensemble_size, self.shared.input_dim
        r, s = self._fast_weights()
        if self.rank == 1:
            r, s = r[None], s[None]
        vectors = self.shared(inputs)
        ids = ops.cast(split_members(inputs, members), "int32")
        ids = ops.reshape(ids, (members, -1))
        # r of all members in one table [M * input_dim, K]; an id stays with its member.
        r = ops.reshape(ops.moveaxis(r, 0, -1), (-1, self.rank))
        first = ops.arange(members, dtype="int32")[:, None] * ids_of_all
        r = ops.take(r, first + ids % ids_of_all, axis=0)
        scale = ops.matmul(r, ops.moveaxis(s, 0, 1))  # Σ_k r_mk[id] s_mk
        scale = ops.cast(scale, vectors.dtype)
        return vectors * ops.reshape(scale, ops.shape(vectors))

    def compute_mask(self, inputs, mask=None):
        """Returns where the ids are not 0, if that stands for padding."""
        return self.shared.compute_mask(inputs)

    def _give_member(self, m, plain):
        scale = self._scale(m, *self._fast_weights())
        plain.embeddings.assign(numpy(self.embeddings) * scale)
