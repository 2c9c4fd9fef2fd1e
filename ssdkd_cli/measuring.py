"""A finished run, or a single model file, measured: its accuracy on labelled images, its latency on this machine."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from engine.errors import SSDKDError
from exporters import FORMATS
from exporters.evaluate import LabelledImages, accuracy
from exporters.metadata import describe, preprocessing_of
from exporters.runtimes import OPENERS, open_runtime
from ssdkd_cli import console, runs
from ssdkd_cli.artifacts import file_name
from ssdkd_cli.doubts import busy_warnings, chance_warnings, slower_warnings, student_warnings
from ssdkd_cli.labels import check_number, labelled_images, network_accuracy, numbered_images, read_classes
from ssdkd_cli.material import NOISE_SAMPLES, read_teacher, smooth_noise
from ssdkd_cli.plans import PLAN
from ssdkd_cli.proving import score_file
from ssdkd_cli.report import Percentiles, problem_of, read_report
from ssdkd_cli.stated import Stated
from ssdkd_cli.target import is_for_another_device
from ssdkd_cli.timing import BATCHES, time_files, time_plan_file


@dataclass(frozen=True)
class Score:
    """The accuracy of one model, percent."""

    path: str
    accuracy: float
    images: int


@dataclass(frozen=True)
class FileTiming:
    """Latency of one image and throughput at `batch` of one file; see `timing.Timing`."""

    path: str
    latency_ms: Percentiles
    latency_batch: int
    throughput_per_s: float
    batch: int
    runtime: str


def evaluate(model: Path, data: Path, stated: Stated) -> list[Score]:
    """The accuracy of a run's student and of its files, or of one file, an exported one or a teacher's.

    What is stated of the network is for a single file, but for its classes; the architecture and trust for a teacher's.

    Raises:
        SSDKDError: no model, data that does not fit it, or an option that does not apply to it.
    """
    if model.is_dir() and (given := stated.flags):
        raise SSDKDError(f"{given} describe a single file; {model} is a run, which knows its own", f"leave {given} out")
    number, names = read_classes(stated.classes)
    if model.is_dir():
        return _score_run(model, data, number, names, trust_pickle=stated.trust_pickle)
    if model.suffix.lower() not in OPENERS:
        teacher = read_teacher(model, stated)
        card = runs.teacher_card(teacher.spec, runs.SAME)
        labelled = labelled_images(data, card)
        value = network_accuracy(teacher.module, card, labelled)
        doubts = chance_warnings(value, card.classes, is_run=False)
    else:
        runtime = open_runtime(model, input_shape=stated.input)
        for flag, is_given in (("--arch", stated.arch is not None), ("--trust-pickle", stated.trust_pickle)):
            if is_given:
                raise SSDKDError(
                    f"{flag} is for a run that needs its teacher's file, or for a checkpoint; {model} runs as it is",
                    f"leave {flag} out",
                )
        check_number(number, model, runtime.classes)
        said = describe(runtime.metadata)
        mean, std = preprocessing_of(said, channels=runtime.input_shape[0], mean=stated.mean, std=stated.std)
        labelled = numbered_images(data, runtime.input_shape, runtime.classes, names or said.class_names)
        value = accuracy(runtime.run, labelled, mean=mean, std=std, batch=runtime.fixed_batch)
        doubts = student_warnings(value, runtime.classes, of_teacher=None, is_run=False)
    console.warn_all(doubts)
    return [Score(str(model), value, len(labelled.labels))]


def _score_run(
    model: Path, data: Path, number: int | None, names: tuple[str, ...] | None, *, trust_pickle: bool
) -> list[Score]:
    run = runs.open_run(model, trust_pickle=trust_pickle)
    warn_of_replaced_files(model)
    card = run.card
    check_number(number, model, card.classes)
    labelled = numbered_images(data, card.input_shape, card.classes, names or card.class_names)
    images = len(labelled.labels)
    with console.stage("score", f"running {images:,} images"):
        value = network_accuracy(run.module, card, labelled)
        scores = [Score(str(model / runs.STUDENT), value, images)]
        for path in files_of(model):
            try:
                scores.append(Score(str(path), score_file(open_runtime(path), labelled), images))
            except SSDKDError as error:
                again = f"write it anew: ssdkd export {model} --overwrite, or take it out of the run's folder"
                raise SSDKDError(f"{path}: {error.message}", again) from error
    console.warn_all(student_warnings(value, card.classes, of_teacher=_known_accuracy(model, labelled), is_run=True))
    return scores


def _known_accuracy(run: Path, labelled: LabelledImages) -> float | None:
    """The teacher's accuracy (percent) where the run's report has it of these very images."""
    with contextlib.suppress(SSDKDError):
        teacher = read_report(run).teacher
        return teacher.accuracy if teacher.accuracy_sha256 == labelled.sha256 else None
    return None


def warn_of_replaced_files(folder: Path) -> None:
    """Says which files of a run are others than its report describes; one that cannot be read describes nothing."""
    with contextlib.suppress(SSDKDError):
        present = [item for item in read_report(folder).artifacts if (folder / item.path).exists()]
        console.warn_all([problem for item in present if (problem := problem_of(item, folder))])


def bench(model: Path, *, input_shape: tuple[int, int, int] | None) -> list[FileTiming]:
    """Latency and throughput of a run's files, in turn, or of one file; TensorRT plans on the GPU, the rest on the CPU.

    Raises:
        SSDKDError: no model file there, or one that cannot be run.
    """
    paths = files_of(model) if model.is_dir() else [model]
    if not paths and not (model / runs.STUDENT).exists():
        raise SSDKDError(
            f"{model} is no run: it holds no {runs.STUDENT}, and no model file that can be run here",
            "give a model file, for example ssdkd bench model.onnx, or the folder that `ssdkd compress` wrote",
        )
    if not paths:
        raise SSDKDError(
            f"{model} holds no exported file that can be run here", f"export it first: {runs.export_command(model)}"
        )
    if model.is_dir():
        warn_of_replaced_files(model)
    plans = [path for path in paths if path.suffix == PLAN]
    others = [path for path in paths if path.suffix != PLAN]
    with console.stage("speed", f"timing {', '.join(path.name for path in paths)}"):
        runtimes = [open_runtime(path, input_shape=input_shape) for path in others]
        timings = time_files(runtimes, smooth_noise(NOISE_SAMPLES, runtimes[0].input_shape)) if runtimes else []
        timings += [time_plan_file(path, BATCHES[0]) for path in plans]
    if timings[0].latency_batch > 1:
        console.warn(f"the latency is of {timings[0].latency_batch} images at once: no other batch can be run")
    timed = dict(zip((*others, *plans), timings, strict=True))
    named = {path.name: timing for path, timing in timed.items()}
    on_cpu = {path.name: timed[path] for path in others}
    elsewhere = _made_for_others(model) if model.is_dir() else ()
    slower = slower_warnings(on_cpu, file_name("fp32", ".onnx"), spared=elsewhere)
    console.warn_all([*busy_warnings(named, model), *slower])
    return [FileTiming(str(path), **vars(timing)) for path, timing in timed.items()]


def _made_for_others(run: Path) -> list[str]:
    """The names of a run's files that were made for a device of which this processor says nothing."""
    with contextlib.suppress(SSDKDError):
        return [item.path for item in read_report(run).artifacts if is_for_another_device(item.profile)]
    return []


def files_of(folder: Path) -> list[Path]:
    """The exported files of a run that were not rejected and can be run here; those that cannot are named."""
    suffixes = {format.suffix for format in FORMATS.values()}
    found = sorted(path for path in folder.glob(f"{runs.MODEL}*") if path.suffix in suffixes)
    return [path for path in found if path.suffix != PLAN or runs_here(path)]


def runs_here(path: Path) -> bool:
    """Whether a model file can be run on this machine; one that cannot is named."""
    try:
        open_runtime(path)
    except SSDKDError as error:
        console.warn(f"{path.name} is left out: {error.message}")
        return False
    return True
