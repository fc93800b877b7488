"""The temperature of logits: its equation, what it leaves alone and what it refuses."""

import keras
import numpy as np
import pytest

from harness import check_layer
from kzoo.layers import TemperatureScaling

X = np.random.default_rng(0).normal(size=(5, 3, 4)).astype("float32")


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
def test_divides(temperature):
    layer = TemperatureScaling(temperature)
    y = keras.ops.convert_to_numpy(layer(X))
    np.testing.assert_allclose(y, X.astype("float64") / temperature, rtol=1e-6)
    np.testing.assert_array_equal(y.argmax(-1), X.argmax(-1))
    assert float(layer.temperature) == pytest.approx(temperature)


def test_fit_leaves_the_temperature_and_trains_what_is_in_front():
    dense = keras.layers.Dense(3)
    model = keras.Sequential([keras.Input((4,)), dense, TemperatureScaling(2.0)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    kernel = keras.ops.convert_to_numpy(dense.kernel)
    model.fit(X[:, 0], np.ones((5, 3), "float32"), verbose=0)
    assert float(model.layers[-1].temperature) == pytest.approx(2.0)
    assert not np.allclose(keras.ops.convert_to_numpy(dense.kernel), kernel)


def test_a_set_temperature_is_saved(tmp_path):
    model = keras.Sequential([keras.Input((4,)), TemperatureScaling()])
    model.layers[-1].log_temperature.assign(np.log(5.0))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    y = loaded.predict(X[:, 0], verbose=0)
    np.testing.assert_allclose(y, X[:, 0] / 5, rtol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_float32_under_mixed_precision(policy):
    y = TemperatureScaling(0.5, dtype=policy)(np.array([[500.0625]], "float32"))
    assert keras.backend.standardize_dtype(y.dtype) == "float32"
    assert float(y[0, 0]) == pytest.approx(1000.125, rel=1e-7)


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.inf, np.nan, "hot"])
def test_what_is_no_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match="above 0. Received: temperature="):
        TemperatureScaling(temperature)


@pytest.mark.slow
def test_contract():
    check_layer(TemperatureScaling, {"temperature": 2.5}, (6, 4))
