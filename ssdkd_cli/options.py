"""What can be typed after `compress` and `demo`: one frozen dataclass.

The fields of `Options` are the options: name, type, help and default stand here once, and `command_taking_options`
makes a command's signature from them.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_type_hints

import typer

from engine.config import EFFORTS, DistillationSettings
from ssdkd_cli.config_file import apply_config
from ssdkd_cli.outcome import Outcome
from ssdkd_cli.parsing import (
    finite,
    in_unit,
    known_formats,
    known_precisions,
    not_too_large,
    parse_classes,
    parse_duration,
    parse_effort,
    parse_numbers,
    parse_path,
    parse_qat,
    parse_shape,
    parse_spread,
)
from ssdkd_cli.words import shape

# An option in its part of --help.
_of_teacher, _of_student, _of_run, _of_result, _limit = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("Teacher", "Student", "Run", "Result", "Limits")
)

ARCH = _of_teacher(
    metavar="NAME",
    help="Architecture, where the file does not tell: a name of ours, torchvision's or timm's, "
    "or package.module:function.",
)
INPUT = _of_teacher(
    parser=parse_shape, metavar="CxHxW", help="What the network takes: channels x height x width, for example 3x32x32."
)
MEAN = _of_teacher(
    parser=parse_numbers,
    callback=in_unit,
    metavar="R,G,B",
    help="Mean of the normalisation, of images in 0...1: a number a channel, or one for all.",
)
STD = _of_teacher(
    parser=parse_spread,
    is_eager=True,  # read before --mean, whose error may name it
    metavar="R,G,B",
    help="Standard deviation of the normalisation: a number a channel, or one for all.",
)
CLASSES = _of_teacher(
    parser=parse_classes, metavar="N|FILE", help="How many classes, or a labels file with one class name a line."
)
FLAG = ""  # metavar of an option that takes no value
TRUST_PICKLE = _of_teacher(
    "--trust-pickle", metavar=FLAG, help="Allow a file whose loading runs code. Only for files that you trust."
)
DEVICE = _of_run(metavar="NAME", help="auto, cpu, cuda or cuda:1.")
SEED = _of_run(
    min=0,
    callback=not_too_large,
    metavar="N",
    help="Of all random numbers: on an idle CPU the same seed gives the same result, bit for bit.",
)
EXPORT = _of_result(
    callback=known_formats,
    metavar="FORMAT",
    help="onnx or trt; can be given more than once. Default: the profile's, else onnx.",
)
PRECISION = _of_result(
    callback=known_precisions,
    metavar="NAME",
    help="fp32, fp16 or int8; can be given more than once. Default: the profile's; without a profile compress "
    "measures all and recommends the fastest that is proven without doubt, export makes fp32.",
)
PROFILE = _of_result(metavar="NAME|FILE", help="The device: `ssdkd profiles` lists them. Sets what is not typed.")
QAT = _of_result(
    parser=parse_qat,
    metavar="auto|on|off",
    help="Quantization-aware distillation of an INT8 file: auto does it where too much is lost without.",
)
NO_FALLBACK = _of_result(
    "--no-fallback",
    metavar=FLAG,
    help="An INT8 file that loses too much is a failure, exit code 3: no layer of it goes back into float32.",
)
EVAL_DATA = _of_result(
    parser=parse_path,
    metavar="DIR",
    help="Labelled images (a folder a class, numbered alphabetically unless --classes or the teacher's file names the "
    "classes; or an .npz) for the accuracy in the report; the distillation never sees them.",
)
MAX_DROP = _limit(
    min=0.0,
    callback=finite,
    metavar="POINTS",
    help="Exit code 3 where a file's accuracy is further below the teacher's; needs --eval-data.",
)
MAX_LATENCY = _limit(
    min=0.0, callback=finite, metavar="MS", help="Exit code 3 where a file takes longer for one image, in the median."
)
MAX_SIZE = _limit(min=0.0, callback=finite, metavar="MB", help="Exit code 3 where a file is larger (10^6 bytes).")
MIN_AGREEMENT = _limit(
    min=0.0,
    max=100.0,
    metavar="PERCENT",
    help="Exit code 3 where a file predicts the teacher's class less often, on held-out synthetic samples.",
)
FP16_IO = _of_result(
    "--fp16-io",
    metavar=FLAG,
    help="An FP16 file takes images and gives logits in float16 too; without it these are float32.",
)
EMBED_PREPROCESSING = _of_result(
    "--embed-preprocessing", metavar=FLAG, help="The exported file takes images in 0...1 and normalises them itself."
)
OVERWRITE = _of_result(
    "--overwrite",
    metavar=FLAG,
    help="Replace what is there: an earlier run, or of an export the files of the same names.",
)
JSON = _of_result("--json", metavar=FLAG, help="Print the result as JSON on stdout, and nothing else there.")


@dataclass(frozen=True)
class Options:
    """A run as it was asked for: what was typed, else what --config says, else the default."""

    teacher: Annotated[
        Path,
        typer.Argument(
            parser=parse_path,
            metavar="TEACHER",
            help="The trained network: a checkpoint, .safetensors, .pt2, TorchScript or .onnx file.",
            show_default=False,
        ),
    ]
    student: Annotated[
        str,
        _of_student(
            metavar="NAME",
            help="From `ssdkd students`, torchvision, timm, package.module:function, or `same` as the teacher "
            "(a graph: with its --arch).",
        ),
    ]
    student_weights: Annotated[
        Path | None,
        _of_student(metavar="FILE", help="Start from these weights instead of random and inherited ones."),
    ] = None
    arch: Annotated[str | None, ARCH] = None
    input: Annotated[tuple[int, int, int] | None, INPUT] = None
    mean: Annotated[tuple[float, ...] | None, MEAN] = None
    std: Annotated[tuple[float, ...] | None, STD] = None
    classes: Annotated[int | Path | None, CLASSES] = None
    trust_pickle: Annotated[bool, TRUST_PICKLE] = False
    effort: Annotated[
        str,
        _of_run(
            parser=parse_effort,
            metavar="|".join(EFFORTS),
            help="How long to distil: smoke proves the path, full is for the result.",
        ),
    ] = "full"
    samples: Annotated[
        int | None,
        _of_run(
            min=1,
            metavar="N",
            help=f"Synthetic samples that the student learns from; else {DistillationSettings.samples}.",
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        _of_run(
            min=16,
            metavar="N",
            help="Images in a step of the student, and in a batch of new ones; fewer need less memory.",
        ),
    ] = None
    time_limit: Annotated[
        float | None,
        _of_run(
            parser=parse_duration,
            metavar="TIME",
            help="Stop distilling after 90s, 10m, 1h30m. A run that the clock hurries cannot be repeated bit for bit.",
        ),
    ] = None
    device: Annotated[str, DEVICE] = "auto"
    seed: Annotated[int, SEED] = 0
    config: Annotated[
        Path | None,
        _of_run(
            metavar="FILE",
            is_eager=True,
            callback=apply_config,
            help="TOML file with values for what is not typed, required ones too, such as a run's config.toml.",
        ),
    ] = None
    export: Annotated[list[str], EXPORT] = field(default_factory=list)
    precision: Annotated[list[str], PRECISION] = field(default_factory=list)
    profile: Annotated[str | None, PROFILE] = None
    qat: Annotated[str, QAT] = "auto"
    no_fallback: Annotated[bool, NO_FALLBACK] = False
    fp16_io: Annotated[bool, FP16_IO] = False
    embed_preprocessing: Annotated[bool, EMBED_PREPROCESSING] = False
    eval_data: Annotated[Path | None, EVAL_DATA] = None
    max_drop: Annotated[float | None, MAX_DROP] = None
    max_latency_ms: Annotated[float | None, MAX_LATENCY] = None
    max_size_mb: Annotated[float | None, MAX_SIZE] = None
    min_agreement: Annotated[float | None, MIN_AGREEMENT] = None
    out: Annotated[
        Path | None,
        _of_result(parser=parse_path, metavar="DIR", help="Folder of the run; else runs/<teacher>-<student>."),
    ] = None
    overwrite: Annotated[bool, OVERWRITE] = False
    json: Annotated[bool, JSON] = False


# Where a run goes and how it is shown says nothing of what it does: config.toml leaves it out. Trust is to be
# typed each time.
NOT_IN_CONFIG = ("config", "out", "overwrite", "json", "trust_pickle")


def as_typed(options: Options) -> dict[str, object]:
    """The options as config.toml holds them: the words that the command line takes, files by their full path."""
    from profiles import profile_names

    values = {
        name: value for name, value in vars(options).items() if name not in NOT_IN_CONFIG and value not in (None, [])
    }
    words: dict[str, Callable[[Any], str]] = {"input": shape, "time_limit": lambda seconds: f"{seconds:.0f}s"}
    if options.profile and options.profile not in profile_names() and Path(options.profile).is_file():
        values["profile"] = Path(options.profile)
    return {
        name: str(value.resolve()) if isinstance(value, Path) else words[name](value) if name in words else value
        for name, value in values.items()
    }


def command_taking_options(
    run: Callable[[typer.Context, Options], Outcome],
    *,
    defaults: Mapping[str, str] = MappingProxyType({}),
    **fixed: Any,
) -> Callable[..., Outcome]:
    """A function for Typer whose parameters are the fields of Options, less those that are `fixed`; it calls `run`.

    `defaults` are the command's own, as they would be typed.
    """

    def command(context: typer.Context, **values: Any) -> Outcome:
        return run(context, Options(**fixed, **values))

    hints = get_type_hints(Options, include_extras=True)
    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for option in dataclasses.fields(Options):
        if option.name not in fixed:
            parameters.append(
                inspect.Parameter(
                    option.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=defaults.get(option.name, _default(option)),
                    annotation=_for_typer(hints[option.name]),
                )
            )
    command.__signature__ = inspect.Signature(parameters, return_annotation=Outcome)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": Outcome}
    command.__doc__ = run.__doc__
    return command


def _default(option: "dataclasses.Field[Any]") -> object:
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return inspect.Parameter.empty if option.default is dataclasses.MISSING else option.default


def _for_typer(annotation: Any) -> Any:
    """Any where there is a parser: Typer reads a tuple type as so many words. A path stays one: help shows its type."""
    kind, declared = get_args(annotation)
    is_any = kind is not Path and getattr(declared, "parser", None)
    return Annotated[Any if is_any else kind, declared]
