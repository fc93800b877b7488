"""Copies of models, some of their layers converted."""

import contextlib
import inspect
import tempfile

import keras
import numpy as np

# What gives the numbers that it gets, and what it may say that it ends in.
PASS_ON = (
    keras.layers.Activation,
    keras.layers.Dropout,
    keras.layers.Flatten,
    keras.layers.Permute,
    keras.layers.RepeatVector,
    keras.layers.Reshape,
)
PASSING = ("linear", "dropout", "flatten", "permute", "repeatvector", "reshape")
PROJECTIONS = (
    "_query_dense",
    "_key_dense",
    "_value_dense",
    "_gate_dense",
    "_output_dense",
)


def converted(model, convert, fill, counterparts, inputs=None, call=None):
    """A copy of a model, some of its layers converted, and which it only copied.

    All else stays as it is: names, other layers and their weights, shared layers,
    nested models, which layers are frozen.

    Args:
        model: A Sequential or functional model.
        convert: Function of a layer that returns its counterpart, or None to copy it.
        fill: Function of a layer and its counterpart, once this is built, that gives it
            the layer's weights.
        counterparts: The classes of layers that have counterparts.
        inputs: The copy's inputs, of a functional model. Defaults to new ones.
        call: Function of a layer of a functional model and its arguments, which calls
            the layer or does something else.

    Returns:
        The copy, and the list of the layers of the model that were only copied.

    Raises:
        ValueError: If the model is neither, not built, or has no such layer.
    """
    new_inputs(model)  # Or it raises.
    for layer in model._flatten_layers():
        changed = getattr(layer, "quantization_mode", None)
        changed = "low-rank updates" if getattr(layer, "lora_enabled", 0) else changed
        if changed and type(layer) in counterparts:
            raise ValueError(
                "expected layers with kernels as they were trained. Received: "
                f"{type(layer).__name__} {layer.name!r} with {changed}"
            )
    pairs, copied = [], []

    def clone(layer):
        if not isinstance(layer, keras.layers.Layer):  # An operation of keras.ops.
            return type(layer).from_config(layer.get_config())
        if type(layer) is keras.layers.Bidirectional:
            both = [convert(one) for one in (layer.forward_layer, layer.backward_layer)]
            if None not in both:
                return bidirectional(layer, *both)
        found = convert(layer)
        of_kind = copied if found is None else pairs
        if found is None:
            found = type(layer).from_config(layer.get_config())
        _freeze_as(layer, found)
        of_kind.append((layer, found))
        return found

    def bidirectional(layer, forward, backward):
        found = keras.layers.Bidirectional(
            forward,
            layer.merge_mode,
            backward_layer=backward,
            name=layer.name,
            dtype=layer.dtype_policy,
        )
        _freeze_as(layer, found)
        # Keras makes the forward layer anew, by its configuration: what it made has not
        # the weights of ours, and shares none. Both go in again, in their order.
        for part, other in (("forward_layer", forward), ("backward_layer", backward)):
            made = getattr(found, part)
            found._tracker.untrack(made)
            other.zero_output_for_mask = made.zero_output_for_mask
            setattr(found, part, other)
            one = getattr(layer, part)
            _freeze_as(one, other)
            pairs.append((one, other))
        return found

    with _as_if_not_compiled(model):
        made = keras.models.clone_model(
            model,
            input_tensors=inputs,
            clone_function=clone,
            call_function=call,
            recursive=True,
        )
    if not pairs:
        kinds = sorted({type(layer).__name__ for layer in model._flatten_layers()})
        raise ValueError(
            "expected a model with at least one layer that has a counterpart: "
            f"{[c.__name__ for c in counterparts]} or ours. Received: {model.name}, "
            f"with {kinds}"
        )
    for layer, found in pairs:
        fill(layer, found)
    for layer, found in copied:
        both = zip(layer._flatten_layers(), found._flatten_layers(), strict=True)
        for one, other in both:
            _copy_state(one, other)
    return made, [layer for layer, _ in copied]


