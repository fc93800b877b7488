"""The maintainers' command that makes what `saved_models/` holds.

    python -m kzoo.zoo.pretrained

Trains each pretrained model from several seeds, measures each run once, exports the
seed that is best on the validation split, and writes the model's card and the index
from what was measured. An interrupted command goes on where it was; lines that are
already in the results are not measured again.
"""

import argparse
import statistics
import sys
from pathlib import Path

from . import hub, placing, registry, results
from .interruption import INTERRUPTED, insistent_interrupts, leave
from .native_log import native_log_to

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python -m kzoo.zoo.pretrained"
MODELS = ("resnet8_digits", "resnet8_batch_ensemble_digits")
VERSION = 1
# Earlier recipes have read the test split with seeds 0 to 2.
SEEDS = (3, 4, 5)
TOLERANCE = 1e-5
FIGURES = {
    "accuracy": "accuracy",
    "nll": "negative log-likelihood, nats",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "predictive_entropy": "mean predictive entropy, nats",
    "mutual_information": "mean mutual information, nats",
}


def main(argv=None):
    """Runs the command.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit code: 0, 1 for a failure, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Make saved_models/ from the beginning."
    )
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED")
    parser.add_argument("--epochs", type=int, help="default: each model's recipe")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs/pretrained")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks/results/digits.jsonl"
    )
    parser.add_argument("--to", type=Path, default=ROOT / "saved_models")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a version that answers otherwise: only before it is published",
    )
    arguments = parser.parse_args(argv)
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    try:
        log = native_log_to(arguments.run_dir / "tensorflow.log")
        with insistent_interrupts(), log:
            _quiet()
            for name in arguments.models:
                _make(name, arguments)
            print(hub.write_index(arguments.to))
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError) as error:
        print(f"\npretrained: {error}", file=sys.stderr)
        return 1
    return 0


def _quiet():
    """Leaves the progress bars of training, and no others."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    # Each measurement has a function of its own, which TensorFlow takes for a mistake.
    tf.get_logger().setLevel("ERROR")


def _make(name, arguments):
    """Trains, measures, exports and describes one model."""
    from .training.recipes import RECIPES

    settings = {"epochs": arguments.epochs} if arguments.epochs else {}
    registered = registry.info(name).recipe
    named = RECIPES[registered.get("recipe", "default")]
    recipe = {**named.arguments, **registered, **settings}
    records = {
        seed: _measured(name, seed, recipe, settings, arguments)
        for seed in arguments.seeds
    }
    best = min(records, key=lambda seed: records[seed]["validation"]["nll"])
    path = _exported(_train(name, best, settings, arguments).model, arguments)
    card = path.parent / hub.CARD
    placing.write(card, _card(name, path, recipe, records, best))
    print(f"{path}: seed {best}")


def _train(name, seed, settings, arguments):
    from .training import train

    return train(
        name,
        seed=seed,
        run_dir=arguments.run_dir / f"{name}-seed{seed}",
        data_dir=arguments.run_dir / "data",
        **settings,
    )


def _measured(name, seed, recipe, settings, arguments):
    """The record of a model and seed: the one there is, or a new one."""
    recorded = [r for r in results.read(arguments.results) if r["model"] == name]
    for record in recorded:
        if record["recipe"] != recipe:
            raise ValueError(
                f"{arguments.results} has lines of {name} with another recipe: move "
                f"them away. Expected {recipe}. Received: {record['recipe']}"
            )
        if record["seed"] == seed:
            print(f"{name}, seed {seed}: measured before")
            return record
    from .training import evaluate

    trained = _train(name, seed, settings, arguments)
    dataset = registry.info(name).dataset
    splits = {
        split: evaluate(
            trained.model, dataset, split, data_dir=arguments.run_dir / "data"
        )
        for split in ("validation", "test")
    }
    record = {
        "command": COMMAND,
        "model": name,
        "seed": seed,
        "recipe": recipe,
        "members": splits["test"]["members"],
        "parameters": splits["test"]["parameters"],
        "optimizer": _optimizer(trained.model),
        "seconds": trained.seconds,
        **{
            split: {key: figures[key] for key in (*FIGURES, "examples")}
            for split, figures in splits.items()
        },
    }
    results.append(arguments.results, record)
    return results.read(arguments.results)[-1]


def _optimizer(model):
    """The class names of an optimizer and those it wraps, as `Lookahead(Adam)`."""
    import keras

    names, config = [], keras.optimizers.serialize(model.optimizer)
    while isinstance(config, dict):
        names.append(config["class_name"])
        config = config["config"].get("optimizer")
    return "(".join(names) + ")" * (len(names) - 1)


def _exported(model, arguments):
    """The version's folder. One that answers as the model does stays as it is."""
    import numpy as np

    from .datasets import load
    from .export import export
    from .predictive import classification
    from .serving.servable import Servable

    info = registry.info(model.name)
    examples, _ = load(info.dataset, "train", data_dir=arguments.run_dir / "data")
    images = next(examples.batch(64).as_numpy_iterator())[0].astype("float32")
    path = arguments.to / model.name / str(VERSION)
    if path.exists():
        expected = classification(model)[1](images)
        servable = Servable(path)
        given = servable.predict({"image": images})
        servable.close()
        difference = max(
            abs(given[k] - np.asarray(v)).max() for k, v in expected.items()
        )
        if difference <= TOLERANCE:
            return path
        if not arguments.overwrite:
            raise ValueError(
                f"{path} holds another model, which answers by up to {difference:.2g} "
                "otherwise. A published version never changes; --overwrite replaces "
                "one that is not published yet."
            )
    example = {"image": images[:2]}
    return export(model, arguments.to, VERSION, example=example, overwrite=True)


