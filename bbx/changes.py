"""What is other than when a feature file was made: a picture's file, a library's version, what computes and decodes."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

from bbx.errors import StartError, UsageError
from bbx.spec import InputFile, Preprocess

if TYPE_CHECKING:
    from bbx.store import FeatureFile

_PACKAGES = ("bbx", "torch", "torchvision", "timm", "transformers", "numpy", "pillow")


def no_gpu(preprocess: Preprocess, device: str) -> str:
    """Why the device does not decode as the run had it done; nothing where it does, or need not."""
    if preprocess.decode != "gpu":
        return ""
    import torch

    from bbx.gpu_decode import check

    try:
        check(preprocess, torch.device(device))
    except (UsageError, StartError) as error:
        return error.message
    return ""


def changed(before: InputFile, now: InputFile) -> tuple[str, ...]:
    """How a picture's file differs from the one that was read, as far as that is recorded."""
    if before == InputFile():
        return ()
    if before.digest and now.digest:
        if before.digest == now.digest:
            return ()
        return (f"the picture's content changed since: it had {before.nbytes} bytes, and has {now.nbytes}",)
    if before.nbytes != now.nbytes:
        return (f"the picture's file changed since: it had {before.nbytes} bytes, and has {now.nbytes}",)
    if before.mtime_ns != now.mtime_ns:
        return ("the picture's file was written again since, with the same size",)
    return ()


def changes(file: FeatureFile, *, device: str) -> Iterator[str]:
    """What computes now, against what computed at the last start; files are not trusted to say any of it."""
    last = file.attempts[-1] if file.attempts else {}
    recorded = last.get("versions")
    versions: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    for name in ("python", *_PACKAGES):
        if name in versions and versions[name] != (now := _version(name)):
            yield f"{name} was {str(versions[name])[:40]} and is {now}"
    before, _, make = str(last.get("device", "")).partition(" ")
    if before and before.partition(":")[0] != device.partition(":")[0]:
        yield f"the features were computed on {before[:40]}, and now on {device}"
    preprocess = file.run.preprocess
    if preprocess.decode == "gpu":
        yield from _changed_gpu(preprocess, make.strip("()"), device)


def _changed_gpu(preprocess: Preprocess, make: str, device: str) -> Iterator[str]:
    """How what decoded the pictures differs; `make` of the device of the last start."""
    import torch

    from bbx.plan import described

    now = described(torch.device(device)).partition(" ")[2].strip("()")
    if no_gpu(preprocess, device):
        yield "the pictures were decoded by a GPU, and now by the CPU, exactly"
    elif make and make != now:
        yield f"the pictures were decoded by {make[:60]}, and now by {now}, which may round otherwise"


def _version(name: str) -> str:
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
