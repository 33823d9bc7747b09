"""Train a teacher, a student alone and a distilled student on generated scenes, and show whether it helped:
make demo"""

import argparse
import sys
import time
from pathlib import Path

from multitask_kd.cli import run_tool

STUDY = Path(__file__).parents[1] / "configs/studies/demo.yaml"


def main(args: argparse.Namespace) -> int:
    from multitask_kd.experiments.study import report, run_study, write_summary

    began = time.perf_counter()
    results = run_study(args.study, overwrite=args.overwrite)
    if results is None:
        return 130
    print("\n" + report(results) + "\n")
    for row in results["rows"]:
        print(
            f"{row['name']} saw {row['labelled_images']} labelled and {row['unlabelled_images']} unlabelled "
            f"images"
        )
    folder = Path(results["dir"])
    summary = write_summary(results, time.perf_counter() - began)
    print(
        "\nmemory   "
        + ", ".join(f"{name} {size} MB" for name, size in summary["peak_memory_mb"].items())
        + " at most"
    )
    print(f"figures  {folder}/summary.json\npicture  {folder}/picture.png")
    print(f"curves   {Path(sys.executable).parent}/tensorboard --logdir {folder}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", default=STUDY, help="YAML of the study to run (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="train again what is finished already")
    sys.exit(run_tool(main, parser))
