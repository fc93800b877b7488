"""Expected calibration error, in bins of equal width or of equal mass."""

import keras
import numpy as np
from keras import ops

from ...layers.ops.arguments import integer
from .inputs import (
    cell_sums,
    example_weights,
    label_probabilities,
    member_probabilities,
)

# Cells of the fine histogram behind equal-mass bins: equal widths in the logit of
# the confidence, which resolves confidences of 1 - 1e-7 as well as those near 1/2.
CELLS = 4096
LOGIT_LIMIT = np.log(2.0**24 - 1)  # logit of 1 - 2^-24, the float32 next below 1


@keras.saving.register_keras_serializable(package="kzoo")
class ExpectedCalibrationError(keras.metrics.Metric):
    """Mean gap between confidence and accuracy over bins of the confidence.

    Example n has confidence conf_n = max_c p_n(c) (of members: of their mean) and
    is right, a_n = 1, or wrong, a_n = 0. With bins S_b of the examples,

        ECE = sum_b (|S_b| / N) |acc(S_b) - conf(S_b)|
            = (1/N) sum_b | sum_{n in S_b} (a_n - conf_n) |,

    so an empty bin adds nothing. Example weights stand in for counts.

    *Bins of equal width* (default): S_b = {n : b/B < conf_n <= (b+1)/B} for
    b = 0 ... B-1, and conf_n = 0 in the first; every example lies in exactly one.
    The streamed value is exact.

    *Bins of equal mass* (`adaptive=True`): examples in the order of their
    confidence are cut into B bins of weight N/B each. So that the metric streams in
    constant memory, confidences are counted in 4096 fine cells of equal width in
    log(conf / (1 - conf)), that is 0.008 conf (1 - conf) in conf. Let D(u) be the sum
    of a_n - conf_n over the first u units of weight, linear inside a cell; then

        ECE = (1/N) sum_b | D((b+1) N/B) - D(b N/B) |.

    A cell that a cut falls in is thus shared out in proportion, as is right for equal
    confidences, whose order is arbitrary. Against a sort of all examples the value
    is off by at most 0.51/N times the sum, over the B - 1 cuts, of the weights of
    the cells they fall in: after s of a cell's weight w the true partial sum of
    a - conf, whose values span at most 1.002, differs from the straight line by at
    most 1.002 s (1 - s/w) <= 1.002 w/4, and each cut bounds two bins.

    References: Naeini et al., "Obtaining Well Calibrated Probabilities Using
    Bayesian Binning", 2015; Guo et al., "On Calibration of Modern Neural Networks",
    2017, https://arxiv.org/abs/1706.04599; bins of equal mass: Nixon et al.,
    "Measuring Calibration in Deep Learning", 2019,
    https://arxiv.org/abs/1904.01685.

    Args:
        num_bins: B, the number of bins. Defaults to 15.
        adaptive: Whether bins have equal mass instead of equal width. Defaults to
            False.
        from_logits: Whether predictions are logits. Defaults to False.
        name: Name of the metric. Defaults to `"expected_calibration_error"`.
        dtype: Dtype of the metric's state. Defaults to float32.

    Call arguments:
        y_true: Class indices `[B]` or `[B, 1]`, or one-hot labels `[B, C]`. A NaN,
            or an index that is none of 0 ... C - 1, makes the result NaN.
        y_pred: Probabilities or logits, `[B, C]` or, of M members, `[B, M, C]`.
        sample_weight: None, or weights `[B]` or `[B, 1]`. An example of weight 0
            is absent, whatever it holds; a weight below 0 makes the result NaN.

    Raises:
        ValueError: If `num_bins` is not an integer of at least 1, or labels or
            predictions have another shape.

    Example:

    >>> from kzoo.zoo.metrics import ExpectedCalibrationError
    >>> ece = ExpectedCalibrationError()
    >>> ece.update_state([0, 1], [[0.75, 0.25], [0.75, 0.25]])  # half are right
    >>> float(ece.result())
    0.25
    """

    def __init__(
        self,
        num_bins=15,
        adaptive=False,
        from_logits=False,
        name="expected_calibration_error",
        dtype=None,
    ):
        super().__init__(name=name, dtype=dtype)
        self.num_bins = num_bins = integer("num_bins", num_bins)
        self.adaptive = adaptive
        self.from_logits = from_logits
        cells = CELLS if adaptive else num_bins
        self.weight = self.add_weight(
            shape=(cells,), initializer="zeros", name="weight"
        )
        # Sum of (right - confidence) over the examples of a bin or cell.
        self.gap = self.add_weight(shape=(cells,), initializer="zeros", name="gap")

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Adds a batch."""
        probs = ops.mean(member_probabilities(y_pred, self.from_logits), axis=-2)
        labels = label_probabilities(y_true, probs)
        # With an initial value, for TensorFlow has no maximum of an empty batch.
        confidence = ops.max(probs, axis=-1, initial=0.0)
        right = ops.cast(
            ops.equal(ops.argmax(probs, axis=-1), ops.argmax(labels, axis=-1)),
            confidence.dtype,
        )
        weight = example_weights(sample_weight, confidence)
        cell = self._cell(confidence)
        # A label that is no class is NaN, and so must be the gap.
        unknown = ops.cast(ops.sum(0.0 * labels, axis=-1), confidence.dtype)
        # With weight 0 an example is absent, also one whose gap is NaN.
        gap = ops.where(ops.equal(weight, 0), 0.0, right - confidence + unknown)
        self.weight.assign_add(cell_sums(weight, cell, self.weight))
        self.gap.assign_add(cell_sums(weight * gap, cell, self.gap))

    def _cell(self, confidence):
        """Returns the bin, or fine cell, that each confidence lies in."""
        if self.adaptive:
            # A NaN has no cell, but its gap keeps the NaN in any.
            x = ops.where(ops.isnan(confidence), 0.0, confidence)
            x = ops.clip(x, 2.0**-24, 1 - 2.0**-24)
            x = ops.log(x) - ops.log1p(-x)
            x = (x + LOGIT_LIMIT) * (CELLS / (2 * LOGIT_LIMIT))
            return ops.cast(ops.clip(x, 0, CELLS - 1), "int32")
        # The number of inner edges below it. Comparing with the edges themselves,
        # and not rounding conf * B, keeps a confidence on an edge in one bin.
        edges = np.arange(1, self.num_bins) / self.num_bins
        edges = ops.convert_to_tensor(edges, dtype=confidence.dtype)
        above = ops.expand_dims(confidence, -1) > edges
        return ops.sum(ops.cast(above, "int32"), axis=-1)

    def result(self):
        """Returns the expected calibration error, 0 before any example."""
        total = ops.sum(self.weight)
        gap = self._equal_mass_gap(total) if self.adaptive else self.gap
        return ops.divide_no_nan(ops.sum(ops.abs(gap)), total)

    def _equal_mass_gap(self, total):
        """Returns D((b+1) N/B) - D(b N/B) for every bin b."""
        bins = ops.arange(self.num_bins, dtype=self.weight.dtype)
        width = total / self.num_bins
        # Overlap, in units of weight, of every cell with every bin.
        end = ops.cumsum(self.weight)
        start = end - self.weight
        lower = ops.expand_dims(bins * width, 1)
        overlap = ops.relu(ops.minimum(end, lower + width) - ops.maximum(start, lower))
        slope = ops.divide_no_nan(self.gap, self.weight)
        return ops.sum(overlap * slope, axis=1)

    def get_config(self):
        """Returns the constructor's arguments."""
        return {
            **super().get_config(),
            "num_bins": self.num_bins,
            "adaptive": self.adaptive,
            "from_logits": self.from_logits,
        }
