"""Prove on one batch that a run distils what its config says:
python tools/check.py --config cfg.yaml [key=value ...]"""

import argparse
import sys

from multitask_kd.cli import run_tool


def main(args: argparse.Namespace) -> int:
    from multitask_kd.config import load
    from multitask_kd.engine.train import check

    proof, summary = check(load(args.config, args.overrides))
    print("\n".join([*map(str, proof.lines), summary]))
    return 2 if proof.failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file of a run, see configs/ and docs/config.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. teacher.floor.seg=60")
    sys.exit(run_tool(main, parser))
