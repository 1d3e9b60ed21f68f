"""float32 products are computed as float32, or in TF32 where that is asked for, whatever the process has chosen.

torch's switches for them are the whole process's, and other threads may want others: forwards that want the same share
the switches, and one that wants others waits until they are done. The last puts the process's own choice back.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

_turn = threading.Condition()
_waiting: deque[object] = deque()
"""In the order in which they came, lest one waits for ever."""
_inside = 0
_tf32 = False
_restore: list[Callable[[], None]] = []
_own = threading.local()
# Words of torch 2.9 and later for a CPU's products; what is less than float32 is rare, as set_float32_matmul_precision
# ("medium") is, and then oneDNN computes in bfloat16 where the processor can.
_LESS = ("tf32", "bf16")


@contextmanager
def products(device: torch.device, *, tf32: bool) -> Iterator[None]:
    """Holds for what is computed while this lasts, on the CPU and on CUDA; a graph is traced as the process has it."""
    if torch.compiler.is_compiling() or getattr(_own, "inside", False):
        yield
        return
    _own.inside = _entered(device, tf32)
    try:
        yield
    finally:
        if _own.inside:
            _leave()
        _own.inside = False


def _entered(device: torch.device, tf32: bool) -> bool:
    """Whether the switches are held, for a call of `_leave`; a CPU whose products are float32 anyway needs none."""
    global _inside, _tf32, _restore
    with _turn:
        if device.type != "cuda" and not _inside and not _waiting and not _lessened():
            return False
        ticket = object()
        _waiting.append(ticket)
        try:
            _turn.wait_for(lambda: _waiting[0] is ticket and (not _inside or _tf32 == tf32))
        finally:
            _waiting.remove(ticket)
            _turn.notify_all()
        if not _inside:
            _restore = _restoring()
            _choose(tf32)
            _tf32 = tf32
        _inside += 1
        return True


def _leave() -> None:
    global _inside
    with _turn:
        _inside -= 1
        if not _inside:
            for put_back in _restore:
                put_back()
            _turn.notify_all()


def _lessened() -> list[Any]:
    """A CPU's kinds of operation whose products are not float32."""
    return [kind for kind in _cpu_kinds() if kind.fp32_precision in _LESS]


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
    kinds = [*_words(), *_cpu_kinds()]
    return [*found, *(partial(setattr, kind, "fp32_precision", kind.fp32_precision) for kind in kinds)]


def _choose(tf32: bool) -> None:
    for switch in _switches():
        switch.allow_tf32 = tf32
    for kind in _words():
        kind.fp32_precision = "tf32" if tf32 else "ieee"
    for kind in _cpu_kinds():
        kind.fp32_precision = "ieee"
