import itertools

import keras
import numpy as np
import pytest
from keras import ops

from harness import check_cell, check_layer
from kzoo.layers import (
    GRUCellFlipout,
    GRUCellReparameterization,
    GRUFlipout,
    GRUReparameterization,
    LSTMCellFlipout,
    LSTMCellReparameterization,
    LSTMFlipout,
    LSTMReparameterization,
    MeanFieldNormal,
    NormalPrior,
    PosteriorMean,
    PosteriorSamples,
    SimpleRNNCellFlipout,
    SimpleRNNCellReparameterization,
    SimpleRNNFlipout,
    SimpleRNNReparameterization,
)
from kzoo.layers.ops.random import nth_seed, random_sign, seed_pair
from kzoo.layers.recurrent import _HELD
from kzoo.layers.variational.mode import at_posterior_samples

GATED = {"recurrent_activation": "hard_sigmoid"}
CONTRACT = {
    SimpleRNNFlipout: {"go_backwards": True},
    GRUFlipout: {**GATED, "reset_after": False, "return_sequences": True},
    LSTMFlipout: {**GATED, "dropout": 0.25, "recurrent_dropout": 0.5},
    SimpleRNNReparameterization: {"return_sequences": True},
    GRUReparameterization: {**GATED, "zero_output_for_mask": True},
    LSTMReparameterization: {**GATED, "return_state": True, "unit_forget_bias": False},
}
CELLS = {
    SimpleRNNCellFlipout: SimpleRNNFlipout,
    GRUCellFlipout: GRUFlipout,
    LSTMCellFlipout: LSTMFlipout,
    SimpleRNNCellReparameterization: SimpleRNNReparameterization,
    GRUCellReparameterization: GRUReparameterization,
    LSTMCellReparameterization: LSTMReparameterization,
}
PLAIN = {
    "simple": (SimpleRNNFlipout, keras.layers.SimpleRNN, {}),
    "gru": (GRUFlipout, keras.layers.GRU, {}),
    "gru_before": (GRUFlipout, keras.layers.GRU, {"reset_after": False}),
    "lstm": (LSTMFlipout, keras.layers.LSTM, {}),
}
KINDS = pytest.mark.parametrize("kind", PLAIN)
POINT = MeanFieldNormal(is_singular=True)
POINTS = {"kernel_posterior_fn": POINT, "recurrent_kernel_posterior_fn": POINT}
TENSORFLOW = keras.backend.backend() == "tensorflow"
DTYPE = "float64" if TENSORFLOW else "float32"
CLOSE = {"rtol": 1e-9, "atol": 1e-9} if TENSORFLOW else {"rtol": 1e-4, "atol": 1e-5}
B, T, IN, H = 4, 3, 2, 3
rng = np.random.default_rng(0)
X = rng.normal(size=(B, T, IN)).astype(DTYPE)
MASK = np.array([[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]], bool)


def pytest_generate_tests(metafunc):
    if metafunc.function is test_contract:
        cases = zip(CONTRACT, [True, True, False, False, True, False], strict=True)
        if metafunc.config.option.all:
            cases = itertools.product(CONTRACT, [True, False])
        metafunc.parametrize("layer, unroll", cases)


def numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def made(layer, **kwargs):
    """A built layer with random means and scales, always the same."""
    rng = np.random.default_rng(1)
    layer = layer(H, **{"seed": 3, "dtype": DTYPE, **kwargs})
    layer.build((B, T, IN))
    layer.set_weights(
        [
            rng.normal(size=w.shape) - ("untransformed" in w.path)
            if len(w.shape)
            else ops.convert_to_numpy(w)
            for w in layer.weights
        ]
    )
    return layer


