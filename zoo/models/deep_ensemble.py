"""Deep ensembles: networks trained apart, as one model."""

import keras
import numpy as np
from keras import ops

from ...layers import AverageMembers
from ...layers.conversion import new_inputs
from ...layers.ops.arguments import integer
from ...layers.ops.batch_ensemble import check_rows, split_members
from ..predictive import check_logits, ensemble_size
from ..registry import build


def deep_ensemble(networks, members=None, *, name="deep_ensemble"):
    """Builds an ensemble of networks that share nothing.

    With z_m the logits of network m of M, the ensemble's are

        log p = log (1/M) sum_m softmax(z_m).

    It keeps to the conventions of `kzoo.layers.AverageMembers`, as BatchEnsembles do: a
    training batch is member-major, its first rows for network 0 and so on, and the loss
    of the output is the mean of the members'; outside of training every network sees
    all rows. So `fit`, `kzoo.zoo.train` with `members="split"` or `"tile"`,
    `kzoo.zoo.evaluate`, `kzoo.zoo.export` and `kzoo.zoo.diversity_report` work, and
    the exported SavedModel is one.

    Networks that `fit` trains together are trained as if apart: the gradients of
    network m are those of its own mean loss, and not the M-th part of them, so that
    penalties on its weights count as much as they would if it stood alone. (An
    optimizer that clips by the norm of all gradients sees those of all networks.)

    Reference: Lakshminarayanan, Pritzel, Blundell, "Simple and Scalable Predictive
    Uncertainty Estimation using Deep Ensembles", 2017. https://arxiv.org/abs/1612.01474

    Args:
        networks: What builds one network: the name of a registered model, or a
            function without arguments. It is called M times; networks differ because
            initializers that have no seed draw anew. Or a list of built networks,
            trained or not, which the ensemble shares, and does not copy.
        members: M, unless a list is given.
        name: Name of the model.

    Returns:
        A `keras.Model` with the networks' inputs, to logits.

    Raises:
        ValueError: If networks have other inputs or outputs than the first, end in
            anything but logits, are ensembles themselves, or are equal.

    Example:

    >>> from kzoo.zoo.models.deep_ensemble import deep_ensemble
    >>> from kzoo.zoo.predictive import ensemble_size
    >>> model = deep_ensemble("resnet8_digits", 4)
    >>> ensemble_size(model), model.count_params()  # 4 times 78,426
    (4, 313704)
    """
    if isinstance(networks, (list, tuple)):
        if members not in (None, len(networks)):
            raise ValueError(
                "expected a list of networks, or what builds one and `members`. "
                f"Received: {len(networks)} networks and members={members!r}"
            )
        networks = list(networks)
    else:
        members = integer("members", members)
        make = networks
        if isinstance(networks, str):
            make = lambda: build(networks)  # noqa: E731
        networks = [make() for _ in range(members)]
    _check(networks)
    inputs = new_inputs(networks[0])
    x = MemberNetworks(networks, name="networks")(inputs)
    x = AverageMembers(len(networks), name="average_members")(x)
    return keras.Model(inputs, x, name=name)


@keras.saving.register_keras_serializable(package="kzoo")
class MemberNetworks(keras.layers.Layer):
    """M networks on one batch, which is split among them in training.

    Args:
        networks: List of M built models of one input and output shape.
        **kwargs: `keras.layers.Layer`'s arguments.
    """

    def __init__(self, networks, **kwargs):
        super().__init__(autocast=False, **kwargs)  # The networks see to that.
        self.networks = list(networks)

    def build(self, input_shape):
        """Nothing is to be made: the networks are built."""

    def call(self, inputs, training=False):
        """Returns member-major outputs, of M times the rows outside training."""
        members, batches = len(self.networks), [inputs] * len(self.networks)
        if training:
            split = keras.tree.map_structure(
                lambda x: split_members(x, members), inputs
            )
            batches = [
                keras.tree.map_structure(lambda x, m=m: x[m], split)
                for m in range(members)
            ]
        outputs = ops.concatenate(
            [
                network(batch, training=training)
                for network, batch in zip(self.networks, batches, strict=True)
            ]
        )
        if training:
            # The mean over the members' rows takes 1/M of each gradient; M times is
            # what it would be if the network stood alone.
            outputs += (members - 1) * (outputs - ops.stop_gradient(outputs))
        return outputs

    def compute_output_spec(self, inputs, training=False):
        """Returns the output's symbolic tensor."""
        (rows,) = {x.shape[0] for x in keras.tree.flatten(inputs)}
        members = len(self.networks)
        if training:
            check_rows(rows, members)
        elif rows is not None:
            rows *= members
        output = self.networks[0].outputs[0]
        return keras.KerasTensor((rows, *output.shape[1:]), dtype=output.dtype)

    def get_config(self):
        """Returns the constructor's arguments."""
        networks = [keras.saving.serialize_keras_object(n) for n in self.networks]
        return {**super().get_config(), "networks": networks}

    @classmethod
    def from_config(cls, config):
        """Makes a layer from what `get_config` returns."""
        networks = [
            keras.saving.deserialize_keras_object(n) for n in config["networks"]
        ]
        return cls(**{**config, "networks": networks})


def _inputs(network):
    """The inputs of a network as it takes them."""
    is_sequential = isinstance(network, keras.Sequential)
    return network.inputs[0] if is_sequential else network.input


def _check(networks):
    """Raises ValueError unless the networks make an ensemble."""
    if not networks or not all(getattr(n, "inputs", None) for n in networks):
        raise ValueError(
            "expected built Sequential or functional models. Received: "
            f"{[type(n).__name__ for n in networks]}"
        )
    for network in networks:
        check_logits(network)
        if ensemble_size(network) > 1:
            raise ValueError(
                "expected networks, not ensembles of them. Received: "
                f"{network.name!r} of {ensemble_size(network)} members"
            )
        kinds = [
            keras.tree.map_structure(
                lambda x: (x.shape, x.dtype), (_inputs(n), n.outputs)
            )
            for n in (networks[0], network)
        ]
        if kinds[0] != kinds[1]:
            raise ValueError(
                "expected networks with the inputs and outputs of the first. Received: "
                f"{kinds[1]} after {kinds[0]}"
            )
    weights = [[ops.convert_to_numpy(w) for w in n.weights] for n in networks]
    for i, mine in enumerate(weights):
        for others in weights[:i]:
            if len(mine) == len(others) and all(map(np.array_equal, mine, others)):
                raise ValueError(
                    "expected networks that differ: initializers with a seed give the "
                    f"same weights each time. Received: {networks[i].name!r} twice"
                )
