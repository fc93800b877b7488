"""The callback that logs what a KFAC does."""

import keras
import numpy as np
from keras import ops

from ..lookahead.nesting import nested
from .damping import factored_damping
from .kfac import KFAC


class KFACDiagnostics(keras.callbacks.Callback):
    """Adds figures of a KFAC's state to the logs of each epoch.

    They stand in the logs beside losses and metrics, for `History`, `CSVLogger` and
    `keras.callbacks.TensorBoard`, which must be listed after it:

        callbacks=[KFACDiagnostics(), keras.callbacks.TensorBoard("runs/logs")]

    - `kfac/damping`: λ.
    - `kfac/gamma`: γ, and `kfac/ratio`: ρ, as it was when λ was adapted last, by which
      the loss changed more or less than its quadratic model; of an optimizer with an
      `Adaptation` that has them. ρ is 0 until there is one.
    - `kfac/update_norm`: the length of the last update of all weights.
    - `kfac/skipped_updates`: batches whose factors were not finite, till now, and
      `kfac/skipped_inverses`: blocks whose inverses were not.
    - with `factors`, for each block of weights, by the path of the first of them:
      `kfac/PATH/update_norm`, and the condition number of what divides its gradients,
      `kfac/PATH/condition_A` and `condition_G` of Kronecker factors (of groups the
      largest), `condition_S` of EK-FAC, `condition_D` of a diagonal:

          κ = (ξ_max + d) / (ξ_min + d),

      of the eigenvalues ξ and what is added to them: d is λ, or a factor's part of it.

    Of the two KFACs of `with_fast_weights` λ is the second one's, that of the shared
    weights; all else is of both.

    Args:
        factors: Whether to log each block's, for which the factors' eigenvalues are
            computed at the end of each epoch.

    Raises:
        ValueError: When training begins, if the model is not compiled with a KFAC, or
            an optimizer that has one inside.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.optimizers import KFAC, KFACDiagnostics
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(KFAC(model, damping=0.1), "mse")
    >>> history = model.fit(
    ...     np.ones((8, 2)), np.ones((8, 1)), callbacks=[KFACDiagnostics()], verbose=0
    ... )
    >>> print([f"{value:.1f}" for value in history.history["kfac/damping"]])
    ['0.1']
    """

    def __init__(self, factors=True):
        super().__init__()
        self.factors = factors

    def _optimizers(self):
        found = [o for o in nested(self.model.optimizer) if isinstance(o, KFAC)]
        if not found:
            raise ValueError(
                "expected a model that is compiled with KFAC. Received: "
                f"optimizer={self.model.optimizer!r}"
            )
        return found

    def on_train_begin(self, logs=None):
        """Finds the optimizer."""
        self._optimizers()

    def on_epoch_end(self, epoch, logs=None):
        """Adds the figures to the logs."""
        if logs is not None:
            logs.update(self._figures(self._optimizers()))

    def _figures(self, optimizers):
        optimizer = optimizers[-1]
        found = {"damping": optimizer.damping}
        if optimizer.gamma is not None:
            found["gamma"] = optimizer.gamma
        if optimizer.ratio is not None:
            found["ratio"] = optimizer.ratio
        for name in ("skipped_updates", "skipped_inverses"):
            found[name] = sum(getattr(each, name) for each in optimizers)
        norms = {}
        for each in optimizers:
            for path, updates in each.last_updates.items():
                # Of half precision the squares may be 0, or too large.
                arrays = [ops.convert_to_numpy(m).astype("float64") for m in updates]
                norms[path] = sum(np.sum(np.square(m)) for m in arrays)
        found["update_norm"] = sum(norms.values()) ** 0.5
        for each in optimizers if self.factors else ():
            damping = each.inverse_damping
            for path, factors in each.factors.items():
                found[f"{path}/update_norm"] = norms[path] ** 0.5
                for name, number in condition_numbers(factors, damping).items():
                    found[f"{path}/condition_{name}"] = number
        return {f"kfac/{name}": float(value) for name, value in found.items()}


def condition_numbers(factors, damping):
    """Returns the condition number of what divides gradients, factor by factor.

    Args:
        factors: Dict of A and G, one of which may be a diagonal; and if the gradients
            are divided along a basis, of S or D.
        damping: λ, or what stands for it in the inverses.
    """
    damping = ops.convert_to_numpy(damping)
    factors = {name: ops.convert_to_numpy(v) for name, v in factors.items()}
    for name in ("S", "D"):
        if name in factors:
            return {name: _condition(factors[name].reshape(-1), damping)}
    a, g = factors["A"], factors["G"]
    # Of A's diagonal alone, its mean is all that its part depends on.
    parts = factored_damping(a if a.ndim > 1 else np.full((1, 1), a.mean()), g, damping)
    return {
        name: _condition(
            factor if factor.ndim == 1 else np.linalg.eigvalsh(factor),
            ops.convert_to_numpy(d)[..., None],
        )
        for name, factor, d in zip("AG", (a, g), parts, strict=True)
    }


def _condition(eigenvalues, damping):
    # Rounding may have made them less than 0.
    damped = np.maximum(eigenvalues, 0) + damping
    return float(np.max(damped.max(-1) / damped.min(-1)))
