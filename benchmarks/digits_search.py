"""Chooses the recipes of the digits models, without the test split.

    python benchmarks/digits_search.py [PATTERN]

Five folds: a fifth of the training split is held out, the rest and the validation
split are trained on. Every candidate is measured on one fold; the best two of each
model, by negative log-likelihood, then on two more. The single network
and the ensemble get the same candidates for what they share.

Each line of benchmarks/results/digits_search.jsonl is one training run, with its
figures on the held-out fold; lines that are there are not measured again. Training
runs lie in runs/digits_search/ and go on where they were interrupted.
"""

import fnmatch
import json
import os
import shlex
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras

from kzoo.zoo import build, evaluate, results, train

RESULTS = Path(__file__).parent / "results" / "digits_search.jsonl"
RUNS = Path(__file__).parent.parent / "runs"
FOLDS, FIRST_FOLDS, FINAL_FOLDS, FINALISTS = 5, 1, 3, 2

SINGLE, ENSEMBLE = "resnet8_digits", "resnet8_batch_ensemble_digits"

# What every candidate departs from.
COMMON = {
    "epochs": 40,
    "batch_size": 64,
    "learning_rate": 3e-3,
    "max_shift": 1,
    "width": 16,
    "l2": 1e-4,
}
SHARED = [
    {},
    {"max_shift": 0},
    {"epochs": 80},
    {"epochs": 160},
    {"epochs": 240},
    {"learning_rate": 1e-3},
    {"learning_rate": 1e-2, "epochs": 160},
]
OF_ONE = [
    {"epochs": 320},
    {"epochs": 320, "learning_rate": 1e-2},
]
OF_MEMBERS = [
    {"fast_weights": -0.5},
    {"fast_weights": 0.5},
    {"members": "split", "epochs": 80},
    {"members": "split", "epochs": 160},
    {"members": "split", "epochs": 160, "fast_weights": -0.5},
    {"members": "split", "epochs": 320, "fast_weights": -0.5},
    {
        "members": "split",
        "epochs": 320,
        "fast_weights": -0.5,
        "learning_rate": 1e-2,
    },
    {"epochs": 160, "fast_weights": -0.25},
    {"epochs": 160, "fast_weights": -0.5},
    {"epochs": 160, "fast_weights": -0.5, "learning_rate": 1e-2},
    {"epochs": 240, "fast_weights": -0.5},
]
CANDIDATES = {
    SINGLE: SHARED + OF_ONE,
    ENSEMBLE: [
        {"members": "tile", "fast_weights": -0.1, **x} for x in SHARED + OF_MEMBERS
    ],
}


def measure(model, candidate, fold):
    """Trains a candidate without one fold, and returns its figures on that fold."""
    key = {"model": model, "candidate": {**COMMON, **candidate}, "fold": fold}
    for line in results.read(RESULTS):
        if {name: line[name] for name in key} == key:
            return line["figures"]
    settings = dict(key["candidate"])
    overrides = {
        name: settings.pop(name)
        for name in ("width", "l2", "fast_weights")
        if name in settings
    }
    start, end = 100 * fold // FOLDS, 100 * (fold + 1) // FOLDS
    held_out = f"train[{start}%:{end}%]"
    keras.utils.clear_session()
    keras.utils.set_random_seed(fold)
    name = json.dumps(key["candidate"], sort_keys=True)
    run = train(
        build(model, **overrides),
        "digits",
        **settings,
        train_split=f"train[:{start}%]+train[{end}%:]+validation",
        validation_split=held_out,
        seed=fold,
        run_dir=RUNS / "digits_search" / f"{model} {name} fold {fold}",
        data_dir=RUNS / "data",
    )
    figures = evaluate(run.model, "digits", held_out, data_dir=RUNS / "data")
    results.append(
        RESULTS,
        {
            **key,
            "command": shlex.join(["python", *sys.argv]),
            "seed": fold,
            "seconds": run.seconds,
            "figures": figures,
        },
    )
    return figures


def main(pattern="*"):
    """Measures all candidates and prints them, best first."""
    for model, candidates in CANDIDATES.items():
        if not fnmatch.fnmatch(model, pattern):
            continue
        folds = {i: list(range(FIRST_FOLDS)) for i in range(len(candidates))}
        scores = {i: score(model, candidates[i], folds[i]) for i in folds}
        for i in sorted(folds, key=lambda i: scores[i]["nll"])[:FINALISTS]:
            folds[i] = list(range(FINAL_FOLDS))
            scores[i] = score(model, candidates[i], folds[i])
        print(f"\n{model}")
        for i in sorted(folds, key=lambda i: (-len(folds[i]), scores[i]["nll"])):
            print(
                f"  nll {scores[i]['nll']:.4f}  accuracy {scores[i]['accuracy']:.4f}"
                f"  folds {len(folds[i])}  {candidates[i]}"
            )


def score(model, candidate, folds):
    """Returns the means of a candidate's figures over the folds' examples."""
    figures = [measure(model, candidate, fold) for fold in folds]
    examples = sum(f["examples"] for f in figures)
    return {
        name: sum(f["examples"] * f[name] for f in figures) / examples
        for name in ("nll", "accuracy")
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
