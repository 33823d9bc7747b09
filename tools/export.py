"""A checkpoint as a file that runs on a device:
python tools/export.py --checkpoint best.pt --out net.onnx [options]"""

import argparse
import sys

from multitask_kd.cli import run_tool


def main(args: argparse.Namespace) -> int:
    from multitask_kd.config import load
    from multitask_kd.engine.export import Export, export
    from multitask_kd.errors import UserError

    if args.overrides and not args.config:
        raise UserError(
            f"{args.overrides[0]}: key=value changes --config, which is not given; options of --decode "
            f"follow it"
        )
    config = load(args.config, args.overrides) if args.config else None
    names = ("decode", "opset", "uint8", "dynamic_size", "tolerance", "images", "eval_images", "calibrate")
    precision = "int8" if args.int8 else "fp16" if args.fp16 else "fp32"
    plan = Export(
        args.checkpoint, args.out, precision=precision, **{name: getattr(args, name) for name in names}
    )
    print(export(plan, config))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="best.pt or last.pt of a run, or a pruned network")
    add("--out", required=True, metavar="FILE", help=".onnx (ONNX) or .pt2 (torch.export)")
    decode = (
        "masks, boxes, ... too, with these options of tasks.<name>.decode (nms_iou=0.5, or name.nms_iou=0.5)"
    )
    add("--decode", nargs="*", metavar="key=value", help=decode)
    add("--opset", type=int, help="of ONNX (default: 18)")
    add("--uint8", action="store_true", help="the input is bytes 0 to 255 in place of floats 0 to 1")
    add(
        "--dynamic-size",
        action="store_true",
        help="height and width are free multiples of the coarsest stride; not with --decode",
    )
    add(
        "--tolerance",
        type=float,
        help="largest difference from PyTorch let through, in parts of an output's largest value",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--fp16", action="store_true", help="weights and arithmetic in half precision")
    kind.add_argument(
        "--int8",
        action="store_true",
        help="static quantisation on images of --config, measured on its data.val",
    )
    add("--config", help="YAML file of the data, for --int8")
    add("--images", type=int, metavar="N", help="training images that --int8 is calibrated on (default: 128)")
    add(
        "--calibrate",
        metavar="SET",
        help="train, val, or the name of a set of data.train: where they come from (default: train)",
    )
    add(
        "--eval-images",
        type=int,
        metavar="N",
        help="validation images that --int8 is measured on (default: all)",
    )
    add("overrides", nargs="*", metavar="key=value", help="changes of --config, e.g. run.threads=1")
    sys.exit(run_tool(main, parser))
