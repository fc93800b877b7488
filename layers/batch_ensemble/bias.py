"""BiasBatchEnsemble."""

import operator

import keras

from ..conversion import counterpart, numpy
from ..ops.arguments import integer, is_integer
from ..ops.batch_ensemble import per_member
from ..ops.random import own_initializer
from .member_weights import MemberWeights


@keras.saving.register_keras_serializable(package="kzoo")
class BiasBatchEnsemble(MemberWeights, keras.layers.Layer):
    """Adds to each row the bias of its member of a BatchEnsemble.

    The batch is member-major: of M * B rows the first B belong to member 0, the next B
    to member 1, and so on. Row n of member m becomes

        y_n = x_n + b_m.

    After a plain layer it makes the members differ by their biases alone.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        ensemble_size: M, the number of members.
        axis: Integer or tuple of integers: the axes that a bias has; along the others
            it is the same. The first axis is the batch's, and none of them.
        bias_initializer: For `bias`, b: `[M, *sizes]`, each size an axis's, in the
            input's order.
        bias_regularizer: Of b.
        bias_constraint: On b.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Member-major tensor. Its mask is passed on.

    Input shape:
        `[M * B, ...]`.

    Output shape:
        The input's.

    Raises:
        ValueError: If `ensemble_size` is not an integer of at least 1 or `axis` is
            neither an integer nor some; when built, if it is none of the input's axes,
            or its size is unknown; when called, if M does not divide the number of
            rows.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import BiasBatchEnsemble
    >>> layer = BiasBatchEnsemble(ensemble_size=2)
    >>> x = np.zeros((4, 3), "float32")  # two rows for each of the two members
    >>> layer.build(x.shape)
    >>> layer.set_weights([np.array([[1, 2, 3], [4, 5, 6]])])
    >>> np.asarray(layer(x)).tolist()[1:3]
    [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    """

    def __init__(
        self,
        ensemble_size=4,
        axis=-1,
        bias_initializer="zeros",
        bias_regularizer=None,
        bias_constraint=None,
        **kwargs,
    ):
        super().__init__(ensemble_size, **kwargs)
        axes = (axis,) if is_integer(axis) else axis
        if not isinstance(axes, (list, tuple)) or not all(map(is_integer, axes)):
            raise ValueError(
                "expected `axis` to be an integer or a tuple of integers. "
                f"Received: axis={axis!r}"
            )
        self.axis = axis if is_integer(axis) else tuple(axis)
        self.bias_initializer = own_initializer(bias_initializer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.bias_constraint = keras.constraints.get(bias_constraint)

    def build(self, input_shape):
        """Creates the members' biases."""
        ndim = len(input_shape)
        axes = (self.axis,) if is_integer(self.axis) else self.axis
        sizes = {i % ndim: input_shape[i] for i in axes if -ndim <= i < ndim}
        if len(sizes) < len(axes) or 0 in sizes or None in sizes.values():
            raise ValueError(
                "expected `axis` to be axes of the input but the first, of known size. "
                f"Received: axis={self.axis}, inputs of shape {tuple(input_shape)}"
            )
        self._axes = tuple(sorted(sizes))
        self.bias = self.add_weight(
            name="bias",
            shape=[sizes[i] for i in self._axes],
            initializer=self.bias_initializer,
            regularizer=self.bias_regularizer,
            constraint=self.bias_constraint,
        )
        self.input_spec = keras.layers.InputSpec(ndim=ndim, axes=sizes)

    def call(self, inputs):
        """Returns the rows, each with its member's bias."""
        return per_member(operator.add, inputs, self.bias, axis=self._axes)

    def member(self, index):
        """Makes the layer that one member is: Keras has none of a bias alone.

        Args:
            index: m, an integer from 0 to M - 1.

        Returns:
            A built layer of this class, of one member.

        Raises:
            ValueError: If the layer is not built, or there is no such member.
        """
        m = integer("index", index, 0, self.ensemble_size - 1)
        made = counterpart(self, type(self), ensemble_size=1)
        made.bias.assign(numpy(self.bias)[m : m + 1])
        return made

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "axis": self.axis,
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
        }
