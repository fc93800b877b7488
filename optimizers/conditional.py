"""Changes of variables where a condition holds that only the device knows."""

import contextlib

import keras
from keras import ops


def change_if(predicate, changes, strategy):
    """Makes the changes where the predicate is true.

    Args:
        predicate: A boolean tensor.
        changes: Pairs of a tuple of variables and a function, which takes their values
            and returns new ones for all of them, or for the first few.
        strategy: On TensorFlow, the `tf.distribute.Strategy` of the variables.
    """
    if keras.backend.backend() != "tensorflow":
        for variables, values in changes:
            _assign(variables, values, predicate)
        return
    import tensorflow as tf

    # XLA fuses a choice into the update that precedes it, but copies all that a
    # conditional may change. Without XLA a choice costs a pass over the variables.
    chosen = _in_xla()

    def change(distribution, predicate):
        predicate = distribution.experimental_local_results(predicate)[0]

        def assign():
            for variables, values in changes:
                first, *rest = (_native(variable) for variable in variables)
                distribution.extended.update(
                    first,
                    lambda *local, values=values: _assign(
                        local, values, predicate if chosen else None
                    ),
                    args=tuple(rest),
                    group=False,
                )

        if chosen:
            assign()
        else:
            ops.cond(predicate, assign, lambda: None)

    tf.__internal__.distribute.interim.maybe_merge_call(change, strategy, predicate)


def _assign(variables, values, predicate=None):
    old = [ops.convert_to_tensor(variable) for variable in variables]
    for variable, kept, value in zip(variables, old, values(*old), strict=False):
        value = ops.cast(value, kept.dtype)
        if predicate is not None:
            value = ops.where(predicate, value, kept)
        variable.assign(value)


def _native(variable):
    return variable.value if isinstance(variable, keras.Variable) else variable


def _in_xla():
    """Whether TensorFlow is tracing a function that XLA will compile."""
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    graph = tf.compat.v1.get_default_graph()
    return control_flow_util.GraphOrParentsInXlaContext(graph)


@contextlib.contextmanager
def eager_scope():
    """Leaves a TensorFlow graph that is being traced; gives whether all is eager now.

    In a distribution strategy a graph cannot be left.
    """
    if keras.backend.backend() != "tensorflow":
        yield True
        return
    import tensorflow as tf

    if tf.executing_eagerly() or tf.distribute.has_strategy():
        yield tf.executing_eagerly()
        return
    with tf.init_scope():
        yield tf.executing_eagerly()
