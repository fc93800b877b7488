"""The standard library's source: which files, their texts, and where each goes."""

import platform
import sysconfig

import pytest

from kzoo.zoo import load
from kzoo.zoo.datasets import python_source
from kzoo.zoo.datasets.python_source import source_files, split_files

pytestmark = pytest.mark.tensorflow


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def test_which_files(tmp_path):
    write(
        tmp_path,
        {
            "os.py": "name = 'é'\n".encode(),
            "json/decoder.py": b"x = 1\n",
            "json/tests/test_decoder.py": b"",
            "test/support.py": b"",
            "site-packages/other.py": b"",
            "_sysconfigdata_linux.py": b"",
            "latin.py": "# -*- coding: latin-1 -*-\né".encode("latin-1"),
            "notes.txt": b"",
        },
    )
    assert list(source_files(tmp_path).items()) == [
        ("json/decoder.py", "x = 1\n"),
        ("os.py", "name = 'é'\n"),
    ]


def test_the_library_of_this_python_is_large():
    texts = source_files()
    assert "os.py" in texts and len(texts) > 500
    assert sum(map(len, texts.values())) > 5e6
    with open(f"{sysconfig.get_path('stdlib')}/os.py", encoding="utf-8") as file:
        assert texts["os.py"] == file.read()


def test_splits_are_fixed_and_hold_every_file_once():
    paths = [f"{i:03d}.py" for i in range(100)]
    parts = split_files(paths)
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 90,
        "validation": 5,
        "test": 5,
    }
    assert sorted(sum(parts.values(), [])) == paths
    assert parts["test"] == [f"{i:03d}.py" for i in (44, 47, 64, 67, 96)]
    assert parts == split_files(paths)


def test_is_prepared_by_name(tmp_path, monkeypatch):
    texts = {f"{i}.py": f"x = {i}  # ü\n" for i in range(20)}
    monkeypatch.setattr(python_source, "source_files", lambda: texts)
    datasets, info = load(
        "python_source",
        ["train", "validation", "test"],
        data_dir=tmp_path,
        as_supervised=False,
    )
    found = {}
    for dataset in datasets:
        for example in dataset.as_numpy_iterator():
            found[example["path"].decode()] = example["text"].decode()
    assert found == texts
    assert info.config_name == platform.python_version()
    assert info.metadata["files"] == 20
    assert info.metadata["characters"] == sum(map(len, texts.values()))
    monkeypatch.setattr(python_source, "source_files", None)  # Not read again.
    again = load("python_source", "train", data_dir=tmp_path, as_supervised=False)[1]
    assert again.metadata["sha256"] == info.metadata["sha256"]
