import errno
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from engine.errors import SSDKDError
from exporters.evaluate import LabelledImages, accuracy, load_labelled
from exporters.runtimes import predictor

GREY = (1, 4, 4)


def picture(path: Path, value: int | tuple[int, ...], *, size: tuple[int, int] = (4, 4), mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def folders(root: Path, *names: str) -> Path:
    """One picture a class, its grey value 10 times the place of its name in the list."""
    for place, name in enumerate(names):
        picture(root / name / "0.png", 10 * place)
    return root


def test_folders_are_numbered_alphabetically_as_imagefolder_does(tmp_path: Path) -> None:
    folders(tmp_path, "pear", "apple", "Fig")
    picture(tmp_path / "apple" / "deeper" / "1.PNG", 11)
    picture(tmp_path / ".cache" / "0.png", 99)
    (tmp_path / "apple" / "notes.txt").write_text("no picture")
    labelled = load_labelled(tmp_path, input_shape=GREY, classes=3, class_names=None)
    assert labelled.class_names == ("Fig", "apple", "pear")
    assert labelled.labels.tolist() == [0, 1, 1, 2]
    assert labelled.labels.dtype == np.int64
    assert labelled.images.shape == (4, 4, 4, 1)
    assert labelled.images.dtype == np.uint8
    assert labelled.images[:, 0, 0, 0].tolist() == [20, 10, 11, 0]


@pytest.mark.parametrize(
    ("class_names", "labels"),
    [
        (("pear", "apple", "Fig"), [2, 1, 0]),  # sorted folders: Fig, apple, pear
        (("PEAR", "Apple", "fig"), [2, 1, 0]),
        (("n01", "n02", "n03"), [0, 1, 2]),  # none of the names: alphabetical
    ],
)
def test_folders_follow_the_names_of_the_model(class_names: tuple[str, ...], labels: list[int], tmp_path: Path) -> None:
    folders(tmp_path, "pear", "apple", "Fig")
    labelled = load_labelled(tmp_path, input_shape=GREY, classes=3, class_names=class_names)
    assert labelled.labels.tolist() == labels
    doubt = "is numbered in alphabetical order (Fig, apple, pear): its folders do not carry"
    assert (doubt in (labelled.doubt or "")) == (class_names[0] == "n01")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("pear", "apple", "Fig"), "(Fig, apple, pear): the model's class names are not known"),
        (("pear", "apple", "Fig", "date"), "(Fig, apple, date, ...): "),
        (("2", "0", "1"), None),
        (("00", "02", "01"), None),
        (tuple(str(number) for number in range(11)), "(0, 1, 10, ...): "),  # as the alphabet has them
        (("1", "2", "3"), "(1, 2, 3): "),
    ],
)
def test_the_alphabet_is_said_where_nothing_is_known_of_the_classes(
    names: tuple[str, ...], said: str | None, tmp_path: Path
) -> None:
    folders(tmp_path, *names)
    doubt = load_labelled(tmp_path, input_shape=GREY, classes=len(names), class_names=None).doubt
    assert (doubt is None) if said is None else (f"is numbered in alphabetical order {said}" in (doubt or ""))
    assert doubt is None or "--classes FILE" in doubt


def test_names_that_no_folder_can_have(tmp_path: Path) -> None:
    folders(tmp_path, "T-shirt_top", "ankle_boot")
    labelled = load_labelled(tmp_path, input_shape=GREY, classes=2, class_names=("Ankle boot", "T-shirt/top"))
    assert labelled.class_names == ("Ankle boot", "T-shirt/top")
    assert labelled.labels.tolist() == [1, 0]


def test_some_names_of_the_model_and_some_others(tmp_path: Path) -> None:
    folders(tmp_path, "pear", "apple", "banana")
    with pytest.raises(SSDKDError, match="others do not: banana") as caught:
        load_labelled(tmp_path, input_shape=GREY, classes=3, class_names=("pear", "apple", "fig"))
    assert "pear, apple, fig" in caught.value.hint


def broken_image(root: Path) -> Path:
    folders(root, "a", "b")
    (root / "b" / "1.jpg").write_bytes(b"no picture")
    return root


