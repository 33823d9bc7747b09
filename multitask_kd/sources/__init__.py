"""Sources of teachers other than checkpoints written by this package, one file each.

A file here that registers a source is imported automatically.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
