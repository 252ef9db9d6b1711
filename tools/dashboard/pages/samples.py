"""Samples: what a run drew at each step for the same prompts and seeds, the base at the left."""

from pathlib import Path
from typing import NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tools.dashboard import media
from tools.dashboard.files import FileProblem
from tools.dashboard.records import SampleClip, SampleSet
from tools.dashboard.render import View
from tools.dashboard.sources import sample_steps
from tools.dashboard.state import State

SAMPLES_FILE = "samples.json"
MAX_COLUMNS = 6


class Event(NamedTuple):
    """What was drawn at one step, and what its file says of it."""

    step: int
    folder: Path
    found: SampleSet
    problem: str


class Row(NamedTuple):
    """One prompt and seed: a clip per event, None where there is none."""

    prompt: str
    task: str
    seed: int | None
    key: str
    clips: list[tuple[int, int, SampleClip] | None]  # (step, number in its file, clip)


def events_of(state: State, run: Path) -> list[Event]:
    """All sampling events of a run, in the order of steps."""
    events = []
    for step, folder in sample_steps(run).items():
        found = state.json_files.read(folder / SAMPLES_FILE, SampleSet)
        if isinstance(found, FileProblem):
            events.append(Event(step, folder, SampleSet(), f"{found.name}: {found.detail}"))
        elif found is not None:
            events.append(Event(step, folder, found, ""))
    return events


def shown_events(events: list[Event], last: int | None) -> list[Event]:
    """The first one, which is the base, and the MAX_COLUMNS - 1 that end at step `last`."""
    if last is not None:
        events = [event for event in events if event.step <= last] or events[:1]
    return events if len(events) <= MAX_COLUMNS else [events[0], *events[1 - MAX_COLUMNS :]]


def grid(events: list[Event]) -> list[Row]:
    """Prompts against events."""
    rows: dict[tuple[str, str, int | None, str], Row] = {}
    for column, event in enumerate(events):
        for number, clip in enumerate(event.found.clips):
            identity = (clip.prompt, clip.task, clip.seed, clip.key)
            if identity not in rows:
                rows[identity] = Row(*identity, clips=[None] * len(events))
            rows[identity].clips[column] = (event.step, number, clip)
    return list(rows.values())


def samples(request: Request) -> Response:
    view = View(request, "samples")
    runs = view.state.runs()
    with_samples = [name for name, folder in runs.items() if sample_steps(folder)]
    name = view.query("run")
    if name not in with_samples:
        name = next(iter(with_samples), "")
    events = events_of(view.state, runs[name]) if name else []
    shown = shown_events(events, view.integer("step"))
    return view.answer(
        "samples.html",
        runs=with_samples,
        run=name,
        steps=[event.step for event in events],
        events=shown,
        rows=grid(shown),
        newest=shown[-1] if shown else None,
        max_columns=MAX_COLUMNS,
    )


def clip(request: Request) -> Response:
    """A clip by run, step and number; the path comes from samples.json and stays in its folder."""
    view = View(request)
    folder = view.state.runs().get(view.query("run"))
    step = request.path_params["step"]
    event = sample_steps(folder).get(step) if folder else None
    found = view.state.json_files.read(event / SAMPLES_FILE, SampleSet) if event else None
    if event is None or not isinstance(found, SampleSet):
        raise HTTPException(404, view.t("error.gone"))
    number = request.path_params["number"]
    if number >= len(found.clips):
        raise HTTPException(404, view.t("error.gone"))
    path = media.folder_file(event, found.clips[number].file)
    if path is None:
        raise HTTPException(404, view.t("error.gone"))
    return media.file_answer(path)
