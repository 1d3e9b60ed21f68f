"""Weights: random by a seed, or state dicts, read from files that nobody vouches for, checked and digested.

Never through pickle: `.safetensors`, or torch's `weights_only=True` for `.pth`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import re
import socket
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bbx.errors import WeightsError
from bbx.spec import seed_of

WRAPPERS = ("state_dict", "model_state_dict", "model", "model_ema", "module")
"""Under what training checkpoints keep the state dict; the first that is there counts."""
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")


_building = threading.RLock()


@contextmanager
def seeded(seed: int, device: str = "cpu") -> Iterator[None]:
    """Has random weights made meanwhile follow from `seed`, in float32 on `device`, whatever the process's defaults.

    One at a time, for torch's generator and default dtype are the whole process's; afterwards they are as they were.
    """
    number = seed_of(seed)
    # A mode that torch asks at every call, hence only where it changes something.
    placed = torch.device(device) if torch.get_default_device() != torch.device(device) else nullcontext()
    with _building, torch.random.fork_rng(devices=()), placed:
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        torch.default_generator.manual_seed(number)  # not those of GPUs, which torch.manual_seed would seed, too
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def fetch(url: str, *, name: str, hint: str) -> Path:
    """The file at `url` in torch's cache (`$TORCH_HOME/hub/checkpoints`), downloaded once, its hash checked.

    Raises `WeightsError` with the reason and `hint` (what works without a network) when it cannot be had. The
    environment's `HF_HUB_OFFLINE=1`, which clusters set, forbids downloads here too.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if cached.is_file():
        return cached
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise WeightsError(f"{name} is not on this machine, and HF_HUB_OFFLINE forbids fetching it", hint)
    hashed = re.search(r"-([0-9a-f]{8,})\.", cached.name)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # a cluster's firewall drops packets: without this a download hangs for ever
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(cached), hashed and hashed[1], progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        reason = error if hasattr(error, "code") else getattr(error, "reason", error)
        raise WeightsError(f"cannot fetch {name} from {url}: {reason}", hint) from None
    finally:
        socket.setdefaulttimeout(before)
    return cached


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` or torch file, out of a training checkpoint's usual wrapping.

    Raises `WeightsError` when the file is missing, damaged, or holds anything but tensors and plain containers.
    """
    return read_checkpoint(path)[0]


def read_checkpoint(path: Path, wrappers: Sequence[str] = WRAPPERS) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The same, with those of `wrappers` that hold a state dict in the file: it is the first one's."""
    content = _read(path)
    held = tuple(name for name in wrappers if isinstance(content, Mapping) and isinstance(content.get(name), Mapping))
    return _tensors(content[held[0]] if held else content, path), held


def _read(path: Path) -> Any:
    """Whatever the file holds, in plain containers."""
    check_file(path)
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the file's age and kind: what matters becomes an error below
            # timm's training script keeps its arguments beside the weights; reading a Namespace runs no code. Allowed
            # each time, for timm's own reading takes it off the list again.
            torch.serialization.add_safe_globals([argparse.Namespace])
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path} holds Python objects besides tensors, or is damaged; bbx does not run code from weights files",
            "save only the state dict: torch.save(model.state_dict(), 'weights.pth')",
        ) from None
    except Exception as error:  # safetensors and torch raise many kinds for a damaged file
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise WeightsError(
            f"cannot read the weights in {path}: {reason}", "is the file whole? fetch it again"
        ) from None


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    state = {str(name): value for name, value in content.items()} if isinstance(content, Mapping) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"{path} holds no tensors by name", "save with torch.save(model.state_dict(), path)")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex() or tensor.is_quantized:
            kind = "sparse" if tensor.layout != torch.strided else "empty (meta)" if tensor.is_meta else tensor.dtype
            raise WeightsError(f"{path}: {name} is {kind}, not plain numbers", "save a plain state dict")
    return tensors


def check_file(path: Path) -> None:
    """Raises `WeightsError` unless there is a file at `path`."""
    if not path.is_file():
        fault = f"{path} is a folder" if path.is_dir() else f"no weights file {path}"
        raise WeightsError(fault, "give a .safetensors or .pth file, or --weights random")


def load_into(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *,
    head: Iterable[str],
    source: str,
    current: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] = lambda state, _network: state,
) -> tuple[str, ...]:
    """Loads `state` into `network`; only keys of the classifier `head` (name prefixes) may miss or differ in shape.

    `current` gives what an older file holds, prefixes taken off, under the network's names and in its sizes.
    Parameters on the meta device get memory of their own. Returns the modules where some did, which keep random values,
    or none, on the meta device. Raises `WeightsError` listing the keys that do not fit: missing, unexpected, of another
    shape.
    """
    own = network.state_dict()
    state = current(_unprefixed(state, own), network)
    heads = tuple(head)
    misshapen = [name for name in own if name in state and state[name].shape != own[name].shape]
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    tops = {name.split(".")[0] for name in own}
    # A head that this network was built without (auxiliary classifiers) is nobody's loss.
    unexpected = [name for name in state if name not in own and not name.startswith(_AUXILIARY)]
    faults = {
        label: [name for name in names if not name.startswith(heads) or name.split(".")[0] not in tops]
        for label, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
    }
    if any(faults.values()):
        text = "; ".join(f"{len(names)} {label} ({_some(names)})" for label, names in faults.items() if names)
        raise WeightsError(f"{source} does not fit the model: {text}", "is it a checkpoint of this very model?")
    fitting = OrderedDict((name, state[name]) for name in own if name in state and name not in misshapen)
    # Modules that came in versions ask for theirs (MNASNet refuses to load otherwise); names and shapes are today's.
    fitting._metadata = getattr(own, "_metadata", {})  # type: ignore[attr-defined]
    without = any(value.is_meta for value in own.values())
    if without:  # copies: a file that is mapped into memory may be written over
        for name, value in fitting.items():
            fitting[name] = value.detach().to(own[name].dtype, memory_format=torch.contiguous_format, copy=True)
    network.load_state_dict(fitting, strict=False, assign=without)
    left = [*missing, *misshapen, *unexpected]
    return tuple(prefix.rstrip(".") for prefix in heads if any(name.startswith(prefix) for name in left))


def digest(network: nn.Module, *, options: str = "") -> str:
    """SHA-256 (hex) over names, dtypes, shapes and values of the state dict, and `options` that change the forward.

    The classifier counts too: a layer of it can be asked for by path.
    """
    total = hashlib.sha256(options.encode())
    for name, value in sorted(network.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def _unprefixed(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that DataParallel, torch.compile or a Lightning module put before every name."""
    named = dict(state)
    for prefix in _PREFIXES:
        if not any(name in own for name in named) and all(name.startswith(prefix) for name in named):
            named = {name.removeprefix(prefix): value for name, value in named.items()}
    return named


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f", … {len(names) - 4} more" if len(names) > 4 else "")