def again(layer, function):
    """What a function gives from the state of the layer's seed, which then is back."""
    cell = getattr(layer, "cell", layer)
    state = ops.convert_to_numpy(cell.seed_generator.state)
    result = function()
    cell.seed_generator.state.assign(state)
    return result


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def run(kind, x, kernel, recurrent, bias):
    """The states h of one row after each step, written out."""
    h, c, states = np.zeros(H), np.zeros(H), []
    for x_t in x:
        if kind == "simple":
            h = np.tanh(x_t @ kernel + bias + h @ recurrent)
        elif kind == "lstm":
            i, f, g, o = np.split(x_t @ kernel + bias + h @ recurrent, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            b, own = (bias, 0 * bias) if kind == "gru_before" else bias
            x_z, x_r, x_h = np.split(x_t @ kernel + b, 3)
            u_z, u_r, u_h = np.split(h @ recurrent + own, 3)
            z, r = sigmoid(x_z + u_z), sigmoid(x_r + u_r)
            reset = (r * h) @ recurrent[:, 2 * H :] if kind == "gru_before" else r * u_h
            h = z * h + (1 - z) * np.tanh(x_h + reset)
        states.append(h)
    return np.array(states)


@pytest.mark.slow
def test_contract(layer, unroll):
    kwargs = {
        "units": 2,
        "activation": "softsign",
        "bias_posterior_fn": MeanFieldNormal(),
        "bias_prior_fn": NormalPrior(0.1, 2.0),
        "recurrent_kernel_prior_fn": NormalPrior(0.0, 0.5),
        "num_examples": 50,
        "seed": 7,
        "unroll": unroll,
        **CONTRACT[layer],
    }
    check_layer(layer, kwargs, (4, 2, 2))


def drawn_kernels(layer):
    """W and U of each row, and b, from the state of the layer's seed, in order."""
    cell, kernels = layer.cell, []
    for q in (cell.kernel_posterior, cell.recurrent_kernel_posterior):
        mean, delta = numpy(q.mean()), numpy(q.perturbation(cell.seed_generator))
        # The signs of both are one draw.
        signs = numpy(random_sign((B * sum(mean.shape),), cell.seed_generator, DTYPE))
        s, r = np.split(signs, [B * mean.shape[0]])
        s, r = s.reshape(B, -1), r.reshape(B, -1)
        kernels.append(mean + delta * s[:, :, None] * r[:, None, :])
    return *kernels, numpy(cell.bias_posterior.sample(cell.seed_generator))


@KINDS
def test_each_row_has_the_kernels_of_its_signs_at_all_steps(kind):
    flipout, _, kwargs = PLAIN[kind]
    normal = MeanFieldNormal()
    kwargs = {**kwargs, "return_sequences": True, "unroll": kind != "lstm"}
    layer = made(flipout, bias_posterior_fn=normal, **kwargs)
    y = again(layer, lambda: numpy(layer(X)))
    kernel, recurrent, bias = drawn_kernels(layer)
    assert not np.allclose(kernel[0], kernel[1])
    for n in range(B):
        own = run(kind, X[n], kernel[n], recurrent[n], bias)
        np.testing.assert_allclose(y[n], own, **CLOSE)


@KINDS
@pytest.mark.parametrize(
    "loop",
    [
        {"return_sequences": True, "return_state": True},
        {"go_backwards": True, "unroll": True, "zero_output_for_mask": True},
        {"stateful": True, "use_bias": False},
    ],
    ids=lambda loop: next(iter(loop)),
)
def test_points_are_the_plain_layer(kind, loop):
    flipout, plain, kwargs = PLAIN[kind]
    loop, kwargs = dict(loop), {**kwargs, "dtype": DTYPE}
    bias = {} if loop.pop("use_bias", True) else {"bias_posterior_fn": None}
    ours = made(flipout, **POINTS, **loop, **bias, **kwargs)
    theirs = plain(H, use_bias=not bias, **loop, **kwargs)
    if plain is not keras.layers.SimpleRNN:
        theirs.use_cudnn = False
    theirs.build((B, T, IN))
    theirs.set_weights([w for w in ours.get_weights() if w.ndim])
    states = [rng.normal(size=(B, H)).astype(DTYPE)] * (1 + (kind == "lstm"))
    call = {"mask": MASK if TENSORFLOW else ops.convert_to_tensor(MASK)}
    if "return_state" in loop:
        call["initial_state"] = states
    for _ in range(1 + ("stateful" in loop)):
        for one, other in zip(
            keras.tree.flatten(ours(X, **call)),
            keras.tree.flatten(theirs(X, **call)),
            strict=True,
        ):
            np.testing.assert_allclose(numpy(one), numpy(other), **CLOSE)


@KINDS
def test_a_bare_cell_in_keras_rnn_is_the_layer(kind):
    flipout, _, kwargs = PLAIN[kind]
    layer = made(flipout, return_sequences=True, **kwargs)
    cell = type(layer.cell).from_config(layer.cell.get_config())
    around = keras.layers.RNN(cell, return_sequences=True, unroll=True, dtype=DTYPE)
    around.build((B, T, IN))
    around.set_weights(layer.get_weights())
    # A loop and a loop that is written out, of all rows and of the first steps of some.
    mask = ops.convert_to_tensor(np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]]))
    expected = again(layer, lambda: numpy(layer(X, mask=mask)))
    np.testing.assert_allclose(
        again(around, lambda: numpy(around(X))[:2]), expected[:2], **CLOSE
    )
    np.testing.assert_allclose(numpy(around(X, mask=mask)), expected, **CLOSE)
    # Masked steps keep the state.
    np.testing.assert_array_equal(expected[3], expected[3, :1].repeat(T, 0))


