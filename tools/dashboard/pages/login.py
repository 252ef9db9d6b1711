"""Log in with the token of --token-file."""

import hmac

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from tools.dashboard.guard import SESSION_COOKIE
from tools.dashboard.render import View


def login(request: Request) -> Response:
    view = View(request, "login", outside=True)
    if not view.state.token:
        return RedirectResponse("/", 303)
    return view.answer("login.html")


async def enter(request: Request) -> Response:
    """Compare in constant time; an address that guesses has to wait."""
    view = View(request, "login", outside=True)
    peer = request.client.host if request.client else ""
    if not view.state.attempts.allowed(peer):
        return PlainTextResponse(view.t("login.too_many"), 429)
    form = await request.form(max_fields=5, max_files=0)
    given = form.get("token", "")
    token = given.strip() if isinstance(given, str) else ""
    if not view.state.token or not hmac.compare_digest(token.encode(), view.state.token.encode()):
        view.state.attempts.failed(peer)
        return PlainTextResponse(view.t("login.wrong"), 401)
    response = Response(status_code=204, headers={"hx-redirect": "/"})
    response.set_cookie(
        SESSION_COOKIE,
        view.state.session,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return response
