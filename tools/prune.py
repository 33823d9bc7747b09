"""Cut channels out of a trained network:
python tools/prune.py --config cfg.yaml --checkpoint best.pt --ratio 0.5 --out cut.pt"""

import argparse
import sys

from multitask_kd.cli import run_tool


def main(args: argparse.Namespace) -> int:
    from multitask_kd.config import load
    from multitask_kd.engine.prune import Cut, prune_checkpoint, report

    options = {key: getattr(args, key) for key in ("by", "method", "scope", "local", "round_to")}
    cut = Cut.of("command line", args.ratio, **options)
    found = prune_checkpoint(load(args.config, args.overrides), args.checkpoint, args.out, cut)
    print(report(found))
    print(
        f"result: {found.path}; it has forgotten most of what it knew: train on with model.start={found.path}"
    )
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--config",
        required=True,
        help="YAML file: its run.device, run.threads and run.channels_last are used",
    )
    parser.add_argument("--checkpoint", required=True, help="best.pt or last.pt of a run")
    parser.add_argument("--ratio", required=True, type=float, help="the share that is taken away, e.g. 0.5")
    parser.add_argument("--out", required=True, metavar="FILE", help="the cut checkpoint")
    parser.add_argument(
        "--by", help="of what the ratio is a share: parameters, flops (default) or latency, measured here"
    )
    parser.add_argument("--method", help="what a channel is worth: magnitude, scale or group (default)")
    parser.add_argument("--scope", nargs="+", help="what is cut: backbone neck heads (default: all three)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--local", action="store_true", default=None, help="every layer loses the same share (default)"
    )
    where.add_argument(
        "--global",
        action="store_false",
        dest="local",
        default=None,
        help="the least important go, wherever they are",
    )
    parser.add_argument("--round-to", type=int, help="layers get multiples of so many channels (default: 8)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. run.threads=1")
    sys.exit(run_tool(main, parser))
