"""CIFAR-10 for a machine that has nothing: JPEG class folders packed as they are, one file a split, 57 MB in all.

The pictures keep their JPEG bytes (as pixels they would be 184 MB). train.npz is needed only to train teachers.
"""

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.processors import available_threads
from exporters.evaluate import SUFFIXES, LabelledImages

SPLITS = ("train", "test")


def pack(data: Path, out: Path) -> list[Path]:
    """Write `out`/train.npz and test.npz from the class folders in `data`/train and test."""
    out.mkdir(parents=True, exist_ok=True)
    written = [out / f"{split}.npz" for split in SPLITS]
    for split, path in zip(SPLITS, written, strict=True):
        np.savez(path, allow_pickle=False, **read_folder(data / split))
    return written


def load_split(data: Path, split: str) -> LabelledImages:
    """The images of `data`/SPLIT.npz, as `pack` wrote it, or of the class folders in `data`/SPLIT.

    Raises:
        FileNotFoundError: neither is there.
    """
    packed = data / f"{split}.npz"
    if not packed.exists():
        return decoded(read_folder(data / split))
    with np.load(packed, allow_pickle=False) as arrays:
        return decoded(dict(arrays))


def read_folder(folder: Path) -> dict[str, NDArray[Any]]:
    """A folder of class folders as arrays: `jpegs` uint8 [bytes], `sizes` and `labels` int64 [N], `class_names`.

    Classes are numbered alphabetically, images are in the order of their names.
    """
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    files = [
        (file, label)
        for label, entry in enumerate(classes)
        for file in sorted(entry.iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise FileNotFoundError(f"{folder}: expected class folders with images in them, found none")
    contents = [file.read_bytes() for file, _ in files]
    return {
        "jpegs": np.frombuffer(b"".join(contents), np.uint8),
        "sizes": np.array([len(content) for content in contents]),
        "labels": np.array([label for _, label in files]),
        "class_names": np.array([entry.name for entry in classes]),
    }


def decoded(arrays: dict[str, NDArray[Any]]) -> LabelledImages:
    """What `read_folder` gives as images uint8 [N, H, W, 3]; all have the size of the first."""
    ends = arrays["sizes"].cumsum()
    jpegs = arrays["jpegs"].tobytes()
    contents = [jpegs[end - size : end] for end, size in zip(ends, arrays["sizes"], strict=True)]
    with warnings.catch_warnings(), ThreadPoolExecutor(available_threads()) as pool:
        warnings.simplefilter("ignore")  # Pillow warns of odd EXIF blocks
        images = np.stack(list(pool.map(_pixels, contents)))
    return LabelledImages(images, arrays["labels"].astype(np.int64), tuple(map(str, arrays["class_names"])))


def _pixels(content: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)
