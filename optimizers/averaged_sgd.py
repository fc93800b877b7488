"""Stochastic gradient descent whose last weights are averaged."""

import keras
import numpy as np
from keras import ops

from ..layers.ops.arguments import integer


@keras.saving.register_keras_serializable(package="kzoo")
class AveragedSGD(keras.optimizers.SGD):
    """SGD that keeps the mean of the weights that it has gone through (ASGD).

    With w_t the weights after t updates and T the update at which averaging starts,
    the mean after k updates is

        w̄_k = (1 / (k - T + 1)) sum_{t=T}^{k} w_t,   and w̄_k = w_k for k < T.

    The updates themselves are SGD's. `NonMonotonicTrigger` starts averaging within
    `fit` where the validation loss gets no better (NT-ASGD). The mean stands where
    Keras has the moving averages of `use_ema`: `keras.callbacks.SwapEMAWeights`
    evaluates with it, and when a `fit` ends it is what the model has.

    Takes `keras.optimizers.SGD`'s arguments, but those of `use_ema`.

    References: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language
    Models", 2017. https://arxiv.org/abs/1708.02182; Polyak, Juditsky, "Acceleration of
    Stochastic Approximation by Averaging", 1992. https://doi.org/10.1137/0330046

    Args:
        learning_rate: A number or a schedule.
        momentum: As SGD's.
        nesterov: As SGD's.
        start: T, an integer of at least 1; None: not before `start_averaging`.
        **kwargs: Further arguments of `keras.optimizers.SGD`.

    Raises:
        ValueError: If `start` is no integer of at least 1 and not None, or an argument
            of `use_ema` is given.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.optimizers import AveragedSGD
    >>> w = keras.Variable(8.0)
    >>> optimizer = AveragedSGD(0.5, start=1)
    >>> for _ in range(3):  # 4, 2 and 1
    ...     optimizer.apply([w.value], [w])
    >>> optimizer.finalize_variable_values([w])
    >>> print(f"{float(w):.4f}")  # (4 + 2 + 1) / 3
    2.3333
    """

    def __init__(
        self, learning_rate=0.01, momentum=0.0, nesterov=False, *, start=None, **kwargs
    ):
        taken = sorted(name for name in kwargs if "ema" in name.split("_"))
        if taken:
            raise ValueError(
                "expected no arguments of `use_ema`, in whose place the mean stands. "
                f"Received: {taken}"
            )
        super().__init__(learning_rate, momentum, nesterov, use_ema=True, **kwargs)
        self.start = None if start is None else integer("start", start)
        self._monitored = []  # v_1, v_2, ... of a `NonMonotonicTrigger`.
        with keras.name_scope(self.name):
            # T; -1: averaging has not started.
            self._start = keras.Variable(
                -1 if start is None else self.start,
                dtype="int",
                trainable=False,
                name="start",
                aggregation="only_first_replica",
            )

    @property
    def is_averaging(self):
        """Whether averaging has been asked to start."""
        return int(self._start) >= 0

    def start_averaging(self):
        """Averages from the present weights on; changes nothing if it does already."""
        if not self.is_averaging:
            now = ops.cast(self.iterations, self._start.dtype)
            self._start.assign(ops.maximum(now, 1))

    def _update_model_variables_moving_average(self, trainable_variables):
        """Adds the weights after an update; Keras calls it after each gradient."""
        # w_{k+1} is the (k + 2 - T)-th; below 1 or without T it takes the mean's place.
        t = ops.cast(self.iterations + 1, self._start.dtype)
        count = ops.where(self._start < 0, 1, ops.maximum(t - self._start + 1, 1))
        every = self.gradient_accumulation_steps or 1
        is_update = ops.equal((self._iterations + 1) % every, 0)
        for variable, mean in zip(
            trainable_variables, self._model_variables_moving_average, strict=True
        ):
            if mean is not None:
                share = ops.cast(is_update, mean.dtype) / ops.cast(count, mean.dtype)
                mean.assign(mean + share * (ops.cast(variable, mean.dtype) - mean))

    def finalize_variable_values(self, var_list):
        """Gives the model the mean, when training ends."""
        super().finalize_variable_values(var_list)
        for mean in self._model_variables_moving_average:
            if mean is not None:
                # On JAX no two variables may share a buffer, which steps give away.
                mean.assign(ops.copy(mean))

    def save_own_variables(self, store):
        """Saves what a `NonMonotonicTrigger` has seen, too."""
        super().save_own_variables(store)
        store["monitored"] = np.array(self._monitored, "float64")

    def load_own_variables(self, store):
        """Loads what `save_own_variables` saves."""
        names = [name for name in store.keys() if name != "monitored"]
        super().load_own_variables({name: store[name] for name in names})
        self._monitored = [float(v) for v in store["monitored"]]

    def get_config(self):
        """Returns the constructor's arguments."""
        config = super().get_config()
        for name in ("use_ema", "ema_momentum", "ema_overwrite_frequency"):
            config.pop(name, None)
        return {**config, "start": self.start}


class NonMonotonicTrigger(keras.callbacks.Callback):
    """Starts an `AveragedSGD`'s averaging when the validation loss gets no better.

    With v_1, v_2, ... the monitored figure after each epoch, averaging starts after
    the first epoch k at which

        v_k > min(v_1, ..., v_{k-n-1}),

    so not before epoch n + 2: no epoch of the last n was better than all before. To
    evaluate with the mean, put `keras.callbacks.SwapEMAWeights` in front of it.

    The figures are part of the optimizer's state: a later `fit` with it goes on with
    them, and so does one that is resumed, with `keras.callbacks.BackupAndRestore` after
    this callback or by `kzoo.zoo.train`.

    Reference: Merity, Keskar, Socher, "Regularizing and Optimizing LSTM Language
    Models", 2017. https://arxiv.org/abs/1708.02182

    Args:
        patience: n, an integer of at least 0.
        monitor: The figure's name; a lower one is better.

    Raises:
        ValueError: If `patience` is none, or when training begins without an
            `AveragedSGD`, or an epoch ends without the figure.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.optimizers import AveragedSGD, NonMonotonicTrigger
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(AveragedSGD(0.1), loss="mse")
    >>> x, y = np.ones((4, 1)), np.ones((4, 1))
    >>> callbacks = [keras.callbacks.SwapEMAWeights(), NonMonotonicTrigger(patience=5)]
    >>> history = model.fit(
    ...     x, y, validation_data=(x, y), callbacks=callbacks, verbose=0
    ... )
    """

    def __init__(self, patience=5, monitor="val_loss"):
        super().__init__()
        self.patience = integer("patience", patience, least=0)
        self.monitor = monitor

    def _optimizer(self):
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if not isinstance(optimizer, AveragedSGD):
            raise ValueError(
                "expected a model that is compiled with an AveragedSGD. "
                f"Received: optimizer={optimizer}"
            )
        return optimizer

    def on_train_begin(self, logs=None):
        """Requires the optimizer."""
        self._optimizer()

    def on_epoch_end(self, epoch, logs=None):
        """Compares the figure."""
        if self.monitor not in (logs or {}):
            raise ValueError(
                f"expected `monitor` to be one of {sorted(logs or {})}. "
                f"Received: monitor={self.monitor!r}"
            )
        optimizer, now = self._optimizer(), float(logs[self.monitor])
        seen = optimizer._monitored
        before = seen[: max(len(seen) - self.patience, 0)]
        if before and now > min(before):
            optimizer.start_averaging()
        seen.append(now)
