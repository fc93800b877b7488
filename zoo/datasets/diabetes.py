"""Progress of diabetes as a tensorflow-datasets builder; needs no network."""

import numpy as np
import tensorflow_datasets as tfds

_DESCRIPTION = """\
442 patients with diabetes: ten measurements, in their own units, and a quantitative
measure of how far the disease was a year later (an integer from 25 to 346, without a
unit), as scikit-learn carries them. The features are, in this order: age in years; sex
(1 or 2); body mass index in kg/m2; average blood pressure in mm Hg; and of the blood
serum tc, total cholesterol in mg/dl; ldl, low-density lipoproteins in mg/dl; hdl,
high-density lipoproteins in mg/dl; tch, the ratio of total cholesterol to hdl; ltg, the
logarithm of the triglycerides; glu, sugar in mg/dl. Split here, with a fixed seed, into
309 patients (70 %) for training, 45 (10 %) for validation and 88 (20 %) for testing.
"""

_CITATION = """\
@article{efron2004least,
  author = {Efron, Bradley and Hastie, Trevor and Johnstone, Iain and
            Tibshirani, Robert},
  title = {{Least Angle Regression}},
  journal = {The Annals of Statistics},
  volume = {32},
  number = {2},
  pages = {407--499},
  year = {2004},
  doi = {10.1214/009053604000000067}
}
"""

_SEED = 0


def split_indices(count):
    """Splits examples: 70 %, 10 % and the rest.

    Args:
        count: N.

    Returns:
        dict of sorted index arrays: `train`, `validation` and `test`.
    """
    # RandomState, whose stream NumPy has frozen: the splits must never change.
    order = np.random.RandomState(_SEED).permutation(count)
    cuts = [round(0.7 * count), round(0.8 * count)]
    parts = np.split(order, cuts)
    names = ("train", "validation", "test")
    return {name: np.sort(part) for name, part in zip(names, parts, strict=True)}


class Diabetes(tfds.core.GeneratorBasedBuilder):
    """Builder of the data set `diabetes`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "features": tfds.features.Tensor(shape=(10,), dtype=np.float32),
                    "progression": tfds.features.Scalar(dtype=np.float32),
                }
            ),
            supervised_keys=("features", "progression"),
            homepage="https://www4.stat.ncsu.edu/~boos/var.select/diabetes.html",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_diabetes

        data = load_diabetes(scaled=False)
        features, target = (x.astype(np.float32) for x in (data.data, data.target))
        return {
            name: self._generate_examples(features, target, indices)
            for name, indices in split_indices(len(target)).items()
        }

    def _generate_examples(self, features, target, indices):
        for i in indices.tolist():
            yield i, {"features": features[i], "progression": target[i]}
