"""What is in the data of a run, before it is trained on:
python tools/data.py --config cfg.yaml [key=value ...]"""

import argparse
import json
import sys
from pathlib import Path

from multitask_kd.cli import run_tool


def main(args: argparse.Namespace) -> int:
    from multitask_kd.config import load
    from multitask_kd.engine.data_report import report_data

    reports = []
    for report in report_data(
        load(args.config, args.overrides), args.out, pictures=args.images, limit=args.limit
    ):
        print(f"{report}\n", flush=True)
        reports.append(report)
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        figures = {report.name: report.figures() for report in reports}
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if all(report.read for report in reports) else 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config", required=True, help="YAML file: its data, and of model and tasks the strides, are used"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", default="runs/data", help="where the pictures go (default: %(default)s)"
    )
    parser.add_argument(
        "--images",
        metavar="N",
        type=int,
        default=12,
        help="images in a picture (default: %(default)s); 0: none",
    )
    parser.add_argument(
        "--limit", metavar="N", type=int, help="read only N images of each set, spread over it"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. data.input_size=[288,512]")
    sys.exit(run_tool(main, parser))
