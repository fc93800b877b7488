"""A weight that is a distribution: its posterior, its prior and their divergence."""

import keras
from keras import ops

from .distributions import (
    Density,
    NormalPrior,
    WeightDistribution,
    closed_form,
    kl_divergence,
    sampled_kl_divergence,
)

PARTS = ("posterior_fn", "prior_fn", "divergence_fn")


class VariationalWeight:
    """One weight W of a layer, with W ~ q, and KL(q, p) in the layer's losses.

    Its variables belong to the layer.

    Args:
        layer: A `BayesianLayer`.
        kind: What the weight is, such as `"kernel"`: the layer has the functions
            `<kind>_posterior_fn`, `<kind>_prior_fn` and `<kind>_divergence_fn`.
        shape: The weight's shape.
    """

    def __init__(self, layer, kind, shape):
        self.layer, self.kind = layer, kind
        self.shape = tuple(shape)
        # Half precision computes with single precision's parameters.
        self.dtype = keras.backend.result_type(layer.variable_dtype, "float32")
        self.variables, self._trainable = [], []
        self.posterior = self._made("posterior")
        self.prior = self._made("prior")
        if self.prior is not None and self.prior.is_point:
            raise ValueError(
                f"expected `{kind}_prior_fn` to make a distribution with a density: "
                "the divergence from a point is infinite. "
                f"Received: {getattr(layer, f'{kind}_prior_fn')!r}"
            )
        if self.prior is not None:
            # Keras adds a weight's regularizer to the losses once a step, however
            # often the layer is called, and in every way to train.
            for variable in self._trainable:
                own = variable.regularizer
                variable.regularizer = Divergence(self, variable, own)

    def _made(self, part):
        name = f"{self.kind}_{part}"
        function = getattr(self.layer, f"{name}_fn")
        if function is None:
            return None
        if isinstance(function, WeightDistribution):
            return function(self.dtype, self.shape, name, True, self._add_variable)
        return self._made_by_tfp(function, name)

    def _made_by_tfp(self, function, name):
        import tensorflow as tf

        from .tfp import from_tfp

        def add_variable(*args, **kwargs):
            # TensorFlow Probability keeps a tf.Variable, of a Keras one only the value.
            return self._add_variable(*args, **kwargs).value

        before = len(self._trainable)
        # A layer may be built while a graph is traced, which its parts must outlive.
        with tf.init_scope():
            made = function(
                tf.as_dtype(self.dtype), list(self.shape), name, True, add_variable
            )
            distribution = from_tfp(
                made, self.shape, self.dtype, name.endswith("prior")
            )
            added = {id(v.value) for v in self._trainable[before:]}
            if added != {id(v) for v in made.trainable_variables}:
                raise ValueError(
                    f"expected `{name}_fn` to make its variables by the function "
                    "that it is given, `add_variable_fn`, and the distribution to "
                    "depend on all of them as long as it lives: what is computed from "
                    "them must be a `tfp.util.DeferredTensor`, not a tensor. "
                    f"Received: {function!r}"
                )
        return distribution

    def _add_variable(
        self,
        name,
        shape=(),
        dtype=None,
        initializer=None,
        regularizer=None,
        constraint=None,
        trainable=True,
        **_,
    ):
        variable = self.layer.add_weight(
            name=name,
            shape=tuple(shape),
            dtype=keras.backend.standardize_dtype(dtype or self.dtype),
            initializer=initializer,
            regularizer=regularizer,
            constraint=constraint,
            trainable=trainable,
            autocast=False,
        )
        self.variables.append(variable)
        if trainable:  # Also in a layer that is frozen now.
            self._trainable.append(variable)
        return variable

    def divergence(self):
        """KL(q, p) in nats, or 0 without a prior; not scaled."""
        function = getattr(self.layer, f"{self.kind}_divergence_fn")
        q, p = self.posterior, self.prior
        if p is None or function is None:
            return ops.zeros((), self.dtype)
        if function is kl_divergence:
            found = closed_form(q, p)
            if found is not None:
                return found
            function = sampled_kl_divergence  # Of a draw made only here.
        sample = q.sample(self.layer.seed_generator)
        if function is not sampled_kl_divergence:
            from .tfp import to_tfp

            q, p = to_tfp(q), to_tfp(p)
        return function(q, p, sample)


class Divergence(keras.regularizers.Regularizer):
    """(β / N) KL(q, p), as the regularizer of the distributions' variables.

    Each of them has one, and the first that is trained adds the divergence.

    Args:
        weight: The `VariationalWeight`.
        variable: The variable.
        regularizer: The variable's own regularizer, or None.
    """

    def __init__(self, weight, variable, regularizer):
        self.weight, self.variable, self.regularizer = weight, variable, regularizer

    def __call__(self, x):
        """Returns the scaled divergence, and what the own regularizer returns."""
        loss = ops.zeros((), self.weight.dtype)
        trained = [v for v in self.weight._trainable if v.trainable]
        if trained and trained[0] is self.variable:
            loss = self.weight.divergence() * self.weight.layer.divergence_scale()
        return loss if self.regularizer is None else loss + self.regularizer(x)


def checked_function(name, function):
    """Returns a posterior's, prior's or divergence's function as a layer keeps it.

    Args:
        name: The argument's name, such as `"kernel_prior_fn"`.
        function: What was given for it.

    Raises:
        ValueError: If it cannot be used as that, or not on this backend.
    """
    if function is not None and not callable(function):
        raise ValueError(
            f"expected `{name}` to be a function. Received: {name}={function!r}"
        )
    if name.endswith("posterior_fn") and isinstance(function, Density):
        raise ValueError(
            f"expected `{name}` to make a distribution that can be drawn from. "
            f"Received: {name}={function!r}"
        )
    if _is_standard_normal_of_tfp(function):
        return NormalPrior()
    if keras.backend.backend() != "tensorflow" and not _is_ours(function):
        raise ValueError(
            f"expected `{name}` to be one of kzoo's on the JAX backend, where "
            f"TensorFlow Probability does not run. Received: {name}={function!r}"
        )
    return function


def _is_ours(function):
    return (
        function is None
        or isinstance(function, WeightDistribution)
        or function in (kl_divergence, sampled_kl_divergence)
    )


def _is_standard_normal_of_tfp(function):
    """Whether it is the default prior of `tfp.layers`, which no file could name."""
    module = getattr(function, "__module__", None) or ""
    name = getattr(function, "__name__", None)
    return (
        module.startswith("tensorflow_probability.")
        and name == "default_multivariate_normal_fn"
    )


def serialize(name, function):
    """Returns a function as a configuration holds it.

    Args:
        name: The argument's name, for the message.
        function: A posterior's, prior's or divergence's function, or None.

    Raises:
        ValueError: If a file could not name it.
    """
    if function is not None and not isinstance(function, WeightDistribution):
        registered = keras.saving.get_registered_name(function)
        if keras.saving.get_registered_object(registered) is not function:
            raise ValueError(
                f"expected `{name}` to be something that a file can name: an instance "
                "of `kzoo.layers.MeanFieldNormal` or the like, or a function "
                "registered by `keras.saving.register_keras_serializable`. "
                f"Received: {function.__qualname__}"
            )
    return keras.saving.serialize_keras_object(function)
