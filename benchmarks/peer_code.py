"""The code of a published distiller, from the user's own checkout of it: imported, and made to run on any device.

Nothing of theirs is copied or changed on disk. Both import kornia, termcolor and tqdm, which ours does not.
"""

import contextlib
import importlib.util
import io
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from engine.device import Compute
from engine.errors import SSDKDError
from engine.teacher import TeacherSpec

PACKAGE = "datafree"  # the name that both peers gave to their package
GENERATORS = Path(PACKAGE, "models", "generator.py")  # a file of its own: its package imports what torchvision dropped
CPU_WORKERS = 0
BATCHNORM_WEIGHT, BATCHNORM_MOMENTUM, PADDING = 10.0, 0.9, 4
GENERATOR_WIDTH, LATENT, NOISY_WIDTH = 64, 256, 1000


@dataclass(frozen=True)
class Script:
    """A run as the peer's script for CIFAR-10 has it; an epoch is a batch of new images, then the student's steps."""

    synthesizer: str  # their file
    epochs: int
    warmup: int  # epochs without a student step
    steps: int  # of the generator for a batch of images
    generator_rate: float
    batch: int  # of the student
    synthesis_batch: int
    adversarial_weight: float
    class_weight: float
    latent_rate: float = 0.0
    reset: int = 0  # the epoch that starts the generator's first layer afresh; 0: none does
    warmup_life: int = 0  # epochs of warm-up until a new generator takes over; 0: never
    life: int = 0  # the same after the warm-up, at whose end a new one comes in any case


FAST = Script("fast_meta", 220, 20, 2, 5e-3, 256, 256, 1.1, 0.4, latent_rate=0.015, reset=140)
FAST_WEIGHTS = {"resnet34_cifar": (1.33, 0.5), "vgg11_blocks": (1.0, 0.5)}  # adversarial and class term, by teacher
METHODS = {
    "fast-2": FAST,
    "fast-5": replace(FAST, steps=5, generator_rate=3e-3, latent_rate=0.01),
    "fast-10": replace(FAST, steps=10, generator_rate=2e-3, latent_rate=0.01),
    "nayer": Script("nayer", 400, 200, 30, 4e-3, 512, 400, 1.33, 0.5, warmup_life=100, life=20),
}


class Reduced(nn.Module):
    """A network that computes in the precision of `compute` and returns float32 logits."""

    def __init__(self, network: nn.Module, compute: Compute) -> None:
        super().__init__()
        self.network = network
        self.compute = compute

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] -> logits [B, classes]."""
        return reduced(self.network.__call__, self.compute)(images)


def float_statistics(network: nn.Module) -> None:
    """Give BatchNorm layers float32 inputs: of bfloat16 ones their hooks would compute rounded means and variances."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))


def reduced(forward: Callable[..., Tensor], compute: Compute) -> Callable[..., Tensor]:
    """`forward` in the precision of `compute`, its result in float32."""

    def call(*arguments: Any, **options: Any) -> Tensor:
        with compute.autocast():
            return forward(*arguments, **options).float()

    return call


@contextlib.contextmanager
def checkout_modules(checkout: Path, synthesizer: str) -> Iterator[tuple[Any, Any]]:
    """Their package and the module of their generators; forgotten on exit, since both peers' have the same name.

    `synthesizer`: the file in datafree/synthesis/ that a checkout of the right repository has.

    Raises:
        SSDKDError: no such checkout, or a package that it imports is not installed.
    """
    expected = checkout / PACKAGE / "synthesis" / f"{synthesizer}.py"
    if not expected.is_file():
        raise SSDKDError(
            f"{checkout} is no checkout of that method's repository: {expected.relative_to(checkout)} is not in it",
            "git clone zju-vipa/Fast-Datafree or tmtuan1307/NAYER from github.com, and give its folder",
        )
    earlier = _loaded()
    for name in earlier:
        del sys.modules[name]
    sys.path.insert(0, str(checkout.resolve()))
    try:
        yield _imported(checkout)
    finally:
        sys.path.remove(str(checkout.resolve()))
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(earlier)


def _imported(checkout: Path) -> tuple[Any, Any]:
    path = checkout / GENERATORS
    spec = importlib.util.spec_from_file_location("peer_generator", path)
    assert spec is not None
    assert spec.loader is not None
    generators = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(generators)
        return importlib.import_module(PACKAGE), generators
    except ModuleNotFoundError as error:
        raise SSDKDError(
            f"{checkout} imports {error.name}, which is not installed", f"pip install {error.name}"
        ) from error


