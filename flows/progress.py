"""What a stage says while it works: lines in the run's log, and a progress artifact."""

import time
from typing import cast
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException

EVERY_S = 30.0
"""Seconds between two lines, and between two updates of the progress."""


class RunLog:
    """A ``segbatch.jobs.Watch`` for a Prefect task: use it inside one.

    Args:
        name: of the pipeline.
        stage: of the stage.
    """

    def __init__(self, name: str, stage: str) -> None:
        self._log = get_run_logger()
        self._key = f"{name}-{stage}-progress"
        self._stage = stage
        self._artifact: UUID | None = None
        self._unit = ""
        self._total = self._done = self._bad = 0
        self._began = self._said = 0.0

    def say(self, text: str) -> None:
        """A line in the log."""
        self._log.info(text)

    def begin(self, what: str, total: int, unit: str = "images") -> None:
        """A line and a progress of 0 %."""
        self._total, self._unit, self._done, self._bad = total, unit, 0, 0
        self._began = self._said = time.monotonic()
        self._log.info("%s: %d %s", what, total, unit)
        self._show()

    def advance(self, done: int, bad: int) -> None:
        """A line and the progress, every 30 s."""
        self._done, self._bad = done, bad
        now = time.monotonic()
        if now - self._said < EVERY_S or not done:
            return
        self._said = now
        rate = done / (now - self._began)
        left = (self._total - done) / rate
        note = f", {bad} bad" if bad else ""
        self._log.info("%d of %d %s, %.1f/s, ETA %.0f s%s", done, self._total, self._unit, rate, left, note)
        self._show()

    def end(self) -> None:
        """The progress as it stands."""
        self._show()

    def _show(self) -> None:
        """Write the progress artifact; work does not stop because it cannot be shown."""
        percent = 100.0 * min(self._done / self._total, 1.0) if self._total else 100.0
        words = f"{self._stage}: {self._done} of {self._total} {self._unit}, {self._bad} bad"
        try:
            if self._artifact is None:
                created = create_progress_artifact(progress=percent, key=self._key, description=words)
                self._artifact = cast(UUID, created)  # a coroutine only where an event loop runs
            else:
                update_progress_artifact(self._artifact, progress=percent, description=words)
        except (httpx.HTTPError, PrefectException) as error:
            self._log.warning("the progress cannot be shown: %s", error)
