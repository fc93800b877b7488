"""The harness bites: wrong components, each refused by the check it breaks."""

import inspect
import os
import pathlib
import random
import shutil
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
from keras import ops

import harness
import kzoo.layers
from harness import components, fresh
from harness import session as harness_session
from harness.skips import StrictSkips
from harness.values import asked_for
from kzoo.layers.ops import random as kzoo_random
from kzoo.zoo import registry

pytestmark = pytest.mark.slow

BACKEND = keras.backend.backend()


def register(cls):
    """Registers a toy as if it were the package's own."""
    return keras.saving.register_keras_serializable(package="kzoo")(cls)


@pytest.fixture(autouse=True)
def own_session(tmp_path, monkeypatch, pytestconfig):
    """What the toys leave must not reach the real session's fresh processes."""
    full = BACKEND == "jax" and asked_for(pytestconfig)
    mine = harness_session.Session(tmp_path, full)
    mine.repeats = True
    monkeypatch.setattr(harness_session, "current", mine)
    return mine


# --- layers -----------------------------------------------------------------------


@register
class RightLayer(keras.layers.Layer):
    """Multiplies by a kernel, with noise in training.

    Reference: none.

    Args:
        units: Number of outputs.
        rate: Standard deviation of the noise.
        seed: Integer seed of the noise.
        **kwargs: `keras.layers.Layer`'s arguments.

    Call arguments:
        inputs: Tensor `[B, n]`.
        training: Whether to add noise.

    Input shape:
        `[B, n]`.

    Output shape:
        `[B, units]`.

    Raises:
        ValueError: Never.

    Example:

    >>> 1 + 1
    2
    """

    def __init__(self, units, rate=0.1, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.rate = rate
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True

    def build(self, input_shape):
        self.kernel = self.add_weight(
            shape=(input_shape[-1], self.units), name="kernel"
        )
        self.built = True

    def noise(self, x):
        return kzoo_random.normal(ops.shape(x), self.seed_generator, x.dtype)

    def call(self, inputs, training=False):
        if training:
            inputs = inputs * (1 + self.rate * self.noise(inputs))
        return ops.matmul(inputs, self.kernel)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    # Keras does not save the state of a SeedGenerator.
    def save_own_variables(self, store):
        store["kernel"] = self.kernel
        store["seed"] = self.seed_generator.state

    def load_own_variables(self, store):
        self.kernel.assign(store["kernel"])
        self.seed_generator.state.assign(store["seed"])

    def get_config(self):
        config = {"units": self.units, "rate": self.rate, "seed": self.seed}
        return {**super().get_config(), **config}


@register
class RightLookup(keras.layers.Layer):
    # A layer of integers.
    __doc__ = RightLayer.__doc__

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, input_shape):
        self.table = self.add_weight(shape=(7, self.units), name="table")
        self.built = True

    def call(self, inputs):
        return ops.cast(ops.take(self.table, inputs, axis=0), self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return (*input_shape, self.units)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@register
class RightPair(keras.layers.Layer):
    # A layer with two inputs, two outputs, and an argument of `call`.
    __doc__ = RightLayer.__doc__

    def build(self, input_shape):
        self.weight = self.add_weight(shape=(), name="weight", initializer="ones")
        self.built = True

    def call(self, inputs, swap=False):
        a, b = reversed(inputs) if swap else inputs
        return [ops.matmul(a, b) * self.weight, b - self.weight]

    def compute_output_shape(self, input_shape):
        b, a = input_shape
        return [(*a[:-1], b[-1]), b]


def toy(cls):
    """Registers a wrong toy, which has a right one's docstring."""
    if cls.__doc__ is None:
        cls.__doc__ = RightLayer.__doc__.replace(
            "        **kwargs", "        kernel_initializer: Unused.\n        **kwargs"
        )
    return register(cls)


@toy
class ForgetsAnArgument(RightLayer):
    def get_config(self):
        config = super().get_config()
        del config["rate"]
        return config


@toy
class ChangesAnArgument(RightLayer):
    def get_config(self):
        return {**super().get_config(), "rate": 0.1}


@toy
class IgnoresAnObject(RightLayer):
    def __init__(
        self, units, rate=0.1, seed=None, kernel_initializer="zeros", **kwargs
    ):
        super().__init__(units, rate, seed, **kwargs)

    def get_config(self):
        zeros = keras.initializers.serialize(keras.initializers.Zeros())
        return {**super().get_config(), "kernel_initializer": zeros}


@toy
class SpendsItsConfig(RightLayer):
    @classmethod
    def from_config(cls, config):
        return cls(config.pop("units"), **config)


@toy
class WrongShape(RightLayer):
    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units + 1)


@toy
class WrongDtype(RightLayer):
    def compute_output_spec(self, inputs, training=False):
        shape = (*inputs.shape[:-1], self.units)
        return keras.KerasTensor(shape, dtype="int32")


@toy
class AnswersInFloat32(RightLayer):
    def call(self, inputs, training=False):
        return ops.cast(super().call(inputs, training), "float32")


@toy
class KeepsHalfWeights(RightLayer):
    def build(self, input_shape):
        self.kernel = self.add_weight(
            shape=(input_shape[-1], self.units), name="kernel", dtype=self.compute_dtype
        )
        self.built = True


