from torch import nn

from engine.modes import evaluating, frozen


def test_each_part_is_in_the_mode_again_that_it_had() -> None:
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    network.train()
    network[1][1].eval()  # a layer that its owner froze
    with evaluating(network):
        assert not any(part.training for part in network.modules())
    assert [part.training for part in network.modules()] == [True, True, True, True, False]


def test_nothing_is_asked_of_no_network() -> None:
    with evaluating(None), frozen(None):
        pass


def test_the_parameters_learn_again_that_did() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].bias.requires_grad_(False)
    with frozen(network):
        assert not any(parameter.requires_grad for parameter in network.parameters())
    assert [parameter.requires_grad for parameter in network.parameters()] == [True, True, True, False]
