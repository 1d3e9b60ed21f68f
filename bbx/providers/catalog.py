"""What is known of every model without importing a library: names, families, sizes, strides, published weights.

`catalog.json` beside this file is measured, not written: `python -m tests.catalog` builds each architecture on torch's
meta device and writes it; a test of CI's slow suite holds it to what it measures. It names the versions it was measured
with; names that another version of a library adds are asked of that library, which then is imported.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("catalog.json")


@cache
def rows(provider: str) -> dict[str, dict[str, Any]]:
    """Model name → `family`, `parameters`, `stride` (of the last stage, pixels), `stages` (how many), `weights`."""
    found: dict[str, dict[str, Any]] = _content(FILE)["models"].get(provider, {})
    return found


@cache
def is_current(provider: str) -> bool:
    """Whether the catalogue was measured with the very version of the library that is installed here."""
    measured: dict[str, str] = _content(FILE)["versions"]
    if provider not in measured:
        return bool(rows(provider))  # bbx's own
    try:
        return metadata.version(provider) == measured[provider]
    except metadata.PackageNotFoundError:
        return True  # nothing newer is here


@cache
def _content(path: Path) -> Any:
    """Parsed once for all providers: each time takes longer than everything else that finds a model's name."""
    return json.loads(path.read_text())