def is_held(y):
    """Whether outputs are equal at all steps, but not in all rows."""
    y = numpy(y)
    same = np.allclose(y, y[:, :1], rtol=1e-5)
    return same and len(np.unique(y[:, 0].round(5), axis=0)) > 1


def linear(layer, **kwargs):
    """A layer whose outputs depend on the inputs of the step alone, x W."""
    kwargs = {
        "recurrent_kernel_posterior_fn": ZERO,
        "bias_posterior_fn": None,
        **kwargs,
    }
    return layer(H, None, seed=3, dtype=DTYPE, **kwargs)


ZERO = MeanFieldNormal(is_singular=True, loc_initializer="zeros")
ONES = np.ones((B, T, IN), DTYPE)


@pytest.mark.parametrize("unroll", [False, True])
def test_draws_are_held_over_a_sequence_and_new_in_the_next(unroll):
    loop = {"return_sequences": True, "unroll": unroll}
    cells = [linear(SimpleRNNCellFlipout) for _ in range(2)]
    for layer in (
        linear(SimpleRNNFlipout, **loop),
        linear(SimpleRNNFlipout, **loop, stateful=True),
        keras.layers.RNN(cells[0], **loop),
        keras.layers.RNN(cells, **loop),
    ):
        first, second = layer(ONES), layer(ONES)
        assert is_held(first) and is_held(second)
        assert not np.isclose(numpy(first), numpy(second)).any()
        assert not _HELD.sequences


def test_a_draw_at_each_step_would_not_be_held(monkeypatch):
    call = SimpleRNNCellFlipout.call

    def redraw(self, inputs, *args, **kwargs):
        self.get_dropout_mask(inputs)
        return call(self, inputs, *args, **kwargs)

    monkeypatch.setattr(SimpleRNNCellFlipout, "call", redraw)
    cell = linear(SimpleRNNCellFlipout)
    layer = keras.layers.RNN(cell, return_sequences=True, unroll=True)
    assert not is_held(layer(ONES))


def test_compiled_draws_are_held_and_new_in_each_batch():
    layer = linear(SimpleRNNFlipout, return_sequences=True)
    model = keras.Sequential([keras.Input((T, IN), dtype=DTYPE), layer])
    y = model.predict(np.tile(ONES, (2, 1, 1)), batch_size=B, verbose=0)
    assert is_held(y[:B]) and is_held(y[B:]) and not np.isclose(y[:B], y[B:]).any()


