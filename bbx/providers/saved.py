"""A backbone in a folder of its own: `config.json` and `model.safetensors`, which any of the providers can fill again.

`bbx.AutoBackbone.save_pretrained` writes it; the folder's path is then a model's name like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbx.errors import FileError, WeightsError
from bbx.providers.table import PROVIDERS
from bbx.spec import Build, Preprocess

if TYPE_CHECKING:
    from bbx.backbone import Backbone

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True, slots=True)
class Saved:
    """What `config.json` says: the model by its provider's name, how it was built, and what was selected."""

    model: str
    build: Build
    preprocess: Preprocess | None
    stage_names: tuple[str, ...]
    out_features: tuple[str, ...]


def is_saved(folder: Path) -> bool:
    """Whether `folder` holds a backbone that bbx saved."""
    config = folder / CONFIG
    return config.is_file() and '"bbx_version"' in config.read_text(errors="replace")


def write_config(folder: Path, saved: Saved) -> None:
    """Writes `config.json`."""
    from bbx import __version__

    folder.mkdir(parents=True, exist_ok=True)
    build = {name: value for name, value in asdict(saved.build).items() if name != "structure"}
    content = {"bbx_version": __version__, **asdict(saved), "build": build}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def read_config(folder: Path) -> Saved:
    """What `write_config` wrote. Raises `FileError` for anything else."""
    path = folder / CONFIG
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        content.pop("bbx_version")
        build, preprocess = content.pop("build"), content.pop("preprocess")
        provider = content["model"].partition(":")[0]
        if provider not in PROVIDERS:
            raise ValueError(f"model {content['model']!r} names no provider")
        return Saved(
            build=Build(**_tuples(build)),
            preprocess=preprocess and Preprocess(**_tuples(preprocess)),
            **_tuples(content),
        )
    except FileNotFoundError:
        raise FileError(f"{folder} holds no {CONFIG}", "give a model's name, or the folder of a saved model") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{path} is damaged ({type(error).__name__}: {error})", "save the backbone again") from None


def write_weights(folder: Path, backbone: Backbone) -> None:
    """Writes `model.safetensors`: the network's state dict under its library's own names."""
    from safetensors.torch import save_file

    # A tensor that two names share is written twice: the format has no sharing.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in backbone.network.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def load_weights(folder: Path, backbone: Backbone) -> Backbone:
    """`backbone` with the saved weights. Raises `WeightsError` unless every name and shape fits."""
    from bbx.weights import digest, read_state_dict

    state = read_state_dict(folder / WEIGHTS)
    try:
        backbone.network.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(
            f"{folder / WEIGHTS} does not fit {backbone.ref}: {error}", "save the backbone again"
        ) from None
    return replace(backbone, weights=f"folder {folder.name}", weights_digest=digest(backbone.network))


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
