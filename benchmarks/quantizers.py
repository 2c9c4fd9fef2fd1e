"""Which library makes INT8 files of our networks: accuracy, size, speed, how much in integers, would TensorRT take it.

    python -m benchmarks.quantizers TEACHER TRAINING_IMAGES TEST_IMAGES [--files FOLDER] [--out FILE]

TEACHER is a classifier of small images; the images are folders of class folders, or .npz files. Training images
calibrate, test images are scored. Beside it, the demo's teacher (every other one of its test images calibrates, the
rest are scored) and two students that saw no training (size and speed alone). A library that is not installed is left
out: torchao, nvidia-modelopt with requests, tensorrt-rtx-cu13.

--files keeps the files and scores: a second run with it measures latency alone, on a machine that is idle by then.
"""

import argparse
import importlib
import importlib.util
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from benchmarks.common import RESULTS, provenance, save
from benchmarks.quantizer_recipes import (
    BATCH,
    PACKAGES,
    RECIPES,
    Network,
    Recipe,
    run_over,
)
from engine.processors import computing_threads
from engine.students import build_network
from engine.teacher import load_teacher
from exporters.bench import bench_together
from exporters.evaluate import LabelledImages, load_labelled
from exporters.quiet import quiet
from exporters.runtimes import open_runtime, to_input
from exporters.to_onnx import INPUT_NAME, OUTPUT_NAME, write_onnx
from ssdkd_cli.compress import ASSETS, DEMO_TEACHER

Classes = NDArray[np.int64]  # [N]

STUDENTS = ("mobilenetv2", "wrn16_2")
WEIGHT_AT = {"QLinearConv": 3, "QGemm": 3, "Conv": 1, "FusedConv": 1, "Gemm": 1, "FusedGemm": 1, "MatMul": 1}
INTEGER_KERNELS = ("QLinearConv", "QGemm")
SCORES = "scores.json"


def measure(networks: list[Network], folder: Path) -> list[dict[str, Any]]:
    """A row for each network and recipe; those of one network are timed together, against its FP32 file.

    `folder` gets the files and what has been scored so far; a second run with it scores nothing again.
    """
    known = {(row["network"], row["recipe"]): row for row in _known_scores(folder)}
    rows: list[dict[str, Any]] = []
    for index, network in enumerate(networks):
        recipes = {
            name: recipe
            for name, recipe in RECIPES.items()
            if (recipe.everywhere or index == 0) and importlib.util.find_spec(recipe.library)
        }
        expected: Classes | None = None
        for name, recipe in recipes.items():
            path = folder / f"{network.name}-{name}.onnx"
            if (network.name, name) not in known:
                if network.scored and expected is None:
                    expected = _predictions(network, network.path)
                row = {"network": network.name, "library": recipe.library, "recipe": name, "images": recipe.images}
                known[network.name, name] = row | _write_and_score(network, expected, recipe, path)
                save(folder / SCORES, {"rows": list(known.values())})
                print(json.dumps(known[network.name, name]), flush=True)
            rows.append(known[network.name, name] | (_facts(network, path) if path.exists() else {}))
    for network in networks:
        written = [row for row in rows if row["network"] == network.name and "error" not in row]
        for batch in (1, BATCH):
            for row, milliseconds in zip(written, _latencies(network, written, folder, batch), strict=True):
                row[f"latency_ms_batch_{batch}"], row[f"speedup_batch_{batch}"] = milliseconds
    return rows


def _known_scores(folder: Path) -> list[dict[str, Any]]:
    if not (folder / SCORES).exists():
        return []
    rows: list[dict[str, Any]] = json.loads((folder / SCORES).read_text(encoding="utf-8"))["rows"]
    return rows


