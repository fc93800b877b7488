"""What README and the model cards claim stands in the committed results."""

import importlib.util
import itertools
import json
import pathlib
import statistics

import pytest

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

pytestmark = pytest.mark.tensorflow


def records(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digits(model, figure):
    """A figure of the test split for each seed."""
    runs = {r["seed"]: r for r in records("digits.jsonl") if r["model"] == model}
    assert sorted(runs) == [3, 4, 5]
    return [run["test"][figure] for run in runs.values()]


ENSEMBLE, SINGLE = "resnet8_batch_ensemble_digits", "resnet8_digits"


def test_the_ensemble_of_the_digits_is_accurate():
    assert statistics.mean(digits(ENSEMBLE, "accuracy")) >= 0.985


def test_the_ensemble_of_the_digits_is_no_worse_than_one_network():
    nll = {name: statistics.mean(digits(name, "nll")) for name in (ENSEMBLE, SINGLE)}
    assert nll[ENSEMBLE] <= nll[SINGLE]


def test_each_step_time_was_measured_and_readme_says_which_bars_are_missed():
    claims = script(ROOT / "benchmarks" / "step_time.py").CLAIMS
    newest = {record["claim"]: record for record in records("step_time.jsonl")}
    assert newest.keys() == claims.keys()
    table = (ROOT / "README.md").read_text().splitlines()
    for name, (_, bar) in claims.items():
        assert newest[name]["bar"] == bar
        (row,) = (line for line in table if line.startswith(f"| `{name}` |"))
        missed = bar is not None and newest[name]["ratio"] > bar
        assert ("**missed**" in row) == missed


def test_readme_shows_what_was_measured():
    readme = script(ROOT / "docs" / "make_readme.py")
    text = readme.README.read_text()
    assert readme.render(text) == text


def test_the_variance_of_flipouts_gradients_falls_as_that_of_independent_draws():
    measured = records("flipout_variance.jsonl")
    kinds = [(r["data"].partition(",")[0], r["network"], r["seed"]) for r in measured]
    wanted = itertools.product(("digits",), ("conv", "dense", "lstm"), (0, 1, 2))
    assert set(kinds) >= set(wanted) and len(set(kinds)) == len(kinds)
    for record in measured:
        assert abs(record["slope"] + 1) <= 0.05
        assert record["c_of_shared"] <= 0.1
