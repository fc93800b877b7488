"""Figures of classifiers: how far to trust their confidence, and where they doubt."""

import io
from pathlib import Path

import numpy as np

from . import placing

BINS = 15  # as the metric ExpectedCalibrationError has by default

BLUE, PALE, RED = "#3b6fb6", "#a9c6ea", "#d1495b"
GREEN, GREY, INK = "#2a9d6f", "#9aa3ad", "#22272e"
CURVES = [BLUE, RED, GREEN, INK, GREY, PALE]
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def reliability(labels, probabilities, bins=BINS):
    """Returns what a reliability diagram shows, bin by bin of the confidence.

    With confidence conf_n = max_c p_n(c), bin b holds the examples with
    b/B < conf_n <= (b+1)/B, as in the metric ExpectedCalibrationError, so that

        ECE = sum_b (count_b / N) |accuracy_b - confidence_b|.

    Args:
        labels: Class indices, `[N]`.
        probabilities: Probabilities, `[N, C]`.
        bins: B, the number of bins.

    Returns:
        count, confidence, accuracy: arrays `[B]`; the two means are NaN in an
        empty bin.

    Example:

    >>> from kzoo.zoo.figures import reliability
    >>> count, confidence, accuracy = reliability(
    ...     [0, 1], [[0.75, 0.25], [0.75, 0.25]], bins=2)
    >>> count.tolist(), confidence.tolist(), accuracy.tolist()
    ([0, 2], [nan, 0.75], [nan, 0.5])
    """
    labels, probabilities = _checked(labels, probabilities)
    conf = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    edges = (np.arange(1, bins) / bins).astype(conf.dtype)
    bin_of = np.searchsorted(edges, conf, side="left")
    count = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(bin_of, weights=conf, minlength=bins) / count
        accuracy = np.bincount(bin_of, weights=right, minlength=bins) / count
    return count, confidence, accuracy


def draw(path, images, labels, answers, digits=8):
    """Draws reliability diagrams and the examples the last model doubts most.

    Args:
        path: The PNG to write; it appears whole or not at all.
        images: Grey images, `[N, H, W, 1]`.
        labels: Class indices, `[N]`.
        answers: {title: answer of a model}, in the order of drawing. An answer has
            arrays `probabilities` `[N, C]`, `member_probabilities` `[N, M, C]` and
            `predictive_entropy` `[N]`.
        digits: How many of the most uncertain examples to show.

    Returns:
        The path, as a Path.
    """
    import matplotlib
    from matplotlib.figure import Figure

    labels = np.asarray(labels)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.5, 9.6), dpi=130, facecolor="white")
        top, bottom = figure.subfigures(2, 1, height_ratios=[1.12, 1])
        panels = top.subplots(
            2,
            len(answers),
            sharex=True,
            squeeze=False,
            height_ratios=[4, 1],
            gridspec_kw=dict(
                left=0.07, right=0.985, top=0.83, bottom=0.105, hspace=0.1, wspace=0.16
            ),
        )
        for column, (title, answer) in zip(panels.T, answers.items(), strict=True):
            _reliability_diagram(*column, title, labels, answer["probabilities"])
        _heading(
            top,
            f"Is the confidence right?  {len(labels)} test examples",
            _reliability_legend(),
        )
        *others, (title, doubting) = answers.items()
        _most_uncertain(bottom, images, labels, title, doubting, others, digits)
        _save(figure, path)
    return Path(path)


def risk_coverage(labels, probabilities):
    """Returns what a risk-coverage curve shows: errors among the surest predictions.

    For each threshold τ on the confidence conf_n = max_c p_n(c), from high to low,

        coverage(τ) = |{n : conf_n >= τ}| / N,
        risk(τ) = |{n : conf_n >= τ, wrong}| / |{n : conf_n >= τ}|.

    The metric `kzoo.zoo.metrics.AreaUnderRiskCoverage` is the area below.

    Args:
        labels: Class indices, `[N]`.
        probabilities: Probabilities, `[N, C]`.

    Returns:
        coverage, risk: arrays with one entry for each distinct confidence.

    Example:

    >>> from kzoo.zoo.figures import risk_coverage
    >>> probabilities = [[0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.8, 0.2]]
    >>> coverage, risk = risk_coverage([0, 1, 1, 0], probabilities)
    >>> coverage.tolist(), risk.tolist()
    ([0.25, 0.5, 1.0], [0.0, 0.0, 0.5])
    """
    labels, probabilities = _checked(labels, probabilities)
    conf = probabilities.max(axis=1)
    wrong = probabilities.argmax(axis=1) != labels
    order = np.argsort(-conf, kind="stable")
    last_of_equals = np.append(np.diff(conf[order]) != 0, True)
    answered = np.flatnonzero(last_of_equals) + 1
    errors = np.cumsum(wrong[order])[last_of_equals]
    return answered / len(labels), errors / answered


