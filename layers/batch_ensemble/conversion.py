"""From a plain model to an ensemble that shares its weights, and back to a member."""

import warnings

import keras

from ..conversion import (
    converted,
    has_plain_kernels,
    holders,
    new_inputs,
    numpy,
    output_function,
    output_layer,
    with_arguments,
)
from ..mean_and_variance import MeanAndVariance
from ..ops.arguments import integer
from . import (
    attention,
    batch_normalization,
    bias,
    conv1d,
    conv2d,
    conv2d_transpose,
    conv3d,
    dense,
    depthwise_conv2d,
    einsum_dense,
    embedding,
    gru,
    layer_normalization,
    lstm,
    prelu,
    separable_conv2d,
    simple_rnn,
)
from .members import AverageMembers, TileMembers

# Plain layer -> its counterpart with fast weights
COUNTERPARTS = {
    keras.layers.Dense: dense.DenseBatchEnsemble,
    keras.layers.EinsumDense: einsum_dense.EinsumDenseBatchEnsemble,
    keras.layers.Conv1D: conv1d.Conv1DBatchEnsemble,
    keras.layers.Conv2D: conv2d.Conv2DBatchEnsemble,
    keras.layers.Conv3D: conv3d.Conv3DBatchEnsemble,
    keras.layers.Conv2DTranspose: conv2d_transpose.Conv2DTransposeBatchEnsemble,
    keras.layers.DepthwiseConv2D: depthwise_conv2d.DepthwiseConv2DBatchEnsemble,
    keras.layers.SeparableConv2D: separable_conv2d.SeparableConv2DBatchEnsemble,
    keras.layers.Embedding: embedding.EmbeddingBatchEnsemble,
    keras.layers.MultiHeadAttention: attention.MultiHeadAttentionBatchEnsemble,
    keras.layers.SimpleRNN: simple_rnn.SimpleRNNBatchEnsemble,
    keras.layers.GRU: gru.GRUBatchEnsemble,
    keras.layers.LSTM: lstm.LSTMBatchEnsemble,
}
# Plain layer -> its counterpart with weights of each member's own
OWN = {
    keras.layers.BatchNormalization: (
        batch_normalization.BatchNormalizationBatchEnsemble
    ),
    keras.layers.LayerNormalization: (
        layer_normalization.LayerNormalizationBatchEnsemble
    ),
    keras.layers.PReLU: prelu.PReLUBatchEnsemble,
}
# What has members that are layers by themselves
WITH_MEMBERS = (*COUNTERPARTS.values(), *OWN.values(), bias.BiasBatchEnsemble)
OF_MEMBERS = (TileMembers, AverageMembers)
AVERAGES = ("logits", "outputs", None)
FAST = ("rank", "alpha_initializer", "gamma_initializer")


