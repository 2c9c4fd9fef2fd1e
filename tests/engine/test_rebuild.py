import torch
from torchvision import models

from engine.rebuild import rebuild_stated
from engine.students import STUDENTS
from engine.zoo import ZOO


def test_above_small_images_a_students_name_is_the_students_form():
    """Ours has a stem of stride 4 there, behind the names and shapes of the published network, which has none."""
    state = ZOO["resnet8"](5, 3).state_dict()
    large = rebuild_stated(state, "resnet8", keeps_order=True, pixels=96)
    assert large.module.conv1.stride == (2, 2)
    assert [warning for warning in large.warnings if "zoo/resnet8" in warning]
    published = rebuild_stated(state, "zoo/resnet8", keeps_order=True, pixels=96)
    small = rebuild_stated(state, "resnet8", keeps_order=True, pixels=32)
    for found in (published, small):
        assert found.module.conv1.stride == (1, 1)
        assert found.warnings == ()
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    ours = STUDENTS["resnet8"].build(5, 3, 96)
    ours.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(large.module.eval()(images), ours.eval()(images))


def test_a_network_that_asks_for_its_version_is_loaded_from_a_file_that_forgot_it():
    network = models.mnasnet0_5(num_classes=5)
    found = rebuild_stated(dict(network.state_dict()), "mnasnet0_5", keeps_order=True, pixels=64)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(found.module.eval()(images), network.eval()(images))
