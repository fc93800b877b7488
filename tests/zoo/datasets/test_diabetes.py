"""The diabetes data set: every patient, split once and for all."""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_diabetes

from kzoo.zoo import info as model_info
from kzoo.zoo.datasets import load
from kzoo.zoo.datasets.diabetes import split_indices
from kzoo.zoo.models.mlp import _DIABETES

pytestmark = pytest.mark.tensorflow

SIZES = {"train": 309, "validation": 45, "test": 88}
# SHA-256 of the splits' indices in scikit-learn's order.
DIGEST = {
    "train": "95103330e177919e",
    "validation": "455c3e96cbba3f7c",
    "test": "90030e041bbbb25b",
}


@pytest.fixture(scope="module")
def diabetes(tmp_path_factory):
    """Returns the splits as arrays, and the data set's information."""
    folder = tmp_path_factory.mktemp("data")
    datasets, info = load("diabetes", list(SIZES), data_dir=folder)
    arrays = {}
    for name, dataset in zip(SIZES, datasets, strict=True):
        features, target = zip(*dataset.as_numpy_iterator(), strict=True)
        arrays[name] = np.stack(features), np.array(target)
    return arrays, info


def test_splits_hold_every_patient_once_in_raw_units(diabetes):
    arrays, info = diabetes
    data = load_diabetes(scaled=False)
    assert {name: len(y) for name, (_, y) in arrays.items()} == SIZES
    assert {name: info.splits[name].num_examples for name in SIZES} == SIZES
    features, target = (np.concatenate(x) for x in zip(*arrays.values(), strict=True))
    assert features.dtype == target.dtype == np.float32
    expected = np.column_stack([data.data, data.target]).astype("float32")
    found = np.column_stack([features, target])
    np.testing.assert_array_equal(
        found[np.lexsort(found.T)], expected[np.lexsort(expected.T)]
    )
    age, sex, bmi = features.T[:3]
    assert (age.min(), age.max()) == (19, 79) and set(sex) == {1, 2}
    assert 18 <= bmi.min() and bmi.max() < 43
    assert (target.min(), target.max()) == (25, 346)


def test_the_splits_never_change(diabetes):
    indices = split_indices(442)
    digest = {
        name: hashlib.sha256(part.astype("<i8").tobytes()).hexdigest()[:16]
        for name, part in indices.items()
    }
    assert digest == DIGEST
    np.testing.assert_array_equal(
        np.sort(np.concatenate(list(indices.values()))), np.arange(442)
    )
    target = load_diabetes(scaled=False).target
    for name, (_, y) in diabetes[0].items():
        np.testing.assert_array_equal(np.sort(y), np.sort(target[indices[name]]))


def test_information(diabetes):
    _, info = diabetes
    assert info.full_name == "diabetes/1.0.0"
    assert info.supervised_keys == ("features", "progression")
    assert info.features["features"].shape == (10,)
    for unit in ("years", "kg/m2", "mm Hg", "mg/dl"):
        assert unit in info.description
    assert "Least Angle Regression" in info.citation


def test_the_models_constants_are_those_of_the_training_split(diabetes):
    features, target = diabetes[0]["train"]
    np.testing.assert_allclose(_DIABETES["input_mean"], features.mean(0), rtol=1e-3)
    np.testing.assert_allclose(_DIABETES["input_variance"], features.var(0), rtol=1e-3)
    assert _DIABETES["loc"] == pytest.approx(target.mean(), rel=1e-3)
    assert _DIABETES["scale"] == pytest.approx(target.std(), rel=1e-3)
    build = model_info("mlp_regressor_flipout").entry_point
    assert build.__defaults__[0] == len(target)  # num_examples