@toy
class OverflowsInHalf(RightLayer):
    def call(self, inputs, training=False):
        return super().call(inputs * 1e5, training) / 1e5


@toy
class AnswersInAtMostFloat32(RightLayer):
    def call(self, inputs, training=False):
        outputs = super().call(inputs, training)
        wide = self.compute_dtype == "float64"
        return ops.cast(outputs, "float32") if wide else outputs


@toy
class BuildsTooLate(RightLayer):
    def build(self, input_shape):
        super().build(input_shape)
        self.late = None

    def call(self, inputs, training=False):
        if self.late is None:
            self._tracker.unlock()
            self.late = self.add_weight(shape=(), name="late")
        return super().call(inputs, training) + self.late


@toy
class NamesNoWeight(RightLayer):
    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], self.units))
        self.built = True


@toy
class IgnoresItsSeed(RightLayer):
    def __init__(self, units, rate=0.1, seed=None, **kwargs):
        super().__init__(units, rate, seed, **kwargs)
        self.seed_generator = keras.random.SeedGenerator(5)


@toy
class SeedsFromPython(RightLayer):
    def __init__(self, units, rate=0.1, seed=None, **kwargs):
        super().__init__(units, rate, seed, **kwargs)
        self.seed_generator = keras.random.SeedGenerator(random.randrange(2**30))


@toy
class TakesNoSeed(keras.layers.Layer):
    def __init__(self, units, rate=0.1, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.rate = rate
        self.generator = keras.random.SeedGenerator(1)

    def call(self, inputs, training=False):
        if training:
            shape = ops.shape(inputs)
            inputs += kzoo_random.normal(shape, self.generator, inputs.dtype)
        return inputs

    def compute_output_shape(self, input_shape):
        return input_shape


@toy
class DrawsFromNumpy(RightLayer):
    def noise(self, x):
        self.seed_generator.next()
        return np.random.normal(size=x.shape).astype("float32")


@toy
class CountsInPython(RightLayer):
    calls = 0

    def call(self, inputs, training=False):
        if training:
            self._tracker.unlock()
            self.calls += 1
        return super().call(inputs * (1 + self.calls), training)


@toy
class HidesAVariable(RightLayer):
    def build(self, input_shape):
        super().build(input_shape)
        self.hidden = types.SimpleNamespace(count=keras.Variable(0.0, name="count"))

    def call(self, inputs, training=False):
        if training:
            self.hidden.count.assign_add(1.0)
        return super().call(inputs + self.hidden.count, training)


@toy
class SavesNoSeed(RightLayer):
    def save_own_variables(self, store):
        store["kernel"] = self.kernel

    def load_own_variables(self, store):
        self.kernel.assign(store["kernel"])


@toy
class SavesOldWeights(RightLayer):
    def save_own_variables(self, store):
        super().save_own_variables(store)
        store["kernel"] = self.kernel.numpy() + 1


@toy
class RefusesOneRow(RightLayer):
    def call(self, inputs, training=False):
        if inputs.shape[0] == 1:
            raise TypeError("one row")
        return super().call(inputs, training)


@toy
class NansOnOneRow(RightLayer):
    def call(self, inputs, training=False):
        rows = ops.cast(ops.shape(inputs)[0], inputs.dtype)
        return super().call(inputs, training) + 0 * ops.log(rows - 1) * (rows - 1)


@toy
class LosesTheMask(RightLayer):
    def compute_mask(self, inputs, previous_mask):
        if previous_mask is None:
            return None
        return ops.concatenate([previous_mask, previous_mask], axis=0)


@toy
class DrawsWithKeras(RightLayer):
    # Keras's own draws differ between XLA and other kernels on TensorFlow.
    def noise(self, x):
        return keras.random.normal(ops.shape(x), seed=self.seed_generator)


@toy
class NeedsValues(RightLayer):
    def call(self, inputs, training=False):
        if training and float(ops.convert_to_numpy(ops.sum(inputs))) > 1e6:
            inputs = 2 * inputs
        return super().call(inputs, training)

    def compute_output_spec(self, inputs, training=False):
        shape = (*inputs.shape[:-1], self.units)
        return keras.KerasTensor(shape, dtype=inputs.dtype)


@toy
class DiffersCompiled(RightLayer):
    def call(self, inputs, training=False):
        return super().call(inputs, training) * (2.0 if is_traced(inputs) else 1.0)


@toy
class DiffersCompiledInInference(RightLayer):
    def call(self, inputs, training=False):
        wrong = not training and is_traced(inputs)
        return super().call(inputs, training) * (2.0 if wrong else 1.0)


def is_traced(x):
    if BACKEND == "jax":
        import jax

        return isinstance(x, jax.core.Tracer)
    import tensorflow as tf

    return not tf.executing_eagerly()


@toy
class CompilesEachCall(RightLayer):
    def call(self, inputs, training=False):
        return compiled(lambda x: 1.0 * x)(super().call(inputs, training))


def compiled(function):
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, autograph=False)


@toy
class UsesJax(RightLayer):
    def call(self, inputs, training=False):
        import jax

        return jax.lax.neg(jax.lax.neg(super().call(inputs, training)))


@toy
class DiffersByBackend(RightLayer):
    def call(self, inputs, training=False):
        outputs = super().call(inputs, training)
        return outputs * (2.0 if keras.backend.backend() == "jax" else 1.0)


