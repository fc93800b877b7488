"""How an optimizer that needs a batch gets it: before the model's training step.

Keras hands an optimizer gradients and variables only. So `observe_batches` puts a
function in front of one model's `train_step`, as an attribute of that one object. It
looks whether the model's optimizer, or one inside of it, asks for the batches; gives
them to it, with the model's weights; and calls the `train_step` that was there before.

What was considered beside it: factors that come to the optimizer as the gradients of
variables of the model. Those variables would have to be the trainer's and not the
model's; and as gradients, factors pass through the loss scale (by which one factor
would be divided and the other multiplied), clipping, accumulation and moving averages,
each of which would have to be undone. Here the optimizer takes its own gradient, in
float32 and of its own function, and none of these ever sees a factor. The model has no
variable, layer or saved attribute more than without the optimizer, and no forward pass
reads a variable of the optimizer's.
"""

import keras

from ..lookahead.nesting import nested


def observe_batches(model):
    """Lets the model's optimizer see the batches of every training step.

    Args:
        model: A Keras model. Without an optimizer that asks for batches its training is
            as before.
    """
    if getattr(vars(model).get("train_step"), "shows_batches", False):
        return
    inner = model.train_step

    def train_step(*args):
        observers = [
            part
            for part in nested(getattr(model, "optimizer", None))
            if getattr(part, "observes", lambda model: False)(model)
        ]
        try:
            if observers:
                args = _show(model, observers, *args)
            return inner(*args)
        finally:
            for observer in observers:
                observer.forget()

    train_step.shows_batches = True
    vars(model)["train_step"] = train_step


def _show(model, observers, *args):
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(args[-1])
    build(model, x)
    if keras.backend.backend() == "tensorflow":
        for observer in observers:
            observer.observe(x, y, sample_weight)
        return args
    # On JAX all state is an argument and a result.
    (trainable, other, of_optimizer, metrics), data = args
    variables = model.optimizer.variables
    mapping = [
        *zip(model.trainable_variables, trainable, strict=True),
        *zip(model.non_trainable_variables, other, strict=True),
        *zip(variables, of_optimizer, strict=True),
    ]
    with keras.StatelessScope(mapping) as scope:
        for observer in observers:
            observer.observe(x, y, sample_weight)
    of_optimizer = [scope.get_current_value(variable) for variable in variables]
    return (trainable, other, of_optimizer, metrics), data


def build(model, x):
    """Builds what the first training step would have built.

    Args:
        model: A compiled model.
        x: What it is given.
    """
    if not all(layer.built for layer in model._flatten_layers()):
        with keras.StatelessScope():
            model(x)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
