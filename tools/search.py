"""Search config keys for the best result:
python tools/search.py --config cfg.yaml --space search.yaml [key=value ...]"""

import argparse
import sys

from multitask_kd.cli import run_tool


def main(args: argparse.Namespace) -> int:
    from multitask_kd.experiments.search import run_search
    from multitask_kd.experiments.search_report import report

    results = run_search(args.config, args.space, args.overrides)
    if results is None:
        return 130
    print("\n" + report(results))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML of the run whose keys are searched")
    parser.add_argument(
        "--space",
        required=True,
        help="YAML of the search, see configs/search/; the same command again goes on",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes in every trial, e.g. data.labelled=80"
    )
    sys.exit(run_tool(main, parser))
