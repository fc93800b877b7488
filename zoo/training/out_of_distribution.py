"""How well a classifier in training tells what is out of distribution."""

import keras
import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

from ..metrics.ranking import SCORES, uncertainty
from ..predictive import Predictions, row_counts

RECALL = 0.95


class OutOfDistribution(keras.callbacks.Callback):
    """Logs, after each epoch, AUROC and FPR95 of telling two sets of inputs apart.

    The score of an input says how likely it is out of distribution. AUROC is the
    probability that of two inputs, one of either set, the one from outside has the
    higher score (1/2 for equal ones), and FPR95 the share of the inputs in distribution
    with scores as high as those of 95 % of the others. Both are exact, and NaN if a
    score is not finite; they join the epoch's logs as `ood_auroc` and `ood_fpr95`, for
    the history and for the callbacks that follow.

    Reference: Hendrycks, Gimpel, "A Baseline for Detecting Misclassified and
    Out-of-Distribution Examples in Neural Networks", 2017.
    https://arxiv.org/abs/1610.02136

    Args:
        inputs_in: Inputs in distribution, such as the validation examples': anything
            that the `predict` of the model takes.
        inputs_out: Inputs out of distribution.
        score: `"entropy"`, the predictive entropy; `"max_probability"`, the log-odds
            against the most probable class; `"mutual_information"` of members; or a
            function from the answer, a dict that `kzoo.zoo.predictive.classification`
            describes, to scores `[B]`.
        batch_size: Number of inputs that are predicted at a time.
        name: What the names in the logs begin with.

    Raises:
        ValueError: If `score` is none of these, or there are no inputs of one kind;
            from `fit`, if the model does not end in logits.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.zoo import OutOfDistribution
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> model.compile("adam", loss)
    >>> x = np.array([[5.0, -5.0], [-5.0, 5.0]] * 8)
    >>> watch = OutOfDistribution(x, 0 * x)  # All zeros: no class is likelier.
    >>> history = model.fit(x, np.array([0, 1] * 8), callbacks=[watch], verbose=0)
    >>> history.history["ood_auroc"], history.history["ood_fpr95"]
    ([1.0], [0.0])
    """

    def __init__(
        self, inputs_in, inputs_out, score="entropy", batch_size=256, name="ood"
    ):
        super().__init__()
        if score not in SCORES and not callable(score):
            raise ValueError(
                f"expected `score` to be one of {list(SCORES)}, or a function. "
                f"Received: score={score!r}"
            )
        for kind, inputs in (("inputs_in", inputs_in), ("inputs_out", inputs_out)):
            if 0 in row_counts(inputs):
                raise ValueError(f"expected `{kind}` to have rows. Received: none")
        self.inputs = inputs_in, inputs_out
        self.score, self.batch_size, self.name = score, batch_size, name

    def on_train_begin(self, logs=None):
        """Checks the model."""
        self._predictions = Predictions(self.model)

    def on_epoch_end(self, epoch, logs=None):
        """Adds the two figures to the logs."""
        found = [self._scores(inputs) for inputs in self.inputs]
        is_out = np.repeat([0, 1], [len(scores) for scores in found])
        scores = np.concatenate(found)
        auroc = fpr95 = float("nan")
        if np.isfinite(scores).all():  # Or training diverged: others see to that.
            fpr, recall, _ = roc_curve(is_out, scores, drop_intermediate=False)
            auroc = float(roc_auc_score(is_out, scores))
            fpr95 = float(fpr[np.argmax(recall >= RECALL)])
        logs[f"{self.name}_auroc"] = auroc
        logs[f"{self.name}_fpr95"] = fpr95

    def _scores(self, inputs):
        answer = self._predictions.predict(
            inputs, batch_size=self.batch_size, verbose=0
        )
        if callable(self.score):
            return np.asarray(self.score(answer))
        if self.score == "entropy":
            return answer["predictive_entropy"]
        if self.score == "mutual_information":
            return answer["mutual_information"]
        log_odds = uncertainty(answer["probabilities"], self.score, from_logits=False)
        return keras.ops.convert_to_numpy(log_odds)
