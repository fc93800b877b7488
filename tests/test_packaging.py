"""The wheel: built, installed into an empty environment, imported there."""

import configparser
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import kzoo

# The backends do not differ in it.
pytestmark = pytest.mark.tensorflow

ROOT = pathlib.Path(__file__).parents[1]
# Folders of the root that are no part of the package.
OUTSIDE = {"tests", "benchmarks", "docs", "runs", "saved_models", "build", "dist"}

SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def run(*command, **kwargs):
    """Runs a command; returns what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=600,
        **kwargs,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def git_files():
    """The files git knows or would add: the tree without what it ignores."""
    listed = run(
        "git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT
    )
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


def test_packages_are_the_folders():
    folders = {
        ".".join(("kzoo", *pathlib.Path(name).parent.parts))
        for name in git_files()
        if pathlib.Path(name).name == "__init__.py"
        and pathlib.Path(name).parts[0] not in OUTSIDE
    }
    assert set(SETUP["options"]["packages"].split()) == folders


def test_every_python_file_of_the_package_is_in_a_package():
    packages = set(SETUP["options"]["packages"].split())
    for name in git_files():
        path = pathlib.Path(name)
        if path.suffix == ".py" and path.parts[0] not in OUTSIDE:
            assert ".".join(("kzoo", *path.parent.parts)) in packages, name


def test_extras():
    extras = SETUP["options.extras_require"]
    assert {"jax", "serve", "gpu", "test"} <= set(extras)
    for requirement in SETUP["options"]["install_requires"].split("\n"):
        assert not requirement.startswith(("jax", "grpcio", "pytest")), requirement


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the tree as it is, built from a copy of it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in git_files():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "source" / name)
    before = run("git", "status", "--porcelain", "--ignored", cwd=ROOT)
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation"),
        *("--no-deps", "--wheel-dir", folder, folder / "source"),
        cwd=folder,
    )
    assert run("git", "status", "--porcelain", "--ignored", cwd=ROOT) == before
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of an environment that holds the wheel and nothing else.

    The dependencies come from this environment through a .pth line, which does not
    read the .pth files it leads to: an editable install here stays out of sight.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet"),
        *("--no-deps", "--no-index", "--no-compile", wheel),
        cwd=folder,
    )
    (packages,) = folder.glob("lib/python*/site-packages")
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(here)))
    return folder


def clean():
    """An environment in which only the installed package can be found."""
    return {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"kzoo-{kzoo.__version__}.dist-info/"
    assert {name.split("/")[0] + "/" for name in names} == {"kzoo/", info}
    assert f"{info}licenses/LICENSE" in names
    held = {name for name in names if name.startswith("kzoo/")}
    for name in git_files():
        path = pathlib.Path(name)
        inside = path.suffix == ".py" and path.parts[0] not in OUTSIDE
        inside |= path.parts[0] == "saved_models"
        assert (f"kzoo/{name}" in held) == inside, name


@pytest.mark.slow
def test_it_is_imported_from_an_empty_environment(installed):
    packages = SETUP["options"]["packages"].split()
    code = (
        "import importlib, json, kzoo\n"
        f"for name in {packages}: importlib.import_module(name)\n"
        "print(json.dumps([kzoo.__version__, kzoo.__file__]))"
    )
    python = installed / "bin" / "python"
    out = run(python, "-c", code, cwd=installed, env=clean())
    version, file = json.loads(out.splitlines()[-1])
    assert version == kzoo.__version__
    assert pathlib.Path(file).is_relative_to(installed)


@pytest.mark.slow
def test_its_command_runs_there(installed):
    command = installed / "bin" / "kzoo"
    out = run(command, "--version", cwd=installed, env=clean())
    assert kzoo.__version__ in out


@pytest.mark.slow
def test_it_carries_the_pretrained_models(installed):
    code = "import pathlib, kzoo; print(pathlib.Path(kzoo.__file__).parent)"
    python = installed / "bin" / "python"
    there = pathlib.Path(run(python, "-c", code, cwd=installed, env=clean()).strip())
    index = json.loads((there / "saved_models" / "index.json").read_text())
    assert index["models"]
    for name, model in index["models"].items():
        folder = there / "saved_models" / name / str(model["version"])
        for file in model["files"]:
            assert (folder / file["path"]).stat().st_size == file["bytes"]
