"""transformers' configurations and pretrained backbones: built as objects, checked, put into an assembled model.

Never by a backbone's name, which would send transformers to the network; and never half: every tensor finds its place,
or the reason and the names are the error. It is not itself a provider.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from bbx.errors import MissingExtraError, UsageError, WeightsError, nearest
from bbx.providers.aliases import TWINS, twins
from bbx.providers.table import fold, is_installed
from bbx.providers.transformers_configs import configured, kind_of, line_of, set_field
from bbx.providers.transformers_families import KNOWN
from bbx.providers.transformers_roles import Task
from bbx.providers.transformers_weights import cannot_load, quiet
from bbx.transplant import transplant
from bbx.weights import check_file, load_into, read_state_dict

# Tensors that a classifier's checkpoint has and a backbone has not, and the other way about.
_SURPLUS = (
    "classifier.",
    "head.",
    "fc.",
    "pooler.",
    "layernorm.",
    "swin.layernorm.",
    "bit.norm.",
    "embeddings.mask_token",
)
# Tensors that a class computes anew, so that a checkpoint may hold them or not.
_COMPUTED = ("num_batches_tracked", "relative_position_index", "position_ids")
# What a weights file is known by where none is there.
_FILES = (".pth", ".pt", ".bin", ".safetensors")


class Inner:
    """A backbone asked for in a configuration: its transformers configuration, and the weights it is to get.

    `model` is transformers' or timm's own name, where an alias was given too.
    """

    def __init__(self, given: Mapping[str, Any], task: Task) -> None:
        fields = dict(given)
        self.model = _exact(str(fields.pop("model", "")))
        self.weights = str(fields.pop("weights", "auto" if self.model else "random"))
        stages = fields.pop("stages", None)
        if self.model.startswith("timm:"):
            name = self.model.removeprefix("timm:")
            fields = {"backbone": name, "out_indices": _timm_indices(name, task), **fields}
            self.config = configured(transformers.TimmBackboneConfig, fields)
        else:
            self.config = self._plain(fields)
        if stages is not None:
            set_field(self.config, "out_features", [f"stage{one}" if isinstance(one, int) else one for one in stages])
        elif not {"out_features", "out_indices"} & set(fields):
            numbers = [number for number in range(1, len(self.config.stage_names))]
            chosen = (
                list(task.needs) if len(numbers) <= 5 else [numbers[len(numbers) * n // 4 - 1] for n in (1, 2, 3, 4)]
            )
            set_field(self.config, "out_features", [f"stage{number}" for number in chosen])
        for name in ("hidden_sizes", "depths"):  # ConvNeXt and FocalNet add them to lists
            if isinstance(value := getattr(self.config, name, None), tuple):
                setattr(self.config, name, list(value))
        if task.tokens and hasattr(self.config, "reshape_hidden_states"):
            self.config.reshape_hidden_states = False

    def _plain(self, fields: dict[str, Any]) -> Any:
        """The configuration by `model_type` and fields, or of the folder or hub id `model` with fields changed."""
        valid = {config.model_type: config for config in MODEL_FOR_BACKBONE_MAPPING}
        kind, config = fields.pop("model_type", ""), None
        if self.model in KNOWN and self.weights != "auto":
            kind, fields = KNOWN[self.model][0], {**KNOWN[self.model][1], **fields}
        elif self.model:
            config = self._saved(fields)
            kind = kind if config is None else config.model_type
            if config is None:  # no network, but its structure is known
                kind, fields = KNOWN[self.model][0], {**KNOWN[self.model][1], **fields}
        if kind not in valid:
            close = nearest(kind, valid, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise UsageError(f"backbone: no model_type {kind!r}", f"{meant}valid: {', '.join(sorted(valid))}")
        return config or configured(valid[kind], fields)

    def _saved(self, fields: Mapping[str, Any]) -> Any:
        """The configuration in a folder or of a hub id; None where it cannot be had and the table knows it."""
        source = place(self.model)
        try:
            with quiet():
                config = transformers.AutoConfig.from_pretrained(
                    source, local_files_only=is_offline(), trust_remote_code=False
                )
        except Exception as error:  # OSError, ValueError, KeyError, JSON's: whatever a damaged file brings about
            if self.model in KNOWN and not Path(source).exists() and isinstance(error, OSError):
                return None
            raise WeightsError(
                f"no configuration {self.model}: {line_of(error)}", "give model_type: and fields"
            ) from None
        for name, value in fields.items():
            set_field(config, name, value)
        return config

    def load(self, module: nn.Module) -> tuple[str, tuple[str, ...]]:
        """Puts the weights into `module`, the backbone in its place; says where they are from, and notes."""
        own = module.state_dict()
        state, label, fresh = self._timm() if self.model.startswith("timm:") else self._pretrained()
        if kind_of(module) == "maskformer-swin":
            state = transplant(state, "maskformer-swin", "transformers", "maskformer", into=own)
        fresh = fresh or [name for name in own if name not in state and name.startswith("hidden_states_norms.")]
        given = {name: own[name] for name in fresh if name not in state}
        for name, value in state.items():
            flat = name.replace(".", "_", 1)  # timm's feature networks have `stages_0` for `stages.0`
            place = flat if flat in own and name not in own else name
            if place in own or not _surplus(name, own):
                given[place] = value
        load_into(module, given, head=(), source=label)
        note = f"{label} has no {len(fresh)} tensors hidden_states_norms.*, the extra norms: they start at 1 and 0"
        return label, (note,) if fresh else ()

    def _timm(self) -> tuple[dict[str, Tensor], str, list[str]]:
        import timm

        name, path = self.model.removeprefix("timm:"), Path(self.weights).expanduser()
        if self.weights != "auto":
            if path.is_file() or path.suffix in _FILES or len(path.parts) > 1:
                return read_state_dict(path), f"file {path.name}", []
            name = f"{name.partition('.')[0]}.{self.weights.removeprefix(name.partition('.')[0] + '.')}"
            valid = timm.list_pretrained(f"{name.partition('.')[0]}.*")
            if name not in valid:
                raise UsageError(f"backbone: no weights {self.weights!r}", f"valid: random, a file, {', '.join(valid)}")
        try:
            return timm.create_model(name, pretrained=True).state_dict(), f"timm {name}", []
        except (OSError, RuntimeError, ValueError) as error:
            raise WeightsError(
                f"no timm weights {name} here: {line_of(error)}", "backbone: weights: random, or a file"
            ) from None

    def _pretrained(self) -> tuple[dict[str, Tensor], str, list[str]]:
        """The state dict of a file, or of the standalone backbone in a folder or of a hub id, with the same stages.

        And the extra norms that the checkpoint of a classifier lacks.
        """
        wish = self.model if self.weights == "auto" and self.model else self.weights
        if wish == "auto":
            raise WeightsError(
                "a backbone given by fields has no pretrained weights", "weights: <hub id, folder or file>"
            )
        path = Path(wish).expanduser()
        if path.is_file() or path.suffix in _FILES:
            check_file(path)
            return read_state_dict(path), f"file {path.name}", []
        source = str(path) if path.is_dir() else wish
        kind = type_of(source)
        if not kind:
            raise cannot_load(source, FileNotFoundError("no config.json with a model_type"))
        if kind != self.config.model_type:
            raise WeightsError(
                f"the backbone is a {self.config.model_type}, {wish} is a {kind}", "give weights of that type"
            )
        loaded, fresh = from_pretrained(MODEL_FOR_BACKBONE_MAPPING[type(self.config)], source, self.config)
        return loaded.state_dict(), wish, fresh


def _surplus(name: str, own: Mapping[str, Tensor]) -> bool:
    """Whether a tensor belongs to a classifier, or to stages after the last one that this backbone keeps."""
    if name.startswith(_SURPLUS) or name.endswith("num_batches_tracked"):
        return True
    stage = re.match(r"(layer|stages[._]|layers[._]|blocks[._])(\d+)\.", name)
    starts = (stage[0], stage[0].replace(".", "_", 1)) if stage else ()
    return bool(stage) and not any(one.startswith(starts) for one in own)


def type_of(name: str) -> str:
    """The model type that a folder or a hub id is of, empty if it cannot be had."""
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file() and (folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name)):
        return ""
    try:
        with quiet():
            content, _ = transformers.PreTrainedConfig.get_config_dict(place(name), local_files_only=is_offline())
    except (OSError, ValueError):
        return ""
    return str(content.get("model_type", ""))


def from_pretrained(kind: Any, source: str, config: Any) -> tuple[nn.Module, list[str]]:
    """The model in evaluation mode, float32, and the extra norms of a backbone class that the checkpoint lacks.

    Refused if another tensor is missing, one is of another shape, or one belongs to a layer that the model has not.
    """
    try:
        with quiet():
            network, report = kind.from_pretrained(
                place(source), config=config, output_loading_info=True, dtype=torch.float32, weights_only=True,
                local_files_only=is_offline(), ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:  # transformers, safetensors and torch raise many kinds for a damaged file
        raise cannot_load(place(source), error) from None
    fresh = [name for name in report["missing_keys"] if name.startswith("hidden_states_norms.")]
    own = {name for name, _ in network.named_modules()} | set(network.state_dict())
    faults = {
        "missing": [name for name in report["missing_keys"] if name not in fresh],
        "of another shape": [entry if isinstance(entry, str) else entry[0] for entry in report["mismatched_keys"]],
        # A layer too many: these are another model's weights. What else is left over belongs to heads.
        "unexpected": [name for name in report["unexpected_keys"] if _of_a_layer(name, own)],
    }
    if any(faults.values()):
        text = "; ".join(f"{len(names)} {label} ({_some(names)})" for label, names in faults.items() if names)
        raise WeightsError(f"{source} does not fit {kind.__name__}: {text}", "is it a checkpoint of this very model?")
    return network.eval(), fresh


def _of_a_layer(name: str, own: Container[str]) -> bool:
    """Whether a tensor that the network has not lies in one of its numbered layers, or would be one layer more.

    `own`: the names of the network's modules and tensors.
    """
    if name.endswith(_COMPUTED):
        return False
    parts = name.split(".")
    if parts[0] not in own:  # a classifier's checkpoint has its own name before those of its backbone
        parts = parts[1:]
    known = next((end for end in range(len(parts)) if ".".join(parts[: end + 1]) not in own), len(parts))
    return known > 0 and any(part.isdigit() for part in parts[: known + 1])


def _some(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:4]) + (f", … {len(names) - 4} more" if len(names) > 4 else "")


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` forbids the network."""
    hub: Any = transformers.utils.hub
    return bool(hub.is_offline_mode())