@toy
class DiffersExported(RightLayer):
    def call(self, inputs, training=False):
        exported = any(frame.function == "record_export" for frame in inspect.stack())
        wrong = exported and is_traced(inputs)
        return super().call(inputs, training) * (2.0 if wrong else 1.0)


@register
class NoDocstring(RightLayer):
    pass


@register
class NoSections(RightLayer):
    """Multiplies by a kernel, with noise in training."""


@register
class NoArguments(RightLayer):
    def __init__(self, units, rate=0.1, seed=None, **kwargs):
        super().__init__(units, rate, seed, **kwargs)


NoArguments.__doc__ = RightLayer.__doc__.replace("        rate:", "        speed:")


@register
class NoDoctest(RightLayer):
    pass


NoDoctest.__doc__ = RightLayer.__doc__.replace(">>>", "   ")


@register
class WrapsBadly(RightLayer):
    pass


WrapsBadly.__doc__ = RightLayer.__doc__.replace(
    "Standard deviation of the noise.", "Standard deviation\n        of the noise."
)


class NotRegistered(RightLayer):
    __doc__ = RightLayer.__doc__


@keras.saving.register_keras_serializable(package="elsewhere")
class RegisteredElsewhere(RightLayer):
    __doc__ = RightLayer.__doc__


def layer(cls):
    init_kwargs = {"units": 3, "rate": 0.2, "seed": 1}
    if cls is TakesNoSeed:
        del init_kwargs["seed"]
    if cls is IgnoresAnObject:
        init_kwargs["kernel_initializer"] = keras.initializers.Ones()
    harness.check_layer(cls, init_kwargs, (4, 5))


WRONG_LAYERS = {
    ForgetsAnArgument: "config",
    ChangesAnArgument: "config",
    IgnoresAnObject: "config",
    SpendsItsConfig: "config",
    WrongShape: "shape",
    WrongDtype: "shape",
    AnswersInFloat32: "mixed precision",
    KeepsHalfWeights: "mixed precision",
    OverflowsInHalf: "mixed precision",
    BuildsTooLate: "build",
    NamesNoWeight: "build",
    IgnoresItsSeed: "seed",
    SeedsFromPython: "seed",
    TakesNoSeed: "seed",
    DrawsFromNumpy: "seed",
    CountsInPython: "state",
    HidesAVariable: "state",
    SavesNoSeed: "save",
    SavesOldWeights: "save",
    RefusesOneRow: "batch size",
    NansOnOneRow: "batch size",
    LosesTheMask: "mask",
    # Keras on JAX traces a model before its first step, whether compiled or not.
    NeedsValues: "training" if BACKEND == "jax" else "compiled",
    DiffersCompiled: "compiled",
    DiffersCompiledInInference: "compiled",
    CompilesEachCall: "retracing",
    NoDocstring: "docstring",
    NoSections: "docstring",
    NoArguments: "docstring",
    NoDoctest: "docstring",
    WrapsBadly: "docstring",
    NotRegistered: "registration",
    RegisteredElsewhere: "registration",
}
if BACKEND == "tensorflow":
    WRONG_LAYERS |= {DrawsWithKeras: "compiled", AnswersInAtMostFloat32: "float64"}


@pytest.mark.parametrize(
    ("cls", "check"), WRONG_LAYERS.items(), ids=lambda v: getattr(v, "__name__", v)
)
def test_a_wrong_layer_is_refused(cls, check):
    with pytest.raises(harness.ContractError) as caught:
        layer(cls)
    assert caught.value.check == check, caught.value


@pytest.mark.tensorflow
def test_the_fresh_process_answers_every_question(own_session):
    layer(DiffersExported)
    layer(RightLayer)
    folder = own_session.folder / "exports"
    differs, right = sorted(folder.iterdir())
    unasked, broken, other = (shutil.copytree(right, folder / n) for n in "abc")
    own_session.counts["exports"] += 3
    for question in unasked.glob("*.npz"):
        question.unlink()
    shutil.rmtree(broken / "saved_model")
    values = dict(np.load(other / "serve.0.npz"))
    values["outputs/output_0"] = values["outputs/output_0"] + 1e-3
    np.savez(other / "serve.0.npz", **values)

    with pytest.raises(harness.ContractError) as caught:
        fresh.check_exports()
    assert caught.value.check == "fresh process"
    message = str(caught.value)
    assert f"{differs.name}: serve.0.npz: output_0 differs by up to" in message
    assert f"{unasked.name}: no question was recorded for it" in message
    assert f"{broken.name}: " in message
    assert f"{other.name}: serve.0.npz: output_0 differs by up to 0.001" in message
    assert f"{right.name}: " not in message

    shutil.rmtree(broken)
    with pytest.raises(harness.ContractError, match="the number of cases to be 5"):
        fresh.check_exports()


