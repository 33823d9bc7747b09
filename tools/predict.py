"""Draw and write what a network predicts:
python tools/predict.py --checkpoint best.pt IMAGE|FOLDER|VIDEO ... --out FOLDER"""

import argparse
import sys

from multitask_kd.cli import run_tool

NOTE = """Images are letterboxed as in an evaluation and results brought back to the original size. EXIF orientation is not
applied, as in training; a video is turned upright as its file says. --out gets detections.json (a complete COCO file
with scores, and by image what is predicted of it as a whole), masks/*.png or <task>/*.png (class indices, whose names
settings.json has; depth in 1/256 m) and drawn/. What cannot be read is named and skipped."""


def main(args: argparse.Namespace) -> int:
    from multitask_kd.engine.predict import predict

    options = {
        key: value
        for key, value in vars(args).items()
        if key not in ("checkpoint", "inputs", "out", "no_draw")
    }
    done = predict(args.checkpoint, args.inputs, args.out, draw=not args.no_draw, **options)
    skipped = f", {done['skipped']} files could not be read" if done["skipped"] else ""
    print(
        f"{done['images']} images and {done['frames']} frames of videos, {done['boxes']} boxes{skipped}: "
        f"{args.out}"
    )
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, epilog=NOTE)
    parser.add_argument("inputs", nargs="+", metavar="IMAGE|FOLDER|VIDEO")
    parser.add_argument(
        "--checkpoint", required=True, help="best.pt or last.pt of a run, or an exported network"
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="a new or empty folder, or one of earlier predictions"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace earlier predictions in --out")
    parser.add_argument(
        "--score", type=float, default=0.3, help="objects are drawn from this score on (default: %(default)s)"
    )
    parser.add_argument(
        "--keep", type=float, default=0.01, help="objects are written above this score (default: %(default)s)"
    )
    parser.add_argument(
        "--alpha", type=float, default=0.5, help="of the masks, 0 to 1 (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N", help="images at once (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--no-draw", action="store_true", help="write no pictures, which takes most of the time"
    )
    parser.add_argument(
        "--frames", action="store_true", help="of a video, draw single pictures instead of an mp4"
    )
    sys.exit(run_tool(main, parser))