def _write_and_score(network: Network, expected: Classes | None, recipe: Recipe, path: Path) -> dict[str, Any]:
    """Write the network by the recipe to `path`; its accuracies and agreements in percent, one for each seed.

    `expected` are the classes that the FP32 file predicts for the scored images; None: nothing is scored.
    """
    scores: dict[str, Any] = {}
    for seed in reversed(range(1 if expected is None else recipe.seeds)):  # seed 0's file is the one that stays
        inputs = network.calibration(min(recipe.images, len(network.pool)), seed)
        started = time.perf_counter()
        try:
            with quiet():
                recipe.quantize(network, inputs, path)
        except Exception as error:  # which networks a library cannot take is part of the result
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        scores["seconds"] = time.perf_counter() - started
        if network.scored and expected is not None:
            found = _predictions(network, path)
            scores.setdefault("accuracies", []).insert(0, _percent_equal(found, network.scored.labels))
            scores.setdefault("agreements", []).insert(0, _percent_equal(found, expected))
    return scores


def _facts(network: Network, path: Path) -> dict[str, Any]:
    """What the file itself shows."""
    share, kernels = _integer_share(network, path)
    size_ratio = path.stat().st_size / network.path.stat().st_size
    return {
        "size_ratio": size_ratio,
        "integer_share_percent": share,
        "kernels": kernels,
        "tensorrt": _tensorrt_says(path),
    }


def _percent_equal(found: Classes, expected: Classes) -> float:
    return 100 * float((found == expected).mean())


def _predictions(network: Network, path: Path) -> Classes:
    assert network.scored is not None
    images, options = network.scored.images, _silent_options()
    options.intra_op_num_threads = 1  # threads that wait for each other crawl where other work runs beside
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    parts = (to_input(images[start : start + 250], network.mean, network.std) for start in range(0, len(images), 250))
    return np.concatenate([session.run([OUTPUT_NAME], {INPUT_NAME: part})[0].argmax(axis=1) for part in parts])


def _latencies(network: Network, rows: list[dict[str, Any]], folder: Path, batch: int) -> list[tuple[float, float]]:
    """Median milliseconds of each row's file, and how many times faster that is than FP32, timed together."""
    paths = [network.path, *(folder / f"{network.name}-{row['recipe']}.onnx" for row in rows)]
    runtimes = [open_runtime(path) for path in paths]
    float32, *others = bench_together(runtimes, network.calibration(batch, 0))
    return [(other.p50_ms, float32.p50_ms / other.p50_ms) for other in others]


