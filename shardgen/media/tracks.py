"""Which of a file's streams is the film."""

from typing import Any

from av.stream import Disposition

from shardgen.media.errors import MediaError

# Codecs of pictures. Only Motion JPEG is used for films too.
_PICTURE_CODECS = ("mjpeg", "png", "bmp", "gif", "tiff", "webp")


def film_of(container: Any) -> Any:
    """What av_find_best_stream takes, but never a cover or a thumbnail. Raises MediaError
    (media_no_video).
    """
    still = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    films = [each for each in container.streams.video if not each.disposition & still]
    if not films:
        what = "only a cover picture" if container.streams.video else "no video stream"
        raise MediaError("media_no_video", f"the file has {what}")
    # A cover need not be marked as one: a track of one PNG or JPEG beside a film is no film. How
    # many frames a track has not every container says.
    films = [each for each in films if not _is_single_picture(each)] or films
    best = container.streams.best("video")
    if best in films:
        return best
    # a cover that is marked as the default; among the films the mark counts too
    return max(films, key=lambda each: bool(each.disposition & Disposition.default))


def _is_single_picture(stream: Any) -> bool:
    return stream.codec_context is not None and (
        stream.codec_context.name in _PICTURE_CODECS and stream.frames <= 1
    )
