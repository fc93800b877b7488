"""How much an ensemble's members differ, and what that is worth."""

from dataclasses import dataclass, field

import keras
import numpy as np

from ..layers.batch_ensemble.base import BatchEnsembleLayer

TINY = float(np.finfo("float32").tiny)


@dataclass(frozen=True)
class Diversity:
    """What `diversity_report` finds. As text, a table.

    With p_nm(c) the probability that member m of M gives to class c for example n of N,
    p_n their mean and y_n the label:

    Attributes:
        members: M.
        examples: N.
        disagreement: `[M, M]`, the share of the examples for which two members say
            different classes.
        similarity: `[M, M]`, the cosine between two members' functions, that is, their
            log p_nm(c) less the mean over c, for all n and c: what is left of logits
            when numbers that do not change probabilities are taken out.
        accuracy: `[M]`, the members', and `ensemble_accuracy` that of p.
        nll: `[M]`, the members' negative log-likelihoods -(1/N) sum_n log p_nm(y_n), in
            nats, and `ensemble_nll` that of p.
        brier: `[M]`, the members' Brier scores, and `ensemble_brier` that of p.
        variance: (1/N) sum_n sum_c of the variance of p_nm(c) over the members.
        fast_weights: {layer: `[M, M]`}, the cosine between two members' fast weights
            in a BatchEnsemble layer, as the matrices sum_k r_k s_kᵀ that its kernel is
            multiplied by.
    """

    members: int
    examples: int
    disagreement: np.ndarray
    similarity: np.ndarray
    accuracy: np.ndarray
    ensemble_accuracy: float
    nll: np.ndarray
    ensemble_nll: float
    brier: np.ndarray
    ensemble_brier: float
    variance: float
    fast_weights: dict = field(default_factory=dict)

    @property
    def ambiguity(self):
        """The members' mean NLL less the ensemble's: never below 0, by Jensen."""
        return float(np.mean(self.nll)) - self.ensemble_nll

    def figures(self):
        """Returns a dict of numbers: means over members, or over pairs of them."""
        return {
            "members": self.members,
            "examples": self.examples,
            "disagreement": _of_pairs(self.disagreement).mean(),
            "similarity": _of_pairs(self.similarity).mean(),
            "member_accuracy": float(np.mean(self.accuracy)),
            "ensemble_accuracy": self.ensemble_accuracy,
            "member_nll": float(np.mean(self.nll)),
            "ambiguity": self.ambiguity,
            "ensemble_nll": self.ensemble_nll,
            "member_brier": float(np.mean(self.brier)),
            "variance": self.variance,
            "ensemble_brier": self.ensemble_brier,
            **{
                f"fast_weights/{name}": _of_pairs(cosine).mean()
                for name, cosine in self.fast_weights.items()
            },
        }

    def __str__(self):
        parts = [
            ("accuracy", self.accuracy, None, self.ensemble_accuracy),
            ("NLL", self.nll, f"ambiguity {self.ambiguity:.4f}", self.ensemble_nll),
            ("Brier", self.brier, f"variance {self.variance:.4f}", self.ensemble_brier),
        ]
        lines = [
            f"{self.members} members, {self.examples:,} examples",
            _line("pairs that disagree", self.disagreement),
            _line("cosine of functions", self.similarity),
        ]
        for name, members, difference, ensemble in parts:
            equals = f" - {difference} =" if difference else ","
            lines.append(
                f"{name:20} members {np.mean(members):.4f}{equals} "
                f"ensemble {ensemble:.4f}"
            )
        if self.fast_weights:
            lines.append("cosine of fast weights")
        width = max(map(len, self.fast_weights), default=0)
        for name, cosine in self.fast_weights.items():
            lines.append(_line(f"  {name:{width}}", cosine))
        return "\n".join(lines)


