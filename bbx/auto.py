"""`AutoBackbone` and `BackboneConfig`: any bbx backbone in transformers' words, as a module for a network of one's own.

transformers' `BackboneMixin` and `BackboneConfigMixin` are the model (transformers/backbone_utils.py): the same names,
the same meaning of `out_features` and `out_indices`, one output class; for every provider, with early exit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from bbx.backbone import Backbone
from bbx.errors import UsageError
from bbx.parameters import parameters_by_stage
from bbx.providers import load_backbone, load_structure, resolve, saved
from bbx.spec import Build, Norm, Preprocess, Stage
from bbx.stages import align_stages, select_stages
from bbx.taps import LastingTaps, channels_first, exclusive


class BackboneOutput(NamedTuple):
    """What a backbone's forward gives; `None` is what was not asked for.

    `feature_maps`: one `(b, c, h, w)` per stage of `out_features`. `hidden_states`: the same for every stage of
    `stage_names`. `attentions`: one `(b, heads, t, t)` per attention layer, as the library has them.
    """

    feature_maps: tuple[Tensor, ...]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    def to_tuple(self) -> tuple[tuple[Tensor, ...], ...]:
        """The fields that are not None."""
        return tuple(field for field in self if field is not None)


class BackboneConfig:
    """Which backbone, built how, giving which stages; enough to make one with random weights.

    `model` is any name that `bbx models` lists, with its provider where two have it. `options` are the library's own
    arguments (`BackboneConfig("transformers:resnet", options={"depths": [2, 2, 2, 2]})`), `size` is the input (height,
    width) in pixels, `seed` of the random weights. Raises `UsageError`, a `ValueError`, for what is not valid.
    """

    def __init__(
        self,
        model: str,
        *,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        seed: int = 0,
        size: int | tuple[int, int] | None = None,
        norm: Norm = "raw",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = str(resolve(model))
        self.build = Build(
            seed=seed, size=(size, size) if isinstance(size, int) else size, norm=norm, options=dict(options or {})
        )
        self._stages = load_structure(
            self.model, weights="random", size=self.build.size, norm=norm, options=self.build.options
        ).stages
        if any("." in stage.name for stage in self._stages):
            raise UsageError(
                f"{self.model} has a neck and heads: it is no backbone",
                "bbx.load_backbone and bbx.assemble give such models, by role",
            )
        self._out_features, self._out_indices = align_stages(self.stage_names, out_features, out_indices)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Every stage there is, as measured: name, shape, stride, module."""
        return self._stages

    @property
    def stage_names(self) -> list[str]:
        """Every stage there is, in network order."""
        return [stage.name for stage in self._stages]

    @property
    def out_features(self) -> list[str]:
        """The stages that forward gives, by name; assigning moves `out_indices` along, None is the last stage."""
        return list(self._out_features)

    @out_features.setter
    def out_features(self, names: Sequence[str] | None) -> None:
        self._out_features, self._out_indices = align_stages(self.stage_names, names, None)

    @property
    def out_indices(self) -> list[int]:
        """The same by index, stem = 0, never negative; assigning moves `out_features` along, None is the last stage."""
        return list(self._out_indices)

    @out_indices.setter
    def out_indices(self, indices: Sequence[int] | None) -> None:
        self._out_features, self._out_indices = align_stages(self.stage_names, None, indices)

    def to_saved(self, preprocess: Preprocess | None = None) -> saved.Saved:
        """The configuration as its folder holds it."""
        names = tuple(self.stage_names)
        return saved.Saved(self.model, self.build, preprocess, names, tuple(self.out_features))

    @classmethod
    def from_saved(cls, content: saved.Saved) -> BackboneConfig:
        """The configuration that `to_saved` gave."""
        build = content.build
        return cls(content.model, out_features=content.out_features, seed=build.seed, size=build.size,
                   norm=build.norm, options=build.options)  # fmt: skip

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` into `folder`."""
        saved.write_config(Path(folder), self.to_saved())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> BackboneConfig:
        """Reads the `config.json` of `folder`. Raises `FileError`."""
        return cls.from_saved(saved.read_config(Path(folder)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BackboneConfig) and self.to_saved() == other.to_saved()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        build = self.build
        given = {"seed": build.seed, "size": build.size, "norm": build.norm, "options": dict(build.options)}
        usual: dict[str, Any] = {"seed": 0, "size": None, "norm": "raw", "options": {}}
        more = "".join(f", {name}={value!r}" for name, value in given.items() if value != usual[name])
        return f"BackboneConfig({self.model!r}, out_features={self.out_features}{more})"


class AutoBackbone(nn.Module):
    """A backbone as a `torch.nn.Module`: `model(pixel_values)` → `BackboneOutput`, no layer past the last stage run.

    Made by `from_pretrained` or `from_config`. In evaluation mode at first; `train()`, gradients, `freeze` and
    `torch.compile` work as for any module.
    """

    def __init__(self, config: BackboneConfig, backbone: Backbone | None = None) -> None:
        super().__init__()
        if backbone is None:
            backbone = load_backbone(
                config.model, weights="random", seed=config.build.seed, size=config.build.size,
                norm=config.build.norm, options=config.build.options,
            )  # fmt: skip
        self.config = config
        self.network = backbone.network
        self._backbone = backbone
        self._frozen: frozenset[str] = frozenset()
        self._taps = None if backbone.forward else LastingTaps(backbone.network, backbone.taps)
        # Layouts and prefixes are settled; hooks fire in this order.
        self._tap_of = {tap.name: tap for tap in backbone.taps}
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        weights: str = "auto",
        seed: int = 0,
        size: int | tuple[int, int] | None = None,
        norm: Norm | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> AutoBackbone:
        """The backbone of any provider's name, of a folder that `save_pretrained` wrote, or of a library's own folder.

        `weights` as in `bbx.load_backbone`; `out_features` and `out_indices`, both given, must be the same stages.
        Raises `UsageError` (a `ValueError`), `WeightsError`.
        """
        folder = Path(model)
        if saved.is_saved(folder):
            if weights != "auto" or options or size or norm:
                raise UsageError(f"{folder} is saved with its weights and options", "give its name and stages alone")
            config = BackboneConfig.from_pretrained(folder)
            if out_features is not None or out_indices is not None:
                config._out_features, config._out_indices = align_stages(config.stage_names, out_features, out_indices)
            return cls(config, load_backbone(str(folder)))
        backbone = load_backbone(str(model), weights=weights, seed=seed, size=size, norm=norm or "raw", options=options)
        usual = load_structure(str(backbone.ref), weights="random", options=options).preprocess.size
        size = backbone.preprocess.size if backbone.preprocess.size != usual else None  # some weights have their own
        config = BackboneConfig(
            str(backbone.ref), out_features=out_features, out_indices=out_indices, seed=seed, size=size,
            norm=norm or "raw", options=options,
        )  # fmt: skip
        return cls(config, backbone)

    @classmethod
    def from_config(cls, config: BackboneConfig) -> AutoBackbone:
        """The backbone of a configuration, with random weights by its seed."""
        return cls(config)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`; the folder is then a model's name, in bbx and at its shell."""
        target, backbone = Path(folder), self._backbone
        content = self.config.to_saved(backbone.preprocess)
        options = json.loads(backbone.config) if backbone.config else {}
        for key in ("model_type", "architecture"):
            if key in options:  # the folder or hub id that it came from may not be there when it is loaded
                # Its input is not the type's own, save where the options say which size the network is built for.
                size = content.build.size if "img_size" in options else backbone.preprocess.size
                build = replace(content.build, size=size)
                content = replace(content, model=f"{backbone.ref.provider}:{options.pop(key)}", build=build)
        saved.write_config(target, replace(content, build=replace(content.build, options=options)))
        saved.write_weights(target, backbone)

    @property
    def stage_names(self) -> list[str]:
        """Every stage there is, in network order."""
        return self.config.stage_names

    @property
    def out_features(self) -> list[str]:
        """The stages that forward gives, by name; assigning works at any time."""
        return self.config.out_features

    @out_features.setter
    def out_features(self, names: Sequence[str] | None) -> None:
        self.config.out_features = names

    @property
    def out_indices(self) -> list[int]:
        """The same by index, stem = 0."""
        return self.config.out_indices

    @out_indices.setter
    def out_indices(self, indices: Sequence[int] | None) -> None:
        self.config.out_indices = indices

    @property
    def num_features(self) -> list[int]:
        """Channels of every stage in `stage_names`."""
        return [stage.channels for stage in self.config.stages]

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """Stage name → channels, for every stage."""
        return {stage.name: stage.channels for stage in self.config.stages}

    @property
    def channels(self) -> list[int]:
        """Channels of each map that forward gives."""
        return [self.out_feature_channels[name] for name in self.out_features]

    @property
    def strides(self) -> list[float]:
        """Input pixels per cell of each map that forward gives."""
        by_name = {stage.name: stage.stride for stage in self.config.stages}
        return [by_name[name] for name in self.out_features]

    @property
    def preprocess(self) -> Preprocess:
        """What `AutoImageProcessor` does for these weights."""
        return self._backbone.preprocess

    def forward(
        self, pixel_values: Tensor, *, output_hidden_states: bool = False, output_attentions: bool = False
    ) -> BackboneOutput:
        """`(b, 3, h, w)`, preprocessed, → the maps of `out_features`, each `(b, c, fh, fw)`, in stage order.

        With `output_hidden_states` every stage runs. Raises `UsageError` where the library shows no attention maps.
        """
        names = self.config._out_features
        wanted = tuple(self._tap_of) if output_hidden_states else names
        taps = [self._tap_of[name] for name in wanted]
        with exclusive(self.network):
            if self._taps:
                raw = self._taps.capture(self.network, taps, pixel_values)
            else:
                assert self._backbone.forward is not None
                raw = self._backbone.forward(pixel_values, taps)
        maps = {tap.name: channels_first(raw[tap.name], tap, pixel_values) for tap in taps}
        return BackboneOutput(
            tuple(maps[name] for name in names),
            tuple(maps[name] for name in wanted) if output_hidden_states else None,
            self._attentions(pixel_values) if output_attentions else None,
        )

    def _attentions(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        if self._backbone.attend is None:
            raise UsageError(
                f"{self._backbone.ref} shows no attention maps",
                "transformers' attention networks do; leave output_attentions out",
            )
        return self._backbone.attend(pixel_values)

    def freeze(self, stages: str | Iterable[str | int] = "all") -> AutoBackbone:
        """Stops the training of `stages` (`select_stages`' rules): no gradients, batch norms by their statistics.

        A stage's parameters are those that it is the first to use; `all` means those of the classifier too. All others
        are made trainable; `freeze(())` frees them all. Returns the model.
        """
        chosen = () if not stages else select_stages(self.stage_names, stages)
        if list(chosen) == self.stage_names:
            frozen = {name for name, _ in self.network.named_parameters()}
        else:
            by_stage = parameters_by_stage(self._backbone)
            frozen = {name for stage in chosen for name in by_stage[stage]}
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(name not in frozen)
        self._frozen = frozenset(frozen)
        return self.train(self.training)

    def train(self, mode: bool = True) -> AutoBackbone:
        """Training mode, but for the batch norms of frozen stages, whose statistics must not move either."""
        super().train(mode)
        for name, module in self.network.named_modules():
            own = [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and own and self._frozen.issuperset(own):
                module.eval()
        return self
