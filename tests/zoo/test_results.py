import json
import multiprocessing

import pytest

from kzoo import __version__
from kzoo.zoo import results


def append_many(path, writer):
    for i in range(50):
        results.append(path, {"writer": writer, "i": i, "pad": "x" * 2000})


def test_a_record_comes_back_with_its_provenance(tmp_path):
    path = tmp_path / "deep" / "figures.jsonl"
    assert results.read(path) == []
    results.append(path, {"claim": "a", "ratio": 1.25})
    results.append(path, {"claim": "b", "ratio": 0.5})
    first, second = results.read(path)
    assert (first["claim"], first["ratio"]) == ("a", 1.25)
    assert (second["claim"], second["ratio"]) == ("b", 0.5)
    assert first["versions"]["kzoo"] == __version__
    assert first["versions"]["keras"].startswith("3.")
    assert first["machine"]["cores"] >= 1


def test_writers_at_the_same_time_never_mix_their_lines(tmp_path):
    path = tmp_path / "figures.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=append_many, args=(path, w)) for w in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    records = results.read(path)
    seen = sorted((record["writer"], record["i"]) for record in records)
    assert seen == [(w, i) for w in range(2) for i in range(50)]


def test_a_damaged_file_is_not_read_as_results(tmp_path):
    path = tmp_path / "figures.jsonl"
    path.write_text('{"claim": "a"}\n{"claim": \n')
    with pytest.raises(json.JSONDecodeError):
        results.read(path)