def cut_image(root: Path) -> Path:
    folders(root, "a", "b")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)).save(root / "b" / "1.png")
    content = (root / "b" / "1.png").read_bytes()
    (root / "b" / "1.png").write_bytes(content[: len(content) // 2])
    return root


def empty_class(root: Path) -> Path:
    folders(root, "a")
    (root / "b").mkdir()
    return root


def text_file(root: Path) -> Path:
    (root / "labels.csv").write_text("a,b")
    return root / "labels.csv"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "nowhere", "found nothing there"),
        (text_file, "found another file"),
        (lambda root: root, r"expected the model's 2 classes, found 0 \(none\)"),
        (lambda root: folders(root, "a", "b", "c"), r"expected the model's 2 classes, found 3 \(a, b, c\)"),
        (empty_class, "b holds no images"),
        (broken_image, r"1\.jpg cannot be read as an image"),
        (cut_image, r"1\.png cannot be read as an image"),
    ],
)
def test_folder_that_cannot_be_used(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SSDKDError, match=message) as caught:
        load_labelled(make(tmp_path), input_shape=GREY, classes=2, class_names=None)
    assert caught.value.hint


def test_a_good_image_is_not_to_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(file: Path) -> None:
        raise OSError(errno.EMFILE, "Too many open files", str(file))

    folders(tmp_path, "a", "b")
    monkeypatch.setattr(Image, "open", refused)
    with pytest.raises(SSDKDError, match="Too many open files") as caught:
        load_labelled(tmp_path, input_shape=GREY, classes=2, class_names=None)
    assert "ulimit -n" in caught.value.hint


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(SSDKDError, match="cannot be read: Permission denied"):
        load_labelled(tmp_path, input_shape=GREY, classes=2, class_names=None)


def test_other_size_is_resized_by_the_shorter_side_and_cut_in_the_middle(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = (200, 100, 50)
    (tmp_path / "a").mkdir()
    Image.fromarray(wide).save(tmp_path / "a" / "0.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "a" / "1.png")
    labelled = load_labelled(tmp_path, input_shape=(3, 4, 4), classes=1, class_names=None)
    assert labelled.images.shape == (2, 4, 4, 3)
    assert (labelled.images[:, 1:3, 1:3] == (200, 100, 50)).all()


@pytest.mark.parametrize(
    ("mode", "value", "channels", "expected"),
    [
        ("L", 80, 3, [80, 80, 80]),
        ("RGB", (90, 90, 90), 1, [90]),
        ("RGBA", (10, 20, 30, 40), 3, [10, 20, 30]),
        ("RGB", (10, 20, 30), 4, [10, 20, 30, 255]),
        ("LA", (7, 9), 2, [7, 9]),
        ("I;16", 0x8040, 1, [0x80]),
        ("I;16", 0x8040, 3, [0x80, 0x80, 0x80]),
        ("1", 1, 1, [255]),
    ],
)
def test_channels_are_converted_to_the_networks(
    mode: str, value: Any, channels: int, expected: list[int], tmp_path: Path
) -> None:
    picture(tmp_path / "a" / "0.png", value, mode=mode)
    labelled = load_labelled(tmp_path, input_shape=(channels, 4, 4), classes=1, class_names=None)
    assert labelled.images[0, 2, 2].tolist() == expected


def archive(root: Path, **arrays: Any) -> Path:
    np.savez(root / "test.npz", **arrays)
    return root / "test.npz"


def values(count: int = 3, *shape: int) -> NDArray[np.uint8]:
    return np.arange(count, dtype=np.uint8).reshape(count, *(1 for _ in shape)) * np.ones(shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 1)])
