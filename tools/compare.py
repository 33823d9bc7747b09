"""Compare networks in cost and quality:
python tools/compare.py a.pt b.onnx --config cfg.yaml [--html page.html] [key=value ...]"""

import argparse
import sys

from multitask_kd.cli import given, run_tool


def main(args: argparse.Namespace) -> int:
    from multitask_kd.config import load
    from multitask_kd.engine.compare import compare, prepare, write
    from multitask_kd.report.comparison import text

    files, overrides = given(args.given)
    outputs = {"csv": args.csv, "json": args.json, "html": args.html}
    prepare(**outputs)
    config = load(args.config, overrides)
    options = {key: getattr(args, key) for key in ("names", "confidence", "images", "batch", "runs")}
    results = compare(config, files, **options, command=["python", *sys.argv])
    print(text(results))
    for path in write(config, results, pictures=args.pictures, **outputs):
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config",
        required=True,
        help="YAML file: its data.val, tasks.*.decode, eval.batch_size and run are used",
    )
    parser.add_argument(
        "--names", nargs="+", help="one a file, in their order (default: what tells their paths apart)"
    )
    parser.add_argument(
        "--confidence",
        type=float,
        help="score from which a box counts (default: where a network's F1 is highest)",
    )
    parser.add_argument("--images", metavar="N", type=int, help="evaluate the first N images only")
    parser.add_argument(
        "--batch", metavar="N", type=int, default=8, help="images in the second timing (default: %(default)s)"
    )
    parser.add_argument(
        "--runs", metavar="N", type=int, default=20, help="timed runs of each network (default: %(default)s)"
    )
    parser.add_argument(
        "--pictures",
        metavar="N",
        type=int,
        default=6,
        help="images on the page (default: %(default)s); 0: none",
    )
    parser.add_argument("--csv", metavar="FILE", help="a line a network")
    parser.add_argument("--json", metavar="FILE", help="every figure")
    parser.add_argument(
        "--html", metavar="FILE", help="one page with tables, plots and pictures that needs nothing else"
    )
    parser.add_argument(
        "given",
        nargs="+",
        metavar="FILE|key=value",
        help="checkpoints or exported networks; and e.g. run.threads=1 run.device=cpu",
    )
    sys.exit(run_tool(main, parser))
