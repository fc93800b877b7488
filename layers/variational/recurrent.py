"""What all recurrent layers have in common whose weights are distributions."""

from operator import attrgetter

from keras import ops

from ..recurrent import RecurrentCell, RecurrentLayer, Sequence
from .base import BayesianLayer, VariationalLayer
from .distributions import MEAN_FIELD_NORMAL, STANDARD_NORMAL, kl_divergence
from .mode import Samples, mode


class VariationalSequence(Sequence):
    """One draw of W, U and b, for each row as the estimator makes it."""

    def __init__(self, cell, rows):
        width, features = cell.gates * cell.units, cell.kernel.shape[0]
        self._estimator, self._linear = cell.estimator, ops.matmul
        # Signs of each row, the same at all steps.
        self._kernel = cell._drawn(cell.kernel, [(rows, features), (rows, width)])
        recurrent = cell._drawn(
            cell.recurrent_kernel, [(rows, cell.units), (rows, width)]
        )
        self._recurrent = [
            cell.estimator.of_outputs(part, recurrent) for part in cell.recurrent_parts
        ]
        bias = None if cell.bias is None else cell._drawn_bias()
        now = mode()
        if isinstance(now, Samples):
            self._linear = now.matmul
            if bias is not None:  # Row n has the bias n mod K.
                once = [1] * (len(bias.shape) - 1)
                bias = ops.tile(bias, (rows // now.count, *once))
        self._bias, self._recurrent_bias = cell._biases(bias)
        # Predictions by means or samples of the posteriors draw nothing else.
        super().__init__(cell, rows, drops=now is None)

    def _project(self, x):
        kernel, bias = self._kernel, self._bias
        if len(x.shape) == 3:
            kernel = self._estimator.over_steps(kernel)
            bias = None if bias is None else ops.expand_dims(bias, -2)
        z = self._estimator.apply(self._linear, x, kernel)
        return z if bias is None else z + bias

    def project_state(self, h, part=0):
        """h U of a part of U's outputs, with its own bias if the cell has two."""
        u = self._estimator.apply(self._linear, h, self._recurrent[part])
        return u if self._recurrent_bias is None else u + self._recurrent_bias


class VariationalCell(RecurrentCell, VariationalLayer):
    """A cell that draws W, U and b once a sequence and holds them over its steps.

    A subclass says what a step is, and how W and U are estimated (`estimator`).
    """

    sequence = VariationalSequence
    kinds = ("kernel", "recurrent_kernel", "bias")
    bias_name = "bias_posterior_loc"

    def __init__(
        self,
        units,
        activation="tanh",
        *,
        recurrent_kernel_posterior_fn=MEAN_FIELD_NORMAL,
        recurrent_kernel_prior_fn=STANDARD_NORMAL,
        recurrent_kernel_divergence_fn=kl_divergence,
        **kwargs,
    ):
        super().__init__(units, activation, **kwargs)
        self._set_functions(
            recurrent_kernel_posterior_fn=recurrent_kernel_posterior_fn,
            recurrent_kernel_prior_fn=recurrent_kernel_prior_fn,
            recurrent_kernel_divergence_fn=recurrent_kernel_divergence_fn,
        )

    @property
    def recurrent_kernel_posterior(self):
        """q of the recurrent kernel."""
        return self.recurrent_kernel.posterior

    @property
    def recurrent_kernel_prior(self):
        """p of the recurrent kernel, or None."""
        return self.recurrent_kernel.prior

    def _of_one_step(self, inputs):
        raise ValueError(
            "expected the cell to be a step of a `keras.layers.RNN`, alone or in "
            "`keras.layers.StackedRNNCells`, which lets it draw its weights once a "
            "sequence: called by itself, or by a cell around it, it would draw "
            f"others at each step. Received: a call of {self.name}"
        )


class VariationalRecurrentLayer(RecurrentLayer):
    """A recurrent layer around a `VariationalCell`."""

    limits = BayesianLayer.limits

    num_examples = property(attrgetter("cell.num_examples"))
    kernel_posterior = property(attrgetter("cell.kernel_posterior"))
    kernel_prior = property(attrgetter("cell.kernel_prior"))
    recurrent_kernel_posterior = property(attrgetter("cell.recurrent_kernel_posterior"))
    recurrent_kernel_prior = property(attrgetter("cell.recurrent_kernel_prior"))
    bias_posterior = property(attrgetter("cell.bias_posterior"))
    bias_prior = property(attrgetter("cell.bias_prior"))

    def set_divergence_weight(self, beta):
        """Sets β, the part of their weight that the divergences count for."""
        self.cell.set_divergence_weight(beta)

    @classmethod
    def from_config(cls, config):
        """Makes a layer from what `get_config` returns."""
        return super().from_config(cls.cell_class.with_functions(config))