@pytest.mark.jax  # Which leaves the cases; TensorFlow does for `--all` alone.
def test_the_other_backend_repeats_every_case(own_session):
    layer(UsesJax)
    layer(DiffersByBackend)
    layer(RightLayer)
    folder = own_session.folder / "cases"
    foreign, differs, right = sorted(folder.iterdir())
    unasked, other = (shutil.copytree(right, folder / n) for n in "ab")
    own_session.counts["cases"] += 2
    np.savez(unasked / "expected.npz", tol=1e-5, random=np.array([], "U"))
    values = dict(np.load(other / "expected.npz"))
    values["outputs/y/0"] = values["outputs/y/0"] + 1e-3
    np.savez(other / "expected.npz", **values)

    with pytest.raises(harness.ContractError) as caught:
        fresh.check_other_backend()
    assert caught.value.check == "other backend"
    message = str(caught.value)
    assert f"{foreign.name}: " in message
    assert f"{differs.name}: ContractError: other backend: expected outpu" in message
    assert f"{unasked.name}: ContractError: other backend: expected some" in message
    assert f"{other.name}: ContractError: other backend: expected outputs" in message
    assert f"{right.name}: " not in message


# --- cells ------------------------------------------------------------------------


@toy
class RightCell(keras.layers.SimpleRNNCell):
    def __init__(self, units, **kwargs):
        super().__init__(units, **kwargs)


@toy
class CellThatForgetsAnArgument(RightCell):
    def get_config(self):
        return {**super().get_config(), "activation": "tanh"}


@toy
class CellThatKeepsItsState(RightCell):
    kept = 0.0

    def call(self, sequence, states, training=False):
        output, states = super().call(sequence + self.kept, states, training)
        if not is_traced(sequence):
            self._tracker.unlock()
            self.kept = ops.sum(output)
        return output, states


@toy
class CellThatDiffersCompiled(RightCell):
    def call(self, sequence, states, training=False):
        wrong = 2.0 if is_traced(sequence) else 1.0
        return super().call(sequence * wrong, states, training)


def cell(cls, **kwargs):
    kwargs = {"units": 3, "activation": "relu", "seed": 1, **kwargs}
    harness.check_cell(cls, kwargs, (4, 2, 5))


@pytest.mark.parametrize(
    ("cls", "check", "dropout"),
    [
        (CellThatForgetsAnArgument, "config", 0.0),
        (CellThatKeepsItsState, "state", 0.0),
        # Keras saves no state of random numbers.
        (RightCell, "save", 0.5),
        (CellThatDiffersCompiled, "compiled", 0.0),
    ],
)
def test_a_wrong_cell_is_refused(cls, check, dropout):
    with pytest.raises(harness.ContractError) as caught:
        cell(cls, dropout=dropout)
    assert caught.value.check == check, caught.value


# --- optimizers -------------------------------------------------------------------


@register
class RightOptimizer(keras.optimizers.Optimizer):
    """Gradient descent with momentum.

    Reference: none.

    Args:
        learning_rate: A number or schedule.
        momentum: Decay of the velocity.
        name: The optimizer's name.
        **kwargs: `keras.optimizers.Optimizer`'s arguments.

    Raises:
        ValueError: Never.

    Example:

    >>> 1 + 1
    2
    """

    def __init__(self, learning_rate=0.1, momentum=0.9, name="right", **kwargs):
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.momentum = momentum

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.velocities = self.add_optimizer_variables(variables, "velocity")

    def update_step(self, gradient, variable, learning_rate):
        velocity = self.velocities[self._get_variable_index(variable)]
        gradient = ops.cast(gradient, variable.dtype)
        self.assign(velocity, self.momentum * velocity - learning_rate * gradient)
        self.assign_add(variable, velocity)

    def get_config(self):
        return {**super().get_config(), "momentum": self.momentum}


def toy_of(base):
    """Registers a wrong toy with the docstring of the right one."""

    def decorate(cls):
        cls.__doc__ = base.__doc__
        return register(cls)

    return decorate


@toy_of(RightOptimizer)
class OptimizerForgetsAnArgument(RightOptimizer):
    def get_config(self):
        config = super().get_config()
        del config["momentum"]
        return config


@toy_of(RightOptimizer)
class OptimizerBuildsTwice(RightOptimizer):
    def build(self, variables):
        keras.optimizers.Optimizer.build(self, variables)
        self.velocities = self.add_optimizer_variables(variables, "velocity")


@toy_of(RightOptimizer)
class OptimizerForgetsASlot(RightOptimizer):
    def save_own_variables(self, store):
        for i, variable in enumerate(self.variables[:2]):
            store[str(i)] = variable.numpy()

    def load_own_variables(self, store):
        for i, variable in enumerate(self.variables[:2]):
            variable.assign(store[str(i)])


@toy_of(RightOptimizer)
class OptimizerCountsInPython(RightOptimizer):
    calls = 0

    def update_step(self, gradient, variable, learning_rate):
        self.__dict__["calls"] = self.calls + 1
        super().update_step(gradient, variable, learning_rate / self.calls)


@toy_of(RightOptimizer)
class OptimizerHidesState(RightOptimizer):
    def build(self, variables):
        keras.optimizers.Optimizer.build(self, variables)
        if not hasattr(self, "hidden"):
            zeros = [keras.Variable(np.zeros(v.shape, "float32")) for v in variables]
            self.hidden = types.SimpleNamespace(zeros=zeros)
        self.velocities = []

    def update_step(self, gradient, variable, learning_rate):
        velocity = self.hidden.zeros[self._get_variable_index(variable)]
        velocity.assign(self.momentum * velocity - learning_rate * gradient)
        variable.assign_add(velocity.value)


