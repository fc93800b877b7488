"""The registry of models."""

import subprocess
import sys

import keras
import pytest

import kzoo.zoo
from kzoo.zoo import registry

FACTS = {
    "description": "A test model.",
    "dataset": "digits",
    "input_shape": [3],
    "paper": "https://arxiv.org/abs/1512.03385",
}


def tiny(units=2):
    image = keras.Input((3,), name="image")
    return keras.Model(image, keras.layers.Dense(units)(image))


@pytest.fixture
def models(monkeypatch):
    """A copy of the registry, dropped after the test."""
    registry.list_models()
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    return registry._MODELS


def test_register_list_info_build(models):
    recipe = {"epochs": 3}
    entry = registry.register_model("tiny_digits", recipe=recipe, **FACTS)(tiny)
    assert entry is tiny
    assert registry.list_models("tiny*") == ["tiny_digits"]
    assert registry.list_models("*nothing*") == []
    assert {"tiny_digits", "resnet8_digits"} <= set(registry.list_models())
    assert registry.list_models() == sorted(registry.list_models())
    assert registry.build("resnet8_digits", name="mine", width=1).name == "mine"
    found = registry.info("tiny_digits")
    assert (found.name, found.entry_point, found.task) == (
        "tiny_digits",
        tiny,
        "classification",
    )
    assert found.input_shape == (3,) and found.recipe == {"epochs": 3}
    assert found.backends == ("tensorflow", "jax")
    assert registry.build("tiny_digits").output_shape == (None, 2)
    assert registry.build("tiny_digits", units=5).output_shape == (None, 5)


def test_unknown_names_get_a_hint(models):
    for call in (registry.build, registry.info):
        with pytest.raises(ValueError, match="'resnet8_digits'.*Received: 'resnet_d"):
            call("resnet_digits")
        with pytest.raises(ValueError, match=r"one of \['attention.*Received: 'zzz'"):
            call("zzz")


def test_unknown_override_is_named(models):
    with pytest.raises(TypeError, match="widht"):
        registry.build("resnet8_digits", widht=4)


def test_a_name_is_taken_once(models):
    registry.register_model("tiny_digits", **FACTS)(tiny)
    registry.register_model("tiny_digits", **FACTS)(tiny)  # the same, run again

    def other():
        return tiny()

    with pytest.raises(ValueError, match="once.*Received.*tiny_digits.*tiny"):
        registry.register_model("tiny_digits", **FACTS)(other)
    assert models["tiny_digits"].entry_point is tiny


@pytest.mark.parametrize("name", ["", "Tiny", "tiny-digits", "../tiny", "_tiny"])
def test_malformed_names_are_refused(models, name):
    with pytest.raises(ValueError, match="lower-case.*Received"):
        registry.register_model(name, **FACTS)(tiny)


def test_zoo_offers_what_it_lists():
    for name in kzoo.zoo.__all__:
        assert getattr(kzoo.zoo, name) is not None
        assert getattr(kzoo.zoo, name) is getattr(kzoo.zoo, name)  # and the same again
    assert callable(kzoo.zoo.export) and callable(kzoo.zoo.train)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kzoo.zoo.nothing  # noqa: B018


@pytest.mark.slow
def test_listing_models_loads_nothing_heavy():
    code = (
        "import sys, kzoo.zoo; kzoo.zoo.list_models()\n"
        "heavy = {'tensorflow_datasets', 'grpc'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
