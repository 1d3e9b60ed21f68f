"""What a user would use instead of bbx: one small program per library, each as its own docs show it.

All do the same job: the same pictures, random weights of one seed, the same stages, float32 to disk. What one of them
cannot do is said here, and shown in the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec


@dataclass(frozen=True)
class Rival:
    """A library and how it does the jobs; the program is the module `name` beside this one.

    `needs` is the module that must be there to run it. `docs_workers`: the decoding processes of its docs' example, 0
    being none, 2 those of a DataLoader. `cannot`: why a job is not done; `differs`: what it does instead.
    `equal`: whether the decoding can be given to bbx's number of workers; `moves`: whether its docs compute on a GPU.
    """

    name: str
    needs: str
    keeps: str
    docs_workers: int = 0
    cannot: Mapping[str, str] = field(default_factory=dict)
    differs: Mapping[str, str] = field(default_factory=dict)
    equal: bool = True
    moves: bool = False

    @property
    def installed(self) -> bool:
        """In this interpreter."""
        return find_spec(self.needs) is not None


_NO_LITE = "torchvision has no EfficientNet-Lite"
_HOOKED = "stem, which features_only leaves out, by a hook of the caller's"
_POOLED = "pooled by the caller"
_NHWC = "swin's maps stay (h, w, c)"
_WHOLE = "runs the whole network"

RIVALS = (
    Rival("timm_loop", "timm", "HDF5, a chunk per row", docs_workers=2, moves=True, differs={
        "A": _HOOKED, "B": _HOOKED, "C": f"{_HOOKED}; {_POOLED}"}),
    Rival("torchvision_fx", "torchvision", "an .npz per image", moves=True, cannot={"C": _NO_LITE}, differs={
        "A": _NHWC}),
    Rival("autobackbone", "transformers", "HDF5, a chunk per row", moves=True,
          cannot={"C": "transformers has no EfficientNet-Lite but through timm, which is timm_loop"},
          differs={"A": f"its own swin: {_WHOLE}, an extra LayerNorm on each map",
                   "B": f"its own resnet: {_WHOLE}"}),
    Rival("torchextractor_save", "torchextractor", "a .pt per batch", moves=True, differs={
        "A": f"{_WHOLE}; {_NHWC}", "B": _WHOLE, "C": f"timm's network; {_WHOLE}; {_POOLED}"}),
    Rival("captum_av", "captum", "a .pt per batch and stage", docs_workers=2, differs={
        "A": f"{_WHOLE}; {_NHWC}", "B": _WHOLE, "C": f"timm's network; {_WHOLE}; whole maps, for it cannot pool"}),
    Rival("torchlens_shards", "torchlens", "checksummed shards, resumable", differs={
        "A": f"timm's network; {_WHOLE}; {_NHWC}", "B": f"timm's network; {_WHOLE}", "C": f"timm's network; {_WHOLE}"}),
    # Beside today's libraries pip can only install it by putting them back to those of 2023: see requirements.txt.
    Rival("thingsvision_npy", "thingsvision", "an .npy per 8 batches and stage", equal=False, differs={
        "A": f"timm's network; {_WHOLE}; {_NHWC}", "B": f"timm's network; {_WHOLE}",
        "C": f"timm's network; {_WHOLE}; whole maps, for it pools to one value"}),
)  # fmt: skip