def place(name: str) -> str:
    """A folder's path with `~` expanded, or the hub id."""
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def _exact(model: str) -> str:
    """transformers' own name, or `timm:…`, for what `model` means; raises `UsageError` for another library's."""
    provider, colon, name = model.partition(":")
    if not colon or "/" in provider:  # a folder may have a colon in its name
        provider, name = "transformers", model
    if provider not in ("transformers", "timm"):
        raise UsageError(
            f"backbone: {model!r} is no network of transformers or timm", "a hub id, a folder, timm:NAME or model_type:"
        )
    alias = next((alias for alias in TWINS if fold(alias) == fold(name)), None)
    rows = twins(alias) if alias else {}
    if alias and provider not in rows:
        raise UsageError(f"{provider} has no {name}", f"it is in {' and '.join(rows)}")
    exact = rows.get(provider) or next((known for known in KNOWN if fold(known) == fold(name)), name)
    return f"timm:{exact}" if provider == "timm" else exact


def _timm_indices(name: str, task: Task) -> list[int]:
    """The places of the stages that `task` takes among the maps of timm's network: some begin with a stem's, at 1/2.

    Raises `UsageError` for a network that gives maps otherwise than the assembled model takes them.
    """
    if not is_installed("timm"):
        raise MissingExtraError("timm")
    import timm

    try:
        with torch.device("meta"):
            network: Any = timm.create_model(name, features_only=True)
    except (RuntimeError, ValueError, AttributeError, KeyError, TypeError) as error:
        close = nearest(name, timm.list_models(), 1)
        meant = f"did you mean timm:{close[0]}? " if close else ""
        raise UsageError(
            f"backbone: timm:{name} cannot be had: {line_of(error)}", f"{meant}see timm.list_models()"
        ) from None
    form = str(getattr(getattr(network, "output_fmt", None), "value", "NCHW"))
    if form != "NCHW":
        raise UsageError(
            f"timm:{name} gives its maps channels last ({form}), which {task.task} does not take",
            "take transformers' own of it: model: a hub id or a folder, or model_type: and fields",
        )
    count = len(network.feature_info.info)
    if count < max(task.needs):
        raise UsageError(
            f"timm:{name} has {count} stages, {task.task} needs {max(task.needs)}", "take another backbone"
        )
    return [number - (count == 4) for number in task.needs]
