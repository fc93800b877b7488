"""What is inside of an optimizer: the optimizers it wraps, and their variables."""

from keras import ops


def parts(optimizer):
    """The optimizers that an optimizer wraps itself."""
    if hasattr(optimizer, "inner_optimizer"):
        return [optimizer.inner_optimizer]
    return list(getattr(optimizer, "optimizers", ()))


def nested(optimizer):
    """An optimizer and all that it wraps, the outermost first."""
    yield optimizer
    for part in parts(optimizer):
        yield from nested(part)


def rules(optimizer):
    """The built optimizers at the ends of the nest, which have an update rule."""
    return [part for part in nested(optimizer) if part.built and not parts(part)]


def slots(part):
    """The variables that an update rule works with, of one part of a nest.

    Not the counter of updates, the learning rate, the gradients that accumulate or
    the moving average of the weights; of a Lookahead, what it keeps of the momenta.
    """
    if parts(part) or not part.built:
        return list(getattr(part, "_slow_momenta", ()))
    others = [
        part._iterations,
        part._learning_rate,
        *getattr(part, "_accumulated_gradients", ()),
        *getattr(part, "_model_variables_moving_average", ()),
    ]
    return [v for v in part.variables if not any(v is other for other in others)]


def momenta(part):
    """The slots that are averages or sums of gradients, by their names."""
    if parts(part):
        return slots(part)
    return [
        slot for slot in slots(part) if slot.name.endswith(("_momentum", "_linear"))
    ]


def initial_value(slot):
    """The number that a slot which has just been made is filled with."""
    value = ops.convert_to_numpy(slot)
    first = value.flat[0] if value.size else 0
    if not (value == first).all():
        raise ValueError(
            "expected a slot that is made with one number in it, to be reset to. "
            f"Received: {slot.path}"
        )
    return float(first)