def diversity_report(
    model,
    dataset="digits",
    split="test",
    *,
    samples=None,
    batch_size=256,
    data_dir=None,
):
    """Measures how an ensemble's members differ on a data set.

    The ensemble's mean probability p does better than its members on the average, by
    just as much as they differ:

        (1/M) sum_m NLL(p_m) = NLL(p) + ambiguity,    ambiguity >= 0,
        (1/M) sum_m Brier(p_m) = Brier(p) + variance,

    the second with the variance of the members' probabilities, and so without labels.

    References: Krogh, Vedelsby, "Neural Network Ensembles, Cross Validation, and Active
    Learning", 1994, for the decomposition; Fort, Hu, Lakshminarayanan, "Deep Ensembles:
    A Loss Landscape Perspective", 2019, https://arxiv.org/abs/1912.02757, for
    disagreement and cosines.

    Args:
        model: An ensemble, as `kzoo.zoo.evaluate` takes it.
        dataset: Name of a data set, as `kzoo.zoo.load` takes it.
        split: Which examples.
        samples: None; or K, for draws in place of members, likewise.
        batch_size: Number of examples that are predicted at a time.
        data_dir: Folder of the data sets.

    Returns:
        `kzoo.zoo.diversity.Diversity`, of the members as they are: a temperature behind
        them plays no part. `kzoo.zoo.figures.draw_diversity` draws it.

    Raises:
        ValueError: If the model has one member, or as `kzoo.zoo.evaluate` raises it.

    Example:

    >>> from kzoo.zoo import build, diversity_report
    >>> ensemble = build("resnet8_batch_ensemble_digits")
    >>> report = diversity_report(ensemble, split="validation")
    >>> print(report)  # doctest: +ELLIPSIS
    4 members, 180 examples
    pairs that disagree ...
    """
    from .training.evaluate import answers

    batches = answers(model, dataset, split, samples, batch_size, data_dir)
    sums = [_sums(outputs["member_probabilities"], y) for y, outputs in batches]
    fast_weights = {}
    if isinstance(model, keras.Model):
        fast_weights = fast_weight_similarity(model)
    return _report(sums, fast_weights)


def measure_diversity(member_probabilities, labels):
    """Measures how members differ, as `diversity_report`, from their predictions.

    Args:
        member_probabilities: `[N, M, C]`.
        labels: Class indices, `[N]`.

    Returns:
        `kzoo.zoo.diversity.Diversity`, without fast weights.

    Raises:
        ValueError: If the shapes do not fit, or there is one member.

    Example:

    >>> from kzoo.zoo.diversity import measure_diversity
    >>> two = [[[0.9, 0.1], [0.6, 0.4]], [[0.8, 0.2], [0.3, 0.7]]]
    >>> report = measure_diversity(two, labels=[0, 1])
    >>> report.disagreement.tolist(), round(report.variance, 4)
    ([[0.0, 0.5], [0.5, 0.0]], 0.085)
    """
    return _report([_sums(member_probabilities, labels)], {})