def test_both_layers_of_bidirectional_draw_for_themselves():
    layer = keras.layers.Bidirectional(
        linear(SimpleRNNFlipout, return_sequences=True, unroll=True), merge_mode=None
    )
    layer.build(X.shape)
    layer.backward_layer.set_weights(layer.forward_layer.get_weights())
    one, other = layer(ONES)
    assert is_held(one) and is_held(other)
    assert not np.isclose(numpy(one), numpy(other)).any()


def test_what_raises_leaves_nothing_behind():
    fail = [True]

    def activation(x):
        if fail[0]:
            raise RuntimeError("stop")
        return x

    layer = SimpleRNNFlipout(H, activation, seed=1, unroll=True)
    model = keras.Sequential([keras.Input((T, IN)), layer])
    bare = keras.layers.RNN(SimpleRNNCellFlipout(H, activation, seed=1), unroll=True)
    others = keras.Sequential([keras.Input((T, IN)), bare])
    for one in (model, others):
        one.compile("sgd", "mse", jit_compile=False)
        fail[0] = True
        with pytest.raises(RuntimeError, match="stop"):  # In the middle of a trace.
            one.fit(X, X[:, 0, :1], verbose=0)
        assert layer.cell not in _HELD.sequences
        fail[0] = False
        assert np.isfinite(numpy(one(X))).all()
        assert not _HELD.sequences
        one.fit(X, X[:, 0, :1], verbose=0)


def test_dropped_units_are_the_same_at_all_steps_and_in_all_gates():
    identity = MeanFieldNormal(is_singular=True, loc_initializer="identity")
    layer = SimpleRNNFlipout(
        64,
        None,
        kernel_posterior_fn=identity,
        recurrent_kernel_posterior_fn=ZERO,
        bias_posterior_fn=None,
        dropout=0.25,
        return_sequences=True,
        unroll=True,
        seed=0,
    )
    x = np.ones((8, T, 64), "float32")
    y = numpy(layer(x, training=True))
    np.testing.assert_allclose(y, y[:, :1].repeat(T, 1))
    np.testing.assert_allclose(np.unique(y), [0, 4 / 3], rtol=1e-6)
    assert 0.15 < (y == 0).mean() < 0.35 and len(np.unique(y[:, 0], axis=0)) == 8
    np.testing.assert_array_equal(numpy(layer(x)), x)
    # Of the state, whose first steps are h_1 = x, h_2 = x + m ∘ h_1.
    options = {
        "kernel_posterior_fn": identity,
        "recurrent_kernel_posterior_fn": identity,
    }
    options |= {"bias_posterior_fn": None, "unroll": True}
    layer = SimpleRNNFlipout(64, None, **options, recurrent_dropout=0.5, seed=0)
    y = numpy(layer(x, training=True))
    np.testing.assert_allclose(np.unique(y), [1, 1 + 2 + 4], rtol=1e-6)


@pytest.mark.slow
def test_rows_are_uncorrelated_and_each_varies_as_an_independent_draw():
    """Of two linear steps, h_2 = x_2 W + (x_1 W) U, which is odd in each perturbation.

    (What is even in one, such as U², also has a part in common: the magnitudes.)
    """
    calls, rows, (one, two) = 1200, 8, X[0, :2]
    x = np.tile(X[:1, :2], (calls * rows, 1, 1))

    def predictions(layer):
        model = keras.Sequential([keras.Input((2, IN), dtype=DTYPE), layer])
        return model.predict(x, batch_size=rows, verbose=0).reshape(calls, rows, H)

    layer = made(SimpleRNNFlipout, activation=None, bias_posterior_fn=None)
    drawn, kernels = np.random.default_rng(1), []
    for q in (layer.kernel_posterior, layer.recurrent_kernel_posterior):
        noise = drawn.normal(size=(20_000, *q.shape))
        kernels.append(numpy(q.mean()) + numpy(q.stddev()) * noise)
    kernel, recurrent = kernels
    expected = two @ kernel + np.einsum("ku,kuv->kv", one @ kernel, recurrent)
    found = predictions(layer)
    error = expected.std(0) / np.sqrt(calls)
    assert (np.abs(found.mean((0, 1)) - expected.mean(0)) < 5 * error).all()
    np.testing.assert_allclose(found.std((0, 1)), expected.std(0), rtol=0.08)
    centred = found - found.mean((0, 1))
    covariance = np.einsum("cnu,cmu->nmu", centred, centred) / calls
    apart = ~np.eye(rows, dtype=bool)
    correlation = (covariance / centred.var((0, 1)))[apart]
    # Products of rows have tails that are longer than a normal distribution's.
    assert np.abs(correlation).max() < 8 / np.sqrt(calls)
    assert np.abs(correlation.mean()) < 2 / np.sqrt(calls)
    # Under reparameterization all rows are one.
    shared = predictions(SimpleRNNReparameterization(H, seed=1, dtype=DTYPE))
    np.testing.assert_allclose(shared, shared[:, :1].repeat(rows, 1), rtol=1e-5)


