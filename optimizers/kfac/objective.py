"""The loss of a model on one batch, and its curvature, as functions of the weights."""

import keras
from keras import ops

from ...layers.ops.gradient import jacobian_products
from .measuring import every, for_all, of_losses
from .taps import running_cells


class Objective:
    """h: the loss on one batch as a function of the weights, which it keeps: θ.

    It keeps the model's other state too, such as random seeds: whenever the model is
    called, dropout's masks are those of the training step. What a call changes is left.

    Args:
        model: A compiled model.
        x: What the model is given.
        y: Labels.
        sample_weight: Weights of the examples, or None.
    """

    def __init__(self, model, x, y, sample_weight):
        self._model = model
        self._batch = x, y, sample_weight
        # Copies, as TensorFlow would read variables when they are used.
        self._weights = {id(v): ops.copy(v) for v in model.trainable_variables}
        self._other = [ops.copy(v) for v in model.non_trainable_variables]
        self._arguments = {"training": True} if model._call_has_training_arg else {}

    def loss(self, variables, change):
        """Returns h(θ + δ), with the model's regularizers.

        Args:
            variables: List of trainable variables.
            change: δ, a tensor for each.
        """
        model, (x, y, sample_weight) = self._model, self._batch
        weights = self._with(
            variables,
            [
                value + ops.cast(delta, value.dtype)
                for value, delta in zip(self._of(variables), change, strict=True)
            ],
        )
        scope = keras.StatelessScope(
            [
                *zip(model.trainable_variables, weights, strict=True),
                *zip(model.non_trainable_variables, self._other, strict=True),
                *((v, ops.zeros(v.shape, v.dtype)) for v in model.metrics_variables),
            ],
            collect_losses=True,
        )
        with scope:
            return model._compute_loss(
                x=x,
                y=y,
                y_pred=model(x, **self._arguments),
                sample_weight=sample_weight,
                training=True,
            )

    def curvature(self, variables, directions, subsample=1):
        """Returns vᵀ F w of all pairs of directions, with the exact F at θ.

        F is the loss's Fisher information, Σ ∇r ∇rᵀ; a regularizer has no part in it.

        Args:
            variables: List of trainable variables.
            directions: List of vectors, each a list of tensors, one a variable.
            subsample: k: F is that of every k-th example.

        Returns:
            Tensor `[len(directions), len(directions)]`.
        """
        (x, sample_weight), fraction = every(
            (self._batch[0], self._batch[2]), subsample
        )

        def r(*values):
            weights = self._with(variables, values)
            outputs, _ = self._model.stateless_call(
                weights, self._other, x, **self._arguments
            )
            weights = for_all(outputs, sample_weight)
            found = [
                ops.reshape(term.roots(output, weight, fraction), (-1,))
                for term, output, weight in of_losses(self._model, outputs, weights)
            ]
            return ops.concatenate(found)

        with running_cells(self._model):
            products = jacobian_products(r, self._of(variables), directions)
        return ops.matmul(products, ops.transpose(products))

    def _of(self, variables):
        """Returns θ of some variables."""
        return [self._weights[id(variable)] for variable in variables]

    def _with(self, variables, values):
        """Returns all of θ, with other values of some variables."""
        new = dict(zip(map(id, variables), values, strict=True))
        return list({**self._weights, **new}.values())
