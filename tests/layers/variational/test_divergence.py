import keras
import numpy as np
import pytest

from kzoo.layers import (
    DenseFlipout,
    DivergenceAnnealing,
    MeanFieldNormal,
    scale_divergence,
)
from kzoo.layers.variational.distributions import kl_divergence, sampled_kl_divergence
from kzoo.layers.variational.divergence import variational_layers

X, Y = np.ones((8, 3), "float32"), np.zeros((8, 1), "float32")


def model(**kwargs):
    inner = keras.Sequential([keras.Input((3,)), DenseFlipout(2, **kwargs)])
    layers = [keras.Input((3,)), inner, DenseFlipout(1, **kwargs)]
    return keras.Sequential(layers)


def test_one_call_scales_every_layer():
    plain = model()
    before = [float(loss) for loss in plain.losses]
    scale_divergence(plain, 50)
    np.testing.assert_allclose(plain.losses, np.divide(before, 50), rtol=1e-6)
    assert [layer.num_examples for layer in variational_layers(plain)] == [50, 50]
    clone = keras.models.clone_model(plain)
    scales = [layer.divergence_scale() for layer in variational_layers(clone)]
    np.testing.assert_allclose(scales, [0.02, 0.02])


@pytest.mark.parametrize(
    "schedule, expected",
    [(4, [0.25, 0.5, 0.75, 1, 1]), (lambda t: 2.0**-t, [1, 0.5, 0.25, 0.125, 0.0625])],
)
def test_beta_of_every_epoch_reaches_the_loss(schedule, expected):
    trained = model(num_examples=8)
    trained.compile(keras.optimizers.SGD(0.0), "mse", metrics=["mse"])
    parts = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs):
            parts.append(logs["loss"] - logs["mse"])

    full = float(sum(trained.losses))
    callbacks = [DivergenceAnnealing(schedule), Watch()]
    trained.fit(X, Y, epochs=5, callbacks=callbacks, verbose=0)
    np.testing.assert_allclose(parts, np.multiply(expected, full), rtol=1e-3)


def test_beta_reaches_a_model_that_is_built_by_fit():
    trained = keras.Sequential([DenseFlipout(1, num_examples=8)])
    trained.compile(keras.optimizers.SGD(0.0), "mse", metrics=["mse"])
    logs = trained.fit(X, Y, callbacks=[DivergenceAnnealing(4)], verbose=0).history
    full = float(trained.layers[0].kernel.divergence()) / 8
    part = logs["loss"][0] - logs["mse"][0]
    np.testing.assert_allclose(part, full / 4, rtol=1e-3)


@pytest.mark.parametrize("number", [0, -1, float("nan")])
def test_refuses_numbers(number):
    with pytest.raises(ValueError, match="num_examples"):
        scale_divergence(model(), number)


def test_refuses_models_without_variational_layers():
    with pytest.raises(ValueError, match="expected a model with layers"):
        scale_divergence(keras.Sequential([keras.Input((3,))]), 5)


def test_another_number_of_examples_reaches_a_compiled_step():
    trained = model(num_examples=8)
    trained.compile(keras.optimizers.SGD(0.0), "mse", metrics=["mse"])
    full = 8 * float(sum(trained.losses))
    for number in (8, 4):
        scale_divergence(trained, number)
        logs = trained.fit(X, Y, verbose=0).history
        part = logs["loss"][0] - logs["mse"][0]
        np.testing.assert_allclose(part, full / number, rtol=1e-3)


@pytest.mark.parametrize("accumulated", [None, 4])
def test_accumulated_steps_have_the_divergence_once(accumulated):
    """The mean of four gradients, each of a fourth of the rows, is that of all."""
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    layer = DenseFlipout(
        1,
        # Of so small a scale that what is drawn makes no difference.
        kernel_posterior_fn=MeanFieldNormal(
            untransformed_scale_initializer=keras.initializers.Constant(-16.0)
        ),
        bias_posterior_fn=None,
        num_examples=8,
        seed=0,
    )
    trained = keras.Sequential([keras.Input((3,)), layer])
    loc = np.array([[0.5], [-1.0], [2.0]])
    layer.variables[0].assign(loc)
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulated)
    trained.compile(optimizer, "mse")
    trained.fit(x, x[:, :1], 8 // (accumulated or 1), shuffle=False, verbose=0)
    # KL is loc² / 2 and more that does not depend on loc.
    gradient = 2 * x.T @ (x @ loc - x[:, :1]) / 8 + loc / 8
    found = keras.ops.convert_to_numpy(layer.kernel_posterior.mean())
    np.testing.assert_allclose(found, loc - 0.1 * gradient, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "jit_compile", [True, pytest.param(False, marks=pytest.mark.tensorflow)]
)
def test_a_sampled_divergence_in_training_is_unbiased(jit_compile):
    layer = DenseFlipout(
        20, kernel_divergence_fn=sampled_kl_divergence, num_examples=8, seed=0
    )
    trained = keras.Sequential([keras.Input((30,)), layer])
    analytic = float(
        kl_divergence(layer.kernel_posterior, layer.kernel_prior, None) / 8
    )
    trained.compile(
        keras.optimizers.SGD(0.0), "mse", metrics=["mse"], jit_compile=jit_compile
    )
    x, y = np.ones((200, 30), "float32"), np.zeros((200, 20), "float32")
    parts = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs):
            parts.append(logs["loss"] - logs["mse"])

    trained.fit(x, y, 5, epochs=4, callbacks=[Watch()], verbose=0)
    # The estimate's standard deviation is that of 600 terms (1 - z²) / 2: 17.3 / 8, and
    # that of the mean of 40 steps 0.34.
    np.testing.assert_allclose(parts, analytic, atol=5 * 0.34)
    assert len(set(parts)) == 4


@pytest.mark.parametrize("beta", [-0.5, float("nan"), float("inf"), None])
def test_refuses_parts_of_the_divergence(beta):
    trained = model()
    trained.compile("sgd", "mse")
    with pytest.raises(ValueError, match=f"Received: {beta} for epoch 0"):
        trained.fit(X, Y, callbacks=[DivergenceAnnealing(lambda t: beta)], verbose=0)


@pytest.mark.parametrize("schedule", [0, -1, 2.5, "4"])
def test_refuses_schedules(schedule):
    with pytest.raises(ValueError, match="Received: schedule="):
        DivergenceAnnealing(schedule)
