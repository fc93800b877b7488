"""What the metrics of classifiers read: labels and (members') predictions."""

from keras import ops

from ...layers.ops.uncertainty import at_least_float32


def member_predictions(y_pred):
    """Gives predictions their member axis: `[B, C]` or `[B, M, C]` -> `[B, M, C]`.

    Args:
        y_pred: Predictions of one model, `[B, C]`, or of M members, `[B, M, C]`.

    Returns:
        Tensor `[B, M, C]`, at least float32.

    Raises:
        ValueError: If the rank is neither 2 nor 3.
    """
    y_pred = at_least_float32(y_pred)
    if len(y_pred.shape) == 2:
        return ops.expand_dims(y_pred, 1)
    if len(y_pred.shape) == 3:
        return y_pred
    raise ValueError(
        "`y_pred` must have the shape [B, C] or, with M members, [B, M, C]. "
        f"Received: y_pred with shape {tuple(y_pred.shape)}"
    )


def member_probabilities(y_pred, from_logits):
    """Returns the members' probabilities `[B, M, C]`, at least float32."""
    y_pred = member_predictions(y_pred)
    return ops.softmax(y_pred, axis=-1) if from_logits else y_pred


def label_probabilities(y_true, like):
    """Returns labels as distributions over the classes.

    Args:
        y_true: Class indices, `[B]` or `[B, 1]`, or distributions, `[B, C]`.
        like: Predictions `[B, C]`, of as many examples.

    Returns:
        float32 tensor `[B, C]`. The row of an index that is none of 0 ... C - 1 is
        NaN: a compiled program cannot raise, and no number would be right.

    Raises:
        ValueError: If the shape is none of these, or B is known to differ.
    """
    y_true = ops.convert_to_tensor(y_true)
    shape = tuple(y_true.shape)
    rows, classes = like.shape
    if shape and None not in (rows, shape[0]) and rows != shape[0]:
        raise ValueError(
            "`y_true` and `y_pred` must have the same number of examples. "
            f"Received: {shape[0]} and {rows}"
        )
    if len(shape) == 2 and shape[1] == classes:
        return ops.cast(y_true, "float32")
    if len(shape) == 1 or (len(shape) == 2 and shape[1] == 1):
        index = ops.reshape(y_true, (-1, 1))
        whole = ops.cast(index, "int32")
        is_class = ops.logical_and(index >= 0, index < classes)
        is_class = ops.logical_and(is_class, ops.equal(whole, index))
        one_hot = ops.one_hot(whole[:, 0], classes)
        return ops.where(is_class, one_hot, float("nan"))
    raise ValueError(
        f"`y_true` must hold class indices, [B] or [B, 1], or one row of {classes} "
        f"values an example, [B, {classes}]. Received: y_true with shape {shape}"
    )


def example_weights(sample_weight, like):
    """Returns one weight an example: ones unless `sample_weight` is given.

    Args:
        sample_weight: None, a number, or a tensor `[B]` or `[B, 1]`.
        like: Tensor `[B]`, whose shape and dtype the weights take.

    Returns:
        Tensor `[B]`. A weight below 0 is NaN: no example counts less than nothing.
    """
    if sample_weight is None:
        return ops.ones_like(like)
    sample_weight = ops.cast(ops.convert_to_tensor(sample_weight), like.dtype)
    if len(sample_weight.shape) == 2:
        sample_weight = ops.squeeze(sample_weight, -1)
    sample_weight = ops.where(sample_weight >= 0, sample_weight, float("nan"))
    return ops.broadcast_to(sample_weight, ops.shape(like))


def cell_sums(values, cell, like):
    """Returns the sum of the values in every cell.

    Args:
        values: Tensor `[B]`.
        cell: Integers `[B]`.
        like: What the sums are added to, one for each cell; they take its dtype.

    Returns:
        Tensor like `like`.
    """
    # An added row of zero lets a batch be empty, which segment_sum may not be.
    values = ops.concatenate([values, ops.zeros((1,), values.dtype)])
    cell = ops.concatenate([cell, ops.zeros((1,), cell.dtype)])
    sums = ops.segment_sum(values, cell, num_segments=like.shape[0])
    return ops.cast(sums, like.dtype)