def draw_risk_coverage(path, labels, answers):
    """Draws the risk-coverage curves of models.

    Args:
        path: The PNG to write; it appears whole or not at all.
        labels: Class indices, `[N]`.
        answers: {title: answer of a model}, each with an array `probabilities`
            `[N, C]`.

    Returns:
        The path, as a Path.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.4), dpi=130, facecolor="white")
        axes = figure.subplots(gridspec_kw=dict(left=0.11, right=0.97, bottom=0.12))
        axes.set_prop_cycle(color=CURVES)
        for title, answer in answers.items():
            coverage, risk = risk_coverage(labels, answer["probabilities"])
            # Among equal confidences errors come evenly.
            c = (np.arange(20_000) + 0.5) / 20_000
            errors = np.interp(c, np.append(0, coverage), np.append(0, coverage * risk))
            label = f"{title}: area {np.mean(errors / c):.4f}"
            axes.plot(c, errors / c, lw=1.6, label=label)
        axes.set(xlim=(0, 1), xlabel="coverage: share of examples answered")
        axes.set(ylabel="risk: share of answers that are wrong")
        axes.set_ylim(bottom=0)
        axes.set_title(f"Does it know when it is wrong?  {len(labels)} test examples")
        axes.legend(frameon=False)
        _save(figure, path)
    return Path(path)


def draw_diversity(path, report):
    """Draws how an ensemble's members differ.

    Args:
        path: The PNG to write; it appears whole or not at all.
        report: A `kzoo.zoo.diversity.Diversity`.

    Returns:
        The path, as a Path.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        columns = 4 if report.fast_weights else 3
        figure = Figure((3.6 * columns, 3.9), dpi=130, layout="constrained")
        figure.suptitle(
            f"How do {report.members} members differ?  {report.examples:,} examples",
            weight="bold",
        )
        panels = figure.subplots(1, columns)
        _pairs(panels[0], report.disagreement, "share of examples\npairs disagree on")
        _pairs(panels[1], report.similarity, "cosine of functions\n(log-probabilities)")
        _decomposition(panels[2], report)
        if report.fast_weights:
            _fast_weights(panels[3], report.fast_weights)
        _save(figure, path)
    return Path(path)


def _pairs(axes, matrix, title):
    """A square for each pair of members, with its number if there is room."""
    axes.imshow(matrix, cmap="Blues")
    axes.set(xticks=range(len(matrix)), yticks=range(len(matrix)), xlabel="member")
    axes.set_title(title)
    if len(matrix) > 8:
        axes.set(xticks=[], yticks=[])
        return
    middle = (matrix.min() + matrix.max()) / 2
    for (i, j), number in np.ndenumerate(matrix):
        color = "white" if number > middle else INK
        axes.text(j, i, f"{number:.3f}", ha="center", va="center", color=color)


def _decomposition(axes, report):
    """The members' mean loss as the ensemble's and what their differences gain."""
    ensemble = np.array([report.ensemble_nll, report.ensemble_brier])
    gained = np.array([report.ambiguity, report.variance])
    names = ["NLL, nats", "Brier score"]
    axes.bar(names, ensemble, 0.6, color=BLUE, label="ensemble")
    axes.bar(names, gained, 0.6, ensemble, color=PALE, label="ambiguity, variance")
    for x, members in enumerate((report.nll, report.brier)):
        axes.scatter(np.full(len(members), x), members, 14, color=INK, zorder=3)
    axes.scatter([], [], 14, color=INK, label="each member")
    axes.set_ylim(bottom=0)
    axes.set_title("members' mean loss =\nensemble's + differences")
    axes.legend(frameon=False)


def _fast_weights(axes, fast_weights):
    """For each layer the cosines of all pairs, and their mean."""
    for row, cosine in enumerate(fast_weights.values()):
        found = cosine[np.triu_indices(len(cosine), 1)]
        axes.scatter(found, np.full(len(found), row), 12, color=PALE)
        axes.scatter(found.mean(), row, 18, color=INK)
    axes.set_yticks(range(len(fast_weights)), fast_weights, fontsize=7)
    axes.invert_yaxis()
    axes.set_title("cosine of fast weights,\nall pairs and mean")


def _checked(labels, probabilities):
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise ValueError(
            "Expected labels [N] and probabilities [N, C]. Received: shapes "
            f"{labels.shape} and {probabilities.shape}"
        )
    return labels, probabilities


