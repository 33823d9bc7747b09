"""Time a training step against the bare loop of the same modules:
python tools/bench.py [--config cfg.yaml] [--json FILE]"""

import argparse
import json
import sys
from pathlib import Path

from multitask_kd.cli import run_tool


def main(args: argparse.Namespace) -> int:
    from multitask_kd.config import load
    from multitask_kd.engine.bench import bench

    figures = bench(load(args.config, args.overrides), steps=args.steps, rounds=args.rounds)
    parts = figures["parts_ms"]
    for key, value in figures.items():
        if key != "parts_ms":
            shown = [round(v, 3) for v in value] if isinstance(value, list) else value
            print(f"{key:28} {shown:.3f}" if isinstance(value, float) else f"{key:28} {shown}")
    for name, spent in parts.items():
        print(f"  {name:26} {spent:8.1f} ms")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config",
        default=root / "configs/scenes_distilled.yaml",
        help="a run with a teacher (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a block (default: %(default)s)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=9,
        help="blocks of each loop, one after the other (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="e.g. teacher.path=runs/demo/teacher/best.pt: a config with a teacher needs one that is trained",
    )
    sys.exit(run_tool(main, parser))
