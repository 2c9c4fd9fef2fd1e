"""What can be typed after `compress` and `demo`: one frozen dataclass.

The fields of `Options` are the options: name, type, help and default stand here once, and `command_taking_options`
makes a command's signature from them.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    not_too_large,
    parse_classes,
    parse_duration,
    parse_effort,
    parse_numbers,
    parse_path,
    parse_qat,
    parse_shape,
    parse_spread,
    without_repeats,
)
from ssdkd_cli.words import shape

ARCH = typer.Option(
    metavar="NAME",
    help="Architecture, where the file does not tell: a name of ours, torchvision's or timm's, "
    "or package.module:function.",
    rich_help_panel="Teacher",
)
INPUT = typer.Option(
    parser=parse_shape,
    metavar="CxHxW",
    help="What the network takes: channels x height x width, for example 3x32x32.",
    rich_help_panel="Teacher",
)
MEAN = typer.Option(
    parser=parse_numbers,
    callback=in_unit,
    metavar="R,G,B",
    help="Mean of the normalisation, of images in 0...1: a number a channel, or one for all.",
    rich_help_panel="Teacher",
)
STD = typer.Option(
    parser=parse_spread,
    is_eager=True,  # read before --mean, whose error may name it
    metavar="R,G,B",
    help="Standard deviation of the normalisation: a number a channel, or one for all.",
    rich_help_panel="Teacher",
)
CLASSES = typer.Option(
    parser=parse_classes,
    metavar="N|FILE",
    help="How many classes, or a labels file with one class name a line.",
    rich_help_panel="Teacher",
)
FLAG = ""  # metavar of an option that takes no value
TRUST_PICKLE = typer.Option(
    "--trust-pickle",
    metavar=FLAG,
    help="Allow a file whose loading runs code. Only for files that you trust.",
    rich_help_panel="Teacher",
)
DEVICE = typer.Option(metavar="NAME", help="auto, cpu, cuda or cuda:1.", rich_help_panel="Run")
SEED = typer.Option(
    min=0,
    callback=not_too_large,
    metavar="N",
    help="Of all random numbers: on an idle CPU the same seed gives the same result, bit for bit.",
    rich_help_panel="Run",
)
EXPORT = typer.Option(
    callback=without_repeats,
    metavar="FORMAT",
    help="onnx or trt; can be given more than once. Default: the profile's, else onnx.",
    rich_help_panel="Result",
)
PRECISION = typer.Option(
    callback=without_repeats,
    metavar="NAME",
    help="fp32, fp16 or int8; can be given more than once. Default: the profile's; without a profile compress "
    "measures all and recommends the fastest that is proven without doubt, export makes fp32.",
    rich_help_panel="Result",
)
PROFILE = typer.Option(
    metavar="NAME|FILE",
    help="The device: `ssdkd profiles` lists them. Sets what is not typed.",
    rich_help_panel="Result",
)
QAT = typer.Option(
    parser=parse_qat,
    metavar="auto|on|off",
    help="Quantization-aware distillation of an INT8 file: auto does it where too much is lost without.",
    rich_help_panel="Result",
)
NO_FALLBACK = typer.Option(
    "--no-fallback",
    metavar=FLAG,
    help="All layers of an INT8 file in integers, or exit code 3: none is left in float32.",
    rich_help_panel="Result",
)
EVAL_DATA = typer.Option(
    parser=parse_path,
    metavar="DIR",
    help="Labelled images (a folder a class, numbered alphabetically unless --classes or the teacher's file names the "
    "classes; or an .npz) for the accuracy in the report; the distillation never sees them.",
    rich_help_panel="Result",
)
MAX_DROP = typer.Option(
    min=0.0,
    callback=finite,
    metavar="POINTS",
    help="Exit code 3 where a file's accuracy is further below the teacher's; needs --eval-data.",
    rich_help_panel="Limits",
)
MAX_LATENCY = typer.Option(
    min=0.0,
    callback=finite,
    metavar="MS",
    help="Exit code 3 where a file takes longer for one image, in the median.",
    rich_help_panel="Limits",
)
MAX_SIZE = typer.Option(
    min=0.0,
    callback=finite,
    metavar="MB",
    help="Exit code 3 where a file is larger (10^6 bytes).",
    rich_help_panel="Limits",
)
MIN_AGREEMENT = typer.Option(
    min=0.0,
    max=100.0,
    metavar="PERCENT",
    help="Exit code 3 where a file predicts the teacher's class less often, on held-out synthetic samples.",
    rich_help_panel="Limits",
)
FP16_IO = typer.Option(
    "--fp16-io",
    metavar=FLAG,
    help="An FP16 file takes images and gives logits in float16 too; without it these are float32.",
    rich_help_panel="Result",
)
EMBED_PREPROCESSING = typer.Option(
    "--embed-preprocessing",
    metavar=FLAG,
    help="The exported file takes images in 0...1 and normalises them itself.",
    rich_help_panel="Result",
)
OVERWRITE = typer.Option(
    "--overwrite",
    metavar=FLAG,
    help="Replace what is there: an earlier run, or of an export the files of the same names.",
    rich_help_panel="Result",
)
JSON = typer.Option(
    "--json",
    metavar=FLAG,
    help="Print the result as JSON on stdout, and nothing else there.",
    rich_help_panel="Result",
)


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
        typer.Option(
            metavar="NAME",
            help="From `ssdkd students`, torchvision, timm, package.module:function, or `same` as the teacher "
            "(a graph: with its --arch).",
            rich_help_panel="Student",
        ),
    ]
    student_weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Start from these weights instead of random and inherited ones.",
            rich_help_panel="Student",
        ),
    ] = None
    arch: Annotated[str | None, ARCH] = None
    input: Annotated[tuple[int, int, int] | None, INPUT] = None
    mean: Annotated[tuple[float, ...] | None, MEAN] = None
    std: Annotated[tuple[float, ...] | None, STD] = None
    classes: Annotated[int | Path | None, CLASSES] = None
    trust_pickle: Annotated[bool, TRUST_PICKLE] = False
    effort: Annotated[
        str,
        typer.Option(
            parser=parse_effort,
            metavar="|".join(EFFORTS),
            help="How long to distil: smoke proves the path, full is for the result.",
            rich_help_panel="Run",
        ),
    ] = "full"
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=f"Synthetic samples that the student learns from; else {DistillationSettings.samples}.",
            rich_help_panel="Run",
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=16,
            metavar="N",
            help="Images in a step of the student, and in a batch of new ones; fewer need less memory.",
            rich_help_panel="Run",
        ),
    ] = None
    time_limit: Annotated[
        float | None,
        typer.Option(
            parser=parse_duration,
            metavar="TIME",
            help="Stop distilling after 90s, 10m, 1h30m. A run that the clock hurries cannot be repeated bit for bit.",
            rich_help_panel="Run",
        ),
    ] = None
    device: Annotated[str, DEVICE] = "auto"
    seed: Annotated[int, SEED] = 0
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            is_eager=True,
            callback=apply_config,
            help="TOML file with values for what is not typed, required ones too, such as a run's config.toml.",
            rich_help_panel="Run",
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
        typer.Option(
            parser=parse_path,
            metavar="DIR",
            help="Folder of the run; else runs/<teacher>-<student>.",
            rich_help_panel="Result",
        ),
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
