"""Versions coming and going, with servables that only remember what was done."""

import contextlib
import threading
import time

import pytest

from kzoo.zoo.serving.models import Model, ModelConfig, State
from kzoo.zoo.serving.status import Code, ServingError

pytestmark = pytest.mark.tensorflow


class Servable:
    """Like the real one, without TensorFlow."""

    def __init__(self, path):
        self.path = path
        self.users = 0
        self.closed = False
        self.free = threading.Condition()

    def __enter__(self):
        with self.free:
            self.users += 1

    def __exit__(self, *error):
        with self.free:
            self.users -= 1
            self.free.notify_all()

    def close(self):
        with self.free:
            self.free.wait_for(lambda: not self.users, timeout=5)
        self.closed = True


class Folder:
    """A base folder whose versions load unless they hold a file `broken`."""

    def __init__(self, path):
        self.path = path
        self.loaded = []
        self.error = ServingError(Code.DATA_LOSS, "broken")

    def model(self, versions=None, labels=()):
        config = ModelConfig(self.path, versions, dict(labels))
        return Model("m", config, self.load)

    def add(self, *names):
        for name in names:
            (self.path / str(name)).mkdir()

    def remove(self, name):
        folder = self.path / str(name)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()

    def load(self, path):
        self.loaded.append(path.name)
        if (path / "broken").exists():
            raise self.error
        return Servable(path)


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def states(model):
    return {number: state.name for number, state, *_ in model.status()}


def newest(model):
    with model.lend() as (version, _):
        return version


def code(call):
    with pytest.raises(ServingError) as caught, contextlib.ExitStack() as stack:
        result = call()
        if hasattr(result, "__enter__"):
            stack.enter_context(result)
    return caught.value.code


def test_the_newest_version_is_served_by_number_not_by_name(folder):
    folder.add(2, 10, 9)
    model = folder.model()
    model.refresh()
    assert folder.loaded == ["10"] and newest(model) == 10
    assert states(model) == {10: "AVAILABLE"}


def test_what_is_not_a_version_is_skipped(folder):
    folder.add("tmp", ".3.partial", "1.5", "-4", "+5", "007", "６", " 8", "1e3")
    folder.add("9" * 19, 1)
    (folder.path / "11").write_text("a file")
    model = folder.model("all")
    model.refresh()
    assert states(model) == {1: "AVAILABLE"}


def test_a_new_version_is_loaded_before_the_old_one_is_unloaded(folder):
    folder.add(1)
    model = folder.model()
    model.refresh()
    old = model.versions[1].servable
    folder.add(2)
    seen = []
    load = folder.load
    model._load = lambda path: seen.append(old.closed) or load(path)
    model.refresh()
    assert seen == [False] and old.closed
    assert states(model) == {2: "AVAILABLE", 1: "END"}


def test_a_version_in_use_is_unloaded_only_after_its_last_request(folder):
    folder.add(1)
    model = folder.model()
    model.refresh()
    folder.add(2)
    with model.lend() as (version, servable):
        thread = threading.Thread(target=model.refresh)
        thread.start()
        deadline = time.monotonic() + 5
        while states(model).get(1) != "UNLOADING" and time.monotonic() < deadline:
            time.sleep(0.001)
        assert states(model) == {2: "AVAILABLE", 1: "UNLOADING"}
        assert version == 1 and not servable.closed
        assert newest(model) == 2  # others are not kept waiting
        assert code(lambda: model.lend(1)) is Code.NOT_FOUND
    thread.join(5)
    assert servable.closed and states(model) == {2: "AVAILABLE", 1: "END"}


def test_a_version_that_does_not_load_leaves_the_old_one(folder):
    folder.add(1)
    model = folder.model()
    model.refresh()
    folder.add(2)
    (folder.path / "2" / "broken").touch()
    for _ in range(3):
        model.refresh()
    assert folder.loaded == ["1", "2"]  # not tried again while nothing changed
    assert newest(model) == 1
    assert model.status(2) == [(2, State.END, Code.DATA_LOSS, "broken")]
    (folder.path / "2" / "broken").unlink()
    model.refresh()
    assert newest(model) == 2 and states(model) == {2: "AVAILABLE", 1: "END"}


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("broken"), Code.NOT_FOUND),
        (OSError("broken"), Code.UNKNOWN),
        (KeyError("broken"), Code.UNKNOWN),
        (MemoryError(), Code.UNKNOWN),
    ],
)
def test_whatever_loading_raises_the_other_versions_are_served(folder, error, code):
    folder.add(1, 2, 3)
    (folder.path / "2" / "broken").touch()
    folder.error = error
    model = folder.model("all")
    model.refresh()
    assert states(model) == {3: "AVAILABLE", 2: "END", 1: "AVAILABLE"}
    ((_, _, got, message),) = model.status(2)
    assert got is code and message
    model.refresh()
    assert folder.loaded == ["3", "2", "1"]


