"""Config -> objects. This package, engine/ and experiments/ are the only readers of a config.

data.py: the sets and how batches are drawn from them; net.py: the network and its tasks; teacher.py: the
teachers; distill.py: what teaches (soft losses, terms, balance, weights); check.py: every name and option,
before data is read.
"""

from .check import check
from .data import decode_options, open_sets, set_key_path, val_loader
from .net import (
    arch,
    check_classes,
    from_checkpoint,
    initial_student,
    network,
    resolve_init,
    task_kinds,
    tasks,
    without_start,
)

__all__ = [
    "arch",
    "check",
    "check_classes",
    "decode_options",
    "from_checkpoint",
    "initial_student",
    "network",
    "open_sets",
    "resolve_init",
    "set_key_path",
    "task_kinds",
    "tasks",
    "val_loader",
    "without_start",
]
