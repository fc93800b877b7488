"""The contract of a layer."""

import copy
import functools
import inspect
import random
import zlib

import keras
import numpy as np

from kzoo.layers.variational.base import BayesianLayer
from kzoo.layers.variational.mode import at_posterior_mean

from . import session
from .check import Check, arrays, differ
from .configs import check_config, check_registration, mentions
from .docs import check_docstring
from .fresh import record_case, record_export
from .training import (
    EAGER,
    QUICK,
    XLA,
    brief,
    check_eager,
    check_lowering,
    check_steps,
    compile_model,
    forward,
    named_once,
    sgd,
    train,
    train_quickly,
)

STEPS = 3
POLICIES = ("mixed_float16", "mixed_bfloat16")
# How close results in half precision must be to those in float32.
LOW = {"float16": 1e-2, "bfloat16": 1e-1}


@session.noted
def check_layer(
    layer_class,
    init_kwargs,
    input_shape,
    *,
    input_dtype="float32",
    call_kwargs=None,
    tol=1e-5,
):
    """Checks a layer against every generic point of the contract.

    Args:
        layer_class: The layer's class.
        init_kwargs: A dict of constructor arguments; values that are not the
            defaults test more.
        input_shape: A shape with its batch size, which the layer's maths allows,
            or a list or dict of shapes; or a tuple of shapes, one for each of the
            inputs that `call` takes apart.
        input_dtype: The inputs' dtype.
        call_kwargs: A dict of further arguments of `call`.
        tol: How close two ways to compute the same number must be in float32.
    """
    layer = Subject(
        layer_class, init_kwargs, input_shape, input_dtype, call_kwargs or {}, tol
    )
    check_registration(layer_class)
    check_docstring(layer_class, "layer")
    with Check("config"):
        instance = layer.make()
    check_config(instance, init_kwargs, lambda kwargs: layer_class(**kwargs))
    check_build(layer)
    check_shape(layer)
    check_state(layer)
    check_seed(layer)
    check_batch_sizes(layer)
    check_mask(layer)
    check_save(layer)
    check_training(layer)
    check_mixed_precision(layer)
    check_float64(layer)
    leave_for_fresh_processes(layer)


class Subject:
    """A layer class with everything needed to make it, feed it and train it."""

    def __init__(self, cls, init_kwargs, input_shape, input_dtype, call_kwargs, tol):
        self.cls = cls
        self.init_kwargs = init_kwargs
        self.shapes = input_shape
        # Whether `call` takes the inputs as so many arguments.
        self.apart = isinstance(input_shape, tuple) and isinstance(
            input_shape[0], tuple
        )
        self.dtype = input_dtype
        self.call_kwargs = call_kwargs
        self.tol = tol
        self.is_float = keras.backend.is_float_dtype(input_dtype)
        self.takes_training = "training" in inspect.signature(cls.call).parameters
        # The values of `training` that may make a difference.
        self.modes = (False, True) if self.takes_training else (False,)

    def make(self, **overrides):
        """A new layer, its arguments copied so that no state can be shared."""
        return self.cls(**{**copy.deepcopy(self.init_kwargs), **overrides})

    def map_shapes(self, function):
        """Maps `(index, shape)` over the structure of input shapes."""
        if isinstance(self.shapes, dict):
            return {k: function(i, s) for i, (k, s) in enumerate(self.shapes.items())}
        if isinstance(self.shapes[0], (list, tuple)):
            return [function(i, s) for i, s in enumerate(self.shapes)]
        return function(0, self.shapes)

    @property
    def batch(self):
        """The batch size of the given shape."""
        return keras.tree.flatten(self.map_shapes(lambda i, s: s[0]))[0]

    @functools.cached_property
    def smallest(self):
        """The smallest batch size that is not refused with a ValueError."""
        layer = self.built()
        for batch in range(1, self.batch):
            try:
                for training in self.modes:
                    self.call(layer, self.inputs(batch=batch), training)
            except ValueError:
                continue
            return batch
        return self.batch

    def inputs(self, seed=0, batch=None):
        """Fixed pseudo-random inputs; every batch size scales the given one."""
        numbers = np.random.default_rng(seed)

        def draw(i, shape):
            shape = (shape[0] if batch is None else batch, *shape[1:])
            if self.is_float:
                return numbers.normal(size=shape).astype(self.dtype)
            return numbers.integers(0, 2, size=shape).astype(self.dtype)

        return self.map_shapes(draw)

    def call(self, layer, inputs, training):
        """Calls a layer the way Keras would in training or inference."""
        mode = {"training": training} if self.takes_training else {}
        return self.give(layer, inputs, **self.call_kwargs, **mode)

    def give(self, function, inputs, **kwargs):
        """Calls a function of the inputs, or of their shapes."""
        return function(*(inputs if self.apart else [inputs]), **kwargs)

    def path(self, variable):
        """The path of a variable, which saving and loading must keep."""
        return variable.path

    def built(self, **overrides):
        """A new layer that has been called once."""
        layer = self.make(**overrides)
        self.call(layer, self.inputs(), False)
        return layer

    def model(self, **overrides):
        """A functional model with inputs of any batch size around a new layer.

        Float inputs pass through a trainable layer that starts as the identity,
        so that the gradient with respect to the inputs is part of every
        training step.
        """
        dtype = overrides.get("dtype")

        def entry(i, shape):
            x = keras.Input(shape[1:], dtype=self.dtype, name=f"input_{i}")
            return x

        def front(x):
            if not self.is_float or len(x.shape) < 2:
                return x
            return keras.layers.Dense(
                x.shape[-1],
                kernel_initializer=keras.initializers.Identity(),
                dtype=dtype,
                name=f"front_{x.name}",
            )(x)

        inputs = self.map_shapes(entry)
        layer = self.make(name="subject", **overrides)
        fronts = keras.tree.map_structure(front, inputs)
        outputs = self.give(layer, fronts, **self.call_kwargs)
        return keras.Model(inputs, outputs)

    def batches(self, count=STEPS):
        """Training batches for the model.

        One row of targets serves all rows of outputs: these may be more in
        inference than in training, and Keras on JAX looks at both.
        """
        layer, found = self.built(), []
        for i in range(count):
            x = self.inputs(seed=i + 1)
            numbers = np.random.default_rng(i)
            y = keras.tree.map_structure(
                lambda t, numbers=numbers: numbers.normal(
                    size=(1, *t.shape[1:])
                ).astype("float32"),
                self.call(layer, x, True),
            )
            found.append((x, y))
        return found