def fast_weight_similarity(model):
    """Returns the cosines between members' fast weights, layer by layer.

    Member m's kernel is the shared one times, entry by entry, F_m = sum_k r_mk s_mkᵀ,
    of which a depthwise or grouped convolution has the entries of its kernel alone. The
    cosine between two members is that between their F, as vectors. Of a separable
    convolution, which has two kernels, F is taken as from input to output channels.

    Args:
        model: A `keras.Model`.

    Returns:
        dict from the paths of the BatchEnsemble layers, and of the recurrent kernels of
        recurrent ones, to arrays `[M, M]`; empty if there are none.

    Example:

    >>> import keras
    >>> from kzoo.layers import DenseBatchEnsemble
    >>> from kzoo.zoo.diversity import fast_weight_similarity
    >>> layer = DenseBatchEnsemble(3, ensemble_size=2, name="dense")  # All are ones.
    >>> x = keras.Input((5,))
    >>> cosines = fast_weight_similarity(keras.Model(x, layer(x)))
    >>> cosines["dense"].round(3).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    places = {id(variable): i for i, variable in enumerate(model.variables)}
    layers = [x for x in model._flatten_layers() if isinstance(x, BatchEnsembleLayer)]
    found = {}
    for layer in sorted(layers, key=lambda layer: places[id(layer.weights[0])]):
        parts = {layer.path: layer._fast_weights()}
        if hasattr(layer, "recurrent_alpha"):
            recurrent = layer.recurrent_alpha, layer.recurrent_gamma
            parts[f"{layer.path}/recurrent"] = recurrent
        for name, fast in parts.items():
            f = [layer._scale(m, *fast).ravel() for m in range(layer.ensemble_size)]
            f = np.array(f, "float64")
            found[name] = _cosine(f @ f.T)
    return found


def _sums(probs, labels):
    """What `_report` needs of a batch, all of it sums over examples."""
    probs, labels = np.asarray(probs, "float64"), np.asarray(labels)
    if probs.ndim != 3 or labels.shape != probs.shape[:1]:
        raise ValueError(
            "expected member probabilities [N, M, C] and labels [N]. Received: shapes "
            f"{probs.shape} and {labels.shape}"
        )
    classes = probs.shape[2]
    if labels.dtype.kind not in "iu" or not ((0 <= labels) & (labels < classes)).all():
        raise ValueError(
            f"expected labels from 0 to {classes - 1}. Received: {np.unique(labels)}"
        )
    mean, one_hot = probs.mean(1), np.eye(classes)[labels]
    log_probs = np.log(np.maximum(probs, TINY))
    functions = log_probs - log_probs.mean(-1, keepdims=True)
    said = probs.argmax(-1)
    of_label = np.take_along_axis(probs, labels[:, None, None], 2)[..., 0]
    return {
        "examples": len(labels),
        "differ": (said[:, :, None] != said[:, None]).sum(0),
        "gram": np.einsum("nmc,nkc->mk", functions, functions),
        "right": (said == labels[:, None]).sum(0),
        "ensemble_right": (mean.argmax(-1) == labels).sum(),
        "nll": -np.log(np.maximum(of_label, TINY)).sum(0),
        "ensemble_nll": -np.log(np.maximum(of_label.mean(1), TINY)).sum(),
        "brier": np.square(probs - one_hot[:, None]).sum((0, 2)),
        "ensemble_brier": np.square(mean - one_hot).sum(),
        "variance": probs.var(1).sum(),
    }


def _report(batches, fast_weights):
    sums = {name: sum(batch[name] for batch in batches) for name in batches[0]}
    n = sums["examples"]
    members = len(sums["right"])
    if members < 2:
        raise ValueError(
            "expected an ensemble of at least 2 members. Received: a model of one"
        )
    return Diversity(
        members=members,
        examples=n,
        disagreement=sums["differ"] / n,
        similarity=_cosine(sums["gram"]),
        accuracy=sums["right"] / n,
        ensemble_accuracy=float(sums["ensemble_right"] / n),
        nll=sums["nll"] / n,
        ensemble_nll=float(sums["ensemble_nll"] / n),
        brier=sums["brier"] / n,
        ensemble_brier=float(sums["ensemble_brier"] / n),
        variance=float(sums["variance"] / n),
        fast_weights=fast_weights,
    )


def _cosine(gram):
    """Returns the cosines between vectors, from their inner products."""
    norms = np.sqrt(np.diag(gram))
    return gram / np.maximum(norms[:, None] * norms, TINY)


def _of_pairs(matrix):
    """Returns the entries above the diagonal."""
    return matrix[np.triu_indices(len(matrix), 1)]


def _line(name, matrix):
    pairs = _of_pairs(matrix)
    return f"{name:20} {pairs.mean():.4f}, from {pairs.min():.4f} to {pairs.max():.4f}"
