"""Handwritten digits as a tensorflow-datasets builder; needs no network."""

import numpy as np
import tensorflow_datasets as tfds

_DESCRIPTION = """\
1,797 handwritten digits of 13 people, 8x8 pixels with 17 grey levels (0 to 16): the
test set of the UCI data set Optical Recognition of Handwritten Digits, as scikit-learn
carries it. Split here, with a fixed seed and in every class alike, into about 70 %
for training, 10 % for validation and 20 % for testing.
"""

_CITATION = """\
@misc{alpaydin1998optical,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {{Optical Recognition of Handwritten Digits}},
  year = {1998},
  publisher = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49}
}
"""

_SEED = 0


def split_indices(labels):
    """Splits examples in every class alike: 70 %, 10 % and the rest.

    Args:
        labels: Integer classes, `[N]`.

    Returns:
        dict of sorted index arrays: `train`, `validation` and `test`.
    """
    # RandomState, whose stream NumPy has frozen: the splits must never change.
    random = np.random.RandomState(_SEED)
    parts = {"train": [], "validation": [], "test": []}
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        cuts = [round(0.7 * len(members)), round(0.8 * len(members))]
        for part, indices in zip(parts, np.split(members, cuts), strict=True):
            parts[part].append(indices)
    return {name: np.sort(np.concatenate(part)) for name, part in parts.items()}


class Digits(tfds.core.GeneratorBasedBuilder):
    """Builder of the data set `digits`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://doi.org/10.24432/C50P49",
            citation=_CITATION,
            license="Creative Commons Attribution 4.0 International (CC BY 4.0)",
        )

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_digits

        data = load_digits()
        images = data.images.astype(np.uint8)[..., np.newaxis]
        return {
            name: self._generate_examples(images, data.target, indices)
            for name, indices in split_indices(data.target).items()
        }

    def _generate_examples(self, images, labels, indices):
        for i in indices.tolist():
            yield i, {"image": images[i], "label": int(labels[i])}
