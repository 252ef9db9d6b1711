"""The models of bench.step side by side on one card, and the clock that times a step of each."""

from typing import Any, NamedTuple

import torch

from bench import step_subjects as subjects
from bench.our_step import Adapters, our_config, our_run
from loader.batch import Batch
from loader.models import ModelKind
from loader.sample import MAX_TEXT_TOKENS
from loader.shape import Bucket
from tools.budget import CONTEXT_BYTES, GIB
from train.activations.sizes import Shape
from train.model.attention import AttentionName
from train.model.wan import WanConfig
from train.run import Run

CAP_GIB, PLANNED_GIB = 32, 30
GRAPH_TOKENS = 4096
PEERS = ("eager, checkpointing", "compiled, checkpointing", "compiled")
# our step, and the same changed in one thing
EFFICIENT, SOME_BLOCKS = "ours, efficient attention", "ours, blocks 15-29"
VARIANTS: dict[str, dict[str, str]] = {
    "ours": {},
    EFFICIENT: {"attention": "efficient"},
    SOME_BLOCKS: {"blocks": "15-29"},
}
SUBJECTS = (*VARIANTS, "frozen", "floor", *PEERS)
DEFAULT_SUBJECTS = ("ours", "frozen", "floor", *PEERS)


class Profile(NamedTuple):
    dtype: torch.dtype
    attention: AttentionName
    # what "auto" may choose of; None: all that can run
    kernels: tuple[str, ...] | None
    # the kernel that is checked before anything is timed
    checked: AttentionName
    # the only one of torch's that peers may use
    of_peers: str
    # planned for PLANNED_GIB, and some steps run under a cap of CAP_GIB
    capped: bool
    # False: without the low-rank kernels that need tensor cores
    tensor_cores: bool


_NATIVE = Profile(
    torch.bfloat16,
    "auto",
    kernels=None,
    checked="auto",
    of_peers="cudnn",
    capped=False,
    tensor_cores=True,
)
PROFILES = {
    "native": _NATIVE,
    "native32": _NATIVE._replace(capped=True),
    "volta": Profile(
        torch.float16,
        "auto",
        kernels=("efficient", "gemm"),
        checked="gemm",
        of_peers="efficient",
        capped=True,
        tensor_cores=False,
    ),
}


class Timing(NamedTuple):
    """Of one step."""

    seconds: float
    loss: float
    # of the subject's own: what the others hold is subtracted
    peak_gib: float


