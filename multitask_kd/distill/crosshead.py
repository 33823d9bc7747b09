"""The student's pyramid through the teacher's head (Wang et al., CrossKD, CVPR 2024)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class CrossHead(nn.Module):
    """The predictions of the teacher's frozen head on the student's pyramid, each level through a learnt 1x1
    convolution.

    The soft loss then trains the student's features only, and does not pull its head between labels and
    teacher. levels: by stride, the path of the student's level; widths: by stride, the channels of the
    student's level and of the teacher's. The head belongs to the teacher: it is not registered as a
    submodule, so it is neither trained nor saved.
    """

    def __init__(self, head: nn.Module, levels: Mapping[int, str], widths: Mapping[int, tuple[int, int]]):
        super().__init__()
        self.levels = dict(levels)
        self.align = nn.ModuleDict({str(s): nn.Conv2d(*widths[s], 1) for s in self.levels})
        self._head = (head,)

    def forward(self, taps: Mapping[str, Tensor]) -> Tensor:
        """The student's taps -> a prediction of the teacher's form."""
        return self._head[0]({s: self.align[str(s)](taps[path]) for s, path in self.levels.items()})
