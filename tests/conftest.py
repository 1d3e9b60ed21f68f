"""Fixtures of every test: the toy provider, pictures made on the spot, and no network."""

import io
import os
import signal
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # as many tests at a time as there are cores: each has one
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
from PIL import Image

import bbx.providers

# A shell that ran the tests in its background has them ignore it, and all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What is installed besides the core. CI runs the suite without them, then with all: there, none may be missing.
ALL = ("timm", "transformers", "zarr", "pyarrow", "isal")
EXTRAS = [name for name in ALL if find_spec(name)]
if os.environ.get("BBX_TEST_EXTRAS") and len(EXTRAS) < len(ALL):
    raise RuntimeError(f"BBX_TEST_EXTRAS is set, but only {EXTRAS} are installed")
# Modules about a library that is not there; `test_auto` and the rest name their models by EXTRAS.
_NEEDS = {
    "timm": ["test_timm*.py", "test_transplant.py"],
    "transformers": ["test_transformers*.py", "test_processor.py", "test_transplant.py"],
    "zarr": ["test_export_zarr.py"],
    "pyarrow": ["test_export_parquet.py"],
}
collect_ignore_glob = [pattern for name, patterns in _NEEDS.items() if name not in EXTRAS for pattern in patterns]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults-scale", default=os.environ.get("BBX_FAULTS_SCALE", "1"), help="times the usual number of faults"
    )


SAMPLES = Path(__file__).parent.parent / "sample_images"


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model `toy`."""
    monkeypatch.setitem(bbx.providers.PROVIDERS, "toy", ("tests.toy",))


@pytest.fixture(autouse=True)
def threads_as_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads as a test sets, also in a container that has the time of fewer."""
    monkeypatch.setattr("bbx.engine.settings.quota", lambda: float("inf"))


@pytest.fixture
def picture():
    """`picture(path, seed)`: a small photograph-like PNG or JPEG, another for each seed."""

    def make(path: Path, seed: int = 0, size: tuple[int, int] = (48, 40)) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).save(path)
        return path

    return make


@pytest.fixture
def pictures(tmp_path: Path, picture) -> Path:
    """A folder of seven pictures."""
    for number in range(7):
        picture(tmp_path / "pictures" / f"{number:03}.png", number)
    return tmp_path / "pictures"


@dataclass
class Ran:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def bbx_cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`bbx_cli("info", "x.h5")` runs the command in `tmp_path`, in this process, as `bbx info x.h5` would."""
    from bbx import cli

    monkeypatch.chdir(tmp_path)

    def run(*words: object, stdin: bytes = b"") -> Ran:
        monkeypatch.setattr("sys.argv", ["bbx", *map(str, words)])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:  # an error leaves them ignored, for the process is about to end
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        out, err = capsys.readouterr()
        return Ran(int(ended.value.code or 0), out, err)

    return run
