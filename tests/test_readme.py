"""The README is executed: its commands, its Python, its table; and it names every command there is."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from bbx import cli
from bbx.providers import load_structure
from tests.conftest import ALL, EXTRAS, SAMPLES

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
# What needs the extras is run where they are installed: in CI's second pass.
RUNNABLE = TEXT if len(EXTRAS) == len(ALL) else re.sub(r"<!-- extras -->.+?<!-- /extras -->", "", TEXT, flags=re.DOTALL)
COMMANDS = re.findall(r"^\$ bbx (.+)$", RUNNABLE, re.MULTILINE)
BLOCKS = re.findall(r"```python\n(.+?)```", RUNNABLE, re.DOTALL)
TABLE_MODELS = (
    "efficientnet-lite0", "resnet-50", "convnext-tiny", "swin-tiny", "swinv2-tiny", "efficientnet-b0",
    "mobilenet-v3-large", "inception-v3",
)  # fmt: skip


def between(marker: str) -> str:
    return TEXT.split(f"<!-- {marker} -->")[1].split(f"<!-- /{marker} -->")[0]


def test_every_command_line_and_block_works_in_order(bbx_cli, tmp_path, monkeypatch):
    shutil.copytree(SAMPLES, tmp_path / "sample_images")
    (tmp_path / "my.yaml").write_text(re.findall(r"```yaml\n(.+?)```", TEXT, re.DOTALL)[0])
    (tmp_path / "list.txt").write_text("sample_images/rocket.jpg\nsample_images/coffee.png\n")
    assert len(COMMANDS) >= 9
    for command in COMMANDS:
        words = [
            path for word in shlex.split(command) for path in (sorted(tmp_path.glob(word)) if "/*" in word else [word])
        ]
        ran = bbx_cli(*words)
        assert ran.code == 0, f"{command}\n{ran.err}"
    (tmp_path / "features.h5").unlink()
    assert BLOCKS
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), {})


def test_the_first_command_extracts_and_shows(bbx_cli, tmp_path):
    shutil.copytree(SAMPLES, tmp_path / "sample_images")
    commands = re.findall(r"\.venv/bin/bbx ([^&`\n]+)", between("first"))
    assert [command.split()[0] for command in commands] == ["extract", "show"]
    ran = [bbx_cli(*shlex.split(command)) for command in commands]
    assert [result.code for result in ran] == [0, 0]
    drawn = ran[1].out.split()
    assert len(drawn) == 5 * 4
    assert all((tmp_path / path).stat().st_size > 10_000 for path in drawn)


@pytest.mark.parametrize(
    "command", [command.name or command.callback.__name__ for command in cli.app.registered_commands]
)
def test_every_command_is_named(command):
    assert re.search(rf"^\$ bbx {command} ", TEXT, re.MULTILINE)


def test_every_exit_code_is_documented():
    assert all(f"`{code}`" in TEXT for code in (0, 1, 2, 3, 4, 5, 130, 143))


def stage_row(model: str) -> str:
    backbone = load_structure(model)
    cells = [f"{stage.shape[0]}@{stage.shape[1]}" for stage in backbone.stages]
    return (
        " | ".join([f"| {model}", str(backbone.preprocess.size[0]), *cells, *[""] * (6 - len(cells))]).rstrip() + " |"
    )


@pytest.mark.parametrize("model", TABLE_MODELS)
def test_the_stage_table_is_what_the_models_give(model):
    assert stage_row(model) in between("stages").splitlines()


def test_it_is_short():
    assert len(TEXT.splitlines()) < 200
