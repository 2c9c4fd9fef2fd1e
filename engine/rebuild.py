"""From weights to a module: the architecture is built and the weights are put in, by name or in order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from engine.catalogue import TORCHVISION, WITH_AUXILIARY_HEADS, Architecture, TensorShape, architecture_of, skeleton
from engine.errors import SSDKDError
from engine.graphs import TOLERANCE, relative_error
from engine.identify import (
    NAMES_MATCH,
    ORDER_MATCHES,
    Match,
    blocks_cross,
    differences,
    fitting,
    guess_heads,
    identify,
    layers_of,
    map_in_order,
    shapes_of,
)
from engine.layers import with_versions
from engine.probing import FORWARD_ERRORS, input_channels, noise
from engine.students import SMALL_PIXELS, STUDENTS, build_network, check_network_name, published_networks
from engine.unwrap import State
from engine.user_code import call_user_function

STATED = "stated with --arch"
LARGE_PIXELS = 224


@dataclass(frozen=True)
class Rebuilt:
    """A module with the file's weights in it, and how it was found."""

    module: nn.Module
    arch: str
    evidence: str
    pixels: int | None  # the image side that the architecture is usually trained at
    warnings: tuple[str, ...]
    input_shape: tuple[int, int, int] | None = None  # C, H, W, where the file says it


def rebuild(
    state: State,
    *,
    keeps_order: bool,
    named_in_file: str | None,
    pixels: int | None,
    is_our_student: bool = False,
    path: Path,
) -> Rebuilt:
    """Finds the architecture of `state` and builds it with these weights.

    `named_in_file`: what the file says it is, if it does; `is_our_student`: ssdkd wrote it. `pixels`: the image side,
    where it is known. `path`: the file's, whose name may be a network's.

    Raises:
        SSDKDError: several architectures fit, or none.
    """
    hint = _hint(named_in_file, pixels, is_our_student) if named_in_file else None
    match = identify(state, keeps_order=keeps_order, hint=hint, path=path)
    return _with_weights(state, match, named_in_file)


def rebuild_like(
    state: State, agrees: Callable[[nn.Module, int | None], bool], *, named_in_file: str | None
) -> Rebuilt | None:
    """The first architecture that fits `state` and computes the right logits; None if there is none.

    `agrees`, of a module and its usual image side, compares it with the graph that the state was taken from.
    """
    hint = _hint(named_in_file, None, False) if named_in_file else None
    for match in fitting(state, keeps_order=True, hint=hint):
        rebuilt = _with_weights(state, match, named_in_file)
        if agrees(rebuilt.module, rebuilt.pixels):
            return replace(rebuilt, evidence=f"{rebuilt.evidence}; same logits as the graph", warnings=())
    return None


def rebuild_stated(state: State, arch: str, *, keeps_order: bool, pixels: int | None) -> Rebuilt:
    """Builds the architecture that the user states and loads `state` into it, by names or else in order.

    Raises:
        SSDKDError: no such architecture, one that depends on the image size while that is not known, or one that the
            weights do not fit.
    """
    found, failed = _that_fit(state, _published(arch), keeps_order)
    is_large = pixels is not None and pixels > SMALL_PIXELS
    if not found or is_large:
        ours, other = _that_fit(state, _students(arch, pixels), keeps_order)
        failed = failed or other
        if ours and found and not _compute_the_same([*ours, *found], pixels):
            doubt = f"--arch {arch} is taken for ssdkd's own network for large images; the published one is zoo/{arch}."
            found = [replace(rebuilt, warnings=(*rebuilt.warnings, doubt)) for rebuilt in ours]
        found = found or ours
    if len(found) > 1 and not _compute_the_same(found, pixels):
        fitting_names = list(dict.fromkeys(rebuilt.arch for rebuilt in found))
        if len(fitting_names) == 1:
            raise SSDKDError(
                f"--arch {arch} is one network for small images and another for large ones, and these weights fit both",
                "say the size of the images, for example --input 3x32x32 or --input 3x224x224",
            )
        raise SSDKDError(
            f"--arch {arch} means several networks, and these weights fit {' and '.join(fitting_names)}, which differ",
            f"give the full name, for example --arch {fitting_names[0]}",
        )
    if found:
        return found[0]
    order = "" if keeps_order else " (this format does not keep the layers' order, so only equal names can be matched)"
    raise SSDKDError(
        f"the weights do not fit --arch {arch}{order}: {failed or 'the file has no layer with a matrix of weights'}",
        "name another architecture with --arch, or your own code: --arch package.module:function",
    )


def meanings(arch: str, pixels: int) -> list[Architecture]:
    """Every network that a TeacherSpec may call `arch`, the likeliest for this image side first.

    Raises:
        SSDKDError: no such network.
    """
    published, ours = _published(arch), _students(arch, pixels)
    return [*ours, *published] if pixels > SMALL_PIXELS else [*published, *ours]


def _with_weights(state: State, match: Match, named_in_file: str | None) -> Rebuilt:
    with torch.random.fork_rng(devices=[]):
        module = match.architecture.build(match.classes, match.channels)
    _load(module, state, match.names)
    name = match.architecture.name
    evidence = f"named in the file; {match.evidence}" if named_in_file == name else match.evidence
    warnings = []
    if match.evidence == ORDER_MATCHES:
        warnings.append(
            f"The file's layers have other names than {name}'s. Their kinds, shapes and order agree, but strides and "
            "padding do not show in a file: check the architecture, and say it with --arch if it is another."
        )
    if name in WITH_AUXILIARY_HEADS:
        warnings.append(
            f"{name} from torchvision's pretrained weights rescales its input (transform_input=True); here it does not."
        )
    return Rebuilt(module, name, evidence, match.architecture.pixels, tuple(warnings))


