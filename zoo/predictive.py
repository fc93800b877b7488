"""From a classifier or regressor to its predictions and their uncertainty."""

from functools import partial

import keras
from keras import ops

from ..layers import AverageMembers, MeanAndVariance, TemperatureScaling
from ..layers.conversion import output_function
from ..layers.ops.arguments import integer
from ..layers.ops.batch_ensemble import split_members
from ..layers.ops.uncertainty import (
    at_least_float32,
    ensemble_log_probs,
    entropy,
    mutual_information,
)
from ..layers.variational.base import BayesianLayer
from ..layers.variational.mode import (
    at_posterior_mean,
    at_posterior_samples,
    can_sample,
)


def ensemble_size(model):
    """Returns M, the number of members that a classifier averages, or 1."""
    return _split_off_average(split_off_temperature(model)[0])[0]


def classification(model):
    """Gives a classifier's probabilities, those of its members, and uncertainty.

    With p_m(c) the probability that member m gives to class c, p = (1/M) sum_m p_m
    their mean and H the entropy, in nats:

    - `probabilities`: p, `[B, C]`;
    - `member_probabilities`: p_m, `[B, M, C]`;
    - `predictive_entropy`: H[p], `[B]`;
    - `mutual_information`: H[p] - (1/M) sum_m H[p_m], `[B]`.

    A model that ends in `kzoo.layers.TemperatureScaling` is calibrated as a whole, its
    members are not: `probabilities` is then p^(1/T), normalised, and
    `predictive_entropy` the entropy of that; `member_probabilities` and
    `mutual_information` are of the members as they are, whatever T.

    Layers with distributions over their weights compute with the means of them; see
    `sampled_classification` for draws.

    Args:
        model: A `keras.Model` that ends in logits `[B, C]`. If its last layer, or the
            last before the temperature, is `kzoo.layers.AverageMembers`, its members
            are read in front of that; any other model counts as one member.

    Returns:
        `(M, predict)`: the number of members, and a function from a batch of inputs
        to a dict of the above, tensors of at least float32. It can be traced and
        compiled.

    Raises:
        ValueError: If the model ends in probabilities and not in logits, or averages
            members elsewhere than at its end.

    Example:

    >>> import numpy as np
    >>> from kzoo.zoo import build
    >>> from kzoo.zoo.predictive import classification
    >>> members, predict = classification(build("resnet8_batch_ensemble_digits"))
    >>> outputs = predict(np.zeros((2, 8, 8, 1), "float32"))
    >>> members, tuple(outputs["member_probabilities"].shape)
    (4, (2, 4, 10))
    """
    before, temperature = split_off_temperature(model)
    check_logits(before)
    members, logits = _split_off_average(before)
    if members > 1:
        before = ending_in(logits, before)

    def predict(inputs):
        rows = at_posterior_mean(before, inputs, training=False)
        rows = split_members(rows, members)
        # [M, B, C] -> [B, M, C]
        return _of_members(ops.moveaxis(rows, 0, 1), temperature)

    return members, predict


class Predictions(keras.Model):
    """A classifier that gives what `classification` says, compiled on either backend.

    Args:
        model: As `classification` takes it.
        samples: None; or K, for draws in place of the members, as
            `sampled_classification` takes the model, the same for all batches.

    Raises:
        ValueError: As these do, or if there is nothing to draw.
    """

    def __init__(self, model, samples=None):
        super().__init__(name="predictions")
        self.model = model
        if samples is None:
            self._predict = classification(model)[1]
        else:
            samples = check_samples(samples, model)
            self._predict = partial(
                sampled_classification(model), samples=samples, seed=0
            )
        # JAX has nothing but XLA; elsewhere it is not worth compiling again for the
        # last, smaller batch.
        self.compile(jit_compile=keras.backend.backend() == "jax")

    def call(self, inputs):
        """Returns the dict."""
        return self._predict(inputs)


