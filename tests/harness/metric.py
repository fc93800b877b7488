"""The contract of a metric."""

import inspect

import keras
import numpy as np

from . import session
from .check import Check, arrays
from .configs import check_config, check_registration
from .docs import check_docstring
from .fresh import record_case
from .traces import count_traces
from .training import COMPILED, named_mode, named_once


@keras.saving.register_keras_serializable(package="harness")
class NoLoss(keras.losses.Loss):
    """Zero: a model must have a loss to be evaluated."""

    def call(self, y_true, y_pred):
        """Returns one zero an example."""
        return keras.ops.zeros((keras.ops.shape(y_pred)[0],))


@session.noted
def check_metric(metric_class, init_kwargs, y_true, y_pred, *, tol=1e-5):
    """Checks a metric against every generic point of the contract.

    Args:
        metric_class: The metric's class.
        init_kwargs: A dict of constructor arguments; values that are not the
            defaults test more.
        y_true: An array of labels, one row an example.
        y_pred: An array of predictions with as many rows, at least four.
        tol: How close two ways to compute the same value must be.
    """
    metric = Subject(metric_class, init_kwargs, y_true, y_pred, tol)
    check_registration(metric_class)
    check_docstring(metric_class, "metric")
    with Check("config"):
        instance = metric.make()
    check_config(instance, init_kwargs, lambda kwargs: metric_class(**kwargs))
    check_state(metric)
    check_streaming(metric)
    check_reset(metric)
    check_sample_weight(metric)
    check_dtypes(metric)
    check_in_model(metric)


class Subject:
    """A metric class with everything needed to make it and feed it."""

    def __init__(self, cls, init_kwargs, y_true, y_pred, tol):
        self.cls = cls
        self.init_kwargs = init_kwargs
        self.y_true = np.asarray(y_true)
        self.y_pred = np.asarray(y_pred)
        self.tol = tol
        self.rows = len(self.y_pred)

    def make(self, **overrides):
        """A new metric."""
        return self.cls(**{**self.init_kwargs, **overrides})

    def update(self, metric, rows=slice(None), **kwargs):
        """Feeds some rows."""
        metric.update_state(self.y_true[rows], self.y_pred[rows], **kwargs)
        return metric

    def value(self, rows=slice(None), **kwargs):
        """The result of a new metric that has seen some rows in one update."""
        return self.update(self.make(), rows, **kwargs).result()


def check_state(subject):
    """State is float32, named, and made before the first update."""
    with Check("state") as check:
        metric = subject.make()
        named_once(check, metric.variables, "metric variables")
        before = [v.path for v in metric.variables]
        check.finite("result before any update", metric.result())
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy("mixed_float16")
        try:
            mixed = subject.update(subject.make())
        finally:
            keras.config.set_dtype_policy(policy)
        check.close(
            "results under mixed_float16 and float32",
            mixed.result(),
            subject.value(),
            subject.tol,
        )
        for v in (*metric.variables, *mixed.variables):
            check.that(
                "float" not in v.dtype or v.dtype == "float32",
                "expected float32 state",
                f"{v.path} of {v.dtype}",
            )
        subject.update(metric)
        check.equal(
            "the variables after an update", [v.path for v in metric.variables], before
        )


