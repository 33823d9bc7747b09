"""Time the bare step of every network of a study, in turns:
python benchmarks/step_time.py configs/studies/NAME.yaml [--save]"""

import argparse
import json
import sys
from pathlib import Path

from multitask_kd.cli import run_tool

RESULTS = Path(__file__).parent / "results"


def main(args: argparse.Namespace) -> int:
    from multitask_kd.engine.bench import step_times
    from multitask_kd.engine.machine import machine
    from multitask_kd.experiments.study_config import load_study
    from multitask_kd.report.tables import table

    study, configs = load_study(args.study)
    chosen = {name: next(iter(runs.values())) for name, runs in configs.items() if name not in args.without}
    rows = step_times(chosen, steps=args.steps, rounds=args.rounds)
    shown = [
        row | {"step_ms": round(row["step_ms"]), "over_first": f"{row['over_first']:.2f}"} for row in rows
    ]
    columns = {"name": "network", "step_ms": "ms/step", "over_first": f"over {rows[0]['name']}"}
    print(machine() + "\n\n" + table(shown, columns))
    if args.save:
        stem = RESULTS / f"{Path(args.study).stem}_step_time"
        stem.with_suffix(".json").write_text(
            json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n", encoding="utf-8"
        )
        stem.with_suffix(".md").write_text(
            f"{machine()}\n\n{table(shown, columns, markdown=True)}\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", help="YAML of a study whose teachers are trained")
    parser.add_argument(
        "--without", nargs="*", default=["teacher"], help="networks to leave out (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a block (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each network (default: %(default)s)")
    parser.add_argument("--save", action="store_true", help=f"write the table to {RESULTS}")
    sys.exit(run_tool(main, parser))
