"""The digits data set: every image and label, split once and for all."""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from kzoo.zoo.datasets import load
from kzoo.zoo.datasets.digits import split_indices

pytestmark = pytest.mark.tensorflow

SPLITS = ("train", "validation", "test")
# SHA-256 of the splits' indices in scikit-learn's order.
DIGEST = {
    "train": "7871c40f8077d312",
    "validation": "817a7bf35e123d51",
    "test": "ce461253158e62a8",
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Returns the splits as arrays, and the data set's information."""
    folder = tmp_path_factory.mktemp("data")
    datasets, info = load("digits", list(SPLITS), data_dir=folder)
    arrays = {}
    for name, dataset in zip(SPLITS, datasets, strict=True):
        images, labels = zip(*dataset.as_numpy_iterator(), strict=True)
        arrays[name] = np.stack(images), np.array(labels)
    return arrays, info


def test_splits_hold_every_digit_once(digits):
    arrays, info = digits
    images, labels = (np.concatenate(x) for x in zip(*arrays.values(), strict=True))
    assert images.dtype == np.uint8 and images.shape == (1797, 8, 8, 1)
    data = load_digits()

    def rows(images, labels):
        return sorted(
            (x.tobytes(), int(y)) for x, y in zip(images, labels, strict=True)
        )

    expected = rows(data.images.astype(np.uint8), data.target)
    assert rows(images, labels) == expected
    assert len({x for x, _ in expected}) == 1797  # no image is in two splits
    assert images.min() == 0 and images.max() == 16


def test_split_sizes_and_classes(digits):
    arrays, info = digits
    sizes = {name: len(labels) for name, (_, labels) in arrays.items()}
    assert sizes == {name: info.splits[name].num_examples for name in SPLITS}
    assert sizes == {"train": 1258, "validation": 180, "test": 359}
    per_class = np.bincount(load_digits().target)
    for name, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        np.testing.assert_allclose(
            np.bincount(arrays[name][1]), share * per_class, atol=1
        )


def test_the_splits_never_change():
    indices = split_indices(load_digits().target)
    digest = {
        name: hashlib.sha256(part.astype("<i8").tobytes()).hexdigest()[:16]
        for name, part in indices.items()
    }
    assert digest == DIGEST
    np.testing.assert_array_equal(
        np.sort(np.concatenate(list(indices.values()))), np.arange(1797)
    )


def test_information(digits):
    _, info = digits
    assert info.full_name == "digits/1.0.0"
    assert info.supervised_keys == ("image", "label")
    assert info.features["image"].shape == (8, 8, 1)
    assert info.features["label"].num_classes == 10
    assert "10.24432/C50P49" in info.citation
    assert "CC BY 4.0" in info.redistribution_info.license
