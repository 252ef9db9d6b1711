"""The result of an evaluation: `python -m tools.evaluate compare`. Writes result.json, a plot and a
contact sheet for each category.
"""

import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tools.evaluate import towers
from tools.evaluate.clips import (
    BASE,
    REAL,
    Clip,
    Kept,
    clips_of,
    latent_features,
    read_mp4,
    read_reference,
    read_variants,
)
from tools.evaluate.config import EvaluateConfig
from tools.evaluate.evaluation_set import EvaluationSet, Prompt
from tools.evaluate.figures import (
    RULE,
    Samples,
    distance_comparison,
    distance_metric,
    grade,
    kernel_metric,
    mean_comparisons,
    mean_metric,
    nearest_category,
    retrieved,
)
from tools.evaluate.frechet import MIN_CLIPS
from tools.evaluate.pictures import MEASURES
from tools.evaluate.result import (
    Comparison,
    Metric,
    Result,
    ResultClip,
    not_measured,
    write_result,
)
from tools.evaluate.score import (
    ClipScores,
    Scores,
    feature_file,
    read_latents,
    read_scores,
)
from train.contact_sheet import contact_sheet

ROWS_PER_SHEET = 4


class Table:
    """Rows of result.json as they come in."""

    def __init__(self, config: EvaluateConfig, chosen: EvaluationSet):
        self.config, self.chosen = config, chosen
        self.names = [BASE, *config.candidates]
        self.metrics: list[Metric] = []
        self.comparisons: list[Comparison] = []
        self.categories = sorted({prompt.category for prompt in chosen.prompts})
        self._category_of = {prompt.id: prompt.category for prompt in chosen.prompts}

    def samples(self, values: Any, prompt_ids: list[str]) -> Samples:
        categories = [self._category_of[each] for each in prompt_ids]
        return Samples(np.asarray(values), prompt_ids, categories)

    def add_means(self, name: str, found: dict[str, Samples], **texts: Any) -> None:
        """Metrics of all variants in `found`, and the candidates' differences from the base."""
        for variant, samples in found.items():
            for category in ("", *self.categories):
                self.metrics.append(mean_metric(name, variant, samples, category, **texts))
        for variant in self.config.candidates:
            self.comparisons += mean_comparisons(
                name, variant, found[variant], found[BASE], self.categories
            )


def compare(config: EvaluateConfig, chosen: EvaluationSet) -> Result:
    """Raises ValueError where something was not generated or not scored."""
    variants = read_variants(config.folder, [REAL, BASE, *config.candidates])
    scores = read_scores(config, chosen, [each.name for each in variants])
    table = Table(config, chosen)
    add_latents(table)
    add_psnr(table)
    add_pictures(table, scores)
    add_cosines(table, scores)
    add_features(table, scores)
    pictures = [*sheets(config, chosen), plot(config.folder, table.comparisons)]
    grades = {name: grade(table.metrics, table.comparisons, name) for name in config.candidates}
    result = Result(
        name=config.folder.name,
        time=time.time(),
        set_hash=chosen.hash,
        num_prompts=len(chosen.prompts),
        num_seeds=chosen.num_seeds,
        variants=variants,
        metrics=table.metrics,
        comparisons=table.comparisons,
        clips=[
            ResultClip(
                variant=variant.name,
                file=clip.mp4,
                prompt=clip.prompt.prompt,
                prompt_id=clip.prompt.id,
                category=clip.prompt.category,
                seed=clip.seed,
            )
            for variant in variants
            for clip in clips_of(chosen, variant.name)
            if clip.prompt.decoded
        ],
        pictures=[name for name in pictures if name],
        grade="; ".join(f"{name}: {word}" for name, word in grades.items()),
        grade_rule=RULE,
    )
    write_result(config.folder, result)
    return result


