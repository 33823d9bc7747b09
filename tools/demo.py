"""Train a teacher, a student alone and a distilled student on generated scenes, and show whether it helped: make demo"""

import argparse
import json
import sys
import time
from pathlib import Path

from multitask_kd.cli import run_tool

STUDY = Path(__file__).parents[1] / "configs/studies/demo.yaml"
KEPT = ("mIoU", "mAP", "mAP50")


def main(args: argparse.Namespace) -> int:
    from multitask_kd.engine.study import report, run_study

    began = time.perf_counter()
    results = run_study(args.study, overwrite=args.overwrite)
    if results is None:
        return 130
    print("\n" + report(results) + "\n")
    for row in results["rows"]:
        print(f"{row['name']} saw {row['labelled_images']} labelled and {row['unlabelled_images']} unlabelled images")
    folder = Path(results["dir"])
    summary = {
        row["name"]: {key: row[key][0] for key in KEPT if key in row} | {key: row[key] for key in ("labelled_images", "params")}
        for row in results["rows"]
    }
    seconds = {row["name"]: row["seconds"][0] for row in results["rows"]}
    summary["seconds"] = seconds | {"total": round(time.perf_counter() - began, 1)}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"\nfigures  {folder}/summary.json\npicture  {folder}/picture.png")
    print(f"curves   {Path(sys.executable).parent}/tensorboard --logdir {folder}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", default=STUDY, help="YAML of the study to run (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="train again what is finished already")
    sys.exit(run_tool(main, parser))