@toy_of(RightOptimizer)
class OptimizerDiffersCompiled(RightOptimizer):
    def update_step(self, gradient, variable, learning_rate):
        gradient = gradient * (2.0 if is_traced(gradient) else 1.0)
        super().update_step(gradient, variable, learning_rate)


@toy_of(RightOptimizer)
class OptimizerNeedsValues(RightOptimizer):
    def update_step(self, gradient, variable, learning_rate):
        if float(ops.convert_to_numpy(ops.max(gradient))) < 1e6:
            super().update_step(gradient, variable, learning_rate)


@toy_of(RightOptimizer)
class OptimizerIgnoresTheLearningRate(RightOptimizer):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, 0.1)


@toy_of(RightOptimizer)
class OptimizerIgnoresSchedules(RightOptimizer):
    def _get_current_learning_rate(self):
        if callable(self._learning_rate):
            return self._learning_rate(0)
        return super()._get_current_learning_rate()


@toy_of(RightOptimizer)
class OptimizerClipsNothing(RightOptimizer):
    def _clip_gradients(self, grads):
        return grads


@toy_of(RightOptimizer)
class OptimizerIgnoresAccumulation(RightOptimizer):
    def __init__(self, *args, gradient_accumulation_steps=None, **kwargs):
        super().__init__(*args, **kwargs)


OptimizerIgnoresAccumulation.__doc__ = RightOptimizer.__doc__.replace(
    "        name:", "        gradient_accumulation_steps: Ignored.\n        name:"
)


@toy_of(RightOptimizer)
class OptimizerKeepsHalfState(RightOptimizer):
    def build(self, variables):
        if self.built:
            return
        keras.optimizers.Optimizer.build(self, variables)
        self.velocities = [
            self.add_variable(v.shape, dtype="float16", name=f"velocity_{i}")
            for i, v in enumerate(variables)
        ]


@register
class OptimizerHasNoDocstring(RightOptimizer):
    pass


class OptimizerIsNotRegistered(RightOptimizer):
    __doc__ = RightOptimizer.__doc__


WRONG_OPTIMIZERS = {
    OptimizerForgetsAnArgument: "config",
    OptimizerBuildsTwice: "build",
    OptimizerKeepsHalfState: "build",
    OptimizerForgetsASlot: "save",
    OptimizerCountsInPython: "resume",
    OptimizerDiffersCompiled: "compiled",
    OptimizerNeedsValues: "compiled",
    OptimizerIgnoresTheLearningRate: "learning rate",
    OptimizerIgnoresSchedules: "schedule",
    OptimizerClipsNothing: "clipping",
    OptimizerIgnoresAccumulation: "gradient accumulation",
    OptimizerHasNoDocstring: "docstring",
    OptimizerIsNotRegistered: "registration",
}
# On JAX the trainer drops what an optimizer keeps elsewhere: it has no such state.
if BACKEND == "tensorflow":
    WRONG_OPTIMIZERS |= {OptimizerHidesState: "resume"}


@pytest.mark.parametrize(
    ("cls", "check"), WRONG_OPTIMIZERS.items(), ids=lambda v: getattr(v, "__name__", v)
)
def test_a_wrong_optimizer_is_refused(cls, check):
    with pytest.raises(harness.ContractError) as caught:
        harness.check_optimizer(lambda: cls(0.05, momentum=0.8))
    assert caught.value.check == check, caught.value


# --- metrics ----------------------------------------------------------------------


@register
class RightMetric(keras.metrics.Metric):
    """Mean of a power of the error.

    Reference: none.

    Args:
        power: The power.
        name: The metric's name.
        dtype: Dtype of the state.

    Raises:
        ValueError: Never.

    Example:

    >>> 1 + 1
    2
    """

    def __init__(self, power=2, name="right", dtype=None):
        super().__init__(name=name, dtype=dtype)
        self.power = power
        self.total = self.add_weight(name="total", initializer="zeros")
        self.count = self.add_weight(name="count", initializer="zeros")

    def values(self, y_true, y_pred):
        y_true, y_pred = ops.cast(y_true, "float32"), ops.cast(y_pred, "float32")
        return ops.mean(ops.abs(y_true - y_pred) ** self.power, axis=-1)

    def update_state(self, y_true, y_pred, sample_weight=None):
        values = self.values(y_true, y_pred)
        weights = ops.ones_like(values)
        if sample_weight is not None:
            weights = weights * ops.cast(sample_weight, values.dtype)
        self.total.assign_add(ops.sum(weights * values))
        self.count.assign_add(ops.sum(weights))

    def result(self):
        return ops.divide_no_nan(self.total, self.count)

    def get_config(self):
        return {**super().get_config(), "power": self.power}


@toy_of(RightMetric)
class MetricForgetsAnArgument(RightMetric):
    def get_config(self):
        config = super().get_config()
        del config["power"]
        return config


@toy_of(RightMetric)
class MetricNamesNoState(RightMetric):
    def __init__(self, power=2, name="right", dtype=None):
        super().__init__(power, name, dtype)
        self.total = self.add_weight(initializer="zeros")


@toy_of(RightMetric)
class MetricKeepsHalfState(RightMetric):
    def __init__(self, power=2, name="right", dtype=None):
        super().__init__(power, name, dtype)
        self.spare = self.add_weight(name="spare", initializer="zeros", dtype="float16")


