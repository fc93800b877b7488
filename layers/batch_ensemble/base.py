"""What the BatchEnsemble layers around a plain Keras layer have in common."""

import keras
from keras import ops

from ..conversion import counterpart, numpy
from ..ops.arguments import integer
from ..ops.batch_ensemble import batch_ensemble, check_rows
from ..ops.random import own_initializer


class BatchEnsembleLayer(keras.layers.Layer):
    """M members' fast weights around one shared Keras layer.

    A subclass makes `self.shared`, the plain layer without bias or activation that
    owns the shared kernel, by `_share`, and the fast weights by `_add_fast_weights`
    when it is built. As an ordinary sublayer the shared one can be frozen by itself
    (`layer.shared.trainable = False`), which the config keeps.
    """

    bias = None

    def __init__(
        self,
        rank,
        ensemble_size,
        alpha_initializer,
        gamma_initializer,
        shared_trainable=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self._shared_starts_trainable = shared_trainable
        self.rank = integer("rank", rank)
        self.ensemble_size = integer("ensemble_size", ensemble_size)
        self.alpha_initializer = own_initializer(alpha_initializer)
        self.gamma_initializer = own_initializer(gamma_initializer)

    def _share(self, plain, arguments, **fixed):
        """Makes the shared layer, of the class `plain`.

        The config takes the values of `arguments` from it, but not of `fixed`.
        """
        self.shared = plain(
            **arguments, **fixed, dtype=self.dtype_policy, name="shared"
        )
        self._of_shared = tuple(arguments)
        # Before it is built, which may change some.
        self._shared_config = self.shared.get_config()
        if not (self.trainable and self._shared_starts_trainable):
            self.shared.trainable = False

    def share_with(self, other):
        """Takes another layer's shared layer, and so its kernel, in place of its own.

        Args:
            other: A layer of the same class and arguments of the shared layer, but for
                initializers.

        Raises:
            ValueError: If it is none, or this layer is built already.
        """
        if type(other) is not type(self):
            raise ValueError(
                f"expected a {type(self).__name__} to share with. Received: "
                f"{type(other).__name__} {other.name!r}"
            )
        if self.built:
            raise ValueError(
                f"expected a layer that is not built yet. Received: {self.name}"
            )
        for name in self._of_shared:
            mine, its = (x._shared_config[name] for x in (self, other))
            if mine != its and not name.endswith("_initializer"):
                raise ValueError(
                    f"expected a layer with {name}={mine!r} to share with. Received: "
                    f"{other.name!r} with {name}={its!r}"
                )
        self._tracker.untrack(self.shared)
        self.shared = other.shared

    def _build_shared(self, input_shape):
        if not self.shared.built:  # By another layer, that it is shared with.
            self.shared.build(input_shape)

    def _add_fast_weights(self, sizes_in, sizes_out, prefix=""):
        """Makes r and s, of these sizes for each member."""
        lead = (self.rank,) if self.rank > 1 else ()
        lead += (self.ensemble_size,)
        for name, sizes in (
            (f"{prefix}alpha", sizes_in),
            (f"{prefix}gamma", sizes_out),
        ):
            weight = self.add_weight(
                name=name,
                shape=(*lead, *sizes),
                initializer=getattr(self, f"{name}_initializer"),
                autocast=self.autocast,
            )
            setattr(self, name, weight)

    def _fast_weights(self):
        """r and s of each member."""
        return self.alpha, self.gamma

    def _fast_weights_of(self, rows):
        """r and s of a call with so many rows, of each member or of each row."""
        return self._fast_weights()

    def member(self, index):
        """Makes the plain Keras layer that one member is.

        Args:
            index: m, an integer from 0 to M - 1.

        Returns:
            A built layer with the member's own kernel, W ∘ (r_m s_mᵀ), and bias.

        Raises:
            ValueError: If the layer is not built, or there is no such member.
        """
        m = integer("index", index, 0, self.ensemble_size - 1)
        plain = counterpart(self, type(self.shared))
        self._give_member(m, plain)
        return plain

    def _give_member(self, m, plain):
        """Gives a built plain layer the weights of member m."""
        scale = self._scale(m, *self._fast_weights())
        plain.kernel.assign(numpy(self.shared.kernel) * scale)

    def _scale(self, m, r, s):
        """What member m's kernel is in proportion to W: the sum over k of r_k s_kᵀ."""
        r, s = ([w[m]] if self.rank == 1 else w[:, m] for w in map(numpy, (r, s)))
        return sum(map(self._outer, r, s))

    def _outer(self, r, s):
        """r sᵀ, laid out as the last axes of a kernel: `[in, out]`."""
        return r[:, None] * s

    def compute_output_shape(self, input_shape):
        """Returns the shared layer's output shape."""
        check_rows(input_shape[0], self.ensemble_size)
        return tuple(self.shared.compute_output_shape(input_shape))

    def get_config(self):
        """Returns the constructor's arguments that these layers have in common."""
        shared = self.shared.get_config()
        return {
            **super().get_config(),
            **{name: shared[name] for name in self._of_shared},
            "rank": self.rank,
            "ensemble_size": self.ensemble_size,
            "shared_trainable": self.shared.trainable,
            "alpha_initializer": keras.initializers.serialize(self.alpha_initializer),
            "gamma_initializer": keras.initializers.serialize(self.gamma_initializer),
            "activity_regularizer": keras.regularizers.serialize(
                self.activity_regularizer
            ),
        }


class LinearBatchEnsemble(BatchEnsembleLayer):
    """y = φ(((x ∘ r) W) ∘ s + b) for a shared layer that is linear, x W.

    A subclass says along which axes r, s and b lie: see `_axes`.
    """

    def __init__(
        self,
        activation,
        bias_initializer,
        bias_regularizer,
        bias_constraint,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.activation = keras.activations.get(activation)
        self.bias_initializer = own_initializer(bias_initializer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.bias_constraint = keras.constraints.get(bias_constraint)

    @property
    def kernel(self):
        """The kernel W that all members share."""
        return self.shared.kernel

    def _axes(self, input_shape):
        """Three dicts of axes and the sizes of r, s and b there; or None for no b.

        The axes are those of the input for r, of the output for s and b.
        """
        raise NotImplementedError

    def build(self, input_shape):
        """Creates the shared kernel, the fast weights and the members' biases."""
        r, s, b = self._axes(input_shape)
        self._build_shared(input_shape)
        self.input_spec = self.shared.input_spec
        self._axes_of_r, self._axes_of_s = tuple(r), tuple(s)
        self._add_fast_weights(r.values(), s.values())
        self._axes_of_b = None
        if b is not None:
            self._axes_of_b = tuple(b)
            self.bias = self.add_weight(
                name="bias",
                shape=(self.ensemble_size, *b.values()),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )

    def call(self, inputs):
        """Returns every member's output for its own rows."""
        # Integers become floats, as they do in the plain layer.
        if not keras.backend.is_float_dtype(inputs.dtype):
            inputs = ops.cast(inputs, self.compute_dtype)
        outputs = batch_ensemble(
            self.shared,
            inputs,
            *self._fast_weights_of(ops.shape(inputs)[0]),
            self.bias,
            axis=self._axes_of_r,
            out_axis=self._axes_of_s,
            bias_axis=self._axes_of_b,
        )
        return self.activation(outputs)

    def _give_member(self, m, plain):
        super()._give_member(m, plain)
        if self.bias is not None:
            plain.bias.assign(numpy(self.bias)[m])

    def get_config(self):
        """Returns the constructor's arguments that these layers have in common."""
        regularizers = keras.regularizers
        return {
            **super().get_config(),
            "activation": keras.activations.serialize(self.activation),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
        }


class ChannelBatchEnsemble(LinearBatchEnsemble):
    """A layer whose fast weights and biases lie along one axis, the channels'."""

    def __init__(self, use_bias, **kwargs):
        super().__init__(**kwargs)
        self.use_bias = use_bias

    @property
    def channel_axis(self):
        """The axis of the channels, in input and output."""
        first = getattr(self.shared, "data_format", None) == "channels_first"
        return 1 if first else -1

    def _axes(self, input_shape):
        axis = self.channel_axis
        out = {axis: self.shared.compute_output_shape(input_shape)[axis]}
        return {axis: input_shape[axis]}, out, out if self.use_bias else None

    def get_config(self):
        """Returns the constructor's arguments that these layers have in common."""
        return {**super().get_config(), "use_bias": self.use_bias}


def fast_weights(model):
    """The fast weights r and s of all layers of a model.

    Args:
        model: A `keras.Model` or layer.
    """
    return [
        variable
        for layer in model._flatten_layers()
        if isinstance(layer, BatchEnsembleLayer)
        for name in (p + w for p in ("", "recurrent_") for w in ("alpha", "gamma"))
        for variable in _variables(getattr(layer, name, None))
    ]


def _variables(weight):
    """A weight, or the parameters of its distribution."""
    return [] if weight is None else getattr(weight, "variables", [weight])
