"""Every example in the documentation runs: doctests and README's code.

A Python block of README.md runs from top to bottom in an empty folder, in a process
state of its own. One that shall not run, because it shows a part or needs a network,
has the line

    <!-- not run: REASON -->

directly above it.
"""

import doctest
import importlib
import pathlib
import re

import keras
import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("layers", "optimizers", "zoo")

# Modules whose examples need TensorFlow's graphs or layers, or show what contracts and
# other tests run on JAX.
TENSORFLOW = ("kzoo.layers.batch_ensemble", "kzoo.layers.variational", "kzoo.zoo")


@pytest.fixture(scope="module", autouse=True)
def digits():
    """The examples' data set, prepared beforehand: that prints what it does."""
    from kzoo.zoo import load

    load("digits")


def modules_with_examples():
    """Names of the package's modules that hold a doctest."""
    for file in [ROOT / "__init__.py", *ROOT.glob("_*.py")] + [
        file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))
    ]:
        if ">>>" in file.read_text():
            parts = file.relative_to(ROOT).with_suffix("").parts
            yield ".".join(("kzoo", *(p for p in parts if p != "__init__")))


def parameters(names):
    """Marks the modules of one backend."""
    for name in names:
        marks = [pytest.mark.tensorflow] if name.startswith(TENSORFLOW) else []
        yield pytest.param(name, marks=marks)


@pytest.mark.slow
@pytest.mark.parametrize("name", parameters(modules_with_examples()))
def test_examples_of(name, tmp_path, monkeypatch):
    # By imported name: a path would load the file again, under another one.
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    report = []
    for test in doctest.DocTestFinder().find(module, name):
        keras.utils.clear_session(free_memory=False)
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
    assert runner.tries, f"{name} has no example that a name reaches"


def readme_blocks():
    """README's Python blocks: (line, code, why it is not run or None)."""
    lines = (ROOT / "README.md").read_text().splitlines()
    for i, line in enumerate(lines):
        if line.strip() == "```python":
            end = lines.index("```", i)
            above = lines[i - 1] if i else ""
            skip = re.fullmatch(r"<!-- not run: (.+) -->", above.strip())
            yield i + 2, "\n".join(lines[i + 1 : end]), skip and skip[1]


@pytest.mark.tensorflow
@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code"),
    [
        pytest.param(line, code, id=f"line {line}")
        for line, code, skip in readme_blocks()
        if not skip
    ],
)
def test_readme_runs(line, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Padded, so that an error's line is README's.
    source = "\n" * (line - 1) + code
    exec(compile(source, "README.md", "exec"), {"__name__": "__main__"})


def test_readme_has_code_that_runs():
    blocks = list(readme_blocks())
    assert sum(not skip for _, _, skip in blocks) >= 3


def test_readme_names_every_python_block():
    text = (ROOT / "README.md").read_text()
    fences = re.findall(r"^```(\S*)$", text, re.MULTILINE)
    opening = fences[::2]
    assert all(opening), f"expected every block to name its language: {opening}"
    assert opening.count("python") == len(list(readme_blocks()))
