import json
import statistics

import keras
import numpy as np
import pytest

from kzoo.layers import AverageMembers, DenseBatchEnsemble, TileMembers
from kzoo.zoo import hub, pretrained, register_model, registry, results
from kzoo.zoo.cli import main as kzoo
from kzoo.zoo.serving.servable import Servable

pytestmark = pytest.mark.tensorflow


@pytest.fixture(scope="module")
def tiny():
    """An ensemble that trains in a moment."""

    @register_model(
        "tiny_pretrained",
        description="A tiny ensemble.",
        dataset="digits",
        input_shape=(8, 8, 1),
        paper="https://arxiv.org/abs/2002.06715",
        recipe={"batch_size": 32},
    )
    def build():
        image = keras.Input((8, 8, 1), name="image")
        x = TileMembers(2)(keras.layers.Flatten()(image))
        x = DenseBatchEnsemble(10, ensemble_size=2)(x)
        return keras.Model(image, AverageMembers(2)(x), name="tiny_pretrained")

    yield "tiny_pretrained"
    del registry._MODELS["tiny_pretrained"]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """(folder, the arguments that made it)."""
    folder = tmp_path_factory.mktemp("pretrained")
    arguments = ["--models", tiny, "--seeds", "0", "1", "2", "--epochs", "1"]
    arguments += ["--run-dir", str(folder / "runs")]
    arguments += ["--results", str(folder / "digits.jsonl")]
    arguments += ["--to", str(folder / "saved_models")]
    assert pretrained.main(arguments) == 0
    return folder, arguments


def snapshot(folder):
    files = [*folder.glob("digits.jsonl"), *folder.glob("saved_models/**/*")]
    return {p: p.read_bytes() for p in files if p.is_file() and p.name != ".lock"}


@pytest.mark.slow
def test_each_seed_is_one_line(made):
    folder, _ = made
    records = results.read(folder / "digits.jsonl")
    assert [record["seed"] for record in records] == [0, 1, 2]
    for record in records:
        assert record["command"] == "python -m kzoo.zoo.pretrained"
        assert record["recipe"]["epochs"] == 1
        assert record["recipe"]["batch_size"] == 32
        assert record["optimizer"] == "Lookahead(Adam)"
        assert record["members"] == 2
        assert record["parameters"] == 64 * 10 + 2 * 64 + 2 * 10 + 2 * 10
        assert record["validation"]["examples"] == 180
        assert record["test"]["examples"] == 359
        history = json.loads(
            (
                folder / f"runs/tiny_pretrained-seed{record['seed']}/history.json"
            ).read_text()
        )["history"]
        assert record["validation"]["nll"] == pytest.approx(
            history["val_nll"][-1], 1e-5
        )
        assert record["versions"]["keras"] == keras.__version__


@pytest.mark.slow
def test_the_seed_best_on_validation_is_exported(made, capsys):
    folder, _ = made
    records = results.read(folder / "digits.jsonl")
    best = min(records, key=lambda record: record["validation"]["nll"])
    assert hub.versions(folder / "saved_models/tiny_pretrained") == [1]
    place = str(folder / "saved_models/tiny_pretrained")
    data = ["--dataset", "digits", "--data-dir", str(folder / "runs/data")]
    assert kzoo(["evaluate", place, *data, "--split", "test", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    for key, value in best["test"].items():
        assert figures[key] == pytest.approx(value, abs=1e-5), key


@pytest.mark.slow
def test_the_card_holds_what_was_measured(made):
    folder, _ = made
    records = results.read(folder / "digits.jsonl")
    best = min(records, key=lambda record: record["validation"]["nll"])
    card = (folder / "saved_models/tiny_pretrained/README.md").read_text()
    for heading in (
        "Purpose",
        "Data",
        "Training",
        "Figures",
        "Signatures",
        "Use",
        "Limitations",
        "Licence",
    ):
        assert card.count(f"\n## {heading}\n") == 1
    for split in ("validation", "test"):
        values = [record[split]["nll"] for record in records]
        spread = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
        assert f"| {spread} | {best[split]['nll']:.4f} |" in card
    assert f"| seed of this SavedModel | {best['seed']}, " in card
    assert "| `image` | input | float32 | [batch, 8, 8, 1] |" in card
    assert "| `member_probabilities` | output | float32 | [batch, 2, 10] |" in card
    assert "| learning rate | 0.001 |" in card


@pytest.mark.slow
def test_the_folder_is_a_mirror(made, tmp_path, monkeypatch):
    folder, _ = made
    monkeypatch.setattr(hub, "PACKAGED", folder / "saved_models")
    assert list(hub.packaged()) == ["tiny_pretrained"]
    place = hub.download("tiny_pretrained", directory=tmp_path)
    servable = Servable(place)
    answer = servable.predict({"image": np.zeros((3, 8, 8, 1), "float32")})
    servable.close()
    assert answer["member_probabilities"].shape == (3, 2, 10)


@pytest.mark.slow
def test_again_changes_nothing(made, capsys):
    folder, arguments = made
    before = snapshot(folder)
    assert pretrained.main(arguments) == 0
    assert capsys.readouterr().out.count("measured before") == 3
    assert snapshot(folder) == before


@pytest.mark.slow
def test_lost_runs_are_trained_again_to_the_same_model(made, tmp_path):
    folder, arguments = made
    before = snapshot(folder)
    arguments = [*arguments, "--run-dir", str(tmp_path / "runs")]
    assert pretrained.main(arguments) == 0
    assert snapshot(folder) == before


@pytest.mark.slow
def test_the_cards_command_trains_the_same_model_again(made, tiny, tmp_path, capsys):
    folder, _ = made
    run = ["--epochs", "1", "--run-dir", str(tmp_path / "run")]
    data = ["--data-dir", str(folder / "runs/data")]
    assert kzoo(["train", tiny, "--seed", "1", *run, *data]) == 0
    capsys.readouterr()
    one, other = (
        keras.saving.load_model(path / "model.keras", compile=False).get_weights()
        for path in (tmp_path / "run", folder / f"runs/{tiny}-seed1")
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_published_version_is_not_replaced_by_another_model(made, tmp_path, capsys):
    folder, arguments = made
    before = snapshot(folder)
    other = ["--epochs", "2", "--run-dir", str(tmp_path / "runs"), "--seeds", "0"]
    assert pretrained.main([*arguments, *other]) == 1
    assert "with another recipe" in capsys.readouterr().err
    other += ["--results", str(tmp_path / "digits.jsonl")]
    assert pretrained.main([*arguments, *other]) == 1
    err = capsys.readouterr().err
    assert "holds another model" in err and "--overwrite" in err
    assert snapshot(folder) == before


def test_an_unknown_model(tmp_path, capsys):
    arguments = ["--models", "nosuch", "--run-dir", str(tmp_path)]
    assert pretrained.main(arguments) == 1
    assert "No model has this name" in capsys.readouterr().err
