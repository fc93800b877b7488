"""Changes of variables where a condition holds that only the device knows."""

import contextlib

import keras
from keras import ops


def change_if(predicate, changes, strategy):
    """Makes the changes where the predicate is true.

    Args:
        predicate: A boolean tensor.
        changes: Triples: the variables to change, the variables that are only read,
            and a function that takes the values of the former and of the latter, and
            returns new ones for the former. No change concerns what another changes.
        strategy: On TensorFlow, the `tf.distribute.Strategy` of the variables.
    """
    if keras.backend.backend() == "jax":
        import jax

        if isinstance(predicate, jax.core.Tracer):
            _change_in_loop(predicate, changes)
        elif predicate:
            for change in changes:
                _change(*change)
        return
    import tensorflow as tf

    in_xla = _in_xla()

    def merged(distribution, predicate):
        def local(variable):
            return distribution.experimental_local_results(_native(variable))[0]

        def change():
            for changed, read, values in changes:
                first, *rest = (_native(variable) for variable in (*changed, *read))
                n = len(changed)
                distribution.extended.update(
                    first,
                    lambda *local, n=n, values=values: _change(
                        local[:n], local[n:], values
                    ),
                    args=tuple(rest),
                    group=False,
                )

        predicate = local(predicate)
        if in_xla:  # Which takes one replica only.
            _change_in_loop(
                predicate,
                [
                    (tuple(map(local, changed)), tuple(map(local, read)), values)
                    for changed, read, values in changes
                ],
            )
        else:
            ops.cond(predicate, change, lambda: None)

    tf.__internal__.distribute.interim.maybe_merge_call(merged, strategy, predicate)


def _change(changed, read, values):
    change = (changed, read, values)
    new = _new(change, _tensors(changed), _tensors(read))
    for variable, value in zip(changed, new, strict=True):
        variable.assign(ops.copy(value))  # On JAX two must not share a buffer.


def _change_in_loop(predicate, changes):
    """Makes the changes in a loop of one round, or of none.

    XLA lets a loop change its values in place. Of a conditional it copies all that
    may change, and a choice between old and new values is a pass over them a step.
    """
    rounds = ops.cast(predicate, "int32")
    old = [_tensors(changed) for changed, _, _ in changes]
    read = [_tensors(read) for _, read, _ in changes]

    def change(i, *old):
        return i + 1, *map(_new, changes, old, read)

    _, *new = ops.while_loop(lambda i, *_: i < rounds, change, (0, *old))
    for (changed, _, _), values in zip(changes, new, strict=True):
        for variable, value in zip(changed, values, strict=True):
            variable.assign(value)


def _new(change, old, read):
    *_, values = change
    new = values(*old, *read)
    return [ops.cast(n, o.dtype) for n, o in zip(new, old, strict=True)]


def _tensors(variables):
    return [ops.convert_to_tensor(variable) for variable in variables]


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
