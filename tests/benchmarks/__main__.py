"""bbx against the loop that people write by hand, and threads against processes for decoding.

Both sides get the same pictures, weights, batch size and number of decoders, in alternation (A B A B …); printed are
the median time of each and the ratio. Absolute times mean little on a shared machine, ratios within a run do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.models.feature_extraction import create_feature_extractor

from bbx.images import read_image
from bbx.providers import load_backbone
from bbx.runner import extract

SAMPLES = Path(__file__).parents[2] / "sample_images"
JOBS = {
    "A": ("swin_t", {"features.0": "stem", "features.1": "stage1", "features.3": "stage2"}),
    "B": ("resnet50", {"maxpool": "stem", "layer1": "stage1", "layer2": "stage2"}),
}


def make_pictures(folder: Path, count: int) -> list[Path]:
    """`count` JPEGs of 640×480, random crops of the sample pictures."""
    random = np.random.default_rng(0)
    sources = [Image.open(path).convert("RGB") for path in sorted(SAMPLES.glob("*.[jp][pn]g"))]
    paths = []
    for number in range(count):
        picture = sources[number % len(sources)]
        width, height = (int(side * random.uniform(0.6, 0.95)) for side in picture.size)
        left, top = random.integers(0, picture.width - width), random.integers(0, picture.height - height)
        crop = picture.crop((left, top, left + width, top + height)).resize((640, 480))
        paths.append(folder / f"{number:05}.jpg")
        crop.save(paths[-1], quality=90)
    return paths


class Pictures(torch.utils.data.Dataset):
    """What the hand-written loop reads from."""

    def __init__(self, paths: Sequence[Path], transforms: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.transforms = paths, transforms

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transforms(Image.open(self.paths[index]).convert("RGB"))


def by_hand(job: str, paths: Sequence[Path], output: Path, *, batch_size: int, workers: int) -> None:
    """The usual loop: torchvision's feature extractor, a DataLoader, rows appended through h5py."""
    name, nodes = JOBS[job]
    torch.manual_seed(0)
    network = create_feature_extractor(torchvision.models.get_model(name, weights=None).eval(), nodes)
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    loader = torch.utils.data.DataLoader(Pictures(paths, transforms), batch_size=batch_size, num_workers=workers)
    with h5py.File(output, "w") as file, torch.inference_mode():
        start = 0
        for batch in loader:
            for stage, maps in network(batch).items():
                value = (maps.permute(0, 3, 1, 2).contiguous() if job == "A" else maps).numpy()
                if stage not in file:
                    file.create_dataset(stage, (len(paths), *value.shape[1:]), "f4", chunks=(1, *value.shape[1:]))
                file[stage][start : start + len(value)] = value
            start += len(batch)


def by_bbx(job: str, paths: Sequence[Path], output: Path, *, batch_size: int, workers: int) -> None:
    """The same through bbx, on the same images, with the same seed."""
    name, nodes = JOBS[job]
    extract([*paths], model=name, stages=list(nodes.values()), weights="random", output=output, mode="overwrite",
            batch_size=batch_size, workers=workers)  # fmt: skip


def decode(pool: Callable[[int], Executor], paths: Sequence[Path], *, workers: int) -> None:
    """Every picture decoded and scaled, as for swin-tiny."""
    preprocess = load_backbone("resnet18", weights="random").preprocess
    with pool(workers) as executor:
        assert len(list(executor.map(partial(read_image, preprocess=preprocess), paths, chunksize=8))) == len(paths)


def alternate(first: Callable[[], None], second: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median seconds of both, run in turn; one warm-up each is thrown away."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for side, run in zip(seconds, (first, second), strict=True):
            began = time.perf_counter()
            run()
            side.append(time.perf_counter() - began)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def main() -> None:
    """Runs what was asked for, and prints a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    say = partial(print, file=sys.stdout, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        paths = make_pictures(Path(folder), options.images)
        for job, (name, _) in JOBS.items():
            sides = [
                partial(
                    side,
                    job,
                    paths,
                    Path(folder) / f"{label}.h5",
                    batch_size=options.batch_size,
                    workers=options.workers,
                )
                for label, side in (("bbx", by_bbx), ("hand", by_hand))
            ]
            ours, theirs = alternate(*sides, options.repeats)
            say(f"job {job} ({name}): bbx {ours:.2f} s, by hand {theirs:.2f} s, {theirs / ours:.2f} × as fast")
        pools = (ThreadPoolExecutor, ProcessPoolExecutor)
        sides = [partial(decode, pool, paths, workers=options.workers) for pool in pools]
        threads, processes = alternate(*sides, options.repeats)
        took = f"threads {threads:.2f} s, processes {processes:.2f} s (start included)"
        say(f"decode, {options.workers} workers: {took}, {processes / threads:.2f} × as fast")


if __name__ == "__main__":
    main()
