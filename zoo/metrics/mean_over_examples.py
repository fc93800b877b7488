"""The shared half of the metrics that average one value an example."""

import keras
from keras import ops

from .inputs import example_weights


class MeanOverExamples(keras.metrics.Mean):
    """Mean, over all examples seen, of `values(y_true, y_pred)`.

    Args:
        from_logits: Whether predictions are logits.
        name: Name of the metric.
        dtype: Dtype of the metric's state.
    """

    def __init__(self, from_logits, name, dtype):
        super().__init__(name=name, dtype=dtype)
        self.from_logits = from_logits

    def values(self, y_true, y_pred):
        """Returns one value an example, a tensor `[B]`."""
        raise NotImplementedError

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds a batch, whose examples weigh `sample_weight` or else 1."""
        values = ops.cast(self.values(y_true, y_pred), self.dtype)
        weight = example_weights(sample_weight, values)
        # With weight 0 an example is absent, also one whose value is NaN.
        super().update_state(ops.where(ops.equal(weight, 0), 0.0, values), weight)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {**super().get_config(), "from_logits": self.from_logits}
