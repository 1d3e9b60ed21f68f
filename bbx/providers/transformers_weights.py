"""Building transformers' networks with random, published or local weights, every key accounted for.

Weights go through `from_pretrained` always, since only that knows the names which older checkpoints use. Not itself a
provider.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import is_offline_mode

from bbx.errors import WeightsError
from bbx.providers.transformers_families import Family
from bbx.weights import read_state_dict, seeded

# Made of a backbone's own, these are 1 and 0 in every checkpoint that was not trained as a backbone.
_EXTRA_NORMS = "hidden_states_norms."


def random_network(kind: Any, config: Any, options: Mapping[str, Any], *, seed: int) -> Any:
    """`kind` built from `config` with the weights that `seed` gives; the caller's generator is left alone."""
    with seeded(seed), quiet():
        return kind._from_config(config, **options)


def empty_network(kind: Any, config: Any, options: Mapping[str, Any]) -> Any:
    """`kind` built from `config` on the meta device."""
    with torch.device("meta"), quiet():
        network = kind._from_config(config, **options)
    return network.to("meta")  # LW-DETR makes some of its parameters on the CPU whatever the context says


def loaded_network(
    kind: Any, config: Any, options: Mapping[str, Any], *, source: str | Path, family: Family, raw: bool
) -> tuple[Any, tuple[str, ...], tuple[str, ...]]:
    """(network, modules that the weights do not fit and no stage uses, notes), from a folder, a hub id or a file.

    Raises `WeightsError` where the weights cannot be had, or do not fit a module that a stage uses.
    """
    name, place = (f"file {source.name}", None) if isinstance(source, Path) else (source, source)
    where: dict[str, Any] = {"state_dict": read_state_dict(source)} if isinstance(source, Path) else {}
    with seeded(0), quiet(), _reporting_all(kind):  # of what the weights leave out: the same at each loading
        try:
            network, info = kind.from_pretrained(
                place, config=config, local_files_only=is_offline_mode(), dtype=torch.float32,
                output_loading_info=True, ignore_mismatched_sizes=True, weights_only=True, **where, **options,
            )  # fmt: skip
        except Exception as error:  # transformers, safetensors and torch raise many kinds for a damaged file
            raise cannot_load(source, error) from None
    untrained, notes = _accounted(info, family, source=name, raw=raw)
    return network, untrained, notes


def cannot_load(source: str | Path, error: Exception) -> WeightsError:
    """What to tell the user where transformers failed to read `source`."""
    name = str(source)
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    if isinstance(source, Path) or Path(name).is_dir():
        return WeightsError(
            f"cannot load {name}: {type(error).__name__}: {lines[0]}", "is the folder whole? or: --weights random"
        )
    hint = (
        f"on a machine with a network: hf download {name}\n"
        f"(then copy ~/.cache/huggingface/hub/models--{name.replace('/', '--')} to the same place here)\n"
        "or give the folder of a saved model, or go without trained weights: --weights random"
    )
    if is_offline_mode():
        return WeightsError(
            f"{name} is not (whole) in the Hugging Face cache, and HF_HUB_OFFLINE forbids fetching it", hint
        )
    return WeightsError(f"cannot fetch {name}: {lines[0]}", hint)


def _accounted(
    info: Mapping[str, Any], family: Family, *, source: str, raw: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(modules left untrained, notes), or `WeightsError` naming the keys that a stage would miss."""
    missing = {name for name in info["missing_keys"] if not name.endswith("num_batches_tracked")}
    misshapen = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    unused = (*family.after, *([family.norms] if raw and family.norms else []))
    fresh = {name for name in missing if name.startswith(_EXTRA_NORMS)}
    faults = {
        "missing": _outside(missing - fresh, unused),
        "of another shape": _outside(misshapen, unused),
        # A layer too many: these are another model's weights. What else is left over belongs to heads.
        "unexpected": sorted(name for name in info["unexpected_keys"] if f"{family.stages}." in name),
    }
    if any(faults.values()):
        text = "; ".join(f"{len(names)} {label} ({_some(names)})" for label, names in faults.items() if names)
        raise WeightsError(f"{source} does not fit the model: {text}", "is it a checkpoint of this very model?")
    note = "the weights hold none for the backbone class's extra norms: they standardise (weight 1, bias 0)"
    left = missing | misshapen
    untrained = tuple(path for path in family.after if any(name.startswith(f"{path}.") for name in left))
    return untrained, (note,) if fresh and not raw else ()


def _outside(names: Iterable[str], modules: Iterable[str]) -> list[str]:
    prefixes = tuple(f"{module}." for module in modules)
    return sorted(name for name in names if not name.startswith(prefixes))


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f", … {len(names) - 4} more" if len(names) > 4 else "")


@contextmanager
def _reporting_all(kind: Any) -> Iterator[None]:
    """With every missing key reported: SwinBackbone hides those of its model's final norm, which stays random."""
    before = kind._keys_to_ignore_on_load_missing
    kind._keys_to_ignore_on_load_missing = None
    try:
        yield
    finally:
        kind._keys_to_ignore_on_load_missing = before


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' reports and bars: what matters of them becomes an error or a note."""
    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
