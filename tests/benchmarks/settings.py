"""What a run of the benchmarks was asked for, and where its files lie."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks import pictures


@dataclass(frozen=True)
class Settings:
    """`images` per job; `repeats` of everything that is timed; `options` are passed on to `bbx extract`.

    `device`: where all sides compute.

    `rivals`: only these, all where it is empty; `pythons`: the interpreter of a rival that has its own.
    """

    folder: Path
    images: int = 200
    repeats: int = 5
    jobs: tuple[str, ...] = ("A", "B", "C")
    options: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()
    pythons: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"

    @property
    def words(self) -> tuple[str, ...]:
        """What every `bbx extract` is told besides its job."""
        return ("--device", self.device, *self.options)

    @property
    def pictures(self) -> Path:
        """The folder that every job reads; made on first use."""
        folder = self.folder / "pictures"
        return folder if folder.exists() else pictures.make(folder, self.images)

    def some(self, count: int) -> Path:
        """A folder of `count` pictures; made on first use."""
        folder = self.folder / f"pictures-{count}"
        return folder if folder.exists() else pictures.some(folder, self.pictures, count)

    def large(self, count: int) -> Path:
        """A folder of `count` pictures of full HD; made on first use."""
        folder = self.folder / f"large-{count}"
        return folder if folder.exists() else pictures.make(folder, count, (1920, 1080))

    def python(self, rival: str) -> str:
        """The interpreter that runs it."""
        return self.pythons.get(rival, sys.executable)

    def wants(self, rival: str) -> bool:
        """Whether it takes part."""
        return not self.rivals or rival in self.rivals
