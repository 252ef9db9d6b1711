"""The small transformer of Wan2.2's layout, trained on all captions but the held-out subject's.

Shapes: N windows, B of a batch, K captions, C latent channels, T/h/w latent frames, rows and
columns, L tokens, S text rows, D text width.
"""

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from bench.learn.footage import SHIFT, Footage
from bench.learn.training import Clock, GraphedTraining

PEAK_LR = 1.5e-3
CAPTION_DROPOUT = 0.1
IMAGE_TO_VIDEO = 0.2


def small_transformer(text_dim: int, device: torch.device) -> WanTransformer3DModel:
    """3.3 million parameters, heads of 128 as in the real model."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        in_channels=48,
        out_channels=48,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=128,
        ffn_dim=256,
        freq_dim=128,
        text_dim=text_dim,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=1e-6,
        rope_max_seq_len=1024,
    ).to(device)


class FlowMatching(nn.Module):
    """The loss of a batch, as train/flow.py defines it: velocity, its own mean for each sample."""

    def __init__(self, transformer: WanTransformer3DModel):
        super().__init__()
        self.transformer = transformer

    def forward(
        self,
        x0_BCThw: Tensor,
        noise_BCThw: Tensor,
        sigma_B: Tensor,
        text_BSD: Tensor,
        i2v_B: Tensor,
    ) -> Tensor:
        num_frames, rows, columns = x0_BCThw.shape[2:]
        sigma_B1111 = sigma_B.view(-1, 1, 1, 1, 1)
        # image-to-video: latent frame 0 is clean, its tokens have t = 0, and it has no loss
        frames_T = torch.arange(num_frames, device=x0_BCThw.device)
        noised_BT = ((frames_T > 0) | (i2v_B[:, None] == 0)).float()
        sigma_BCThw = sigma_B1111 * noised_BT[:, None, :, None, None]
        x_BCThw = (1 - sigma_BCThw) * x0_BCThw + sigma_BCThw * noise_BCThw
        t_BT = 1000 * sigma_B[:, None] * noised_BT
        v_BCThw = self.transformer(
            hidden_states=x_BCThw,
            timestep=t_BT.repeat_interleave(rows * columns // 4, dim=1),
            encoder_hidden_states=text_BSD,
            return_dict=False,
        )[0]
        error_BT = (v_BCThw.float() - (noise_BCThw - x0_BCThw)).square().mean((1, 3, 4))
        return ((error_BT * noised_BT).sum(1) / noised_BT.sum(1)).mean()


def train_transformer(
    footage: Footage,
    latent_NCThw: Tensor,
    *,
    seconds: float,
    max_steps: int,
    batch: int,
    graphed: bool,
    seed: int,
) -> tuple[WanTransformer3DModel, dict[str, Any]]:
    """Returns the transformer and what was measured."""
    device = latent_NCThw.device
    torch.manual_seed(seed + 1)
    transformer = small_transformer(footage.text_KSD.shape[-1], device)
    training = torch.nonzero(~footage.excluded_N & ~footage.held_out_N)[:, 0]

    def draw() -> tuple[Tensor, ...]:
        chosen = training[torch.randint(len(training), (batch,), device=device)]
        u_B = torch.rand(batch, device=device)
        text_BSD = footage.text_KSD[footage.caption_N[chosen]]
        dropped_B11 = torch.rand(batch, 1, 1, device=device) < CAPTION_DROPOUT
        x0_BCThw = latent_NCThw[chosen]
        return (
            x0_BCThw,
            torch.randn_like(x0_BCThw),
            SHIFT * u_B / (1 + (SHIFT - 1) * u_B),
            torch.where(dropped_B11, footage.empty_SD, text_BSD),
            (torch.rand(batch, device=device) < IMAGE_TO_VIDEO).float(),
        )

    trainer = GraphedTraining(
        transformer, FlowMatching(transformer), draw(), weight_decay=0.01, graphed=graphed
    )
    clock, loss = Clock(seconds, max_steps), torch.zeros(())
    while clock.next():
        loss = trainer.step(draw(), clock.lr(PEAK_LR, 200))
        if clock.num_steps % 1000 == 0:
            print(
                f"transformer {clock.num_steps} steps, {clock.elapsed_s:.0f} s: "
                f"loss {float(loss):.4f}",
                flush=True,
            )
    measured = {
        "steps": clock.num_steps,
        "batch": batch,
        "seconds": round(clock.elapsed_s, 1),
        "loss": float(loss),
    }
    print("transformer", measured, flush=True)
    return transformer, measured