def test_the_mean_gradient_is_that_of_reparameterization():
    """By steps of SGD from the same weights."""
    means, errors = [], []
    for kind in (GRUFlipout, GRUReparameterization):
        layer = made(kind, kernel_prior_fn=None, recurrent_kernel_prior_fn=None)
        model = keras.Sequential([keras.Input((T, IN), dtype=DTYPE), layer])
        model.compile(keras.optimizers.SGD(1.0), "mse")
        start = [ops.convert_to_numpy(w) for w in model.trainable_weights]
        x, y = np.tile(X[:2], (8, 1, 1)), np.ones((16, H))
        steps = []
        for _ in range(150):
            for w, value in zip(model.trainable_weights, start, strict=True):
                w.assign(value)
            model.train_on_batch(x, y)
            step = [
                a - numpy(w)
                for a, w in zip(start, model.trainable_weights, strict=True)
            ]
            steps.append(np.concatenate([np.ravel(s) for s in step]))
        means.append(np.mean(steps, 0))
        errors.append(np.std(steps, 0) / np.sqrt(len(steps)))
    error = np.hypot(*errors)
    assert (np.abs(means[0] - means[1]) < 5 * error + 1e-6).all()
    # And flipout's varies less.
    assert errors[0].sum() < 0.8 * errors[1].sum()


def test_the_divergence_counts_once_for_each_of_three_weights():
    layer = made(
        LSTMFlipout,
        kernel_prior_fn=NormalPrior(0.5, 2.0),
        bias_posterior_fn=MeanFieldNormal(),
        bias_prior_fn=NormalPrior(0.0, 3.0),
        num_examples=10,
    )
    posteriors = (
        layer.kernel_posterior,
        layer.recurrent_kernel_posterior,
        layer.bias_posterior,
    )
    kl = 0
    for q, (loc, scale) in zip(posteriors, ((0.5, 2), (0, 1), (0, 3)), strict=True):
        mean, std = numpy(q.mean()), numpy(q.stddev())
        term = np.log(scale / std) + (std**2 + (mean - loc) ** 2) / (2 * scale**2) - 0.5
        kl += term.sum()
    np.testing.assert_allclose(numpy(sum(layer.losses)), kl / 10, rtol=1e-5)
    layer.set_divergence_weight(0.5)
    np.testing.assert_allclose(numpy(sum(layer.losses)), kl / 20, rtol=1e-5)


def test_the_mean_of_the_posteriors():
    layer = made(LSTMFlipout, bias_posterior_fn=MeanFieldNormal())
    model = keras.Sequential([keras.Input((T, IN), dtype=DTYPE), layer])
    y = numpy(PosteriorMean(model, dtype=DTYPE)(X))
    cell = layer.cell
    weights = [
        numpy(q.mean())
        for q in (
            cell.kernel_posterior,
            cell.recurrent_kernel_posterior,
            cell.bias_posterior,
        )
    ]
    for n in range(B):
        np.testing.assert_allclose(y[n], run("lstm", X[n], *weights)[-1], **CLOSE)


