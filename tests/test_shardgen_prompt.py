"""The prompt is the shot's own sentences in order, each once, cleaned by the function that
diffusers uses.
"""

import random

import msgspec
import pytest

from bench.label_tree import label_bytes, make_label
from shardgen.labels.parse import parse_label
from shardgen.rules.config import PromptConfig
from shardgen.rules.prompt import prompt_clean, prompt_of

SCENES, OBJECTS = ["장면 하나.", "장면 하나."], ["상인이 있다."]


LABEL = msgspec.structs.replace(
    parse_label(label_bytes(make_label("2400101"))),
    semantic=["활기가 있다."],
    stt_script="말소리.",
    application=["쓸 수 있다."],
)


def join(
    media_type: str = "video",
    scenes: list[str] = SCENES,
    objects: list[str] = OBJECTS,
    **parts: bool,
) -> str:
    return prompt_of(LABEL, media_type, scenes, objects, parts=PromptConfig(**parts))


def test_scene_then_object_then_semantic_and_repeated_sentences_once() -> None:
    assert join() == "장면 하나. 상인이 있다. 활기가 있다."
    assert (
        join(objects=["상인이  있다.\n", "상인이 있다."]) == "장면 하나. 상인이 있다. 활기가 있다."
    )


def test_speech_and_application_come_only_when_asked_for() -> None:
    assert (
        join(stt=True, application=True)
        == "장면 하나. 상인이 있다. 활기가 있다. 말소리. 쓸 수 있다."
    )
    assert join(scene=False, object=False, semantic=False) == ""


def test_a_description_of_an_image_is_dropped_from_a_video_only() -> None:
    assert join(scenes=["시장 이미지입니다."]) == "상인이 있다. 활기가 있다."
    assert (
        join("image", scenes=["시장 이미지입니다."])
        == "시장 이미지입니다. 상인이 있다. 활기가 있다."
    )


# importing diffusers' pipelines warns of its own dependencies
@pytest.mark.filterwarnings("ignore")
def test_cleaning_is_that_of_the_diffusers_pipeline() -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean as theirs

    pieces = [
        '축제 "한마당"',
        "\n\t ",
        "&amp;amp;quot;",
        "&lt;b&gt;",
        "ﬁne",
        "schÃ¶n",
        "\u00a0",
        "…",
        "“ㄱ”",
        "\u200b",
        "<script>",
        "\x1b[31m",
        "😀",
        "㈜",
        "\ufeff",
        "\r\n",
        "&#x41;",
        "é",
        "ａｂｃ",
        "\x00",
        " ",
    ]
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices(pieces, k=draw.randint(0, 12)))
        assert prompt_clean(text) == theirs(text)