class Subjects:
    """The steps to time on adapters of one kind, by name (of SUBJECTS), and what their models hold.
    A step is one micro-batch of `num_samples` samples.
    """

    def __init__(
        self,
        config: WanConfig,
        kind: ModelKind,
        bucket: Bucket,
        profile: Profile,
        adapters: Adapters,
        names: list[str],
        device: torch.device,
        num_samples: int = 1,
    ):
        self.config, self.bucket, self.profile, self.device = config, bucket, profile, device
        self.kind = kind
        self.shape = Shape(num_samples, kind.layout.num_tokens(bucket), MAX_TEXT_TOKENS)
        self._adapters = adapters
        subjects.only_attention(profile.of_peers)
        self.resident: dict[str, int] = {}
        self.steps: dict[str, subjects.Step] = {}
        with _Counting(self.resident, "peer"):
            self._reference = subjects.reference_model(config, device, profile.dtype)

        # our step, as train/main.py runs it; the floor and the frozen base have its kernels
        self.run = self._ours("ours")
        for name in names:
            if name in VARIANTS:
                run = self.run if name == "ours" else self._ours(name)
                self.steps[name] = subjects.our_step(run)
        if "frozen" in names:
            with _Counting(self.resident, "frozen"):
                frozen = subjects.our_model(self._reference, config, profile.dtype)
            self.steps["frozen"] = subjects.frozen_step(
                frozen,
                self.run.kernels.attention,
                self.shape,
                self.run.plans[bucket],
                GRAPH_TOKENS,
            )
        if "floor" in names:
            self.steps["floor"] = self.floor()

        # diffusers + PEFT: one model, which each peer switches to its way before its step
        peers = [name for name in names if name in PEERS]
        if not peers:
            return
        with _Counting(self.resident, "peer"):
            step = subjects.peer_step(self._reference, adapters, profile.dtype)
        compiled = None
        if any("compiled" in peer for peer in peers):
            compiled = subjects.compile_blocks(self._reference)
        for peer in peers:
            self.steps[peer] = self._peer(
                step, compiled if "compiled" in peer else None, "checkpointing" in peer
            )

    def _ours(self, name: str) -> Run:
        """The parts of our step, or of one of its variants."""
        profile, before = self.profile, torch.cuda.memory_allocated()
        variant = {"attention": profile.attention} | VARIANTS[name]
        run_config = our_config(
            self._adapters,
            profile.dtype,
            variant["attention"],
            variant.get("blocks", ""),
            self.kind,
            # 28 GB of weights leave no room on such a card
            "auto" if profile.capped and self.kind.boundary is not None else "resident",
            global_batch=self.shape.batch,
            micro_tokens=self.shape.batch * self.shape.num_tokens,
            activation_memory="auto" if profile.capped else "all",
            activation_offload=profile.capped,
            cuda_graph_tokens=GRAPH_TOKENS,
        )
        with _Counting(self.resident, name):
            return our_run(
                run_config,
                self.bucket,
                model=subjects.our_model(self._reference, self.config, profile.dtype),
                tensor_cores=profile.tensor_cores,
                kernels=profile.kernels,
                # as on a card of its own, whatever the other subjects have taken
                free_bytes=lambda _: PLANNED_GIB * GIB - torch.cuda.memory_allocated() + before,
            )

    def floor(self) -> subjects.Step:
        return subjects.floor_step(
            self.run.model, self.shape, self.profile.dtype, self.run.kernels.attention
        )

    def _peer(self, step: subjects.Step, compiled: Any, checkpointing: bool) -> subjects.Step:
        def run(batch: Batch) -> torch.Tensor:
            subjects.use_compiled(self._reference, compiled)
            self._reference.gradient_checkpointing = checkpointing
            return step(batch)

        if checkpointing:
            self._reference.enable_gradient_checkpointing()
        return run

    def time(self, name: str, batch: Batch) -> Timing:
        """One step of the subject `name`, by CUDA events."""
        owner = "peer" if name in PEERS else name
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        others = torch.cuda.memory_allocated() - self.resident.get(owner, 0)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        loss = self.steps[name](batch)
        end.record()
        torch.cuda.synchronize()
        return Timing(
            seconds=start.elapsed_time(end) / 1e3,
            loss=loss.item(),
            peak_gib=(torch.cuda.max_memory_allocated() - others) / GIB,
        )

    def under_the_cap(self, batch: Batch) -> dict[str, float]:
        """Our step with no more memory for it than a card of 32 GiB has: seconds, and how often
        in a step the allocator had to give back what it held and try again. Out of memory ends
        the run.
        """
        torch.cuda.empty_cache()
        others = torch.cuda.memory_reserved() - self.resident["ours"]
        total = torch.cuda.get_device_properties(self.device).total_memory
        share = (CAP_GIB * GIB - CONTEXT_BYTES + others) / total
        # beside large models a card has less than that
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
        self.time("ours", batch)
        retries = torch.cuda.memory_stats()["num_alloc_retries"]
        capped_s = min(self.time("ours", batch).seconds for _ in range(3))
        retries = torch.cuda.memory_stats()["num_alloc_retries"] - retries
        torch.cuda.set_per_process_memory_fraction(1.0)
        return {"capped_s": capped_s, "capped_retries": retries / 3}


class _Counting:
    """Adds what is allocated inside it to `resident[owner]`."""

    def __init__(self, resident: dict[str, int], owner: str):
        self._resident, self._owner = resident, owner

    def __enter__(self) -> None:
        self._before = torch.cuda.memory_allocated()

    def __exit__(self, *_: object) -> None:
        grown = torch.cuda.memory_allocated() - self._before
        self._resident[self._owner] = self._resident.get(self._owner, 0) + grown
