"""A headless Chromium for pages on this disk, driven by Playwright: no server, and no browser of Playwright's own."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MISSING = (
    "no Chromium: install one that is on the PATH as "
    + ", ".join(NAMES)
    + " (Debian, Ubuntu: apt-get install chromium; others: playwright install chromium --with-deps, and link it there)"
)
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}


def chromium() -> str | None:
    """The path of a Chromium, None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def launched() -> Iterator[Any]:
    """Playwright's Browser. Raises FileNotFoundError where there is no Chromium."""
    from playwright.sync_api import sync_playwright

    path = chromium()
    if path is None:
        raise FileNotFoundError(MISSING)
    with sync_playwright() as playwright:
        # Containers seldom let it make a sandbox of its own; the pages are ours.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


class Opened:
    """A page of this disk as it was opened: `page` (Playwright's), and what it said (`errors`) and asked for
    (`requests`), which are to be looked at when all is done.
    """

    def __init__(
        self, browser: Any, path: Path, *, size: dict[str, int] = DESKTOP, theme: str = "light", **context: Any
    ):
        self.context = browser.new_context(viewport=size, color_scheme=theme, **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on(
            "console", lambda line: self.errors.append(line.text) if line.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.absolute().as_uri())

    def drawn(self) -> "Opened":
        """Once every plot and the list of trajectories are there."""
        self.page.wait_for_selector("html[data-page=drawn]", state="attached")
        return self

    def close(self) -> None:
        self.context.close()
