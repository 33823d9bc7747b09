"""Write docs/config.md from the typed config: make docs"""

import argparse
import sys
from pathlib import Path

from multitask_kd.cli import run_tool

PAGE = Path(__file__).parents[1] / "docs/config.md"


def main(args: argparse.Namespace) -> int:
    from multitask_kd.docs import config_page

    page = config_page()
    if args.check:
        return 0 if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page else 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="only say by the exit status whether the page is up to date"
    )
    sys.exit(run_tool(main, parser))