def is_seed(variable):
    """Whether a variable is the state of a SeedGenerator."""
    return "seed_generator" in variable.path


def values_of(layer):
    """A copy of a layer's state."""
    return [v.numpy().copy() for v in layer.variables]


def assign(layer, values):
    """Puts a copied state back."""
    for variable, value in zip(layer.variables, values, strict=True):
        variable.assign(value)


def draws(layer, subject, training):
    """Whether a call advances a seed generator."""
    before = [v.numpy() for v in layer.variables if is_seed(v)]
    subject.call(layer, subject.inputs(), training)
    return differ(before, [v for v in layer.variables if is_seed(v)])


def check_build(subject):
    """Weights are made once, by `build` alone, under names of their own."""
    with Check("build") as check:
        layer = subject.make()
        subject.give(layer.build, subject.map_shapes(lambda i, s: tuple(s)))
        check.that(layer.built, "expected build to set `built`", layer.built)
        paths = [v.path for v in layer.variables]
        subject.call(layer, subject.inputs(), False)
        subject.call(layer, subject.inputs(seed=1), True)
        check.equal(
            "the weights after two calls, all made by build,",
            [v.path.split("/")[-1] for v in layer.variables],
            [path.split("/")[-1] for path in paths],
        )
        named_once(check, layer.variables, "weight paths")


def check_shape(subject):
    """Symbolic shapes and dtypes are those of real outputs."""
    with Check("shape") as check:
        layer = subject.built()
        for training in subject.modes:
            real = keras.tree.flatten(subject.call(layer, subject.inputs(), training))
            for batch in (subject.batch, None):
                symbols = subject.map_shapes(
                    lambda i, s, batch=batch: keras.KerasTensor(
                        (batch, *s[1:]), dtype=subject.dtype
                    )
                )
                symbolic = keras.tree.flatten(subject.call(layer, symbols, training))
                check.equal("the number of symbolic outputs", len(symbolic), len(real))
                for s, r in zip(symbolic, real, strict=True):
                    compare_shapes(
                        check, f"training={training}, batch {batch}", s.shape, r.shape
                    )
                    check.equal(
                        f"the symbolic dtype with training={training}",
                        s.dtype,
                        keras.backend.standardize_dtype(r.dtype),
                    )
        real = keras.tree.flatten(subject.call(layer, subject.inputs(), False))
        shapes = subject.map_shapes(lambda i, s: tuple(s))
        stated = subject.give(layer.compute_output_shape, shapes)
        stated = [stated] if len(real) == 1 and is_shape(stated) else list(stated)
        for s, r in zip(stated, real, strict=True):
            compare_shapes(check, "compute_output_shape", tuple(s), r.shape)