def add_latents(table: Table) -> None:
    """Of all clips, decoded or not: the Frechet distance of latents, and whether the nearest real
    latent is of the clip's own category.
    """
    folder = table.config.folder
    real_clips = list(clips_of(table.chosen, REAL))
    real_ND = read_latents(folder, real_clips, latent_features)
    real_categories = [clip.prompt.category for clip in real_clips]
    reference_ND, reference_categories = read_reference(folder)
    found: dict[str, Samples] = {}
    hits: dict[str, Samples] = {}
    for name in table.names:
        clips = list(clips_of(table.chosen, name))
        features_ND = read_latents(folder, clips, latent_features)
        ids = [clip.prompt.id for clip in clips]
        found[name] = table.samples(features_ND, ids)
        own = nearest_category(features_ND, real_ND, real_categories)
        right = [a == clip.prompt.category for a, clip in zip(own, clips, strict=True)]
        hits[name] = table.samples(np.array(right, float), ids)
    for category in ("", *table.categories):
        chosen = [i for i, each in enumerate(reference_categories) if category in ("", each)]
        some_ND = reference_ND[chosen]
        for name in table.names:
            table.metrics.append(
                distance_metric("latent_frechet", name, some_ND, found[name], category)
            )
        for name in table.config.candidates:
            table.comparisons.append(
                distance_comparison(
                    "latent_frechet", name, some_ND, found[name], found[BASE], category
                )
            )
    if len(table.categories) > 1:
        table.add_means("latent_retrieval", hits)


def add_pictures(table: Table, scores: dict[str, Scores]) -> None:
    """Distances of motion, flicker and sharpness from those of the prompt's real clip."""
    real = {clip.prompt_id: clip.pictures for clip in scores[REAL].clips}
    for measure in MEASURES:
        found = {}
        for name in table.names:
            clips = scores[name].clips
            values = [abs(c.pictures[measure] - real[c.prompt_id][measure]) for c in clips]
            found[name] = table.samples(values, _ids(clips))
        table.add_means(measure, found, unit="levels from the real clip")


def add_psnr(table: Table) -> None:
    """What the VAE keeps of the real windows: an upper bound of what any variant can look like."""
    clips = [clip for clip in clips_of(table.chosen, REAL) if clip.prompt.decoded]
    folder = table.config.folder
    kept = [msgspec.json.decode((folder / clip.kept).read_bytes(), type=Kept) for clip in clips]
    values = [(each.psnr_db, clip.prompt.id) for each, clip in zip(kept, clips, strict=True)]
    found = [(value, prompt) for value, prompt in values if value is not None]
    if not found:
        why = "the shards hold neither KEY.mp4 nor KEY.jpg of these windows"
        table.metrics.append(not_measured("psnr", REAL, why))
        return
    samples = table.samples([value for value, _ in found], [prompt for _, prompt in found])
    of = ", ".join(sorted({each.of for each in kept if each.of}))
    for category in ("", *table.categories):
        table.metrics.append(
            mean_metric("psnr", REAL, samples, category, unit="dB", model=f"against {of}")
        )


def add_cosines(table: Table, scores: dict[str, Scores]) -> None:
    """The cosine with the rows real, chance and base, its share of the gap, and retrieval@1."""
    real, target = scores[REAL], table.config.targets.clip_cosine
    why = real.tower_why
    place = {prompt.id: number for number, prompt in enumerate(table.chosen.prompts)}
    decoded = [prompt for prompt in table.chosen.prompts if prompt.decoded]
    columns = [place[prompt.id] for prompt in decoded]
    softmax = table.config.clip.kind == "softmax"
    criterion = f">= {target:g}" if softmax else ""
    if not why:
        real_table = np.array([clip.cosines for clip in real.clips])[:, columns]
        why = towers.why_blind(real_table, [prompt.prompt for prompt in decoded])
    if why:
        for name in table.names:
            table.metrics.append(
                not_measured("clip_cosine", name, why, model=real.tower, target=criterion)
            )
        return
    own: dict[str, Samples] = {}
    hits: dict[str, Samples] = {}
    for name in (REAL, *table.names):
        clips = scores[name].clips
        cosines = np.array([clip.cosines for clip in clips])
        numbers = [place[clip.prompt_id] for clip in clips]
        own[name] = table.samples(cosines[np.arange(len(clips)), numbers], _ids(clips))
        among = [columns.index(number) for number in numbers]
        hits[name] = table.samples(retrieved(cosines[:, columns], among), _ids(clips))
    table.add_means("clip_cosine", own, model=real.tower)
    table.add_means("clip_retrieval", hits, model=real.tower)
    diagonal = np.diag(real_table)
    chance = float((real_table.sum() - diagonal.sum()) / (real_table.size - len(diagonal)))
    table.metrics.append(
        Metric("clip_cosine", "chance", value=chance, n=len(real_table), model=real.tower)
    )
    gap = float(diagonal.mean()) - chance
    scale = "" if softmax else "the target is of another scale (softmax)"
    for name in table.names:
        value = float(own[name].values.mean())
        table.metrics.append(
            Metric("clip_share_of_gap", name, value=(value - chance) / gap, model=real.tower)
        )
        if name != BASE:
            table.metrics.append(
                Metric(
                    "clip_target",
                    name,
                    value=value if softmax else None,
                    n=len(own[name].values),
                    model=real.tower,
                    target=f">= {target:g}",
                    reached=value >= target if softmax else None,
                    why=scale,
                )
            )


