"""bbx: the feature maps of any vision backbone, stage by stage, from a folder of images into one HDF5 file.

The public names are loaded on first use, so that `import bbx` costs nothing and reading a file never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bbx.assembly import assemble
    from bbx.auto import AutoBackbone, BackboneConfig
    from bbx.backbone import Backbone
    from bbx.dataset import FeatureDataset
    from bbx.errors import BbxError
    from bbx.image_processor import AutoImageProcessor
    from bbx.providers import list_models, load_backbone
    from bbx.runner import extract
    from bbx.spec import ModelRef, Preprocess, RunSpec, Stage
    from bbx.store import FeatureFile
    from bbx.store import FeatureFile as open  # noqa: F401  (for type checkers; not in __all__, see there)

_HOME = {
    "AutoBackbone": "bbx.auto",
    "AutoImageProcessor": "bbx.image_processor",
    "Backbone": "bbx.backbone",
    "BackboneConfig": "bbx.auto",
    "assemble": "bbx.assembly",
    "BbxError": "bbx.errors",
    "FeatureDataset": "bbx.dataset",
    "FeatureFile": "bbx.store",
    "ModelRef": "bbx.spec",
    "Preprocess": "bbx.spec",
    "RunSpec": "bbx.spec",
    "Stage": "bbx.spec",
    "extract": "bbx.runner",
    "list_models": "bbx.providers",
    "load_backbone": "bbx.providers",
    "open": "bbx.store",
}

# Without `open`: a star import must not replace the built-in one.
__all__ = [
    "AutoBackbone",
    "AutoImageProcessor",
    "Backbone",
    "BackboneConfig",
    "BbxError",
    "FeatureDataset",
    "FeatureFile",
    "ModelRef",
    "Preprocess",
    "RunSpec",
    "Stage",
    "__version__",
    "assemble",
    "extract",
    "list_models",
    "load_backbone",
]

__version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata  # a fifth of the time that `bbx --help` takes

        return metadata.version("bbx")
    if name not in _HOME:
        raise AttributeError(f"module 'bbx' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), "FeatureFile" if name == "open" else name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *__all__})
