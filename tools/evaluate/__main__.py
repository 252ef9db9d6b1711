"""Does this LoRA help?

    python -m tools.evaluate generate CONFIG.toml [--set a.b=c]     clips (torchrun shares them)
    python -m tools.evaluate score CONFIG.toml                      numbers of each clip
    python -m tools.evaluate compare CONFIG.toml                    result.json, plot, sheets
    python -m tools.evaluate final RUN [--set a.b=c]                the three for RUN's best LoRA
    python -m tools.evaluate votes VOTES.csv                        what people's votes say

CONFIG.toml names output, model, datasets and candidates; tools/evaluate/config.py has all keys.
Everything goes on where it was interrupted. Nothing is downloaded: what is not there is not
measured, and the result says why.
"""

import argparse
import sys
from pathlib import Path

import torch

from loader.config import dump_toml, load_toml, override
from loader.files import told, write_atomic
from tools.dashboard.exports import read_csv
from tools.evaluate import votes as ballots
from tools.evaluate.compare import compare
from tools.evaluate.config import EvaluateConfig, SamplingConfig, check
from tools.evaluate.evaluation_set import EvaluationSet, read_set
from tools.evaluate.generate import generate
from tools.evaluate.result import NOT_MEASURED, Result
from tools.evaluate.score import open_networks, score
from train.config import TrainConfig
from train.evaluation import BEST_FOLDER
from train.lora.files import DIFFUSERS_FILE
from train.parallel import mesh


def config_of_run(run: Path, overrides: list[str]) -> EvaluateConfig:
    """That of `final`: a finished run's best LoRA, its model, datasets and shifts; written to the
    evaluation's config.toml. Raises ValueError where there is no LoRA, or for `overrides`.
    """
    trained = load_toml(run / "config.toml", TrainConfig)
    best = sorted(
        path
        for path in (run / BEST_FOLDER).glob("*.safetensors")
        if not path.stem.endswith("comfyui")
    )
    lora = best[0] if best else run / DIFFUSERS_FILE
    if not lora.exists():
        raise ValueError(
            f"{run}: neither {BEST_FOLDER}/ nor {DIFFUSERS_FILE} is there; train first"
        )
    usual = SamplingConfig()
    config = EvaluateConfig(
        output=str(run / "evaluations" / "final"),
        model=trained.model.path,
        datasets=list(trained.data.datasets),
        candidates={"lora": str(lora)},
        sampling=SamplingConfig(
            shift=usual.shift if trained.flow.shift is None else trained.flow.shift,
            shifts=dict(trained.flow.shifts),
            dtype=trained.model.dtype,
            num_steps=trained.samples.num_steps,
            guidance=trained.samples.guidance or usual.guidance,
        ),
    )
    config = override(config, overrides, f"final {run}")
    check(config)
    # for `score` and `compare` alone, or more candidates
    config.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(config.folder / "config.toml", dump_toml(config).encode())
    return config


def chosen_set(config: EvaluateConfig) -> EvaluationSet:
    found = read_set(config.folder)
    if found is None:
        raise ValueError(f"{config.folder}: nothing is generated yet; run tools.evaluate generate")
    return found


def say(result: Result) -> None:
    """The table, for a terminal."""
    for metric in result.metrics:
        if metric.category:
            continue
        value = f"{metric.value:.4g}" if isinstance(metric.value, float) else "not measured"
        interval = "" if metric.low is None else f" [{metric.low:.4g}, {metric.high:.4g}]"
        floor = "" if metric.floor is None else f" floor {metric.floor:.4g}"
        why = f" ({metric.why})" if metric.why else ""
        n = "" if metric.n is None else f" n={metric.n}"
        print(f"{metric.name:18} {metric.variant:12} {value}{interval}{floor}{n}{why}")
    for each in result.comparisons:
        where = f" in {each.category}" if each.category else ""
        value = f"{each.difference:+.4g}" if isinstance(each.difference, float) else "not measured"
        interval = "" if each.low is None else f" [{each.low:+.4g}, {each.high:+.4g}]"
        verdict = f" {each.verdict}" if each.verdict else ""
        print(f"{each.metric:18} {each.variant} - base{where}: {value}{interval}{verdict}")
    print(f"grade: {result.grade} ({result.grade_rule})")


def say_votes(path: Path) -> None:
    try:
        found = ballots.votes_of_rows(read_csv(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not found:
        raise ValueError(f"{path}: there is no vote in it; the dashboard's page Vote writes them")
    names = sorted({name for vote in found for name in (vote.left_variant, vote.right_variant)})
    consistent, num_repeated = ballots.self_consistency(found)
    print(f"self-consistency: {_share(consistent)} of {num_repeated} pairs asked twice")
    for question in sorted({vote.question for vote in found}):
        share, alpha, num_shared = ballots.agreement(found, question)
        print(
            f"{question}: agreement {_share(share)}, Krippendorff's alpha {_share(alpha)}, "
            f"{num_shared} shared"
        )
        for one in range(len(names)):
            for other in range(one):
                rate = ballots.win_rate(found, names[one], names[other], question)
                if rate is not None:
                    low, high = rate.interval.low, rate.interval.high
                    print(
                        f"  {rate.variant} over {rate.against}: {rate.interval.value:.3f} "
                        f"[{low:.3f}, {high:.3f}] over {rate.num_prompts} prompts, Wilson "
                        f"[{rate.wilson[0]:.3f}, {rate.wilson[1]:.3f}]: {rate.advice}"
                    )
        if len(names) >= 4:
            print(f"  Bradley-Terry, log strengths: {_strengths(found, question)}")


def _share(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.3f}"


def _strengths(found: list[ballots.Vote], question: str) -> str:
    try:
        strengths = ballots.bradley_terry(found, question)
    except ValueError as error:
        # of this question alone: others may have votes enough
        return f"{NOT_MEASURED}: {error}"
    return ", ".join(f"{name} {value:+.2f}" for name, value in strengths.items())


def run(command: str, config: EvaluateConfig) -> None:
    check(config)
    with mesh.process_group() as world:
        open_networks(config, torch.device("cpu"))  # a wrong file is refused before hours of clips
        if command in ("generate", "final"):
            generate(config, world)
            mesh.barrier(world)
        if not world.is_main:
            return
        if command in ("score", "final"):
            score(config, chosen_set(config), world.device)
        if command in ("compare", "final"):
            say(compare(config, chosen_set(config)))
            print(f"{config.folder / 'result.json'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["generate", "score", "compare", "final", "votes"])
    parser.add_argument("path", type=Path, metavar="CONFIG.toml, RUN or VOTES.csv")
    parser.add_argument("--set", action="append", default=[], metavar="key=value")
    arguments = parser.parse_args()
    try:
        if arguments.command == "votes":
            say_votes(arguments.path)
        elif arguments.command == "final":
            run("final", config_of_run(arguments.path, arguments.set))
        else:
            run(arguments.command, load_toml(arguments.path, EvaluateConfig, arguments.set))
    except (ValueError, OSError, mesh.PeerLostError) as error:
        sys.exit(f"evaluate: {told(error)}")


if __name__ == "__main__":
    mesh.run_program(main)