def compare_shapes(check, what, symbolic, real):
    """Requires equal shapes; only the batch's dimension may be unknown."""
    check.that(
        len(symbolic) == len(real)
        and all(
            s == r or (s is None and axis == 0)
            for axis, (s, r) in enumerate(zip(symbolic, real, strict=True))
        ),
        f"expected the symbolic shape ({what}) of a real output of shape {tuple(real)}",
        tuple(symbolic),
    )


def is_shape(value):
    """Whether a value is one shape rather than a structure of shapes."""
    return all(d is None or isinstance(d, int) for d in value)


def check_state(subject):
    """Equal variables and inputs give equal numbers: nothing is kept elsewhere."""
    with Check("seed") as check:
        layer = subject.built()
        before = np.random.get_state()[1:3], random.getstate()
        subject.call(layer, subject.inputs(), True)
        after = np.random.get_state()[1:3], random.getstate()
        check.that(
            np.array_equal(before[0][0], after[0][0])
            and before[0][1] == after[0][1]
            and before[1] == after[1],
            "expected random numbers only from a SeedGenerator",
            "a call that drew from numpy's or Python's global generator",
        )
    with Check("state") as check:
        for training in subject.modes:
            start = values_of(layer)
            first = subject.call(layer, subject.inputs(), training)
            end = values_of(layer)
            assign(layer, start)
            second = subject.call(layer, subject.inputs(), training)
            check.close(
                f"two outputs from equal variables and inputs (training={training})",
                second,
                first,
                1e-7,
            )
            check.close(
                f"variables after two calls that started equal (training={training})",
                values_of(layer),
                end,
                1e-7,
            )


def check_seed(subject):
    """Same seed, same numbers; another seed, others; none without a seed."""
    with Check("seed") as check:
        layer = subject.built()
        modes = [m for m in (False, True) if draws(layer, subject, m)]
        check.that(
            not modes or mentions(layer.get_config(), "seed"),
            "expected a layer that draws random numbers to take a `seed`",
            sorted(layer.get_config()),
        )
        if "seed" not in layer.get_config():
            return
        found = []
        for seed, of_all in ((11, 1), (11, 2), (12, 1)):
            keras.utils.set_random_seed(of_all)
            other = subject.built(seed=seed)
            made = [v.numpy() for v in other.variables if not is_seed(v)]
            for v, w in zip(other.variables, layer.variables, strict=True):
                if not is_seed(v):
                    v.assign(w)
            outputs = [
                subject.call(other, subject.inputs(), m) for m in (True, True, False)
            ]
            found.append((outputs, made))
        check.close(
            "outputs of two layers with the same seed and weights",
            found[1][0],
            found[0][0],
            1e-7,
        )
        check.that(
            differ(found[2][0], found[0][0]) or differ(found[2][1], found[0][1]),
            "expected another seed to give other numbers",
            "the same outputs and the same initial weights",
        )


def check_batch_sizes(subject):
    """Every batch size the maths allows works, the smallest included.

    If checks are brief, the one that the other checks have.
    """
    if brief():
        return
    with Check("batch size") as check:
        layer, smallest = subject.built(), subject.smallest
        sizes = {smallest, subject.batch, 2 * subject.batch}
        if session.get().full:
            sizes |= set(range(smallest, 3 * subject.batch, smallest))
        for batch in sorted(sizes):
            for training in subject.modes:
                outputs = subject.call(layer, subject.inputs(batch=batch), training)
                check.finite(f"outputs of a batch of {batch}", outputs)


def check_mask(subject):
    """A layer that supports masking gives a mask that fits its outputs."""
    with Check("mask") as check:
        layer = subject.built()
        if not layer.supports_masking:
            return
        inputs = subject.inputs()
        mask = keras.tree.map_structure(
            lambda x: np.ones(x.shape[:-1] if subject.is_float else x.shape, bool),
            inputs,
        )
        masks = layer.compute_mask(inputs, mask)
        outputs = keras.tree.flatten(subject.call(layer, inputs, False))
        for m, y in zip(keras.tree.flatten(masks), outputs, strict=False):
            if m is not None:
                check.equal(
                    "the output mask's shape", tuple(m.shape), y.shape[: len(m.shape)]
                )
        if "mask" in inspect.signature(subject.cls.call).parameters:
            masked = subject.give(layer, inputs, mask=mask, **subject.call_kwargs)
            check.finite("outputs with a mask", masked)


