"""Set-up of every test: backend, seeds, the processes at the end, strict skips."""

import gc
import os
import pathlib
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest

# Benchmarks that are loaded ask for one only if none is asked for.
os.environ.setdefault("KERAS_BACKEND", keras.backend.backend())

import harness.components
import harness.fresh
import harness.quick
import harness.session
from harness.skips import StrictSkips
from harness.values import leave_to_tensorflow

HERE = pathlib.Path(__file__).parent
LEAVES = (
    "check_layer",
    "check_optimizer",
    "check_loss",
    "check_metric",
    "check_model",
    "record_answer",
    "record_export",
    "record_case",
)
OTHER_BACKEND = harness.fresh.OTHER_BACKEND
# What JAX repeats of this folder: of the harness's own tests, those of what it finds
# otherwise there; of compositions, each optimizer of which others derive.
KEPT = (
    *("test_docs", "test_repository", "test_packaging", "test_benchmarks"),
    *("-compiled]", "-retracing]", "-seed]", "-state]"),
    *("-mixed precision]", "-streaming]", "-reduction]"),
    "repeats_every_case",
    *("[sgd-", "[adam-", "[rmsprop-", "[lion-", "[adamw-"),
)


def pytest_addoption(parser):
    parser.addoption(
        "--all",
        action="store_true",
        help="run the full cross product (dtypes x pairs x seeds), which takes long",
    )
    parser.addoption(
        "--fast",
        action="store_true",
        help="leave out what is marked slow, and the fresh processes at the end",
    )


class RootIsAFolder:
    """The root holds the package's `__init__.py`, which is no test to import.

    Left to itself, pytest imports it by its path: a second copy of the package,
    under the folder's name, or an error if that is no name for a module.
    """

    @staticmethod
    def pytest_collect_directory(path, parent):
        if path == HERE.parent:
            return pytest.Dir.from_parent(parent, path=path)
        return None


def compiles_quickly():
    """Whether XLA was asked for little optimization; so is TensorFlow then."""
    return "backend_optimization_level=0" in os.environ.get("XLA_FLAGS", "")


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job, as `make test` starts one, is deaf to Ctrl-C; the
        # tests of interruptions, and the processes they start, must not be.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if compiles_quickly() and keras.backend.backend() == "tensorflow":
        harness.quick.compile_quickly()
    config.pluginmanager.register(RootIsAFolder)
    if os.environ.get("CI"):
        config.pluginmanager.register(StrictSkips(HERE / "allowed_skips.txt"))


@pytest.fixture(scope="session", autouse=True)
def contract_session(tmp_path_factory, pytestconfig):
    """Where the harness leaves what fresh processes answer at the end."""
    folder = tmp_path_factory.mktemp("contract")
    harness.session.current = harness.session.Session(folder, pytestconfig.option.all)
    return harness.session.current


def pytest_terminal_summary(terminalreporter):
    seconds = harness.session.current.seconds if harness.session.current else []
    if seconds:
        terminalreporter.write_line(
            f"contract: {len(seconds)} components, {sum(seconds) / len(seconds):.1f} s "
            f"each, at most {max(seconds):.1f} s"
        )


@pytest.fixture(scope="session", autouse=True)
def data_folder(tmp_path_factory):
    """Prepared data sets go to a temporary folder, not to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(autouse=True)
def fixed_start():
    """Every test starts from the same random state, policy and names."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


# Collection: tests of the other backend go, the fresh processes come last.


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(session, config, items):
    leave_to_tensorflow(config, items, HERE.name, KEPT)
    fast = config.option.fast
    without = [OTHER_BACKEND, "slow"] if fast else [OTHER_BACKEND]
    deselected = [i for i in items if any(map(i.get_closest_marker, without))]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]
    if not fast and any(uses_harness(item) for item in items):
        last = []
        if config.option.all or keras.backend.backend() == "jax":
            last.append(("other backend", harness.fresh.check_other_backend, "cases"))
        if keras.backend.backend() == "tensorflow":
            last.append(("fresh process", harness.fresh.check_exports, "exports"))
        for name, check, kind in last:
            items.append(Last.from_parent(session, name=name, check=check, kind=kind))
        if not selects(config):
            items.append(Everything.from_parent(session, name="everything"))


def pytest_collection_finish():
    """What was imported stays: no collection of garbage looks at it again."""
    gc.collect()
    gc.freeze()


def selects(config):
    """Whether only some tests of a file may have been asked for."""
    option = config.option
    some = option.keyword or option.markexpr or option.deselect
    some = some or getattr(option, "lf", False)
    return bool(some) or any("::" in argument for argument in config.args)


def uses_harness(item):
    """Whether a test's module names what leaves work for the fresh processes."""
    module = getattr(item, "module", None)
    return any(hasattr(module, name) for name in LEAVES)


class Everything(pytest.Item):
    """Requires a contract call of every component whose tests have run."""

    def runtest(self):
        files = {item.path for item in self.session.items}
        harness.components.check_everything(harness.session.get(), files)

    def reportinfo(self):
        return HERE / "harness" / "components.py", None, self.name

    def repr_failure(self, excinfo):
        return str(excinfo.value)


class Last(pytest.Item):
    """Asks one fresh process for everything the session's checks have left."""

    def __init__(self, check, kind, **kwargs):
        super().__init__(**kwargs)
        self.check, self.kind = check, kind

    def runtest(self):
        # Not vacuous: `check` requires an answer to each, and there is one.
        if not harness.session.get().counts[self.kind]:
            pytest.skip(f"no check of this run has left any {self.kind}")
        self.check()

    def reportinfo(self):
        return HERE / "harness" / "fresh.py", None, self.name

    def repr_failure(self, excinfo):
        return str(excinfo.value)
