"""Why a medium can't be had, or can't be used: stable reason codes that end in the report."""


class FetchError(ValueError):
    """Media that can't be had: a stable reason code, and whether asking again, now or another
    day, may help.
    """

    def __init__(self, reason: str, detail: str, may_pass: bool, wait_s: float = 0.0) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.may_pass, self.wait_s = reason, detail, may_pass, wait_s


class MediaError(ValueError):
    """A file that can't be used. `reason` is a stable code, `detail` says what was found."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it survives pickling between processes
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
