"""Names of the standard library to be written in another style; needs no network."""

import platform
import re

import numpy as np
import tensorflow_datasets as tfds

from .python_source import source_files

_DESCRIPTION = """\
A small translation task, character by character: a name of two to four words in snake
case, such as `read_text_file`, becomes one in camel case with the words in the opposite
order, `FileTextRead`. The names are those that the source files of Python's standard
library hold, in whatever style (`read_text`, `ReadText`, `READ_TEXT`), each once, of at
most 24 characters in snake case. Split here, with a fixed seed, into about 80 % for
training, 10 % for validation and 10 % for testing: no name is in two splits, its words
may be. Each version of Python has its own names: the configuration is the version.

Sequences are of ids, 0 for padding; `target` starts with 1, for the beginning, and
`label` has what follows each of its ids, 2 for the end at last.
"""

PADDING, START, END = range(3)
ALPHABET = "_abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
VOCABULARY = 3 + len(ALPHABET)
LENGTH = 24  # Of sources, and of targets with their start.

_SEED = 0
_NAME = re.compile(r"[A-Za-z_]*[A-Za-z]")
# In HTTPServer and readText words begin at S and at T.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def names(texts):
    """Finds the names of two to four words in texts.

    Args:
        texts: Strings.

    Returns:
        Sorted list of the different ones of at most 24 characters, in snake case.
    """
    tokens = {token for text in texts for token in re.findall(r"\w+", text)}
    found = set()
    for token in filter(_NAME.fullmatch, tokens):
        words = [word.lower() for word in _WORD.findall(token)]
        if 2 <= len(words) <= 4:
            found.add("_".join(words))
    return sorted(name for name in found if len(name) <= LENGTH)


def translate(name):
    """Writes a name in snake case in camel case, its words in the opposite order.

    Args:
        name: String.

    Example:

    >>> from kzoo.zoo.datasets.camel_case import translate
    >>> translate("read_text_file")
    'FileTextRead'
    """
    return "".join(word.capitalize() for word in reversed(name.split("_")))


def encode(text):
    """Returns the ids of a text's characters, `[LENGTH]`, padded with zeros.

    Args:
        text: String of at most `LENGTH` characters of `ALPHABET`.
    """
    ids = np.zeros(LENGTH, np.int32)
    ids[: len(text)] = [ALPHABET.index(character) + 3 for character in text]
    return ids


def decode(ids):
    """Returns the text of ids, up to the end or padding.

    Args:
        ids: Integers.

    Example:

    >>> from kzoo.zoo.datasets.camel_case import decode, encode
    >>> decode(encode("read_text"))
    'read_text'
    """
    text = ""
    for i in map(int, ids):
        if i in (PADDING, END):
            break
        text += ALPHABET[i - 3] if i > END else ""
    return text


class CamelCase(tfds.core.GeneratorBasedBuilder):
    """Builder of the data set `camel_case`, whose configuration is Python's version."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(
            name=platform.python_version(), description="The Python that runs."
        )
    ]

    def _info(self):
        ids = tfds.features.Tensor(shape=(LENGTH,), dtype=np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {"source": ids, "target": ids, "label": ids}
            ),
            supervised_keys=({"source": "source", "target": "target"}, "label"),
            homepage="https://www.python.org",
            license="Python Software Foundation License",
        )

    def _split_generators(self, dl_manager):
        found = names(source_files().values())
        # RandomState, whose stream NumPy has frozen: the splits must never change.
        order = np.random.RandomState(_SEED).permutation(len(found))
        cuts = [round(0.8 * len(found)), round(0.9 * len(found))]
        return {
            name: self._generate_examples([found[i] for i in sorted(part)])
            for name, part in zip(
                ("train", "validation", "test"), np.split(order, cuts), strict=True
            )
        }

    def _generate_examples(self, found):
        for name in found:
            label = encode(translate(name))
            label[np.flatnonzero(label == PADDING)[0]] = END
            target = np.roll(label, 1)
            target[0] = START
            target[label == PADDING] = PADDING
            yield name, {"source": encode(name), "target": target, "label": label}
