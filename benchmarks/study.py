"""Run a study over its seeds and write its table:
python benchmarks/study.py configs/studies/NAME.yaml [--save]"""

import argparse
import shutil
import sys
from pathlib import Path

from multitask_kd.cli import run_tool

RESULTS = Path(__file__).parent / "results"


def main(args: argparse.Namespace) -> int:
    from multitask_kd.experiments.study import report, run_study

    results = run_study(args.study)
    if results is None:
        return 130
    print("\n" + report(results))
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        for ending in ("json", "md"):
            shutil.copy(
                Path(results["dir"]) / f"results.{ending}", RESULTS / f"{Path(args.study).stem}.{ending}"
            )
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", help="YAML of the study; finished runs are kept, interrupted ones go on")
    parser.add_argument("--save", action="store_true", help=f"copy the table to {RESULTS}")
    sys.exit(run_tool(main, parser))
