"""docs/families.md says what the code does."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from families import FAMILIES as TINY
from more_families import MORE, ROWS

from keepsight.backbone import FAMILIES, UNFIT, family_of
from keepsight.errors import UnsupportedModelError


def tool():
    spec = importlib.util.spec_from_file_location("families_page", Path(__file__).parents[1] / "tools" / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current():
    made = tool()
    page = made.PAGE.read_text()
    assert made.written(page) == page, "run `python tools/families.py`"


def test_every_supported_family_is_tested():
    absent = {row.name for row in ROWS if row not in MORE}  # of this release of transformers
    assert {family.config().model_type for family in (*TINY, *MORE)} == set(FAMILIES) - absent


@pytest.mark.parametrize("model_type", UNFIT)
def test_a_family_without_a_place_for_a_memory_is_told_why(model_type):
    with pytest.raises(UnsupportedModelError, match="cannot be given a visual memory") as error:
        family_of(SimpleNamespace(model_type=model_type))
    assert UNFIT[model_type] in str(error.value)
    assert "open an issue" in str(error.value)
