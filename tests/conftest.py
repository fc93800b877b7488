"""Set-up of every test: backend, seeds, and the two kinds of backend markers."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--all",
        action="store_true",
        help="run the full cross product (dtypes x pairs x seeds), which takes long",
    )


def pytest_collection_modifyitems(config, items):
    other = {"tensorflow": "jax", "jax": "tensorflow"}[keras.backend.backend()]
    dropped = [item for item in items if item.get_closest_marker(other)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not item.get_closest_marker(other)]


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same random state."""
    keras.utils.set_random_seed(0)
