"""What a checkpoint says beside its weights: architecture, input size, normalisation, class names.

Nothing is believed that does not fit the network.
"""

from collections.abc import Mapping, Sequence

from engine.shapes import Shape

Metadata = Mapping[str, object]

ARCHITECTURE_KEYS = ("arch", "architecture", "model_name", "model_arch", "backbone_name", "model", "net", "student")
SHAPE_KEYS = ("input_shape", "input_size", "image_size", "img_size", "imgsz", "crop_size", "resolution")
MEAN_KEYS = ("mean", "image_mean", "pixel_mean", "dataset_mean", "norm_mean", "img_mean")
STD_KEYS = ("std", "image_std", "pixel_std", "dataset_std", "norm_std", "img_std")
NORMALIZE_KEYS = ("normalize", "normalization", "normalisation", "norm", "preprocessing", "transform")
CLASS_KEYS = ("class_names", "classes", "labels", "label_names", "categories", "names")
INDEX_KEYS = ("idx_to_class", "id2label", "index_to_class", "class_to_idx", "label2id")
PIXELS = range(8, 1025)
LARGEST = 1e9  # no size and no constant of a normalisation is larger


def architecture_in(metadata: Metadata) -> str | None:
    """The name of the network, as its training program called it."""
    if is_our_student(metadata) and metadata["student"] == "same":
        return str(metadata.get("teacher_arch"))
    return next((value for key in ARCHITECTURE_KEYS if isinstance(value := metadata.get(key), str) and value), None)


def is_our_student(metadata: Metadata) -> bool:
    """Whether ssdkd wrote the file, as the result of a distillation."""
    return "teacher_sha256" in metadata and "student" in metadata


def input_shape_in(metadata: Metadata, channels: int) -> Shape | None:
    """(C, H, W) of the images; a lone side is that of a square image with `channels` channels."""
    for key in SHAPE_KEYS:
        numbers = _numbers(metadata.get(key))
        sizes = [int(number) for number in numbers or [] if number == int(number)]
        if len(sizes) == 4:
            sizes = sizes[1:]
        if len(sizes) == 3 and sizes[2] <= 4 < sizes[0]:  # height, width, channels
            sizes = [sizes[2], *sizes[:2]]
        if len(sizes) == 1:
            sizes = sizes * 2
        if len(sizes) == 2:
            sizes = [channels, *sizes]
        if len(sizes) == 3 and sizes[0] == channels and sizes[1] in PIXELS and sizes[2] in PIXELS:
            return sizes[0], sizes[1], sizes[2]
    return None


def normalisation_in(metadata: Metadata, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) of images in 0...1, a value a channel; those of images in 0...255 are scaled."""
    mean = next((numbers for key in MEAN_KEYS if (numbers := _numbers(metadata.get(key)))), None)
    std = next((numbers for key in STD_KEYS if (numbers := _numbers(metadata.get(key)))), None)
    for key in NORMALIZE_KEYS:
        nested = metadata.get(key)
        if (mean is None or std is None) and isinstance(nested, Mapping):
            return normalisation_in(nested, channels)
        if (
            (mean is None or std is None)
            and isinstance(nested, Sequence)
            and not isinstance(nested, str)
            and len(nested) == 2
        ):
            mean, std = _numbers(nested[0]), _numbers(nested[1])
    if mean is None or std is None or len(mean) != channels or len(std) != channels or min(std) <= 0:
        return None
    scale = 255.0 if max(*mean, *std) > 2 else 1.0
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)


def class_names_in(metadata: Metadata, classes: int) -> tuple[str, ...] | None:
    """The names of all `classes` classes in the order of the logits."""
    for key in (*CLASS_KEYS, *INDEX_KEYS):
        names = _names(metadata.get(key))
        if names and len(names) == classes:
            return names
    return None


def _numbers(value: object) -> list[float] | None:
    """A number, or a sequence of nothing else, as finite floats."""
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    numbers = [float(item) for item in items if isinstance(item, int | float) and abs(item) < LARGEST]  # no NaN either
    return None if isinstance(value, bool) or not numbers or len(numbers) != len(items) else numbers


def _names(value: object) -> tuple[str, ...] | None:
    """A list of names, {index: name} or {name: index}."""
    if isinstance(value, Mapping):
        pairs = [(key, item) if isinstance(item, str) else (item, key) for key, item in value.items()]
        try:
            by_index = {int(str(index)): str(name) for index, name in pairs}
        except ValueError:
            return None
        return (
            tuple(by_index[index] for index in range(len(pairs)))
            if sorted(by_index) == list(range(len(pairs)))
            else None
        )
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return None
