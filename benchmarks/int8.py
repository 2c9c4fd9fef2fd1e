"""INT8 without data: ranges and rounding by our synthetic samples, by noise and by real training images.

    python -m benchmarks.int8 --network NAME SOURCE TEST TRAIN [--network ...] [--seeds 5] [--out ...]

SOURCE is the folder of a run (its float student is quantized, calibrated on samples of its replay buffer) or the file
of a teacher (exported as it is, calibrated on samples inverted from it). TEST and TRAIN are labelled images, a folder a
class or an .npz; the training images serve the row "real images" alone. A seed chooses the noise, the real images, and
the samples: another part of the buffer, or another inversion. Goes on where it was stopped.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.common import RESULTS, provenance, save, unfinished
from benchmarks.names import NOISE, OUR_SAMPLES, REAL_IMAGES
from engine.device import choose_device
from engine.teacher import load_teacher
from exporters.evaluate import LabelledImages
from exporters.precision import Scheme, integer_share
from exporters.runtimes import inference_batch, open_runtime, to_input
from profiles import load_profile
from ssdkd_cli import material, runs
from ssdkd_cli.labels import labelled_images
from ssdkd_cli.precisions import CALIBRATION_IMAGES, Integers, rounded_together, to_integers
from ssdkd_cli.subject import Subject, float_graph

REAL_NUMBER = 1000
PROFILE = "x86-vnni"
Images = NDArray[np.uint8]  # [N, H, W, C]


def subject_of(source: Path, seed: int) -> Subject:
    """The network of a run or teacher; of a teacher with samples of this seed."""
    if source.is_dir():
        return material.from_run(source, trust_pickle=False, embed_preprocessing=False).subject
    teacher = load_teacher(source)
    samples = material.inverted(teacher, compute=choose_device("auto"), seed=seed)
    return Subject(teacher.module, runs.teacher_card(teacher.spec, runs.SAME), samples, False)


def logits_of(model: onnx.ModelProto, inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    batch = inference_batch(tuple(inputs.shape[1:]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        run = open_runtime(path).run
        return np.concatenate([run(inputs[first : first + batch]) for first in range(0, len(inputs), batch)])


def calibrations(subject: Subject, train: LabelledImages, seed: int) -> dict[str, Callable[[], Images]]:
    """What ranges are taken from, and weights rounded by, by name."""
    rng, card = np.random.default_rng(seed), subject.card
    channels, height, width = card.input_shape

    def drawn(images: Images, number: int) -> Images:
        return images[rng.permutation(len(images))[:number]]

    def noise() -> Images:
        normalised = rng.standard_normal((CALIBRATION_IMAGES, height, width, channels))
        return np.rint(255 * (normalised * card.std + card.mean)).clip(0, 255).astype(np.uint8)

    return {
        OUR_SAMPLES: lambda: drawn(subject.samples.calibration, CALIBRATION_IMAGES),
        REAL_IMAGES: lambda: drawn(train.images, REAL_NUMBER),
        NOISE: noise,
    }


def quantized(subject: Subject, images: Images, scheme: Scheme, seed: int) -> onnx.ModelProto:
    """The network in INT8 as ssdkd makes it, with `images` in the place of its samples.

    All of them give the ranges; weights are rounded by the first CALIBRATION_IMAGES.
    """
    given = dataclasses.replace(subject, samples=dataclasses.replace(subject.samples, calibration=images))
    module = rounded_together(given, Integers(scheme, "off", False, choose_device("auto"), seed))
    return to_integers(given, float_graph(given, module), scheme, len(images))


def measure(name: str, source: Path, test: Path, train: Path, seed: int) -> list[dict[str, Any]]:
    """One row a calibration: accuracy, paired drop and agreement on the test images, all in percent."""
    subject = subject_of(source, seed)
    tested, trained = (labelled_images(path, subject.card) for path in (test, train))
    inputs = to_input(tested.images, subject.card.mean, subject.card.std)
    exported = float_graph(subject)
    exact = logits_of(exported, inputs).argmax(1)
    float_accuracy = 100 * float((exact == tested.labels).mean())
    scheme = Scheme(**dataclasses.asdict(load_profile(PROFILE).quantization))
    rows = []
    for calibration, images in calibrations(subject, trained, seed).items():
        model = quantized(subject, images(), scheme, seed)
        predicted = logits_of(model, inputs).argmax(1)
        accuracy = 100 * float((predicted == tested.labels).mean())
        rows.append(
            {
                "network": name,
                "seed": seed,
                "calibration": calibration,
                "images": len(tested.labels),
                "float_accuracy": float_accuracy,
                "accuracy": accuracy,
                "drop": float_accuracy - accuracy,
                "agreement": 100 * float((predicted == exact).mean()),
                "integer_share": 100 * integer_share(model),
                "size_ratio": model.ByteSize() / exported.ByteSize(),
                "parameters": sum(parameter.numel() for parameter in subject.module.parameters()),
            }
        )
        print({key: rows[-1][key] for key in ("network", "seed", "calibration", "accuracy", "agreement")}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--network", nargs=4, action="append", required=True, metavar=("NAME", "SOURCE", "TEST", "TRAIN")
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "int8.json")
    arguments = parser.parse_args()
    shown = " ".join(f"--network '{name}' ..." for name, *_ in arguments.network)
    source = provenance(f"python -m benchmarks.int8 {shown} --seeds {arguments.seeds}")
    rows = unfinished(arguments.out, source).get("rows", [])
    for seed in range(arguments.seeds):
        for name, path, test, train in arguments.network:
            if any((row["network"], row["seed"]) == (name, seed) for row in rows):
                continue
            rows += measure(name, Path(path), Path(test), Path(train), seed)
            save(arguments.out, {"kind": "int8", **source, "profile": PROFILE, "rows": rows})


if __name__ == "__main__":
    main()