def _that_fit(state: State, meanings: Sequence[Architecture], keeps_order: bool) -> tuple[list[Rebuilt], str]:
    """Those that `state` fits by name, or else in order, with the weights in them; and why the first does not fit."""
    shapes = shapes_of(state)
    fits: dict[str, list[Rebuilt]] = {NAMES_MATCH: [], ORDER_MATCHES: []}
    failed = ""
    for meaning in meanings:
        for classes, channels in guess_heads(shapes):
            with torch.random.fork_rng(devices=[]):
                module = meaning.build(classes, channels)
            theirs = skeleton(module)
            by_name = theirs == shapes
            names = {name: name for name in shapes} if by_name else None
            if keeps_order and not by_name:
                names = map_in_order(shapes, theirs, check_blocks=False)
            if names is None:
                failed = failed or differences(shapes, theirs) or "the layers come in another order"
                continue
            _load(module, state, names)
            evidence = NAMES_MATCH if by_name else ORDER_MATCHES
            warnings = () if by_name else _order_warnings(meaning.name, shapes, theirs)
            fits[evidence].append(Rebuilt(module, meaning.name, f"{STATED}; {evidence}", meaning.pixels, warnings))
            break
    return fits[NAMES_MATCH] or fits[ORDER_MATCHES], failed


def _compute_the_same(found: Sequence[Rebuilt], pixels: int | None) -> bool:
    """Whether networks with the same weights give the same logits on noise."""
    side = pixels or found[0].pixels or LARGE_PIXELS
    images = noise((input_channels(found[0].module) or 3, side, side), images=1)
    try:
        with torch.no_grad():
            first, *others = [rebuilt.module.eval()(images) for rebuilt in found]
    except FORWARD_ERRORS:
        return False
    return all(relative_error(other, first) < TOLERANCE for other in others)


def _hint(name: str, pixels: int | None, is_our_student: bool) -> Architecture | None:
    """The architecture that a file names, if that is a name and not a word of the training program's own."""
    if is_our_student and name in STUDENTS and pixels is not None:
        return _student(name, pixels)
    known = architecture_of(name)
    if known is None and (published := published_networks(name)):
        return Architecture(name, next(iter(published.values())), (), 0, None)
    return known


def _published(arch: str) -> list[Architecture]:
    """The published networks (or the user's own) that `--arch` may mean."""
    if ":" in arch:
        return [Architecture(arch, partial(_build_users, arch), (), 0, None)]
    published = published_networks(arch)
    if not published:
        check_network_name(arch)
    found = []
    for name, build in published.items():
        known = architecture_of(name.removeprefix("zoo/")) or architecture_of(name.removeprefix(TORCHVISION))
        # Two libraries' networks of one name are called in full.
        shown = arch if len(published) == 1 else name
        found.append(Architecture(shown, build, (), 0, known.pixels if known else None))
    return found


def _students(arch: str, pixels: int | None) -> list[Architecture]:
    """Our student of that name for the image size; both of its forms, under one name, where that is not known."""
    if arch not in STUDENTS:
        return []
    return [_student(arch, side) for side in ([pixels] if pixels else [SMALL_PIXELS, LARGE_PIXELS])]


def _student(name: str, pixels: int) -> Architecture:
    return Architecture(name, partial(_build, name, pixels), (), 0, pixels)


def _build_users(reference: str, classes: int, channels: int) -> nn.Module:
    return call_user_function(reference, classes=classes, channels=channels)


def _build(name: str, pixels: int, classes: int, channels: int) -> nn.Module:
    return build_network(name, classes=classes, channels=channels, pixels=pixels)


def _order_warnings(arch: str, ours: Mapping[str, TensorShape], theirs: Mapping[str, TensorShape]) -> tuple[str, ...]:
    crossing = blocks_cross([layer.path for layer in layers_of(ours)], [layer.path for layer in layers_of(theirs)])
    doubt = (
        " The blocks in its names begin at other layers than this network's: it may be wired differently."
        if crossing
        else ""
    )
    return (f"The file's layers have other names than {arch}'s and were put in by their order.{doubt}",)


def _load(module: nn.Module, state: State, names: Mapping[str, str]) -> None:
    """Puts the tensors in place; counters of batches that the file lacks keep their zeros."""
    weights = {theirs: state[ours] for ours, theirs in names.items()}
    missing, unexpected = module.load_state_dict(with_versions(module, weights), strict=False)
    if type(module).__name__ in ("GoogLeNet", "Inception3"):
        _drop_auxiliary_heads(module)
    leftover = [name for name in missing if not name.endswith("num_batches_tracked")] + unexpected
    if leftover:
        raise AssertionError(f"identified, but not loaded: {leftover}")


def _drop_auxiliary_heads(module: nn.Module) -> None:
    """Heads that only training uses: they would stand idle among the layers."""
    for name in ("AuxLogits", "aux1", "aux2"):
        if hasattr(module, name):
            setattr(module, name, None)
    module.aux_logits = False  # type: ignore[assignment]
