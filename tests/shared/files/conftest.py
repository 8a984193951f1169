"""A tool that only shouts, to build products with."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from shared.files.artifacts import build
from shared.files.plan import Plan, Product


@dataclass(frozen=True)
class Found:
    """What the pretended tool found."""

    letters: int
    ok: bool = True


class Work:
    """A pretended tool that counts how often it really worked."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "source.txt"
        self.source.write_text("abc")
        self.plan = Plan(folder / "out.txt", "verify", {"shout": True}, [self.source], ["numpy"])
        self.times = 0
        self.ok = True

    def make(self, draft: Path) -> Found:
        self.times += 1
        text = self.source.read_text()
        draft.write_text(text.upper())
        return Found(len(text), self.ok)

    def build(self, **changes: object) -> tuple[Product, Found]:
        return build(replace(self.plan, **changes), Found, self.make)  # type: ignore[arg-type]


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)
