"""What the codes of statuses, reasons, flags and checks mean, in English and in Korean, for those
who read a report.
"""

STATUSES = {
    "accepted": ("accepted", "채택"),
    "rejected": ("rejected by a rule", "규칙에 따라 제외"),
    "duplicate": ("duplicate", "중복"),
    "unavailable": ("media can't be had or used", "미디어를 쓸 수 없음"),
    "unreadable": ("label can't be read", "라벨을 읽을 수 없음"),
    "failed": ("lost in encoding", "인코딩 중 탈락"),
    "skipped": ("not selected", "선택되지 않음"),
    "gone": ("label file is gone", "라벨 파일이 사라짐"),
}
REASONS = {
    "label_empty": ("the label file is empty", "라벨 파일이 비어 있음"),
    "label_not_json": ("the label is not valid JSON", "올바른 JSON이 아님"),
    "label_not_object": ("the label is not a JSON object", "JSON 객체가 아님"),
    "label_not_utf8": ("the label is not UTF-8", "UTF-8이 아닌 라벨"),
    "label_wrong_type": ("a field has the wrong type", "필드의 자료형이 틀림"),
    "label_too_deep": ("the label is nested too deeply", "중첩이 너무 깊음"),
    "label_too_large": ("the label file is too large", "라벨 파일이 너무 큼"),
    "label_unsafe_id": ("the clip id can't be used", "쓸 수 없는 클립 번호"),
    "label_long_field": ("a name in the label is too long", "지나치게 긴 이름"),
    "label_unreadable": ("the label file can't be opened", "라벨 파일을 열 수 없음"),
    "label_bad_name": ("the file name is not UTF-8", "파일 이름이 UTF-8이 아님"),
    "label_gone": ("the label file is gone", "라벨 파일이 사라짐"),
    "clip_id_repeated": ("another label has the same clip id", "같은 클립 번호의 라벨이 또 있음"),
    "not_selected": ("outside the limit or the sample", "표본에 들지 않음"),
    "media_type_unwanted": ("this kind of media is not wanted", "대상이 아닌 미디어 종류"),
    "caption_missing": ("there is no caption", "설명문이 없음"),
    "caption_short": ("the caption is too short", "설명문이 너무 짧음"),
    "caption_long": ("the caption is too long", "설명문이 너무 긺"),
    "caption_repeated_word": ("a word is repeated", "같은 단어가 되풀이됨"),
    "caption_repeated_char": ("a character is repeated", "같은 글자가 되풀이됨"),
    "caption_special_chars": ("too many special characters", "특수 문자가 너무 많음"),
    "duration_unknown": ("the label has no length", "길이 정보가 없음"),
    "duration_short": ("too short", "너무 짧음"),
    "duration_long": ("too long", "너무 긺"),
    "resolution_unknown": ("the label has no resolution", "해상도 정보가 없음"),
    "timecode_invalid": ("a timecode is impossible", "있을 수 없는 타임코드"),
    "timecode_reversed": ("a shot ends before it begins", "끝이 시작보다 앞선 타임코드"),
    "timecode_before_start": (
        "a shot ends before there is a picture",
        "영상이 시작되기 전에 끝나는 타임코드",
    ),
    "timecode_past_end": ("a shot lies past the end", "영상 끝을 넘는 타임코드"),
    "shot_short": ("no shot is long enough for a window", "창 하나를 담을 만큼 긴 장면이 없음"),
    "media_missing": ("there are no media", "미디어가 없음"),
    "media_empty": ("the file has 0 bytes", "빈 파일"),
    "media_undecodable": ("the media don't decode", "디코딩할 수 없음"),
    "media_truncated": ("the media are cut off", "잘린 파일"),
    "media_no_video": ("the file has no picture", "영상이 들어 있지 않음"),
    "media_hdr": ("HDR is not supported", "HDR은 지원하지 않음"),
    "media_colour": ("colours that need converting", "변환이 필요한 색 공간"),
    "media_aspect": ("the pixel aspect ratio is ambiguous", "화소 비율이 서로 다름"),
    "media_animated": ("an animation, not a picture", "정지 이미지가 아닌 애니메이션"),
    "media_too_large": ("the picture is too large", "너무 큰 이미지"),
    "media_starts_late": ("a window begins before the picture", "영상 시작 전의 구간"),
    "media_timestamps": ("timestamps are missing or go back", "시간 정보가 없거나 거꾸로 감"),
    "media_rotation": ("turned by an odd angle or skewed", "지원하지 않는 회전 각도"),
    "media_type_differs": (
        "the file is of another kind than the label says",
        "라벨과 다른 종류의 파일",
    ),
    "media_unreadable": ("the file can't be read", "파일을 읽을 수 없음"),
    "media_changing": ("the file was rewritten meanwhile", "작업 중에 바뀐 파일"),
    "cache_full": ("the cache has no room; build again", "캐시가 가득 참: 다시 실행하면 이어짐"),
    "duplicate_media": ("the same bytes as another clip", "다른 클립과 똑같은 파일"),
    "picture_small": ("the picture is too small", "화면이 너무 작음"),
    "upscale_large": ("enlarged too much", "지나친 확대"),
    "url_refused": ("the URL may not be asked", "허용되지 않는 주소"),
    "black": ("a black window", "검은 화면"),
    "dark": ("a dark window", "어두운 화면"),
    "frozen": ("a still window", "멈춘 화면"),
    "prompt_truncated": ("a prompt above 512 tokens", "512토큰을 넘는 설명문"),
    "text_in_float32": (
        "half precision overflowed on the prompt: its text was encoded in float32",
        "반정밀도로 넘쳐 float32로 인코딩한 설명문",
    ),
    "window_lost": ("a window could not be encoded", "인코딩하지 못한 창"),
    "timecodes_missing": ("no timecodes: the whole clip", "타임코드 없음: 클립 전체"),
    "timecodes_wrong": ("wrong timecodes: the whole clip", "틀린 타임코드: 클립 전체"),
    "excluded_by_review": ("excluded by a reviewer", "검토에서 제외됨"),
    "media_changed": ("the footage was replaced after planning", "계획 뒤에 바뀐 영상 파일"),
    "label_changed": ("the label changed after planning", "계획 뒤에 바뀐 라벨"),
}
CHECKS = {  # name and definition
    "file_validity": ("파일 유효성", "받은 미디어 가운데 처음부터 끝까지 디코딩되는 것의 비율"),
    "format_agreement": (
        "형식 일치율",
        "디코딩되는 미디어 가운데 종류(영상, 이미지)가 라벨과 같은 것의 비율",
    ),
    "size_agreement": ("해상도 일치율", "저장된 가로·세로 크기가 라벨과 같은 미디어의 비율"),
    "length_agreement": (
        "길이 일치율",
        "디코딩한 길이와 라벨의 길이가 0.1초 안에서 같은 영상의 비율",
    ),
    "rate_agreement": (
        "프레임률 일치율",
        "디코딩한 프레임률과 라벨의 프레임률이 0.01 안에서 같은 영상의 비율",
    ),
    "mean_length": ("평균 길이", "채택된 영상을 디코딩한 길이의 평균"),
    "over_25_s": ("25초 초과 비율", "채택된 영상 가운데 25초보다 긴 것의 비율"),
    "total_length": ("총 길이", "채택된 모든 영상을 디코딩한 길이의 합"),
    "words_per_description": (
        "설명문당 어절 수",
        "프롬프트 하나의 어절 수. 공백으로 나뉜 것을 한 어절로 셈",
    ),
    "sentences_per_description": (
        "설명문당 문장 수",
        "프롬프트 하나의 문장 수. 공백이나 끝 앞에 놓인 . ! ? … 。를 "
        "문장의 끝으로 보고, 끝맺지 않은 나머지는 한 문장으로 셈",
    ),
}


def wording(code: str) -> tuple[str, str]:
    """(English, Korean) for a status, reason or flag; an HTTP status or an unknown code stands
    for itself.
    """
    if code.startswith("http_"):
        return f"the server could not give it ({code[5:]})", f"서버에서 받지 못함 ({code[5:]})"
    return STATUSES.get(code) or REASONS.get(code) or (code, code)
