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
    assert "ssdkd.class_names" not in written(embed_preprocessing=False, class_names=None)


def test_what_is_written_is_read_back_exactly() -> None:
    description = describe(written(embed_preprocessing=False))
    assert (description.mean, description.std, description.input_range) == (MEAN, STD, "normalised")
    assert description.class_names == ("cat", "chien é", "犬")
    assert description.teacher_sha256 == "ab" * 32
    assert description.ssdkd_version
    assert preprocessing_of(description) == (MEAN, STD)


def test_a_file_that_normalises_by_itself_wants_images_as_they_are() -> None:
    metadata = written(embed_preprocessing=True)
    assert json.loads(metadata["ssdkd.mean"]) == list(MEAN)
    assert preprocessing_of(describe(metadata)) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_a_file_that_is_not_ours_needs_the_flags() -> None:
    foreign = describe({"framework": "another"})
    assert foreign == Description(None, None, None, None, None, None)
    with pytest.raises(SSDKDError, match="does not say how its images are normalised") as caught:
        preprocessing_of(foreign, mean=MEAN)
    assert "--mean" in caught.value.hint
    assert "--std" in caught.value.hint
    assert preprocessing_of(foreign, mean=MEAN, std=STD) == (MEAN, STD)


def test_what_the_user_states_wins() -> None:
    description = describe(written(embed_preprocessing=False))
    assert preprocessing_of(description, mean=(0.0, 0.0, 0.0)) == ((0.0, 0.0, 0.0), STD)


@pytest.mark.parametrize("value", ["", "[", "[1, null]", "3", '"half"', "{}}"])
def test_damaged_metadata(value: str) -> None:
    with pytest.raises(SSDKDError, match="ssdkd metadata cannot be read"):
        describe({"ssdkd.input_range": "normalised", "ssdkd.mean": value})
