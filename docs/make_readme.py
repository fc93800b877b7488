"""Writes the parts of README.md that are measured or generated.

    python docs/make_readme.py            # rewrites them
    python docs/make_readme.py --check    # fails if they are out of date

Each part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. The
catalogue comes from the package's own indexes, the figures from the JSON lines
under benchmarks/results, and what the README's two commands printed from
docs/quickstart.txt and docs/test.txt, which `make quickstart-output` and
`make test-output` write.
"""

import argparse
import inspect
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np

import kzoo.layers
import kzoo.optimizers
import kzoo.zoo
from kzoo.zoo import losses, metrics, registry, results

LABELS = {"jax": "JAX", "tensorflow": "TensorFlow"}
KFAC_DUE = ("none", "factors", "inverses")
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
        notes = []
        for name, item in public(index).items():
            mark = ""
            for backend, limit in getattr(item, "limits", {}).items():
                note = f"On {LABELS[backend]} {limit}."
                notes += [note] * (note not in notes)
                mark += f" [{notes.index(note) + 1}]"
            lines.append(f"| `{name}`{mark} | {purpose(item)} |")
        lines.append("")
        lines += [f"[{i}] {note}" for i, note in enumerate(notes, 1)]
        lines += [""] * bool(notes)
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
    """Returns mean ± standard deviation over seeds; of one seed, the value."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
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


def speed_table(name="step_time"):
    """Returns the newest ratio of each claim of benchmarks/step_time.py, or another."""
    newest = {
        record["claim"]: record
        for record in results.read(ROOT / f"benchmarks/results/{name}.jsonl")
        if "ratio" in record
    }
    lines = [
        "| train step | ms | peer | its ms | ratio (quartiles) | bar |",
        "|---|---|---|---|---|---|",
    ]
    for claim, r in newest.items():
        low, high = r["ratio_quartiles"]
        lines.append(
            f"| `{claim}` | {r['milliseconds']:.2f} | {r['peer']} | "
            f"{r['peer_milliseconds']:.2f} | {r['ratio']:.3f} ({low:.3f}–{high:.3f}) | "
            f"{said_of_bar(r)} |"
        )
    return "\n".join(lines)


def said_of_bar(record):
    """What a table says of a ratio's bar."""
    if not record["bar"]:
        return "none"
    met = "met" if record["ratio"] <= record["bar"] else "**missed**"
    return f"{record['bar']}, {met}"


def adam_table():
    """Returns the lines of benchmarks/kfac_validation.py's table."""
    lines = [
        "In batches, its default mode beside Adam, both with the best settings of "
        "their grids: updates (seconds) until the mean validation loss of ten seeds is "
        "at Adam's least, and at multiples of it; and the updates of single seeds.",
        "",
        "| network | loss | Adam | its seeds | K-FAC | its seeds | K-FAC's least |",
        "|---|---|---|---|---|---|---|",
    ]
    newest = {
        (r["task"], r["times"]): r
        for r in results.read(ROOT / "benchmarks/results/kfac_validation.jsonl")
        if "times" in r
    }
    for (task, times), r in newest.items():
        cells = [task, f"{r['level']:.4f} ({times:g} × Adam's least)"]
        for method in ("adam", "kfac"):
            at, seeds = r[method]["reached"], r[method]["reached_of_seeds"]
            cells.append(f"{at[0]} ({at[1]:.1f})" if at else "never")
            updates = [one[0] for one in seeds if one]
            never = len(seeds) - len(updates)
            words = [f"{min(updates)}–{max(updates)}"] if updates else []
            cells.append(", ".join(words + [f"{never} never"] * (never > 0)))
        lines.append(f"| {' | '.join(cells)} | {r['kfac']['least']:.4f} |")
    for task in dict.fromkeys(task for task, _ in newest):
        r = newest[task, 1]
        told = []
        for name, method in (("Adam", "adam"), ("K-FAC", "kfac")):
            setting = r[method]["setting"].items()
            words = [f"{k} {v:g}" for k, v in setting if v and k != "cosine"]
            if updates := r[method]["setting"]["cosine"]:
                words.append(f"half a cosine of {updates} updates")
            if r[method]["averaged"]:
                words.append("a moving average of weights")
            told.append(f"{name}'s {', '.join(words)}")
        adam, kfac = (r[method]["reached"] for method in ("adam", "kfac"))
        fewer = kfac and kfac[0] < adam[0]
        lines.append(
            f"\n- {task}: {'; '.join(told)}. Bar: K-FAC is at Adam's least loss in "
            f"fewer updates: {'met' if fewer else '**missed**'}."
        )
    return lines