def test_archive_without_names(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = archive(tmp_path, images=values(3, *shape), labels=np.array([2, 0, 1], dtype=np.uint8))
    labelled = load_labelled(path, input_shape=GREY, classes=3, class_names=None)
    assert labelled.images.shape == (3, 4, 4, 1)
    assert labelled.images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert labelled.labels.tolist() == [2, 0, 1]
    assert labelled.class_names == ("0", "1", "2")


def test_archive_of_another_size_and_with_names_in_another_order(tmp_path: Path) -> None:
    path = archive(tmp_path, images=values(2, 9, 9, 3), labels=np.array([0, 1]), class_names=np.array(["dog", "cat"]))
    labelled = load_labelled(path, input_shape=GREY, classes=2, class_names=("cat", "dog"))
    assert labelled.images.shape == (2, 4, 4, 1)
    assert labelled.labels.tolist() == [1, 0]
    assert load_labelled(path, input_shape=GREY, classes=2, class_names=None).class_names == ("dog", "cat")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": values(2, 4, 4)}, "lacks images and labels; found x"),
        ({"images": values(2, 4, 4) / 255, "labels": [0, 1]}, "expected images uint8 .* found float64"),
        ({"images": values(2, 3, 4, 4), "labels": [0, 1]}, None),  # 4 channels, last
        ({"images": values(2, 3, 16, 16), "labels": [0, 1]}, r"found uint8 \[2, 3, 16, 16\]"),
        ({"images": values(2, 4, 4), "labels": [0, 1, 1]}, r"expected 2 integer labels, found int64 \[3\]"),
        ({"images": values(2, 4, 4), "labels": [0.0, 1.0]}, "expected 2 integer labels, found float64"),
        ({"images": values(0, 4, 4), "labels": np.zeros(0, dtype=int)}, r"at least one image.* \[0, 4, 4\]"),
        ({"images": values(2, 0, 4), "labels": [0, 1]}, r"of at least one pixel, .* shape \[2, 0, 4\]"),
        ({"images": values(2, 4, 4), "labels": [0, 2]}, "expected labels 0 to 1, found 0 to 2"),
        ({"images": values(2, 4, 4), "labels": [-1, 1]}, "found -1 to 1"),
        (
            {"images": values(2, 4, 4), "labels": [0, 1], "class_names": ["a"]},
            "expected the model's 2 classes, found 1",
        ),
        ({"images": values(2, 4, 4), "labels": np.array([0, "b"], dtype=object)}, "expected labels as a plain array"),
    ],
)
def test_archive_is_checked(arrays: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    path = archive(tmp_path, **arrays)
    if message is None:
        assert load_labelled(path, input_shape=(4, 3, 4), classes=2, class_names=None).images.shape == (2, 3, 4, 4)
        return
    with pytest.raises(SSDKDError, match=message) as caught:
        load_labelled(path, input_shape=GREY, classes=2, class_names=None)
    assert "allow_pickle" not in caught.value.message


def test_what_else_is_in_an_archive_is_not_read(tmp_path: Path) -> None:
    path = archive(tmp_path, images=values(2, 4, 4), labels=[0, 1], notes=np.array([{"made": "today"}], dtype=object))
    assert load_labelled(path, input_shape=GREY, classes=2, class_names=None).labels.tolist() == [0, 1]


def test_archive_with_one_name_that_is_no_list(tmp_path: Path) -> None:
    path = archive(tmp_path, images=values(2, 4, 4), labels=[0, 1], class_names="cat")
    with pytest.raises(SSDKDError, match=r"expected the model's 2 classes, found 1 \(cat\)"):
        load_labelled(path, input_shape=GREY, classes=2, class_names=None)


def test_channels_that_no_picture_has(tmp_path: Path) -> None:
    path = archive(tmp_path, images=values(2, 4, 4, 3), labels=[0, 1])
    with pytest.raises(SSDKDError, match="takes images of 5 channels: expected 1 to 4"):
        load_labelled(path, input_shape=(5, 4, 4), classes=2, class_names=None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an .npz archive, found 0 bytes"),
        (b"no archive", "expected an .npz archive, found another file"),
        (b"PK\x03\x04", "the archive is damaged or cut short"),
    ],
)
def test_archive_that_is_none(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "test.npz").write_bytes(content)
    with pytest.raises(SSDKDError, match=rf"test\.npz cannot be read: {message}$"):
        load_labelled(tmp_path / "test.npz", input_shape=GREY, classes=2, class_names=None)


def test_array_that_is_no_archive(tmp_path: Path) -> None:
    with (tmp_path / "test.npz").open("wb") as file:
        np.save(file, values(2, 4, 4))
    with pytest.raises(SSDKDError, match=r"test\.npz cannot be read: .* found a single array \(\.npy\)$") as caught:
        load_labelled(tmp_path / "test.npz", input_shape=GREY, classes=2, class_names=None)
    assert "numpy.savez" in caught.value.hint