def check_save(subject):
    """Saved and loaded, cloned, or rebuilt from its config, it answers equally."""
    x = subject.inputs()

    def answers(model):
        return [model(x, training=mode) for mode in (False, True)]

    with Check("save") as check:
        model = subject.model()
        for v in model.trainable_variables:  # So that no weight has its first value.
            v.assign(v + 0.01)
        answers(model)
        file = session.get().folder / "layer.keras"
        model.save(file)
        start, expected = values_of(model), answers(model)
        loaded = keras.saving.load_model(file)
        check.equal(
            "paths of weights",
            [subject.path(v) for v in loaded.variables if not is_seed(v)],
            [subject.path(v) for v in model.variables if not is_seed(v)],
        )
        check.close("variables after loading", values_of(loaded), start, 0)
        check.close("outputs after loading", answers(loaded), expected, subject.tol)
    with Check("clone") as check:
        clone = keras.models.clone_model(model)
        assign(clone, start)
        check.close("outputs after clone_model", answers(clone), expected, subject.tol)
    with Check("config") as check:
        layer = model.get_layer("subject")
        rebuilt = subject.cls.from_config(layer.get_config())
        subject.call(rebuilt, x, False)
        assign(rebuilt, values_of(layer))
        for mode in (False, True):
            check.close(
                "outputs of the layer rebuilt from its config",
                subject.call(rebuilt, x, mode),
                subject.call(layer, x, mode),
                subject.tol,
            )


def is_trainable(subject):
    """Whether a gradient can flow: some output and some variable are floats."""
    model = subject.model()
    floats = [y for y in keras.tree.flatten(model.output) if "float" in str(y.dtype)]
    return bool(floats) and bool(model.trainable_variables)


def check_training(subject):
    """Training is as `check_steps` says, and it lowers."""
    with Check("compiled"):
        if not is_trainable(subject):
            return
        batches = subject.batches()
        start = subject.model()
        values = values_of(start)

    def make(mode):
        model = subject.model()
        assign(model, values)
        return compile_model(model, sgd(), mode)

    check_steps(make, batches, stops=(1,), tol=subject.tol)
    check_inference(subject, start)
    with Check("lowering"):
        model = make(XLA)
        model.optimizer.build(model.trainable_variables)
    check_lowering(model, batches[0])
    if session.get().full:
        check_training_mixed(subject, batches)


def check_training_mixed(subject, batches):
    """As `check_training`, under every policy of mixed precision."""
    if not subject.is_float:
        return
    for policy in POLICIES:
        with Check("mixed precision"):
            values = values_of(subject.model(dtype=policy))

        def make(mode, policy=policy, values=values):
            model = subject.model(dtype=policy)
            assign(model, values)
            scaled = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=16.0)
            return compile_model(model, scaled, mode)

        # XLA keeps more digits between operations than it is asked for.
        tol = LOW[policy.removeprefix("mixed_")]
        check_steps(make, batches, stops=(1, 2), tol=tol)


def check_inference(subject, model):
    """Outputs are the same numbers compiled and run eagerly."""
    with Check("compiled") as check:
        x, start = subject.inputs(), values_of(model)
        eager = model(x, training=False)
        assign(model, start)
        model.compile(jit_compile=True)
        check.close(
            "outputs in inference with jit_compile=True and run eagerly",
            model.predict_on_batch(x),
            eager,
            subject.tol,
        )
        if QUICK == EAGER:  # Whole steps were compared.
            return
        found = []
        for run in (lambda: [model(x, training=True)], lambda: forward(model, x, True)):
            assign(model, start)
            found.append([run(), values_of(model)])
        check.close(
            "outputs in training, and variables, with jit_compile=True and run eagerly",
            found[1],
            found[0],
            subject.tol,
        )
    check_eager(lambda: model(x, training=True))


def policies(subject):
    """The policies of mixed precision to check.

    If checks are brief, one, which the class's name decides.
    """
    if brief():
        return [POLICIES[zlib.crc32(subject.cls.__name__.encode()) % 2]]
    return POLICIES


