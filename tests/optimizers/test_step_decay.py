"""The learning rate that warms up and falls in steps."""

import keras
import numpy as np
import pytest

from kzoo.optimizers import StepDecay


def test_by_hand():
    rate = StepDecay(0.4, boundaries=[10, 15, 15], factor=0.2, warmup_steps=4)
    expected = [0.0, 0.1, 0.2, 0.3, *[0.4] * 6, *[0.08] * 5, *[0.0032] * 3]
    found = [float(rate(step)) for step in range(18)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    without = StepDecay(0.4, [3], 0.5)
    assert [float(without(step)) for step in range(5)] == pytest.approx(
        [0.4] * 3 + [0.2] * 2
    )


def test_a_boundary_within_the_warm_up_counts():
    rate = StepDecay(1.0, [2], 0.5, warmup_steps=4)
    found = [float(rate(step)) for step in range(5)]
    assert found == [0.0, 0.25, 0.25, 0.375, 0.5]


def test_late_steps_are_told_apart():
    # Float32 has all integers up to 2^24.
    rate = StepDecay(1.0, [10_000_001], 0.5)
    assert [float(rate(10_000_000 + i)) for i in range(2)] == [1.0, 0.5]


def test_an_optimizer_follows_and_keeps_it(tmp_path):
    # Of the loss w the gradient is 1: each step is the learning rate.
    rate = StepDecay(1.0, [3], 0.1, warmup_steps=2)
    w = keras.Variable([0.0])
    optimizer = keras.optimizers.SGD(rate)
    for _ in range(5):
        optimizer.apply([keras.ops.ones(1)], [w])
    assert float(w[0]) == pytest.approx(-(0 + 0.5 + 1 + 0.1 + 0.1))
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras").optimizer._learning_rate
    assert type(again) is StepDecay and again.get_config() == rate.get_config()


@pytest.mark.parametrize(
    "change",
    [
        {"peak": 0.0},
        {"factor": -1.0},
        {"warmup_steps": -1},
        {"warmup_steps": 1.5},
        {"boundaries": [3, 1]},
        {"boundaries": [-1]},
        {"boundaries": [0.5]},
        {"boundaries": 4},
    ],
)
def test_bad_arguments_are_refused(change):
    with pytest.raises(ValueError, match=f"Received: {[*change][0]}="):
        StepDecay(**{"peak": 1.0, "boundaries": [1], "factor": 0.1, **change})
