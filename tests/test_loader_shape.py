"""shape.py: buckets are pixels and frames; what a model makes of them is its layout's to say."""

import pytest

from loader.shape import WAN21, WAN22, Bucket, LatentLayout


def test_a_bucket_reads_back_what_it_prints() -> None:
    assert Bucket.parse("1280x704x49") == Bucket(1280, 704, 49)
    assert str(Bucket.parse("160x96x1")) == "160x96x1"


@pytest.mark.parametrize(
    "text", ["", "1280x704", "1280X704x49", "0x704x49", "-32x32x1", "1280x704x49 ", "1280.0x704x49"]
)
def test_another_spelling_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="expected WIDTHxHEIGHTxFRAMES, for example 1280x704x49"):
        Bucket.parse(text)


@pytest.mark.parametrize(
    ("layout", "shape", "latent_shape", "num_tokens"),
    [
        (WAN22, "1280x704x49", (48, 13, 44, 80), 11440),
        (WAN22, "832x480x9", (48, 3, 30, 52), 1170),
        (WAN22, "32x32x1", (48, 1, 2, 2), 1),
        (WAN21, "832x480x49", (16, 13, 60, 104), 20280),
        (WAN21, "832x480x17", (16, 5, 60, 104), 7800),
        (WAN21, "1280x720x49", (16, 13, 90, 160), 46800),
        (WAN21, "832x480x1", (16, 1, 60, 104), 1560),
    ],
)
def test_latents_and_tokens_are_those_of_the_models(
    layout: LatentLayout, shape: str, latent_shape: tuple[int, ...], num_tokens: int
) -> None:
    bucket = layout.parse(shape)
    assert layout.latent_shape(bucket) == latent_shape
    assert layout.num_tokens(bucket) == num_tokens


@pytest.mark.parametrize(
    ("layout", "shape", "nearest"),
    [
        (WAN22, "1280x720x49", "1280x704x49"),
        (WAN22, "1280x704x48", "1280x704x45"),
        (WAN22, "16x704x3", "32x704x1"),
        (WAN21, "1288x720x49", "1280x720x49"),
        (WAN21, "832x480x50", "832x480x49"),
    ],
)
def test_a_shape_that_does_not_divide_is_refused_with_the_nearest_that_does(
    layout: LatentLayout, shape: str, nearest: str
) -> None:
    with pytest.raises(ValueError, match=f"^shape {shape}: .*the next smaller shape is {nearest}$"):
        layout.parse(shape)
    layout.parse(nearest)


def test_720_is_refused_for_the_5b_with_advice_and_taken_for_a14b() -> None:
    with pytest.raises(ValueError, match=r"Wan2\.2-TI2V-5B .* multiples of 32 \(A14B: of 16\)"):
        WAN22.parse("1280x720x49")
    assert WAN21.parse("1280x720x49") == Bucket(1280, 720, 49)
