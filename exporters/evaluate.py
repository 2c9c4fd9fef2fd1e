"""Accuracy on labelled images: the one place that sees labels. Nothing in engine/ imports it."""

import errno
import hashlib
import re
import warnings
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.errors import SSDKDError
from engine.processors import available_threads
from exporters.runtimes import Predict, inference_batch, to_input

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})  # as torchvision's
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's name
LAYOUT_HINT = "give one folder a class with images in it, or an .npz with `images` (uint8) and `labels` (int)"
NPZ_HINT = "write it with numpy.savez('test.npz', images=images, labels=labels): images uint8, labels int"
NPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class LabelledImages:
    """Images uint8 [N, H, W, C] with their classes int64 [N] and, for each class, its name.

    `doubt` is a sentence where folders were numbered in alphabetical order for want of better knowledge; folders called
    0, 1, 2 say themselves what they are.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    doubt: str | None = None

    @property
    def sha256(self) -> str:
        """Of the images and labels, as hexadecimal digits."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


def load_labelled(
    path: Path, *, input_shape: tuple[int, int, int], classes: int, class_names: tuple[str, ...] | None
) -> LabelledImages:
    """Read labelled images, resized to the network's (C, H, W) where their size differs.

    A folder holds one folder a class, numbered alphabetically as torchvision's ImageFolder does, or by `class_names`
    where every folder carries one of these names. An .npz holds `images` uint8 [N, H, W] or [N, H, W, C], `labels`
    int [N] and may hold `class_names`. Raises SSDKDError for data that is missing, empty, unreadable or has other
    classes than the network.
    """
    if input_shape[0] not in MODES:
        raise SSDKDError(
            f"the model takes images of {input_shape[0]} channels: expected 1 to {max(MODES)}, as pictures have them",
            "only models of pictures can be scored",
        )
    check_labelled(path)
    load = _load_folder if path.is_dir() else _load_npz
    return load(path, input_shape, classes, class_names)


def check_labelled(path: Path) -> None:
    """Raises SSDKDError unless there is a folder or an .npz file at `path`."""
    if not path.is_dir() and not (path.suffix.lower() == ".npz" and path.is_file()):
        found = "another file" if path.exists() else "nothing there"
        raise SSDKDError(f"{path}: expected a folder of class folders or an .npz file, found {found}", LAYOUT_HINT)


def logits_of(
    predict: Predict, images: NDArray[np.uint8], *, mean: tuple[float, ...], std: tuple[float, ...]
) -> NDArray[np.float32]:
    """What is said of each image uint8 [N, H, W, C]: float32 [N, classes]. `mean` and `std` as in `accuracy`."""
    _, height, width, channels = images.shape
    batch = inference_batch((channels, height, width))
    parts = [images[start : start + batch] for start in range(0, len(images), batch)]
    return np.concatenate([predict(to_input(part, mean, std)) for part in parts])


def accuracy(
    predict: Predict,
    labelled: LabelledImages,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch: int | None = None,
) -> float:
    """Return the percentage (0 to 100) of images whose largest logit is their label's.

    `mean` and `std`, one value a channel, are applied to images in 0...1. `batch` images are run at once; None: as
    many as suit their size. Raises SSDKDError for logits that are not finite.
    """
    _, height, width, channels = labelled.images.shape
    batch = batch or inference_batch((channels, height, width))
    correct = 0
    for start in range(0, len(labelled.labels), batch):
        logits = predict(to_input(labelled.images[start : start + batch], mean, std))  # [B, classes]
        if not np.isfinite(logits).all():
            raise SSDKDError(
                f"the model gives NaN or infinite logits on images {start} to {start + len(logits) - 1}",
                "check the model with `ssdkd inspect`, and --mean and --std",
            )
        correct += int((logits.argmax(axis=1) == labelled.labels[start : start + batch]).sum())
    return 100.0 * correct / len(labelled.labels)


