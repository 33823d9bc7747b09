"""Soft losses: a student's and a teacher's tensors in, one unweighted scalar out; one file each.

A file here that registers a class with ``@LOSSES.register("name")`` is imported automatically.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
