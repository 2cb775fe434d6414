"""Fixtures of checkpoints."""

import pytest
from authors_layout import Converted, write_checkpoint

from keepsight.checkpoints.convert import convert


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    place = tmp_path_factory.mktemp("single")
    source = write_checkpoint(place / "authors")
    convert(source, place / "out")
    return Converted(source, place / "out")
