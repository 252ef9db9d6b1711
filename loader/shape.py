"""THE CONTRACT: shapes. A bucket is pixels and frames; a latent layout is how one VAE and one
transformer cut them up. Torch-free.

The two stand apart because the same footage is cut into the same buckets whatever the model,
while the latent's channels, its strides and the number of tokens are the model's. A dataset holds
latents of one layout, which its manifest names; `latent_shape` and `num_tokens` need both.
"""

import re

import msgspec

_BUCKET = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})x([1-9]\d{0,4})")


class Bucket(msgspec.Struct, frozen=True, order=True):
    """A shape that samples share: WIDTHxHEIGHTxFRAMES, in pixels and frames."""

    width_px: int
    height_px: int
    num_frames: int

    def __str__(self) -> str:
        return f"{self.width_px}x{self.height_px}x{self.num_frames}"

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """Read "1280x704x49". Raises ValueError for another spelling; whether a model can take
        the shape is for `LatentLayout.check` to say.
        """
        match = _BUCKET.fullmatch(text)
        if match is None:
            raise ValueError(
                f"shape {text!r}: expected WIDTHxHEIGHTxFRAMES, for example 1280x704x49"
            )
        width_px, height_px, num_frames = map(int, match.groups())
        return cls(width_px, height_px, num_frames)


class LatentLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How pixels and frames become a latent and tokens.

    The VAE makes `channels` numbers of each cell of `stride_px` x `stride_px` pixels and
    `stride_t` frames, of which the first frame is one by itself. A token is a patch of `patch_px`
    x `patch_px` pixels of one latent frame.
    """

    channels: int
    stride_t: int
    stride_px: int
    patch_px: int

    def parse(self, text: str) -> Bucket:
        """`Bucket.parse` and `check` in one."""
        bucket = Bucket.parse(text)
        self.check(bucket)
        return bucket

    def check(self, bucket: Bucket) -> None:
        """Raises ValueError for a shape that does not divide into patches and latent frames, with
        the next smaller one that does.
        """
        side_px, stride_t = self.patch_px, self.stride_t
        past_first = bucket.num_frames - 1
        if not (bucket.width_px % side_px or bucket.height_px % side_px or past_first % stride_t):
            return
        nearest = Bucket(
            width_px=max(bucket.width_px // side_px, 1) * side_px,
            height_px=max(bucket.height_px // side_px, 1) * side_px,
            num_frames=past_first // stride_t * stride_t + 1,
        )
        hint = " (A14B: of 16)" if self == WAN22 else ""
        raise ValueError(
            f"shape {bucket}: {_MODELS.get(self, 'this latent layout')} takes width and height in "
            f"multiples of {side_px}{hint} and {stride_t}n+1 frames; the next smaller shape is "
            f"{nearest}"
        )

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        """[C, T, h, w] of a clip's latent: [48, (F-1)/4+1, H/16, W/16] for the Wan2.2 VAE."""
        return (
            self.channels,
            (bucket.num_frames - 1) // self.stride_t + 1,
            bucket.height_px // self.stride_px,
            bucket.width_px // self.stride_px,
        )

    def num_tokens(self, bucket: Bucket) -> int:
        """Tokens of the transformer: patches of `patch_px` squared in each latent frame."""
        _, latent_frames, _, _ = self.latent_shape(bucket)
        rows, columns = bucket.height_px // self.patch_px, bucket.width_px // self.patch_px
        return latent_frames * rows * columns


WAN22 = LatentLayout(channels=48, stride_t=4, stride_px=16, patch_px=32)  # Wan2.2-TI2V-5B
WAN21 = LatentLayout(channels=16, stride_t=4, stride_px=8, patch_px=16)  # Wan2.2-A14B, Wan2.1
_MODELS = {WAN22: "Wan2.2-TI2V-5B", WAN21: "Wan2.2-A14B (Wan2.1 too)"}
