"""Taps: custom gradients by which layers tell what goes through them.

A tap stands before a layer's activation and changes nothing. It is a function of s, of
what the layer was given and of zeros, which are no part of its value; but what it gives
for the gradient by those zeros is what the curvature of the layer is made of, such as
Σ aᵀa and Σ gᵀg. So one gradient by all zeros collects that of all layers. It sums over
all calls of a layer, in loops over time and in recomputed segments too, where the
values themselves could not be got at.
"""

import contextlib

import keras
from keras import ops
from keras.src.backend import get_keras_mask

from .blocks.base import attributes

# g is of the order of one example's part of the mean loss: times this, half precision
# has room for it. A power of 2, so that nothing is rounded.
SCALE = 1024.0


@contextlib.contextmanager
def running_cells(model):
    """A context without cuDNN, which runs no cell and has no second derivative."""
    with contextlib.ExitStack() as stack:
        for layer in model._flatten_layers():
            if hasattr(layer, "use_cudnn"):
                stack.enter_context(attributes(layer, use_cudnn=False))
        yield


@contextlib.contextmanager
def tapped(model, parts, zeros, caches):
    """A context in which layers' calls have taps.

    Args:
        model: The model.
        parts: List of parts, whose blocks' layers these are.
        zeros: The list of tensors of each, of the shapes of its statistics.
        caches: The list of tensors of each, the values of its caches. (In the model's
            call the optimizer's variables cannot be read.)
    """
    with running_cells(model), contextlib.ExitStack() as stack:
        for part, *values in zip(parts, zeros, caches, strict=True):

            def tap(inputs, outputs, part=part, values=values):
                return _tap(part, inputs, outputs, *values)

            stack.enter_context(part.block.tapping(tap))
        yield


def _tap(part, inputs, outputs, zeros, caches):
    block, dtype = part.block, part.dtype
    weights = block.weights(inputs, get_keras_mask(inputs))
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(inputs.dtype)):
        inputs = ops.cast(inputs, dtype)  # Integers have no gradient, not even 0.
    others = [inputs, *caches]
    if weights is not None:
        others.append(weights)

    @ops.custom_gradient
    def identity(outputs, *values):
        inputs, *caches = values[: 1 + len(part.caches)]
        counted = None if weights is None else values[len(others) - 1]

        def gradient(*args, upstream=None):
            if upstream is None:
                (upstream,) = args
            a = block.full_rows(ops.cast(inputs, dtype))
            g = block.derivatives(ops.cast(upstream, dtype) / SCALE)
            if counted is None:
                count = ops.ones_like(g[(0,) * (len(g.shape) - 3) + (..., 0)])
            else:
                count = ops.cast(counted, dtype)
            found = part.approximation.measure(a, g, count, caches)
            return upstream, *map(ops.zeros_like, others), *found

        return outputs, gradient

    return identity(outputs, *others, *zeros)