def _freeze_as(layer, found):
    # Only if it differs: it would reach all sublayers, and thaw one that is frozen.
    if found.trainable != layer.trainable:
        found.trainable = layer.trainable


@contextlib.contextmanager
def _as_if_not_compiled(model):
    """Keeps `clone_model` from compiling the copy, which needs losses by name."""
    models = [x for x in model._flatten_layers() if isinstance(x, keras.Model)]
    compiled = [one for one in models if one.compiled]
    try:
        for one in compiled:
            one.compiled = False
        yield
    finally:
        for one in compiled:
            one.compiled = True


def output_layer(tensor):
    """The layer that makes a symbolic tensor's numbers.

    Also inside of nested models, and before layers that only pass numbers on.
    """
    while True:
        layer, node, index = tensor._keras_history
        if isinstance(layer, keras.Model):
            tensor = layer.outputs[index]
        elif isinstance(layer, PASS_ON) and output_function(layer) in PASSING:
            (tensor,) = layer._inbound_nodes[node].input_tensors
        elif isinstance(layer, keras.layers.TimeDistributed):
            return layer.layer
        else:
            return layer


def output_function(layer):
    """The name of the function that a layer ends in, such as `"softmax"`, or None."""
    activation = getattr(layer, "activation", None)
    if activation is not None:
        return getattr(activation, "__name__", None)
    # The layer Softmax, or the operation of keras.ops, whose class is not public.
    return type(layer).__name__.lower()


def new_inputs(model):
    """Makes inputs like a model's, in their structure.

    Raises:
        ValueError: If the model is neither Sequential nor functional, or not built.
    """
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise ValueError(
            "expected a built Sequential or functional model. "
            f"Received: {type(model).__name__} {getattr(model, 'name', model)!r}"
        )
    is_sequential = isinstance(model, keras.Sequential)
    return keras.tree.map_structure(
        lambda x: keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name),
        model.inputs[0] if is_sequential else model.input,
    )


def counterpart(layer, cls, **others):
    """Makes a built layer of a class, with another one's arguments and input shapes.

    Args:
        layer: A built layer.
        cls: A class of layers. Of the layer's configuration it gets what it takes.
        **others: Arguments that are others.

    Raises:
        ValueError: If the layer is not built.
    """
    if not layer.built:
        raise ValueError(f"expected a built layer. Received: {layer.name}")
    made = with_arguments(cls, {**layer.get_config(), **others})
    made.build_from_config(layer.get_build_config())
    return made


def with_arguments(cls, config):
    """Makes a layer of a class, of a configuration's arguments that it takes."""
    takes = {"name", "dtype", "trainable"} | _arguments(cls)
    return cls.from_config({n: v for n, v in config.items() if n in takes})


def _arguments(cls):
    """What a class takes by name, with bases up to Keras's first one and its cell."""
    is_ours = [base.__module__.startswith("kzoo.") for base in cls.__mro__]
    bases = cls.__mro__[: is_ours.index(False) + 1]
    takes = {name for base in bases for name in inspect.signature(base).parameters}
    return takes | (_arguments(cls.cell_class) if hasattr(cls, "cell_class") else set())


def has_plain_kernels(layer, converted_class):
    """Whether a layer, or one inside of it, has kernels, and none is of that class."""
    if any(isinstance(x, converted_class) for x in layer._flatten_layers()):
        return False
    return any("kernel" in v.name or v.name == "embeddings" for v in layer.weights)


def holders(layer):
    """What has a layer's weights: attention's projections, a cell, or itself."""
    projections = [getattr(layer, name) for name in PROJECTIONS if hasattr(layer, name)]
    return projections or [getattr(layer, "cell", layer)]


def _copy_state(layer, other):
    """Gives a layer what another one would save: weights, statistics, vocabularies."""
    store = {}
    layer.save_own_variables(store)
    other.load_own_variables({name: numpy(value) for name, value in store.items()})
    if hasattr(layer, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            layer.save_assets(folder)
            other.load_assets(folder)


def numpy(value):
    """A copy, which no training step can take back."""
    return np.array(keras.ops.convert_to_numpy(value))
