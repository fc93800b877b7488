"""Breast masses as a tensorflow-datasets builder; needs no network."""

import numpy as np
import tensorflow_datasets as tfds

from .digits import split_indices

_DESCRIPTION = """\
569 breast masses, 212 malignant (0) and 357 benign (1), each described by thirty
numbers computed from an image of cells of a fine needle aspirate, as scikit-learn
carries them. Ten properties of the cells' nuclei stand three times, as their mean, the
standard error of that, and the mean of the three largest ("worst"): radius, texture,
perimeter, area, smoothness, compactness, concavity, concave points, symmetry and
fractal dimension, lengths in pixels. Split here, with a fixed seed and in both classes
alike, into about 70 % for training, 10 % for validation and 20 % for testing.
"""

_CITATION = """\
@misc{wolberg1995breast,
  author = {Wolberg, William and Mangasarian, Olvi and Street, Nick and Street, W.},
  title = {{Breast Cancer Wisconsin (Diagnostic)}},
  year = {1995},
  publisher = {UCI Machine Learning Repository},
  doi = {10.24432/C5DW2B}
}
"""


class BreastCancer(tfds.core.GeneratorBasedBuilder):
    """Builder of the data set `breast_cancer`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "features": tfds.features.Tensor(shape=(30,), dtype=np.float32),
                    "label": tfds.features.ClassLabel(names=["malignant", "benign"]),
                }
            ),
            supervised_keys=("features", "label"),
            homepage="https://doi.org/10.24432/C5DW2B",
            citation=_CITATION,
            license="Creative Commons Attribution 4.0 International (CC BY 4.0)",
        )

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_breast_cancer

        data = load_breast_cancer()
        features = data.data.astype(np.float32)
        return {
            name: self._generate_examples(features, data.target, indices)
            for name, indices in split_indices(data.target).items()
        }

    def _generate_examples(self, features, labels, indices):
        for i in indices.tolist():
            yield i, {"features": features[i], "label": int(labels[i])}