def test_archive_with_a_member_that_is_damaged_or_no_array(tmp_path: Path) -> None:
    path = archive(tmp_path, images=values(3, 4, 4), labels=[0, 1, 1])
    content = bytearray(path.read_bytes())
    content[content.index(values(3, 4, 4).tobytes())] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(SSDKDError, match=r"test\.npz cannot be read: its images is damaged"):
        load_labelled(path, input_shape=GREY, classes=2, class_names=None)
    with zipfile.ZipFile(path, "w") as members:
        members.writestr("images", "no array")
        members.writestr("labels", "none either")
    with pytest.raises(SSDKDError, match="its images is no NumPy array"):
        load_labelled(path, input_shape=GREY, classes=2, class_names=None)


def brightness(*greys: int, labels: list[int]) -> LabelledImages:
    """Pictures of one grey value each."""
    images = np.array(greys, dtype=np.uint8).reshape(-1, 1, 1, 1) * np.ones((2, 2, 1), dtype=np.uint8)
    return LabelledImages(images, np.array(labels, dtype=np.int64), ("dark", "bright"))


def is_bright(images: NDArray[np.float32]) -> NDArray[np.float32]:
    level = images.mean((1, 2, 3))
    return np.stack([-level, level], axis=1)


@pytest.mark.parametrize("batch", [1, 3, 256])
def test_accuracy_is_a_percentage_over_all_batches(batch: int) -> None:
    labelled = brightness(0, 50, 200, 250, labels=[0, 1, 1, 1])
    assert accuracy(is_bright, labelled, mean=(0.5,), std=(0.25,), batch=batch) == 75.0


@pytest.mark.parametrize(("pixels", "largest"), [(8, 256), (128, 64), (512, 4)])
def test_large_images_are_run_in_smaller_batches(pixels: int, largest: int) -> None:
    shapes: list[tuple[int, ...]] = []

    def predict(images: NDArray[np.float32]) -> NDArray[np.float32]:
        shapes.append(images.shape)
        return is_bright(images)

    images = np.broadcast_to(np.uint8(200), (largest + 1, pixels, pixels, 1))
    labelled = LabelledImages(images, np.ones(largest + 1, dtype=np.int64), ("dark", "bright"))
    assert accuracy(predict, labelled, mean=(0.5,), std=(0.25,)) == 100.0
    assert [shape[0] for shape in shapes] == [largest, 1]


def test_accuracy_depends_on_the_normalisation() -> None:
    labelled = brightness(0, 50, 200, 250, labels=[0, 0, 1, 1])
    assert accuracy(is_bright, labelled, mean=(0.5,), std=(0.25,)) == 100.0
    assert accuracy(is_bright, labelled, mean=(0.9,), std=(0.25,)) == 75.0


def test_accuracy_of_nan_is_an_error_and_not_a_number() -> None:
    def predict(images: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.full((len(images), 2), np.nan, dtype=np.float32)

    with pytest.raises(SSDKDError, match="NaN or infinite logits on images 0 to 1"):
        accuracy(predict, brightness(0, 50, labels=[0, 1]), mean=(0.5,), std=(0.25,))


def test_accuracy_of_a_torch_module() -> None:
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        module[2].weight.copy_(torch.tensor([[-1.0], [1.0]]))
        module[2].bias.zero_()
    labelled = brightness(0, 50, 200, 250, labels=[0, 0, 1, 0])
    assert accuracy(predictor(module), labelled, mean=(0.5,), std=(0.25,)) == 75.0


def test_integers_of_32_bits_have_no_known_range(tmp_path: Path) -> None:
    folders(tmp_path, "a", "b")
    (tmp_path / "a" / "0.png").unlink()
    Image.fromarray(np.full((4, 4), 200, np.int32)).save(tmp_path / "a" / "0.tif")
    with pytest.raises(SSDKDError, match=r"0\.tif cannot be read as an image: float and 32-bit pixels"):
        load_labelled(tmp_path, input_shape=GREY, classes=2, class_names=None)
