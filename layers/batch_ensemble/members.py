"""From one batch to M members' rows, and from M predictions to the ensemble's."""

import keras
from keras import ops

from ..ops.arguments import integer
from ..ops.batch_ensemble import check_rows, split_members
from ..ops.uncertainty import at_least_float32, ensemble_log_probs


@keras.saving.register_keras_serializable(package="kzoo")
class TileMembers(keras.layers.Layer):
    """Shows every member of a BatchEnsemble the same rows, outside training.

    BatchEnsemble layers read a member-major batch: of M * B rows the first B belong
    to member 0, and so on. Outside training this layer makes one of a plain batch
    by repeating it M times. In training it returns its input as it is, for there
    the batch already belongs to the members: either it was split among them (each
    sees its own B / M rows) or the input pipeline tiled examples and labels.

    Put it first in a model and `AverageMembers` last; plain `fit`, `evaluate` and
    `predict` are then right.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        ensemble_size: M, the number of members.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Tensor `[B, ...]` of any dtype; a mask is tiled with it.
        training: Whether the batch is a training batch. Defaults to False.

    Input shape:
        `[B, ...]`.

    Output shape:
        `[M * B, ...]`; in training, the input's.

    Raises:
        ValueError: If `ensemble_size` is not an integer of at least 1.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import TileMembers
    >>> tile = TileMembers(ensemble_size=2)
    >>> x = np.array([[1.0], [2.0]], "float32")
    >>> np.ravel(tile(x)).tolist()
    [1.0, 2.0, 1.0, 2.0]
    >>> np.ravel(tile(x, training=True)).tolist()
    [1.0, 2.0]
    """

    def __init__(self, ensemble_size, **kwargs):
        # Without autocast, ids that are floats do not lose their digits under a mixed
        # precision policy before they are looked up.
        super().__init__(autocast=False, **kwargs)
        self.ensemble_size = integer("ensemble_size", ensemble_size)
        self.supports_masking = True
        self._training = False

    def call(self, inputs, training=False):
        """Returns the rows of all members."""
        self._training = training
        if training:
            return inputs
        return ops.tile(inputs, (self.ensemble_size, *(1 for _ in inputs.shape[1:])))

    def compute_mask(self, inputs, previous_mask):
        """Returns the mask of all members' rows."""
        if previous_mask is None:
            return None
        # A layer, for a functional model records what is done here once, when it is
        # built, and must tell this step too whether it trains. `call` was told just
        # before.
        return TileMembers(self.ensemble_size)(previous_mask, training=self._training)

    def compute_output_shape(self, input_shape):
        """Returns the output's shape outside training."""
        rows = input_shape[0]
        rows = None if rows is None else rows * self.ensemble_size
        return (rows, *input_shape[1:])

    def compute_output_spec(self, inputs, training=False):
        """Returns the output's symbolic tensor; its dtype is the input's."""
        self._training = training
        shape = inputs.shape if training else self.compute_output_shape(inputs.shape)
        return keras.KerasTensor(shape, dtype=inputs.dtype)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "ensemble_size": self.ensemble_size}


