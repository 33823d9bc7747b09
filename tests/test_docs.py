"""The page of config keys is the code's, not a memory of it."""

from pathlib import Path

from multitask_kd.docs import config_page

PAGE = Path(__file__).parents[1] / "docs/config.md"


def test_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == config_page(), "run make docs"


def test_every_key_is_explained():
    for line in config_page().splitlines():
        if line.startswith("| `"):
            assert line.split("|")[4].strip(), f"no description: {line}"
