"""Train the demo's teacher and choose its test images: Fashion-MNIST, WRN-16-1, about six minutes on two idle cores.

    python -m benchmarks.train_demo_teacher FOLDER --out FOLDER

FOLDER holds the four idx files of Fashion-MNIST, as Debian's package dataset-fashion-mnist installs them. Writes
demo_teacher.pt and demo_test.npz (the first 200 test images of each class).
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.device import choose_device
from engine.images import normalization, random_views, render, to_input
from engine.zoo import ZOO

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
BATCH, EPOCHS, PEAK_RATE, SHIFT = 256, 14, 0.2, 2


def read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 28, 28, 1] and labels int64 [N] of `train` or `t10k`."""
    images = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28, 1).copy()
    return torch.from_numpy(pixels), torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).copy()).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    compute = choose_device("cpu")
    torch.manual_seed(0)
    network = ZOO["wrn16_1"](10, 1).to(memory_format=torch.channels_last)
    images, labels = read(arguments.folder, "train")
    test_images, test_labels = read(arguments.folder, "t10k")
    constants = normalization((0.5,), (0.5,), compute.device)
    rng = torch.Generator().manual_seed(0)
    steps = EPOCHS * len(images) // BATCH
    optimizer = torch.optim.SGD(network.parameters(), lr=PEAK_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        drawn = torch.randint(len(images), (BATCH,), generator=rng)
        with compute.autocast():
            views = random_views(BATCH, 1, SHIFT, rng)[:, 0]
            logits = network(to_input(render(images, drawn, views), constants))
        loss = F.cross_entropy(logits.float(), labels[drawn])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        predicted = torch.cat([network(to_input(part, constants)).argmax(1) for part in test_images.split(500)])
    print(f"{100 * (predicted == test_labels).float().mean():.2f} % of the 10,000 test images")

    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    torch.save(weights, arguments.out / "demo_teacher.pt")
    chosen = torch.cat([(test_labels == each).nonzero().flatten()[:200] for each in range(10)]).sort().values
    np.savez_compressed(
        arguments.out / "demo_test.npz",
        images=test_images[chosen, :, :, 0].numpy(),
        labels=test_labels[chosen].numpy().astype(np.uint8),
        class_names=np.array(CLASS_NAMES),
    )


if __name__ == "__main__":
    main()
