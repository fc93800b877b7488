"""MIMO: subnetworks that share one network, each with an input and an output."""

import keras
from keras import ops

from ...layers import AverageMembers
from ...layers.ops.arguments import integer, rate
from ...layers.ops.batch_ensemble import check_rows, merge_members, split_members
from ..predictive import check_logits


def mimo(network, input_shape, classes, members=3, *, name="mimo"):
    """Builds an ensemble inside of one network, with an input and an output a member.

    The network takes M inputs side by side, on their channels, and gives M times the
    logits. In training the M inputs of a row are different examples, and output m is
    trained to be that of x_m; so the network comes to hold M subnetworks, which do not
    heed each other's inputs. At test all inputs are the same, and

        p(y | x) = (1/M) sum_m p_m(y | x, ..., x),

    at the cost of one network that is wider at its first and last layer alone.

    It keeps to the conventions of `kzoo.layers.AverageMembers`: a training batch is
    member-major. Its rows for member 0 are the first inputs, and so on, so that a
    shuffled batch that is just split among the members (`members="split"` of
    `kzoo.zoo.train`, or plain `fit`) has independent inputs in each row; one that is
    tiled has not, and would train M equal members. `mimo_batches` adds the paper's
    repetitions. The loss is the mean over the members, where the paper has the sum.

    Reference: Havasi, Jenatton, Fort, Liu, Snoek, Lakshminarayanan, Dai, Tran,
    "Training independent subnetworks for robust prediction", 2021.
    https://arxiv.org/abs/2010.06610

    Args:
        network: Makes the network: a function of an input shape, `(..., channels)`, and
            a number of logits. It is given M times the channels and the classes.
        input_shape: Shape of an example, `(..., channels)`.
        classes: Number of classes.
        members: M.
        name: Name of the model.

    Returns:
        A `keras.Model` from examples to logits. Its input has the name of the
        network's.

    Raises:
        ValueError: If `members` or `classes` is no integer of at least 1, or the
            network has not the inputs and logits that it was asked for.

    Example:

    >>> from functools import partial
    >>> from kzoo.zoo.models.mimo import mimo
    >>> from kzoo.zoo.models.resnet import resnet
    >>> one = resnet((8, 8, 1), 10, depth=8).count_params()
    >>> model = mimo(partial(resnet, depth=8), (8, 8, 1), 10, members=3)
    >>> model.output_shape, model.count_params() - one  # 2 * 9 * 16 + 2 * 65 * 10
    ((None, 10), 1588)
    """
    members, classes = integer("members", members), integer("classes", classes)
    *rest, channels = input_shape
    wide = (*rest, members * channels)
    inner = network(wide, members * classes)
    found = [tuple(x.shape[1:]) for x in (*inner.inputs, *inner.outputs)]
    if found != [wide, (members * classes,)]:
        raise ValueError(
            f"expected a network from {wide} to {members * classes} logits. Received: "
            f"inputs and outputs of shapes {found}"
        )
    check_logits(inner)
    x = inputs = keras.Input(
        tuple(input_shape), dtype=inner.inputs[0].dtype, name=inner.inputs[0].name
    )
    x = inner(MembersSideBySide(members, name="side_by_side")(x))
    x = MembersApart(members, name="apart")(x)
    return keras.Model(inputs, AverageMembers(members, name="average")(x), name=name)


