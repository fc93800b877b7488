"""BatchNormalizationBatchEnsemble."""

import keras
from keras import ops

from ..ops.batch_ensemble import per_member, split_members
from .member_weights import MemberWeights


@keras.saving.register_keras_serializable(package="kzoo")
class BatchNormalizationBatchEnsemble(MemberWeights, keras.layers.BatchNormalization):
    """Batch normalization of each member of a BatchEnsemble by itself.

    The batch is member-major: of M * B rows the first B belong to member 0, the next B
    to member 1, and so on. Each channel is normalized by its member's mean and
    variance, and scaled and moved by its member's γ_m and β_m:

        y = γ_m ∘ (x - μ_m) / sqrt(σ_m² + ε) + β_m.

    In training μ_m and σ_m² are those of the member's rows in the batch, and the moving
    averages follow them; outside training they are the moving averages, of which each
    member has its own too. So no member sees another's rows, as it would through a
    plain layer's statistics. It equals M layers `keras.layers.BatchNormalization`, each
    for its member's rows; with `trainable = False` it does not train, as these do not.

    Statistics are computed in single precision at least. Under `tf.distribute` each
    replica has those of its own rows.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715; Ioffe,
    Szegedy, "Batch Normalization", 2015. https://arxiv.org/abs/1502.03167

    Args:
        ensemble_size: M, the number of members.
        axis: Axis of the channels. Defaults to -1.
        momentum: The part of the moving averages that a step keeps. Defaults to 0.99.
        epsilon: ε. Defaults to 0.001.
        center: Whether there is a β. Defaults to True.
        scale: Whether there is a γ. Defaults to True.
        beta_initializer: For `beta`, β: `[M, channels]`. Defaults to zeros.
        gamma_initializer: For `gamma`, γ: `[M, channels]`. Defaults to ones.
        moving_mean_initializer: For `moving_mean`: `[M, channels]`. Defaults to zeros.
        moving_variance_initializer: For `moving_variance`: `[M, channels]`. Defaults to
            ones.
        beta_regularizer: Of β.
        gamma_regularizer: Of γ.
        beta_constraint: On β.
        gamma_constraint: On γ.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Member-major tensor. Its mask is passed on.
        training: Whether the batch is a training batch. Defaults to False.
        mask: Which positions count for the statistics: shaped as the inputs without
            their last axis.

    Input shape:
        `[M * B, ...]`.

    Output shape:
        The input's.

    Raises:
        ValueError: If `ensemble_size` is not an integer of at least 1, or `renorm` or
            `synchronized` is given, which are not supported; when called, if M does
            not divide the number of rows, or the mask has another number of axes.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import BatchNormalizationBatchEnsemble
    >>> layer = BatchNormalizationBatchEnsemble(ensemble_size=2, epsilon=0.0)
    >>> x = np.array([[1.0], [3.0], [10.0], [30.0]])  # two rows for each member
    >>> np.asarray(layer(x, training=True)).ravel().round(3).tolist()
    [-1.0, 1.0, -1.0, 1.0]
    >>> np.asarray(layer.moving_mean).ravel().round(3)
    array([0.02, 0.2 ], dtype=float32)
    """

    def __init__(self, ensemble_size=4, **kwargs):
        for name in ("renorm", "synchronized"):
            if kwargs.get(name):
                raise ValueError(
                    f"expected a layer without `{name}`, which is not supported. "
                    f"Received: {name}={kwargs[name]!r}"
                )
        super().__init__(ensemble_size, **kwargs)

    def call(self, inputs, training=None, mask=None):
        """Returns the rows, each normalized by its member's statistics."""
        dtype = keras.backend.result_type(inputs.dtype, "float32")
        x = ops.cast(inputs, dtype)
        mean = ops.cast(self.moving_mean, dtype)
        variance = ops.cast(self.moving_variance, dtype)
        if training and self.trainable:
            moving, now = (mean, variance), self._statistics(x, mask)
            for variable, old, new in zip(
                (self.moving_mean, self.moving_variance), moving, now, strict=True
            ):
                variable.assign(old * self.momentum + new * (1 - self.momentum))
            mean, variance = now
        # y = x ∘ a + c
        a = ops.rsqrt(variance + self.epsilon)
        if self.scale:
            a = a * ops.cast(self.gamma, dtype)
        c = -mean * a
        if self.center:
            c = c + ops.cast(self.beta, dtype)
        outputs = per_member(lambda x, a, c: x * a + c, x, a, c, axis=self.axis)
        return ops.cast(outputs, self.compute_dtype)

    def _statistics(self, x, mask):
        """Means and variances, `[M, channels]`, of what is not masked."""
        axes = [i + 1 for i in range(len(x.shape)) if i != self.axis % len(x.shape)]
        if mask is None:
            return ops.moments(split_members(x, self.ensemble_size), axes)
        if len(mask.shape) != len(x.shape) - 1:
            raise ValueError(
                "expected a mask with one axis less than the inputs. Received: mask of "
                f"shape {tuple(mask.shape)}, inputs of shape {tuple(x.shape)}"
            )
        seen = ops.expand_dims(ops.cast(mask, "bool"), -1)
        seen = ops.broadcast_to(seen, ops.shape(x))
        x, seen = (split_members(tensor, self.ensemble_size) for tensor in (x, seen))
        # As Keras's, whose mean is 0 where nothing is seen.
        count = ops.sum(ops.cast(seen, x.dtype), axes, keepdims=True)
        count = count + keras.config.epsilon()
        mean = ops.sum(ops.where(seen, x, 0), axes, keepdims=True) / count
        square = ops.where(seen, ops.square(x - mean), 0)
        variance = ops.sum(square, axes, keepdims=True) / count
        return ops.squeeze(mean, axes), ops.squeeze(variance, axes)