def _integer_share(network: Network, path: Path) -> tuple[float, dict[str, int]]:
    """Percent of the multiply-accumulates that ONNX Runtime does in integers, and the nodes that it really runs.

    Its optimised graph says which kernels run and with which weights, its profile how large their outputs are.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = _silent_options()
        # not beyond: the next level blocks the weights of float convolutions, and their shape with them
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        session.run(None, {INPUT_NAME: np.zeros((1, *network.input_shape), dtype=np.float32)})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        graph = onnx.load(options.optimized_model_filepath).graph
    outputs = {
        event["name"].removesuffix("_kernel_time"): next(iter(event["args"]["output_type_shape"][0].values()))
        for event in events
        if event["name"].endswith("_kernel_time")
    }
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    done, kernels = {True: 0, False: 0}, dict[str, int]()
    for node in graph.node:
        kernels[node.op_type] = kernels.get(node.op_type, 0) + 1
        if node.op_type in WEIGHT_AT:
            weight = weights.get(node.input[WEIGHT_AT[node.op_type]])
            if weight is None:  # a float kernel behind a DequantizeLinear
                weight = next(weights[n.input[0]] for n in graph.node if n.output[0] == node.input[1])
            places = int(np.prod(outputs[node.name])) // weight[0] if len(weight) == 4 else 1
            done[node.op_type in INTEGER_KERNELS] += int(np.prod(weight)) * places
    return 100 * done[True] / (done[True] + done[False]), kernels


def _tensorrt_says(path: Path) -> str | None:
    """ "parsed", or why TensorRT for RTX refuses the file; None where it is not installed."""
    if not importlib.util.find_spec("tensorrt_rtx"):
        return None
    trt = importlib.import_module("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    with quiet():
        builder = trt.Builder(logger)  # must outlive the network, the network the parser
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger)
        parsed = parser.parse(path.read_bytes())
    return "parsed" if parsed else parser.get_error(0).desc().splitlines()[0][:120]


def _silent_options() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return options


def collect(teacher: Path, training_images: Path, test_images: Path, folder: Path) -> list[Network]:
    """The networks of the comparison, each with its FP32 file in `folder`."""
    loaded = load_teacher(teacher)
    spec = loaded.spec
    shape, constants = spec.input_shape, (spec.preprocessing.mean, spec.preprocessing.std)
    pool = load_labelled(training_images, input_shape=shape, classes=spec.classes, class_names=None).images
    scored = load_labelled(test_images, input_shape=shape, classes=spec.classes, class_names=None)
    demo_shape, demo_constants = (1, 28, 28), ((0.5,), (0.5,))
    demo = load_teacher(
        DEMO_TEACHER, input_shape=demo_shape, mean=demo_constants[0], std=demo_constants[1], classes=10
    ).module
    test = load_labelled(ASSETS / "demo_test.npz", input_shape=demo_shape, classes=10, class_names=None)
    rest = LabelledImages(test.images[1::2], test.labels[1::2], test.class_names)
    networks = [
        Network(teacher.stem, loaded.module, folder / "teacher.onnx", shape, *constants, pool, scored),
        Network(DEMO_TEACHER.stem, demo, folder / "demo.onnx", demo_shape, *demo_constants, test.images[::2], rest),
    ]
    for name in STUDENTS:
        torch.manual_seed(0)
        student = build_network(name, classes=spec.classes, channels=shape[0], pixels=min(shape[1:])).train()
        run_over(student, to_input(pool[::100], *constants))  # BatchNorm needs some statistics
        networks.append(Network(name, student.eval(), folder / f"{name}.onnx", shape, *constants, pool, None))
    for network in networks:
        write_onnx(network.module, network.path, input_shape=network.input_shape, metadata={})
    return networks


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows in Markdown."""
    head = "network | library | recipe | accuracy, % | agreement, % | file | in integers, % | b 1 | b 32 | TensorRT | s"
    lines = [f"| {head} |", "|---" * 11 + "|"]
    for row in rows:
        start = f"| {row['network']} | {row['library']} | {row['recipe']} |"
        if "error" in row:
            lines.append(f"{start} {row['error']} |")
            continue
        accuracy, agreement = (_mean(row.get(key)) for key in ("accuracies", "agreements"))
        lines.append(
            f"{start} {accuracy} | {agreement} | {row['size_ratio']:.3f} | {row['integer_share_percent']:.1f} | "
            f"{row['speedup_batch_1']:.2f} | {row['speedup_batch_32']:.2f} | {row['tensorrt']} | {row['seconds']:.1f} |"
        )
    return lines


def _mean(values: list[float] | None) -> str:
    if values is None:
        return "–"
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("training_images", type=Path)
    parser.add_argument("test_images", type=Path)
    parser.add_argument("--files", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "quantizers.json")
    arguments = parser.parse_args()
    onnxruntime.set_default_logger_severity(4)
    data = ["/".join(path.parts[-2:]) for path in (arguments.training_images, arguments.test_images)]
    source = provenance(f"python -m benchmarks.quantizers {arguments.teacher.name} {' '.join(data)}")
    source["versions"] |= {
        package: version(package) for library, package in PACKAGES.items() if importlib.util.find_spec(library)
    }
    source["machine"]["threads"] = computing_threads()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.files or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        networks = collect(arguments.teacher, arguments.training_images, arguments.test_images, folder)
        rows = measure(networks, folder)
        float32 = {
            network.name: _percent_equal(_predictions(network, network.path), network.scored.labels)
            for network in networks
            if network.scored
        }
    save(arguments.out, {"kind": "quantizers", **source, "float_accuracy": float32, "rows": rows})
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