def row_counts(inputs):
    """Returns the numbers of rows of arrays, a set: empty of what streams batches."""
    arrays = keras.tree.flatten(inputs)
    return {x.shape[0] for x in arrays if getattr(x, "shape", ())}


def check_samples(samples, model):
    """Returns K, or raises a ValueError if a model has nothing to draw."""
    if can_sample(model):
        return integer("samples", samples)
    raise ValueError(
        "expected `samples` for a model with distributions over its weights, or with "
        f"`MonteCarloDropout`. Received: samples={samples!r} and model "
        f"{model.name!r}, which has none"
    )


def is_variational(model):
    """Returns whether a model has layers with distributions over their weights."""
    return any(isinstance(layer, BayesianLayer) for layer in model._flatten_layers())


def sampled_classification(model):
    """Gives the predictions of draws from a Bayesian classifier, and uncertainty.

    As `classification`, with K draws from the posteriors in place of the members.

    Args:
        model: A `keras.Model` with variational layers or
            `kzoo.layers.MonteCarloDropout`, that ends in logits `[B, C]`.

    Returns:
        Function of a batch of inputs, K and a seed, as
        `kzoo.layers.variational.mode.at_posterior_samples` takes them, to the dict that
        `classification` describes. It can be traced and compiled.

    Raises:
        ValueError: If the model ends in probabilities and not in logits.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import DenseFlipout
    >>> from kzoo.zoo.predictive import sampled_classification
    >>> model = keras.Sequential([keras.Input((5,)), DenseFlipout(3)])
    >>> outputs = sampled_classification(model)(np.ones((2, 5), "float32"), 16, seed=0)
    >>> tuple(outputs["member_probabilities"].shape)
    (2, 16, 3)
    """
    before, temperature = split_off_temperature(model)
    check_logits(before)

    def predict(inputs, samples, seed):
        def logits(inputs):
            return before(inputs, training=False)

        members = at_posterior_samples(logits, inputs, samples, seed)
        return _of_members(members, temperature)

    return predict


def is_regressor(model):
    """Returns whether a model ends in means and variances."""
    return isinstance(_last_layer(model), MeanAndVariance)


def regression(model):
    """Gives a regressor's means and variances names, and the variance its parts.

    With μ_m and σ_m² the mean and variance that draw m of M gives to a target, the
    mixture of their normal distributions has

        mean μ = (1/M) sum_m μ_m,
        variance (1/M) sum_m σ_m² + (1/M) sum_m (μ_m - μ)²:

    noise that no data would remove (aleatoric), and what the draws do not agree on
    (epistemic).

    - `mean`, `variance`: of the mixture, `[B, T]`;
    - `aleatoric_variance`, `epistemic_variance`: the variance's parts, `[B, T]`;
    - `member_means`, `member_variances`: μ_m and σ_m², `[B, M, T]`.

    Layers with distributions over their weights compute with the means of them, so
    that M is 1; see `sampled_regression` for draws.

    Reference: Kendall, Gal, "What Uncertainties Do We Need in Bayesian Deep Learning
    for Computer Vision?", 2017. https://arxiv.org/abs/1703.04977

    Args:
        model: A `keras.Model` that ends in `kzoo.layers.MeanAndVariance`, `[B, T, 2]`.

    Returns:
        Function of a batch of inputs to a dict of the above, tensors of at least
        float32. It can be traced and compiled.

    Raises:
        ValueError: If the model does not end so.

    Example:

    >>> import numpy as np
    >>> from kzoo.zoo import build
    >>> from kzoo.zoo.predictive import regression
    >>> outputs = regression(build("mlp_regressor"))(np.zeros((2, 10), "float32"))
    >>> tuple(outputs["variance"].shape), float(outputs["epistemic_variance"][0, 0])
    ((2, 1), 0.0)
    """
    _check_regressor(model)

    def predict(inputs):
        rows = at_posterior_mean(model, inputs, training=False)
        return _of_normals(ops.expand_dims(rows, 1))

    return predict