def kfac_tables():
    """Returns what the benchmarks of K-FAC measured."""
    kinds = {}
    for r in results.read(ROOT / "benchmarks/results/autoencoder.jsonl"):
        if r["data"] == "digits" and r["seed"] < 100:  # Not of the search's seed.
            kinds.setdefault(r["method"], []).append(r)
    kfac = kinds.pop("kfac")
    lines = [
        "| method | least loss | updates | seconds | K-FAC there after updates | "
        "seconds | of the updates | of the seconds | bars |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method, runs in kinds.items():
        rows = []
        for run, curve in zip(runs, (r["curve"] for r in kfac), strict=True):
            i = next(i for i, h in enumerate(curve["loss"]) if h <= run["loss"])
            update, seconds = curve["update"][i], curve["seconds"][i]
            own = run["loss"], run["at_update"], run["at_seconds"]
            rows.append((*own, update, seconds, update / own[1], seconds / own[2]))
        means = [np.mean(column) for column in zip(*rows, strict=True)]
        bars = "none"
        if method == "sgd":
            met = [
                "met" if max(row[k] for row in rows) <= bar else "**missed**"
                for k, bar in ((5, 1 / 8), (6, 1 / 3))
            ]
            bars = f"1/8, {met[0]}; 1/3, {met[1]}"
        setting = ", ".join(f"{k} {v:g}" for k, v in runs[0]["setting"].items())
        lines.append(
            f"| `{method}`, {setting} | {spread([row[0] for row in rows], 5)} | "
            f"{means[1]:,.0f} | {means[2]:.1f} | {means[3]:.0f} | {means[4]:.1f} | "
            f"{means[5]:.3f} | {means[6]:.3f} | {bars} |"
        )
    lines += [
        f"| `kfac`, damping {kfac[0]['setting']['damping']:g} | "
        f"{spread([r['loss'] for r in kfac], 5)} | "
        f"{np.mean([r['at_update'] for r in kfac]):.0f} | "
        f"{np.mean([r['at_seconds'] for r in kfac]):.1f} | | | | | |",
        "",
        *adam_table(),
        "",
        "Against kfac-jax's steps:",
        "",
        speed_table("kfac_peer"),
        "",
    ]
    peer = list(results.read(ROOT / "benchmarks/results/kfac_peer.jsonl"))
    for r in {r["claim"]: r for r in peer if "difference" in r}.values():
        met = "met" if r["difference"] <= r["bar"] else "**missed**"
        lines.append(
            f"- Factors of `{r['network']}` differ by {r['difference']:.1g} at most "
            f"(bar {r['bar']:g}, {met})."
        )
    widths = results.read(ROOT / "benchmarks/results/kfac_width.jsonl")
    newest = {r["width"]: r for r in widths}
    lines += [
        "",
        "A dense layer n -> n, milliseconds of SGD and of K-FAC with what is due:",
        "",
        "| n | SGD | nothing | factors | inverses | MB of state | MB of a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for n, r in newest.items():
        times = (f"{r[f'milliseconds_{due}']:.1f}" for due in ("sgd", *KFAC_DUE))
        lines.append(
            f"| {n} | {' | '.join(times)} | {r['state_bytes_none'] / 1e6:.1f} | "
            f"{max(r[f'step_bytes_{due}'] for due in KFAC_DUE) / 1e6:.1f} |"
        )
    slopes = newest[max(newest)]["slopes"]
    told = (f"{due} {slopes[f'milliseconds_{due}']:.2f}" for due in ("sgd", *KFAC_DUE))
    lines.append(
        f"\nSlopes of their logarithms between the last two widths: {', '.join(told)}; "
        f"state {slopes['state_bytes_none']:.2f}, "
        f"a step with nothing due {slopes['step_bytes_none']:.2f}."
    )
    return "\n".join(lines)


def memory_table():
    """Returns the newest figures of benchmarks/ensemble_memory.py."""
    newest = {
        record["claim"]: record
        for record in results.read(ROOT / "benchmarks/results/ensemble_memory.jsonl")
    }
    lines = ["| claim | MB | its peer's MB | ratio | bar |", "|---|---|---|---|---|"]
    for claim, r in newest.items():
        method, peer = (sum(r[key].values()) / 1e6 for key in ("bytes", "peer_bytes"))
        lines.append(
            f"| `{claim}` | {method:,.1f} | {peer:,.1f} | {r['ratio']:.3f} | "
            f"{said_of_bar(r)} |"
        )
    return "\n".join(lines)


def reversible_table():
    """Returns the newest figures of benchmarks/reversible_memory.py."""
    newest = {}
    for r in results.read(ROOT / "benchmarks/results/reversible_memory.jsonl"):
        newest.setdefault(r["source"], {})[r["claim"], r["rows"], r["steps"]] = r
    lines = [
        "| claim | rows | steps | forgotten bits | MB | its peer's MB | times less | "
        "bar | resident MB | its peer's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, r in sorted(newest["compiler"].items(), key=lambda item: -item[0][1]):
        claim, rows, steps = key
        bar = "none"
        if r["bar"]:
            met = "met" if r["times_less"] >= r["bar"] else "**missed**"
            bar = f"{r['bar']}, {met}"
        resident = newest["peak resident memory"].get(key)
        lines.append(
            f"| `{claim}` | {rows} | {steps:,} | {r['forgotten_bits']:.2f} | "
            f"{megabytes(r)[0]} | {megabytes(r)[1]} | {r['times_less']:.1f} | {bar} | "
            f"{' | '.join(megabytes(resident) if resident else (' ', ' '))} |"
        )
    return "\n".join(lines)


def megabytes(record):
    """Returns a layer's bytes and its peer's, in millions, as text."""
    return [f"{record[name] / 1e6:,.1f}" for name in ("bytes", "peer_bytes")]


def best_rate(records, loss):
    """Returns the learning rate whose record of the first seed has the least loss."""
    first = min(r["seed"] for r in records)
    return min((r for r in records if r["seed"] == first), key=loss)["learning_rate"]


def translation_table():
    """Returns the figures of benchmarks/sequence_to_sequence.py, over seeds."""
    records = results.read(ROOT / "benchmarks/results/sequence_to_sequence.jsonl")
    runs = {}
    for r in records:
        runs.setdefault((r["attend_to"], r["network"]), []).append(r)
    for key, own in runs.items():
        rate = best_rate(own, lambda r: r["validation_loss"])
        runs[key] = [r for r in own if r["learning_rate"] == rate]
    lines = [
        "| attends to | network | units | learning rate | exact match | 4 beams | "
        "accuracy | encoder MB (times less) | decoder MB (times less) | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (attend_to, name), own in sorted(runs.items()):
        cells = [f"{own[0]['units']}", f"{own[0]['learning_rate']:g}"] + [
            spread([r[key] for r in own], 3)
            for key in ("exact_match", "exact_match_4_beams", "token_accuracy")
        ]
        peer = runs.get((attend_to, "gru" if "gru" in name else "lstm"), [None])[0]
        for part in ("encoder", "decoder"):
            cell = f"{own[0]['bytes'][part] / 1e6:,.1f}"
            if name.startswith("rev_") and peer:
                cell += f" ({peer['bytes'][part] / own[0]['bytes'][part]:.1f})"
            cells.append(cell)
        cells.append(", ".join(str(r["seed"]) for r in own))
        lines.append(f"| {attend_to} | `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def language_table():
    """Returns the figures of benchmarks/language_model.py, over seeds."""
    searched, runs = {}, {}
    records = results.read(ROOT / "benchmarks/results/language_model.jsonl")
    longest = max(r["updates"] for r in records)
    for r in records:
        if r["updates"] == longest:
            searched.setdefault(r["claim"], []).append(r)
    for claim, own in sorted(searched.items()):
        first = searched[f"{own[0]['layer']}_2"] if own[0]["peer"] else own
        size, _ = best_setting(first)
        own = [r for r in own if r["embedding"] == size]
        _, rate = best_setting(own)
        runs[claim] = {r["seed"]: r for r in own if r["learning_rate"] == rate}
    lines = [
        "| layer | bits forgotten at most | embeddings | units | learning rate | "
        "validation | of the peer's | test | of the peer's | bar | layer MB (times "
        "less) | step MB (times less) | processor, s | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for own in runs.values():
        first, *_ = own.values()
        bits = {
            split: [r["bits_per_character"][split] for r in own.values()]
            for split in ("validation", "test")
        }
        sizes = {key: first[key] for key in ("layer_bytes", "step_bytes")}
        factors, ratios, bar, limit = dict.fromkeys(sizes, ""), {}, "", ""
        if first["peer"]:
            peer = [runs[first["peer"]][seed] for seed in own]
            for split, found in bits.items():
                theirs = [r["bits_per_character"][split] for r in peer]
                ratios[split] = np.mean(found) / np.mean(theirs)
            is_met = ratios["test"] <= first["bar"]
            bar = f"{first['bar']}, {'met' if is_met else '**missed**'}"
            limit = first["max_forget_bits"] or "any"
            factors = {k: f" ({peer[0][k] / size:.1f})" for k, size in sizes.items()}
        megabytes = (f"{size / 1e6:.1f}{factors[k]}" for k, size in sizes.items())
        cells = [f"`{first['layer']}`", f"{limit}"]
        cells += [f"{first[k]:g}" for k in ("embedding", "units", "learning_rate")]
        for split, found in bits.items():
            ratio = f"{ratios[split]:.3f}" if ratios else ""
            cells += [spread(found, 3), ratio]
        cells += [
            bar,
            *megabytes,
            f"{np.mean([r['processor_seconds'] for r in own.values()]):.0f}",
            ", ".join(str(seed) for seed in own),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def best_setting(records):
    """Returns the embeddings' size and the learning rate that are best on validation.

    Of those that were run with the most seeds.
    """
    found = {}
    for r in records:
        bits = r["bits_per_character"]["validation"]
        found.setdefault((r["embedding"], r["learning_rate"]), []).append(bits)
    most = max(map(len, found.values()))
    return min(
        (setting for setting, bits in found.items() if len(bits) == most),
        key=lambda setting: np.mean(found[setting]),
    )


def variance_table():
    """Returns the fits of benchmarks/flipout_variance.py, over seeds."""
    records = results.read(ROOT / "benchmarks/results/flipout_variance.jsonl")
    lines = [
        "| data | network | σ | slope of log variance by log N | c | c / c of a shared "
        "perturbation | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for data, name in sorted({(r["data"], r["network"]) for r in records}):
        runs = [r for r in records if (r["data"], r["network"]) == (data, name)]
        cells = [
            spread([run[key] for run in runs], 3)
            for key in ("stddev", "slope", "c_of_shared")
        ]
        c = [run["flipout"]["c"] for run in runs]
        cells.insert(2, f"{np.mean(c):.1e} ± {np.std(c, ddof=1):.1e}")
        cells.append(", ".join(str(run["seed"]) for run in runs))
        lines.append(f"| {data} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def evolution_table():
    """Returns the newest figures of benchmarks/evolution_strategies.py."""
    newest = {
        record["claim"]: record
        for record in results.read(
            ROOT / "benchmarks/results/evolution_strategies.jsonl"
        )
    }
    lines = [
        "| policy | members × rows | noise of the peer | members a second | "
        "the peer's | times as many (quartiles) | bar |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in newest.values():
        low, high = r["times_faster_quartiles"]
        bar = "none"
        if r["bar"]:
            met = r["times_faster"] >= r["bar"]
            bar = f"{r['bar']}, {'met' if met else '**missed**'}"
        noise = r["peer"].partition(",")[0].removeprefix("noise ")
        lines.append(
            f"| {r['shape'].replace('->', '→')} | {r['population']} × "
            f"{r['rows_per_member']} | {noise} | {r['members_per_second']:,} | "
            f"{r['peer_members_per_second']:,} | {r['times_faster']:.1f} "
            f"({low:.1f}–{high:.1f}) | {bar} |"
        )
    return "\n".join(lines)


def calibration_tables():
    """Returns the test figures of benchmarks/calibration.py, over seeds."""
    found = [*results.read(ROOT / "benchmarks/results/calibration.jsonl")]
    methods = dict.fromkeys(r["method"] for r in found)
    records = [r for r in found if "test" in r["splits"]]
    lines = []
    for task in dict.fromkeys(r["task"] for r in found):
        of_task = [r for r in records if r["task"] == task]
        names = list(of_task[0]["test"])
        has_cost = "passes" in of_task[0]
        titles = [n.upper() if n in ("nll", "ece", "rmse") else n for n in names]
        titles += ["parameters", "passes"] if has_cost else []
        lines += [
            f"| {task.replace('_', ' ')} | chosen on the validation split "
            f"| {' | '.join(titles)} |",
            "|---" * (2 + len(titles)) + "|",
        ]
        for method in methods:
            runs = [r for r in of_task if r["method"] == method]
            if not runs:
                continue
            (setting,) = {tuple(r["setting"].items()) for r in runs}
            chosen = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in setting)
            digits = {name: 2 if name == "rmse" else 4 for name in names}
            cells = [spread([r["test"][n] for r in runs], digits[n]) for n in names]
            if has_cost:
                train, test = runs[0]["passes"]
                cells += [f"{runs[0]['parameters']:,}", f"{train} / {test}"]
            lines.append(
                f"| {method.replace('_', ' ')} | {chosen} | {' | '.join(cells)} |"
            )
        lines.append("")
    return "\n".join(lines[:-1])


def output(name):
    """Returns what a command printed when the maintainers last ran it."""
    text = (ROOT / "docs" / name).read_text().rstrip()
    return f"```text\n{text}\n```"


PARTS = {
    "catalogue": catalogue,
    "digits": digits_table,
    "speed": speed_table,
    "kfac": kfac_tables,
    "memory": memory_table,
    "reversible": reversible_table,
    "language": language_table,
    "translation": translation_table,
    "variance": variance_table,
    "evolution": evolution_table,
    "calibration": calibration_tables,
    "quickstart": partial(output, "quickstart.txt"),
    "test": partial(output, "test.txt"),
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
