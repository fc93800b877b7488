"""Earlier tasks stay as they are, to the bit; what a task costs; save and load."""

import keras
import numpy as np
import pytest

from kzoo.optimizers import with_fast_weights
from kzoo.zoo import Lifelong, export
from kzoo.zoo.datasets import split_classes

layers = keras.layers
APART = {"alpha_initializer": "random_normal", "gamma_initializer": "random_normal"}


def body(units=8):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(units, "tanh"),
        ],
        name="body",
    )


def examples(seed, classes=3, rows=16):
    numbers = np.random.default_rng(seed)
    x = numbers.normal(size=(rows, 6, 6, 1)).astype("float32")
    return x, numbers.integers(0, classes, rows)


def trained(model, data, steps=3, **kwargs):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.05), loss, metrics=["accuracy"], **kwargs)
    for _ in range(steps):
        model.train_on_batch(*data)
    return model


@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_earlier_tasks_answer_the_same_to_the_bit(jit_compile):
    lifelong = Lifelong(body(), **APART)
    first = lifelong.add_task("first", 3)
    start = [w.numpy() for w in first.trainable_variables]
    trained(first, examples(0), jit_compile=jit_compile)
    moved = [w.numpy() for w in first.trainable_variables]
    assert all((a != b).any() for a, b in zip(start, moved, strict=True))
    x = examples(9)[0]
    before = first.predict(x, verbose=0)

    second = lifelong.add_task("second", 2)
    names = {w.path.split("/")[-1] for w in second.trainable_variables}
    heads = {w.path for w in second.trainable_variables if "kernel" in w.path}
    assert {"alpha", "gamma", "bias"} <= names and len(heads) == 1, heads
    start = [w.numpy() for w in second.trainable_variables]
    trained(second, examples(1, 2), jit_compile=jit_compile)
    moved = [w.numpy() for w in second.trainable_variables]
    assert all((a != b).any() for a, b in zip(start, moved, strict=True))
    np.testing.assert_array_equal(first.predict(x, verbose=0), before)

    # Also if the first is trained again, with what was compiled before.
    shared = [w.numpy() for w in shared_of(lifelong)]
    of_second = second.predict(x, verbose=0)
    first.train_on_batch(*examples(0))
    assert (first.predict(x, verbose=0) != before).any()
    for one, other in zip(shared_of(lifelong), shared, strict=True):
        np.testing.assert_array_equal(one.numpy(), other)
    np.testing.assert_array_equal(second.predict(x, verbose=0), of_second)


def shared_of(lifelong):
    """The shared kernels, each once."""
    found = {}
    for model in lifelong.tasks.values():
        for layer in model._flatten_layers():
            if hasattr(layer, "shared"):
                found |= {id(w): w for w in layer.shared.weights}
    return list(found.values())


def test_all_tasks_have_one_kernel_of_each_layer():
    lifelong = Lifelong(body())
    for name in ("a", "b", "c"):
        lifelong.add_task(name, 3)
    shapes = sorted(tuple(w.shape) for w in shared_of(lifelong))
    assert shapes == [(3, 3, 1, 4), (64, 8)]
    # r and s, b, γ, β and two moving statistics; r, s and b; and the head.
    own = (1 + 4 + 4) + 4 * 4 + (64 + 8 + 8) + (8 * 3 + 3)
    shared = 9 * 4 + 64 * 8
    assert lifelong.growth() == {
        "shared": shared,
        "tasks": {"a": own, "b": own, "c": own},
        "growth": (shared + 3 * own) / (shared + own),
    }


def test_the_first_task_starts_as_the_body_does():
    plain = body()
    plain.set_weights([np.random.default_rng(0).random(w.shape) for w in plain.weights])
    head = layers.Dense(3, kernel_initializer="random_normal", use_bias=False)
    model = Lifelong(plain).add_task("one", head=head)
    x = examples(0)[0]
    expected = plain.predict(x, verbose=0) @ head.kernel.numpy()
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-4)


@pytest.mark.slow
def test_saved_and_loaded(tmp_path):
    plain = body()
    plain.set_weights([np.random.default_rng(0).random(w.shape) for w in plain.weights])
    plain.compile(loss=lambda y, p: p - y)
    lifelong = Lifelong(plain, **APART)
    for i, name in enumerate(("one", "two")):
        keras.utils.clear_session(free_memory=False)
        trained(lifelong.add_task(name, 2 + i), examples(i, 2 + i))
    lifelong.save(tmp_path / "kept")
    lifelong.save(tmp_path / "kept")  # Again, in its place.
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    loaded = Lifelong.load(tmp_path / "kept")
    assert loaded.growth() == lifelong.growth() and len(shared_of(loaded)) == 2
    x = examples(9)[0]
    for name, model in lifelong.tasks.items():
        answers = [m.predict(x, verbose=0) for m in (loaded.tasks[name], model)]
        np.testing.assert_allclose(*answers, atol=1e-6)
    # It goes on, as if it had not been stopped.
    starts = []
    for one in (lifelong, loaded):
        keras.utils.set_random_seed(1)
        starts.append(one.add_task("next", 2).get_weights())
    for one, other in zip(*starts, strict=True):
        np.testing.assert_array_equal(one, other)
    before = loaded.tasks["one"].predict(x, verbose=0)
    trained(loaded.add_task("three", 2), examples(3, 2))
    np.testing.assert_array_equal(loaded.tasks["one"].predict(x, verbose=0), before)


