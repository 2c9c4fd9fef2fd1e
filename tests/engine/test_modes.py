from torch import nn

from engine.modes import evaluating


def test_each_part_is_in_the_mode_again_that_it_had() -> None:
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    network.train()
    network[1][1].eval()  # a layer that its owner froze
    with evaluating(network):
        assert not any(part.training for part in network.modules())
    assert [part.training for part in network.modules()] == [True, True, True, True, False]


def test_nothing_is_asked_of_no_network() -> None:
    with evaluating(None):
        pass