def _load_folder(
    path: Path, input_shape: tuple[int, int, int], classes: int, class_names: tuple[str, ...] | None
) -> LabelledImages:
    try:
        folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise SSDKDError(f"{path} cannot be read: {error.strerror}", LAYOUT_HINT) from error
    names = tuple(folder.name for folder in folders)
    numbers, ordered_names = _number_classes(path, names, classes, class_names)
    files, labels = [], []
    for folder, number in zip(folders, numbers, strict=True):
        found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not found:
            raise SSDKDError(f"{folder} holds no images", LAYOUT_HINT)
        files += found
        labels += [number] * len(found)
    channels, height, width = input_shape
    images = np.empty((len(files), height, width, channels), dtype=np.uint8)

    def read(index: int) -> None:
        images[index] = _read_image(files[index], input_shape)

    with warnings.catch_warnings(), ThreadPoolExecutor(available_threads()) as pool:
        warnings.simplefilter("ignore")  # Pillow warns of odd EXIF blocks and palettes
        deque(pool.map(read, range(len(files))), maxlen=0)  # raises what a thread raised
    return LabelledImages(
        images, np.asarray(labels, dtype=np.int64), ordered_names, _doubt(path, names, ordered_names, class_names)
    )


def _number_classes(
    path: Path, names: tuple[str, ...], classes: int, class_names: tuple[str, ...] | None
) -> tuple[list[int], tuple[str, ...]]:
    """Return the class number of each folder and the names by class number."""
    if len(names) != classes:
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise SSDKDError(
            f"{path}: expected the model's {classes} classes, found {len(names)} ({shown or 'none'})",
            f"{LAYOUT_HINT}, of the classes that the model knows",
        )
    if class_names is None:
        return list(range(classes)), names
    number_of = {_plain(name): number for number, name in enumerate(class_names)}
    found = [number_of.get(_plain(name)) for name in names]
    known = [number for number in found if number is not None]
    if not known or len(number_of) != classes or len({_plain(name) for name in names}) != classes:
        return list(range(classes)), names
    if len(known) != classes:
        strangers = [name for name, number in zip(names, found, strict=True) if number is None]
        raise SSDKDError(
            f"{path}: some folders carry names of the model's classes, others do not: {', '.join(strangers[:5])}",
            "name each folder after its class: " + ", ".join(class_names[:5]),
        )
    return known, class_names


def _doubt(
    path: Path, names: tuple[str, ...], ordered_names: tuple[str, ...], class_names: tuple[str, ...] | None
) -> str | None:
    if ordered_names == class_names or _are_numbers_in_order(names):
        return None
    said = f"{path} is numbered in alphabetical order ({_first(names)}): "
    if class_names is None:
        return said + "the model's class names are not known; --classes FILE says their order, if it is another"
    known = f"its folders do not carry the names of the model's classes ({_first(class_names)})"
    return f"{said}{known}; --classes FILE gives others"


def _first(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _are_numbers_in_order(names: tuple[str, ...]) -> bool:
    """Whether folders are called 0, 1, 2 or 00, 01, 02: of 0 to 10 the alphabet has 10 before 2."""
    return all(name.isdecimal() for name in names) and [int(name) for name in names] == list(range(len(names)))


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "_", name.casefold())  # "T-shirt/top" cannot be the name of a folder


def _read_image(file: Path, input_shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as image:
            return _fitted(image, input_shape)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        is_good = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)  # too many files are open
        hint = "raise the limit on open files (`ulimit -n`)" if is_good else "remove it or replace it"
        raise SSDKDError(f"{file} cannot be read as an image: {error}", hint) from error


