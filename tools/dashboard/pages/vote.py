"""Vote: blind pairs of an evaluation, one at a time, two questions each."""

from pathlib import Path
from typing import NamedTuple

import xxhash
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from tools.dashboard import exports, media
from tools.dashboard.files import FileProblem
from tools.dashboard.pages.compare import chosen_result
from tools.dashboard.pages.decisions import csv_response
from tools.dashboard.pairs import QUESTIONS, Pair, pairs_of
from tools.dashboard.render import PERSON_COOKIE, View
from tools.dashboard.review import (
    ANSWERS,
    MAX_PERSON_CHARS,
    ReviewError,
    Vote,
    clean_line,
    now,
)
from tools.dashboard.sources import RESULT_FILE
from tools.evaluate.result import Result


class Ballot(NamedTuple):
    """Where a rater stands with an evaluation. `pair` is None when all is answered."""

    evaluation: str
    folder: Path
    result_hash: str
    pairs: list[Pair]
    num_done: int
    pair: Pair | None
    question: str


def ballot_of(view: View) -> Ballot | FileProblem | None:
    """The evaluation that is asked for, and the first question that this rater has not answered."""
    name, result = chosen_result(view)
    if not isinstance(result, Result):
        return result
    folder = view.state.evaluations()[name]
    # votes belong to these very clips: an evaluation that is made again starts from none
    result_hash = view.state.recent.get(("result", folder), lambda: _hash(folder / RESULT_FILE))
    pairs = pairs_of(result, view.person, view.state.secret, result_hash)
    votes = view.state.review.votes(result_hash, view.person) if view.person else []
    answered = {(vote.pair, bool(vote.repeated), vote.question) for vote in votes}
    open_questions = [
        (pair, question)
        for pair in pairs
        for question in QUESTIONS
        if (pair.name, pair.repeated, question) not in answered
    ]
    pair, question = open_questions[0] if open_questions else (None, "")
    done = sum((each.name, each.repeated, QUESTIONS[-1]) in answered for each in pairs)
    return Ballot(name, folder, result_hash, pairs, done, pair, question)


def _hash(path: Path) -> str:
    try:
        return xxhash.xxh3_128_hexdigest(path.read_bytes())
    except OSError:
        return ""


def vote(request: Request) -> Response:
    view = View(request, "vote")
    ballot = ballot_of(view)
    return view.answer(
        "vote.html",
        evaluations=list(view.state.evaluations()),
        evaluation=ballot.evaluation if isinstance(ballot, Ballot) else "",
        problem=ballot if isinstance(ballot, FileProblem) else None,
        ballot=ballot if isinstance(ballot, Ballot) else None,
        max_person=MAX_PERSON_CHARS,
    )


async def answer(request: Request) -> Response:
    """One answer; the page then asks the next question."""
    form = await request.form(max_fields=10, max_files=0)
    fields = {name: value for name, value in form.items() if isinstance(value, str)}
    return await media.in_thread(_answer, View(request, "vote"), fields)


def _answer(view: View, fields: dict[str, str]) -> Response:
    ballot = ballot_of(view)
    if not isinstance(ballot, Ballot):
        raise HTTPException(404, view.t("error.gone"))
    if "person" in fields:
        response = Response(status_code=204, headers={"hx-refresh": "true"})
        view.set_cookie(response, PERSON_COOKIE, clean_line(fields["person"], MAX_PERSON_CHARS))
        return response
    pair = next((each for each in ballot.pairs if each.token == fields.get("pair")), None)
    question = fields.get("question", "")
    if pair is None or question not in QUESTIONS or fields.get("answer") not in ANSWERS:
        raise HTTPException(400, view.t("vote.nonsense"))
    if not view.person:
        raise HTTPException(400, view.t("vote.who"))
    try:
        view.state.review.vote(
            Vote(
                evaluation=ballot.evaluation,
                result_xxh3=ballot.result_hash,
                pair=pair.name,
                question=question,
                prompt=pair.prompt_id,
                seed=pair.seed,
                left_variant=pair.left.variant,
                right_variant=pair.right.variant,
                answer=fields["answer"],
                repeated=int(pair.repeated),
                rater=view.person,
                time=now(),
            )
        )
    except ReviewError:
        # a second press of the same key: the first answer stands
        pass
    if question == QUESTIONS[0]:
        return view.answer("_question.html", ballot=ballot, pair=pair, question=QUESTIONS[1])
    return Response(status_code=204, headers={"hx-refresh": "true"})


def clip(request: Request) -> Response:
    """The left or the right clip of a showing; its URL says no more than that."""
    view = View(request)
    ballot = ballot_of(view)
    token, side = request.path_params["token"], request.path_params["side"]
    if not isinstance(ballot, Ballot) or side not in ("left", "right"):
        raise HTTPException(404, view.t("error.gone"))
    pair = next((each for each in ballot.pairs if each.token == token), None)
    if pair is None:
        raise HTTPException(404, view.t("error.gone"))
    shown = pair.left if side == "left" else pair.right
    path = media.folder_file(ballot.folder, shown.file)
    if path is None:
        raise HTTPException(404, view.t("error.gone"))
    return media.file_answer(path)


def download(request: Request) -> Response:
    """All votes about the evaluation's present result, for tools.evaluate and spreadsheets."""
    view = View(request)
    ballot = ballot_of(view)
    if not isinstance(ballot, Ballot):
        return RedirectResponse("/vote", 303)
    rows = view.state.review.votes(ballot.result_hash)
    name = ballot.evaluation.replace("/", "-")
    return csv_response(exports.csv_bytes(Vote._fields, rows), f"votes-{name}.csv")
