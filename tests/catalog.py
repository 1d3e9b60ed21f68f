"""Measures `bbx/providers/catalog.json`: `python -m tests.catalog [PROVIDER …]`, all extras installed.

All of it takes some twenty minutes, nearly all of them for timm; providers that are not named keep their rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from bbx.providers import catalog
from tests.sweep import measure_timm


def row_of_timm(name: str) -> tuple[str, dict[str, Any]]:
    """A row of the catalogue from one measured architecture of timm."""
    found = measure_timm(name)
    return name, timm_row(found)


def timm_row(found: dict[str, Any]) -> dict[str, Any]:
    """What the catalogue keeps of `measure_timm`."""
    stride = found["stages"][-1][2]
    if stride & (stride - 1):  # no power of two: the border may have been rounded, which two forwards tell
        stride = _stages(f"timm:{found['name']}")["stride"]
    return {
        "family": found["family"],
        "parameters": found["parameters"],
        "stride": stride,
        "stages": len(found["stages"]),
        "weights": found["weights"],
    }


def packaged_rows() -> dict[str, dict[str, Any]]:
    """EfficientNet-Lite0."""
    from bbx.providers import packaged

    return {
        row["name"]: {"family": "efficientnet_lite", **_stages(f"packaged:{row['name']}"), "weights": row["weights"]}
        for row in packaged.list_models()
    }


def torchvision_rows() -> dict[str, dict[str, Any]]:
    """The classification models with their stages, the assembled ones without: their roles are no row of stages."""
    import torchvision

    from bbx.providers import torchvision as classification
    from bbx.providers import torchvision_tasks as tasks

    rows = {}
    for module in (classification, tasks):
        for row in module.list_models():
            builder = torchvision.models.get_model_builder(row["name"])
            enum = torchvision.models.get_model_weights(row["name"])
            rows[row["name"]] = {
                "family": builder.__module__.removeprefix("torchvision.models."),
                "parameters": row["parameters"],
                **(_stages(f"torchvision:{row['name']}") if module is classification else {}),
                "weights": row["weights"],
                "files": {member.name: Path(member.url).name for member in enum},
            }
    return rows


def transformers_rows() -> dict[str, dict[str, Any]]:
    """Types by their default configuration, the hub ids whose structure bbx knows, and the assembled types."""
    from bbx.providers import transformers as backbones
    from bbx.providers import transformers_tasks as tasks

    rows: dict[str, dict[str, Any]] = {}
    for row in backbones.list_models():
        name = row["name"]
        weights = [name] if row["weights"] else []
        rows[name] = {"family": row["family"], **_stages(f"transformers:{name}"), "weights": weights}
    for row in tasks.list_models():
        rows[row["name"]] = {"family": row["name"], "weights": [weight for weight in row["weights"] if weight]}
    return rows


def _stages(model: str) -> dict[str, Any]:
    from bbx.providers.table import PROVIDERS, imported
    from bbx.spec import Build, ModelRef

    provider, _, name = model.partition(":")
    module = next(one for one in map(imported, PROVIDERS[provider]) if name in one.names())
    backbone = module.load(ModelRef(provider, name, "random"), Build(structure=True)).select("all")
    return {
        "parameters": sum(parameter.numel() for parameter in backbone.network.parameters()),
        "stride": round(backbone.stages[-1].stride),
        "stages": len(backbone.stages),
    }


def timm_rows() -> dict[str, dict[str, Any]]:
    """Every architecture, two at a time."""
    names = import_module("timm").list_models()
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        return dict(pool.map(row_of_timm, names, chunksize=8))


MEASURES: dict[str, Callable[[], dict[str, dict[str, Any]]]] = {
    "packaged": packaged_rows,
    "torchvision": torchvision_rows,
    "timm": timm_rows,
    "transformers": transformers_rows,
}


def write(providers: Sequence[str]) -> None:
    """The catalogue with the rows of `providers` measured anew, one model per line."""
    before = json.loads(catalog.FILE.read_text())
    models = {name: measure() if name in providers else before["models"][name] for name, measure in MEASURES.items()}
    versions = before["versions"] | {name: metadata.version(name) for name in providers if name != "packaged"}
    lines = [f'{{"versions": {json.dumps(versions)}, "models": {{']
    for provider, rows in models.items():
        body = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        lines.append(f"{json.dumps(provider)}: {{\n{body}\n}}{',' if provider != list(models)[-1] else ''}")
    catalog.FILE.write_text("\n".join(lines) + "\n}}\n")


def main() -> None:
    """Measures what is named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("providers", nargs="*", metavar="PROVIDER", help=f"of {', '.join(MEASURES)}; none: all")
    given = parser.parse_args().providers
    if unknown := set(given) - set(MEASURES):
        parser.error(f"{', '.join(sorted(unknown))}: not of {', '.join(MEASURES)}")
    write(given or [*MEASURES])
    sys.stdout.write(f"{catalog.FILE}\n")


if __name__ == "__main__":
    main()
