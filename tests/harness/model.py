"""The contract of a registered model."""

import itertools

import keras
import numpy as np

from . import session
from .check import Check, arrays
from .docs import check_docstring
from .fresh import record_answer, record_case
from .training import (
    QUICK,
    XLA,
    brief,
    check_lowering,
    check_steps,
    forward,
    state,
    train,
    train_quickly,
)

# Batch statistics and ReLUs magnify rounding.
TOL = 1e-3
# Steps of a language model's examples.
TIME = 5


@session.noted
def check_model(name, **overrides):
    """Checks a registered model against every generic point of the contract.

    Args:
        name: The name it is registered by.
        overrides: Arguments that `build` gets each time. A network that is too big to
            be run in a test is checked at a smaller size (`depth=10, width=1`), and
            trained under XLA alone; its own tests have to say that it is right whole.
    """
    from kzoo.zoo import info

    check_registration(name)
    check_docstring(info(name).entry_point, "function")
    with Check("build"):
        subject = Subject(name, overrides)
    check_build(subject)
    check_save(subject)
    check_training(subject)
    check_mixed_precision(subject)
    check_export(subject)
    leave_for_other_backend(subject)


@session.noted
def check_same_model(name, other, **overrides):
    """Checks a registered model that is another one but for its size.

    What `check_model` has found of the other one then holds for it.

    Args:
        name: The name it is registered by.
        other: The other one's name.
        overrides: With which it is the other one.
    """
    from kzoo.zoo import build, info

    check_registration(name)
    check_docstring(info(name).entry_point, "function")
    with Check("build") as check:
        whole = build(name)
        check.equal("the model's name", whole.name, name)
        expected = (None, *info(name).input_shape)
        check.equal("the input's shape", whole.input_shape, expected)
        subject = Subject(name, overrides)
    check_build(subject)
    with Check("same model") as check:
        models = [subject.build(), Subject(other, {}).build()]
        layers = [m.get_config()["layers"] for m in models]
        for mine, its in itertools.zip_longest(*layers):
            check.equal("a layer", mine, its)
        check.close("the weights", *(m.weights for m in models))


class Subject:
    """A registered model and small batches to train it with."""

    def __init__(self, name, overrides):
        from kzoo.zoo import info
        from kzoo.zoo.predictive import ensemble_size, is_variational

        self.name, self.overrides = name, overrides
        self.is_regressor = info(name).task == "regression"
        self.is_translator = info(name).task == "translation"
        self.is_language_model = info(name).task == "language modelling"
        # Of one example.
        self.input_shape = tuple(overrides.get("input_shape", info(name).input_shape))
        model = self.build()
        self.predict(model)  # Or it raises.
        # Of a model of sequences, logits at each of any number of steps.
        sequences = self.is_translator or self.is_language_model
        self.outputs = model.output_shape[-1 if sequences else 1]
        self.members = ensemble_size(model)
        # Whose draws the other backend has otherwise.
        self.random = ("outputs", "steps") if is_variational(model) else ()

    def build(self, **overrides):
        """A fresh model, whose weights are always the same."""
        from kzoo.zoo import build

        keras.utils.set_random_seed(0)
        return build(self.name, **{**self.overrides, **overrides})

    def of_batch(self):
        """The shape of a batch; sequences may have any length."""
        if self.is_translator:
            return [(None, None)] * 2
        return None, *self.input_shape

    def compiled(self, mode):
        """A fresh compiled model."""
        from kzoo.zoo.losses import GaussianNegativeLogLikelihood

        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if self.is_regressor:
            loss = GaussianNegativeLogLikelihood()
        model = self.build()
        model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, **mode)
        return model

    def predict(self, model):
        """A function from inputs to the dict that the model's export answers."""
        from kzoo.zoo.models.attention_seq2seq import translator
        from kzoo.zoo.predictive import classification, language_modelling, regression

        if self.is_translator:
            return translator(model)
        if self.is_language_model:
            return language_modelling(model)
        return regression(model) if self.is_regressor else classification(model)[1]

    def inputs(self, count, seed=0):
        """Examples in the range that the data sets have."""
        from kzoo.zoo import info

        numbers = np.random.default_rng(seed)
        if self.is_translator:
            ids = numbers.integers(3, 10, (2, count, 4), "int32")  # Any length will do.
            ids[:, 0, 3:] = 0
            ids[1, :, 0] = 1
            return {"source": ids[0], "target": ids[1]}
        dataset = info(self.name).dataset
        if dataset in ("breast_cancer", "diabetes"):
            from sklearn import datasets

            scaled = {"scaled": False} if dataset == "diabetes" else {}
            data = getattr(datasets, f"load_{dataset}")(**scaled).data
            return data[numbers.integers(0, len(data), count)].astype("float32")
        shape = (count, *self.input_shape)
        if self.is_language_model:
            return numbers.integers(0, self.outputs, (count, TIME)).astype("int32")
        return numbers.integers(0, 17, shape).astype("float32")

    def batches(self, count):
        """Training batches, two rows a member."""
        found = []
        for i in range(count):
            x, numbers = self.inputs(2 * self.members, seed=i), np.random.default_rng(i)
            if self.is_translator:
                y = x["source"]
            elif self.is_regressor:
                y = numbers.normal(size=(len(x), self.outputs)).astype("float32")
            else:
                shape = x.shape if self.is_language_model else len(x)
                y = numbers.integers(0, self.outputs, shape)
            found.append((x, y))
        return found


