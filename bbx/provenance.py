"""What was typed, where, and with which bbx, as a feature file records it: without torch, for `merge` does so, too."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path


def command_facts() -> dict[str, object]:
    """What was typed, where, and with which bbx."""
    return {"command": shlex.join(sys.argv), "cwd": str(Path.cwd()), "revision": revision()}


def revision() -> str | None:
    """The git commit of this bbx, where it was installed from git or runs in a checkout, with `-dirty` if changed."""
    try:
        origin = json.loads(metadata.distribution("bbx").read_text("direct_url.json") or "{}")
        if commit := origin.get("vcs_info", {}).get("commit_id"):
            return str(commit)
        root = Path(__file__).parent.parent
        if not (root / ".git").exists():
            return None
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--match="]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, ValueError, AttributeError, metadata.PackageNotFoundError, subprocess.SubprocessError):
        return None  # provenance is told where it is known, and never ends a run
