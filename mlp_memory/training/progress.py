"""One progress bar: redrawn on a terminal, a plain line every few seconds elsewhere."""

import sys
import time

from tqdm import tqdm

_LINE_SECONDS = 15.0
_WORTH_A_LINE_SECONDS = 2.0


class Progress:
    """Shows what is being done, how much of it, the rate and the time left.

    Args:
      what: name of the work.
      total: units in all.
      unit: what is counted ("rows", "steps", "tokens").
      done: units already finished by an earlier start; they do not count into the rate.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0):
        self._what, self._total, self._unit = what, total, unit
        self._start_done, self._done, self._start = done, done, time.monotonic()
        self._last_line, self._printed, self._figures = self._start, None, {}
        self._written = 0
        self._bar = (
            tqdm(total=total, initial=done, unit=f" {unit}", desc=what, unit_scale=True, dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif (
            exc[0] is None
            and self._printed != self._done
            and time.monotonic() - self._start >= _WORTH_A_LINE_SECONDS
        ):
            self._print_line()

    def advance(self, count: int, written: int = 0, **figures: float) -> None:
        """Counts `count` more units and `written` more bytes.

        `figures` (a loss, say) are shown beside the rate.
        """
        self._done += count
        self._written += written
        self._figures.update(figures)
        if self._bar is not None:
            shown = {k: f"{v:.4g}" for k, v in self._figures.items()}
            if self._written:
                shown["written"] = f"{tqdm.format_sizeof(self._written)}B"
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._print_line()

    def note(self, text: str) -> None:
        """Prints a line of its own without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _print_line(self) -> None:
        now = time.monotonic()
        rate = (self._done - self._start_done) / max(now - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else float("inf")
        figures = "".join(f", {k} {v:.4g}" for k, v in self._figures.items())
        if self._written:
            figures += f", {tqdm.format_sizeof(self._written)}B written"
        share = 100.0 * self._done / max(self._total, 1)
        print(
            f"{self._what}: {self._done:,} of {self._total:,} {self._unit} ({share:.0f} %), "
            f"{rate:,.1f} {self._unit}/s, {tqdm.format_interval(left) if left < 1e9 else '?'} left{figures}",
            file=sys.stderr,
            flush=True,
        )
        self._last_line, self._printed = now, self._done
