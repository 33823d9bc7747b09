"""From a big network to a small one: sparse, prune, fine-tune, distil, export, compare:
python tools/pipeline.py --config P"""

import argparse
import sys

from multitask_kd.cli import run_tool


def main(args: argparse.Namespace) -> int:
    from multitask_kd.experiments.pipeline import run_pipeline

    return 130 if run_pipeline(args.config) is None else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config",
        required=True,
        help="YAML of the pipeline; what is done is kept, what was interrupted goes on",
    )
    sys.exit(run_tool(main, parser))
