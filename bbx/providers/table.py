"""The table of providers: which modules speak for which library, and whether that library is on this machine."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from bbx.errors import MissingExtraError
from bbx.providers.postponed import import_torchvision

# In the order in which they are asked for a name without a provider; of a provider's modules, the first that knows it.
PROVIDERS: dict[str, tuple[str, ...]] = {
    "packaged": ("bbx.providers.packaged",),
    "torchvision": ("bbx.providers.torchvision", "bbx.providers.torchvision_tasks"),
    "timm": ("bbx.providers.timm",),
    "transformers": ("bbx.providers.transformers_tasks", "bbx.providers.transformers"),
}

# Providers that need a package which `pip install bbx` does not bring; the extra has the package's name.
EXTRAS = ("timm", "transformers")


def is_installed(provider: str) -> bool:
    """Whether the provider's package is on this machine, without importing it."""
    return provider not in EXTRAS or find_spec(provider) is not None


def imported(module: str) -> Any:
    """A provider's module. Raises `MissingExtraError`, with the line to type, where its package is not installed."""
    if module not in PROVIDERS["packaged"]:  # the others' libraries import it, sooner or later
        import_torchvision()
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name in EXTRAS:
            raise MissingExtraError(error.name) from None
        raise


def fold(name: str) -> str:
    """`name` as it is compared: case, `-` and `_` do not matter."""
    return name.lower().replace("-", "_")


def squeeze(name: str) -> str:
    """`name` as it is compared at the second try; at the first, regnet_x_1_6gf and regnet_x_16gf must stay apart."""
    return fold(name).replace("_", "")
