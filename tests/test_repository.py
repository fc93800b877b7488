"""The rules of the repository, which hold for whatever is added to it."""

import ast
import inspect
import os
import re
import subprocess
import sys
from dataclasses import is_dataclass

import keras
import pytest

import kzoo.layers
import kzoo.optimizers
import kzoo.zoo
import kzoo.zoo.metrics
from harness.components import INDEXES, PUBLIC, ROOT, kind_of, mirror, mirrored
from harness.configs import check_registration
from harness.docs import check_docstring
from harness.skips import read
from kzoo.zoo import info, list_models

# On one backend: none makes a difference.
once = pytest.mark.tensorflow
PACKAGES = ("layers", "optimizers", "zoo")
FILES = [
    *ROOT.glob("*.py"),
    *(file for name in PACKAGES for file in sorted((ROOT / name).rglob("*.py"))),
]
OTHER_FILES = [
    file
    for folder in ("tests", "benchmarks", "docs")
    for file in sorted((ROOT / folder).rglob("*.py"))
]
CLASSES = {key: thing for key, thing in PUBLIC.items() if inspect.isclass(thing)}
# What a saved model's file refers to by name.
SAVED = {key: cls for key, cls in CLASSES.items() if hasattr(cls, "get_config")}
# Which of the package's parts each part may import.
MAY_IMPORT = {
    "kzoo.layers.ops": ("kzoo.layers.ops",),
    "kzoo.layers": ("kzoo.layers", "kzoo._backend"),
    "kzoo.optimizers": ("kzoo.optimizers", "kzoo.layers", "kzoo._backend"),
    "kzoo.zoo": ("kzoo",),
}


def relative(file):
    return str(file.relative_to(ROOT))


def module_name(file):
    """The name a file of the package is imported by, and its package's."""
    parts = ("kzoo", *file.relative_to(ROOT).with_suffix("").parts)
    if parts[-1] == "__init__":
        return ".".join(parts[:-1]), ".".join(parts[:-1])
    return ".".join(parts), ".".join(parts[:-1])


def imports(tree, package):
    """(line, absolute name, is relative) of every import in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, False
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}" if node.level else base
                yield node.lineno, name, bool(node.level)


# --- imports ----------------------------------------------------------------------


@once
@pytest.mark.parametrize("file", FILES, ids=relative)
def test_imports_run_one_way(file):
    name, package = module_name(file)
    allowed = next(
        (names for part, names in MAY_IMPORT.items() if f"{name}.".startswith(part)),
        ("kzoo",),
    )
    for line, target, is_relative in imports(ast.parse(file.read_text()), package):
        top = target.split(".")[0]
        where = f"{relative(file)}:{line} imports {target}"
        assert top not in PACKAGES, f"{where}: a second copy of the package"
        if top == "kzoo":
            assert is_relative, f"{where}: inside the package imports are relative"
            assert any(f"{target}.".startswith(f"{part}.") for part in allowed), (
                f"{where}; it may import {allowed}"
            )


@once
@pytest.mark.parametrize("file", OTHER_FILES, ids=relative)
def test_nothing_imports_a_second_copy(file):
    for line, target, _ in imports(ast.parse(file.read_text()), ""):
        assert target.split(".")[0] not in PACKAGES, f"{relative(file)}:{line} {target}"


@once
@pytest.mark.parametrize(
    "file",
    [f for f in FILES if relative(f).startswith(("layers", "optimizers"))],
    ids=relative,
)
def test_layers_and_optimizers_import_no_backend(file):
    at_top = ast.Module(
        [n for n in ast.parse(file.read_text()).body if not isinstance(n, DEFINITIONS)],
        [],
    )
    for line, target, _ in imports(at_top, module_name(file)[1]):
        assert target.split(".")[0] not in (
            "jax",
            "tensorflow",
            "tensorflow_probability",
            "tf_keras",
        ), f"{relative(file)}:{line} imports {target} at import"


DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


def python(code, **environment):
    """Runs code in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_importing_kzoo_alone_is_light():
    done = python(
        "import sys, kzoo; print(kzoo.__version__); "
        "print(sorted({'keras', 'tensorflow', 'jax', 'numpy'} & set(sys.modules)))"
    )
    assert done.stdout.splitlines() == [kzoo.__version__, "[]"], done.stderr


@pytest.mark.jax
def test_layers_and_optimizers_need_no_tensorflow():
    done = python(
        "import sys, kzoo.layers, kzoo.optimizers\n"
        "print('tensorflow_probability' in sys.modules, 'tf_keras' in sys.modules)"
    )
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.slow
def test_an_unsupported_backend_is_refused():
    done = python(REFUSED, KERAS_BACKEND="numpy")
    assert done.returncode == 0, done.stderr
    for module, message in zip(MODULES, done.stdout.splitlines(), strict=True):
        assert message.startswith(f"{module}: kzoo runs on the Keras backends"), message
        assert message.endswith("Received: 'numpy'"), message


MODULES = ["kzoo.layers", "kzoo.optimizers", "kzoo.zoo.metrics", "kzoo.zoo.losses"]
REFUSED = f"""
import importlib
for module in {MODULES}:
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"{{module}}: {{error}}")
"""


# --- what is public ---------------------------------------------------------------


def test_the_indexes_are_not_empty():
    assert {key.split(":")[0] for key in PUBLIC} == set(INDEXES)


