"""What the benchmark has measured so far, kept on disk repeat by repeat: a run that breaks off goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from steer_plugin.atomic import atomic_write_json


class Log:
    """Measurements of one run's settings.

    Raises:
        SystemExit: the file is of other settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.repeats: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            old = json.loads(path.read_text(encoding="utf-8"))
            other = [name for name, value in self.settings.items() if old["settings"].get(name) != value]
            if other:
                raise SystemExit(f"{path} is of a run with other settings ({', '.join(other)}): remove it first.")
            self.repeats = old["repeats"]

    def once(self, what: str, seed: int, work: Callable[[], Any]) -> Any:
        """Measure, or return what was measured before."""
        of = self.repeats.setdefault(what, {})
        if str(seed) not in of:
            of[str(seed)] = work()
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write_json(self.path, {"settings": self.settings, "repeats": self.repeats})
        return of[str(seed)]

    def remove(self) -> None:
        """Delete the file: all is in the result."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