@toy_of(RightMetric)
class MetricStartsAtNan(RightMetric):
    def result(self):
        return self.total / self.count


@toy_of(RightMetric)
class MetricDoesNotStream(RightMetric):
    def update_state(self, y_true, y_pred, sample_weight=None):
        super().reset_state()
        super().update_state(y_true, y_pred, sample_weight)


@toy_of(RightMetric)
class MetricAveragesBatches(RightMetric):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.total.assign_add(ops.mean(self.values(y_true, y_pred)))
        self.count.assign_add(1.0)


@toy_of(RightMetric)
class MetricDoesNotReset(RightMetric):
    def reset_state(self):
        self.total.assign(0.0)


@toy_of(RightMetric)
class MetricCountsInPython(RightMetric):
    calls = 0

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.__dict__["calls"] = self.calls + 1
        super().update_state(y_true, y_pred, sample_weight)

    def result(self):
        return super().result() * self.calls


@toy_of(RightMetric)
class MetricIgnoresWeights(RightMetric):
    def update_state(self, y_true, y_pred, sample_weight=None):
        super().update_state(y_true, y_pred)


@toy_of(RightMetric)
class MetricTakesNoWeights(RightMetric):
    def update_state(self, y_true, y_pred):
        super().update_state(y_true, y_pred)


@toy_of(RightMetric)
class MetricComputesInHalf(RightMetric):
    def values(self, y_true, y_pred):
        y_pred = ops.convert_to_tensor(y_pred)
        y_true = ops.cast(y_true, y_pred.dtype)
        values = ops.mean(ops.abs(y_true - y_pred) ** self.power, axis=-1)
        return ops.cast(values, "float32")


@toy_of(RightMetric)
class MetricNeedsValues(RightMetric):
    def values(self, y_true, y_pred):
        return super().values(np.asarray(y_true), np.asarray(y_pred))


@toy_of(RightMetric)
class MetricDiffersCompiled(RightMetric):
    def values(self, y_true, y_pred):
        values = super().values(y_true, y_pred)
        return values * (2.0 if is_traced(values) else 1.0)


@register
class MetricHasNoDocstring(RightMetric):
    pass


WRONG_METRICS = {
    MetricForgetsAnArgument: "config",
    MetricNamesNoState: "state",
    MetricKeepsHalfState: "state",
    MetricStartsAtNan: "state",
    MetricDoesNotStream: "streaming",
    MetricAveragesBatches: "streaming",
    MetricDoesNotReset: "reset",
    MetricCountsInPython: "streaming",
    MetricIgnoresWeights: "sample weight",
    MetricTakesNoWeights: "sample weight",
    MetricComputesInHalf: "dtypes",
    MetricNeedsValues: "compiled",
    MetricDiffersCompiled: "compiled",
    MetricHasNoDocstring: "docstring",
}


def metric(cls):
    numbers = np.random.default_rng(0)
    y_true, y_pred = numbers.normal(size=(2, 10, 3)).astype("float32")
    harness.check_metric(cls, {"power": 3}, y_true, y_pred)


@pytest.mark.parametrize(
    ("cls", "check"), WRONG_METRICS.items(), ids=lambda v: getattr(v, "__name__", v)
)
def test_a_wrong_metric_is_refused(cls, check):
    with pytest.raises(harness.ContractError) as caught:
        metric(cls)
    assert caught.value.check == check, caught.value


# --- losses -----------------------------------------------------------------------


@register
class RightLoss(keras.losses.Loss):
    """Sum over the last axis of a power of the error.

    Reference: none.

    Args:
        power: The power.
        reduction: As `keras.losses.Loss`'s.
        name: The loss's name.
        dtype: Dtype to compute in.

    Call arguments:
        y_true: Targets, `[B, n]`.
        y_pred: Predictions, `[B, n]`.

    Raises:
        ValueError: Never.

    Example:

    >>> 1 + 1
    2
    """

    def __init__(
        self, power=2, reduction="sum_over_batch_size", name="right", dtype=None
    ):
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.power = power

    def call(self, y_true, y_pred):
        return ops.sum(ops.abs(y_true - y_pred) ** self.power, axis=-1)

    def get_config(self):
        return {**super().get_config(), "power": self.power, "dtype": self.dtype}


@toy_of(RightLoss)
class LossForgetsAnArgument(RightLoss):
    def get_config(self):
        config = super().get_config()
        del config["power"]
        return config


@toy_of(RightLoss)
class LossReducesItself(RightLoss):
    def call(self, y_true, y_pred):
        return ops.mean(super().call(y_true, y_pred))


@toy_of(RightLoss)
class LossLooksAtTheBatch(RightLoss):
    def call(self, y_true, y_pred):
        return super().call(y_true - ops.mean(y_true, axis=0), y_pred)


@toy_of(RightLoss)
class LossIgnoresWeights(RightLoss):
    def __call__(self, y_true, y_pred, sample_weight=None):
        return super().__call__(y_true, y_pred)


@toy_of(RightLoss)
class LossComputesInHalf(RightLoss):
    def __call__(self, y_true, y_pred, sample_weight=None):
        y_pred = ops.convert_to_tensor(y_pred)
        y_true = ops.cast(y_true, y_pred.dtype)
        return super().__call__(y_true, y_pred, sample_weight)


