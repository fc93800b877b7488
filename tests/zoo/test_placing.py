"""Files and folders that are there whole or not at all, and what they may be called."""

import os

import pytest

from kzoo.zoo import placing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("before", [None, "old and longer"])
@pytest.mark.parametrize("content", ["é\n", b"\xff\x00", ""])
def test_write(tmp_path, before, content):
    path = tmp_path / "file"
    if before:
        path.write_text(before)
    placing.write(path, content)
    expected = content.encode() if isinstance(content, str) else content
    assert path.read_bytes() == expected
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, error):
    path = tmp_path / "file"
    path.write_text("before")

    def fail(*_):
        assert path.read_text() == "before"
        raise error

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(os, name, fail)
            placing.write(path, "after")
        assert path.read_text() == "before"
        assert names(tmp_path) == ["file"]


def test_a_write_does_not_go_through_a_link_nor_stops_at_a_leftover(tmp_path):
    (tmp_path / "other").write_text("other")
    # As a process of the same number left it.
    (tmp_path / f".file.{os.getpid()}.partial").symlink_to(tmp_path / "other")
    placing.write(tmp_path / "file", "new")
    assert (tmp_path / "other").read_text() == "other"
    assert (tmp_path / "file").read_text() == "new"
    assert names(tmp_path) == ["file", "other"]


def test_all_of_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    partial, target = tmp_path / ".1.partial", tmp_path / "1"
    (partial / "variables").mkdir(parents=True)
    (partial / "variables" / "data").write_text("data")
    opened, synced = {}, []
    open_file, sync = os.open, os.fsync

    def remember(path, *args):
        descriptor = open_file(path, *args)
        opened[descriptor] = os.path.relpath(path, tmp_path)
        return descriptor

    def note(descriptor):
        synced.append((opened[descriptor], target.exists()))
        sync(descriptor)

    monkeypatch.setattr(os, "open", remember)
    monkeypatch.setattr(os, "fsync", note)
    placing.place(partial, target)
    assert synced == [
        (".1.partial", False),
        (".1.partial/variables", False),
        (".1.partial/variables/data", False),
        (".", True),
    ]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(placing, "exchange", lambda *_: False)
    for name in (".1.partial", "1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    placing.place(tmp_path / ".1.partial", tmp_path / "1")
    assert names(tmp_path) == ["1"] and names(tmp_path / "1") == [".1.partial"]


@pytest.mark.parametrize(
    "name, version",
    [
        ("0", 0),
        ("7", 7),
        ("9223372036854775807", 2**63 - 1),
        ("9223372036854775808", None),
        ("99999999999999999999", None),
        ("007", None),
        ("-1", None),
        ("+1", None),
        ("1.0", None),
        ("1_0", None),
        (" 1", None),
        ("1\n", None),
        ("７", None),
        (".1.partial", None),
        ("", None),
    ],
)
def test_version_of(name, version):
    assert placing.version_of(name) == version


@pytest.mark.parametrize("name", ["m", "resnet8_digits", "A-1.b", "_", "7b", "m" * 128])
def test_names_of_models(name):
    assert placing.is_model_name(name)


@pytest.mark.parametrize(
    "name", ["", ".m", "-m", "..", "a/b", "a b", "é", "m\n", "7", "m" * 129, None, 7]
)
def test_what_is_no_name_of_a_model(name):
    assert not placing.is_model_name(name)
