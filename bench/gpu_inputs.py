"""What bench.loader_gpu reads: a random model of TI2V-5B's size, synthetic datasets, H.264
clips.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import PIL.Image
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import interpolate

from loader.shape import Bucket
from loader.vae.encoder import VAEConfig, VAEEncoder
from tools.fake.batch import synthetic_jpeg, write_synthetic_dataset
from train.model.load import INDEX, tensor_sources
from train.model.wan import TI2V_5B, Wan, WanConfig

LARGE, SMALL = Bucket(1280, 704, 49), Bucket(832, 480, 9)
NUM_CLIPS = 4
VAE = VAEConfig(
    latents_mean=[0.0] * 48,
    latents_std=[1.0] * 48,
    base_dim=160,
    z_dim=48,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    temperal_downsample=(False, True, True),
    is_residual=True,
    in_channels=12,
    patch_size=2,
)


def make_clips(folder: Path, bucket: Bucket = LARGE) -> None:
    """H.264 clips as shardgen stores them; ffmpeg's frame 0 of each: the planes, and RGB by
    BT.709 and by BT.601.
    """
    import av

    from loader.mp4 import BT709, FULL, NARROW, SCALER, encode_mp4
    from shardgen.media.colour import BT601

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(NUM_CLIPS):
        with PIL.Image.open(
            io.BytesIO(synthetic_jpeg(np.random.default_rng(i), bucket))
        ) as picture:
            first = np.array(picture)
        clip = encode_mp4(
            np.stack([np.roll(first, 4 * t, axis=1) for t in range(bucket.num_frames)]), 24.0
        )
        (folder / f"{i}.mp4").write_bytes(clip)
        with av.open(io.BytesIO(clip)) as container:
            frame = next(container.decode(video=0))
        PIL.Image.fromarray(frame.to_ndarray()).save(folder / f"{i}-planes.png")
        for name, matrix in (("709", BT709), ("601", BT601)):
            pixels = frame.reformat(
                format="rgb24",
                interpolation=SCALER,
                src_colorspace=matrix,
                src_color_range=NARROW,
                dst_color_range=FULL,
                threads=1,
            ).to_ndarray()
            PIL.Image.fromarray(pixels).save(folder / f"{i}-{name}.png", optimize=True)


def dali_frame(path: Path) -> tuple[Tensor, Tensor]:
    """What FrameDecoder should make of make_clips' planes, [3, 1, H, W], and which pixels BT.601
    can hold, [1, H, W].

    DALI 2.4's CUDA kernel in float64: BT.601 in three decimals, as if black were 255 / 16 and
    grey chroma 255 / 2, not 16 and 128; rounded and clipped to 8 bits, which loses colours that
    are BT.709's and not BT.601's. Chroma is bilinear and centred between luma, while H.264 puts
    it on every other column.
    """
    from loader.dali import _BT601_TO_BT709, _CUDA_BIAS

    planes = torch.from_numpy(np.array(PIL.Image.open(path))).double()  # yuv420p, [H + H/2, W]
    height, width = planes.shape[0] * 2 // 3, planes.shape[1]
    luma_HW, chroma = planes.split([height, height // 2])
    chroma = chroma.reshape(1, 2, height // 2, width // 2) - 255 / 2
    blue_HW, red_HW = interpolate(chroma, scale_factor=2, mode="bilinear")[0]
    grey_HW = 1.164 * (luma_HW - 255 / 16)
    rgb_CHW = torch.stack(
        [
            grey_HW + 1.596 * red_HW,
            grey_HW - 0.813 * red_HW - 0.392 * blue_HW,
            grey_HW + 2.017 * blue_HW,
        ]
    )
    levels_CHW = rgb_CHW.round().clamp(0, 255) - torch.tensor(_CUDA_BIAS).view(3, 1, 1)
    frame_CHW = torch.einsum("dc,chw->dhw", _BT601_TO_BT709.double(), levels_CHW / 127.5 - 1)
    return frame_CHW.clamp(-1, 1).unsqueeze(1), ((rgb_CHW >= 0) & (rgb_CHW <= 255)).all(
        0, keepdim=True
    )


def write_model(
    folder: Path, config: WanConfig = TI2V_5B, vae: VAEConfig = VAE, device: str = "cuda"
) -> None:
    """A random transformer and a random VAE encoder in diffusers' layout, bfloat16."""
    for name, struct in (("transformer", config), ("vae", vae)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_bytes(msgspec.json.encode(struct))
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Wan(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    files: dict[str, dict[str, Tensor]] = {}
    for name, sources in tensor_sources(model).items():
        file = (
            f"{'-'.join(name.split('.')[:2]) if name.startswith('blocks.') else 'rest'}.safetensors"
        )
        rows, *columns = shapes[name]
        for source in sources:
            values = torch.randn(
                rows // len(sources), *columns, device=device, dtype=torch.bfloat16
            )
            if columns:
                values *= columns[0] ** -0.5
            else:
                values = (
                    1 + 0.1 * values
                    if "norm" in source and source.endswith("weight")
                    else 0.02 * values
                )
            files.setdefault(file, {})[source] = values
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda file: save_file(files[file], folder / "transformer" / file), files))
    places = {source: file for file, tensors in files.items() for source in tensors}
    with torch.device(device):
        encoder = VAEEncoder(vae).bfloat16()
    save_file(encoder.state_dict(), folder / "vae" / "diffusion_pytorch_model.safetensors")
    # last: it is complete
    (folder / "transformer" / INDEX).write_bytes(msgspec.json.encode({"weight_map": places}))


def write_inputs(folder: Path) -> None:
    """The datasets jpg, mp4 (the same samples) and small, and the model, those of them that
    aren't below `folder` yet.

    Raises SystemExit without clips.
    """
    clips = [path.read_bytes() for path in sorted((folder / "clips").glob("*.mp4"))]
    if not clips:
        raise SystemExit(
            f"{folder / 'clips'} holds no clips: run with --make-clips where PyAV is, and copy the "
            f"folder"
        )
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(
                write_synthetic_dataset,
                folder / name,
                {str(bucket): num},
                samples_per_shard=8,
                text_dim=4096,
                clips=videos,
            )
            for name, bucket, num, videos in (
                ("jpg", LARGE, 40, []),
                ("mp4", LARGE, 40, clips),
                ("small", SMALL, 128, []),
            )
            if not (folder / name / "manifest.json").exists()
        ]
        if not (folder / "model" / "transformer" / INDEX).exists():
            write_model(folder / "model")
        for job in jobs:
            job.result()
