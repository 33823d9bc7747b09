"""Files of a data set: paths, class lists, existence, decoding of images and index masks, and the decode
cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..atomic import replacing
from ..errors import UserError

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
# Pillow stretches greyscale of 2 and 4 bits to 0..255; dividing gives the stored indices back.
_STRETCH = {"L;2": 85, "L;4": 17}


def expand(path: str, option: str, root: str = "") -> str:
    """``path`` with ``$VAR``, ``${VAR}`` and ``~`` filled in, under ``root`` when it is relative.

    Raises UserError naming ``option`` and the environment variable that is not set.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise UserError(f"{option}: a path is needed, not {path!r}")

    def fill(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise UserError(
                f"{option}: '{path}' uses the environment variable {name}, which is not set; "
                f"set it (export {name}=...) or write the path out"
            )
        return os.environ[name]

    full = os.path.expanduser(_VARIABLE.sub(fill, str(path)))
    return os.path.join(expand(root, "root"), full) if root else full


def read_bytes(path: str, option: str) -> bytes:
    """The content of a file. Raises UserError naming ``option`` when it is absent or unreadable."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{option}: file '{path}' does not exist; check the path and `root`") from None
    except OSError as error:
        raise UserError(f"{option}: file '{path}' cannot be read: {error.strerror}") from None


def read_lines(path: str, option: str) -> list[str]:
    """The lines of a text file in UTF-8, without the white space around them.

    Raises UserError when it is absent or no such file.
    """
    try:
        return [line.strip() for line in read_bytes(path, option).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{option}: '{path}' is not a text file in UTF-8 ({error.reason}); save it as one"
        ) from None


def read_json(path: str, option: str) -> Any:
    """The content of a JSON file. Raises UserError when it is absent, unreadable or not JSON (with the line)."""
    try:
        return json.loads(read_bytes(path, option))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{option}: '{path}' is not valid JSON, it is not UTF-8 ({error.reason}); replace it"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{option}: '{path}' is not valid JSON: {error.msg} at line {error.lineno}, column "
            f"{error.colno}; "
            "mend or replace the file"
        ) from None


def unique_names(names: Any, where: str) -> tuple[str, ...]:
    """``names`` as a tuple. Raises UserError unless they are a list of different, non-empty strings."""
    if (
        not isinstance(names, (list, tuple))
        or not names
        or not all(isinstance(name, str) and name for name in names)
    ):
        raise UserError(f"{where}: a list of class names is needed, not {names!r}")
    if repeated := [name for name, n in Counter(names).items() if n > 1]:
        raise UserError(f"{where}: '{repeated[0]}' is there twice; names tell classes apart, so rename one")
    return tuple(names)


def read_names(path: str, option: str, root: str = "") -> tuple[str, Any]:
    """The name of a class list for messages, and its content: of a .txt one name per line, of any other file
    JSON."""
    path = expand(path, option, root)
    where = f"{option} ('{path}')"
    if path.lower().endswith(".txt"):
        return where, "\n".join(read_lines(path, option)).strip().split("\n")
    return where, read_json(path, option)


def class_names(
    given: Sequence[str] | Mapping[int, str] | str,
    void: Sequence[int] | None,
    root: str = "",
    where: str = "seg_classes",
) -> tuple[str, ...]:
    """Names in index order, without the void indices of a mask: ``void`` and 255.

    void: None where the names are not those of a mask, so that 255 is an index like any other.
    given: a list, a mapping index -> name, a JSON file with either, or a text file (.txt) with one name per
    line.
    where: the option's name. Raises UserError when the indices that remain are not 0, 1, 2, ..., or two names
    are the same.
    """
    if isinstance(given, str):
        where, given = read_names(given, where, root)
    if isinstance(given, Mapping) and all(str(key).isdecimal() for key in given):
        names = {int(key): name for key, name in given.items()}
    elif isinstance(given, Sequence) and not isinstance(given, str):
        names = dict(enumerate(given))
    else:
        raise UserError(f'{where}: needed are names by index, as a list or as {{"0": name, ...}}')
    left_out = () if void is None else (*void, 255)
    names = {key: names[key] for key in sorted(names) if key not in left_out}
    for index, key in enumerate(names):
        if index != key:
            why = "is void" if index in left_out else "has no name"
            raise UserError(
                f"{where}: index {index} {why}, but '{names[key]}' follows at {key}; classes must be 0, 1, "
                f"2, ... "
                "without a gap: name the index, or renumber the masks so that void comes last"
            )
    return unique_names(list(names.values()), where)


def missing_files(folder: str, names: Sequence[str], option: str) -> list[str]:
    """Those of ``names`` (relative to ``folder``) that do not exist. Raises UserError where the folder does
    not exist.

    One listing per folder rather than one stat per file: on network disks that is seconds instead of minutes.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{option}: folder '{folder}' does not exist; check the path and `root`")
    wanted: dict[str, list[str]] = defaultdict(list)
    for name in names:
        wanted[os.path.dirname(name)].append(name)
    missing = []
    for parent, group in wanted.items():
        where = os.path.join(folder, parent)
        try:
            with os.scandir(where) as entries:
                present = {entry.name for entry in entries}
        except (FileNotFoundError, NotADirectoryError):
            present = set()
        except OSError as error:
            raise UserError(f"{option}: folder '{where}' cannot be listed: {error.strerror}") from None
        missing += [name for name in group if os.path.basename(name) not in present]
    return missing


def require_files(folder: str, names: Iterable[str], option: str, hint: str) -> None:
    """Raise UserError unless every one of ``names`` (relative to ``folder``) is there."""
    names = list(names)
    if missing := missing_files(folder, names, option):
        raise UserError(
            f"{option}: '{missing[0]}' is missing from '{folder}' "
            f"(missing: {len(missing)} of {len(names)} files); {hint}"
        )


IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def list_files(folder: str, option: str, endings: tuple[str, ...], what: str) -> list[str]:
    """Files under ``folder`` and its subfolders, relative to it with "/", sorted; hidden files and folders
    are skipped.

    endings: in lower case, e.g. ".jpg". Raises UserError naming ``option`` when the folder is absent or holds
    none.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{option}: folder '{folder}' does not exist; check the path and `root`")
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        subfolder = os.path.relpath(parent, folder)
        found += [
            os.path.normpath(os.path.join(subfolder, name)).replace(os.sep, "/")
            for name in files
            if name.lower().endswith(endings) and not name.startswith(".")
        ]
    if not found:
        raise UserError(f"{option}: there are no {what} ({', '.join(endings)}) under '{folder}'")
    return sorted(found)


def list_images(folder: str, option: str) -> list[str]:
    """Image files under ``folder`` and its subfolders; see ``list_files``."""
    return list_files(folder, option, IMAGE_ENDINGS, "images")


def size_text(array: np.ndarray) -> str:
    """ "640x480": width x height of an array [H,W,...], for messages."""
    return f"{array.shape[1]}x{array.shape[0]}"


def require_same_size(
    labels: np.ndarray, path: str, image: np.ndarray, image_path: str, what: str = "mask", kind: str = "masks"
) -> None:
    """Raise UserError naming both files unless ``labels`` [H,W,...] have the size of ``image`` [H,W,3].

    what, kind: words for the labels' file and, in the plural, for files of its kind, for the message.
    """
    if labels.shape[:2] != image.shape[:2]:
        raise UserError(
            f"{what} '{path}' is {size_text(labels)}, but image '{image_path}' is {size_text(image)} (width "
            f"x height); "
            f"make them the same size ({kind}: nearest neighbour only)"
        )


def decode_image(path: str) -> np.ndarray:
    """uint8 [H,W,3] RGB of an 8-bit image; grey is repeated, alpha is dropped.

    EXIF orientation is not applied: COCO and most labelling tools give boxes in the stored order of pixels.
    Raises UserError naming a file that is absent, truncated, no image, or of more than 8 bits.
    """
    # Pillow and not OpenCV: OpenCV returns a truncated JPEG as an image with a grey rest, and no error.
    with _Opened(path, "image") as image:
        if image.mode == "F" or image.mode.startswith("I"):
            raise UserError(f"image '{path}' has more than 8 bits a pixel; convert it to 8 bits")
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def decode_mask(path: str) -> np.ndarray:
    """uint8 [H,W] class indices of a mask: greyscale of 1 to 16 bits, or a palette PNG (its indices, no
    colours).

    Raises UserError naming a file that is absent, truncated, in colour, or with an index above 255.
    """
    with _Opened(path, "mask") as image:
        if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
            raise UserError(
                f"mask '{path}' is a colour image ({image.mode}), but index PNGs are needed: one channel, or "
                f"a "
                "palette, whose values are class indices; convert the colours to indices"
            )
        raw = image.tile[0][3] if image.tile else ""
        mask = np.array(image)
    if mask.max(initial=0) > 255 or mask.min(initial=0) < 0:
        raise UserError(f"mask '{path}' has index {mask.max()}; indices must be 0 to 255: renumber it")
    mask = mask.astype(np.uint8, copy=False)
    return mask // _STRETCH[raw] if raw in _STRETCH else mask


def decode_ids(path: str) -> np.ndarray:
    """uint16 [H,W] of a 16-bit greyscale PNG of instance ids.

    Raises UserError naming a file that is absent, truncated, or of fewer bits (which lost the ids above 255).
    """
    return _decode_16_bits(path, "id image", "ids")


def decode_disparity(path: str) -> np.ndarray:
    """uint16 [H,W] of a 16-bit greyscale PNG of disparities, as stored; raises as ``decode_ids`` does."""
    return _decode_16_bits(path, "disparity image", "values")


def _decode_16_bits(path: str, what: str, values: str) -> np.ndarray:
    with _Opened(path, what) as image:
        if image.mode != "I" and not image.mode.startswith("I;16"):
            raise UserError(
                f"{what} '{path}' is no 16-bit greyscale PNG ({image.mode}), so its {values} are lost; make "
                "it anew"
            )
        pixels = np.array(image)
    if pixels.max(initial=0) > 65535 or pixels.min(initial=0) < 0:
        raise UserError(f"{what} '{path}' has {values} outside 0 to 65535; make it anew")
    return pixels.astype(np.uint16, copy=False)


def image_size(path: str) -> tuple[int, int]:
    """Width and height in pixels from the image's header; its pixels are not decoded. Raises UserError naming
    the file."""
    with _Opened(path, "image") as image:
        return image.size


class _Opened:
    """Opens an image file and turns whatever goes wrong inside the block into a UserError that names it."""

    def __init__(self, path: str, what: str):
        self.path, self.what = path, what

    def _error(self, error: BaseException) -> UserError:
        if isinstance(error, FileNotFoundError):
            return UserError(f"{self.what} '{self.path}' does not exist; restore it or check the path")
        reason = str(error).replace(repr(self.path), "it") or type(error).__name__
        return UserError(
            f"{self.what} '{self.path}' cannot be decoded ({reason}): truncated, damaged or no image; "
            f"replace the file"
        )

    def __enter__(self) -> Image.Image:
        try:
            self.image = Image.open(self.path)
        except Exception as error:  # Pillow raises a dozen kinds for damaged files
            raise self._error(error) from None
        return self.image

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.image.close()
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise self._error(error) from None


class Files:
    """Reads images and masks, through a decode cache when ``cache`` names a folder.

    The cache holds one uncompressed .npy per file, keyed by its absolute path, size and modification time, so
    an edited file is decoded anew. It grows to the decoded size of the set and is never emptied; the folder
    may be deleted at any time. Several processes may share it. Raises UserError when the folder cannot be
    written.
    """

    def __init__(self, cache: str | None = None):
        self.cache = cache
        if cache is None:
            return
        try:
            os.makedirs(cache, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cache: folder '{cache}' cannot be made: {error.strerror}; name another"
            ) from None
        if not os.access(cache, os.W_OK | os.X_OK):
            raise UserError(f"cache: folder '{cache}' is not writable; name another or leave `cache` out")

    def image(self, path: str) -> np.ndarray:
        """uint8 [H,W,3] RGB; see ``decode_image``."""
        return self._read(path, "image", decode_image, 3, np.uint8)

    def mask(self, path: str) -> np.ndarray:
        """uint8 [H,W] indices as stored; see ``decode_mask``."""
        return self._read(path, "mask", decode_mask, 2, np.uint8)

    def ids(self, path: str) -> np.ndarray:
        """uint16 [H,W] ids as stored; see ``decode_ids``."""
        return self._read(path, "ids", decode_ids, 2, np.uint16)

    def disparity(self, path: str) -> np.ndarray:
        """uint16 [H,W] disparities as stored; see ``decode_disparity``."""
        return self._read(path, "disparity", decode_disparity, 2, np.uint16)

    def _read(
        self, path: str, kind: str, decode: Callable[[str], np.ndarray], ndim: int, dtype: type
    ) -> np.ndarray:
        if self.cache is None:
            return decode(path)
        try:
            stat = os.stat(path)
        except OSError:
            return decode(path)  # raises the UserError
        key = f"{kind}\n{os.path.abspath(path)}\n{stat.st_size}\n{stat.st_mtime_ns}".encode(
            errors="surrogateescape"
        )
        cached = os.path.join(self.cache, hashlib.blake2b(key, digest_size=16).hexdigest() + ".npy")
        array = _load(cached, ndim, dtype)
        if array is None:
            array = decode(path)
            self._store(cached, array)
        return array

    def _store(self, cached: str, array: np.ndarray) -> None:
        try:
            with replacing(cached) as file:
                np.save(file, array, allow_pickle=False)
        except OSError as error:
            raise UserError(
                f"cache: '{self.cache}' cannot be written: {error.strerror or error}; free space, name "
                f"another "
                "folder or leave `cache` out"
            ) from None


def _load(cached: str, ndim: int, dtype: type) -> np.ndarray | None:
    """The array in a cache file, or None when there is none or it is damaged."""
    try:
        mapped = np.load(cached, mmap_mode="r", allow_pickle=False)
    except Exception:  # a damaged header raises nearly anything
        return None
    if mapped.dtype != dtype or mapped.ndim != ndim:
        return None
    # A copy: callers may write, and the map (a file handle each) closes here.
    return np.array(mapped)
