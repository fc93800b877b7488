"""Named recipes: their learning rates by hand, what they multiply, whose they are."""

import importlib
import json

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds

from kzoo.layers import AverageMembers, DenseBatchEnsemble, TileMembers
from kzoo.optimizers import Lookahead, ScaledSchedule, StepDecay
from kzoo.zoo import registry, train
from kzoo.zoo.training.recipes import RECIPES

MEMBERS = 4


def ensemble(input_shape=(8, 8, 1), name="tiny"):
    """Four members with a normalization."""
    image = keras.Input(input_shape, name="image")
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 16)(image))
    x = TileMembers(MEMBERS)(keras.layers.BatchNormalization()(x))
    x = DenseBatchEnsemble(10, ensemble_size=MEMBERS, name="logits")(x)
    return keras.Model(image, AverageMembers(MEMBERS)(x), name=name)


@pytest.mark.parametrize(
    ("name", "epochs", "rates"),
    [
        ("cifar", 200, {0: 0.1, 60: 0.02, 120: 0.004, 160: 0.0008}),
        ("cifar_batch_ensemble", 250, {0: 0.1, 100: 0.02, 200: 0.004, 225: 0.0008}),
    ],
)
def test_learning_rates_of_uncertainty_baselines(name, epochs, rates):
    recipe, steps = RECIPES[name], 390  # of 50,000 examples
    assert recipe.arguments["epochs"] == epochs
    assert recipe.arguments["batch_size"] == 128
    rate = recipe.schedule(recipe.arguments["learning_rate"], epochs, steps)
    starts = [*rates, epochs]
    for start, end in zip(starts, starts[1:], strict=False):
        for step in (max(start, 1) * steps, end * steps - 1):
            assert float(rate(step)) == pytest.approx(rates[start]), step / steps
    # The first epoch warms up.
    for step in (0, 1, 195, 389):
        assert float(rate(step)) == pytest.approx(0.1 * step / 390)


@pytest.fixture
def run(data_dir, tmp_path):
    def run(model, folder="run", **changes):
        arguments = {
            "epochs": 1,
            "batch_size": 32,
            "train_split": "train[:130]",
            "validation_split": None,
            "verbose": False,
            "data_dir": data_dir,
            **changes,
        }
        return train(model, run_dir=tmp_path / folder, **arguments)

    return run


def config(result):
    return json.loads((result.run_dir / "config.json").read_text())


@pytest.mark.tensorflow
def test_a_single_network_with_it(run):
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(10)]
    )
    result = run(model, dataset="digits", recipe="cifar")
    optimizer = model.optimizer
    assert type(optimizer) is keras.optimizers.SGD
    assert (optimizer.momentum, optimizer.nesterov) == (0.9, True)
    assert not optimizer.weight_decay
    # 4 steps in the epoch; the peak is a fourth of that for 128 examples.
    assert optimizer._learning_rate.get_config() == {
        "peak": pytest.approx(0.1 / 4),
        "boundaries": [1, 2, 3],
        "factor": 0.2,
        "warmup_steps": 4,
    }
    found = config(result)
    assert (found["max_shift"], found["flip"], found["members"]) == (2, True, "tile")
    # What is asked for is as it is asked for.
    asked = {"learning_rate": 0.3, "flip": False, "max_shift": 0}
    found = config(run(model, "asked", dataset="digits", recipe="cifar", **asked))
    assert found["max_shift"] == 0 and "flip" not in found
    assert model.optimizer._learning_rate.peak == 0.3