def to_batch_ensemble(
    model,
    ensemble_size=4,
    *,
    rank=1,
    alpha_initializer="ones",
    gamma_initializer="ones",
    own_normalization=False,
    average="logits",
    share_with=None,
):
    """Makes a BatchEnsemble of M members around the weights of a plain model.

    Each dense layer, einsum layer, convolution, embedding, multi-head attention and
    recurrent layer, also those of a `keras.layers.Bidirectional`, becomes the one of
    this package whose members share the plain layer's kernel W and have fast weights r
    and s and a bias of their own, which starts as the plain one:

        W_m = W ∘ (r_m s_mᵀ),   b_m = b.

    `kzoo.layers.TileMembers` stands before the first of them and shows all members
    the same rows outside training; `kzoo.layers.AverageMembers` at the end averages
    what they predict. In `fit` each batch is split among the members, so that M must
    divide it (`drop_remainder=True`) and each member sees its part of the examples;
    `kzoo.zoo.train` with `members="tile"` shows all to each, and layers of augmentation
    such as `keras.layers.RandomTranslation` then draw apart for each member.

    All else stays as it is: names, other layers and their weights, shared layers,
    nested models, which layers are frozen. With fast weights that start as ones, each
    member computes what the plain model does, until it is trained; see
    `kzoo.layers.batch_ensemble_initializer` for members that start apart.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        model: A built Sequential or functional `keras.Model`. Layers inside of other
            layers, such as `keras.layers.TimeDistributed`, and layers of classes
            derived from Keras's are shared by the members as they are; those with
            kernels are named by a warning.
        ensemble_size: M, the number of members.
        rank: K, how many fast weights are summed in each layer. (Ones start at K W.)
        alpha_initializer: For all r.
        gamma_initializer: For all s.
        own_normalization: Whether members also have batch and layer normalizations of
            their own, with statistics of their own rows, and PReLU's slopes. By default
            they share them.
        average: What the model's outputs are. `"logits"`: the ensemble's are the log
            of the mean of the members' probabilities, over the last axis.
            `"outputs"`: anything whose mean is meant, such as probabilities or a
            regression's. None: no average; the outputs are the members' own,
            member-major, in training and outside; `predict` puts those of one batch
            behind those of the one before.
        share_with: What this function has made of the same model before. Its W are
            those of the new ensemble too: there is one of each, which both read, and
            whoever trains it changes it for both. By default W are copied.

    Returns:
        A `keras.Model`, not compiled.

    Raises:
        ValueError: If an argument is out of range, the model is neither Sequential nor
            functional, no layer has a counterpart, one is stateful, logits are to be
            averaged of a model that does not end in any, or `share_with` is of another
            model.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from kzoo.layers import to_batch_ensemble
    >>> model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    >>> ensemble = to_batch_ensemble(model, ensemble_size=4)
    >>> [type(layer).__name__ for layer in ensemble.layers]
    ['TileMembers', 'DenseBatchEnsemble', 'AverageMembers']
    >>> x = np.ones((2, 5), "float32")
    >>> plain, of_four = (keras.ops.softmax(m(x)) for m in (model, ensemble))
    >>> bool(np.allclose(plain, of_four, atol=1e-6))
    True
    """
    ensemble_size = integer("ensemble_size", ensemble_size)
    rank = integer("rank", rank)
    if average not in AVERAGES:
        raise ValueError(
            f"expected `average` to be one of {AVERAGES}. Received: average={average!r}"
        )
    counterparts = {**COUNTERPARTS, **OWN} if own_normalization else COUNTERPARTS
    fast = {"alpha_initializer": alpha_initializer, "rank": rank}
    fast |= {"gamma_initializer": gamma_initializer}
    # Of recurrent layers, for the recurrent kernel.
    fast |= {f"recurrent_{n}": v for n, v in fast.items() if n != "rank"}

    inputs = new_inputs(model)
    if ensemble_size > 1:
        _check_stateless(model)
    if average == "logits":
        _check_logits(model)
    owners = {} if share_with is None else _pairs(model, share_with)

    def convert(layer):
        made = counterparts.get(type(layer))
        if made is None:
            return None
        config = {**layer.get_config(), **fast, "ensemble_size": ensemble_size}
        found = with_arguments(made, config)
        if share_with is not None and type(layer) in COUNTERPARTS:
            pairs = zip(holders(found), holders(owners[id(layer)]), strict=True)
            for one, other in pairs:
                one.share_with(other)
        return found

    def fill(layer, found):
        for one, other in zip(holders(layer), holders(found), strict=True):
            for weight in one.weights:
                of = getattr(other, "shared", other)
                if weight.name == "bias" or not hasattr(of, weight.name):
                    of = other
                elif of is not other and share_with is not None:
                    continue  # W is there already.
                variable = getattr(of, weight.name)
                value = numpy(weight)
                if variable.shape != weight.shape:
                    value = value[None].repeat(ensemble_size, 0)
                variable.assign(value)

    tiled = {id(x): TileMembers(ensemble_size)(x) for x in keras.tree.flatten(inputs)}

    def call(layer, *args, **kwargs):
        """Calls a layer, of the model's inputs on those of all members."""
        args, kwargs = keras.tree.map_structure(
            lambda x: tiled.get(id(x), x), (args, kwargs)
        )
        return layer(*args, **kwargs)

    def averaged(y):
        names = [one._keras_history[0].name for one in model.outputs]
        name = y._keras_history[0].name
        name = f"average_{name}" if len(set(names)) == len(names) > 1 else None
        return AverageMembers(ensemble_size, average == "logits", name=name)(y)

    if isinstance(model, keras.Sequential):
        made, copied = converted(model, convert, fill, counterparts)
        parts = [inputs, TileMembers(ensemble_size), *made.layers]
        if average is not None:
            parts.append(AverageMembers(ensemble_size, average == "logits"))
        made = keras.Sequential(parts, name=model.name)
    else:
        made, copied = converted(model, convert, fill, counterparts, inputs, call)
        outputs = keras.tree.map_structure(  # An input may be an output.
            lambda y: tiled.get(id(y), y), made.output
        )
        if average is not None:
            outputs = keras.tree.map_structure(averaged, outputs)
        made = keras.Model(inputs, outputs, name=model.name)
    left = [layer for layer in copied if has_plain_kernels(layer, WITH_MEMBERS)]
    if left:
        names = ", ".join(f"{type(w).__name__} {w.name!r}" for w in left)
        warnings.warn(
            "to_batch_ensemble: layers without a counterpart are shared by all members "
            f"as they are: {names}",
            stacklevel=2,
        )
    return made


