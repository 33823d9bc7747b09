"""What every command-line tool shares: messages instead of tracebacks, and exit statuses.

0: done; 2: an error that the user can fix (printed); 130: stopped by a signal.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence

from .errors import UserError

OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
PAIR = (
    "torch and torchvision do not match: torchvision's compiled operators are missing (torchvision::nms). "
    "This happens when a "
    "CPU-only torch stands beside the plain torchvision. Install both from the same index, e.g. "
    "pip install --force-reinstall torch torchvision; the plain ones run on CPU too"
)


def run_tool(main: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser) -> int:
    """Parse the command line, run ``main``, and return the exit status."""
    args = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("multitask_kd").setLevel(logging.INFO)
    try:
        check_torchvision()
        return main(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error.filename or 'operating system'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except Exception as error:
        if (
            not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError"
        ):  # torch's error; torch may not be imported
            raise
        print(
            "error: out of memory; lower train.batch_size, data.input_size or data.workers", file=sys.stderr
        )
        return 2


def given(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into files and key=value overrides, which may be mixed. An argument that exists as a
    file is a file, even with "=" in its name."""
    overrides = [text for text in arguments if OVERRIDE.match(text) and not os.path.exists(text)]
    return [text for text in arguments if text not in overrides], overrides


def check_torchvision() -> None:
    """Raise UserError, with the remedy, when torchvision was built for another torch."""
    try:
        import torchvision.ops  # noqa: F401
    except (RuntimeError, ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError):
            raise UserError(f"{error}: install the project first (make install)") from None
        raise UserError(f"{PAIR}\n  torchvision says: {str(error).splitlines()[0]}") from None
