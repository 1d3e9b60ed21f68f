"""float32 products are computed as float32, or in TF32 where that is asked for, whatever the process has chosen.

torch's switches for them are the whole process's, and other threads may want others: forwards on CUDA that want the
same share the switches, and one that wants others waits until they are done; on a CPU all want the same, and none
waits. The last puts the process's own choice back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch

_turn = threading.Condition()
_waiting: deque[object] = deque()
"""In the order in which they came, lest one waits for ever."""
_inside: dict[object, bool] = {}
"""Whether each computes on CUDA."""
_tf32: bool | None = None
"""What CUDA's switches are set to; None while nobody inside has asked."""
_restore: list[Callable[[], None]] = []
_own = threading.local()
# What a CPU's products may be instead, as after set_float32_matmul_precision("medium"), where the processor can.
_LESS = ("tf32", "bf16")


def products(device: torch.device, *, tf32: bool) -> AbstractContextManager[None]:
    """Holds for what is computed on `device` while this lasts; what is traced for a compiler, it leaves alone."""
    return nullcontext() if torch.compiler.is_compiling() else _held(device.type == "cuda", tf32)


@contextmanager
def _held(cuda: bool, tf32: bool) -> Iterator[None]:
    if getattr(_own, "inside", False):  # a forward within a forward goes by the outer one
        yield
        return
    ticket = object()
    try:
        _own.inside = _enter(ticket, cuda, tf32)
        yield
    finally:
        _own.inside = False
        _leave(ticket)


def _enter(ticket: object, cuda: bool, tf32: bool) -> bool:
    """Whether the switches are held now; a CPU whose products are float32 anyway has no need of them."""
    global _tf32, _restore
    with _turn:
        if not cuda and not _inside and not _lessened():
            return False
        if cuda:
            _waiting.append(ticket)
            try:
                _turn.wait_for(lambda: _waiting[0] is ticket and (_tf32 == tf32 or not any(_inside.values())))
            finally:
                _waiting.remove(ticket)
                _turn.notify_all()
        if not _inside:
            _restore, _tf32 = _restoring(), None
        _inside[ticket] = cuda
        for kind in _cpu_kinds():
            kind.fp32_precision = "ieee"
        # Before torch 2.9 the one word for all kinds is among CUDA's.
        if _tf32 != tf32 if cuda else _tf32 is None and not _cpu_kinds():
            _tf32 = tf32
            _choose(tf32)
        return True


def _leave(ticket: object) -> None:
    """Of no effect for whoever never was inside."""
    with _turn:
        if ticket in _inside:
            del _inside[ticket]
            try:
                if not _inside:
                    for put_back in _restore:
                        put_back()
            finally:
                _turn.notify_all()


def _lessened() -> bool:
    """Whether a CPU's products may be less than float32; before torch 2.9, one word said so for all kinds."""
    kinds = _cpu_kinds()
    if not kinds:
        return torch.get_float32_matmul_precision() == "medium"
    return any(kind.fp32_precision in _LESS for kind in kinds)


def _cpu_kinds() -> list[Any]:
    mkldnn: Any = torch.backends.mkldnn
    kinds = [getattr(mkldnn, name, None) for name in ("matmul", "conv", "rnn")]
    return [kind for kind in kinds if hasattr(kind, "fp32_precision")]


def _switches() -> tuple[Any, Any]:
    backends: Any = torch.backends
    return backends.cuda.matmul, backends.cudnn


def _words() -> list[Any]:
    """CUDA's kinds of operation by the words of torch 2.9; what a process says by them, the switches may not reach."""
    matmul, cudnn = _switches()
    places = (matmul, *(getattr(cudnn, name, None) for name in ("conv", "rnn")))
    return [place for place in places if hasattr(place, "fp32_precision")]


def _restoring() -> list[Callable[[], None]]:
    """What puts back the choice that there is now, in this order: the first two change what the words say, too."""
    found: list[Callable[[], None]] = []
    for switch in _switches():
        with suppress(RuntimeError):  # then words alone say what was wanted, and the switch cannot be read
            found.append(partial(setattr, switch, "allow_tf32", switch.allow_tf32))
    with suppress(RuntimeError):
        found.append(partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    return [*found, *(partial(_say, kind, kind.fp32_precision) for kind in (*_words(), *_cpu_kinds()))]


def _say(kind: Any, word: str) -> None:
    """Has `kind` be `word`, by itself only where it does not follow from what is said of all kinds."""
    kind.fp32_precision = "none"
    if kind.fp32_precision != word:
        kind.fp32_precision = word


def _choose(tf32: bool) -> None:
    for switch in _switches():
        switch.allow_tf32 = tf32
    for kind in _words():
        kind.fp32_precision = "tf32" if tf32 else "ieee"