@pytest.mark.slow
@pytest.mark.tensorflow
def test_one_saved_model_has_each_kernel_once(tmp_path):
    lifelong = Lifelong(body(4000), **APART)
    for name in ("one", "two", "classes 0-1"):
        lifelong.add_task(name, 3)
    whole, x = lifelong.as_model(), examples(9)[0]
    path = export(whole, tmp_path, function=lambda x: whole(x, training=False))
    size = (path / "variables/variables.data-00000-of-00001").stat().st_size
    found = lifelong.growth()
    parameters = found["shared"] + sum(found["tasks"].values())
    assert 4 * parameters <= size <= 1.05 * 4 * parameters
    answers = whole.predict(x, verbose=0)
    assert list(answers) == ["one", "two", "classes_0_1"]
    for name, outputs in zip(lifelong.tasks, answers.values(), strict=True):
        expected = lifelong.tasks[name].predict(x, verbose=0)
        np.testing.assert_allclose(outputs, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.tensorflow
def test_digits_two_at_a_time():
    keras.utils.set_random_seed(0)
    plain = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Rescaling(1 / 16),
            layers.Flatten(),
            layers.Dense(64, "relu"),
            layers.Dense(64, "relu"),
        ]
    )
    lifelong, tasks = Lifelong(plain), split_classes("digits")
    accuracies = {}
    for name, splits in tasks.items():
        model = lifelong.add_task(name, 2)
        trained(model, (), steps=0)
        data = splits["train"].shuffle(2000, seed=0).batch(32)
        model.fit(data.cache(), epochs=10, verbose=0)
        past = {n: tasks[n]["validation"].batch(256) for n in lifelong.tasks}
        found = lifelong.evaluate(past, verbose=0)
        for task, logs in found.items():
            assert logs["accuracy"] == accuracies.setdefault(task, logs["accuracy"])
    assert len(accuracies) == 5 and min(accuracies.values()) > 0.9, accuracies


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_task_is_trained_again_by_an_optimizer_of_its_own(fast):
    lifelong = Lifelong(body(), **APART)
    model = lifelong.add_task("one", 2)
    adam = keras.optimizers.Adam(0.05, beta_1=0.5)
    model.compile(with_fast_weights(adam, model) if fast else adam, "mse")
    data = examples(0)[0], np.zeros((16, 2))
    model.train_on_batch(*data)
    lifelong.add_task("two", 2)
    model.train_on_batch(*data)
    for part in getattr(model.optimizer, "optimizers", [model.optimizer]):
        assert part.beta_1 == 0.5


def test_of_a_frozen_body_the_fast_weights_are_trained():
    plain = body()
    plain.get_layer("dense").trainable = False
    lifelong = Lifelong(plain)
    for name in ("one", "two"):
        model = lifelong.add_task(name, 2)
        trained = {"/".join(w.path.split("/")[-3:]) for w in model.trainable_variables}
        assert sum(n.endswith("dense/alpha") for n in trained) == 1
        assert not any(n.endswith("dense/shared/kernel") for n in trained)
        conv = [n for n in trained if n.endswith("conv2d/shared/kernel")]
        assert len(conv) == (name == "one")


def test_refusals(tmp_path):
    head = layers.Dense(2)
    head.build((None, 8))
    with pytest.raises(ValueError, match="which is built"):
        Lifelong(body()).add_task("one", head=head)
    with pytest.raises(ValueError, match="a layer. Received: head=3"):
        Lifelong(body()).add_task("one", head=3)
    wrapped = keras.Sequential(
        [
            keras.Input((3, 4)),
            layers.TimeDistributed(layers.Dense(2), name="each"),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    with pytest.raises(ValueError, match="Received: .*TimeDistributed 'each'"):
        Lifelong(wrapped).add_task("one", 2)
    (tmp_path / "mine").mkdir()
    lifelong = Lifelong(body())
    with pytest.raises(ValueError, match="Received: .*mine"):
        lifelong.save(tmp_path / "mine")
    with pytest.raises(ValueError, match="Received: none"):
        lifelong.as_model()
    lifelong.add_task("one", 2)
    lifelong.add_task("task 2", 2)
    for name in ("one", "", 1, "task-2"):
        with pytest.raises(ValueError, match="Received: name="):
            lifelong.add_task(name, 2)
    for given in ({}, {"classes": 2, "head": layers.Dense(2)}):
        with pytest.raises(ValueError, match="expected `classes` or `head`"):
            lifelong.add_task("two", **given)
    with pytest.raises(ValueError, match=r"expected tasks .*Received: \['two'\]"):
        lifelong.evaluate({"two": examples(0)})