def sampled_regression(model):
    """Gives the predictions of draws from a Bayesian regressor, and uncertainty.

    As `regression`, with M = K draws from the posteriors.

    Args:
        model: A `keras.Model` with variational layers or
            `kzoo.layers.MonteCarloDropout`, that ends in
            `kzoo.layers.MeanAndVariance`, `[B, T, 2]`.

    Returns:
        Function of a batch of inputs, K and a seed, as
        `kzoo.layers.variational.mode.at_posterior_samples` takes them, to the dict that
        `regression` describes. It can be traced and compiled.

    Raises:
        ValueError: If the model does not end so.

    Example:

    >>> import numpy as np
    >>> from kzoo.zoo import build
    >>> from kzoo.zoo.predictive import sampled_regression
    >>> predict = sampled_regression(build("mlp_regressor_flipout"))
    >>> outputs = predict(np.zeros((2, 10), "float32"), 16, seed=0)
    >>> tuple(outputs["member_means"].shape)
    (2, 16, 1)
    """
    _check_regressor(model)

    def predict(inputs, samples, seed):
        def rows(inputs):
            return model(inputs, training=False)

        return _of_normals(at_posterior_samples(rows, inputs, samples, seed))

    return predict


def is_language_model(model):
    """Returns whether a model gives logits of ids as those it takes.

    (From ids `[B, T]` to logits `[B, T, V]` go taggers too, which have a table of more
    or less than V vectors.)
    """
    return labels_ids(model) and any(
        getattr(layer, "input_dim", None) == model.outputs[0].shape[-1]
        for layer in model._flatten_layers()
    )


def refuse_language_model(model):
    """Raises ValueError if a model learns from streams, and not from examples."""
    if is_language_model(model):
        raise ValueError(
            "expected a classifier or a regressor: language models are trained by "
            "`fit`, and measured by the model's own `evaluate`, on the batches of "
            f"`kzoo.zoo.datasets.text_streams`. Received: model={model.name!r}"
        )


def labels_ids(model):
    """Returns whether a model goes from ids `[B, T]` to logits `[B, T, V]`."""
    ids, logits = (getattr(model, name, None) or () for name in ("inputs", "outputs"))
    return (
        len(ids) == len(logits) == 1
        and (len(ids[0].shape), len(logits[0].shape)) == (2, 3)
        and keras.backend.is_int_dtype(ids[0].dtype)
    )


def language_modelling(model):
    """Gives a language model's probabilities of the ids that follow.

    - `probabilities`: of the id that follows each, given it and those before it,
      `[B, T, V]`.

    Args:
        model: A `keras.Model` from ids `[B, T]` to logits `[B, T, V]`, which carries no
            states from batch to batch: `kzoo.zoo.models.language_model` without `rows`.

    Returns:
        Function of a batch of ids to a dict of the above, of at least float32. It can
        be traced and compiled.

    Raises:
        ValueError: If the model is another one.

    Example:

    >>> import numpy as np
    >>> from kzoo.zoo import build
    >>> from kzoo.zoo.predictive import language_modelling
    >>> predict = language_modelling(build("rev_gru_python_source", units=8))
    >>> tuple(predict(np.array([[1, 2, 3]]))["probabilities"].shape)
    (1, 3, 100)
    """
    if not labels_ids(model) or model.inputs[0].shape[0] is not None:
        raise ValueError(
            "expected a model from ids `[B, T]`, of any number of rows, to logits "
            "`[B, T, V]`: one without carried states (see "
            "`kzoo.zoo.models.language_model.take_weights`). Received: "
            f"inputs {getattr(model, 'inputs', None)}"
        )
    check_logits(model)

    def predict(inputs):
        logits = at_posterior_mean(model, inputs, training=False)
        return {"probabilities": ops.softmax(at_least_float32(logits), axis=-1)}

    return predict