def _check_logits(model):
    for y in model.outputs:
        layer = output_layer(y)
        no_logits = output_function(layer) in ("softmax", "sigmoid")
        if no_logits or isinstance(layer, MeanAndVariance) or y.shape[-1] == 1:
            raise ValueError(
                "expected `average='outputs'`, or None, for a model that does not end "
                f"in logits of classes. Received: average='logits', and {model.name}, "
                f"whose output {layer.name!r} has shape {tuple(y.shape)} and is of "
                f"{type(layer).__name__}"
            )


def _check_stateless(model):
    for layer in model._flatten_layers():
        if getattr(layer, "stateful", False):
            raise ValueError(
                "expected no recurrent layer that is `stateful`: its state is of a "
                "fixed number of rows, and members have more outside training. "
                f"Received: {type(layer).__name__} {layer.name!r}"
            )


def _pairs(model, made):
    """The layers of an ensemble by the ids of those they were made of."""
    if not isinstance(made, keras.Model):
        raise ValueError(
            f"expected `share_with` to be a keras.Model. Received: share_with={made!r}"
        )
    found = {}
    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        names = {one.name: one for one in made.layers}
        if layer.name not in names:
            raise ValueError(
                "expected `share_with` to have been made of the same model. Received: "
                f"{made.name}, without a layer {layer.name!r}"
            )
        other = names[layer.name]
        if isinstance(layer, keras.Model):
            found |= _pairs(layer, other)
        elif isinstance(layer, keras.layers.Bidirectional):
            for part in ("forward_layer", "backward_layer"):
                found[id(getattr(layer, part))] = getattr(other, part)
        else:
            found[id(layer)] = other
    return found


def from_batch_ensemble(model, member):
    """Makes the plain model that one member of a BatchEnsemble is.

    The inverse of `to_batch_ensemble`: layers with fast weights become Keras's own
    with the member's kernel, W ∘ (r_m s_mᵀ), and bias; `kzoo.layers.TileMembers` and
    `kzoo.layers.AverageMembers` go. A layer of another class becomes what its `member`
    returns for the index, if the class itself defines that method.

    Reference: Wen, Tran, Ba, "BatchEnsemble: an Alternative Approach to Efficient
    Ensemble and Lifelong Learning", 2020. https://arxiv.org/abs/2002.06715

    Args:
        model: A built Sequential or functional `keras.Model` with BatchEnsemble
            layers, such as `to_batch_ensemble` makes.
        member: m, an integer from 0 to M - 1.

    Returns:
        A `keras.Model`, not compiled, that computes in inference what the member does
        for its rows, up to the normalization of logits.

    Raises:
        ValueError: If the model has no such layers, one is stateful, there is no such
            member, or something with members is left: a layer that is not of these, or
            inside of another layer, or `TileMembers` and `AverageMembers` inside of a
            nested Sequential model.

    Example:

    >>> import keras
    >>> from kzoo.layers import DenseBatchEnsemble, TileMembers, from_batch_ensemble
    >>> layers = [keras.Input((5,)), TileMembers(4), DenseBatchEnsemble(3)]
    >>> plain = from_batch_ensemble(keras.Sequential(layers), member=2)
    >>> [type(layer).__name__ for layer in plain.layers]
    ['Dense']
    """

    def convert(layer):
        has_members = type(layer) in WITH_MEMBERS or "member" in vars(type(layer))
        return layer.member(member) if has_members else None

    def fill(layer, found):
        """Does nothing: the layer was made with its weights."""

    def call(layer, *args, **kwargs):
        if isinstance(layer, OF_MEMBERS):
            return args[0]
        return layer(*args, **kwargs)

    new_inputs(model)  # Or it raises.
    _check_stateless(model)
    if isinstance(model, keras.Sequential):
        made, _ = converted(model, convert, fill, WITH_MEMBERS)
        kept = [layer for layer in made.layers if not isinstance(layer, OF_MEMBERS)]
        made = keras.Sequential([new_inputs(model), *kept], name=model.name)
    else:
        made, _ = converted(model, convert, fill, WITH_MEMBERS, call=call)
    left = [x for x in made._flatten_layers() if getattr(x, "ensemble_size", 1) != 1]
    if left:
        raise ValueError(
            "expected layers of members whose members are Keras's, not inside of other "
            "layers or of Sequential models. Received: "
            f"{', '.join(f'{type(x).__name__} {x.name!r}' for x in left)}"
        )
    return made