def _save(figure, path):
    """Writes a figure as PNG, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    placing.write(path, image.getvalue())


def _reliability_diagram(axes, histogram, title, labels, probabilities):
    count, confidence, accuracy = reliability(labels, probabilities)
    full = count > 0
    count, confidence, accuracy = count[full], confidence[full], accuracy[full]
    middle, width = (np.flatnonzero(full) + 0.5) / BINS, 0.88 / BINS
    ece = np.sum(count * abs(accuracy - confidence)) / len(labels)
    share = np.sum(count * accuracy) / len(labels)

    axes.plot([0, 1], [0, 1], color=GREY, lw=1, ls=(0, (4, 3)), zorder=1)
    both = np.minimum(accuracy, confidence)
    axes.bar(middle, both, width, color=BLUE, zorder=2)
    axes.bar(middle, accuracy - both, width, both, color=PALE, zorder=2)
    axes.bar(middle, confidence - both, width, both, color=RED, alpha=0.55, zorder=2)
    axes.vlines(middle, *_wilson(accuracy, count), color=INK, lw=1, zorder=3)
    axes.scatter(middle, accuracy, s=12, color=INK, zorder=4)
    axes.set(xlim=(0, 1), ylim=(0, 1.03), ylabel="accuracy")
    axes.set_title(title, pad=20)
    axes.text(
        0,
        1.025,
        f"accuracy {share:.4f}    expected calibration error {ece:.4f}",
        transform=axes.transAxes,
        va="bottom",
    )

    histogram.bar(middle, count, width, color=GREY)
    histogram.set(yscale="log", ylim=(0.6, 4 * len(labels)), xlabel="confidence")
    histogram.set_ylabel("examples")
    histogram.minorticks_off()
    for x, n in zip(middle, count, strict=True):
        histogram.text(x, n * 1.15, str(n), ha="center", va="bottom", fontsize=7)


def _reliability_legend():
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    dot = dict(color=INK, marker="o", ms=3.5, lw=1)
    return [
        Line2D([], [], **dot, label="accuracy in the bin, 95 % interval"),
        Patch(color=RED, alpha=0.55, label="gap: too sure"),
        Patch(color=PALE, label="gap: not sure enough"),
    ]


def _most_uncertain(figure, images, labels, title, answer, others, digits):
    """One column an example: the image, and below it the probabilities."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entropy = np.asarray(answer["predictive_entropy"])
    worst = np.argsort(-entropy, kind="stable")[:digits]
    classes = answer["probabilities"].shape[1]
    members = answer["member_probabilities"].shape[1]
    panels = figure.subplots(
        2,
        len(worst),
        squeeze=False,
        height_ratios=[1, 1.55],
        gridspec_kw=dict(
            left=0.035, right=0.985, top=0.80, bottom=0.085, hspace=0.08, wspace=0.22
        ),
    )
    rows = np.arange(classes)
    for column, (picture, bars), n in zip(
        range(len(worst)), panels.T, worst, strict=True
    ):
        picture.imshow(np.squeeze(images[n]), cmap="gray_r", interpolation="nearest")
        picture.set(xticks=[], yticks=[])
        for spine in picture.spines.values():
            spine.set(visible=True, color=GREY)
        mean = answer["probabilities"][n]
        said = int(np.argmax(mean))
        picture.set_title(
            f"is {labels[n]}, said {said}\nentropy {entropy[n]:.2f} nats",
            fontsize=8.5,
            weight="normal",
            loc="center",
            color=INK if said == labels[n] else RED,
        )
        colors = [GREEN if c == labels[n] else BLUE for c in rows]
        bars.barh(rows, mean, 0.72, color=colors, alpha=0.8, zorder=2)
        if members > 1:
            for p in answer["member_probabilities"][n]:
                bars.scatter(p, rows, s=9, color=INK, alpha=0.75, lw=0, zorder=4)
        for _, other in others:
            bars.scatter(
                other["probabilities"][n],
                rows,
                s=26,
                marker="D",
                facecolor="none",
                edgecolor=RED,
                lw=1,
                zorder=3,
            )
        bars.set(xlim=(-0.04, 1.04), ylim=(classes - 0.4, -0.6), xticks=[0, 0.5, 1])
        bars.set_xticklabels(["0", "½", "1"])
        bars.set_yticks(rows, rows if column == 0 else [""] * classes)
        bars.tick_params(length=0)
        bars.grid(axis="x", color=GREY, alpha=0.35, lw=0.6, zorder=0)
    handles = [
        Patch(color=GREEN, alpha=0.8, label="true class"),
        Patch(color=BLUE, alpha=0.8, label="other classes"),
    ]
    if members > 1:
        handles.append(
            Line2D([], [], ls="", marker="o", ms=3.5, color=INK, label="each member")
        )
    handles += [
        Line2D([], [], ls="", marker="D", ms=5, mfc="none", mec=RED, label=other)
        for other, _ in others
    ]
    _heading(figure, f"Where does it doubt?  {title}", handles)


def _heading(figure, text, handles):
    figure.text(0.012, 0.965, text, va="center", fontsize=12.5, weight="bold")
    figure.legend(
        handles=handles,
        loc="center right",
        bbox_to_anchor=(0.995, 0.965),
        ncols=len(handles),
        columnspacing=1.4,
        handlelength=1.6,
        frameon=False,
        fontsize=8.5,
    )


def _wilson(share, count, z=1.96):
    """The 95 % interval of a share of `count` (Wilson's score interval)."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = (
        z
        / (1 + z**2 / count)
        * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    )
    return middle - half, middle + half
