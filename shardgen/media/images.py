"""Still pictures: decoded by Pillow, which refuses cut-off files where ffmpeg doesn't."""

from pathlib import Path

from PIL import Image
from PIL.Image import DecompressionBombError

from shardgen.media.errors import MediaError

_IMAGE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")


def is_image(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(8).startswith(_IMAGE_MAGIC)
    except OSError as error:
        raise MediaError("media_undecodable", f"can't be opened: {error.strerror}") from error


def load_image(path: Path) -> Image.Image:
    """A decoded picture, still as stored (no EXIF turn). Pillow: it refuses cut-off files, ffmpeg
    doesn't.
    """
    try:
        with path.open("rb") as file:
            image = Image.open(file)
            image.load()
    except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:
        reason = "media_truncated" if "truncated" in str(error) else "media_undecodable"
        raise MediaError(reason, str(error)) from error
    return image
