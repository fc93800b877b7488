"""Refuses, at import, a Keras backend that kzoo does not run on."""

import keras

SUPPORTED = ("tensorflow", "jax")


def require_supported():
    """Raises ImportError unless Keras runs on TensorFlow or JAX."""
    backend = keras.backend.backend()
    if backend not in SUPPORTED:
        raise ImportError(
            "kzoo runs on the Keras backends 'tensorflow' and 'jax'. Set the "
            "environment variable KERAS_BACKEND to one of them before importing "
            f"keras. Received: {backend!r}"
        )