def _fitted(image: Image.Image, input_shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Return a picture as uint8 [H, W, C]: the shorter side resized (bilinear), then the centre cut out."""
    channels, height, width = input_shape
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):  # of a PNG: 16 bits, as some Pillows read it
        raise ValueError("float and 32-bit pixels have no known range")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion cuts everything above 255 off
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    converted = image if image.mode == MODES[channels] else image.convert(MODES[channels])
    if converted.size != (width, height):
        scale = max(width / converted.width, height / converted.height)
        size = (max(width, round(converted.width * scale)), max(height, round(converted.height * scale)))
        converted = converted.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        converted = converted.crop((left, top, left + width, top + height))
    return np.asarray(converted, dtype=np.uint8).reshape(height, width, channels)


def _load_npz(
    path: Path, input_shape: tuple[int, int, int], classes: int, class_names: tuple[str, ...] | None
) -> LabelledImages:
    arrays = _read_arrays(path)
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in MODES):
        raise SSDKDError(
            f"{path}: expected images uint8 [N, H, W] or [N, H, W, C], found {images.dtype} {list(images.shape)}",
            LAYOUT_HINT,
        )
    if not images.size:
        raise SSDKDError(
            f"{path}: expected at least one image, of at least one pixel, found images of shape {list(images.shape)}",
            LAYOUT_HINT,
        )
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise SSDKDError(
            f"{path}: expected {len(images)} integer labels, found {labels.dtype} {list(labels.shape)}", LAYOUT_HINT
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise SSDKDError(
            f"{path}: expected labels 0 to {classes - 1}, found {labels.min()} to {labels.max()}", LAYOUT_HINT
        )
    names = tuple(map(str, np.atleast_1d(arrays["class_names"]))) if "class_names" in arrays else class_names
    numbers, ordered_names = list(range(classes)), names or tuple(str(number) for number in range(classes))
    if "class_names" in arrays and names is not None:
        numbers, ordered_names = _number_classes(path, names, classes, class_names)
    return LabelledImages(
        _fit_array(images if images.ndim == 4 else images[..., None], input_shape),
        np.asarray(numbers, dtype=np.int64)[labels],
        ordered_names,
    )


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """`images`, `labels` and, where there are any, `class_names` of an .npz.

    Raises SSDKDError: no archive, a damaged one, one without these, or one whose arrays are objects of Python's.
    """
    arrays: dict[str, NDArray[Any]] = {}
    name: str | None = None
    try:
        with path.open("rb") as file:  # np.load leaks a bad file open
            head = file.read(len(NPY_MAGIC))
            if not head.startswith(b"PK"):
                found = "a single array (.npy)" if head == NPY_MAGIC else "another file" if head else "0 bytes"
                raise SSDKDError(f"{path} cannot be read: expected an .npz archive, found {found}", NPZ_HINT)
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                missing = [wanted for wanted in ("images", "labels") if wanted not in archive.files]
                if missing:
                    held = ", ".join(archive.files) or "nothing"
                    raise SSDKDError(f"{path} lacks {' and '.join(missing)}; found {held}", LAYOUT_HINT)
                for name in ("images", "labels", "class_names"):
                    if name in archive.files:
                        arrays[name] = archive[name]
                        if not isinstance(arrays[name], np.ndarray):  # numpy hands what is no array on as bytes
                            raise SSDKDError(f"{path} cannot be read: its {name} is no NumPy array", NPZ_HINT)
    except OSError as error:
        raise SSDKDError(f"{path} cannot be read: {error.strerror or error}", LAYOUT_HINT) from error
    except (ValueError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        if "Object arrays" in str(error):  # numpy goes on to advise an argument that is no option of ours
            raise SSDKDError(
                f"{path} cannot be read: expected {name} as a plain array, found one of Python objects", NPZ_HINT
            ) from error
        what = f"its {name} is damaged or cut short" if name else "the archive is damaged or cut short"
        raise SSDKDError(f"{path} cannot be read: {what}", "copy or write the file again") from error
    return arrays


def _fit_array(images: NDArray[np.uint8], input_shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    channels, height, width = input_shape
    if images.shape[1:] == (height, width, channels):
        return images
    pictures = (Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images)
    return np.stack([_fitted(picture, input_shape) for picture in pictures])
