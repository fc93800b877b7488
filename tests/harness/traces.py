"""Counts what a backend traces and compiles."""

import contextlib
import sys

import keras

if keras.backend.backend() == "jax":
    import jax
else:
    import tensorflow as tf

_jax_events = []


def _listen(event, duration, **kwargs):
    if event == "/jax/core/compile/jaxpr_trace_duration":
        _jax_events.append(event)


if keras.backend.backend() == "jax":
    jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def count_traces():
    """Yields a list that gets one entry for every function traced inside."""
    seen = []
    if keras.backend.backend() == "jax":
        start = len(_jax_events)
        yield seen
        seen.extend(_jax_events[start:])
        return
    graph = tf.__internal__.FuncGraph
    original = graph.__init__

    def counting(self, name, *args, **kwargs):
        seen.append(name)
        return original(self, name, *args, **kwargs)

    graph.__init__ = counting
    try:
        yield seen
    finally:
        graph.__init__ = original


@contextlib.contextmanager
def count_compilers():
    """Yields a list with one entry for every tf.function or jax.jit made by us."""
    module, name = (
        (jax, "jit") if keras.backend.backend() == "jax" else (tf, "function")
    )
    original = getattr(module, name)
    seen = []

    def counting(*args, **kwargs):
        # Keras's own convolutions make one, for instance.
        if sys._getframe(1).f_globals["__name__"].split(".")[0] != "keras":
            seen.append(name)
        return original(*args, **kwargs)

    setattr(module, name, counting)
    try:
        yield seen
    finally:
        setattr(module, name, original)
