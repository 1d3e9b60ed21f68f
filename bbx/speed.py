"""What `bench` found, told in Rich: the progress on stderr, the findings on stdout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.text import Text

from bbx.console import grid_of, open_console, plain, rate_text, table

if TYPE_CHECKING:
    from bbx.bench import Bench


@contextmanager
def telling() -> Iterator[Callable[[str], None] | None]:
    """Gives the function to call with what is being measured; a line that changes on a terminal, silence in a log."""
    console = open_console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with console.status("measuring") as status:
        yield lambda what: status.update(plain(f"measuring {what}"))


def bench(result: Bench) -> None:
    """`bbx bench`, on stdout."""
    from bbx.store import size_text

    rates, console = result.rates, open_console(stderr=False)
    pictures = f"{result.images:,} {'pictures made here, 640×480' if result.made else 'images'}"
    lines = [
        ("model", f"{result.model}, weights {result.weights}, stages {', '.join(result.stages)}"),
        ("device", f"{result.device}, {result.precision}, batches of {result.batch_size}, {result.workers} decoders"),
        ("engine", result.engine.describe()),
        ("images", pictures),
    ]
    console.print(grid_of(lines))
    shown = table("", "images/s", "")
    for what, rate, remark in _rows(result):
        shown.add_row(plain(what), plain(rate_text(rate)), plain(remark))
    console.print(shown)
    sizes = ", ".join(f"{one.batch_size}: {rate_text(one.rate)}" for one in result.batches)
    used = f"these stages take {result.early_exit:.0%} of the whole network's time"
    store = f"{result.store_share:.0%} of plain writing ({size_text(result.raw_nbytes)}/s)"
    end = f"{result.share:.0%} of the limit, {rates.limit}"
    if rates.cores is not None:
        end += f"; {result.expected_share:.0%} of what shared cores allow, {rate_text(rates.expected)}"
    findings = [
        ("batch sizes", f"{sizes}; {result.batches_why}"),
        ("early exit", used),
        ("store", store),
        ("end to end", end),
        ("best", f"{result.best_engine}, batches of {result.best_batch_size}"),
    ]
    console.print(grid_of(findings))
    for line in result.notes:
        console.print(Text("note: ", "yellow") + plain(line), soft_wrap=True)
    console.print(plain(result.command), soft_wrap=True)


def _rows(result: Bench) -> Iterator[tuple[str, float, str]]:
    rates = result.rates
    yield "decode", rates.decode, "exact, the default"
    yield "decode", result.decode_fast, "--decode fast"
    if result.decode_gpu is not None:
        yield "decode", result.decode_gpu, "--decode gpu"
    yield "forward", rates.compute, "as bbx extract runs it"
    yield "forward", result.plain, "plain eager, one stream"
    if result.compiled is not None:
        yield "forward", result.compiled, "--engine compile"
    yield "forward", result.whole, "the whole network, to its last stage"
    yield "store", rates.store, "bbx's file, on this disk"
    yield "end to end", result.end_to_end, f"{result.end_rows:,} images, once under way"
