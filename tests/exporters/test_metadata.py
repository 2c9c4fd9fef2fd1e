import json

import pytest

from engine.errors import SSDKDError
from exporters.metadata import Description, describe, metadata_for, preprocessing_of

MEAN, STD = (0.4914, 0.1, 1 / 3), (0.2470, 0.2, 2 / 3)


def written(
    *, embed_preprocessing: bool, class_names: tuple[str, ...] | None = ("cat", "chien é", "犬")
) -> dict[str, str]:
    return metadata_for(
        input_shape=(3, 32, 48),
        classes=3,
        class_names=class_names,
        mean=MEAN,
        std=STD,
        embed_preprocessing=embed_preprocessing,
        teacher_sha256="ab" * 32,
    )


def test_other_tools_can_read_what_is_written() -> None:
    metadata = written(embed_preprocessing=False)
    assert all(key.startswith("ssdkd.") for key in metadata)
    assert json.loads(metadata["ssdkd.input_shape"]) == [3, 32, 48]
    assert json.loads(metadata["ssdkd.class_names"]) == ["cat", "chien é", "犬"]
    assert json.loads(metadata["ssdkd.mean"]) == list(MEAN)
    assert (metadata["ssdkd.classes"], metadata["ssdkd.input_range"]) == ("3", "normalised")
    assert metadata["ssdkd.teacher_sha256"] == "ab" * 32
    assert metadata["ssdkd.ssdkd_version"]
    assert "ssdkd.class_names" not in written(embed_preprocessing=False, class_names=None)


def test_what_is_written_is_read_back_exactly() -> None:
    description = describe(written(embed_preprocessing=False))
    assert (description.mean, description.std, description.input_range) == (MEAN, STD, "normalised")
    assert description.class_names == ("cat", "chien é", "犬")
    assert preprocessing_of(description, channels=3) == (MEAN, STD)


def test_a_file_that_normalises_by_itself_wants_images_as_they_are() -> None:
    metadata = written(embed_preprocessing=True)
    assert json.loads(metadata["ssdkd.mean"]) == list(MEAN)
    assert preprocessing_of(describe(metadata), channels=3) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    del metadata["ssdkd.mean"], metadata["ssdkd.std"]
    assert preprocessing_of(describe(metadata), channels=1) == ((0.0,), (1.0,))


@pytest.mark.parametrize(
    ("stated", "flags"),
    [({"mean": MEAN}, "--mean"), ({"std": STD}, "--std"), ({"mean": MEAN, "std": STD}, "--mean and --std")],
)
def test_a_file_that_normalises_by_itself_is_not_normalised_twice(
    stated: dict[str, tuple[float, ...]], flags: str
) -> None:
    with pytest.raises(SSDKDError, match=f"^{flags} would normalise twice") as caught:
        preprocessing_of(describe(written(embed_preprocessing=True)), channels=3, **stated)
    assert caught.value.hint == f"leave {flags} out"


def test_a_file_that_is_not_ours_needs_the_flags() -> None:
    foreign = describe({"framework": "another"})
    assert foreign == Description(None, None, None, None)
    with pytest.raises(SSDKDError, match="does not say how its images are normalised") as caught:
        preprocessing_of(foreign, channels=3, mean=MEAN)
    assert caught.value.hint.endswith("--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225")
    with pytest.raises(SSDKDError) as caught:
        preprocessing_of(foreign, channels=1)
    assert caught.value.hint.endswith("for example --mean 0.5 --std 0.5")
    assert preprocessing_of(foreign, channels=3, mean=MEAN, std=STD) == (MEAN, STD)


@pytest.mark.parametrize(
    ("values", "channels", "shown"),
    [((0.4, 0.5), 3, "0.4,0.4,0.4"), ((0.25, 0.5, 0.5), 1, "0.25"), ((), 1, "0.5")],
)
def test_one_value_a_channel(values: tuple[float, ...], channels: int, shown: str) -> None:
    right = (0.5,) * channels
    counted = f"{channels} channel{'s' if channels > 1 else ''}$"
    with pytest.raises(
        SSDKDError, match=f"^--mean has {len(values)} values, but the network takes {counted}"
    ) as caught:
        preprocessing_of(describe({}), channels=channels, mean=values, std=right)
    assert caught.value.hint == f"give one value for all, or one a channel: --mean {shown}"
    with pytest.raises(SSDKDError, match=f"^--std has {len(values)} values"):
        preprocessing_of(describe({}), channels=channels, mean=right, std=values)


def test_a_file_with_another_number_of_values_is_to_blame_itself() -> None:
    said = Description(None, (0.5, 0.5), STD, None)
    with pytest.raises(SSDKDError, match=r"^the model file says 2 values of mean, but takes 3 channels") as caught:
        preprocessing_of(said, channels=3)
    assert caught.value.hint == "state it: --mean 0.5,0.5,0.5"


def test_one_value_for_all_channels() -> None:
    assert preprocessing_of(describe({}), channels=3, mean=(0.5,), std=STD) == ((0.5, 0.5, 0.5), STD)


def test_what_the_user_states_wins() -> None:
    description = describe(written(embed_preprocessing=False))
    assert preprocessing_of(description, channels=3, mean=(0.0, 0.0, 0.0)) == ((0.0, 0.0, 0.0), STD)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("mean", value) for value in ("", "[", "[1, null]", "3", '"half"', "{}}", '"123"', '{"1": 2}', "[NaN]")),
        *(("std", value) for value in ("[0]", "[-1]", "[Infinity]")),
        *(("class_names", value) for value in ("5", "null", '"abc"', '{"cat": 0}', "[" * 100_000)),
    ],
)
def test_damaged_metadata(key: str, value: str) -> None:
    with pytest.raises(SSDKDError, match="ssdkd metadata cannot be read"):
        describe({"ssdkd.input_range": "normalised", f"ssdkd.{key}": value})