def add_features(table: Table, scores: dict[str, Scores]) -> None:
    """FVD and KVD on the extractor's features, or why not."""
    config, real = table.config, scores[REAL]
    name, target = config.fvd.name, config.targets.fvd
    criterion = f"<= {target:g}" if name == "fvd" else ""
    why = real.extractor_why
    if why:
        for variant in table.names:
            table.metrics.append(
                not_measured(name, variant, why, model=real.extractor, target=criterion)
            )
        return
    real_ND = np.load(feature_file(config.folder, REAL, config))
    found = {
        variant: table.samples(
            np.load(feature_file(config.folder, variant, config)), _ids(scores[variant].clips)
        )
        for variant in table.names
    }
    for variant, samples in found.items():
        metric = distance_metric(name, variant, real_ND, samples, "", model=real.extractor)
        if isinstance(metric.value, float) and criterion and variant != BASE:
            enough = min(len(real_ND), len(samples.values)) >= MIN_CLIPS
            metric = _with_target(metric, criterion, metric.value <= target if enough else None)
        table.metrics.append(metric)
        kernel = name.replace("fvd", "kvd") if "fvd" in name else f"{name}_kernel"
        if len(samples.values) >= 4 and len(real_ND) >= 4:
            table.metrics.append(
                kernel_metric(kernel, variant, real_ND, samples, model=real.extractor)
            )
    for variant in config.candidates:
        table.comparisons.append(
            distance_comparison(name, variant, real_ND, found[variant], found[BASE], "")
        )


def _with_target(metric: Metric, target: str, reached: bool | None) -> Metric:
    return msgspec.structs.replace(metric, target=target, reached=reached)


def _ids(clips: list[ClipScores]) -> list[str]:
    return [clip.prompt_id for clip in clips]


def sheets(config: EvaluateConfig, chosen: EvaluationSet) -> list[str]:
    """sheet.png with one prompt of each category, and one of each category with a few more: real,
    base and candidates, each the first seed's.
    """
    names = (REAL, BASE, *config.candidates)
    by_category: dict[str, list[Prompt]] = {}
    for prompt in chosen.prompts:
        if prompt.decoded:
            by_category.setdefault(prompt.category, []).append(prompt)
    groups = {"sheet.png": [prompts[0] for _, prompts in sorted(by_category.items())]}
    for number, (_, prompts) in enumerate(sorted(by_category.items()), start=1):
        if len(prompts) > 1:
            groups[f"sheet-{number:02d}.png"] = prompts[:ROWS_PER_SHEET]
    written = []
    for file, prompts in groups.items():
        rows = []
        for prompt in prompts:
            for name in names:
                mp4 = Clip(name, prompt, 0).mp4
                label = f"{prompt.id[:6]}\n{name[:9]}"
                rows.append((label, read_mp4((config.folder / mp4).read_bytes(), mp4)))
        same = [row for row in rows if row[1].shape == rows[0][1].shape]
        if same:
            contact_sheet(same).save(config.folder / file)
            written.append(file)
    return written


def plot(folder: Path, comparisons: list[Comparison]) -> str:
    """Differences from the base with their intervals, each metric on a scale of its own."""
    rows = [row for row in comparisons if row.low is not None and not row.category]
    if not rows:
        return ""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.metric for row in rows))
    figure = Figure(figsize=(7, 1.2 * len(names) + 0.4), layout="constrained")
    axes = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for axis, name in zip(axes, names, strict=True):
        of_name = [row for row in rows if row.metric == name]
        for place, row in enumerate(of_name):
            assert isinstance(row.difference, float)
            assert row.low is not None and row.high is not None
            error = [[row.difference - row.low], [row.high - row.difference]]
            axis.errorbar([row.difference], [place], xerr=error, fmt="o", color="black", capsize=3)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(of_name)), [row.variant for row in of_name])
        axis.set_ylim(-0.6, len(of_name) - 0.4)
        axis.set_title(f"{name}: difference from the base", loc="left", fontsize=9)
    figure.savefig(folder / "differences.png", dpi=110)
    return "differences.png"
