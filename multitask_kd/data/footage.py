"""Images and videos given as files or folders, and the frames of a video."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ..errors import UserError
from .files import IMAGE_ENDINGS, list_files

VIDEO_ENDINGS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
RATE = 25.0  # frames per second of a video that does not state it


@dataclass(frozen=True)
class Input:
    """An image or a video. name: its path relative to the folder that holds all inputs, with "/"; video:
    whether its file ending is that of a video."""

    path: str
    name: str

    @property
    def video(self) -> bool:
        return self.path.lower().endswith(VIDEO_ENDINGS)


def find(paths: Sequence[str]) -> list[Input]:
    """The given files, and the images and videos in given folders and their subfolders, each once.

    Raises UserError for a path that does not exist and a folder without images and videos.
    """
    if missing := [path for path in paths if not os.path.exists(path)]:
        raise UserError(f"'{missing[0]}' does not exist; name images, folders or videos that do")
    absolute = [os.path.abspath(path) for path in paths]
    top = os.path.commonpath([path if os.path.isdir(path) else os.path.dirname(path) for path in absolute])
    found: dict[str, Input] = {}
    for given, path in zip(paths, absolute, strict=True):
        files = [path]
        if os.path.isdir(path):
            listed = list_files(path, f"'{given}'", (*IMAGE_ENDINGS, *VIDEO_ENDINGS), "images or videos")
            files = [os.path.join(path, name) for name in listed]
        for file in files:
            found.setdefault(file, Input(file, os.path.relpath(file, top).replace(os.sep, "/")))
    return list(found.values())


class Video:
    """A video read by OpenCV, which rotates the frames upright where the file states a rotation.

    rate: frames per second; count: number of frames that the file states, 0 where it does not. Raises
    UserError when it cannot be opened.
    """

    def __init__(self, path: str):
        self.path = path
        self._capture = cv2.VideoCapture(path)
        if not self._capture.isOpened():
            raise UserError(
                f"video '{path}' cannot be opened: damaged, empty, or of a codec that OpenCV does not have; "
                f"convert it"
            )
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self.rate = float(rate) if 0 < rate < 1000 else RATE
        self.count = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[np.ndarray]:
        """uint8 [H,W,3] RGB, in order, as far as they can be decoded; once."""
        try:
            while True:
                there, frame = self._capture.read()
                if not there:
                    return
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
        finally:
            self._capture.release()


class VideoFile:
    """Writes an mp4 (MPEG-4 part 2, which every OpenCV has) frame by frame; its size is the first frame's,
    padded to even sides."""

    def __init__(self, path: str, rate: float):
        self.path, self.rate = path, rate
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def add(self, frame: np.ndarray) -> None:
        """frame: uint8 [H,W,3] RGB. Raises UserError when the file cannot be written."""
        if self._writer is None:
            self._size = (frame.shape[1] + frame.shape[1] % 2, frame.shape[0] + frame.shape[0] % 2)
            self._writer = cv2.VideoWriter(self.path, cv2.VideoWriter_fourcc(*"mp4v"), self.rate, self._size)
            if not self._writer.isOpened():
                raise UserError(
                    f"video '{self.path}' cannot be written by this OpenCV; ask for single frames instead"
                )
        if frame.shape[1::-1] != self._size:
            rows, columns = self._size[1] - frame.shape[0], self._size[0] - frame.shape[1]
            fits = 0 <= rows <= 1 and 0 <= columns <= 1
            frame = (
                np.pad(frame, ((0, rows), (0, columns), (0, 0)), "edge")
                if fits
                else cv2.resize(frame, self._size)
            )
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()
            self._writer = None
