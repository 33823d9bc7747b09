"""The classes of a set: chosen and merged by name, or stored as indices in mask files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..batch import IGNORE
from ..errors import UserError, did_you_mean
from .files import (
    Files,
    expand,
    missing_files,
    read_json,
    read_names,
    require_files,
    require_same_size,
    unique_names,
)

Choice = Sequence[str] | Mapping[str, str | Sequence[str]] | str


def choose(
    given: Choice | None, known: Sequence[str], option: str, root: str = "", what: str = "category"
) -> dict[str, tuple[str, ...]]:
    """The classes to use, in order, each with the ``known`` names that are merged into it.

    given: a list of known names; a mapping from the name of a class to the known name or names merged into
    it; the path of a JSON file with either; None: all. Raises UserError naming ``option`` and an unknown or
    repeated name.
    """
    if isinstance(given, str):
        path = expand(given, option, root)
        option, given = f"{option} ('{path}')", read_json(path, option)
    if isinstance(given, Mapping):
        chosen = {name: (parts,) if isinstance(parts, str) else parts for name, parts in given.items()}
        unique_names(list(chosen), option)
        chosen = {name: unique_names(parts, f"{option}.{name}") for name, parts in chosen.items()}
    else:
        chosen = {name: (name,) for name in unique_names(known if given is None else given, option)}
    unique_names([part for parts in chosen.values() for part in parts], option)
    for part in (part for parts in chosen.values() for part in parts):
        if part not in known:
            raise UserError(f"{option}: no {what} is called '{part}'; {did_you_mean(part, known)}")
    return chosen


def named_indices(
    given: Any, void: Sequence[int], root: str = "", where: str = "seg_classes"
) -> dict[str, list[int]]:
    """Class names in the order of their lowest index, each with the stored indices that mean it.

    given: names by index as a list, a mapping index -> name (of any indices; a name given twice merges them),
    or the path of a file with either (see ``read_names``). Names of void indices are left out. where: the
    option's name. Raises UserError for anything else.
    """
    if isinstance(given, str):
        where, given = read_names(given, where, root)
    if (
        isinstance(given, Mapping)
        and given
        and all(str(key).isdecimal() and int(key) <= IGNORE for key in given)
    ):
        names = sorted((int(key), name) for key, name in given.items())
    elif isinstance(given, (list, tuple)) and len(given) <= IGNORE + 1:
        names = list(enumerate(given))
    else:
        raise UserError(
            f'{where}: needed are the names of mask indices (0 to 255), as a list or as {{"0": name, ...}}'
        )
    found: dict[str, list[int]] = {}
    kept = [(index, name) for index, name in names if index not in void and index != IGNORE]
    given_names = [name for _, name in kept]
    if isinstance(given, Mapping) and all(isinstance(name, str) for name in given_names):
        given_names = list(dict.fromkeys(given_names))
    unique_names(given_names, where)
    for index, name in kept:
        found.setdefault(name, []).append(index)
    return found


def check_void(void: Any, where: str = "void") -> None:
    """Raise UserError unless ``void`` is a list of mask indices."""
    if not isinstance(void, (list, tuple)) or not all(
        type(index) is int and 0 <= index <= 255 for index in void
    ):
        raise UserError(f"{where}: a list of mask indices from 0 to 255 is needed, not {void!r}")


def occurrences(indices: np.ndarray, count: int, left_out: np.ndarray | None = None) -> np.ndarray:
    """int64 [count]: how often each class occurs in ``indices`` [M], without those ``left_out`` (bool [M]).

    Negative indices, of what has no class, do not count.
    """
    counted = indices >= 0 if left_out is None else (indices >= 0) & ~left_out
    return np.bincount(indices[counted], minlength=count).astype(np.int64)


class IndexMasks:
    """A folder of index PNGs, read as class indices.

    indices: class name -> the stored indices that mean it, in the order of the classes. void: stored indices
    that mean "ignore"; 255 always does. hint: what to do about an index that is neither, for messages.
    option: the name of the option that gives the folder.
    """

    def __init__(
        self,
        folder: str,
        files: Files,
        indices: Mapping[str, Sequence[int]],
        void: Sequence[int] = (),
        hint: str = "add it to `void` to ignore it, or its name to `seg_classes`",
        option: str = "masks",
    ):
        self.folder, self.files, self.hint, self.option = folder, files, hint, option
        self.classes = tuple(indices)
        self._there: np.ndarray | None = None  # by image, whether it has a mask; None: all have
        self._value_of = np.full(256, IGNORE, dtype=np.uint8)  # stored index -> class index
        for value, stored in enumerate(indices.values()):
            self._value_of[list(stored)] = value
        named = [index for stored in indices.values() for index in stored]
        self._known = np.isin(np.arange(256), [*named, *void, IGNORE])

    def require(self, names: Iterable[str], hint: str) -> None:
        """Raise UserError unless every mask is there."""
        require_files(self.folder, names, self.option, hint)

    def find(self, names: Sequence[str], hint: str) -> int:
        """Record which of the masks exist, and return how many do not. names: one per image.

        Raises UserError where none exists.
        """
        missing = set(missing_files(self.folder, names, self.option))
        self._there = np.array([name not in missing for name in names])
        if not self._there.any():
            raise UserError(
                f"{self.option}: none of the {len(names)} images has a mask in '{self.folder}'; {hint}"
            )
        return int((~self._there).sum())

    def has(self, index: int) -> bool:
        """Whether image ``index`` has a mask."""
        return self._there is None or bool(self._there[index])

    def read(self, name: str, image: np.ndarray, image_path: str) -> np.ndarray:
        """uint8 [H,W] class indices, IGNORE where void, of the mask ``name`` of ``image`` [H,W,3]. Raises
        UserError."""
        path = os.path.join(self.folder, name)
        stored = self.files.mask(path)
        require_same_size(stored, path, image, image_path)
        known = self._known[stored]
        if not known.all():
            raise UserError(
                f"mask '{path}' has index {stored[~known].min()}, which is no class; known are "
                f"{spans(np.flatnonzero(self._known).tolist())}; {self.hint}"
            )
        return self._value_of[stored]


def named_masks(masks: Any, seg_classes: Any, void: Any, root: str, files: Files) -> dict[str, IndexMasks]:
    """Folders of index PNGs by the names of the labels that they give.

    masks: label name -> folder. seg_classes: label name -> names of its indices (see ``named_indices``).
    void: label name -> the indices that mean "ignore"; it need not have all labels. Raises UserError where
    the three do not match.
    """
    if not masks or not all(isinstance(name, str) and name for name in masks):
        raise UserError(
            f"masks: a folder, or a mapping from names of labels to folders is needed, not {masks!r}"
        )
    classes = by_label(seg_classes, masks, "seg_classes")
    void = by_label({} if void == () or void == [] else void, masks, "void")
    found = {}
    for name, folder in masks.items():
        if name not in classes:
            raise UserError(
                f"seg_classes: `masks` has '{name}', so the names of its mask indices are needed; add "
                f"{name}: [...]"
            )
        ignored = void.get(name, ())
        check_void(ignored, f"void.{name}")
        indices = named_indices(classes[name], ignored, root, f"seg_classes.{name}")
        hint = f"add it to `void.{name}` to ignore it, or its name to `seg_classes.{name}`"
        option = f"masks.{name}"
        found[name] = IndexMasks(expand(folder, option, root), files, indices, ignored, hint, option)
    return found


def by_label(given: Any, labels: Iterable[str], option: str) -> dict[str, Any]:
    """An option with a value by label of ``masks``. Raises UserError where it is no mapping or has another
    name."""
    labels = list(labels)
    if not isinstance(given, Mapping):
        raise UserError(
            f"{option}: `masks` names labels, so a mapping by their names is needed ({', '.join(labels)}), "
            f"not {given!r}"
        )
    for name in given:
        if name not in labels:
            raise UserError(f"{option}: `masks` has no '{name}'; {did_you_mean(name, labels)}")
    return dict(given)


def spans(numbers: Sequence[int]) -> str:
    """Rising whole numbers as a short text: "0 to 3, 5"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))