def check_mixed_precision(subject):
    """Outputs in the compute dtype, variables in float32, a finite step.

    If checks are brief, there is no step.
    """
    if not subject.is_float:
        return
    with Check("mixed precision"):
        exact = subject.model()
        start, layer = values_of(exact), exact.get_layer("subject")
        data, modes = subject.batches(1), subject.modes
        trainable = is_trainable(subject)
        # Other dtypes, other draws: what is random has no numbers to compare.
        fixed = [mode for mode in modes if not draws(layer, subject, mode)]
        fixed_step = trainable and not draws(layer, subject, True)
        assign(exact, start)
        outputs = dict(zip(fixed, forward(exact, data[0][0], *fixed), strict=True))
        means = is_variational(layer) and at_posterior_mean(
            forward, exact, data[0][0], False
        )
        if fixed_step and not brief():
            assign(exact, start)
            train(compile_model(exact, sgd(), QUICK), data)
    for policy in policies(subject):
        with Check("mixed precision") as check:
            compute = policy.removeprefix("mixed_")
            mixed = subject.model(dtype=policy)
            for v in mixed.variables:
                if "float" in v.dtype:
                    what = f"the dtype of {v.path} under {policy}"
                    check.equal(what, v.dtype, "float32")
            assign(mixed, start)
            # A layer without autocast looks after its dtypes itself.
            allowed = [compute] if layer.autocast else [compute, "float32"]
            found = forward(mixed, data[0][0], *modes)
            for mode, received in zip(modes, found, strict=True):
                what = f"outputs under {policy} (training={mode})"
                for r, e in flat_pairs(received, exact.output):
                    check.that(
                        "float" not in str(e.dtype)
                        or keras.backend.standardize_dtype(r.dtype) in allowed,
                        f"expected the dtype of {what} to be one of {allowed}",
                        r.dtype,
                    )
                check.finite(what, received)
                if mode in outputs:
                    check.close(what, received, outputs[mode], LOW[compute])
            if means:
                what = f"outputs under {policy} at the means of the posteriors"
                found = at_posterior_mean(forward, mixed, data[0][0], False)
                check.close(what, found, means, LOW[compute])
            if not trainable or brief():
                continue
            assign(mixed, start)
            scaled = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=16.0)
            check.finite(
                f"loss under {policy}", train(compile_model(mixed, scaled, QUICK), data)
            )
            what = f"weights after a training step under {policy}"
            check.finite(what, mixed.weights)
            if fixed_step:
                check.close(what, mixed.weights, exact.weights, LOW[compute])


def flat_pairs(a, b):
    """Pairs of the leaves of two structures."""
    return zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True)


def is_variational(layer):
    """Whether a layer, or one inside of it, has posteriors."""
    return any(isinstance(x, BayesianLayer) for x in layer._flatten_layers())


def check_float64(subject):
    """Under float64 nothing falls back to float32 (TensorFlow only)."""
    if not subject.is_float or keras.backend.backend() != "tensorflow":
        return
    with Check("float64") as check:
        exact, double = subject.model(), subject.model(dtype="float64")
        layer, x = exact.get_layer("subject"), subject.inputs()
        # Normal draws of the two agree only as far as float32 resolves their tails.
        tol = 1e-1 if draws(layer, subject, False) else 1e-4
        assign(double, values_of(exact))
        if is_variational(layer):
            means = [at_posterior_mean(forward, m, x, False) for m in (double, exact)]
            what = "outputs under float64 at the means of the posteriors"
            check.close(what, *means, 1e-4)
        outputs = double(x, training=False)
        for r, e in flat_pairs(outputs, exact(x, training=False)):
            if "float" in str(e.dtype):
                check.equal(
                    "the dtype of outputs under float64",
                    keras.backend.standardize_dtype(r.dtype),
                    "float64",
                )
            check.close("outputs under float64", r, e, tol)


def leave_for_fresh_processes(subject):
    """Leaves an export and a case for the processes at the session's end."""
    with Check("export"):
        model, layer = subject.model(), subject.built()
        for v in model.trainable_variables:
            v.assign(v + 0.01)
        inputs = [
            subject.inputs(seed=i, batch=b)
            for i, b in enumerate((subject.batch, 2 * subject.batch, subject.smallest))
        ]
        random_modes = [
            kind
            for kind, mode in (("outputs", False), ("steps", True))
            if draws(layer, subject, mode)
        ]
    name = subject.cls.__name__
    record_export(name, model, inputs)
    with Check("other backend"):
        x = subject.inputs(seed=5)
        y = arrays(model(x, training=False))
        trainable = is_trainable(subject)
        compile_model(model, sgd(), QUICK)

        def steps():
            batches = subject.batches(2)
            return batches, train_quickly(model, batches)

        record_case(
            name,
            model,
            [subject.cls],
            outputs=(x, y),
            steps=steps if trainable else None,
            random=random_modes,
            tol=max(subject.tol, 1e-5),
        )
