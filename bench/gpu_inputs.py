"""What bench.loader_gpu reads: a random model of TI2V-5B's size, synthetic datasets, H.264 clips."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import PIL.Image
import torch
from safetensors.torch import save_file
from torch import Tensor

from loader.sample import Bucket
from loader.vae import VAEConfig, VAEEncoder
from tools.synthetic import synthetic_jpeg, write_synthetic_dataset
from train.wan import TI2V_5B, Wan, WanConfig
from train.weights import INDEX, tensor_sources

LARGE, SMALL = Bucket(1280, 704, 49), Bucket(832, 480, 9)
NUM_CLIPS = 4
VAE = VAEConfig(latents_mean=[0.0] * 48, latents_std=[1.0] * 48, base_dim=160, z_dim=48, dim_mult=(1, 2, 4, 4),
                num_res_blocks=2, temperal_downsample=(False, True, True), is_residual=True, in_channels=12,
                patch_size=2)


def make_clips(folder: Path, bucket: Bucket = LARGE) -> None:
    """H.264 clips as shardgen stores them, and frame 0 of each as ffmpeg decodes it, by BT.709 and by BT.601."""
    import av

    from shardgen.media import BT601, BT709, FULL, NARROW, SCALER
    from shardgen.pictures import encode_mp4

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(NUM_CLIPS):
        with PIL.Image.open(io.BytesIO(synthetic_jpeg(np.random.default_rng(i), bucket))) as picture:
            first = np.array(picture)
        clip = encode_mp4(np.stack([np.roll(first, 4 * t, axis=1) for t in range(bucket.num_frames)]), 24.0)
        (folder / f"{i}.mp4").write_bytes(clip)
        with av.open(io.BytesIO(clip)) as container:
            frame = next(container.decode(video=0))
        for name, matrix in (("709", BT709), ("601", BT601)):
            pixels = frame.reformat(format="rgb24", interpolation=SCALER, src_colorspace=matrix, src_color_range=NARROW,
                                    dst_color_range=FULL, threads=1).to_ndarray()
            PIL.Image.fromarray(pixels).save(folder / f"{i}-{name}.png", optimize=True)


def write_model(folder: Path, config: WanConfig = TI2V_5B, vae: VAEConfig = VAE, device: str = "cuda") -> None:
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
        file = f"{'-'.join(name.split('.')[:2]) if name.startswith('blocks.') else 'rest'}.safetensors"
        rows, *columns = shapes[name]
        for source in sources:
            values = torch.randn(rows // len(sources), *columns, device=device, dtype=torch.bfloat16)
            if columns:
                values *= columns[0] ** -0.5
            else:
                values = 1 + 0.1 * values if "norm" in source and source.endswith("weight") else 0.02 * values
            files.setdefault(file, {})[source] = values
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda file: save_file(files[file], folder / "transformer" / file), files))
    places = {source: file for file, tensors in files.items() for source in tensors}
    with torch.device(device):
        encoder = VAEEncoder(vae).bfloat16()
    save_file(encoder.state_dict(), folder / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "transformer" / INDEX).write_bytes(msgspec.json.encode({"weight_map": places}))  # last: it is complete


def write_inputs(folder: Path) -> None:
    """The datasets jpg, mp4 (the same samples) and small, and the model, those of them that aren't below `folder` yet.

    Raises SystemExit without clips.
    """
    clips = [path.read_bytes() for path in sorted((folder / "clips").glob("*.mp4"))]
    if not clips:
        raise SystemExit(f"{folder / 'clips'} holds no clips: run with --make-clips where PyAV is, and copy the folder")
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(write_synthetic_dataset, folder / name, {str(bucket): num}, samples_per_shard=8,
                            text_dim=4096, clips=videos)
                for name, bucket, num, videos in (("jpg", LARGE, 40, []), ("mp4", LARGE, 40, clips),
                                                  ("small", SMALL, 128, []))
                if not (folder / name / "manifest.json").exists()]
        if not (folder / "model" / "transformer" / INDEX).exists():
            write_model(folder / "model")
        for job in jobs:
            job.result()
