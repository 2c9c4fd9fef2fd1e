"""All that needs a GPU: teachers of CIFAR-10, their students with one set of settings, accuracy against seconds.

    python -m benchmarks.gpu DATA --pack FOLDER        (any machine: train.npz and test.npz, 57 MB, to carry along)
    python -m benchmarks.gpu DATA --out FOLDER [--pairs wrn40_2-wrn16_2 ...] [--seeds 3] [--minutes 8] [--device cuda]
    python -m benchmarks.gpu DATA --out FOLDER --rivals fast-5 nayer --fast-dfkd CHECKOUT --nayer CHECKOUT ...
    python -m benchmarks.gpu DATA --out FOLDER --changed cuda_graphs=false looking_share=0.5   (ours twice more)
    python -m benchmarks.gpu DATA --out FOLDER --buffer 500 2500 5000 10000      (the first pair, by size of the buffer)

DATA holds train/ and test/, a folder a class, or what --pack made of them; the training images only make teachers that
FOLDER does not hold yet. A pair takes --minutes at most: its runs share what the teacher leaves of them, whether or not
that is there already, so that all of them have the same time; --seconds gives each run a time of its own instead. Goes
on where it was stopped: runs that FOLDER holds are not repeated, one that was interrupted starts again.

FOLDER: teachers/NAME.pt, runs/PAIR-METHOD-SAMPLES-SEED.json, and gpu.json with all of them; those of --buffer are in
buffers/ and gpu_buffer.json.
"""

import argparse
import copy
import gc
import shlex
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import provenance, save
from benchmarks.gpu_data import load_split, pack
from benchmarks.gpu_results import finished, merge, name_of, path_of
from benchmarks.gpu_teachers import Schedule, open_teacher, percent_correct, train_and_save
from benchmarks.peer_code import METHODS as PEERS
from benchmarks.peers import run_peer
from benchmarks.race import begin
from engine.config import settings_for
from engine.device import Compute, choose_device
from engine.distill import averaged_student, distill
from engine.errors import SSDKDError
from engine.state import State, recordings
from engine.students import build_student
from engine.teacher import Teacher
from exporters.evaluate import LabelledImages

# Pairs of the data-free papers: name -> teacher in engine.zoo, student as --student names it.
PAIRS = {
    "wrn40_2-wrn16_2": ("wrn40_2", "wrn16_2"),
    "resnet34-resnet18": ("resnet34_cifar", "resnet18"),
    "wrn40_2-wrn16_1": ("wrn40_2", "wrn16_1"),
    "wrn40_2-wrn40_1": ("wrn40_2", "wrn40_1"),
    "wrn40_2-mobilenetv2": ("wrn40_2", "mobilenetv2"),
    "vgg11-resnet18": ("vgg11_blocks", "resnet18"),
    "wrn16_1-wrn10_1": ("wrn16_1", "wrn10_1"),  # --tiny takes this one
}
SAMPLES = 5000  # a tenth of the training images
RUN_OVERHEAD_SECONDS = 15.0  # of a run: building, and looking at the test images afterwards


@dataclass(frozen=True)
class Size:
    """How much of everything; `settings` are overrides of the engine's own."""

    schedule: Schedule = field(default_factory=Schedule)
    settings: dict[str, Any] = field(default_factory=dict)
    points: int = 20  # of the curve


TINY = Size(
    Schedule(epochs=1, seconds=20.0, batch=32),
    {"rounds": 8, "warmup_rounds": 2, "inversion_batch": 16, "inversion_steps": 1, "student_batch": 16}
    | {"student_steps": 2, "held_out": 16, "views": 2, "generator_width": 4},
    points=3,
)


@dataclass(frozen=True)
class Job:
    """One run: what every method is given, the same for all. Images are (C, H, W)."""

    pair: str
    student: str
    teacher: Teacher
    samples: int
    seed: int
    seconds: float
    compute: Compute
    size: Size
    evaluate: Callable[[nn.Module], float]  # a student's accuracy in percent on the test images, outside the clock


Method = Callable[[Job], dict[str, Any]]


def run_ssdkd(job: Job, **changed: Any) -> dict[str, Any]:
    """Our own engine with the settings that are `changed`.

    The test images are looked at when the clock has stopped, through students kept on the way.
    """
    spec = job.teacher.spec
    sized = {"samples": job.samples, **job.size.settings, **changed}
    largest_batch = job.compute.largest_batch
    settings = settings_for("full", image_shape=spec.input_shape, largest_batch=largest_batch, **sized)
    state = begin(job.student, job.teacher, settings, seed=job.seed, compute=job.compute)
    if job.compute.device.type == "cuda":
        gc.collect()  # the graphs of the run before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(job.compute.device)
    kept, last = keep_students(state, job.seconds, job.size.points)
    gigabytes = torch.cuda.max_memory_reserved(job.compute.device) / 1e9 if job.compute.device.type == "cuda" else None
    curve = [{**about, "accuracy": job.evaluate(average)} for about, average in kept]
    return {
        "seconds": state.seconds,
        "student_accuracy": curve[-1]["accuracy"],
        "curve": curve,
        "student_parameters": sum(parameter.numel() for parameter in state.student.parameters()),
        "agreement": last["agreement"],
        "class_balance": last["class_balance"],
        "rounds": state.round,
        "steps": state.steps,
        "images_seen": state.images_seen,
        "images_synthesized": state.round * settings.inversion_batch,
        "images_per_second": state.images_seen / state.seconds,
        "synthesized_per_second": state.round * settings.inversion_batch / state.seconds,
        "peak_memory_gb": gigabytes,
        "hurried": state.hurried,
        "recordings": {name: step.refusal or step.replays for name, step in recordings(state).items()},
        "settings": asdict(settings),
    }


