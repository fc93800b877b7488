"""Streams: each goes on in the next batch, labels follow, rare characters have id 0."""

import numpy as np
import pytest
import tensorflow as tf

from kzoo.zoo import build
from kzoo.zoo.datasets import load, python_source, text_streams
from kzoo.zoo.datasets.text_streams import batches, code_points

pytestmark = pytest.mark.tensorflow


def test_batches_go_on_where_the_last_one_ended():
    rows, steps = 3, 4
    ids = np.arange(100, 131)  # Streams of ten, of which two batches have eight.
    found = list(batches(ids, rows, steps).as_numpy_iterator())
    assert len(found) == 2
    x, y = (np.concatenate(part, 1) for part in zip(*found, strict=True))
    np.testing.assert_array_equal(x, 100 + 10 * np.arange(3)[:, None] + np.arange(8))
    np.testing.assert_array_equal(y, x + 1)
    with pytest.raises(ValueError, match="Received: 31, rows=3, steps=11"):
        batches(ids, rows, 11)
    (last,) = batches(ids, 3, 10).as_numpy_iterator()
    assert last[1][-1, -1] == ids[-1]


def test_texts_are_of_whole_lines():
    texts = ["a b", "", "c\n", "ü\nd", "\n\n", "e"]
    dataset = tf.data.Dataset.from_tensor_slices({"text": texts})
    found = code_points(dataset, "text")
    assert "".join(map(chr, found)) == "a b\nc\nü\nd\n\n\ne\n"


def test_refuses_what_is_no_text():
    dataset = tf.data.Dataset.from_tensor_slices(
        {"text": ["a"], "n": [1], "words": [["a", "b"]]}
    )
    for feature in ("n", "words", "other"):
        with pytest.raises(ValueError, match=rf"\['text'\].*feature='{feature}'"):
            code_points(dataset, feature)


def test_the_registered_model_has_an_id_for_each_character(tmp_path):
    _, characters = text_streams(splits=["train"], rows=1, steps=1, data_dir=tmp_path)
    table = build("rev_gru_python_source", units=2).get_layer("embedding")
    assert 1 + len(characters) <= table.input_dim


def test_ids_are_of_what_the_first_split_has_often(tmp_path, monkeypatch):
    texts = {f"{i:02d}.py": "abba\n" for i in range(60)}
    paths = python_source.split_files(list(texts))
    texts[paths["train"][0]] = "ab\u4e16ü"
    texts[paths["test"][0]] = "zbaü\u4e16" * 9
    monkeypatch.setattr(python_source, "source_files", lambda: texts)
    streams, characters = text_streams(rows=1, steps=4, least=2, data_dir=tmp_path)
    assert characters == "\nab" and list(streams) == ["train", "validation", "test"]
    order, _ = load("python_source", "test", data_dir=tmp_path, as_supervised=False)
    text = b"".join(example["text"] for example in order.as_numpy_iterator()).decode()
    text = text.replace("\u4e16ab", "\u4e16\nab")
    assert "zbaü\u4e16" in text
    expected = [(" " + characters).find(c) if c in characters else 0 for c in text]
    ids = np.concatenate([x[0] for x, _ in streams["test"].as_numpy_iterator()])
    np.testing.assert_array_equal(ids, expected[: len(ids)])
    assert 0 in ids
    with pytest.raises(ValueError, match=r"\['path', 'text'\].*feature='lines'"):
        text_streams(rows=1, steps=4, feature="lines", data_dir=tmp_path)
    with pytest.raises(ValueError, match="Received: rows=0"):
        text_streams(rows=0, steps=4, data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"Received: splits=\[\]"):
        text_streams(splits=(), rows=1, steps=4, data_dir=tmp_path)
