"""transformers' configurations and pretrained backbones: built as objects, checked, put into an assembled model.

Never by a backbone's name, which would send transformers to the network; and never half: every tensor finds its place,
or the reason and the names are the error. It is not itself a provider.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING

from bbx.errors import UsageError, WeightsError, nearest
from bbx.providers.transformers_roles import Task
from bbx.transplant import transplant
from bbx.weights import check_file, load_into, read_state_dict

# What transformers raises for configurations and inputs that do not fit.
FAULTS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError)
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


class Inner:
    """A backbone asked for in a configuration: its transformers configuration, and the weights it is to get."""

    def __init__(self, given: Mapping[str, Any], task: Task) -> None:
        fields = dict(given)
        self.model = str(fields.pop("model", ""))
        self.weights = str(fields.pop("weights", "auto" if self.model else "random"))
        stages = fields.pop("stages", None)
        if self.model.startswith("timm:"):
            name = self.model.removeprefix("timm:")
            fields = {"backbone": name, "out_indices": list(task.needs), **fields}
            self.config = configured(transformers.TimmBackboneConfig, fields)
        else:
            self.config = self._plain(fields, task)
        if stages is not None:
            set_field(self.config, "out_features", [f"stage{one}" if isinstance(one, int) else one for one in stages])
        elif not {"out_features", "out_indices"} & set(fields):
            numbers = [number for number in range(1, len(self.config.stage_names))]
            chosen = (
                list(task.needs) if len(numbers) <= 5 else [numbers[len(numbers) * n // 4 - 1] for n in (1, 2, 3, 4)]
            )
            set_field(self.config, "out_features", [f"stage{number}" for number in chosen])
        if task.tokens and hasattr(self.config, "reshape_hidden_states"):
            self.config.reshape_hidden_states = False

    def _plain(self, fields: dict[str, Any], task: Task) -> Any:
        kind = fields.pop("model_type", "")
        if self.model:
            try:
                config = transformers.AutoConfig.from_pretrained(self.model)
            except (OSError, ValueError) as error:
                raise WeightsError(
                    f"no configuration {self.model}: {line_of(error)}", "give model_type: and fields"
                ) from None
            kind = config.model_type
            for name, value in fields.items():
                set_field(config, name, value)
        valid = {config.model_type: config for config in MODEL_FOR_BACKBONE_MAPPING}
        if kind not in valid:
            close = nearest(kind, valid, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise UsageError(f"backbone: no model_type {kind!r}", f"{meant}valid: {', '.join(sorted(valid))}")
        return config if self.model else configured(valid[kind], fields)

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

        name = self.model.removeprefix("timm:")
        if self.weights != "auto":
            return read_state_dict(Path(self.weights)), f"file {Path(self.weights).name}", []
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
        if path.is_file() or path.suffix in (".pth", ".pt", ".safetensors"):
            check_file(path)
            return read_state_dict(path), f"file {path.name}", []
        source = str(path) if path.is_dir() else wish
        kind = type_of(source)
        if kind != self.config.model_type:
            found = f"is a {kind}" if kind else "cannot be had"
            raise WeightsError(
                f"the backbone is a {self.config.model_type}, {wish} {found}", "give weights of that type"
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
        content, _ = transformers.PreTrainedConfig.get_config_dict(str(folder) if folder.exists() else name)
    except (OSError, ValueError):
        return ""
    return str(content.get("model_type", ""))


def configured(kind: Any, fields: Mapping[str, Any], also: Sequence[str] = ()) -> Any:
    """`kind(**fields)`, every field one that it knows. Through JSON first: some defaults are tuples that break it."""
    plain = kind()
    known = {*plain.to_dict(), *also, "num_labels"} - {"model_type", "transformers_version", "_name_or_path"}
    for name in fields:
        if name not in known and not hasattr(plain, name):
            close = nearest(name, known, 1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise UsageError(f"{kind.__name__} has no {name!r}", f"{meant}valid: {', '.join(sorted(known))}")
    lists = {name: list(value) for name, value in plain.to_dict().items() if isinstance(value, tuple)}
    try:
        return kind(**{**lists, **fields})
    except FAULTS as error:
        raise UsageError(
            f"{kind.__name__} cannot be built: {line_of(error)}", "see transformers' own documentation"
        ) from None


def set_field(config: Any, name: str, value: Any) -> None:
    """Sets a field that the configuration has; raises `UsageError` for another, and for a value that does not fit."""
    if not hasattr(config, name):
        close = nearest(name, config.to_dict(), 1)
        raise UsageError(f"{type(config).__name__} has no {name!r}", f"did you mean {close[0]}?" if close else "")
    try:
        setattr(config, name, value)
    except FAULTS as error:
        raise UsageError(f"{name}: {value!r} does not fit: {line_of(error)}") from None


def from_pretrained(kind: Any, source: str, config: Any) -> tuple[nn.Module, list[str]]:
    """The model in evaluation mode, float32, and the extra norms of a backbone class that the checkpoint lacks.

    Refused if another tensor is missing or one is of another shape.
    """
    try:
        network, report = kind.from_pretrained(source, config=config, output_loading_info=True, dtype=torch.float32)
    except (OSError, RuntimeError, ValueError) as error:
        raise absent(source, error) from None
    fresh = [name for name in report["missing_keys"] if name.startswith("hidden_states_norms.")]
    missing = [name for name in report["missing_keys"] if name not in fresh]
    odd = [*missing, *(str(name) for name in report["mismatched_keys"])]
    if odd:
        raise WeightsError(f"{source} does not fit {kind.__name__}: {', '.join(odd[:4])}", "is it a checkpoint of it?")
    return network.eval(), fresh


def absent(source: str, error: Exception) -> WeightsError:
    """The error for a checkpoint that cannot be had, with what works without it."""
    hint = f"with a network: hf download {source}   (or give a folder)\nor go without trained ones: --weights random"
    return WeightsError(f"{source} is not on this machine: {line_of(error)}", hint)


def line_of(error: Exception) -> str:
    """The first line of what a library says."""
    return str(error).strip().partition("\n")[0]


def kind_of(module: nn.Module) -> str:
    """A backbone's type, empty for a module that is none of transformers'."""
    # Of the class: MaskFormer makes its own Swin's configuration from another's fields, `model_type` among them.
    config: Any = getattr(module, "config", None)
    return str(getattr(type(config), "model_type", ""))
