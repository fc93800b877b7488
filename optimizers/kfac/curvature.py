"""The curvature of a model: its parts, averaged over batches, inverted, divided by."""

import warnings

from keras import ops

from .approximations.diagonal import DiagonalOfSum
from .blocks.base import find_blocks
from .part import Part
from .state import all_finite, tensors

# What a block has that has none of that name.
APPROXIMATIONS = {
    "kronecker": None,
    "ekfac": None,
    "diagonal": None,
    "lag_one": "kronecker",
    "lag_one_limit": "kronecker",
}


def find_parts(model, variables, key, approximation, sharing, accumulates):
    """Returns the parts of a model's curvature: its blocks, and weights without one.

    Args:
        model: A built model.
        variables: List of those of its weights that are trained.
        key: A function of a variable that is the same for the same one.
        approximation: One of `APPROXIMATIONS`.
        sharing: As of KFAC.
        accumulates: Whether factors are summed over batches before they are averaged.
    """
    trained, known, parts = set(map(key, variables)), set(), []
    for layer in model._flatten_layers():
        for block in find_blocks(layer):
            kinds = block.approximations
            kind = kinds.get(approximation, kinds.get(APPROXIMATIONS[approximation]))
            keys = set(map(key, block.variables))
            if kind and keys <= trained and not keys & known:
                known |= keys
                of_block = kind(block.full_shape, sharing)
                parts.append(Part(block.variables, of_block, block, accumulates))
    others = [variable for variable in variables if key(variable) not in known]
    if others:
        warnings.warn(
            "KFAC knows no CurvatureBlock for these weights, and takes a diagonal "
            f"curvature: {', '.join(v.path for v in others)}"
        )
    parts += [Part([v], DiagonalOfSum(v.shape), None, accumulates) for v in others]
    return parts


def average(k, old, batch, decay):
    """Returns ε A + (1 - ε) A_batch for all factors, with ε = min(1 - 1/k, decay).

    Args:
        k: Which batch it is, from 1 on.
        old: List of factors.
        batch: List of those of the batch.
        decay: The largest ε.
    """
    part = 1 / ops.cast(ops.maximum(k, 1), "float32")
    part = ops.maximum(part, 1 - ops.cast(decay, part.dtype))
    return [
        o + ops.cast(part, o.dtype) * (b - o) for o, b in zip(old, batch, strict=True)
    ]


def of_refresh(parts):
    """Returns the variables that a refresh changes."""
    return [v for part in parts for v in part.of_refresh(part.factors, part.caches)]


def refreshed(parts, damping):
    """Returns the values that a refresh gives `of_refresh`, and how many parts failed.

    Where what is made of a part's factors is not finite, that part stays as it is.

    Args:
        parts: List of parts.
        damping: λ.
    """
    failed, found = 0, []
    for part in parts:
        old = tensors(part.of_refresh(part.factors, part.caches))
        new = part.of_refresh(*part.refreshed(damping))
        finite = all_finite(new)
        failed = failed + 1 - ops.cast(finite, "int32")
        found += [ops.where(finite, n, o) for n, o in zip(new, old, strict=True)]
    return found, failed


def divide(parts, gradients, variables, key, damping, states=None):
    """Returns U, the gradients divided by the curvature.

    Args:
        parts: List of parts.
        gradients: List of tensors.
        variables: List of the weights that they are of.
        key: As above.
        damping: λ.
        states: What `Part.refreshed` returns of each part, in place of their own.
    """
    tensors_of = map(ops.convert_to_tensor, gradients)
    given = dict(zip(map(key, variables), tensors_of, strict=True))
    steps = {}
    for part, state in zip(parts, states or [None] * len(parts), strict=True):
        keys = [key(variable) for variable in part.variables]
        if any(k in given for k in keys):
            found = part.precondition([given.get(k) for k in keys], damping, state)
            steps.update(zip(keys, found, strict=True))
    return [steps[key(variable)] for variable in variables]
