"""From weights to a module: the architecture is built and the weights are put in, by name or in order."""

from dataclasses import dataclass

from torch import nn

from engine.catalogue import TORCHVISION_PREFIX, Architecture, architectures, skeleton
from engine.errors import SSDKDError
from engine.identify import NAMES_MATCH, ORDER_MATCHES, blocks_cross, differences, guess_heads, identify, layers_of, map_in_order, shapes_of
from engine.unwrap import State

STATED = "stated with --arch"


@dataclass(frozen=True)
class Rebuilt:
    """A module with the file's weights in it, and how it was found."""

    module: nn.Module
    arch: str
    evidence: str
    pixels: int | None  # the image side that the architecture is usually trained at
    warnings: tuple[str, ...]


def rebuild(state: State, *, keeps_order: bool, arch: str | None, pixels: int | None, named_in_file: str | None = None) -> Rebuilt:
    """Builds the architecture that is stated (`arch`) or found, and loads `state` into it.

    `pixels`: the image side if it is known; small images get small stems where a name has both.
    Raises SSDKDError: unknown or ambiguous architecture, or weights that do not fit the stated one.
    """
    if arch:
        return _as_stated(state, arch, keeps_order, pixels)
    hint = _architecture(named_in_file) if named_in_file else None
    match = identify(state, keeps_order=keeps_order, hint=hint)
    module = match.architecture.build(match.classes, match.channels)
    _load(module, state, match.names)
    name = match.architecture.name
    warnings = []
    if match.evidence == ORDER_MATCHES:
        warnings.append(
            f"The file's layers have other names than {name}'s; their kinds, shapes and order agree, but strides and padding do not show in a"
            " file. If `ssdkd inspect` or the student's accuracy looks wrong, say which network it is with --arch."
        )
    return Rebuilt(module, name, match.evidence, match.architecture.pixels, tuple(warnings))


def _as_stated(state: State, arch: str, keeps_order: bool, pixels: int | None) -> Rebuilt:
    shapes = shapes_of(state)
    failed = ""
    for classes, channels in guess_heads(shapes):
        module = build_by_name(arch, classes, channels, pixels)
        theirs = skeleton(module)
        if theirs == shapes:
            names: dict[str, str] | None = {name: name for name in shapes}
            evidence, warnings = f"{STATED}; {NAMES_MATCH}", ()
        else:
            names = map_in_order(shapes, theirs, check_blocks=False) if keeps_order else None
            evidence, warnings = f"{STATED}; {ORDER_MATCHES}", _crossing_warning(arch, list(shapes), list(theirs))
        if names:
            _load(module, state, names)
            return Rebuilt(module, arch, evidence, _default_pixels(arch), warnings)
        failed = failed or differences(shapes, theirs)
    order = "" if keeps_order else " (this format does not keep the layers' order, so only equal names can be matched)"
    raise SSDKDError(
        f"The weights do not fit --arch {arch}{order}: {failed or 'the file has no layer with a weight matrix'}.",
        "Name another architecture with --arch, or give your own code: --arch package.module:function.",
    )


def build_by_name(name: str, classes: int, channels: int, pixels: int | None) -> nn.Module:
    """The network that `--arch` means; names that `identify` reports are understood too."""
    # engine.students knows the teacher's types, so it cannot be imported before they exist.
    from engine.students import build_network

    if name.startswith(TORCHVISION_PREFIX):
        architecture = _architecture(name)
        if architecture:
            return architecture.build(classes, channels)
    return build_network(name, classes=classes, channels=channels, pixels=pixels or _default_pixels(name) or 224)


def _architecture(name: str) -> Architecture | None:
    return next((architecture for architecture in architectures() if architecture.name == name), None)


def _default_pixels(name: str) -> int | None:
    architecture = _architecture(name)
    return architecture.pixels if architecture else None


def _crossing_warning(arch: str, ours: list[str], theirs: list[str]) -> tuple[str, ...]:
    paths = [[layer.path for layer in layers_of(dict.fromkeys(names, ()))] for names in (ours, theirs)]
    sure = "" if not blocks_cross(*paths) else " Its blocks begin at other layers, as in a network that is wired differently: check the source."
    return (f"The file's layers have other names than {arch}'s and were put in by their order.{sure}",)


def _load(module: nn.Module, state: State, names: dict[str, str]) -> None:
    """Puts the tensors in place; counters that the file lacks keep their zeros."""
    renamed = {theirs: state[ours].float() if state[ours].is_floating_point() else state[ours] for ours, theirs in names.items()}
    missing, unexpected = module.load_state_dict(renamed, strict=False)
    leftover = [name for name in missing if not name.endswith("num_batches_tracked")] + unexpected
    if leftover:
        raise AssertionError(f"identified, but not loaded: {leftover}")