# The card.


def _card(name, path, recipe, records, best):
    """The text of a model's card, from what was measured."""
    model = registry.info(name)
    one = records[best]
    members = one["members"]
    size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    facts = {
        "version": path.name,
        "task": model.task,
        "members": members,
        "parameters": f"{one['parameters']:,}",
        "size": f"{size:,} bytes",
        "paper": f"<{model.paper}>",
        "licence": "Apache-2.0",
    }
    settings = {
        "optimizer": one["optimizer"],
        **{key.replace("_", " "): value for key, value in recipe.items()},
        "seconds of training": _spread(r["seconds"] for r in records.values()),
        "seeds": ", ".join(map(str, sorted(records))),
        "seed of this SavedModel": f"{best}, the one with the lowest validation NLL",
        **{f"{k} version": v for k, v in one["versions"].items() if k != "jax"},
        "machine": f"{one['machine']['cpu']}, {one['machine']['cores']} cores",
    }
    figures = []
    for key, title in FIGURES.items():
        row = [title]
        for split in ("validation", "test"):
            row.append(_spread((r[split][key] for r in records.values()), 4))
            row.append(f"{one[split][key]:.4f}")
        figures.append(row)
    seeds = f"{len(records)} seed{'s' * (len(records) > 1)}"
    header = ["", f"validation, {seeds}", "this one", f"test, {seeds}", "this one"]
    counts = {split: one[split]["examples"] for split in ("validation", "test")}
    parts = [
        f"# {name}",
        model.description,
        _table(["", ""], facts.items()),
        "## Purpose",
        PURPOSE[members > 1],
        "## Data",
        DATA.format(dataset=model.dataset, **counts),
        "## Training",
        f"`kzoo train {name} --seed {best}` trains this one again.",
        _table(["", ""], settings.items()),
        "## Figures",
        "Means over seeds ± their standard deviation, and those of the seed that was\n"
        f"exported. The test split was read once for each run. Written by `{COMMAND}`.",
        _table(header, figures),
        "## Signatures",
        _signatures(path),
        SIGNATURES,
        "## Use",
        USE.format(name=name),
        "## Limitations",
        LIMITATIONS.format(**counts, one=1 / counts["test"]),
        "## Licence",
        LICENCE,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


PURPOSE = {
    False: """\
A small classifier of handwritten digits: the plain twin that the ensemble of the same
architecture is compared with, and a first model to try a serving set-up with.""",
    True: """\
A small classifier of handwritten digits that says how sure it is: the probabilities
are the mean over the members, and the members' disagreement is part of the answer. All
members are rank-one modulations of one network, so it costs about as many parameters
as one. It is also a first model to try a serving set-up with.""",
}
DATA = """\
`{dataset}`: real handwritten digits, 8×8 pixels with 17 grey levels, as scikit-learn
carries them (UCI Optical Recognition of Handwritten Digits, CC BY 4.0), prepared by
`kzoo.zoo.load("{dataset}")` with fixed splits: {validation} examples to choose by,
{test} to test on, the others to train on."""
SIGNATURES = """\
`serving_default` runs on any server; `serving_xla` computes the same, compiled, on
servers with XLA. Pixels are raw, 0 to 16; scaling is part of the model. Entropies and
information are in nats."""
USE = """\
```sh
kzoo predict {name}
kzoo serve {name} --port 8501
```"""
LIMITATIONS = """\
- It knows centred digits of 8×8 pixels as in this data set, and nothing else. It
  answers with one of ten digits whatever it is shown.
- Predictive entropy and mutual information rank doubt; they are no guarantee, and far
  from the data they may be low.
- The figures stand on {test} test examples: one of them is {one:.4f} of accuracy. Their
  spread is that of the seeds, with one split; it is not an interval for new writers.
- It was not tested for any use that matters to somebody."""
LICENCE = """\
The model is under Apache-2.0, as all of kzoo; the data set is under CC BY 4.0."""


def _signatures(path):
    """A table of a SavedModel's inputs and outputs, read from the file itself."""
    import tensorflow as tf

    from .serving import graph

    signature = graph.serving_graph(graph.read(path)).signature_def["serving_default"]
    rows = []
    for kind in ("inputs", "outputs"):
        for name, info in sorted(getattr(signature, kind).items()):
            shape = tf.TensorShape(info.tensor_shape).as_list()
            sizes = ", ".join("batch" if size is None else str(size) for size in shape)
            dtype = tf.as_dtype(info.dtype).name
            rows.append([f"`{name}`", kind[:-1], dtype, f"[{sizes}]"])
    return _table(["name", "", "type", "shape"], rows)


def _spread(values, digits=1):
    values = list(values)
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


if __name__ == "__main__":
    leave(main())