def test_an_older_version_serves_until_the_newest_loads(folder):
    folder.add(1, 2, 3, 4)
    for version in "43":
        (folder.path / version / "broken").touch()
    model = folder.model()
    model.refresh()
    model.refresh()
    assert folder.loaded == ["4", "3", "2"]
    assert states(model) == {4: "END", 3: "END", 2: "AVAILABLE"}
    (folder.path / "3" / "broken").unlink()  # not the newest: nothing changes
    model.refresh()
    assert newest(model) == 2
    (folder.path / "4" / "broken").unlink()
    model.refresh()
    assert states(model) == {4: "AVAILABLE", 3: "END", 2: "END"}


def test_folders_that_cannot_be_read_do_not_stop_a_look(folder, monkeypatch):
    def refused(*_):
        raise PermissionError

    folder.add(1)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rglob", refused)
        patch.setattr("os.scandir", refused)
        model = folder.model()
        patch.setattr(model, "_found", lambda: {1: folder.path / "1"})
        model.refresh()
        assert newest(model) == 1
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.is_dir", refused)
        model.refresh()
    assert states(model) == {1: "AVAILABLE"}


def test_a_removed_version_makes_place_for_the_one_before(folder):
    folder.add(1, 2)
    model = folder.model()
    model.refresh()
    folder.remove(2)
    model.refresh()
    assert states(model) == {1: "AVAILABLE", 2: "END"}
    folder.remove(1)
    model.refresh()
    assert states(model) == {1: "END", 2: "END"}
    assert code(model.lend) is Code.NOT_FOUND
    folder.add(2)
    model.refresh()
    assert states(model) == {1: "END", 2: "AVAILABLE"}


def test_a_base_folder_that_is_away_for_a_moment_unloads_nothing(folder):
    folder.add(1)
    model = folder.model()
    model.refresh()
    away = folder.path.with_name("away")
    folder.path.rename(away)
    model.refresh()
    assert newest(model) == 1
    away.rename(folder.path)
    model.refresh()
    assert folder.loaded == ["1"]


def test_all_and_chosen_versions(folder):
    folder.add(1, 2, 3)
    every, chosen = folder.model("all"), folder.model([1, 3, 7])
    every.refresh()
    chosen.refresh()
    assert states(every) == dict.fromkeys([3, 2, 1], "AVAILABLE")
    assert states(chosen) == dict.fromkeys([3, 1], "AVAILABLE")
    with every.lend(2) as (version, servable):
        assert version == 2 and servable.path.name == "2"
    assert code(lambda: chosen.lend(2)) is Code.NOT_FOUND
    assert code(lambda: chosen.status(2)) is Code.NOT_FOUND


def test_labels_move_only_to_available_versions(folder):
    folder.add(1, 2)
    model = folder.model("all", {"stable": 1})
    model.refresh()
    with model.lend(label="stable") as (version, _):
        assert version == 1
    model.set_labels({"stable": 2, "old": 1})
    with model.lend(label="stable") as (version, _):
        assert version == 2
    with pytest.raises(ValueError, match=r"\[1, 2\].*'next' for version 3"):
        model.set_labels({"next": 3})
    assert model.labels == {"stable": 2, "old": 1}
    assert code(lambda: model.lend(label="next")) is Code.INVALID_ARGUMENT
    assert [number for number, *_ in model.status(label="old")] == [1]


def test_close_waits_for_requests(folder):
    folder.add(1)
    model = folder.model()
    model.refresh()
    with model.lend() as (_, servable):
        thread = threading.Thread(target=model.close)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive() and not servable.closed
    thread.join(5)
    assert servable.closed


@pytest.mark.parametrize(
    "arguments",
    [
        {"versions": "newest"},
        {"versions": 3},
        {"versions": ()},
        {"versions": [1.0]},
        {"versions": [-1]},
        {"versions": [True]},
        {"labels": {"a/b": 1}},
        {"labels": {"": 1}},
        {"labels": {"a": "1"}},
    ],
)
def test_bad_configurations_are_refused(arguments):
    with pytest.raises(ValueError, match="Received"):
        ModelConfig("folder", **arguments)
