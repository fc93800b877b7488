"""Copies of models, some of their layers converted."""

import tempfile

import keras
import numpy as np


def converted(model, convert, fill, counterparts, call=None):
    """A copy of a model, some of its layers converted, and which it only copied.

    All else stays as it is: names, other layers and their weights, shared layers,
    nested models, which layers are frozen.

    Args:
        model: A Sequential or functional model.
        convert: Function of a layer that returns its counterpart, or None to copy it.
        fill: Function of a layer and its counterpart, once this is built, that gives it
            the layer's weights.
        counterparts: The classes of layers that have counterparts.
        call: Function of a layer and its arguments that calls it, in place of calling
            it (functional models only).

    Returns:
        The copy, and the list of the layers of the model that were only copied.

    Raises:
        ValueError: If the model is neither, not built, or has no such layer.
    """
    built = isinstance(model, keras.Sequential) and model.built
    if not built and not getattr(model, "inputs", None):
        raise ValueError(
            "expected a built Sequential or functional model. "
            f"Received: {type(model).__name__} {model.name!r}"
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
        found.trainable = layer.trainable
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
        found.trainable = layer.trainable
        for part in ("forward_layer", "backward_layer"):
            one, other = getattr(layer, part), getattr(found, part)
            other.trainable = one.trainable
            pairs.append((one, other))
        return found

    made = keras.models.clone_model(
        model, clone_function=clone, call_function=call, recursive=True
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