@pytest.mark.parametrize("kind", ["gru", "gru_before", "lstm"])
def test_samples_of_the_posteriors_are_one_function_each(kind):
    flipout, _, kwargs = PLAIN[kind]
    kwargs = {**kwargs, "unroll": kind != "lstm"}
    layer = made(flipout, bias_posterior_fn=MeanFieldNormal(), **kwargs)
    model = keras.Sequential([keras.Input((T, IN), dtype=DTYPE), layer])
    y = numpy(PosteriorSamples(model, 5, seed=1, dtype=DTYPE)(X))
    cell = layer.cell
    weights = [
        numpy(q.sample(nth_seed(seed_pair(1), i), 5))
        for i, q in enumerate(
            (
                cell.kernel_posterior,
                cell.recurrent_kernel_posterior,
                cell.bias_posterior,
            )
        )
    ]
    for n, k in itertools.product(range(B), range(5)):
        own = run(kind, X[n], *(w[k] for w in weights))[-1]
        np.testing.assert_allclose(y[n, k], own, **CLOSE)


@pytest.mark.tensorflow
def test_the_number_of_samples_may_be_an_input():
    import tensorflow as tf

    layer = made(GRUFlipout, bias_posterior_fn=MeanFieldNormal())
    model = keras.Sequential([keras.Input((T, IN), dtype=DTYPE), layer])

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, T, IN), DTYPE),
            tf.TensorSpec((), "int32"),
        ]
    )
    def sampling(x, samples):
        return at_posterior_samples(model, x, samples, 1)

    for k in (1, 5):
        expected = numpy(PosteriorSamples(model, k, seed=1, dtype=DTYPE)(X))
        np.testing.assert_allclose(numpy(sampling(X, k)), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_contract_of_cells(cell):
    of_loop = (
        "zero_output_for_mask",
        "return_state",
        "return_sequences",
        "go_backwards",
    )
    kwargs = {n: v for n, v in CONTRACT[CELLS[cell]].items() if n not in of_loop}
    kwargs |= {"units": 2, "activation": "softsign", "num_examples": 9, "seed": 7}
    check_cell(cell, kwargs, (4, 2, 2))


def test_a_stack_of_cells_is_saved_with_its_seeds(tmp_path):
    cells = [GRUCellFlipout(3, seed=1), LSTMCellReparameterization(2, seed=2)]
    model = keras.Sequential(
        [keras.Input((T, IN)), keras.layers.RNN(cells, unroll=True)]
    )
    model(X)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for _ in range(2):
        np.testing.assert_allclose(numpy(loaded(X)), numpy(model(X)), 1e-6, 1e-6)


def test_the_forget_gates_bias_starts_at_one():
    zeros = MeanFieldNormal(is_singular=True, loc_initializer="zeros")
    for forget in (True, False):
        layer = LSTMFlipout(2, bias_posterior_fn=zeros, unit_forget_bias=forget)
        layer.build((None, T, IN))
        expected = [0, 0, forget, forget, 0, 0, 0, 0]
        np.testing.assert_array_equal(numpy(layer.bias_posterior.mean()), expected)


@pytest.mark.tensorflow
def test_takes_the_functions_of_tfp():
    import tensorflow_probability as tfp

    normal = tfp.layers.default_mean_field_normal_fn
    options = {"kernel_posterior_fn": normal(), "bias_posterior_fn": normal(True)}
    layer = LSTMFlipout(2, **options)
    assert layer(X).shape == (B, 2)
    bias = numpy(layer.bias_posterior.mean())
    np.testing.assert_allclose(bias, [0, 0, 1, 1, 0, 0, 0, 0], atol=0.6)

    def skewed(dtype, shape, name, trainable, add_variable):
        loc = add_variable(name=name, shape=shape, dtype=dtype, initializer="zeros")
        return tfp.distributions.Gumbel(loc, 1.0)

    kwargs = {"recurrent_kernel_posterior_fn": skewed}
    assert LSTMReparameterization(2, **kwargs)(X).shape == (B, 2)
    with pytest.raises(ValueError, match="symmetric about its mean.*Gumbel"):
        LSTMFlipout(2, **kwargs)(X)


def test_a_stateful_layer_has_no_samples():
    layer = GRUFlipout(H, stateful=True)
    model = keras.Sequential([keras.Input(batch_shape=X.shape), layer])
    with pytest.raises(ValueError, match="Received batch size: 12"):
        PosteriorSamples(model, 3)(X)


def test_a_cell_refuses_to_draw_at_each_step():
    cell = GRUCellFlipout(H)
    cell.build((B, IN))
    with pytest.raises(ValueError, match="once a sequence.*Received: a call of"):
        cell(X[:, 0], [np.zeros((B, H), DTYPE)])

    class Around:
        state_size = output_size = H
        compute_dtype = DTYPE

        def call(self, inputs, states):
            return cell(inputs, states)

        __call__ = call

    with pytest.raises(ValueError, match="once a sequence.*Received: a call of"):
        keras.layers.RNN(Around(), unroll=True)(X)


@pytest.mark.parametrize(
    "layer, kwargs, message",
    [
        (LSTMFlipout, {"units": 0}, "units=0"),
        (LSTMFlipout, {"dropout": 1.0}, "dropout=1.0"),
        (LSTMFlipout, {"recurrent_dropout": -0.1}, "recurrent_dropout=-0.1"),
        (LSTMFlipout, {"recurrent_kernel_posterior_fn": None}, "l_posterior_fn=None"),
        (LSTMFlipout, {"recurrent_kernel_prior_fn": 1.0}, "l_prior_fn=1.0"),
        (LSTMCellFlipout, {"activity_regularizer": "l2"}, "activity_regularizer=<"),
    ],
)
def test_refuses(layer, kwargs, message):
    with pytest.raises(ValueError, match=message):
        layer(**{"units": 3, **kwargs}).build((None, T, IN))


def test_predictions_by_the_posteriors_draw_no_dropout():
    layer = LSTMFlipout(2, dropout=0.5, recurrent_dropout=0.5, seed=1)
    model = keras.Sequential([keras.Input((T, IN)), layer])
    state = numpy(layer.cell.seed_generator.state)
    for predictor in (PosteriorMean(model), PosteriorSamples(model, 2, seed=0)):
        predictor.predict(X, verbose=0)
        np.testing.assert_array_equal(numpy(layer.cell.seed_generator.state), state)


@pytest.mark.tensorflow
def test_a_bias_whose_function_names_no_initializer():
    import tensorflow as tf
    import tensorflow_probability as tfp

    def point(dtype, shape, name, trainable, add_variable_fn):
        loc = add_variable_fn(name=f"{name}_loc", shape=shape, dtype=dtype)
        loc = tfp.util.DeferredTensor(loc, tf.identity)
        return tfp.distributions.Independent(tfp.distributions.Deterministic(loc), 1)

    layer = LSTMFlipout(2, bias_posterior_fn=point, seed=1)
    layer.build((B, T, IN))
    bias = numpy(layer.bias_posterior.mean()).reshape(4, 2)
    assert (abs(bias[1] - 1) < 1).all() and (abs(bias[[0, 2, 3]]) < 1).all()


@pytest.mark.slow
def test_a_cell_compiles_behind_a_trained_layer():
    losses = []
    for jit in (False, True):
        keras.utils.set_random_seed(0)
        first = keras.layers.GRU(3, return_sequences=True)
        cells = [LSTMCellFlipout(2, dropout=0.1, seed=1), GRUCellFlipout(2, seed=2)]
        model = keras.Sequential([keras.Input((T, IN)), first, keras.layers.RNN(cells)])
        model.compile("sgd", "mse", jit_compile=jit)
        losses.append([model.train_on_batch(X, np.ones((B, 2))) for _ in range(2)])
    np.testing.assert_allclose(*losses, rtol=1e-5)