@keras.saving.register_keras_serializable(package="kzoo")
class AverageMembers(keras.layers.Layer):
    """Turns the outputs of M members, such as logits, into those of the ensemble.

    In training the rows stay the members' own and the output is their
    log-probabilities log p_m(c), so that a cross-entropy from logits is the mean of
    the members' negative log-likelihoods. Outside training the output is the log of
    the mean of the members' probabilities,

        log p(c) = log (1/M) sum_m softmax(logits_m)(c).

    Both are valid logits (their softmax is the probability they stand for), so one
    loss, `keras.losses.SparseCategoricalCrossentropy(from_logits=True)`, is right
    in `fit` and in `evaluate`. The output is float32 also under mixed precision
    (float64 if the logits are).

    Outputs that are no logits, such as probabilities or a regression's, are left alone
    in training and averaged as they are outside of it (`from_logits=False`).

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        ensemble_size: M, the number of members.
        from_logits: Whether the inputs are logits of a classifier.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Logits of a member-major batch, `[M * B, ..., C]`; or other outputs,
            `[M * B, ...]`.
        training: Whether the batch is a training batch. Defaults to False.

    Input shape:
        `[M * B, ..., C]`, or `[M * B, ...]` if not from logits.

    Output shape:
        The input's with B in place of M * B; in training, the input's.

    Raises:
        ValueError: If `ensemble_size` is not an integer of at least 1, or does not
            divide the number of rows, or there is but one logit, whose probability
            would be 1.

    Example:

    >>> import numpy as np
    >>> from kzoo.layers import AverageMembers
    >>> average = AverageMembers(ensemble_size=2)
    >>> logits = np.log([[0.9, 0.1], [0.3, 0.7]]).astype("float32")
    >>> np.exp(average(logits)).round(3)
    array([[0.6, 0.4]], dtype=float32)
    >>> average(logits, training=True).shape[0]
    2
    """

    def __init__(self, ensemble_size, from_logits=True, **kwargs):
        # Without autocast, float32 logits do not lose their digits under a mixed
        # precision policy before they are averaged.
        super().__init__(autocast=False, **kwargs)
        self.ensemble_size = integer("ensemble_size", ensemble_size)
        self.from_logits = from_logits
        self.input_spec = keras.InputSpec(min_ndim=2 if from_logits else 1)
        self.supports_masking = True
        self._training = False

    def build(self, input_shape):
        """Checks the number of logits."""
        if self.from_logits and input_shape[-1] == 1:
            raise ValueError(
                "expected logits of at least two classes, or `from_logits=False`. "
                f"Received: inputs of shape {tuple(input_shape)}"
            )

    def call(self, inputs, training=False):
        """Returns members' or, outside training, the ensemble's outputs."""
        self._training = training
        if not self.from_logits:
            outputs = at_least_float32(inputs)
            if training:
                return outputs
            return ops.mean(split_members(outputs, self.ensemble_size), axis=0)
        if training:
            return ops.log_softmax(at_least_float32(inputs), axis=-1)
        members = split_members(inputs, self.ensemble_size)
        return ensemble_log_probs(ops.moveaxis(members, 0, -2))

    def compute_mask(self, inputs, previous_mask):
        """Returns the mask of the output's rows: the members have the same."""
        if previous_mask is None:
            return None
        # A layer, as in TileMembers.
        return _FirstMember(self.ensemble_size)(previous_mask, training=self._training)

    def compute_output_shape(self, input_shape):
        """Returns the output's shape outside training."""
        return _shape_of_one(input_shape, self.ensemble_size)

    def compute_output_spec(self, inputs, training=False):
        """Returns the output's symbolic tensor."""
        self._training = training
        shape = inputs.shape if training else self.compute_output_shape(inputs.shape)
        dtype = "float64" if inputs.dtype == "float64" else "float32"
        return keras.KerasTensor(shape, dtype=dtype)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "ensemble_size": self.ensemble_size,
            "from_logits": self.from_logits,
        }


@keras.saving.register_keras_serializable(package="kzoo", name="FirstMember")
class _FirstMember(keras.layers.Layer):
    """The rows of member 0 outside training; in training all rows."""

    def __init__(self, ensemble_size, **kwargs):
        super().__init__(**kwargs)
        self.ensemble_size = ensemble_size

    def call(self, inputs, training=False):
        if training:
            return inputs
        return split_members(inputs, self.ensemble_size)[0]

    def compute_output_spec(self, inputs, training=False):
        shape = inputs.shape
        shape = shape if training else _shape_of_one(shape, self.ensemble_size)
        return keras.KerasTensor(shape, dtype=inputs.dtype)

    def get_config(self):
        return {**super().get_config(), "ensemble_size": self.ensemble_size}


def _shape_of_one(shape, ensemble_size):
    rows = shape[0]
    check_rows(rows, ensemble_size)
    return (None if rows is None else rows // ensemble_size, *shape[1:])