def _of_normals(members):
    """The dict of `regression`, from means and variances `[B, M, T, 2]`."""
    members = at_least_float32(members)
    means, variances = members[..., 0], members[..., 1]
    aleatoric, epistemic = ops.mean(variances, axis=1), ops.var(means, axis=1)
    return {
        "mean": ops.mean(means, axis=1),
        "variance": aleatoric + epistemic,
        "aleatoric_variance": aleatoric,
        "epistemic_variance": epistemic,
        "member_means": means,
        "member_variances": variances,
    }


def _check_regressor(model):
    if not is_regressor(model):
        raise ValueError(
            "The model must end in `kzoo.layers.MeanAndVariance`. Received: model "
            f"{model.name!r}, whose last layer is {type(_last_layer(model)).__name__}"
        )


def _of_members(logits, temperature):
    """The dict of `classification`, from the members' logits `[B, M, C]`."""
    members = ops.softmax(at_least_float32(logits), axis=-1)
    probs = ops.mean(members, axis=1)
    if temperature is not None:
        probs = ops.softmax(temperature(ensemble_log_probs(logits)), axis=-1)
    return {
        "probabilities": probs,
        "member_probabilities": members,
        "predictive_entropy": entropy(probs),
        "mutual_information": mutual_information(members),
    }


def check_logits(model):
    """Raises ValueError if a model is known to end in anything but logits."""
    if is_regressor(model):
        raise ValueError(
            "The model must end in logits, not in means and variances. Received: model "
            f"{model.name!r}, a regressor"
        )
    last = _last_layer(model)
    function = output_function(last)
    if function in ("softmax", "sigmoid"):
        raise ValueError(
            "The model must end in logits, not in probabilities. Received: a model "
            f"whose last layer, {last.name!r}, gives the {function!r} of them"
        )


def split_off_temperature(model):
    """Returns a model as it is before its temperature, and that layer or None.

    Args:
        model: A `keras.Model`. If its last layer is
            `kzoo.layers.TemperatureScaling`, the model that is returned has all layers
            but that one; else it is the model itself.
    """
    for output in getattr(model, "outputs", ()):
        layer, node, _ = output._keras_history
        if isinstance(layer, TemperatureScaling):
            (tensor,) = layer._inbound_nodes[node].input_tensors
            return ending_in(tensor, model), layer
    return model, None


def ending_in(tensor, model):
    """Returns a model with another one's inputs, layers and name, and one output.

    Args:
        tensor: The output: a symbolic tensor made of the other model's.
        model: A Sequential or functional `keras.Model`.
    """
    is_sequential = isinstance(model, keras.Sequential)
    inputs = model.inputs[0] if is_sequential else model.input
    return keras.Model(inputs, tensor, name=model.name)


def _split_off_average(model):
    """Returns M and, if a model ends in AverageMembers, that layer's input."""
    for output in getattr(model, "outputs", ()):
        layer, node, _ = output._keras_history
        if isinstance(layer, AverageMembers):
            return layer.ensemble_size, layer._inbound_nodes[node].input_tensors[0]
    if any(isinstance(layer, AverageMembers) for layer in _layers(model)):
        raise ValueError(
            "`AverageMembers` must give the model's output, for the members are read "
            f"in front of it. Received: model {model.name!r}, which has it elsewhere"
        )
    return 1, None


def _last_layer(model):
    """Returns the layer that makes a model's output, also inside of nested models."""
    last = model
    while isinstance(last, keras.Model):
        outputs = getattr(last, "outputs", None)
        layers = [outputs[0]._keras_history[0]] if outputs else last.layers[-1:]
        if not layers:
            return None
        (last,) = layers
    return last


def _layers(model):
    """Yields a model's layers and those of the models inside it."""
    for layer in model.layers:
        yield layer
        if isinstance(layer, keras.Model):
            yield from _layers(layer)
