"""BatchEnsemble's maths: one shared linear map, M members' fast weights around it.

Batches are member-major: of M * B rows the first B belong to member 0, the next B
to member 1, and so on (the order `tile` gives).
"""

import keras
from keras import ops


def check_ensemble_size(ensemble_size):
    """Returns `ensemble_size`, or raises ValueError unless it is an integer >= 1."""
    if isinstance(ensemble_size, int) and ensemble_size >= 1:
        return ensemble_size
    raise ValueError(
        "`ensemble_size` must be an integer of at least 1. "
        f"Received: ensemble_size={ensemble_size!r}"
    )


def check_rows(rows, ensemble_size):
    """Raises ValueError if a known number of rows does not split into members."""
    if isinstance(rows, int) and rows % ensemble_size:
        raise ValueError(
            "A member-major batch has the same number of rows for each member, so "
            f"its rows must be divisible by ensemble_size={ensemble_size}. "
            f"Received: a batch of {rows} rows"
        )


def split_members(x, ensemble_size):
    """Gives a member-major batch its member axis: `[M * B, ...] -> [M, B, ...]`.

    Args:
        x: Tensor `[M * B, ...]`.
        ensemble_size: M.

    Returns:
        Tensor `[M, B, ...]`.

    Raises:
        ValueError: If the number of rows is known and M does not divide it. If it
            is known only at run time, TensorFlow raises InvalidArgumentError then.
    """
    shape = ops.shape(x)
    check_rows(shape[0], ensemble_size)
    if x.shape[0] is None and keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        assertion = tf.debugging.assert_equal(
            shape[0] % ensemble_size,
            0,
            message=(
                "A member-major batch has the same number of rows for each member, "
                f"so its rows must be divisible by ensemble_size={ensemble_size}."
            ),
        )
        with tf.control_dependencies([] if assertion is None else [assertion]):
            x = tf.identity(x)
    return ops.reshape(x, (ensemble_size, -1, *shape[1:]))


def merge_members(x):
    """Undoes `split_members`: `[M, B, ...] -> [M * B, ...]`."""
    return ops.reshape(x, (-1, *ops.shape(x)[2:]))