def mimo_batches(
    batches, members=3, *, batch_repetitions=4, input_repetition=0.0, seed=None
):
    """Regroups training batches for MIMO.

    Each example of a batch of B comes R times for each member, in an order of the
    member's own, so that gradients vary less than with B columns of inputs; and of the
    columns the share ρ has one example for all members, for networks that are too small
    to hold M subnetworks that know nothing of each other.

    Args:
        batches: `tf.data.Dataset` of batches `(x, y)` of B examples.
        members: M.
        batch_repetitions: R, the paper's batch repetition.
        input_repetition: ρ, the paper's input repetition probability. It is met exactly
            in every batch, up to rounding.
        seed: Integer, for the same orders again; they differ from epoch to epoch.

    Returns:
        `tf.data.Dataset` of member-major batches `(x, y)` of M R B rows.

    Raises:
        ValueError: If an argument is out of range.

    Example:

    >>> import tensorflow as tf
    >>> from kzoo.zoo.models.mimo import mimo_batches
    >>> batches = tf.data.Dataset.from_tensor_slices(([1, 2, 3], [10, 20, 30])).batch(3)
    >>> (x, y), = mimo_batches(batches, members=2, batch_repetitions=1)
    >>> x.shape[0], bool((y == 10 * x).numpy().all())  # Labels go with their examples.
    (6, True)
    """
    import tensorflow as tf

    members = integer("members", members)
    repetitions = integer("batch_repetitions", batch_repetitions)
    input_repetition = rate("input_repetition", input_repetition)

    def shuffled(rows, columns, key):
        return tf.argsort(tf.random.stateless_uniform([rows, columns], key), axis=1)

    def regroup(batch, key):
        rows = tf.shape(tf.nest.flatten(batch)[0])[0]
        columns = repetitions * rows
        free = columns - tf.cast(
            tf.round(input_repetition * tf.cast(columns, "float32")), "int32"
        )
        keys = tf.random.split(tf.stack([key, 0]), 2)
        column = shuffled(1, columns, keys[0])[0] % rows
        own = tf.gather(column[:free], shuffled(members, free, keys[1]))
        same = tf.broadcast_to(column[free:], [members, columns - free])
        row = tf.reshape(tf.concat([own, same], axis=1), [-1])
        return tf.nest.map_structure(lambda x: tf.gather(x, row), batch)

    keys = tf.data.Dataset.random(seed=seed, rerandomize_each_iteration=True)
    return tf.data.Dataset.zip(batches, keys).map(
        lambda batch, key: regroup(batch, key), num_parallel_calls=tf.data.AUTOTUNE
    )


@keras.saving.register_keras_serializable(package="kzoo")
class MembersSideBySide(keras.layers.Layer):
    """Puts the members' rows side by side on the last axis; in training their own.

    Outside of training every member has all rows.

    Args:
        ensemble_size: M, the number of members.
        **kwargs: `keras.layers.Layer`'s arguments.
    """

    def __init__(self, ensemble_size, **kwargs):
        super().__init__(autocast=False, **kwargs)  # Pixels are scaled behind it.
        self.ensemble_size = integer("ensemble_size", ensemble_size)

    def call(self, inputs, training=False):
        """Returns `[B, ..., M C]`, in training of `[M B, ..., C]`."""
        if not training:
            return ops.concatenate([inputs] * self.ensemble_size, axis=-1)
        x = ops.moveaxis(split_members(inputs, self.ensemble_size), 0, -2)
        # A known number of channels: without, TensorFlow's convolutions take them for
        # grouped ones, which it compiles.
        channels = self.ensemble_size * inputs.shape[-1]
        return ops.reshape(x, (*ops.shape(x)[:-2], channels))

    def compute_output_spec(self, inputs, training=False):
        """Returns the output's symbolic tensor."""
        rows, *rest, channels = inputs.shape
        if training:
            check_rows(rows, self.ensemble_size)
            rows = None if rows is None else rows // self.ensemble_size
        shape = (rows, *rest, self.ensemble_size * channels)
        return keras.KerasTensor(shape, dtype=inputs.dtype)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "ensemble_size": self.ensemble_size}


@keras.saving.register_keras_serializable(package="kzoo")
class MembersApart(keras.layers.Layer):
    """Gives the members rows of their own: `[B, M C]` -> `[M B, C]`, member-major.

    Args:
        ensemble_size: M, the number of members.
        **kwargs: `keras.layers.Layer`'s arguments.
    """

    def __init__(self, ensemble_size, **kwargs):
        super().__init__(autocast=False, **kwargs)
        self.ensemble_size = integer("ensemble_size", ensemble_size)

    def call(self, inputs):
        """Returns the rows."""
        x = ops.reshape(inputs, (-1, self.ensemble_size, self._classes(inputs.shape)))
        return merge_members(ops.moveaxis(x, 1, 0))

    def compute_output_shape(self, input_shape):
        """Returns the output's shape."""
        rows = input_shape[0]
        rows = None if rows is None else self.ensemble_size * rows
        return rows, self._classes(input_shape)

    def compute_output_spec(self, inputs):
        """Returns the output's symbolic tensor."""
        shape = self.compute_output_shape(inputs.shape)
        return keras.KerasTensor(shape, dtype=inputs.dtype)

    def _classes(self, input_shape):
        return input_shape[-1] // self.ensemble_size

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "ensemble_size": self.ensemble_size}
