"""LayerNormalizationBatchEnsemble."""

import keras
from keras import ops

from ..ops.batch_ensemble import per_member
from .member_weights import MemberWeights


@keras.saving.register_keras_serializable(package="kzoo")
class LayerNormalizationBatchEnsemble(MemberWeights, keras.layers.LayerNormalization):
    """Layer normalization after which each member of a BatchEnsemble scales by itself.

    The batch is member-major: of M * B rows the first B belong to member 0, the next B
    to member 1, and so on. A row's mean μ and variance σ² over `axis` are its own
    anyhow; the scale γ_m and the offset β_m are its member's:

        y = γ_m ∘ (x - μ) / sqrt(σ² + ε) + β_m.

    It equals M layers `keras.layers.LayerNormalization`, each for its member's rows.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715; Ba, Kiros,
    Hinton, "Layer Normalization", 2016. https://arxiv.org/abs/1607.06450

    Args:
        ensemble_size: M, the number of members.
        axis: Integer or integers: the axes that are normalized over. Defaults to -1.
        epsilon: ε. Defaults to 0.001.
        center: Whether there is a β. Defaults to True.
        scale: Whether there is a γ. Defaults to True.
        beta_initializer: For `beta`, β: `[M, *sizes]`, each size an axis's. Defaults to
            zeros.
        gamma_initializer: For `gamma`, γ: likewise. Defaults to ones.
        beta_regularizer: Of β.
        gamma_regularizer: Of γ.
        beta_constraint: On β.
        gamma_constraint: On γ.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Member-major tensor. Its mask is passed on.

    Input shape:
        `[M * B, ...]`.

    Output shape:
        The input's.

    Raises:
        ValueError: If `ensemble_size` is not an integer of at least 1, or `rms_scaling`
            is given; when called, if M does not divide the number of rows.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import LayerNormalizationBatchEnsemble
    >>> layer = LayerNormalizationBatchEnsemble(ensemble_size=2, epsilon=0.0)
    >>> x = np.array([[1.0, 3.0], [1.0, 3.0]])  # a row for each of the two members
    >>> layer.build(x.shape)
    >>> layer.set_weights([np.array([[1, 1], [5, 5]]), np.zeros((2, 2))])
    >>> np.asarray(layer(x)).round(3).tolist()
    [[-1.0, 1.0], [-5.0, 5.0]]
    """

    def __init__(self, ensemble_size=4, **kwargs):
        if kwargs.get("rms_scaling"):
            raise ValueError(
                "expected a layer without `rms_scaling`, which Keras gives up. "
                f"Received: rms_scaling={kwargs['rms_scaling']!r}"
            )
        super().__init__(ensemble_size, **kwargs)

    def call(self, inputs):
        """Returns the rows, normalized, with their members' scales and offsets."""
        # In single precision at least, as in Keras.
        x = ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))
        x = ops.layer_normalization(x, axis=self.axis, epsilon=self.epsilon)
        outputs = per_member(_affine, x, self.gamma, self.beta, axis=tuple(self.axis))
        return ops.cast(outputs, self.compute_dtype)


def _affine(x, gamma, beta):
    if gamma is not None:
        x = x * ops.cast(gamma, x.dtype)
    return x if beta is None else x + ops.cast(beta, x.dtype)
