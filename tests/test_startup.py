"""What each command loads, and above all what not: a start is as slow as its imports."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from bbx.cli import app

MAIN = """
import gc, sys
from pathlib import Path
gc.disable()  # as `bbx` itself begins
from bbx.cli import main
try:
    main()
finally:
    Path("loaded.txt").write_text(" ".join(sys.modules))
    Path("collects.txt").write_text(str(gc.isenabled()))
"""
# A library of another version than the catalogue's is asked for its names, and imported: not what is meant here.
CURRENT = "from bbx.providers import catalog\ncatalog.is_current = lambda provider: True\n"
READS = {"h5py", "numpy"}
FRAMEWORKS = {"torch", "torchvision", "timm", "transformers", "matplotlib.pyplot", "IPython", "pandas"}
# The command, what it cannot do without, what it never needs.
COMMANDS = [
    ("--help", {"typer"}, {"numpy", "h5py", "rich", "importlib.metadata"}),
    ("extract --help", {"typer"}, {"numpy", "h5py", "rich"}),
    ("models res* --provider torchvision", {"bbx.providers.listing", "rich"}, {"numpy", "h5py", "bbx.store"}),
    ("models res* --json", {"bbx.providers.listing"}, {"numpy", "h5py", "bbx.store", "rich"}),
    ("info f.h5", {*READS, "rich"}, {"PIL", "matplotlib"}),
    ("info f.h5 --json", READS, {"PIL", "matplotlib", "rich"}),
    ("show f.h5 --image 0 --stages stem -o one.png", {*READS, "matplotlib.figure"}, {"bbx.images", "rich"}),
    ("verify f.h5", READS, {"matplotlib"}),
    ("diff f.h5 f.h5", READS, {"matplotlib", "PIL"}),
    ("merge f.h5 -o merged.h5", READS, {"matplotlib", "PIL"}),
    ("export f.h5 --to npy", READS, {"matplotlib", "PIL"}),
]


@pytest.fixture
def file(bbx_cli, pictures) -> Path:
    """A feature file of all stages, `f.h5` in the current folder."""
    assert bbx_cli("extract", "-q", "--model", "toy", "--stages", "all", pictures, "-o", "f.h5").code == 0
    return Path("f.h5")


@pytest.mark.parametrize(("command", "needed", "spared"), COMMANDS, ids=[command for command, _, _ in COMMANDS])
def test_a_command_loads_what_it_uses(file, command, needed, spared):
    code = CURRENT + MAIN if command.startswith("models") else MAIN
    ran = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    loaded = set(Path("loaded.txt").read_text().split())
    assert needed <= loaded
    assert sorted((FRAMEWORKS | spared) & loaded) == []
    assert Path("collects.txt").read_text() == str("--help" not in command)


@pytest.mark.parametrize("command", app.registered_commands, ids=lambda command: command.callback.__name__)
def test_every_command_has_the_collector_work_again_once_it_has_loaded(command):
    assert "with loading()" in inspect.getsource(command.callback)


DRAWN = """
from bbx.cli import main
try:
    main()
finally:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    print(len(Axes.set.__doc__ or ""), len(type("Later", (Artist,), {}).set.__doc__))
"""


def test_show_has_matplotlib_write_no_help_texts_and_leaves_it_as_it_was(file):
    command = "show f.h5 --image 0 --stages stem -o one.png"
    ran = subprocess.run([sys.executable, "-c", DRAWN, *command.split()], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    drawn, later = map(int, ran.stdout.splitlines()[-1].split())
    assert drawn < 100 < later
