"""Train a network, with a teacher or without: python tools/train.py --config cfg.yaml [key=value ...]"""

import argparse
import sys

from multitask_kd.cli import run_tool


def main(args: argparse.Namespace) -> int:
    from multitask_kd.config import load
    from multitask_kd.engine.train import train

    config = load(args.config, args.overrides)
    done = train(config, resume=args.resume, overwrite=args.overwrite)
    return 0 if done is not None else 130


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file, see configs/ and docs/config.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=200 run.seed=1")
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="continue the run in run.dir exactly where it stopped"
    )
    again.add_argument("--overwrite", action="store_true", help="replace the run in run.dir")
    sys.exit(run_tool(main, parser))
