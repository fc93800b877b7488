"""Taps: custom gradients by which layers tell what goes through them.

A tap stands before a layer's activation and changes nothing. It is a function of s, of
what the layer was given and of zeros, which are no part of its value; but what it gives
for the gradient by those zeros is what the curvature of the layer is made of, such as
Σ aᵀa and Σ gᵀg. So one gradient by all zeros collects that of all layers. It sums over
all calls of a layer, in loops over time and in recomputed segments too, where the
values themselves could not be got at.
"""

import contextlib

from keras import ops

# g is of the order of one example's part of the mean loss: times this, half precision
# has room for it. A power of 2, so that nothing is rounded.
SCALE = 1024.0


@contextlib.contextmanager
def tapped(blocks, approximations, zeros):
    """A context in which layers' calls have taps.

    Args:
        blocks: List of blocks, whose layers these are.
        approximations: The approximation of each, which says what to collect.
        zeros: The list of tensors of each, of the shapes of its statistics.
    """
    with contextlib.ExitStack() as stack:
        for parts in zip(blocks, approximations, zeros, strict=True):
            stack.enter_context(_tapped(*parts))
        yield


@contextlib.contextmanager
def _tapped(block, approximation, zeros):
    layer = block.layer
    call = layer.call

    def tapped_call(inputs, *args, **kwargs):
        activation = vars(layer).get("activation")
        if activation is None:
            outputs = call(inputs, *args, **kwargs)
            return _tap(block, approximation, inputs, outputs, zeros)

        def tapped_activation(s):
            return activation(_tap(block, approximation, inputs, s, zeros))

        with _attribute(layer, "activation", tapped_activation):
            return call(inputs, *args, **kwargs)

    with _attribute(layer, "call", tapped_call):
        yield


@contextlib.contextmanager
def _attribute(layer, name, value):
    """Gives a layer an attribute for a while, past what Keras keeps account of."""
    missing = object()
    before = vars(layer).get(name, missing)
    vars(layer)[name] = value
    try:
        yield
    finally:
        if before is missing:
            del vars(layer)[name]
        else:
            vars(layer)[name] = before


def _tap(block, approximation, inputs, outputs, zeros):
    dtype = zeros[0].dtype

    @ops.custom_gradient
    def identity(outputs, inputs, *zeros):
        def gradient(*args, upstream=None):
            if upstream is None:
                (upstream,) = args
            a = block.full_rows(ops.cast(inputs, dtype))
            g = block.derivatives(ops.cast(upstream, dtype) / SCALE)
            weights = ops.ones_like(g[(0,) * (len(g.shape) - 3) + (..., 0)])
            statistics = approximation.measure(a, g, weights)
            return upstream, ops.zeros_like(inputs), *statistics

        return outputs, gradient

    return identity(outputs, inputs, *zeros)
