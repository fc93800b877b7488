"""The installed Python's standard library as a text corpus; needs no network."""

import hashlib
import platform
import sysconfig
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

_DESCRIPTION = """\
The source files of Python's standard library, its tests left out. Split here by files,
with a fixed seed, into about 90 % for training, 5 % for validation and 5 % for testing.
Each version of Python has its own text: the configuration is the version, and the
metadata hold the number of files and of characters, and the SHA-256 over all paths and
texts in order.
"""

_SEED = 0
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def source_files(folder=None):
    """Reads the source files of a standard library.

    Args:
        folder: Where it is. Defaults to that of the Python that runs.

    Returns:
        dict of texts by path relative to the folder, sorted by path. Tests are left
        out, and files that the build of one machine wrote.
    """
    folder = Path(folder or sysconfig.get_path("stdlib"))
    found = {}
    for file in folder.rglob("*.py"):
        path = file.relative_to(folder)
        if _LEFT_OUT & set(path.parts) or path.name.startswith("_sysconfigdata"):
            continue
        try:
            found[path.as_posix()] = file.read_text("utf-8")
        except UnicodeDecodeError:  # A few say another encoding in their first lines.
            continue
    return dict(sorted(found.items()))


def split_files(paths):
    """Splits paths into about 90 %, 5 % and 5 %.

    Args:
        paths: List of paths.

    Returns:
        dict of sorted lists of paths: `train`, `validation` and `test`.
    """
    # RandomState, whose stream NumPy has frozen: the splits must never change.
    order = np.random.RandomState(_SEED).permutation(len(paths))
    cuts = [round(0.9 * len(paths)), round(0.95 * len(paths))]
    parts = np.split(order, cuts)
    return {
        name: sorted(paths[i] for i in part)
        for name, part in zip(("train", "validation", "test"), parts, strict=True)
    }


class PythonSource(tfds.core.GeneratorBasedBuilder):
    """Builder of the data set `python_source`, whose configuration is the version."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(
            name=platform.python_version(), description="The Python that runs."
        )
    ]

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {"path": tfds.features.Text(), "text": tfds.features.Text()}
            ),
            supervised_keys=None,
            homepage="https://www.python.org",
            license="Python Software Foundation License",
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        texts = source_files()
        sha256 = hashlib.sha256()
        for path, text in texts.items():
            sha256.update(f"{path}\0{text}\0".encode())
        self.info.metadata.update(
            files=len(texts),
            characters=sum(map(len, texts.values())),
            sha256=sha256.hexdigest(),
        )
        return {
            name: self._generate_examples(texts, paths)
            for name, paths in split_files(list(texts)).items()
        }

    def _generate_examples(self, texts, paths):
        for path in paths:
            yield path, {"path": path, "text": texts[path]}
