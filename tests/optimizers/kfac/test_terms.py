import keras
import numpy as np
import pytest
from keras import ops

from harness.training import QUICK
from kzoo.optimizers import KFAC
from kzoo.optimizers.kfac.objective import Objective

L = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 3)).astype("float32")
Y = {"a": RNG.normal(size=(4, 2)), "b": RNG.normal(size=(4, 1))}
WEIGHTS = {"a": np.array([0.3, 1.0, 2.0, 0.5]), "b": np.array([1.0, 0.0, 3.0, 1.0])}


def network(form, size=1):
    """A linear network with outputs b, of a size, and a of size 2, or `"one"`, a."""
    x = keras.Input((3,))
    h = L.Dense(2, name="trunk")(x)
    outputs = {"b": L.Dense(size, name="b")(h), "a": L.Dense(2, name="a")(h)}
    if form != "dict":
        outputs = list(outputs.values())[1:] if form == "one" else [*outputs.values()]
    model = keras.Model(x, outputs)
    rng = np.random.default_rng(1)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    return model


def second_differences(model, y, sample_weight):
    """The curvature of the loss by the trunk's bias, of which it is quadratic."""
    bias, losses = model.get_layer("trunk").bias, {}
    for i, j in ((0, 0), (0, 1), (1, 1)):
        total = 0.0
        for s in (1, -1):
            for t in (1, -1):
                bias.assign(s * np.eye(2)[i] + t * np.eye(2)[j])
                logs = model.test_on_batch(X, y, sample_weight, return_dict=True)
                total += s * t * logs["loss"] / 4
        losses[i, j] = losses[j, i] = total
    bias.assign(np.zeros(2))
    return np.array([[losses[i, j] for j in range(2)] for i in range(2)])


MSE = "mean_squared_error"
TWICE = keras.losses.MeanSquaredError("sum")
# Outputs; the losses and their weights; labels; sample weights.
CASES = {
    "one loss for a list": ("list", MSE, None, list, None),
    "a list": ("list", [TWICE, MSE], [0.3, 2.0], list, list),
    "a dictionary for a list": (
        "list",
        {"a": MSE, "b": TWICE},
        {"a": 0.3, "b": 2.0},
        dict,
        None,
    ),
    "a list for a dictionary": ("dict", [MSE, TWICE], [0.3, 2.0], list, None),
    "a dictionary": (
        "dict",
        {"b": TWICE, "a": MSE},
        {"a": 0.3, "b": 2.0},
        dict,
        dict,
    ),
    "one loss for a dictionary": ("dict", MSE, None, dict, "all"),
    "an output without": ("list", [None, MSE], None, "a", None),
    "a key without": ("dict", {"a": MSE}, None, dict, None),
    "a list of one": ("one", [TWICE], [0.5], "a", "all"),
    "a name": ("one", {"a": MSE}, {"a": 0.5}, "a", None),
}


@pytest.mark.parametrize("name", CASES)
def test_each_loss_is_of_its_output_as_in_keras(name):
    form, loss, loss_weights, of_labels, of_weights = CASES[name]

    def shaped(values, kind):
        if kind is None:
            return None
        order = "ab" if form == "dict" else "ba"  # Dictionaries are sorted by keys.
        forms = {"a": values["a"], "all": values["a"], dict: values}
        return forms.get(kind, [values[key] for key in order])

    y, sample_weight = shaped(Y, of_labels), shaped(WEIGHTS, of_weights)
    model = network(form)
    optimizer = KFAC(model, fisher="exact", seed=0)
    model.compile(optimizer, loss, loss_weights=loss_weights, **QUICK)
    expected = second_differences(model, y, sample_weight)
    tensors = keras.tree.map_structure(
        lambda t: None if t is None else ops.convert_to_tensor(t, "float32"),
        (X, y, sample_weight),
    )
    optimizer.build(model.trainable_variables)
    optimizer.observe(*tensors)
    (factors,) = (f for path, f in optimizer.factors.items() if "trunk" in path)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(factors["G"], expected, atol=1e-4 * scale)
    objective = Objective(model, *tensors)
    bias = model.get_layer("trunk").bias
    units = [[ops.convert_to_tensor(row)] for row in np.eye(2, dtype="float32")]
    found = objective.curvature([bias], units)
    np.testing.assert_allclose(found, expected, atol=1e-4 * scale)


@pytest.mark.parametrize(
    "form, kind", [("list", dict), ("dict", list), ("list", list), ("list", "a")]
)
def test_labels_go_to_their_losses(form, kind):
    # Of the last layer, with the loss |y - ŷ|² / D, g = √(2/D) (ŷ - y).
    model = network(form)
    optimizer = KFAC(model, fisher="empirical", seed=0)
    model.compile(optimizer, [None, MSE] if kind == "a" else MSE, **QUICK)
    order = "ab" if form == "dict" else "ba"
    forms = {dict: Y, list: [Y[key] for key in order], "a": Y["a"]}
    model.train_on_batch(X, forms[kind])
    model = network(form)
    outputs = model(X)
    outputs = outputs if form == "dict" else dict(zip("ba", outputs, strict=True))
    for path, found in optimizer.factors.items():
        key = path.split("/")[0]
        if key in outputs:
            error = ops.convert_to_numpy(outputs[key]) - Y[key]
            expected = 2 / error.size * error.T @ error
            expected *= key == "a" or kind != "a"
            np.testing.assert_allclose(found["G"], expected, rtol=1e-4)


def test_each_output_draws_its_own_labels():
    x = np.repeat(X[:1], 20000, axis=0)
    factors = []
    for fisher in ("exact", "sampled"):
        model = network("list", 2)
        optimizer = KFAC(model, fisher=fisher, seed=0)
        model.compile(optimizer, ["mse", "mse"], loss_weights=[0.5, 3.0])
        optimizer.build(model.trainable_variables)
        optimizer.observe(ops.convert_to_tensor(x[: 20000 if factors else 1]))
        factors.append(next(iter(optimizer.factors.values()))["G"].numpy())
    exact, sampled = factors
    np.testing.assert_allclose(sampled, exact, atol=0.04 * np.abs(exact).max())


@pytest.mark.parametrize(
    "form, loss, weights, message",
    [
        ("list", {"a": MSE, "c": MSE}, None, r"names of the outputs.*\['a', 'c'\]"),
        ("dict", {"a": MSE, "c": MSE}, None, "keys of the model's outputs.*'c'"),
        ("list", [MSE, MSE], [1.0], r"weight for each loss.*loss_weights=\[1.0\]"),
        # Of these Keras itself counts the first one alone.
        ("one", [MSE, TWICE], None, "one loss for each.*2 losses for 1 outputs"),
        ("list", None, None, "compiled with a loss.*loss=None"),
    ],
)
def test_losses_that_fit_no_output_are_refused(form, loss, weights, message):
    model = network(form)
    optimizer = KFAC(model, fisher="exact")
    model.compile(optimizer, loss, loss_weights=weights)
    optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match=message):
        optimizer.observe(ops.convert_to_tensor(X))


def test_labels_of_another_number_of_outputs_are_refused():
    model = network("list")
    optimizer = KFAC(model, fisher="empirical")
    model.compile(optimizer, "mse")
    optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="labels and weights of 2.*Received: 3"):
        optimizer.observe(ops.convert_to_tensor(X), [ops.ones((4, 1))] * 3)
