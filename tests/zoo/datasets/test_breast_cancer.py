"""The breast cancer data set: every mass, split once and for all."""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer

from kzoo.zoo.datasets import load
from kzoo.zoo.datasets.digits import split_indices

pytestmark = pytest.mark.tensorflow

SIZES = {"train": 398, "validation": 58, "test": 113}
# SHA-256 of the splits' indices in scikit-learn's order.
DIGEST = {
    "train": "48d8ec335b4e9adc",
    "validation": "a65de08d533c8248",
    "test": "88dba4c986ce80f3",
}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Returns the splits as arrays, and the data set's information."""
    folder = tmp_path_factory.mktemp("data")
    datasets, info = load("breast_cancer", list(SIZES), data_dir=folder)
    arrays = {}
    for name, dataset in zip(SIZES, datasets, strict=True):
        features, labels = zip(*dataset.as_numpy_iterator(), strict=True)
        arrays[name] = np.stack(features), np.array(labels)
    return arrays, info


def test_splits_hold_every_mass_once_with_its_label(splits):
    arrays, info = splits
    data = load_breast_cancer()
    assert {name: len(y) for name, (_, y) in arrays.items()} == SIZES
    features, labels = (np.concatenate(x) for x in zip(*arrays.values(), strict=True))
    expected = np.column_stack([data.data, data.target]).astype("float32")
    found = np.column_stack([features, labels])
    np.testing.assert_array_equal(
        found[np.lexsort(found.T)], expected[np.lexsort(expected.T)]
    )
    names = info.features["label"].names
    assert names == data.target_names.tolist() == ["malignant", "benign"]
    assert sum(labels == 0) == 212 and "212 malignant (0)" in info.description


def test_the_splits_never_change_and_have_the_classes_alike(splits):
    target = load_breast_cancer().target
    for name, indices in split_indices(target).items():
        digest = hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()[:16]
        assert digest == DIGEST[name]
        labels = splits[0][name][1]
        np.testing.assert_array_equal(np.sort(labels), np.sort(target[indices]))
        assert labels.mean() == pytest.approx(target.mean(), abs=0.01)
