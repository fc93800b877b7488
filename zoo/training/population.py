"""The members of a population: a model whose layers have each member's weights."""

import contextvars
import string

import keras
from keras import ops

from ...layers.ops.einsum import einsum_shapes

DENSE = (keras.layers.Dense, keras.layers.EinsumDense)
CONV = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)

# What is random of each perturbed layer, in order, while the members are called.
_NOISE = contextvars.ContextVar("kzoo_evolution_strategies_noise")


class _Around(keras.layers.Layer):
    """A layer that computes with another one, which belongs to the plain model."""

    def __init__(self, plain):
        super().__init__(name=plain.name, dtype=plain.dtype_policy)
        self.plain = plain
        self.supports_masking = plain.supports_masking

    def call(self, inputs, *args, **kwargs):
        return self.plain(inputs, *args, **kwargs)

    def compute_mask(self, inputs, previous_mask):
        return self.plain.compute_mask(inputs, previous_mask)

    def compute_output_spec(self, *args, **kwargs):
        return self.plain.compute_output_spec(*args, **kwargs)


class _Perturbed(_Around):
    """A dense, einsum or convolution layer with weights of each member."""

    def __init__(self, plain, index):
        super().__init__(plain)
        self.index = index

    def build(self, input_shape):
        signs = _ConvSigns if isinstance(self.plain, CONV) else _DenseSigns
        self.signs = signs(self.plain, input_shape)

    def call(self, inputs):
        perturbation, s, r, bias = (
            x if x is None else ops.cast(x, self.compute_dtype)
            for x in _NOISE.get()[self.index]
        )
        bases, members = s.shape[:2]
        linear, signs = self.signs.linear, self.signs
        kernel = ops.cast(ops.stop_gradient(self.plain.kernel), self.compute_dtype)
        x = by_device(ops.cast(inputs, self.compute_dtype))
        rows, *rest = ops.shape(x)
        y = linear(x, kernel)
        shape = ops.shape(y)[1:]
        x = ops.reshape(x, (bases * members, -1, *rest))
        x = x * ops.reshape(s, (bases * members, 1, *signs.at_inputs))
        x = ops.reshape(x, (bases, -1, *rest))
        if bases == 1:
            z = linear(x[0], perturbation[0])
        else:
            z = ops.vectorized_map(lambda e: linear(*e), (x, perturbation))
        z = ops.reshape(z, (bases * members, -1, *shape))
        z = z * ops.reshape(r, (bases * members, 1, *signs.at_outputs))
        y = ops.reshape(y, (bases * members, -1, *shape)) + z
        if bias is not None:
            mean = ops.cast(ops.stop_gradient(self.plain.bias), self.compute_dtype)
            bias = mean + bias
            y = y + ops.reshape(bias, (bases * members, 1, *signs.bias_at_outputs))
        y = ops.reshape(y, (rows, *shape))
        activation = self.plain.activation
        return y if activation is None else activation(y)


class _DenseSigns:
    """Where the signs of a dense or einsum layer are: on each axis of its kernel.

    Signs of the inputs are on the kernel's axes that the inputs have too, those of the
    outputs on the others.
    """

    def __init__(self, plain, shape):
        equation, sizes = "...x,xy->...y", plain.kernel.shape[-1:]
        if isinstance(plain, keras.layers.EinsumDense):
            equation, sizes = plain.equation, plain.partial_output_shape
        self.equation, kernel, _ = einsum_shapes(equation, shape, sizes)
        inputs, self.kernel, outputs = self.equation.replace("->", ",").split(",")
        if inputs[0] != outputs[0] or inputs[0] in self.kernel:
            raise ValueError(
                "expected an equation whose first axis is the batch's, before and "
                f"after. Received: equation={equation!r} of layer {plain.name!r}"
            )
        sizes = dict(zip(self.kernel, kernel, strict=True))
        self.axes_in = "".join(x for x in inputs if x in sizes)
        self.axes_out = "".join(x for x in outputs if x in sizes and x not in inputs)
        self.ins = [sizes[x] for x in self.axes_in]
        self.outs = [sizes[x] for x in self.axes_out]
        self.at_inputs = [sizes[x] if x in self.axes_in else 1 for x in inputs[1:]]
        self.at_outputs = [sizes[x] if x in self.axes_out else 1 for x in outputs[1:]]
        if plain.bias is not None:
            shape = plain.bias.shape
            self.bias_at_outputs = [1] * (len(outputs) - 1 - len(shape)) + [*shape]

    def linear(self, x, kernel):
        """The layer's product."""
        return ops.einsum(self.equation, x, kernel)

    def sum(self, w, s, r):
        """sum_n w_n s_n r_nᵀ of each base, shaped as the kernel."""
        base, n = [x for x in string.ascii_letters if x not in self.equation][:2]
        w = ops.reshape(w, (*w.shape, *[1] * len(self.outs)))
        return ops.einsum(
            f"{base}{n}{self.axes_in},{base}{n}{self.axes_out}->{base}{self.kernel}",
            s,
            w * r,
        )


