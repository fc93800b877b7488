"""PReLUBatchEnsemble."""

import keras
from keras import ops

from ..ops.batch_ensemble import per_member
from .member_weights import MemberWeights


@keras.saving.register_keras_serializable(package="kzoo")
class PReLUBatchEnsemble(MemberWeights, keras.layers.PReLU):
    """A rectifier with slopes that each member of a BatchEnsemble has of its own.

    The batch is member-major: of M * B rows the first B belong to member 0, the next B
    to member 1, and so on. With member m's slopes a_m,

        y = max(x, 0) + a_m ∘ min(x, 0).

    It equals M layers `keras.layers.PReLU`, each for its member's rows.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715; He, Zhang,
    Ren, Sun, "Delving Deep into Rectifiers", 2015. https://arxiv.org/abs/1502.01852

    Args:
        ensemble_size: M, the number of members.
        alpha_initializer: For `alpha`, a: `[M, ...]`, shaped as a row of the input,
            with 1 for the shared axes. Defaults to zeros.
        alpha_regularizer: Of a.
        alpha_constraint: On a.
        shared_axes: Axes of the input along which a slope is the same, such as `[1, 2]`
            for images. Defaults to none.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Member-major tensor. Its mask is passed on.

    Input shape:
        `[M * B, ...]`.

    Output shape:
        The input's.

    Raises:
        ValueError: If `ensemble_size` is not an integer of at least 1; when called, if
            M does not divide the number of rows.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import PReLUBatchEnsemble
    >>> layer = PReLUBatchEnsemble(ensemble_size=2)
    >>> x = -np.ones((2, 1), "float32")  # a row for each of the two members
    >>> layer.build(x.shape)
    >>> layer.set_weights([np.array([[0.25], [0.5]])])
    >>> np.asarray(layer(x)).ravel().tolist()
    [-0.25, -0.5]
    """

    def call(self, inputs):
        """Returns the rows, rectified with their members' slopes."""
        # Without the shared axes: see how `per_member` repeats weights.
        sizes = {i: size for i, size in enumerate(self.alpha.shape) if i and size > 1}
        slopes = ops.reshape(self.alpha, (self.ensemble_size, *sizes.values()))
        return per_member(
            lambda x, a: ops.relu(x) - a * ops.relu(-x),
            inputs,
            slopes,
            axis=tuple(sizes),
        )