def keep_students(
    state: State, seconds: float, points: int
) -> tuple[list[tuple[dict[str, float], nn.Module]], dict[str, Any]]:
    """Distil for `seconds`, or to the last round.

    Returns:
        the start, `points` averaged students at equal parts of the run, with (round, seconds) and the agreement in
        percent, and the last round's metrics. Copying one to the host counts as time of the run: milliseconds.
    """
    kept: list[tuple[dict[str, float], nn.Module]] = [({"round": 0, "seconds": 0.0}, averaged_student(state))]
    metrics = None
    for metrics in distill(state, time_limit_seconds=seconds):
        progress = max(metrics.round / metrics.rounds, metrics.seconds / seconds)
        if progress >= min(1.0, len(kept) / points):
            about = {"round": metrics.round, "seconds": metrics.seconds, "agreement": metrics.agreement}
            kept.append((about, averaged_student(state)))
    if metrics is None or not state.steps:
        raise SSDKDError(f"the student took no step in {seconds:.0f} s", "give more --minutes, or fewer --seeds")
    return kept, asdict(metrics)


def rival(method: str, checkout: Path) -> Method:
    """One of benchmarks.peers as a method: the job's teacher, student, seed and seconds, by the authors' code."""

    def run(job: Job) -> dict[str, Any]:
        student = build_student(job.student, teacher=job.teacher, seed=job.seed)
        found = run_peer(
            method,
            checkout,
            teacher=job.teacher.module,
            student=student,
            spec=job.teacher.spec,
            evaluate=job.evaluate,
            seconds=job.seconds,
            every=job.seconds / job.size.points,
            seed=job.seed,
            device=job.compute.device,
        )
        curve = [asdict(point) for point in found.points]
        end = curve[-1]
        return {
            "seconds": end["seconds"],
            "student_accuracy": end["accuracy"],
            "curve": curve,
            "settings": found.settings,
        }

    return run


def run_seconds(minutes: float, runs: int, teacher_seconds: float) -> float:
    """The time of one of `runs` runs of a pair, so that the pair with its teacher takes `minutes`."""
    return (60 * minutes - teacher_seconds) / runs - RUN_OVERHEAD_SECONDS


def teacher_for(
    arch: str, data: Path, out: Path, test: LabelledImages, compute: Compute, schedule: Schedule
) -> tuple[Teacher, dict[str, Any]]:
    """The teacher called `arch`, trained where `out` has none yet, and what is said about it in a run."""
    path = out / "teachers" / f"{arch}.pt"
    if not path.exists():
        train_and_save(path, arch, load_split(data, "train"), compute, schedule=schedule)
    _, height, width, channels = test.images.shape
    teacher, training = open_teacher(path, arch, (channels, height, width))
    correct = percent_correct(copy.deepcopy(teacher.module), test.images, test.labels, compute.device)
    print(f"{arch}: {correct:.2f} % after {training['trained_seconds']:.0f} s", flush=True)
    parameters = teacher.spec.parameters
    return teacher, {"teacher_accuracy": correct, "teacher_parameters": parameters, "teacher_training": training}


