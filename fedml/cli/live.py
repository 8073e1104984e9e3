"""A simulation's progress: a bar on a terminal, a line for each round anywhere else."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from fedml.simulation.results import Entry

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_NAMED = 3  # missing sites that are named in a round's lines


class Live:
    """Tells of each round as it is committed, from round `done` of `rounds` on."""

    def __init__(self, rounds: int, done: int = 0) -> None:
        self._rounds, self._done = rounds, done
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._shown = ""

    def __enter__(self) -> Live:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("round {task.completed:.0f} of {task.total:.0f}"),
                BarColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[shown]}"),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                "", total=self._rounds, completed=self._done, shown="", rate=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def tell(self, entry: Entry) -> None:
        """Show one more round or evaluation."""
        receipt = entry.receipt
        numbers = {**receipt.metrics, **receipt.scores}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
        if self._bar is None or self._task is None:
            _print(entry, shown)
            return
        if receipt.scores:
            self._shown = shown
        pace = self._bar.tasks[0].speed
        rate = f"{pace:.1f} rounds/s" if pace else ""
        done = receipt.round if receipt.kind == "train" and receipt.model else None
        self._bar.update(self._task, completed=done, shown=self._shown or shown, rate=rate)


def _print(entry: Entry, shown: str) -> None:
    receipt = entry.receipt
    what = "round" if receipt.kind == "train" else "scores after round"
    who = f"{len(receipt.counted)} of {len(receipt.asked)} sites"
    print(f"{what} {receipt.round}: {who}" + (f", {shown}" if shown else ""))
    for word, named in (("without", receipt.missing), ("little of", receipt.damped)):
        for site, reason in list(named.items())[:_NAMED]:
            print(f"  {word} {site}: {reason}")
        if len(named) > _NAMED:
            print(f"  {word} {len(named) - _NAMED} more")
