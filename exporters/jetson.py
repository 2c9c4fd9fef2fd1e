"""A shell script that builds a TensorRT plan on the device: it needs TensorRT's trtexec there, not ssdkd nor Python."""

import hashlib
import re
import shlex
from pathlib import Path

import onnx

from engine.errors import SSDKDError
from exporters.files import write_atomically

# What the engine inspector calls the types of a precision: "Half", "Row major linear FP16 format (kLINEAR)".
REDUCED = "fp16|half|bf16|bfloat|int8|fp8|int4|fp4"
SAID = {"fp16": "fp16|half", "int8": "int8"}

SCRIPT = r"""#!/bin/sh
# Builds @PLAN@ (@PRECISION@) from @ONNX@, on the device where it will run.
# Needs trtexec, which JetPack brings with TensorRT 10 (10.3 in JetPack 6.2); neither ssdkd nor Python.
#
#     sh @SCRIPT@
#
# Exit codes: 0 the plan is there; 1 the ONNX file is missing or another one; 2 a tool is missing;
# 3 the plan is not of the precision that was asked for (kept as @PLAN@.rejected); 4 trtexec failed.
set -eu

onnx=@ONNX_QUOTED@
sha256=@SHA256@
plan=@PLAN_QUOTED@

fail() {
    code=$1
    shift
    printf 'error: %s\n' "$*" >&2
    exit "$code"
}

CDPATH="" cd -- "$(dirname -- "$0")"
[ -f "$onnx" ] || fail 1 "$onnx is not beside this script: copy both from the run's folder"
command -v sha256sum >/dev/null 2>&1 || fail 2 "sha256sum is missing: install coreutils"
found=$(sha256sum <"$onnx")
found=${found%% *}
[ "$found" = "$sha256" ] || fail 1 "$onnx is not the file that this script was written for: sha256 $found, not $sha256"

trtexec=$(command -v trtexec) || trtexec=/usr/src/tensorrt/bin/trtexec
[ -x "$trtexec" ] || fail 2 "trtexec is neither on PATH nor in /usr/src/tensorrt/bin: sudo apt install libnvinfer-bin"

echo "building $plan with $trtexec, for some minutes; it writes $plan.log"
rm -f "$plan.part" "$plan.layers.json" "$plan.rejected"
if ! "$trtexec" \
@ARGUMENTS@
    >"$plan.log" 2>&1; then
    tail -n 20 "$plan.log" >&2
    rm -f "$plan.part"
    fail 4 "trtexec failed; all that it said is in $plan.log"
fi
[ -s "$plan.part" ] || fail 4 "trtexec wrote no plan; all that it said is in $plan.log"

# The types of the tensors in the engine, by its own inspector.
types=$(grep -o -E '"(Format/Datatype|DataType)": *"[^"]*"' "$plan.layers.json" 2>/dev/null) || types=
if [ -z "$types" ]; then
    echo "warning: this trtexec does not tell the types of the engine; its precision was not checked" >&2
elif @REFUSED@; then
    mv "$plan.part" "$plan.rejected"
    fail 3 "@PRECISION@ was asked for and the engine is of another precision: see $plan.layers.json"
fi
mv "$plan.part" "$plan"
echo "$plan: $(wc -c <"$plan") bytes, sha256 $(sha256sum <"$plan" | cut -d ' ' -f 1)"
echo "how fast it is: $trtexec --loadEngine=$plan@USUAL@ --useCudaGraph"
"""


def write_build_script(
    folder: Path,
    onnx_path: Path,
    *,
    precision: str,
    batches: tuple[int, int, int],
    workspace_mb: int | None,
    plan_name: str,
) -> Path:
    """Write `build_<plan_name>.sh` into the folder that holds the ONNX file, for a device with TensorRT 10 or 11.

    The network is built strongly typed, as `build_plan` does: the precision is the ONNX file's, and the script rejects
    an engine that does not show it. Raises SSDKDError for a file without one input [batch, C, H, W].
    """
    try:
        content = onnx_path.read_bytes()
        inputs = onnx.load_model_from_string(content).graph.input
    except OSError as error:
        raise SSDKDError(f"{onnx_path} cannot be read: {error.strerror}", "give the path of an ONNX file") from error
    except Exception as error:
        if type(error).__name__ != "DecodeError":  # of protobuf, whose Python package is onnx's affair
            raise
        raise SSDKDError(f"{onnx_path} is no ONNX file: {error}", "export it again") from error
    path = folder / f"build_{plan_name}.sh"
    shapes = _shapes(onnx_path, inputs, batches)
    arguments = [
        "--onnx=$onnx",
        "--stronglyTyped",
        *(["--noTF32"] if precision == "fp32" else []),
        *(f"--{word}Shapes={shape}" for word, shape in zip(("min", "opt", "max"), shapes, strict=False)),
        *([f"--memPoolSize=workspace:{workspace_mb}M"] if workspace_mb is not None else []),
        "--timingCacheFile=timing.cache",
        "--profilingVerbosity=detailed",
        "--exportLayerInfo=$plan.layers.json",
        "--skipInference",
        "--saveEngine=$plan.part",
    ]
    words = {
        "ONNX": onnx_path.name,
        "PLAN": plan_name,
        "SCRIPT": path.name,
        "PRECISION": precision,
        "ONNX_QUOTED": shlex.quote(onnx_path.name),
        "PLAN_QUOTED": shlex.quote(plan_name),
        "SHA256": hashlib.sha256(content).hexdigest(),
        "ARGUMENTS": "\n".join(f"    {_argument(argument)} \\" for argument in arguments),
        "REFUSED": _refused(precision),
        "USUAL": f" --shapes={shapes[1]}" if shapes else "",
    }
    write_atomically(path, re.sub("@([A-Z0-9_]+)@", lambda match: words[match[1]], SCRIPT).encode())
    path.chmod(path.stat().st_mode | 0o111)
    return path


def _shapes(path: Path, inputs: "list[onnx.ValueInfoProto]", batches: tuple[int, int, int]) -> list[str]:
    """Return the shapes of the smallest, usual and largest batch as trtexec takes them; none for a fixed batch."""
    sizes = [dimension.dim_value for dimension in inputs[0].type.tensor_type.shape.dim] if len(inputs) == 1 else []
    if len(sizes) != 4 or 0 in sizes[1:]:
        raise SSDKDError(
            f"{path}: expected one input [batch, channels, height, width] with its image size stated",
            "plans are made of image classifiers, as `ssdkd export RUN --export onnx` writes them",
        )
    if sizes[0]:
        return []
    return [f"{inputs[0].name}:{'x'.join(map(str, (batch, *sizes[1:])))}" for batch in batches]


def _argument(argument: str) -> str:
    """Quote an argument for the shell; those with a variable in it are ours and need no more than double quotes."""
    return f'"{argument}"' if "$" in argument else shlex.quote(argument)


def _refused(precision: str) -> str:
    """Return the shell condition that is true for the types of an engine of another precision."""
    said = f"printf '%s' \"$types\" | grep -q -i -E '{SAID.get(precision, REDUCED)}'"
    return f"! {said}" if precision in SAID else said
