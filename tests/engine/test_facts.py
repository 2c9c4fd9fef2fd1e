from argparse import Namespace

import pytest
import torch

from engine.facts import architecture_in, class_names_in, input_shape_in, normalisation_in
from engine.unwrap import metadata_beside


@pytest.mark.parametrize(
    ("metadata", "shape"),
    [
        ({"input_shape": [3, 32, 48]}, (3, 32, 48)),
        ({"input_size": 224}, (3, 224, 224)),
        ({"img_size": (64, 48)}, (3, 64, 48)),
        ({"input_size": (1, 3, 96, 96)}, (3, 96, 96)),
        ({"image_size": [40, 48, 3]}, (3, 40, 48)),
        ({"input_size": [1, 32, 32]}, None),  # another number of channels than the network takes
        ({"resolution": "high"}, None),
        ({"resolution": True}, None),
        ({"img_size": 100_000}, None),
        ({"img_size": float("nan")}, None),
        ({"img_size": float("inf")}, None),
        ({"img_size": 10**400}, None),
        ({}, None),
    ],
)
def test_input_shape(metadata, shape):
    assert input_shape_in(metadata, 3) == shape


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}, ((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))),
        ({"image_mean": [127.5] * 3, "image_std": [51.0] * 3}, ((0.5,) * 3, (0.2,) * 3)),
        ({"normalize": {"mean": [0.5] * 3, "std": [0.25] * 3}}, ((0.5,) * 3, (0.25,) * 3)),
        ({"normalize": ([0.5] * 3, [0.25] * 3)}, ((0.5,) * 3, (0.25,) * 3)),
        ({"mean": [0.5], "std": [0.25]}, None),  # one channel, the network takes three
        ({"mean": [0.5] * 3}, None),
        ({"mean": [0.5] * 3, "std": [0.0] * 3}, None),
        ({"mean": [float("nan")] * 3, "std": [0.5] * 3}, None),
        ({"mean": [0.5] * 3, "std": [float("inf")] * 3}, None),
        ({"mean": [0.5, "0.5", 0.5], "std": [0.5] * 3}, None),
        ({"mean": "ImageNet", "std": "ImageNet"}, None),
    ],
)
def test_normalisation(metadata, found):
    assert normalisation_in(metadata, 3) == found


@pytest.mark.parametrize(
    ("metadata", "names"),
    [
        ({"classes": ["cat", "dog"]}, ("cat", "dog")),
        ({"idx_to_class": {1: "dog", 0: "cat"}}, ("cat", "dog")),
        ({"id2label": {"0": "cat", "1": "dog"}}, ("cat", "dog")),
        ({"class_to_idx": {"dog": 1, "cat": 0}}, ("cat", "dog")),
        ({"classes": 2}, None),
        ({"classes": ["cat", "dog", "elk"]}, None),
        ({"class_to_idx": {"dog": 1, "cat": 5}}, None),
        ({"class_names": ["a", "b", "c"], "labels": ["cat", "dog"]}, ("cat", "dog")),
    ],
)
def test_class_names(metadata, names):
    assert class_names_in(metadata, 2) == names


def test_what_stands_beside_the_weights():
    metadata = metadata_beside(
        {
            "state_dict": {"weight": torch.ones(3, 3)},
            "args": Namespace(arch="resnet20", lr=0.1, epoch=200),
            "epoch": 7,
            "mean": torch.tensor([0.5, 0.25]),
            "ssdkd": '{"input_shape": [3, 8, 8]}',
        }
    )
    assert architecture_in(metadata) == "resnet20"
    assert metadata["epoch"] == 7, "the file's own word counts more than the arguments'"
    assert metadata["mean"] == [0.5, 0.25]
    assert metadata["input_shape"] == [3, 8, 8]
