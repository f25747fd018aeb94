"""A headless browser, driven through its DevTools protocol over a pipe: the standard library alone.

with Browser(find_browser()) as browser:
    sight = browser.look(path, width=390, height=844, phone=True)
"""

import base64
import dataclasses
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "chrome-headless-shell",
)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
# A machine may be busy: what takes this long is broken, not slow.
_SECONDS = 240.0

_MEASURE = """(() => {
  const seen = (e) => { const b = e.getBoundingClientRect(), s = getComputedStyle(e);
    return [b.left, b.right, b.width, b.height, s.visibility === "visible" && s.display !== "none"]; };
  const clipped = (e) => { for (let p = e.parentElement; p; p = p.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(p).overflowX)) return true; return false; };
  const width = document.documentElement.clientWidth;
  return {
    width, scrolled: Math.max(document.documentElement.scrollWidth, document.body.scrollWidth),
    plots: [...document.querySelectorAll("svg")].map(seen),
    beyond: [...document.querySelectorAll("main *:not(svg *)")].filter((e) => e.getClientRects().length &&
      e.getBoundingClientRect().right > width + 0.5 && !clipped(e)).map((e) => e.outerHTML.slice(0, 200)),
    text: document.body.innerText,
  };
})()"""


@dataclasses.dataclass(frozen=True)
class Sight:
    """What was seen of a page.

    Attributes:
      errors: errors and warnings of the console, of scripts and of the browser itself.
      requests: every address asked for, the page's own first.
      width, scrolled: CSS pixels of the viewport, and of all that can be reached by scrolling sideways.
      plots: of each `<svg>` left, right, width, height and whether it is shown.
      beyond: beginnings of the elements that reach beyond the viewport, what scrolls in its own box left out.
      text: all that is shown.
    """

    errors: list[str]
    requests: list[str]
    width: int
    scrolled: int
    plots: list[list[Any]]
    beyond: list[str]
    text: str


def find_browser() -> str | None:
    """The first Chromium on the path."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A browser process with a profile of its own, for as long as the context lasts."""

    def __init__(self, program: str):
        self._program, self._profile = program, Path(tempfile.mkdtemp(prefix="browser-"))
        self._count, self._buffer, self._events = 0, b"", []

    def __enter__(self) -> "Browser":
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        # Beyond 10, so that neither is 3 or 4 before it becomes that.
        moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_in, theirs_out)]
        self._log = self._profile / "stderr"
        quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
        quiet += [(os.POSIX_SPAWN_OPEN, 2, str(self._log), os.O_WRONLY | os.O_CREAT, 0o600)]
        self._pid = os.posix_spawn(
            self._program,
            [self._program, *_FLAGS, f"--user-data-dir={self._profile / 'profile'}", "about:blank"],
            {**os.environ, "HOME": str(self._profile)},
            file_actions=[*quiet, *((os.POSIX_SPAWN_DUP2, end, to) for end, to in zip(moved, (3, 4)))],
            setpgroup=0,
        )
        for end in (theirs_in, theirs_out, *moved):
            os.close(end)
        os.set_blocking(self._from, False)
        try:
            target = self._ask("Target.createTarget", url="about:blank")["targetId"]
            self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Runtime", "Log", "Network", "Page"):
                self._ask(f"{domain}.enable", page=True)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self._to)
        os.close(self._from)
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        shutil.rmtree(self._profile, ignore_errors=True)

    def look(
        self,
        page: Path,
        width: int,
        height: int,
        phone: bool = False,
        dark: bool = False,
        picture: Path | None = None,
    ) -> Sight:
        """Loads a file and says what came of it; the whole page as a PNG if `picture` is given."""
        scale = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self._ask("Emulation.setDeviceMetricsOverride", page=True, **scale)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", page=True, features=[scheme])
        self._events.clear()
        self._ask("Page.navigate", page=True, url=page.absolute().as_uri())
        deadline = time.monotonic() + _SECONDS
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read(deadline)
        found = self._ask("Runtime.evaluate", page=True, expression=_MEASURE, returnByValue=True)
        if picture is not None:
            shot = self._ask("Page.captureScreenshot", page=True, captureBeyondViewport=True)
            picture.write_bytes(base64.b64decode(shot["data"]))
        errors = [error for event in self._events for error in _errors(event)]
        asked = [event["params"] for event in self._events if event["method"] == "Network.requestWillBeSent"]
        return Sight(errors, [each["request"]["url"] for each in asked], **found["result"]["value"])

    def _ask(self, method: str, page: bool = False, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if page else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _SECONDS
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _read(self, deadline: float) -> dict[str, Any]:
        """The next message, an answer or an event; events are kept."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._from, 1 << 20) if ready else b""
            if not data:
                why = "closed its pipe" if ready else f"said nothing for {_SECONDS:.0f} s"
                raise RuntimeError(f"{self._program} {why}: {self._log.read_text(errors='replace')[-2000:]}")
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message


def _errors(event: dict[str, Any]) -> list[str]:
    params = event.get("params", {})
    if event["method"] == "Runtime.exceptionThrown":
        return [str(params["exceptionDetails"])]
    if event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
        return [f"console: {params['args']}"]
    if event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
        return [f"{params['entry']['source']}: {params['entry']['text']}"]
    return []
