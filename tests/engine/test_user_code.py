import builtins
import copy
import io
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch import nn

import engine
import engine.zoo
from engine.errors import SSDKDError
from engine.user_code import call_user_function, user_modules

REPOSITORY = {
    "engine/__init__.py": "OWNER = 'customer'",
    "engine/blocks.py": """
        from torch import nn
        from . import OWNER
        from profiles.edge import WIDTH

        class Block(nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.conv = nn.Conv2d(channels, WIDTH, 3, padding=1)
                self.bn = nn.BatchNorm2d(WIDTH)

            def forward(self, x):
                import engine.late
                from .later import OFFSET
                return engine.late.shift(self.bn(self.conv(x)), OFFSET)
        """,
    "engine/late.py": """
        def shift(x, offset):
            from profiles import edge
            import customer_helper
            return customer_helper.double(x) + offset + edge.BIAS
        """,
    "engine/later.py": "OFFSET = 0.25",
    "profiles/edge.py": "WIDTH, BIAS = 6, 0.5",  # a folder without __init__.py, as many are
    "customer_helper.py": "def double(x): return 2 * x",
    "customer_models/nets.py": """
        from torch import nn
        from engine import OWNER
        from engine.blocks import Block

        class Net(nn.Module):
            def __init__(self, classes, channels):
                super().__init__()
                self.block = Block(channels)
                self.fc = nn.Linear(6, classes)

            def forward(self, x):
                return self.fc(self.block(x).mean((2, 3)))

        def build(num_classes, in_channels=3):
            assert OWNER == 'customer'
            return Net(num_classes, in_channels)

        def fixed(): return Net(4, 3)
        def greedy(**kwargs): return Net(4, 3) if not kwargs else 'had arguments'
        def demanding(depth, classes): return Net(classes, 3)
        def broken(classes): raise ZeroDivisionError('no width')
        def wrong(classes): return [classes]
        WIDTH = 3
        """,
    "customer_models/needs_more.py": "import a_package_that_nobody_has",
    "customer_models/typo.py": "def build(:",
    "customer_models/script.py": "import sys; sys.exit(2)",
}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, source in REPOSITORY.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(source))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "__import__", builtins.__import__)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("customer_")]:
        del sys.modules[name]


def expected_logits(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    features = 2 * network.block.bn(network.block.conv(images)) + 0.25 + 0.5  # type: ignore[union-attr, operator]
    return network.fc(features.mean((2, 3)))  # type: ignore[no-any-return, operator]


def test_the_users_packages_are_found_where_ours_have_the_same_names(repository: Path) -> None:
    network = call_user_function("customer_models.nets:build", classes=4, channels=1)
    assert type(network.block).__module__ == "engine.blocks"
    assert network.fc.weight.shape == (4, 6)  # type: ignore[union-attr]
    assert network.block.conv.weight.shape == (6, 1, 3, 3)  # type: ignore[union-attr]


def test_ours_are_untouched_afterwards(repository: Path) -> None:
    def ours_loaded() -> dict[str, object]:
        return {name: sys.modules[name] for name in sys.modules if name.partition(".")[0] in ("engine", "profiles")}

    modules, path = ours_loaded(), sys.path[:]
    network = call_user_function("customer_models.nets:build", classes=4).eval()
    network(torch.randn(2, 3, 8, 8))
    assert ours_loaded() == modules  # theirs are not among them, whatever of ours was loaded before
    assert sys.path == path
    import engine.zoo as ours

    assert "ZOO" in vars(ours)
    assert not hasattr(engine, "OWNER")


def test_late_imports_find_theirs_wherever_the_forward_runs(repository: Path, tmp_path_factory: pytest.TempPathFactory,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    network = call_user_function("customer_models.nets:build", classes=4).eval()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    images = torch.randn(2, 3, 8, 8)
    outputs: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: outputs.append(network.block(images)))
    thread.start()
    thread.join()
    assert outputs[0].shape == (2, 6, 8, 8)
    torch.testing.assert_close(network(images), expected_logits(network, images))


def test_copies_and_exports_work(repository: Path) -> None:
    network = call_user_function("customer_models.nets:build", classes=4).eval()
    images = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(copy.deepcopy(network)(images), expected_logits(network, images))
    program = torch.export.export(network, (images[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(program.module()(images), expected_logits(network, images))


def test_pickled_modules_of_theirs_load_inside_user_modules(repository: Path) -> None:
    network = call_user_function("customer_models.nets:build", classes=4).eval()
    buffer = io.BytesIO()
    with user_modules():
        torch.save(network, buffer)
    buffer.seek(0)
    with user_modules():
        loaded = torch.load(buffer, weights_only=False)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(loaded(images), network(images))
    assert sys.modules["engine"] is engine


def test_packages_that_the_user_does_not_have_stay_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builtins, "__import__", builtins.__import__)
    with user_modules():
        assert sys.modules["engine"] is engine
    assert isinstance(call_user_function("engine.zoo:MobileNetV2", classes=3, channels=1), engine.zoo.MobileNetV2)


def test_ours_come_back_when_their_code_fails(repository: Path) -> None:
    path = sys.path[:]
    with pytest.raises(ZeroDivisionError), user_modules():
        raise ZeroDivisionError
    assert sys.modules["engine"] is engine
    assert sys.path == path


@pytest.mark.parametrize("function", ["fixed", "greedy"])
def test_a_function_is_given_only_what_its_signature_names(repository: Path, function: str) -> None:
    network = call_user_function(f"customer_models.nets:{function}", classes=9, channels=1)
    assert network.fc.weight.shape == (4, 6)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("reference", "message", "hint"),
    [
        ("customer_models.nets:", "expected package.module:function", "models.resnet:build_teacher"),
        ("customer models.nets:build", "expected package.module:function", ""),
        ("customer_models.nests:build", "no module 'customer_models.nests'", "run ssdkd in the folder"),
        ("nowhere.nets:build", "no module 'nowhere'", "run ssdkd in the folder"),
        ("customer_models.nets:biuld", "has no function 'biuld'", "did you mean build"),
        ("customer_models.nets:WIDTH", "has no function 'WIDTH'", ""),
        ("customer_models.nets:demanding", "needs the argument(s) depth", "needs no others"),
        ("customer_models.nets:broken", "ZeroDivisionError: no width", "in Python"),
        ("customer_models.nets:wrong", "returned a list", "return the network"),
        ("customer_models.needs_more:build", "a_package_that_nobody_has", "install a_package_that_nobody_has"),
        ("customer_models.typo:build", "SyntaxError", "python -c"),
        ("customer_models.script:build", "SystemExit", "python -c"),
    ],
)
def test_errors_say_what_is_wrong_and_what_to_type(repository: Path, reference: str, message: str, hint: str) -> None:
    with pytest.raises(SSDKDError) as caught:
        call_user_function(reference, classes=4, channels=3)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert sys.modules["engine"] is engine


def test_an_error_in_their_code_names_their_file_and_line(repository: Path) -> None:
    with pytest.raises(SSDKDError) as caught:
        call_user_function("customer_models.nets:broken", classes=4)
    line = (
        dedent(REPOSITORY["customer_models/nets.py"])
        .split("\n")
        .index("def broken(classes): raise ZeroDivisionError('no width')")
    )
    assert f"nets.py:{line + 1}" in caught.value.message