@toy_of(RightLoss)
class LossDiffersCompiled(RightLoss):
    def call(self, y_true, y_pred):
        values = super().call(y_true, y_pred)
        return values * (2.0 if is_traced(values) else 1.0)


@register
class LossHasNoDocstring(RightLoss):
    pass


WRONG_LOSSES = {
    LossForgetsAnArgument: "config",
    LossReducesItself: "reduction",
    LossLooksAtTheBatch: "batch size",
    LossIgnoresWeights: "sample weight",
    LossComputesInHalf: "dtypes",
    LossHasNoDocstring: "docstring",
}
if BACKEND == "tensorflow":  # JAX compares compiled steps with each other by default.
    WRONG_LOSSES[LossDiffersCompiled] = "compiled"


def loss(cls):
    numbers = np.random.default_rng(0)
    y_true, y_pred = numbers.normal(size=(2, 6, 3)).astype("float32")
    harness.check_loss(cls, {"power": 3}, y_true, y_pred)


@pytest.mark.parametrize(
    ("cls", "check"), WRONG_LOSSES.items(), ids=lambda v: getattr(v, "__name__", v)
)
def test_a_wrong_loss_is_refused(cls, check):
    with pytest.raises(harness.ContractError) as caught:
        loss(cls)
    assert caught.value.check == check, caught.value


# --- models -----------------------------------------------------------------------


def right_model(units=3, name="right_model"):
    """A classifier of images of four pixels.

    Args:
        units: Number of classes.
        name: Name of the model.
    """
    image = keras.Input((2, 2, 1), name="image")
    x = keras.layers.Flatten(name="flatten")(image)
    x = keras.layers.Dense(4, "tanh", name="hidden")(x)
    logits = keras.layers.Dense(units, dtype="float32", name="logits")(x)
    return keras.Model(image, logits, name=name)


def wrong_model(function):
    """Gives an entry point the docstring of the right one."""
    function.__doc__ = right_model.__doc__
    return function


@wrong_model
def has_another_shape(units=3, name="has_another_shape"):
    image = keras.Input((4, 1, 1), name="image")
    x = keras.layers.Flatten()(image)
    return keras.Model(image, keras.layers.Dense(units)(x), name=name)


@wrong_model
def names_no_input(units=3, name="names_no_input"):
    image = keras.Input((2, 2, 1))
    x = keras.layers.Flatten()(image)
    return keras.Model(image, keras.layers.Dense(units)(x), name=name)


@wrong_model
def takes_anything(units=3, name="takes_anything", **kwargs):
    return right_model(units, name)


@wrong_model
def forgets_its_name(units=3, name="forgets_its_name"):
    return right_model(units)


@wrong_model
def ends_in_probabilities(units=3, name="ends_in_probabilities"):
    image = keras.Input((2, 2, 1), name="image")
    x = keras.layers.Flatten()(image)
    return keras.Model(image, keras.layers.Dense(units, "softmax")(x), name=name)


@wrong_model
def holds_an_unregistered_layer(units=3, name="holds_an_unregistered_layer"):
    image = keras.Input((2, 2, 1), name="image")
    x = NotRegistered(units)(keras.layers.Flatten()(image))
    return keras.Model(image, x, name=name)


@wrong_model
def keeps_half_weights(units=3, name="keeps_half_weights"):
    image = keras.Input((2, 2, 1), name="image")
    dtype = keras.config.dtype_policy().compute_dtype
    x = keras.layers.Dense(units, dtype=dtype)(keras.layers.Flatten()(image))
    return keras.Model(image, x, name=name)


@wrong_model
def differs_compiled(units=3, name="differs_compiled"):
    image = keras.Input((2, 2, 1), name="image")
    x = DiffersCompiled(units)(keras.layers.Flatten()(image))
    return keras.Model(image, x, name=name)


def has_no_docstring(units=3, name="has_no_docstring"):
    return right_model(units, name)


@wrong_model  # But at its own size.
def too_big_to_run(units=10**12, name="too_big_to_run"):
    if units > 100:
        raise MemoryError(f"{units} units")
    return right_model(units, name)


WRONG_MODELS = {
    too_big_to_run: "build",
    has_another_shape: "build",
    names_no_input: "build",
    takes_anything: "build",
    forgets_its_name: "build",
    ends_in_probabilities: "build",
    holds_an_unregistered_layer: "save",
    keeps_half_weights: "mixed precision",
    differs_compiled: "compiled",
    has_no_docstring: "docstring",
}


@pytest.fixture
def registered(monkeypatch):
    """Registers an entry point for one test."""
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))

    def register_one(function, description="A toy."):
        registry.register_model(
            function.__name__,
            description=description,
            dataset="digits",
            input_shape=(2, 2, 1),
            paper="https://example.org",
        )(function)
        return function.__name__

    return register_one


@pytest.mark.parametrize(
    ("function", "check"), WRONG_MODELS.items(), ids=lambda v: getattr(v, "__name__", v)
)
def test_a_wrong_model_is_refused(function, check, registered):
    with pytest.raises(harness.ContractError) as caught:
        harness.check_model(registered(function))
    assert caught.value.check == check, caught.value


