"""What a student takes over from its teacher before the first step: whole layers, where both networks have them.

A shallow network of the teacher's own family (ResNet-20 to ResNet-8, WRN-40-2 to WRN-16-2, ResNet-34 to ResNet-18) has
layers of the same names and shapes. They carry what the teacher learned from the images that nobody has any more;
Sanh et al. (2019, arXiv 1910.01108) begin DistilBERT that way, Xu et al. (2024, arXiv 2311.18823) compare ways to
choose the weights.
"""

import torch
from torch import Tensor, nn

from engine.probing import network_inside


def inherit(student: nn.Module, teacher: nn.Module) -> frozenset[str]:
    """Copy into `student` every layer of `teacher` with the same name, type and shapes, BatchNorm statistics included.

    What its author froze has weights of its own, and keeps them. A student that would take over
    all of the teacher stays as it is: there would be nothing to learn.

    Returns:
        the names of the student's parameters that were copied.
    """
    theirs = dict(network_inside(teacher).named_modules())
    shared = {
        name: (_own_tensors(layer), _own_tensors(theirs[name]))
        for name, layer in student.named_modules()
        if name in theirs and _learns(layer) and _is_same_layer(layer, theirs[name])
    }
    names = {_join(layer, tensor) for layer, (own, _) in shared.items() for tensor in own}
    parameters = dict(student.named_parameters())
    if names >= parameters.keys() and len(parameters) == len(list(teacher.parameters())):
        return frozenset()
    with torch.no_grad():
        for own, other in shared.values():
            for name, tensor in own.items():
                tensor.copy_(other[name])
    return frozenset(names & parameters.keys())


def _learns(layer: nn.Module) -> bool:
    return all(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def _is_same_layer(layer: nn.Module, other: nn.Module) -> bool:
    own, theirs = _own_tensors(layer), _own_tensors(other)
    return (
        type(layer) is type(other)
        and own.keys() == theirs.keys()
        and all(tensor.shape == theirs[name].shape for name, tensor in own.items())
    )


def _own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the layer itself, not of the layers in it."""
    return {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}


def _join(layer: str, tensor: str) -> str:
    return f"{layer}.{tensor}" if layer else tensor