def check_streaming(subject):
    """Batch after batch gives the value of all rows at once."""
    with Check("streaming") as check:
        whole = subject.value()
        for sizes in ([1], [subject.rows // 2]):
            cuts = [0, *np.cumsum(sizes), subject.rows]
            metric = subject.make()
            for start, stop in zip(cuts, cuts[1:], strict=False):
                subject.update(metric, slice(start, stop))
                metric.result()  # Reading in between must not change anything.
            check.close(
                f"results of batches of {sizes} and the rest, and of all rows at once",
                metric.result(),
                whole,
                subject.tol,
            )


def check_reset(subject):
    """After reset_state a metric is as new."""
    with Check("reset") as check:
        metric = subject.make()
        first = [v.numpy() for v in metric.variables]
        subject.update(metric, slice(0, subject.rows // 2))
        metric.reset_state()
        check.close("variables after reset_state", metric.variables, first, 0)
        subject.update(metric)
        check.close(
            "results after reset_state and of a new metric",
            metric.result(),
            subject.value(),
            subject.tol,
        )


def check_sample_weight(subject):
    """An integer weight stands for repeated rows, zero for absent ones."""
    with Check("sample weight") as check:
        parameters = inspect.signature(subject.cls.update_state).parameters
        check.that(
            "sample_weight" in parameters,
            "expected update_state to take sample_weight",
            list(parameters),
        )
        # As many rows as before, so that no shape is new to the backend.
        counts = np.ones(subject.rows, int)
        counts[: subject.rows // 2] += 1
        counts[-(subject.rows // 2) :] -= 1
        np.random.default_rng(1).shuffle(counts)
        check.close(
            "results with integer weights and with rows repeated as often",
            subject.value(sample_weight=counts.astype("float32")),
            subject.value(np.repeat(np.arange(subject.rows), counts)),
            subject.tol,
        )
        check.close(
            "results with equal weights and without",
            subject.value(sample_weight=np.full(subject.rows, 3.0, "float32")),
            subject.value(),
            subject.tol,
        )


def check_dtypes(subject):
    """Inputs of any dtype, lists included, give the same value."""
    with Check("dtypes") as check:
        # Numbers that every dtype holds exactly.
        y_pred = arrays(keras.ops.convert_to_tensor(subject.y_pred, "bfloat16"))[0]
        y_true = subject.y_true
        if y_true.dtype.kind == "f":
            y_true = np.round(y_true * 128) / 128

        def value(y_true, y_pred):
            metric = subject.make()
            metric.update_state(y_true, y_pred)
            return metric.result()

        expected = value(y_true, y_pred.astype("float32"))
        check.equal(
            "the dtype of the result",
            keras.backend.standardize_dtype(expected.dtype),
            "float32",
        )
        # JAX has no 64-bit dtypes unless they are enabled.
        wide = ["float64"] if keras.backend.backend() == "tensorflow" else []
        for dtype in ("float16", "bfloat16", *wide):
            cast = keras.ops.convert_to_tensor(y_pred, dtype)
            received = value(y_true, cast)
            check.close(
                f"results of {dtype} and float32 predictions",
                received,
                expected,
                subject.tol,
            )
            check.equal(
                f"the dtype of the result of {dtype} predictions",
                keras.backend.standardize_dtype(received.dtype),
                "float32",
            )
        for dtype in ("float32", *wide, "int32", "uint8"):
            cast = y_true.astype(dtype)
            if np.array_equal(cast, y_true):
                check.close(
                    f"results of {dtype} and {y_true.dtype} labels",
                    value(cast, y_pred.astype("float32")),
                    expected,
                    subject.tol,
                )
        check.close(
            "results of lists and arrays",
            value(y_true.tolist(), y_pred.tolist()),
            expected,
            subject.tol,
        )


def check_in_model(subject):
    """In a compiled model: any jit, any batch size, no retracing, saved, loaded."""

    def make(mode):
        x = keras.Input(subject.y_pred.shape[1:], name="predictions")
        model = keras.Model(x, keras.layers.Identity()(x))
        model.compile(loss=NoLoss(), metrics=[subject.make(name="value")], **mode)
        return model

    x, y = subject.y_pred.astype("float32"), subject.y_true
    expected = float(subject.value())
    for mode in COMPILED:  # The expected value was computed eagerly.
        name = named_mode(mode)
        with Check("compiled") as check:
            model = make(mode)
            for batch in (subject.rows, subject.rows // 2):
                logs = model.evaluate(
                    x, y, batch_size=batch, verbose=0, return_dict=True
                )
                check.close(
                    f"the value evaluate gives with {name}, batches of {batch}",
                    logs["value"],
                    expected,
                    subject.tol,
                )
    with Check("retracing") as check:
        model.test_on_batch(x, y)
        with count_traces() as traced:
            model.test_on_batch(x, y)
        check.equal("the number of functions traced anew", len(traced), 0)
    with Check("save") as check:
        file = session.get().folder / "metric.keras"
        model.save(file)
        loaded = keras.saving.load_model(file)
        check.close(
            "the value after loading",
            loaded.test_on_batch(x, y, return_dict=True)["value"],
            expected,
            subject.tol,
        )
    with Check("other backend"):
        logs = np.array(model.test_on_batch(x, y), "float32")
        record_case(
            subject.cls.__name__, model, [subject.cls], logs=(x, y, logs), tol=1e-5
        )
