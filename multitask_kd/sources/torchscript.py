"""TorchScript archives."""

from __future__ import annotations

import re
import warnings

import torch
from torch import nn

from ..errors import UserError
from . import files
from .base import SOURCES, Source, frozen

# The operators of TorchScript that write or map files; \ in getattr could spell them otherwise.
_TOUCHES_FILES = re.compile(r"\b(?:save|from_file)\b|getattr\s*\([^)]*\\")


@SOURCES.register("torchscript")
class TorchScript(Source):
    """A file of ``torch.jit.save``, traced or scripted. No options; modules inside it cannot be tapped.

    The pickles in such an archive are read by torch's own C++ reader, which knows tensors, lists and
    TorchScript's own classes, and never calls Python. But TorchScript is a program: where ``trust_pickle`` is
    false, one whose code names an operator that writes or reads files (``aten::save``, ``aten::from_file``)
    is refused before any of it runs.
    """

    tappable = False
    may_trust = True

    def load(self, device: torch.device) -> nn.Module:
        files.expect(self.path, "torchscript", for_what="TorchScript archive")
        # load exactly the members that were checked: two readers of one zip may differ
        content = self.path if self.trust_pickle else files.zipped(self._checked_members())
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # torch deprecates the format, people have the files
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                net = torch.jit.load(content, map_location=device)
            except Exception as error:  # torch's reader raises many kinds
                raise UserError(
                    f"path: {self.path} cannot be read as TorchScript ({files.first_line(error)}); "
                    "it is damaged, needs operators that are not here, or was written by a newer torch"
                ) from None
        return frozen(net, device)

    def _checked_members(self) -> dict[str, bytes]:
        members = files.repack(self.path)
        for name, content in members.items():
            if (
                name.startswith("code/")
                and name.endswith(".py")
                and (found := _TOUCHES_FILES.search(content.decode("latin-1")))
            ):
                raise UserError(
                    f"path: the program in {self.path} names '{found.group(0)}' ({name}), which can write or "
                    f"read files; it was "
                    "not run. If you trust whoever made it, set trust_pickle: true"
                )
        return members
