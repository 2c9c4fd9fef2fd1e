"""Whether a file can be read at all: asked before PyTorch is imported, which takes seconds."""

from pathlib import Path

from engine.errors import SSDKDError

SUFFIXES = {".pt", ".pth", ".th", ".bin", ".safetensors", ".pt2", ".onnx"}
ACCEPTED = "a PyTorch checkpoint, .safetensors, a torch.export program (.pt2), TorchScript or ONNX"


def check_readable(path: Path) -> None:
    """Raises SSDKDError unless `path` is a file that can be read and holds something."""
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in SUFFIXES)
        hint = f"give one of its files, for example {path / inside[0]}" if inside else "give the checkpoint file itself"
        raise SSDKDError(f"{path} is a folder: expected {ACCEPTED}", hint)
    if not path.exists():
        raise SSDKDError(f"there is no file {path}", "check the folder and the spelling of the file's name")
    if not path.is_file():
        raise SSDKDError(f"{path} is a pipe or a device: expected {ACCEPTED}", "write it to a file, and give that")
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except OSError as error:
        raise SSDKDError(f"{path} cannot be read: {error.strerror}", "check the permissions of the file") from error
    if not first:
        raise SSDKDError(f"{path.name} is empty: expected {ACCEPTED}, found 0 bytes", "copy or download the file again")
