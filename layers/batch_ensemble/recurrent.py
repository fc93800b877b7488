"""What all recurrent BatchEnsemble layers have in common."""

from operator import attrgetter

import keras
from keras import ops

from ..conversion import counterpart, numpy
from ..ops.arguments import integer
from ..ops.batch_ensemble import (
    batch_ensemble,
    batch_ensemble_step,
    check_rows,
    repeat_members,
)
from ..ops.random import own_initializer
from ..recurrent import RecurrentCell, RecurrentLayer, Sequence
from ..seeded import SeededLayer
from .base import ChannelBatchEnsemble


class BatchEnsembleSequence(Sequence):
    """The members' weights, and those of each row."""

    def __init__(self, cell, rows):
        super().__init__(cell, rows)

        def of_rows(*members):
            return [None if w is None else repeat_members(w, rows) for w in members]

        kernel, u, *fast, bias = (
            None if w is None else ops.cast(w, cell.compute_dtype)
            for w in (
                cell.kernel,
                cell.recurrent_kernel,
                cell.alpha,
                cell.gamma,
                cell.recurrent_alpha,
                cell.recurrent_gamma,
                cell.bias,
            )
        )
        bias, recurrent_bias = cell._biases(bias)
        self._members = kernel, *fast[:2], bias
        self._rows = kernel, *of_rows(*fast[:2], bias)
        r, s, recurrent_bias = of_rows(*fast[2:], recurrent_bias)
        self._recurrent = [
            (u[:, part], r, s[..., part], recurrent_bias)
            for part in cell.recurrent_parts
        ]

    def _project(self, x):
        if len(x.shape) == 2:
            kernel, *rows = self._rows
            return batch_ensemble_step(kernel, x, *rows)
        kernel, *members = self._members
        return batch_ensemble(lambda x: ops.matmul(x, kernel), x, *members)

    def project_state(self, h, part=0):
        """h U of a part of U's outputs, with its own bias if the cell has two."""
        kernel, *rows = self._recurrent[part]
        return batch_ensemble_step(kernel, h, *rows)


class BatchEnsembleCell(RecurrentCell, ChannelBatchEnsemble, SeededLayer):
    """A cell with M members' fast weights around the kernels W and U of a plain one.

    A subclass says what a step is, and the class of the `plain` cell that, as
    `self.shared`, owns W and U.
    """

    sequence = BatchEnsembleSequence
    plain = None

    def __init__(
        self,
        units,
        activation="tanh",
        *,
        rank=1,
        ensemble_size=4,
        use_bias=True,
        alpha_initializer="ones",
        gamma_initializer="ones",
        recurrent_alpha_initializer="ones",
        recurrent_gamma_initializer="ones",
        kernel_initializer="glorot_uniform",
        recurrent_initializer="orthogonal",
        bias_initializer="zeros",
        kernel_regularizer=None,
        recurrent_regularizer=None,
        bias_regularizer=None,
        kernel_constraint=None,
        recurrent_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        super().__init__(
            units,
            activation,
            rank=rank,
            ensemble_size=ensemble_size,
            use_bias=use_bias,
            alpha_initializer=alpha_initializer,
            gamma_initializer=gamma_initializer,
            bias_initializer=bias_initializer,
            bias_regularizer=bias_regularizer,
            bias_constraint=bias_constraint,
            **kwargs,
        )
        self.recurrent_alpha_initializer = own_initializer(recurrent_alpha_initializer)
        self.recurrent_gamma_initializer = own_initializer(recurrent_gamma_initializer)
        self._share(
            self.plain,
            {
                "units": self.units,
                "kernel_initializer": kernel_initializer,
                "recurrent_initializer": recurrent_initializer,
                "kernel_regularizer": kernel_regularizer,
                "recurrent_regularizer": recurrent_regularizer,
                "kernel_constraint": kernel_constraint,
                "recurrent_constraint": recurrent_constraint,
            },
            use_bias=False,
            seed=0,  # It draws nothing.
        )

    @property
    def recurrent_kernel(self):
        """The recurrent kernel U that all members share."""
        return self.shared.recurrent_kernel

    def build(self, input_shape):
        """Creates the shared kernels, the fast weights and the members' biases."""
        self._build_shared(input_shape)
        (features, width), (units, _), bias = self._weight_shapes(input_shape)
        self._add_fast_weights((features,), (width,))
        self._add_fast_weights((units,), (width,), prefix="recurrent_")
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=(self.ensemble_size, *bias),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )

    def _give_member(self, m, plain):
        super()._give_member(m, plain)
        scale = self._scale(m, self.recurrent_alpha, self.recurrent_gamma)
        plain.recurrent_kernel.assign(numpy(self.recurrent_kernel) * scale)

    def compute_output_shape(self, inputs_shape, states_shape):
        """Returns the output's and the states' shapes."""
        check_rows(inputs_shape[0], self.ensemble_size)
        return (inputs_shape[0], self.units), states_shape

    def get_config(self):
        """Returns the constructor's arguments."""
        initializers = {
            name: keras.initializers.serialize(getattr(self, name))
            for name in ("recurrent_alpha_initializer", "recurrent_gamma_initializer")
        }
        return {**super().get_config(), **initializers}


class BatchEnsembleRecurrentLayer(RecurrentLayer):
    """A recurrent layer around a `BatchEnsembleCell`; `plain` is Keras's class."""

    plain = None
    rank = property(attrgetter("cell.rank"))
    ensemble_size = property(attrgetter("cell.ensemble_size"))
    shared = property(attrgetter("cell.shared"))
    kernel = property(attrgetter("cell.kernel"))
    recurrent_kernel = property(attrgetter("cell.recurrent_kernel"))
    alpha = property(attrgetter("cell.alpha"))
    gamma = property(attrgetter("cell.gamma"))
    recurrent_alpha = property(attrgetter("cell.recurrent_alpha"))
    recurrent_gamma = property(attrgetter("cell.recurrent_gamma"))
    bias = property(attrgetter("cell.bias"))

    def member(self, index):
        """Makes the plain recurrent layer that one member is.

        Args:
            index: m, an integer from 0 to M - 1.

        Returns:
            A built layer with the member's own kernels, W ∘ (r_m s_mᵀ) and
            U ∘ (r'_m s'_mᵀ), and biases.

        Raises:
            ValueError: If the layer is not built, or there is no such member.
        """
        m = integer("index", index, 0, self.ensemble_size - 1)
        plain = counterpart(self, self.plain)
        self.cell._give_member(m, plain.cell)
        return plain

    def compute_output_shape(self, sequences_shape, initial_state_shape=None):
        """Returns the output's shape, and those of the states if it returns them."""
        check_rows(sequences_shape[0], self.ensemble_size)
        return super().compute_output_shape(sequences_shape, initial_state_shape)
