"""The contract of a recurrent cell, as the step of a `keras.layers.RNN`."""

import copy

import keras

from . import session
from .check import Check
from .configs import check_config, check_registration
from .docs import check_docstring
from .layer import (
    Subject,
    assign,
    check_build,
    check_inference,
    check_mask,
    check_save,
    check_state,
    values_of,
)
from .training import QUICK, XLA, compile_model, sgd, state, train


@session.noted
def check_cell(cell_class, init_kwargs, input_shape, *, tol=1e-5):
    """Checks what a cell's own layer, whose contract is whole, does not show of it.

    That is the cell by name, and what it does where Keras runs over the steps: it is
    built, called, saved, compiled and trained for a step.

    Args:
        cell_class: The cell's class.
        init_kwargs: A dict of constructor arguments; values that are not the
            defaults test more.
        input_shape: The shape of the sequences, `(batch, steps, features)`.
        tol: How close two ways to compute the same number must be in float32.
    """
    check_registration(cell_class)
    check_docstring(cell_class, "layer")
    subject = CellSubject(cell_class, init_kwargs, input_shape, tol)
    with Check("config"):
        cell = subject.make().cell
    check_config(cell, init_kwargs, lambda kwargs: cell_class(**kwargs))
    check_build(subject)
    check_state(subject)
    check_mask(subject)
    check_save(subject)
    with Check("compiled"):
        model, batches = subject.model(), subject.batches(1)
        start = values_of(model)
    check_inference(subject, model)
    with Check("compiled") as check:
        found = []
        for mode in (XLA, QUICK):  # On JAX these are one.
            assign(model, start)
            compile_model(model, sgd(), mode)
            found.append((train(model, batches), state(model)))
        check.finite("the loss and variables after a step", found[0])
        check.close("a step with jit_compile=True and run eagerly", *found, tol)


class CellSubject(Subject):
    """A cell's class, and the plain recurrent layers around its cells."""

    def __init__(self, cell_class, init_kwargs, input_shape, tol):
        super().__init__(keras.layers.RNN, init_kwargs, input_shape, "float32", {}, tol)
        self.cell_class = cell_class

    def make(self, name=None, dtype=None, **overrides):
        """A new layer around a new cell, its loop written out."""
        kwargs = {**copy.deepcopy(self.init_kwargs), **overrides, "dtype": dtype}
        cell = self.cell_class(**kwargs)
        return keras.layers.RNN(cell, unroll=True, name=name, dtype=dtype)

    def path(self, variable):
        """The path of a variable: a cell that is loaded is built before its layer."""
        return variable.path.removeprefix("subject/")
