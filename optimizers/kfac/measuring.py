"""The curvature's factors of one batch, from one gradient by the taps."""

import keras
from keras import ops
from keras.src.backend import get_keras_mask, set_keras_mask

from ...layers.ops.gradient import gradients
from ...layers.ops.random import nth_seed
from .state import tensors
from .taps import SCALE, tapped
from .terms import of_each_output, terms_of


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
    weights = {id(v): ops.convert_to_tensor(v) for v in model.trainable_variables}
    other = tensors(model.non_trainable_variables)
    if kind == "exact":
        x = _copies(model, x)
    arguments = {"training": True} if model._call_has_training_arg else {}

    def f(*values):
        values = list(values)
        taps = [[values.pop(0) for _ in tensors] for tensors in zeros]
        of_id = dict(zip(map(id, without), values, strict=True))
        # One that was frozen since the parts were found has no place, and gradient 0.
        given = [of_id.get(name, value) for name, value in weights.items()]
        with tapped(model, with_block, taps, caches):
            # Nothing that the call changes, such as batch statistics, is kept.
            outputs, _ = model.stateless_call(given, other, x, **arguments)
        return SCALE * _f(model, kind, outputs, y, sample_weight, seed, fraction)

    values = [tensor for tensors in zeros for tensor in tensors]
    values += tensors(without)
    found = gradients(f, values)
    factors = []
    for part, tensors_of in zip(with_block, zeros, strict=True):
        statistics = [found.pop(0) for _ in tensors_of]
        factors += part.approximation.average(*statistics)
    for part in parts[len(with_block) :]:
        gradient = ops.cast(found.pop(0), part.dtype) / SCALE
        factors += part.approximation.average(gradient)
    return factors


def of_losses(model, outputs, *given):
    """Returns for each of a model's losses its term, its output, and what is given.

    Args:
        model: A compiled model.
        outputs: Its outputs.
        *given: Labels or sample weights. The latter may be one tensor for all outputs.
    """
    flat, pairs = keras.tree.flatten(outputs), terms_of(model, outputs)
    numbers = [number for number, _ in pairs]
    given = [of_each_output(model, outputs, each, numbers) for each in given]
    return [(term, *(each[i] for each in (flat, *given))) for i, term in pairs]


def for_all(outputs, sample_weight):
    """Returns sample weights of each output, as which one tensor may stand for all."""
    if sample_weight is None or keras.tree.is_nested(sample_weight):
        return sample_weight
    return [sample_weight] * len(keras.tree.flatten(outputs))


def _f(model, kind, outputs, y, sample_weight, seed, fraction):
    """Returns f of all losses."""
    y = y if kind == "empirical" else None
    found = of_losses(model, outputs, y, for_all(outputs, sample_weight))
    total, start = 0.0, 0
    sizes = [output.shape[-1] for _, output, _, _ in found]
    for i, (term, output, labels, weight) in enumerate(found):
        if kind == "exact":
            output = _part(output, start, sizes[i], sum(sizes))
            start += sizes[i]
        of_term = nth_seed(seed, i)
        total = total + term.f(kind, output, labels, weight, of_term, fraction)
    return total


def _part(output, start, size, count):
    """Returns some of an output's copies, with their mask."""
    n = ops.shape(output)[0] // count
    mask, output = get_keras_mask(output), output[start * n : (start + size) * n]
    if mask is not None:
        set_keras_mask(output, mask[start * n : (start + size) * n])
    return output


def _copies(model, x):
    """Returns a batch C times, with C the sum of the last axes of what has a loss."""
    spec = keras.tree.map_structure(lambda t: keras.KerasTensor(t.shape, t.dtype), x)
    outputs = model.compute_output_spec(spec)
    size = sum(output.shape[-1] for _, output in of_losses(model, outputs))
    return keras.tree.map_structure(
        lambda t: ops.tile(t, (size, *(1,) * (len(t.shape) - 1))), x
    )