def test_a_model_without_a_sentence_is_refused(registered):
    with pytest.raises(harness.ContractError, match="registration: .* a sentence"):
        harness.check_model(registered(right_model, "toy"))


def test_a_model_that_is_another_one(own_session, registered):
    def larger_model(units=5, name="larger_model", **overrides):
        return right_model(units, name, **overrides)

    name, other = registered(wrong_model(larger_model)), registered(right_model)
    harness.check_same_model(name, other, units=3)
    assert name in own_session.checked and other not in own_session.checked
    with pytest.raises(harness.ContractError, match="same model: .*'units': 3"):
        harness.check_same_model(name, other, units=4)


# --- right ones -------------------------------------------------------------------


@pytest.mark.tensorflow  # Of JAX, every real component's contract says so.
def test_right_components_pass(own_session, registered):
    layer(RightLayer)
    cell(RightCell)
    harness.check_layer(RightLookup, {"units": 3}, (4, 5), input_dtype="int32")
    shapes, swap = [(2, 4, 3), (2, 5, 4)], {"swap": True}
    harness.check_layer(RightPair, {}, shapes, call_kwargs=swap)
    harness.check_optimizer(lambda: RightOptimizer(0.05, momentum=0.8))
    metric(RightMetric)
    loss(RightLoss)
    harness.check_model(registered(right_model))
    assert fresh.check_other_backend() == 7
    assert fresh.check_exports() == 4


def test_a_component_without_its_check_is_found(own_session):
    files = components.mirrored(kzoo.layers.DenseFlipout)
    assert [file.name for file in files] == ["test_dense.py"]
    with pytest.raises(harness.ContractError, match="everything: .*DenseFlipout"):
        components.check_everything(own_session, files)
    components.check_everything(own_session, [])
    own_session.checked = {name for name in vars(kzoo.layers) if "Dense" in name}
    components.check_everything(own_session, files)


# --- the session: skips, backends, the processes at its end -----------------------

SKIPS = """
import pytest

def test_passes():
    pass

def test_skips():
    pytest.skip("no time")

@pytest.mark.xfail(reason="known")
def test_fails():
    assert False
"""


@pytest.mark.tensorflow  # No backend makes a difference.
@pytest.mark.parametrize(
    ("listed", "unlisted"),
    [
        ("", {"test_skips": "no time", "test_fails": "known"}),
        ("test_skips: no time\n", {"test_fails": "known"}),
        (
            "test_skips: no other reason\ntest_fails: known\n",
            {"test_skips": "no time"},
        ),
        ("# why\n\ntest_skips: no time\ntest_fails: known\n", {}),
    ],
)
def test_only_listed_skips_pass(listed, unlisted, tmp_path):
    (tmp_path / "test_one.py").write_text(SKIPS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    lines = [
        f"test_one.py::{line}" if line.startswith("test_") else line
        for line in listed.splitlines()
    ]
    (tmp_path / "allowed.txt").write_text("\n".join(lines))
    plugin = StrictSkips(tmp_path / "allowed.txt")
    options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
    # Which collects garbage five times, of which this process has much.
    options += ["-p", "no:unraisableexception", "-c", str(tmp_path / "pytest.ini")]
    code = pytest.main([*options, str(tmp_path)], plugins=[plugin])
    assert plugin.unlisted == {f"test_one.py::{k}": v for k, v in unlisted.items()}
    assert code == (pytest.ExitCode.TESTS_FAILED if unlisted else pytest.ExitCode.OK)


@pytest.mark.tensorflow  # No backend makes a difference.
def test_a_listed_skip_needs_its_reason(tmp_path):
    (tmp_path / "allowed.txt").write_text("test_one.py::test_skips\n")
    with pytest.raises(ValueError, match="<test id>: <reason>"):
        StrictSkips(tmp_path / "allowed.txt")


CONFTEST = """
import keras
import pytest
from harness import check_metric

@pytest.mark.tensorflow
def test_of_tensorflow():
    assert keras.backend.backend() == "tensorflow"

@pytest.mark.jax
def test_of_jax():
    assert keras.backend.backend() == "jax"

def test_skips():
    pytest.skip("no time")
"""


@pytest.mark.tensorflow  # No backend makes a difference.
def test_conftest_deselects_appends_and_is_strict(tmp_path):
    (tmp_path / "test_one.py").write_text(CONFTEST)
    root = pathlib.Path(__file__).parents[1]
    options = ["-v", "-p", "conftest", "-p", "no:cacheprovider"]
    config = ["-c", root / "pyproject.toml", "--rootdir", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *config, tmp_path],
        env={**os.environ, "CI": "1", "PYTHONPATH": str(root / "tests")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = done.stdout.splitlines()
    passed = [line.split("::")[1] for line in lines if "PASSED" in line]
    found = [name.split(" PASSED")[0] for name in passed]
    assert found == [f"test_of_{BACKEND}", "everything"], done.stdout
    last = ["fresh process" if BACKEND == "tensorflow" else "other backend"]
    skipped = [line for line in lines if "::" in line and "SKIPPED" in line]
    assert [line.split("::")[1].split(" SKIPPED")[0] for line in skipped] == [
        "test_skips",
        *last,
    ]
    assert "1 deselected" in lines[-1]
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "skips that allowed_skips.txt does not name" in done.stdout
    assert "test_one.py::test_skips: no time" in done.stdout
