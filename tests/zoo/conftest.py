"""The digits data set, prepared once for the tests that read it."""

import pytest

from kzoo.zoo import load


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    load("digits", data_dir=folder)
    return folder
