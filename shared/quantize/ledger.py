"""The ledger of a search: what each candidate measured, kept in a file, so that an interrupted search goes on where it was."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import TypeAdapter, ValidationError

from shared.command.errors import ToolError
from shared.files.atomic import draft_beside
from shared.metrics.output_error import OutputError
from shared.quantize.request import Precisions


@dataclass(frozen=True)
class Outcome:
    """What a candidate measured.

    Args:
        size_bytes: Size of its file; 0 where the quantizer or the runtime refuses it.
        errors: Error of each output against the float model's, in the model's order.
        tensor: Error of a tensor inside the model, where one was asked for.
        slowdown: Its latency over the float model's, one thread each, where that was asked for.
    """

    size_bytes: int
    errors: list[OutputError]
    tensor: OutputError | None = None
    slowdown: float | None = None


class Job(Protocol):
    """One candidate to measure, complete: it can be sent to another process or machine."""

    def measure(self) -> Outcome:
        """Quantize the candidate and run it.

        Raises:
            RefusedError: The quantizer or the runtime refuses the candidate.
            ToolError: The model or the samples can't be read here, or are others.
        """


MakeJob = Callable[[Precisions, bool], Job]  # precisions, and whether to time the candidate


class RefusedError(ToolError):
    """The quantizer or the runtime refuses a candidate; others may do."""


def measure_safely(job: Job) -> Outcome:
    """Measure a candidate; a refused one has a size of 0."""
    try:
        return job.measure()
    except RefusedError:
        return Outcome(0, [])


class Ledger:
    """Measurements in a file of JSON lines, each written before the next step depends on it.

    Args:
        path: The file; made where there is none. None keeps the measurements in memory alone.
        identity: What the measurements are of; a ledger of something else is started anew.

    Raises:
        ToolError: The file is no ledger.
    """

    def __init__(self, path: Path | None, identity: dict[str, str]) -> None:
        self._known: dict[str, Outcome] = {}
        self._file = None
        if path is not None:
            head = json.dumps({"edgepress": "search", **identity}, sort_keys=True)
            self._read(path, head)
            with draft_beside(path) as draft:  # what was read is written again: the last line may have been cut off
                lines = [head, *(self._line(key, outcome) for key, outcome in self._known.items())]
                draft.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
                draft.replace(path)
            self._file = path.open("a", encoding="utf-8")
        self.resumed = len(self._known)

    def _read(self, path: Path, head: str) -> None:
        if not path.exists():
            return
        first, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        if not _is_head(first):
            raise ToolError("this file is no search ledger", where=path, remedy="move it away, or choose another output with -o")
        for line in lines if first == head else ():
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = TypeAdapter(Outcome).validate_python(entry["outcome"])
            except (ValueError, KeyError, TypeError, ValidationError):
                return

    @staticmethod
    def _line(key: str, outcome: Outcome) -> str:
        return json.dumps({"key": key, "outcome": TypeAdapter(Outcome).dump_python(outcome, mode="json")})

    def get(self, key: str) -> Outcome | None:
        """Return what was measured under a key."""
        return self._known.get(key)

    def put(self, key: str, outcome: Outcome) -> None:
        """Keep a measurement, on disk first."""
        if self._file is not None:
            self._file.write(self._line(key, outcome) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self._known[key] = outcome

    def close(self) -> None:
        """Close the file; what was put is on disk already."""
        if self._file is not None:
            self._file.close()


def _is_head(line: str) -> bool:
    """Whether a file's first line is that of a ledger."""
    try:
        return bool(json.loads(line)["edgepress"] == "search")
    except (ValueError, LookupError, TypeError, RecursionError):
        return False
