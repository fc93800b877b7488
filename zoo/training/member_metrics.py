"""How each member of an ensemble in training does, and how much they differ."""

import keras
import numpy as np

from ..diversity import measure_diversity
from ..predictive import Predictions, ensemble_size, row_counts


class MemberMetrics(keras.callbacks.Callback):
    """Logs, after each epoch, each member's figures on labelled examples.

    The loss of a batch in training is the mean over the members' own, and the metrics
    of `evaluate` are those of the averaged ensemble. This tells the members apart: for
    m = 0, ..., M - 1 the epoch's logs get

    - `member{m}_nll`, the negative log-likelihood -(1/N) sum_n log p_m(y_n | x_n);
    - `member{m}_accuracy` and `member{m}_brier`;
    - `member_disagreement`, the share of pairs of members that disagree on an example;
    - `member_ambiguity`, the members' mean NLL less the ensemble's: what averaging them
      is worth, 0 if they are equal.

    They join the history, TensorBoard, and what callbacks that follow can watch.

    Reference: Krogh, Vedelsby, "Neural Network Ensembles, Cross Validation, and Active
    Learning", 1994.

    Args:
        inputs: Examples, such as the validation split's: anything that the `predict` of
            the model takes.
        labels: Their classes, integers `[N]` or `[N, 1]`.
        batch_size: Number of inputs that are predicted at a time.
        name: What the names in the logs begin with.

    Raises:
        ValueError: If labels are no integers, or not one for each of the inputs; from
            `fit`, if the model is no classifier that averages two members or more (see
            `kzoo.zoo.predictive.classification`).

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import to_batch_ensemble
    >>> from kzoo.zoo import MemberMetrics
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> ensemble = to_batch_ensemble(model, ensemble_size=2)
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> ensemble.compile("adam", loss)
    >>> x, y = np.eye(2, dtype="float32").repeat(4, 0), np.array([0, 1]).repeat(4)
    >>> history = ensemble.fit(x, y, callbacks=[MemberMetrics(x, y)], verbose=0)
    >>> sorted(name for name in history.history if name.endswith("nll"))
    ['member0_nll', 'member1_nll']
    """

    def __init__(self, inputs, labels, batch_size=256, name="member"):
        super().__init__()
        labels = np.asarray(labels)
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        rows = row_counts(inputs)
        is_list = labels.ndim == 1 and labels.dtype.kind in "iu" and len(labels)
        if not is_list or rows - {len(labels)}:
            raise ValueError(
                "expected an integer for each of the inputs, at least one. Received: "
                f"labels of shape {labels.shape} and {labels.dtype} for inputs of "
                f"{sorted(rows)} rows"
            )
        self.inputs, self.labels = inputs, labels
        self.batch_size, self.name = batch_size, name

    def on_train_begin(self, logs=None):
        """Checks the model."""
        if ensemble_size(self.model) < 2:
            raise ValueError(
                "expected a model that ends in `kzoo.layers.AverageMembers` of at "
                f"least 2 members. Received: model {self.model.name!r}, of one"
            )
        self._predictions = Predictions(self.model)

    def on_epoch_end(self, epoch, logs=None):
        """Adds the figures to the logs."""
        answer = self._predictions.predict(
            self.inputs, batch_size=self.batch_size, verbose=0
        )
        found = measure_diversity(answer["member_probabilities"], self.labels)
        for kind in ("nll", "accuracy", "brier"):
            for m, figure in enumerate(getattr(found, kind)):
                logs[f"{self.name}{m}_{kind}"] = float(figure)
        figures = found.figures()
        for kind in ("disagreement", "ambiguity"):
            logs[f"{self.name}_{kind}"] = float(figures[kind])