@pytest.mark.slow
@pytest.mark.tensorflow
def test_fast_weights_have_half_the_learning_rate(run):
    keras.utils.set_random_seed(3)
    model = ensemble()
    run(model, dataset="digits", recipe="cifar_batch_ensemble", epochs=2)
    layer = model.get_layer("logits")
    fast, other = model.optimizer.optimizers
    assert isinstance(fast._learning_rate, ScaledSchedule)
    assert isinstance(other._learning_rate, StepDecay)
    for step in range(9):
        whole = float(other._learning_rate(step))
        assert float(fast._learning_rate(step)) == pytest.approx(0.5 * whole)
    # Of two epochs of four steps.
    assert other._learning_rate.boundaries == [3, 6, 7]
    paths = [{v.path for v in o._trainable_variables} for o in (fast, other)]
    assert paths[0] == {layer.alpha.path, layer.gamma.path}
    assert paths[1] == {v.path for v in model.trainable_variables} - paths[0]
    assert {(o.momentum, o.nesterov) for o in (fast, other)} == {(0.9, True)}


class Interrupt(keras.callbacks.Callback):
    """Presses Ctrl-C in the second epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_run_goes_on(run):
    weights = []
    for folder, interruptions in (("whole", 0), ("stopped", 1)):
        for callbacks in [[Interrupt()]] * interruptions + [[]]:
            keras.utils.set_random_seed(3)
            arguments = {"epochs": 3, "recipe": "cifar_batch_ensemble"}
            arguments |= {"dataset": "digits", "callbacks": callbacks}
            try:
                weights.append(run(ensemble(), folder, **arguments).model.get_weights())
            except KeyboardInterrupt:
                assert callbacks
    whole, stopped = weights
    for a, b in zip(whole, stopped, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.fixture
def tiny_cifar10(monkeypatch):
    """A registered ensemble for CIFAR-10, which is not there: its images are noise."""
    registry.list_models()
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))

    @registry.register_model(
        "tiny_cifar10",
        description="A test model.",
        dataset="cifar10",
        input_shape=(32, 32, 3),
        paper="https://example.org",
        recipe={"recipe": "cifar_batch_ensemble", "batch_size": 16},
    )
    def tiny_cifar10(name="tiny_cifar10"):
        return ensemble((32, 32, 3), name)

    with tfds.testing.mock_data(num_examples=64):
        yield "tiny_cifar10"


@pytest.mark.slow
@pytest.mark.tensorflow
def test_is_the_default_of_a_model_that_is_registered_with_it(
    tiny_cifar10, run, monkeypatch
):
    module = importlib.import_module("kzoo.zoo.training.train")
    original, seen = module.training_batches, {}
    monkeypatch.setattr(
        module, "training_batches", lambda *a, **k: seen.update(k) or original(*a, **k)
    )
    arguments = {"train_split": "train", "validation_split": "auto"}
    arguments["batch_size"] = None
    result = run(tiny_cifar10, epochs=2, **arguments)
    # CIFAR-10 has no split to validate on.
    assert sorted(result.history) == ["accuracy", "loss", "nll"]
    assert config(result)["dataset"].startswith("cifar10/")
    assert (seen["copies"], seen["max_shift"], seen["flip"]) == (MEMBERS, 2, True)
    rate = result.model.optimizer.optimizers[1]._learning_rate
    assert (rate.peak, rate.boundaries) == (pytest.approx(0.1 * 16 / 128), [3, 6, 7])
    # Another one takes its place as a whole.
    result = run(tiny_cifar10, "default", recipe="default", **arguments)
    assert isinstance(result.model.optimizer, Lookahead)
    found = config(result)
    assert (found["members"], found["batch_size"]) == ("split", 64)
    assert found["dataset"].startswith("cifar10/") and seen["max_shift"] == 0


def test_the_zoos_models_for_cifar10_have_it():
    for name in registry.list_models("*cifar10"):
        is_ensemble = "batch_ensemble" in name
        recipe = "cifar_batch_ensemble" if is_ensemble else "cifar"
        assert registry.info(name).recipe == {"recipe": recipe}


@pytest.mark.tensorflow
def test_refusals(run, tmp_path):
    with pytest.raises(ValueError, match="'cifar'.*Received: recipe='imagenet'"):
        run(ensemble(), recipe="imagenet")
    model = registry.build("mlp_regressor")
    with pytest.raises(ValueError, match="expected images.*max_shift=2 and flip=True"):
        run(model, dataset="diabetes", recipe="cifar")
    assert not (tmp_path / "run").exists()
