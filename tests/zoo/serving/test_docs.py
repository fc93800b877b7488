"""The page on serving: what of it can be tried is."""

import pathlib
import re

import pytest

from kzoo.zoo.serving.server import ModelConfig, read_model_config

pytestmark = pytest.mark.tensorflow

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "serving.md"


def test_the_model_config_file_is_one(tmp_path):
    block, *_ = re.findall(
        r"```proto\n(model_config_list .*?)```", PAGE.read_text(), re.S
    )
    (tmp_path / "models.config").write_text(block)
    assert read_model_config(tmp_path / "models.config") == {
        "digits": ModelConfig(
            "/models/resnet8_batch_ensemble_digits", (1, 2), {"stable": 1, "canary": 2}
        ),
        "digits_single": ModelConfig("/models/resnet8_digits"),
    }


def test_the_examples_in_python_are_python():
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        compile(block, str(PAGE), "exec")
