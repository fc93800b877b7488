"""The contract of a layer."""


def check_layer(
    layer_class, init_kwargs, input_shape, *, input_dtype="float32", call_kwargs=None
):
    """Checks a layer."""
    layer_class(**init_kwargs)
