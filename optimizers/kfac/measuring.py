"""The curvature's factors of one batch, from one gradient by the taps."""

import keras
from keras import ops

from ...layers.ops.gradient import gradients
from ...layers.ops.random import nth_seed
from .fisher import terms_of
from .state import tensors
from .taps import SCALE, tapped


def every(batch, k):
    """Returns every k-th example of a batch, and which part of the batch they are.

    Args:
        batch: Structure of tensors and None, of which the first one is a tensor.
        k: An integer.
    """
    if k == 1:
        return batch, 1.0
    n = ops.shape(keras.tree.flatten(batch)[0])[0]
    fraction = ops.cast((n + k - 1) // k, "float32") / ops.cast(n, "float32")
    return keras.tree.map_structure(
        lambda t: None if t is None else t[::k], batch
    ), fraction


def measured(model, parts, kind, batch, seed, fraction=1.0):
    """Returns the factors of a batch, part by part in one list.

    Args:
        model: A compiled model.
        parts: List of parts of its curvature.
        kind: One of `KINDS` of Fisher information.
        batch: Inputs, labels and sample weights, of which the latter two may be None.
        seed: Pair of integers.
        fraction: Which part of the training step's examples these are.
    """
    x, y, sample_weight = batch
    with_block = [part for part in parts if part.block]
    without = [part.variables[0] for part in parts if not part.block]
    zeros = [part.zeros() for part in with_block]
    caches = [tensors(part.caches) for part in with_block]
    trainable = {id(v): ops.convert_to_tensor(v) for v in model.trainable_variables}
    other = tensors(model.non_trainable_variables)
    terms = terms_of(model)
    if kind == "exact":
        x = _copies(model, x)
    arguments = {"training": True} if model._call_has_training_arg else {}

    def f(*values):
        values = list(values)
        taps = [[values.pop(0) for _ in tensors] for tensors in zeros]
        weights = {**trainable, **dict(zip(map(id, without), values, strict=True))}
        with tapped(model, with_block, taps, caches):
            # Nothing that the call changes, such as batch statistics, is kept.
            outputs, _ = model.stateless_call(
                list(weights.values()), other, x, **arguments
            )
        return SCALE * _f(terms, kind, outputs, y, sample_weight, seed, fraction)

    values = [tensor for tensors in zeros for tensor in tensors]
    values += [trainable[id(variable)] for variable in without]
    found = gradients(f, values)
    factors = []
    for part, tensors_of in zip(with_block, zeros, strict=True):
        statistics = [found.pop(0) for _ in tensors_of]
        factors += part.approximation.average(*statistics)
    for part in parts[len(with_block) :]:
        gradient = ops.cast(found.pop(0), part.dtype) / SCALE
        factors += part.approximation.average(gradient)
    return factors


def of_outputs(terms, outputs, sample_weight):
    """Returns triples of each term, its output and its sample weights.

    Args:
        terms: What `terms_of` returns.
        outputs: The model's.
        sample_weight: Of all outputs, of each one, or None.
    """
    outputs = keras.tree.flatten(outputs)
    weights = keras.tree.flatten(sample_weight)
    if len(weights) != len(outputs):
        weights = weights * len(outputs)
    return list(zip(terms, outputs, weights, strict=True))


def _f(terms, kind, outputs, y, sample_weight, seed, fraction):
    """Returns f of all outputs."""
    found = of_outputs(terms, outputs, sample_weight)
    labels = keras.tree.flatten(y) if y is not None else [None] * len(found)
    total = 0.0
    for i, (term, output, weight) in enumerate(found):
        if term is not None:
            of_term = nth_seed(seed, i)
            total = total + term.f(kind, output, labels[i], weight, of_term, fraction)
    return total


def _copies(model, x):
    """Returns a batch C times, with C the size of the last axis of the output."""
    spec = keras.tree.map_structure(lambda t: keras.KerasTensor(t.shape, t.dtype), x)
    outputs = keras.tree.flatten(model.compute_output_spec(spec))
    if len(outputs) != 1:
        raise ValueError(
            'fisher="exact" expects a model with one output. Received: '
            f"{model.name}, with {len(outputs)}"
        )
    size = outputs[0].shape[-1]
    return keras.tree.map_structure(
        lambda t: ops.tile(t, (size, *(1,) * (len(t.shape) - 1))), x
    )