def check_registration(name):
    """The registry says what the model is."""
    from kzoo.zoo import info, list_models

    with Check("registration") as check:
        found = info(name)
        check.that(
            name in list_models(), "expected list_models to name it", list_models()
        )
        check.equal("the registered name", found.name, name)
        check.that(
            found.description.endswith("."), "expected a sentence", found.description
        )
        check.that(
            found.paper.startswith("https://"), "expected an address", found.paper
        )


def check_build(subject):
    """It builds, by its own name or another; it refuses what it does not know."""
    with Check("build") as check:
        model = subject.build()
        check.equal("the input's shape", model.input_shape, subject.of_batch())
        check.that(
            model.inputs[0].name.isidentifier()
            and not model.inputs[0].name.startswith("keras_tensor"),
            "expected an input with a name of its own",
            model.inputs[0].name,
        )
        check.equal("the model's name", model.name, subject.name)
        again = subject.build()
        check.close("weights of two builds with one seed", again.weights, model.weights)
        other = subject.build(name="other")
        check.equal("the name, overridden", other.name, "other")
        try:
            subject.build(no_such_argument=1)
        except (TypeError, ValueError):
            return
        check.that(False, "expected an unknown argument to be refused", "a model")


def check_save(subject):
    """Saved and loaded, or cloned, it answers equally.

    If checks are brief, it is not cloned.
    """
    model, x = subject.build(), subject.inputs(3)
    start = [v.numpy() for v in model.variables]  # The states of random seeds too.
    with Check("save") as check:
        file = session.get().folder / "model.keras"
        model.save(file)
        loaded = keras.saving.load_model(file)
        expected = forward(model, x, False)[0]
        received = forward(loaded, x, False)[0]
        check.close("outputs after loading", received, expected, 1e-5)
    if QUICK == XLA:  # Or whole steps are compared.
        with Check("compiled") as check:
            what = "outputs with jit_compile=True and run eagerly"
            for variable, value in zip(model.variables, start, strict=True):
                variable.assign(value)
            check.close(what, expected, model(x, training=False), TOL)
    if brief():
        return
    with Check("clone") as check:
        clone = keras.models.clone_model(model)
        for variable, value in zip(clone.variables, start, strict=True):
            variable.assign(value)
        received = forward(clone, x, False)[0]
        check.close("outputs after clone_model", received, expected, 1e-5)


def check_training(subject):
    """Training is as `check_steps` says, and it lowers."""
    with Check("compiled"):
        data = subject.batches(2)
    check_steps(subject.compiled, data, stops=(1,), tol=TOL)
    with Check("lowering"):
        model = subject.compiled(XLA)
        model.optimizer.build(model.trainable_variables)
    check_lowering(model, data[0])


def check_mixed_precision(subject):
    """Built under a mixed policy it trains, its weights in float32.

    If checks are brief, it predicts.
    """
    policy = keras.config.dtype_policy()
    full = session.get().full
    for name in ("mixed_float16", "mixed_bfloat16") if full else ("mixed_float16",):
        with Check("mixed precision") as check:
            keras.config.set_dtype_policy(name)
            try:
                model = subject.compiled(QUICK)
            finally:
                keras.config.set_dtype_policy(policy)
            for v in model.weights:
                check.equal(f"the dtype of {v.path} under {name}", v.dtype, "float32")
            x, y = subject.batches(1)[0]
            predictions = [
                keras.ops.cast(forward(m, x, False)[0], "float32")
                for m in (model, subject.build())
            ]
            if not subject.is_regressor:
                predictions = [keras.ops.softmax(p) for p in predictions]
            check.close(f"predictions under {name}", *predictions, 0.1)
            if brief():
                continue
            check.finite(f"losses under {name}", train(model, [(x, y)]))
            check.finite(f"variables under {name}", state(model))


def check_export(subject):
    """Leaves the zoo's own export for the process at the session's end."""
    if keras.backend.backend() != "tensorflow":
        return
    from kzoo.zoo.export import export

    with Check("export"):
        folder = session.get().new("exports", subject.name)
        model = subject.build()
        base = session.get().folder / "served"
        export(model, base).rename(folder / "saved_model")
        predict, first = subject.predict(model), model.inputs[0].name
        for i, count in enumerate((1, 3)):
            x = subject.inputs(count)
            x = x[first] if subject.is_translator else x
            outputs = {k: arrays(v)[0] for k, v in predict(x).items()}
            for signature in ("serving_default", "serving_xla"):
                record_answer(folder, signature, i, {first: x}, outputs, 1e-5)


def leave_for_other_backend(subject):
    """Leaves a case for the other backend."""
    with Check("other backend"):
        model, x = subject.compiled(QUICK), subject.inputs(3)
        y = arrays(forward(model, x, False)[0])
        record_case(
            subject.name,
            model,
            [type(x) for x in (*model.layers, model.loss)],
            outputs=(x, y),
            steps=lambda: (data := subject.batches(2), train_quickly(model, data)),
            random=subject.random,
            tol=TOL,
        )