def run_pair(
    pair: str,
    jobs: Sequence[tuple[str, int, int]],
    methods: Mapping[str, Method],
    arguments: argparse.Namespace,
    source: dict[str, Any],
) -> None:
    """All runs (method, samples, seed) of a pair that --out does not hold yet."""
    out, size = arguments.out, TINY if arguments.tiny else Size()
    if arguments.teacher_seconds:
        size = replace(size, schedule=replace(size.schedule, seconds=arguments.teacher_seconds))
    if arguments.points:
        size = replace(size, points=arguments.points)
    if arguments.rounds:
        size = replace(size, settings={**size.settings, "rounds": arguments.rounds})
    seconds = arguments.seconds or run_seconds(arguments.minutes, len(jobs), size.schedule.seconds)
    if seconds <= 0:
        sys.exit(f"{arguments.minutes} minutes are too few for a teacher and {len(jobs)} runs: give more --minutes")
    about = {**source, "pair": pair, "seconds_limit": seconds, "rounds_limit": arguments.rounds, "tiny": arguments.tiny}
    kind = "gpu_buffer" if arguments.buffer else "gpu"
    done = finished(out, kind, about, [name_of(pair, *job) for job in jobs])
    left = [job for job in jobs if name_of(pair, *job) not in done]
    if not left:
        print(f"{pair}: all {len(jobs)} runs are there", flush=True)
        return
    teacher_arch, student = PAIRS[pair]
    compute = choose_device(arguments.device)
    test = load_split(arguments.data, "test")
    teacher, known = teacher_for(teacher_arch, arguments.data, out, test, compute, size.schedule)

    def evaluate(network: nn.Module) -> float:
        return percent_correct(network, test.images, test.labels, compute.device)

    for method, samples, seed in left:
        started = time.perf_counter()
        job = Job(pair, student, teacher, samples, seed, seconds, compute, size, evaluate)
        result: dict[str, Any] = {"failed": None}
        try:
            result |= methods[method](job)
            result["ratio_percent"] = 100 * result["student_accuracy"] / known["teacher_accuracy"]
        except SSDKDError as error:  # a run that fails is a result too, and the others go on
            result["failed"] = error.message
        entry = {"kind": "gpu_run", **about, "method": method, "student": student, "samples": samples, "seed": seed}
        result = {**entry, **known, **result, "seconds_total": time.perf_counter() - started}
        save(path_of(out, kind, name_of(pair, method, samples, seed)), result)
        merge(out, kind, source)
        says = result["failed"] or f"{result['student_accuracy']:.2f} % after {result['seconds']:.0f} s"
        print(f"{name_of(pair, method, samples, seed)}: {says}", flush=True)


def without_paths(words: Sequence[str], arguments: argparse.Namespace) -> list[str]:
    """The command line as it is published: folders of this machine under the names that the usage has for them."""
    named = {str(arguments.data): "DATA", str(arguments.out): "FOLDER"}
    named |= {str(checkout): "CHECKOUT" for checkout in (arguments.fast_dfkd, arguments.nayer) if checkout}
    return [named.get(word.rstrip("/"), word) for word in words]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, help="folder of teachers and results")
    parser.add_argument("--pack", type=Path, help="only write train.npz and test.npz into this folder")
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS)[:-1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8, help="of a pair, its teacher included")
    parser.add_argument("--seconds", type=float, help="of a run, in place of its share of --minutes")
    parser.add_argument("--teacher-seconds", type=float, help="of a teacher's training, at most")
    parser.add_argument("--points", type=int, help="of a curve, at equal parts of a run")
    parser.add_argument("--rounds", type=int, help="of ours, where a GPU has time for more than `--effort full` has")
    parser.add_argument("--rivals", nargs="*", choices=sorted(PEERS), default=[], help="beside ours, in equal time")
    parser.add_argument("--fast-dfkd", type=Path, help="a clone of zju-vipa/Fast-Datafree")
    parser.add_argument("--nayer", type=Path, help="a clone of tmtuan1307/NAYER")
    parser.add_argument("--buffer", nargs="+", type=int, help="samples: run the first pair with each of these")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--changed", nargs="+", default=[], metavar="SETTING=VALUE", help="ours once more with each of these"
    )
    parser.add_argument("--tiny", action="store_true", help="try everything in seconds, on any machine; means nothing")
    arguments = parser.parse_args(words)
    if arguments.pack:
        for path in pack(arguments.data, arguments.pack):
            print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        return
    if not arguments.out:
        parser.error("give --out FOLDER, or --pack FOLDER")
    if arguments.buffer and (arguments.rivals or arguments.changed):
        parser.error("--buffer is of ours as it is: run --rivals and --changed by themselves")
    source = provenance(
        shlex.join(["python", "-m", "benchmarks.gpu", *without_paths(words or sys.argv[1:], arguments)])
    )
    methods: dict[str, Method] = {"ssdkd": run_ssdkd}
    for changed in arguments.changed:
        try:
            methods[f"ssdkd_{changed}"] = partial(run_ssdkd, **tomllib.loads(changed))
            settings_for("full", image_shape=(3, 32, 32), **tomllib.loads(changed))
        except (tomllib.TOMLDecodeError, SSDKDError) as error:
            parser.error(f"--changed {changed}: {error}")
    for name in arguments.rivals:
        checkout = arguments.nayer if name == "nayer" else arguments.fast_dfkd
        if not checkout:
            parser.error(
                f"{name} needs a clone of its authors' code: --{'nayer' if name == 'nayer' else 'fast-dfkd'} FOLDER"
            )
        methods[name] = rival(name, checkout)
    pairs = arguments.pairs[:1] if arguments.buffer else arguments.pairs
    jobs = [
        (method, samples, seed)
        for seed in range(arguments.seeds)
        for samples in arguments.buffer or [64 if arguments.tiny else SAMPLES]
        for method in methods
    ]
    for pair in pairs:
        run_pair(pair, jobs, methods, arguments, source)


if __name__ == "__main__":
    main()