@once
@pytest.mark.parametrize("key", PUBLIC)
def test_is_documented(key):
    check_docstring(PUBLIC[key], kind_of(PUBLIC[key])[0])


@once
@pytest.mark.parametrize("name", list_models())
def test_model_is_documented(name):
    check_docstring(info(name).entry_point, "function")


@pytest.mark.parametrize("key", SAVED)
def test_is_registered(key):
    component = SAVED[key]
    check_registration(component)
    name = keras.saving.get_registered_name(component)
    assert keras.saving.get_registered_object(name) is component


# A record is tested through the function that returns it.
@once
@pytest.mark.parametrize(
    "key", [key for key, thing in PUBLIC.items() if not is_dataclass(thing)]
)
def test_has_a_mirrored_test(key):
    thing, (_, check) = PUBLIC[key], kind_of(PUBLIC[key])
    # A class whose shared half is tested with it may be tested there.
    there = mirrored(thing)
    assert there, f"expected {relative(mirror(thing.__module__))}"
    assert any(
        uses_name(file, thing.__name__) and (check is None or calls(file, check))
        for file in there
    ), f"expected {check or 'a test'} of {thing.__name__} in {relative(there[0])}"


@once
@pytest.mark.parametrize("name", list_models())
def test_model_has_a_mirrored_test_with_its_check(name):
    file = mirror(info(name).entry_point.__module__)
    assert file.exists(), relative(file)
    assert calls(file, "check_model")
    assert f'"{name}"' in file.read_text() or "list_models" in file.read_text()


def calls(file, function):
    """Whether a test of the file calls a function of that name."""
    return any(
        isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", None)) == function
        for node in ast.walk(ast.parse(file.read_text()))
    )


def uses_name(file, name):
    """Whether a file uses a name, apart from importing it."""
    return any(
        name in (getattr(node, "id", None), getattr(node, "attr", None))
        for node in ast.walk(ast.parse(file.read_text()))
    )


# Of zoo's own index, the catalogue has the models that `build` gives.
CATALOGUE = [key for key in PUBLIC if key in SAVED or not key.startswith("zoo:")]


@once
@pytest.mark.parametrize("name", [*CATALOGUE, *list_models()])
def test_readme_lists(name):
    text = (ROOT / "README.md").read_text()
    catalogue = re.search(
        r"<!-- begin catalogue -->(.*?)<!-- end catalogue -->", text, re.DOTALL
    )
    assert catalogue, "expected README to have a catalogue"
    assert f"`{name.split(':')[-1]}`" in catalogue[1], "run `make readme`"


# --- what no file may have --------------------------------------------------------


@once
def test_there_is_no_utils():
    assert not [relative(f) for f in FILES if re.search("util|helper|misc", f.stem)]


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load"}
FORBIDDEN_KEYWORDS = {"safe_mode": False, "shell": True, "allow_pickle": True}


@once
@pytest.mark.parametrize("file", FILES, ids=relative)
def test_nothing_runs_what_it_reads(file):
    tree = ast.parse(file.read_text())
    for line, target, _ in imports(tree, module_name(file)[1]):
        assert target.split(".")[0] not in FORBIDDEN_MODULES, f"{file}:{line} {target}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        where = f"{relative(file)}:{node.lineno}"
        assert ast.unparse(node.func) not in FORBIDDEN_CALLS, where
        assert not ast.unparse(node.func).endswith("unsafe_deserialization"), where
        for keyword in node.keywords:
            value = getattr(keyword.value, "value", None)
            forbidden = FORBIDDEN_KEYWORDS.get(keyword.arg)
            assert forbidden is None or value is not forbidden, f"{where} {keyword.arg}"


@once
def test_allowed_skips_name_tests_that_exist():
    for name in read(ROOT / "tests" / "allowed_skips.txt"):
        file, _, function = name.split("[")[0].partition("::")
        assert f"def {function.split('::')[-1]}(" in (ROOT / file).read_text(), name


# --- another folder ---------------------------------------------------------------


@once
@pytest.mark.slow
def test_a_clone_in_a_folder_with_an_odd_name(tmp_path):
    clone = tmp_path / "kzoo odd-name.1"
    subprocess.run(
        ["git", "clone", "--quiet", "--no-hardlinks", ROOT, clone], check=True
    )
    # What `pip install --editable` does in the clone: its folder is the package.
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "kzoo").symlink_to(clone)
    (clone / "tests" / "test_clone.py").write_text(CLONE_TEST)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_clone.py"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "path"), "CLONE": str(clone)},
        cwd=clone,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


CLONE_TEST = """
import os, pathlib, sys
import keras
import kzoo.layers, kzoo.optimizers, kzoo.zoo.metrics


def test_each_class_is_registered_once():
    clone = pathlib.Path(os.environ["CLONE"]).resolve()
    assert pathlib.Path(kzoo.__file__).resolve().parent == clone
    assert not {"layers", "optimizers", "zoo"} & set(sys.modules)
    for index in (kzoo.layers, kzoo.optimizers, kzoo.zoo.metrics):
        for thing in vars(index).values():
            name = isinstance(thing, type) and keras.saving.get_registered_name(thing)
            if name and name.startswith("kzoo>"):
                assert keras.saving.get_registered_object(name) is thing
                module = sys.modules[thing.__module__]
                assert pathlib.Path(module.__file__).resolve().is_relative_to(clone)
"""
