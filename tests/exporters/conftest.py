"""A tiny trained-looking network, its samples and its ONNX file: exported once a session."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.metadata import metadata_for
from exporters.to_onnx import write_onnx

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
SHAPE = (3, 8, 8)
CLASSES = 5


class TinyNetwork(nn.Module):
    """Two convolutions with BatchNorm whose running statistics have seen data."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8)
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).relu().mean((2, 3)))


def tiny_network(seed: int = 0) -> TinyNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = TinyNetwork().train()
        with torch.no_grad():
            network(torch.randn(64, *SHAPE))
    return network.eval()


def metadata(*, embed_preprocessing: bool = False, mean: tuple[float, ...] = MEAN) -> dict[str, str]:
    return metadata_for(
        input_shape=SHAPE,
        classes=CLASSES,
        class_names=("cat", "dog", "T-shirt/top", "é", "5"),
        mean=mean,
        std=STD,
        embed_preprocessing=embed_preprocessing,
        teacher_sha256="ab" * 32,
    )


@pytest.fixture(scope="session")
def network() -> TinyNetwork:
    return tiny_network()


@pytest.fixture(scope="session")
def samples() -> NDArray[np.uint8]:
    """Uint8 [50, 8, 8, 3], smooth blobs rather than noise."""
    coarse = np.random.default_rng(0).integers(0, 256, (50, 2, 2, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


@pytest.fixture(scope="session")
def exported(network: TinyNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network's own, correct ONNX file; tests that break it work on a copy."""
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    write_onnx(network, path, input_shape=SHAPE, metadata=metadata())
    return path
