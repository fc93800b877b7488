"""Names in another style: which names, what they become, their ids, and the splits."""

import platform

import numpy as np
import pytest

from kzoo.zoo import load
from kzoo.zoo.datasets import camel_case
from kzoo.zoo.datasets.camel_case import decode, encode, names, translate

pytestmark = pytest.mark.tensorflow


def test_names_in_whatever_style():
    text = """
    class HTTPServer(Base):
        def read_text(self, readText, READ_TEXT, ReadText, name, utf8_mode, one_2):
            __init_subclass__, _a_b_c, a_b_c_d, a_b_c_d_e, x = 1, 2
    """
    long = f"{'a' * 12}_{'b' * 11}"
    assert names([text, long, f"{long}b", "getURL"]) == [
        "a_b_c",
        "a_b_c_d",
        long,
        "get_url",
        "http_server",
        "read_text",
    ]


def test_words_in_the_opposite_order():
    assert translate("a_b_c_d") == "DCBA"
    assert translate("http_server") == "ServerHttp"


def test_ids():
    ids = encode("_azAZ")
    assert ids.tolist() == [3, 4, 29, 30, 55] + [0] * 19
    assert camel_case.VOCABULARY == 56
    assert decode(ids) == "_azAZ"
    assert decode([1, 4, 5, 2, 6, 0]) == "ab"  # From the start up to the end.


def test_is_prepared_by_name(tmp_path, monkeypatch):
    found = [f"{a}{b}_{'x' * 20}c" for a in "abcdefghij" for b in "abcdefghij"]
    monkeypatch.setattr(camel_case, "source_files", lambda: {"x.py": "\n".join(found)})
    splits, info = load("camel_case", data_dir=tmp_path)
    assert info.config_name == platform.python_version()
    sources = {}
    for name, dataset in splits.items():
        rows = list(dataset.as_numpy_iterator())
        sources[name] = {decode(x["source"]) for x, _ in rows}
        assert len(sources[name]) == len(rows)
        for x, label in rows:
            expected = translate(decode(x["source"]))
            end = len(expected)
            assert decode(label) == decode(x["target"]) == expected
            assert x["target"][0] == 1 and (x["target"][1:] == label[:-1])[:end].all()
            assert label[end] == 2 and not label[end + 1 :].any()
            # Losses pass over where there is padding: nowhere before the end.
            np.testing.assert_array_equal(x["target"] != 0, label != 0)
    assert {name: len(s) for name, s in sources.items()} == {
        "train": 80,
        "validation": 10,
        "test": 10,
    }
    assert set.union(*sources.values()) == set(found)


def test_the_library_of_this_python_has_many():
    found = names(camel_case.source_files().values())
    assert len(found) > 10_000 and "read_text" in found
