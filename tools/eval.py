"""Evaluate a network:
python tools/eval.py --config cfg.yaml --checkpoint best.pt [--json FILE] [key=value ...]"""

import argparse
import json
import sys

from multitask_kd.cli import run_tool


def main(args: argparse.Namespace) -> int:
    from multitask_kd.atomic import write_text
    from multitask_kd.config import load
    from multitask_kd.engine.compare import prepare
    from multitask_kd.engine.evaluate import evaluate_checkpoint
    from multitask_kd.engine.networks import open_network
    from multitask_kd.precision import resolve_device
    from multitask_kd.report.tables import metrics_table

    prepare(json=args.json)
    config = load(args.config, args.overrides)
    metrics = evaluate_checkpoint(config, args.checkpoint)
    tasks = open_network(args.checkpoint, "--checkpoint", resolve_device(config.run.device)).tasks
    print(metrics_table(metrics, tasks))
    if args.json:
        write_text(args.json, json.dumps(metrics, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config", required=True, help="YAML file: its data.val, eval and tasks.*.decode are used"
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="best.pt or last.pt of a run, or a .onnx or .pt2 of tools/export.py",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. eval.batch_size=8")
    sys.exit(run_tool(main, parser))
