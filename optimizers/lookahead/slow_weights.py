"""The callback that evaluates Lookahead's slow weights within `fit`."""

import keras

from .lookahead import Lookahead
from .nesting import parts


class SwapSlowWeights(keras.callbacks.Callback):
    """Evaluates with Lookahead's slow weights, and trains on with the fast ones.

    Puts the slow weights φ into the model before each evaluation and prediction that
    has this callback, the validation within `fit` among them, and the fast weights
    back after it. Training is the same with it as without. The optimizer that the
    model is compiled with must be a `Lookahead`, or one around or parts of it (a
    LossScaleOptimizer, a MultiOptimizer).

    What `val_loss` is measured on is then not what `ModelCheckpoint` saves: for that
    the swap must last till the epoch's end. With `swap_on_epoch=True` the slow weights
    also stand in the model from the end of an epoch to the beginning of the next, for
    the callbacks listed after this one:

        callbacks=[BackupAndRestore(...), SwapSlowWeights(swap_on_epoch=True),
                   ModelCheckpoint(...), EarlyStopping(restore_best_weights=True)]

    A model that is saved there has φ for its weights: it is for use, and training it
    on starts from φ. Callbacks whose files are to resume training as if it had not
    stopped come before this one. When `fit` ends the fast weights are back.

    If an evaluation within `fit` is interrupted, the fast weights are back when `fit`
    is left on JAX, and on TensorFlow when the next `fit` begins with this callback.

    Args:
        swap_on_epoch: Whether φ stands in the model between epochs too.

    Raises:
        ValueError: When training or evaluation begins, if the model is not compiled
            with a Lookahead.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.optimizers import Lookahead, SwapSlowWeights
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model.compile(Lookahead(keras.optimizers.SGD(0.1)), loss="mse")
    >>> x, y = np.ones((8, 2)), np.ones((8, 1))
    >>> history = model.fit(
    ...     x, y, validation_data=(x, y), callbacks=[SwapSlowWeights()], verbose=0
    ... )
    """

    def __init__(self, swap_on_epoch=False):
        super().__init__()
        self.swap_on_epoch = swap_on_epoch

    def _show(self):
        for optimizer in self._optimizers():
            optimizer._show_slow_weights()

    def _restore(self):
        for optimizer in self._optimizers():
            optimizer._restore_fast_weights()

    def _optimizers(self):
        found = list(_lookaheads(self.model.optimizer))
        if not found:
            raise ValueError(
                "expected a model that is compiled with a Lookahead. "
                f"Received: optimizer={self.model.optimizer}"
            )
        return found

    def on_train_begin(self, logs=None):
        """Undoes what an interrupted run has left."""
        self._restore()

    def on_epoch_begin(self, epoch, logs=None):
        """Trains with the fast weights."""
        self._restore()

    def on_epoch_end(self, epoch, logs=None):
        """Leaves the slow weights to the callbacks that follow."""
        if self.swap_on_epoch:
            self._show()

    def on_test_begin(self, logs=None):
        """Evaluates with the slow weights."""
        self._show()

    def on_test_end(self, logs=None):
        """Puts the fast weights back."""
        self._restore()

    def on_predict_begin(self, logs=None):
        """Predicts with the slow weights."""
        self._show()

    def on_predict_end(self, logs=None):
        """Puts the fast weights back."""
        self._restore()


def _lookaheads(optimizer):
    if isinstance(optimizer, Lookahead):
        yield optimizer  # Not those inside: their φ is not this one's.
        return
    for part in parts(optimizer):
        yield from _lookaheads(part)
