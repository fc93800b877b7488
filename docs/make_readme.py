"""Writes the parts of README.md that are measured or generated.

    python docs/make_readme.py            # rewrites them
    python docs/make_readme.py --check    # fails if they are out of date

Each part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. The
catalogue comes from the package's own indexes, the figures from the JSON lines
under benchmarks/results, and what the quickstart printed from docs/quickstart.txt,
which `make quickstart-output` writes.
"""

import argparse
import inspect
import re
import sys
from pathlib import Path

import numpy as np

import kzoo.layers
import kzoo.optimizers
import kzoo.zoo
from kzoo.zoo import losses, metrics, registry, results

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def public(index):
    """Returns the classes and functions that an index module exports, by name."""
    return {
        name: item
        for name, item in sorted(vars(index).items())
        if getattr(item, "__module__", "").startswith(f"{index.__name__}.")
    }


def purpose(item):
    """Returns the first sentence of a docstring, on one line."""
    text = inspect.getdoc(item).split("\n\n")[0]
    return " ".join(text.split())


def catalogue():
    """Returns the tables of layers, optimizers, losses, metrics, models."""
    lines = []
    for title, index in (
        ("layers", kzoo.layers),
        ("optimizers", kzoo.optimizers),
        ("zoo.losses", losses),
        ("zoo.metrics", metrics),
    ):
        lines += [f"| `kzoo.{title}` | |", "|---|---|"]
        for name, item in public(index).items():
            lines.append(f"| `{name}` | {purpose(item)} |")
        lines.append("")
    lines += ["| `kzoo.zoo` | |", "|---|---|"]
    for name in kzoo.zoo.__all__:
        item = getattr(kzoo.zoo, name)
        if hasattr(item, "get_config"):  # What a saved model's file refers to.
            lines.append(f"| `{name}` | {purpose(item)} |")
    lines += ["", "| `kzoo.zoo.build(...)` | |", "|---|---|"]
    for name in registry.list_models():
        lines.append(f"| `{name}` | {registry.info(name).description} |")
    return "\n".join(lines)


def spread(values, digits):
    """Returns mean ± standard deviation over seeds."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def digits_table():
    """Returns the test figures of the pretrained models over seeds."""
    records = results.read(ROOT / "benchmarks/results/digits.jsonl")
    lines = [
        "| model | accuracy | NLL | Brier | ECE | parameters | training, s | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted({record["model"] for record in records}):
        runs = [record for record in records if record["model"] == name]
        test = [run["test"] for run in runs]
        cells = [
            spread([figures[key] for figures in test], 4)
            for key in ("accuracy", "nll", "brier", "ece")
        ]
        cells += [
            f"{runs[0]['parameters']:,}",
            spread([run["seconds"] for run in runs], 0),
            ", ".join(str(seed) for seed in sorted(run["seed"] for run in runs)),
        ]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    ensemble, single = (
        {
            key: np.mean([r["test"][key] for r in records if r["model"] == name])
            for key in ("accuracy", "nll")
        }
        for name in ("resnet8_batch_ensemble_digits", "resnet8_digits")
    )
    bars = {
        "the ensemble's mean accuracy is at least 0.985": ensemble["accuracy"] >= 0.985,
        "its mean NLL is at most the single network's": ensemble["nll"]
        <= single["nll"],
    }
    lines.append("")
    for bar, met in bars.items():
        lines.append(f"- Bar: {bar}: {'met' if met else '**missed**'}.")
    return "\n".join(lines)


def speed_table():
    """Returns the newest ratio of each claim of benchmarks/step_time.py."""
    newest = {
        record["claim"]: record
        for record in results.read(ROOT / "benchmarks/results/step_time.jsonl")
    }
    lines = [
        "| train step | ms | peer | its ms | ratio (quartiles) | bar |",
        "|---|---|---|---|---|---|",
    ]
    for claim, r in newest.items():
        low, high = r["ratio_quartiles"]
        bar = "none"
        if r["bar"]:
            bar = f"{r['bar']}, {'met' if r['ratio'] <= r['bar'] else '**missed**'}"
        lines.append(
            f"| `{claim}` | {r['milliseconds']:.2f} | {r['peer']} | "
            f"{r['peer_milliseconds']:.2f} | {r['ratio']:.3f} ({low:.3f}–{high:.3f}) | "
            f"{bar} |"
        )
    return "\n".join(lines)


def variance_table():
    """Returns the fits of benchmarks/flipout_variance.py, over seeds."""
    records = results.read(ROOT / "benchmarks/results/flipout_variance.jsonl")
    lines = [
        "| data | network | σ | slope of log variance by log N | c / c of a shared "
        "perturbation | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for data, name in sorted({(r["data"], r["network"]) for r in records}):
        runs = [r for r in records if (r["data"], r["network"]) == (data, name)]
        cells = [
            spread([run[key] for run in runs], 3)
            for key in ("stddev", "slope", "c_of_shared")
        ]
        cells.append(", ".join(str(run["seed"]) for run in runs))
        lines.append(f"| {data} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def quickstart():
    """Returns what `make quickstart` printed when the maintainers last ran it."""
    text = (ROOT / "docs/quickstart.txt").read_text().rstrip()
    return f"```text\n{text}\n```"


PARTS = {
    "catalogue": catalogue,
    "digits": digits_table,
    "speed": speed_table,
    "variance": variance_table,
    "quickstart": quickstart,
}


def render(text):
    """Returns README text with every generated part made anew."""
    for name, make in PARTS.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"Expected one part {begin} ... {end} in README.md.")
        text = pattern.sub(lambda _: f"{begin}\n{make()}\n{end}", text)  # noqa: B023
    return text


def main(argv=None):
    """Rewrites README.md, or with --check returns 1 if it is out of date."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    text = README.read_text()
    rendered = render(text)
    if arguments.check:
        if rendered != text:
            print("README.md is out of date: run `make readme`.", file=sys.stderr)
        return int(rendered != text)
    README.write_text(rendered)
    return 0


if __name__ == "__main__":
    sys.exit(main())
