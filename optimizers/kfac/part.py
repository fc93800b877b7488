"""A part of the curvature: weights, how theirs is approximated, and its state."""

import keras
from keras import ops

from .state import tensors


class Part:
    """Weights whose curvature is one block of the whole.

    Args:
        variables: The weights.
        approximation: Their approximation.
        block: The `CurvatureBlock` that has them as a matrix, or None for one variable
            as it is.
        accumulates: Whether factors are summed over batches before they are averaged.
    """

    def __init__(self, variables, approximation, block=None, accumulates=False):
        self.variables = variables
        self.approximation = approximation
        self.block = block
        dtype = keras.backend.standardize_dtype(variables[0].dtype)
        self.dtype = "float64" if dtype == "float64" else "float32"
        kinds = [approximation.factors, approximation.caches]
        if accumulates:
            sums = {f"{k}_sum": shape for k, shape in approximation.factors.items()}
            kinds.append(sums)
        self._kinds = kinds

    def layout(self):
        """The name, shape and dtype of every variable of its state."""
        path = self.variables[0].path.replace("/", "_")
        return [
            [f"{path}_{name}", list(shape), self.dtype]
            for kind in self._kinds
            for name, shape in kind.items()
        ]

    def take(self, state):
        """Takes its state from an iterator over variables."""
        kinds = [[next(state) for _ in kind] for kind in self._kinds]
        self.factors, self.caches, *sums = kinds
        self.sums = sums[0] if sums else []

    def zeros(self):
        """The values that its taps' gradients are taken by."""
        return [
            ops.zeros(shape, self.dtype)
            for shape in self.approximation.statistics.values()
        ]

    def refreshed(self, damping):
        """Returns the values that its factors and its caches are to have."""
        return self.approximation.refresh(
            tensors(self.factors), tensors(self.caches), damping
        )

    def of_refresh(self, factors, caches):
        """Which of its factors and caches `refreshed` changes."""
        changed = self.approximation.refreshes
        named = zip(self.approximation.factors, factors, strict=True)
        return [*(factor for name, factor in named if name in changed), *caches]

    def precondition(self, gradients, damping, state=None):
        """Returns the gradients of its variables divided by the curvature.

        Args:
            gradients: List of tensors, None for what has no gradient.
            damping: λ.
            state: What `refreshed` returns, in place of the state as it is.
        """
        gradients = [
            ops.zeros(v.shape, self.dtype) if g is None else ops.cast(g, self.dtype)
            for v, g in zip(self.variables, gradients, strict=True)
        ]
        gradient = self.block.join(gradients) if self.block else gradients[0]
        factors, caches = state or (tensors(self.factors), tensors(self.caches))
        step = self.approximation.precondition(gradient, factors, caches, damping)
        return self.block.split(step) if self.block else [step]