def _loaded() -> dict[str, Any]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == PACKAGE}


@contextlib.contextmanager
def running_on(device: torch.device) -> Iterator[None]:
    """What is hard-coded in their code is led to `device` here, and put back on exit.

    `.cuda()` moves to `device` (networks in channels_last); their four loader processes, which a pass over the few
    images of a short run starts anew, become none on a CPU, whose cores they would share; grey images [H, W, 1] can be
    saved; what they print is dropped.
    """
    make_loader, make_image = torch.utils.data.DataLoader, Image.fromarray
    on_cpu = {"num_workers": CPU_WORKERS, "pin_memory": False} if device.type == "cpu" else {}

    def loader(*arguments: Any, **options: Any) -> Any:
        return make_loader(*arguments, **(options | on_cpu))

    def image(pixels: Any, *arguments: Any, **options: Any) -> Image.Image:
        grey = pixels.ndim == 3 and pixels.shape[2] == 1
        return make_image(pixels[:, :, 0] if grey else pixels, *arguments, **options)

    def place(network: nn.Module, *_: Any, **__: Any) -> nn.Module:
        return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(nn.Module, "cuda", place))
        stack.enter_context(patch.object(Tensor, "cuda", lambda tensor, *_, **__: tensor.to(device)))
        stack.enter_context(patch.object(torch.utils.data, "DataLoader", loader))
        stack.enter_context(patch.object(Image, "fromarray", image))
        dropped = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(dropped))
        yield


def label_embedding(checkout: Path, name: str, device: torch.device) -> Tensor:
    """NAYER's text embedding of each class, float32 [classes, width]; a pickle, trusted as the code beside it is."""

    def storage(data: bytes) -> Any:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)  # it was pickled on a GPU

    path = checkout / "label_embedding" / f"{name}_le.pickle"
    with path.open("rb") as file, patch.object(torch.storage, "_load_from_bytes", storage):
        embedding: Tensor = pickle.load(file)
    return embedding.to(device).float()


def build_synthesizer(
    script: Script,
    package: Any,
    generators: Any,
    teacher: nn.Module,
    student: nn.Module,
    *,
    spec: TeacherSpec,
    checkout: Path,
    folder: str,
    compute: Compute,
) -> Any:
    """Their synthesizer with its generator, built as their main program builds it."""
    channels, height, width = spec.input_shape
    mean, std = spec.preprocessing.mean, spec.preprocessing.std
    augmentation = transforms.Compose(
        [
            transforms.RandomCrop((height, width), padding=PADDING),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    common = {
        "num_classes": spec.classes,
        "img_size": spec.input_shape,
        "save_dir": folder,
        "transform": augmentation,
        "normalizer": package.utils.Normalizer(mean, std),
        "device": compute.device,
        "synthesis_batch_size": script.synthesis_batch,
        "sample_batch_size": script.batch,
        "lr_g": script.generator_rate,
        "warmup": script.warmup,
        "adv": script.adversarial_weight,
        "bn": BATCHNORM_WEIGHT,
        "oh": script.class_weight,
        "bn_mmt": BATCHNORM_MOMENTUM,
    }
    size = {"ngf": GENERATOR_WIDTH, "img_size": width, "nc": channels}
    if script.synthesizer == "nayer":
        embedding = label_embedding(checkout, "cifar10", compute.device)
        generators.NLGenerator.forward = reduced(generators.NLGenerator.forward, compute)
        noisy = {"nl": spec.classes, "le_emb_size": NOISY_WIDTH, "sbz": script.synthesis_batch}
        generator = generators.NLGenerator(**size, **noisy, label_emb=embedding).cuda()
        return package.synthesis.NAYER(
            teacher, student, generator, g_steps=script.steps, g_loops=1, gwp_loops=1, **common
        )
    generators.Generator.forward = reduced(generators.Generator.forward, compute)
    generator = generators.Generator(nz=LATENT, **size).cuda()
    fast = {"nz": LATENT, "iterations": script.steps, "lr_z": script.latent_rate, "is_maml": 1}
    return package.synthesis.FastMetaSynthesizer(teacher, student, generator, **fast, **common)
