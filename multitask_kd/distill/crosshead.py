"""The student's pyramid through the teacher's head (Wang et al., CrossKD, CVPR 2024)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class CrossHead(nn.Module):
    """What the teacher's frozen head says of the student's pyramid, each level through a learnt 1x1 convolution.

    The soft loss then speaks to the student's features alone and does not pull its head between labels and teacher.
    levels: by stride, the path of the student's level; widths: its channels and those of the teacher's. The head is held without
    being registered: it is the teacher's, neither learns nor enters a checkpoint.
    """

    def __init__(self, head: nn.Module, levels: Mapping[int, str], widths: Mapping[int, tuple[int, int]]):
        super().__init__()
        self.levels = dict(levels)
        self.align = nn.ModuleDict({str(s): nn.Conv2d(*widths[s], 1) for s in self.levels})
        self._head = (head,)

    def forward(self, taps: Mapping[str, Tensor]) -> Tensor:
        """The student's taps -> a prediction of the teacher's form."""
        return self._head[0]({s: self.align[str(s)](taps[path]) for s, path in self.levels.items()})