class _ConvSigns:
    """Where the signs of a convolution are: on its channels."""

    def __init__(self, plain, _):
        self.plain = plain
        *self.positions, channels, filters = plain.kernel.shape
        self.groups = plain.groups
        self.ins, self.outs = [channels * self.groups], [filters]
        ones = [1] * len(self.positions)
        if plain.data_format == "channels_first":
            self.at_inputs, self.at_outputs = self.ins + ones, [filters, *ones]
        else:
            self.at_inputs, self.at_outputs = ones + self.ins, [*ones, filters]
        self.bias_at_outputs = self.at_outputs

    def linear(self, x, kernel):
        """The layer's convolution."""
        plain, padding = self.plain, self.plain.padding
        if padding == "causal":
            x, padding = ops.pad(x, plain._compute_causal_padding()), "valid"
        return ops.conv(
            x,
            kernel,
            strides=list(plain.strides),
            padding=padding,
            data_format=plain.data_format,
            dilation_rate=plain.dilation_rate,
        )

    def sum(self, w, s, r):
        """sum_n w_n s_n r_nᵀ of each base, to broadcast with the kernel."""
        # A filter's kernel has the channels of its group only.
        bases, members = w.shape
        s = ops.reshape(s, (bases, members, self.groups, -1))
        r = ops.reshape(w[..., None] * r, (bases, members, self.groups, -1))
        signs = ops.einsum("bngc,bngf->bcgf", s, r)
        ones = [1] * len(self.positions)
        return ops.reshape(signs, (bases, *ones, signs.shape[1], self.outs[0]))


class Population:
    """The model of all members of a plain one, and its perturbed layers."""

    def __init__(self, model):
        built = isinstance(model, keras.Sequential) and model.built
        if not built and not getattr(model, "inputs", None):
            raise ValueError(
                "expected a built Sequential or functional model. "
                f"Received: {type(model).__name__} {model!r}"
            )
        self.perturbed = []
        self.model = keras.models.clone_model(
            model, clone_function=self._around, recursive=True
        )
        perturbed = {id(v) for x in self.perturbed for v in x.plain.trainable_variables}
        others = [v.path for v in model.trainable_variables if id(v) not in perturbed]
        if others or not perturbed:
            raise ValueError(
                "expected a model whose trained weights are those of dense, einsum and "
                "convolution layers; set `trainable = False` for others. Received: "
                f"model {model.name!r} with {others or 'none'}"
            )

    def outputs(self, rows, noise):
        """The members' outputs, of member-major rows.

        Args:
            rows: The inputs.
            noise: For each perturbed layer ΔŴ `[bases, *kernel]`; and s, r and the
                bias's perturbations (or None), `[bases, members of each, ...]`.
        """
        token = _NOISE.set(noise)
        try:
            return self.model(rows, training=False)
        finally:
            _NOISE.reset(token)

    def _around(self, layer):
        if not isinstance(layer, keras.layers.Layer):  # An operation of keras.ops.
            return type(layer).from_config(layer.get_config())
        if layer.activity_regularizer is not None:
            raise ValueError(
                "expected layers without an activity regularizer, whose penalty the "
                f"members' losses do not have. Received: one of {layer.name!r}"
            )
        trained = layer.trainable_variables
        if type(layer) in (*DENSE, *CONV) and trained:
            if len(trained) < len(layer.variables):
                raise ValueError(
                    "expected a layer's kernel and bias to be trained both or none. "
                    f"Received: {layer.name!r}, of which {trained[0].name} alone is"
                )
            self.perturbed.append(_Perturbed(layer, len(self.perturbed)))
            return self.perturbed[-1]
        return _Around(layer)


def by_device(x):
    """Spreads a tensor's first axis over JAX's devices, if there is a distribution."""
    distribution = keras.distribution.distribution()
    if keras.backend.backend() != "jax" or distribution is None:
        return x
    layout = distribution.get_data_layout(x.shape)
    return keras.distribution.distribute_tensor(x, layout)
