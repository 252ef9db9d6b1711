"""Clips as one picture: a row of evenly spaced frames for each, labelled on the left.

Frames wider than MAX_FRAME_PX are scaled down: of 1280x704 they make a PNG of 27 MB for two clips,
and training waits while it is compressed.
"""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 5
LABEL_WIDTH_PX = 64
MAX_FRAME_PX = 480
GAP_PX = 4
Frames = np.ndarray[Any, Any]  # uint8 RGB [F, H, W, 3]


def contact_sheet(rows: list[tuple[str, Frames]]) -> Image.Image:
    """`rows` are (label, frames), top to bottom, all of one shape."""
    num_frames, height_px, width_px = rows[0][1].shape[:3]
    if width_px > MAX_FRAME_PX:
        height_px, width_px = round(height_px * MAX_FRAME_PX / width_px), MAX_FRAME_PX
    columns = np.unique(
        np.linspace(0, num_frames - 1, min(COLUMNS, num_frames)).round().astype(int)
    )
    sheet = Image.new(
        "RGB",
        (LABEL_WIDTH_PX + len(columns) * (width_px + GAP_PX), len(rows) * (height_px + GAP_PX)),
        "white",
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for row, (label, frames) in enumerate(rows):
        top_px = row * (height_px + GAP_PX)
        draw.multiline_text((6, top_px + 6), label, fill="black", font=font)
        for column, number in enumerate(columns):
            left_px = LABEL_WIDTH_PX + column * (width_px + GAP_PX)
            frame = Image.fromarray(frames[number]).resize((width_px, height_px))
            sheet.paste(frame, (left_px, top_px))
    return sheet
