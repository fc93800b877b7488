"""The contract of a loss."""

import keras
import numpy as np

from . import session
from .check import Check, arrays
from .configs import check_config, check_registration
from .docs import check_docstring
from .fresh import record_case
from .training import QUICK, XLA, check_lowering, check_steps, train_quickly


@session.noted
def check_loss(loss_class, init_kwargs, y_true, y_pred, *, tol=1e-5):
    """Checks a loss against every generic point of the contract.

    Args:
        loss_class: The loss's class.
        init_kwargs: A dict of constructor arguments; values that are not the
            defaults test more.
        y_true: An array of targets, one row an example.
        y_pred: An array of predictions with as many rows, at least four.
        tol: How close two ways to compute the same value must be.
    """
    loss = Subject(loss_class, init_kwargs, y_true, y_pred, tol)
    check_registration(loss_class)
    check_docstring(loss_class, "loss")
    with Check("config"):
        instance = loss.make()
    check_config(instance, init_kwargs, lambda kwargs: loss_class(**kwargs))
    check_reduction(loss)
    check_batch_sizes(loss)
    check_sample_weight(loss)
    check_dtypes(loss)
    check_in_model(loss)


class Subject:
    """A loss class with everything needed to make it and feed it."""

    def __init__(self, cls, init_kwargs, y_true, y_pred, tol):
        self.cls = cls
        self.init_kwargs = init_kwargs
        self.y_true = np.asarray(y_true)
        self.y_pred = np.asarray(y_pred, "float32")
        self.tol = tol

    def make(self, **overrides):
        """A new loss."""
        return self.cls(**{**self.init_kwargs, **overrides})

    def each(self, rows=slice(None)):
        """One value an example."""
        each = self.make(reduction="none")(self.y_true[rows], self.y_pred[rows])
        return keras.ops.convert_to_numpy(each)


def check_reduction(subject):
    """One value an example, or what Keras's reductions make of them."""
    with Check("reduction") as check:
        each = subject.each()
        check.equal("the shape of unreduced values", each.shape, (len(subject.y_pred),))
        check.finite("unreduced values", each)
        for reduction, expected in (
            ("sum", each.sum()),
            ("mean", each.mean()),
            ("sum_over_batch_size", each.mean()),
        ):
            received = subject.make(reduction=reduction)(subject.y_true, subject.y_pred)
            check.close(f"values reduced by {reduction}", received, expected, 1e-5)


def check_batch_sizes(subject):
    """An example's value does not depend on those beside it."""
    with Check("batch size") as check:
        alone = [subject.each(slice(i, i + 1)) for i in range(len(subject.y_pred))]
        what = "values of examples one by one and together"
        check.close(what, np.concatenate(alone), subject.each(), subject.tol)


def check_sample_weight(subject):
    """Weights multiply the examples' values."""
    with Check("sample weight") as check:
        weights = np.random.default_rng(0).uniform(size=len(subject.y_pred))
        received = subject.make(reduction="none")(
            subject.y_true, subject.y_pred, weights.astype("float32")
        )
        expected = weights * subject.each()
        check.close("weighted values", received, expected, subject.tol)


def check_dtypes(subject):
    """Half precision loses the predictions' digits, no others."""
    with Check("dtypes") as check:
        # Numbers that every dtype holds exactly.
        exact = arrays(keras.ops.convert_to_tensor(subject.y_pred, "bfloat16"))[0]
        loss = subject.make(reduction="none")
        expected = loss(subject.y_true, exact)
        for dtype in ("float16", "bfloat16"):
            received = loss(subject.y_true, keras.ops.convert_to_tensor(exact, dtype))
            check.close(f"values of {dtype} predictions", received, expected, 1e-6)


def check_in_model(subject):
    """In a compiled model: any way to run it, stopped and resumed, lowered, saved."""

    def make(mode):
        shape = subject.y_pred.shape[1:]
        identity = keras.initializers.Identity()
        x = keras.Input(shape)
        y = keras.layers.Dense(shape[-1], kernel_initializer=identity)(x)
        model = keras.Model(x, y)
        model.compile(keras.optimizers.SGD(1e-3), subject.make(), **mode)
        return model

    batches = [(subject.y_pred, subject.y_true)] * 2
    check_steps(make, batches, stops=(1,), tol=subject.tol)
    with Check("lowering"):
        model = make(XLA)
        model.optimizer.build(model.trainable_variables)
    check_lowering(model, batches[0])
    with Check("other backend"):
        trained = make(QUICK)
        record_case(
            subject.cls.__name__,
            trained,
            [subject.cls],
            steps=lambda: (batches, train_quickly(trained, batches)),
            tol=max(subject.tol, 1e-5),
        )
