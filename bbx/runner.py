"""The whole job: images, backbone, output → `extract`, with all defaults; the loop itself is in `loop`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bbx.backbone import Backbone, normalise
from bbx.bits import same_bits
from bbx.engine import EngineSettings, Work, choose, forward_rate, grow, kept_memory, usual_batch
from bbx.engine import deterministic as only_deterministic
from bbx.errors import ImageError, UsageError
from bbx.gpu_decode import can_decode, check_device, decoders_for
from bbx.gpu_decode import check as check_decode
from bbx.images import MAX_PIXELS, DecodeSettings, ImageList, cell_dtype, find_images, read_image
from bbx.images.decoders import TIMEOUT
from bbx.loop import Progress, run_loop
from bbx.machine import cores
from bbx.options import batch_size_of, check_words, number, sides, whole
from bbx.plan import Plan, Summary, attempt, find_device, free_nbytes
from bbx.rates import LONG, measured
from bbx.rebuild import Request, check_weights, config_of, images_of, options_of
from bbx.skip import skip_held
from bbx.spec import (
    BatchSize,
    ChannelsLast,
    Compress,
    Decode,
    Dtype,
    Engine,
    ExifMode,
    Mode,
    Norm,
    OnError,
    Pool,
    Precision,
    ResizeMode,
    RunSpec,
    Stage,
    seed_of,
)
from bbx.store import FeatureFile, FeatureWriter, Target, check_target

USUAL: dict[str, Any] = {
    "model": "", "config": None, "stages": None, "layers": (), "weights": "auto", "seed": 0, "size": None,
    "resize_mode": None, "exif": "apply", "decode": "exact", "norm": "raw", "tokens": False,
    "dtype": "float32", "precision": "float32", "pool": "none",
}  # fmt: skip
"""What makes the run, where neither the caller nor the file of `like` says it."""
# What in a run follows from which option: with one of these given, `like` does not vouch for the weights, or the input.
_WEIGHTS = {"model", "config", "weights", "seed"}
_INPUT = {"model", "config", "weights", "size", "resize_mode", "exif", "decode"}


@kept_memory()  # before anything starts threads
def extract(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    *,
    model: str | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    stages: str | Iterable[str | int] | None = None,
    layers: str | Iterable[str] | None = None,
    weights: str | None = None,
    seed: int | None = None,
    size: int | tuple[int, int] | None = None,
    resize_mode: ResizeMode | None = None,
    exif: ExifMode | None = None,
    decode: Decode | None = None,
    norm: Norm | None = None,
    tokens: bool | None = None,
    dtype: Dtype | None = None,
    precision: Precision | None = None,
    pool: Pool | None = None,
    like: str | os.PathLike[str] | None = None,
    skip_in: str | os.PathLike[str] | None = None,
    batch_size: BatchSize | None = None,
    workers: int | None = None,
    device: str = "auto",
    engine: Engine = "eager",
    channels_last: ChannelsLast = "auto",
    deterministic: bool = False,
    image_timeout: float = TIMEOUT,
    max_pixels: int = MAX_PIXELS,
    digest: bool = True,
    output: str | os.PathLike[str] = "features.h5",
    compress: Compress = "none",
    mode: Mode = "auto",
    retry_failed: bool = False,
    on_error: OnError = "skip",
    dry_run: bool = False,
    stdin: Iterable[bytes] | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    progress: Progress | None = None,
    stop: Callable[[], int | None] | None = None,
) -> Summary:
    """Extracts feature maps of `images` into one HDF5 file; called again after a kill, it goes on where it was.

    `model` names a backbone; `config`, a mapping or a YAML, TOML or JSON file, describes one with neck and head
    (`bbx.assemble`). `images`: folders, files, globs, `@list.txt`, `-` (paths from `stdin`). `stages` as in
    `select_stages` (default: the last), `layers` any module paths or globs. `weights`: `auto` (the default), `random`
    (by `seed`, default 0), a file, or the library's name for some.
    `size` (pixels, or (height, width)), `resize_mode` and `exif` override the weights' own preprocessing.
    `decode`: `exact`, the pixels of the weights' own library (the default), or `fast`, nearly the same for less, or
    `gpu`, nearly the same by the CUDA device's decoder, with `exact` for all that is no plain baseline JPEG: in this
    process, where a picture that crashes nvJPEG ends the run, and no `image_timeout` reaches it.
    `norm`: `raw` maps (the default), or `native`, what the library's own backbone class gives; `tokens`: a plain ViT's
    stages as `(t, d)`, prefix tokens kept.
    `dtype` is on disk, `precision` in computing, both float32 by default; `pool` stores `(c,)` per stage instead of
    `(c, h, w)`.
    `like`, a feature file, says all of the above where the call does not; without `images`, its images are meant.
    `skip_in`, a feature file: only the images that it does not hold, or holds in an older version.
    `batch_size`: images in a batch, default 8 on a CPU, 4 where it computes attention, and 64 elsewhere; `auto`
    measures what is best; a CPU computes a batch per thread at once, of 8 at most and 64 images in all. `workers`:
    decoding processes, default the cores; `engine`: `compile` has torch.compile make code for the network, where the
    job is long enough to pay for it;
    `channels_last`: whether maps are so laid out in memory while computing.
    `image_timeout` in seconds and `max_pixels` are what one image may take; `digest`: record that of each input file.
    `deterministic`: only algorithms that give the same bits each time, each row at its own place of a whole batch.
    `compress`: the finished file is packed by `gzip`.
    `mode`: `auto` resumes the same run and refuses another's file; `new`, `resume`, `overwrite` insist. `retry_failed`:
    failed rows are computed again; without `images` and `model`, those of `output`.
    `on_error`: a bad image is a failed row (`skip`) or ends the run (`fail`). `stop` is asked after each batch and
    returns a signal number to stop at. `progress` is called after each batch.

    Raises `UsageError`, `StartError` and its kin (weights, input, disk, another run's file), `WriteError`,
    `InterruptedRunError`, and with `on_error="fail"` `ImageError`. A failed row is no error: see `Summary.failures`.
    """
    wishes = {
        "model": model, "config": config_of(config), "stages": stages, "layers": layers, "weights": weights,
        "seed": None if seed is None else seed_of(seed), "size": sides(size), "resize_mode": resize_mode,
        "exif": exif, "decode": decode, "norm": norm, "tokens": tokens, "dtype": dtype, "precision": precision,
        "pool": pool,
    }  # fmt: skip
    given = {name: value for name, value in wishes.items() if value is not None}
    batch_size = batch_size_of(batch_size, deterministic=deterministic)
    workers = None if workers is None else whole("workers", workers)
    image_timeout, max_pixels = number("image_timeout", image_timeout), whole("max_pixels", max_pixels)
    words = {"mode": mode, "on_error": on_error, "compress": compress, "engine": engine, "channels_last": channels_last}
    check_words({**words, **given})
    if retry_failed and images is None and like is None and not given:
        like = output  # nothing but the file itself says what it is to be like
    where = find_device(device)
    if deterministic and where.type == "cuda":  # what torch asks for, where older ones look once, at the first product
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    run_like, options = _options(given, like)
    _check_decode(options["decode"], where, deterministic=deterministic)
    found = _images(images, like, skip_in, stdin)  # before the weights, which may be a download
    request = Request(**{name: options[name] for name in Request.__slots__})
    backbone = request.build(options["stages"], options["layers"])
    if run_like is not None:
        backbone = _as_recorded(backbone, run_like, set(given))
    check_decode(backbone.preprocess, where)
    backbone = backbone.to(where, precision=options["precision"])
    run = run_of(backbone, dtype=options["dtype"], pool=options["pool"], source=request.to_json())
    path = Path(output)
    target = check_target(path, run, found.keys, mode, retry_failed=retry_failed)
    seconds = math.inf  # --deterministic keeps to the word: what is measured may be another thing when it is resumed
    if engine == "compile" and not deterministic:
        seconds = _eager_seconds(backbone, where, run, target.pending, channels_last)

    def settings(size: int) -> EngineSettings:
        # By all rows, not by those that are left: a resumed run computes as it began, but for what compiling pays.
        return choose(
            backbone, where, engine=engine, channels_last=channels_last, rows=len(found), batch_size=size,
            seconds=seconds,
        )  # fmt: skip

    wanted, said = _batch_size(batch_size, backbone, where, Work(run.dtype, run.pool, 1), settings, target)
    at_once = min(wanted, len(found))
    how = settings(at_once)
    plan = Plan(
        found, backbone, run, path, target, where,
        batch_size=at_once,
        workers=workers or cores(),
        free_nbytes=free_nbytes(path),
        decoding=DecodeSettings(run.preprocess, image_timeout, max_pixels, digest),
        engine=how,
        deterministic=deterministic,
        retry_failed=retry_failed,
        fresh=mode in ("new", "overwrite"),
        compress=compress,
        notes=tuple(note for note in (how.why, said) if note),
    )  # fmt: skip
    plan = replace(plan, notes=(*plan.notes, *same_bits(plan)))
    if target.pending >= (1 if dry_run else LONG) and plan.needed_nbytes <= plan.free_nbytes:
        with only_deterministic(deterministic):  # whose algorithms are slower
            plan = measured(plan)
    if on_plan:
        on_plan(plan)
    plan.check_disk()
    summary = Summary(path, len(found), done=target.done)
    for key, reason in _failed_before(target).items():
        summary.add_failure(key, reason)
    if target.state == "complete" and compress != "none" and not _is_packed(path):
        summary.notes.append(
            f"{path} is complete as it is: bbx merge {path} -o packed.h5 --compress {compress} packs it"
        )
    # A complete output with a .partial beside it may be what a kill right after packing left: the writer sees to it.
    if not dry_run and (target.state != "complete" or path.with_name(f"{path.name}.partial").exists()):
        with FeatureWriter.open(
            path, run, found.keys, attempt=attempt(plan), mode=mode, retry_failed=retry_failed, compress=compress,
            stop=stop, packing=_packing(summary, progress),
        ) as writer:  # fmt: skip
            run_loop(plan, writer, writer.pending, summary, on_error=on_error, progress=progress, stop=stop)
    return summary


def _eager_seconds(
    backbone: Backbone, device: torch.device, run: RunSpec, rows: int, channels_last: ChannelsLast
) -> float:
    """How long eager code computes for `rows` images, as far as a second's measuring tells.

    Raises where compiling could not be had, however long that is.
    """
    size = min(usual_batch(backbone, device), rows)
    how = choose(
        backbone, device, engine="compile", channels_last=channels_last, rows=rows, batch_size=size, seconds=0.0
    )
    if not size:
        return 0.0
    return rows / forward_rate(backbone, device, Work(run.dtype, run.pool, size), how).rate


def _batch_size(
    wish: BatchSize | None,
    backbone: Backbone,
    device: torch.device,
    work: Work,
    settings: Callable[[int], EngineSettings],
    target: Target,
) -> tuple[int, str]:
    """How many images at once, and what a measurement said of it, if there was one."""
    usual = usual_batch(backbone, device)
    if wish != "auto":
        return wish or usual, ""
    if not target.pending:
        return usual, ""
    growth = grow(backbone, device, work, settings, most=target.pending)
    return growth.best, growth.describe()


def _packing(summary: Summary, progress: Progress | None) -> Callable[[int, int], None] | None:
    """Tells `progress` of the packing, too, which comes after the last batch."""
    if progress is None:
        return None

    def told(done: int, total: int) -> None:
        summary.packed = done / max(1, total)
        progress(summary)

    return told


def _is_packed(path: Path) -> bool:
    with FeatureFile(path) as file:
        return file.packed


def run_of(backbone: Backbone, *, dtype: Dtype, pool: Pool, source: str = "") -> RunSpec:
    """What makes a run with this backbone this run."""
    return RunSpec(
        model=str(backbone.ref),
        weights=backbone.weights,
        weights_digest=backbone.weights_digest,
        stages=tuple(_stored(stage, pool) for stage in backbone.stages),
        preprocess=backbone.preprocess,
        dtype=dtype,
        pool=pool,
        precision=backbone.precision,
        norm=backbone.norm,
        tokens=backbone.tokens,
        config=backbone.config,
        source=source,
    )


def _options(given: dict[str, Any], like: str | os.PathLike[str] | None) -> tuple[RunSpec | None, dict[str, Any]]:
    """What to do: as `given`, else as the file `like` was made, whose run comes along, else as usual."""
    if like is None:
        return None, USUAL | given
    run, recorded = options_of(like, given)
    # One word of the user stands for several of the file's.
    for words in ({"stages", "layers"}, {"model", "config"}):
        if words & set(given):
            recorded = {name: value for name, value in recorded.items() if name not in words}
    return run, USUAL | recorded | given


def _images(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None,
    like: str | os.PathLike[str] | None,
    skip_in: str | os.PathLike[str] | None,
    stdin: Iterable[bytes] | None,
) -> ImageList:
    if images is not None and (isinstance(images, str | os.PathLike) or len(images)):
        inputs = [images] if isinstance(images, str | os.PathLike) else images
        found = find_images(inputs, stdin=stdin)
    elif like is not None:
        found = images_of(like)
    else:
        raise UsageError(
            "which images? name a folder, files, a glob, @list.txt or -", "bbx extract --model NAME images/"
        )
    return found if skip_in is None else skip_held(found, skip_in)


def _as_recorded(backbone: Backbone, run: RunSpec, given: set[str]) -> Backbone:
    """The backbone with the preprocessing of the file it is to be like, unless the user asked for another."""
    if not given & _WEIGHTS:
        check_weights(backbone, run)
    return backbone if given & _INPUT else replace(backbone, preprocess=run.preprocess)


def _check_decode(decode: Decode, device: torch.device, *, deterministic: bool) -> None:
    """Raises `UsageError` where the GPU is to decode and cannot, or may not."""
    if decode != "gpu":
        return
    check_device(device)
    if deterministic:
        raise UsageError(
            "--deterministic does not go with --decode gpu, where a picture that finds no GPU memory is the CPU's",
            "--decode fast gives the same bits each time, and so does exact, the default",
        )


def features(backbone: Backbone, path: str | os.PathLike[str]) -> tuple[NDArray[np.uint8], dict[str, NDArray[Any]]]:
    """One image, no file between: the input as the network saw it `(h, w, 3)`, and each stage's map `(c, h, w)`.

    Raises `ImageError`.
    """
    device = next(backbone.network.parameters(), torch.empty(0)).device
    cells = np.zeros((*backbone.preprocess.size, 3), cell_dtype(backbone.preprocess))
    decoding = DecodeSettings(backbone.preprocess, digest=False)
    with decoders_for(1, decoding, device if can_decode(device) else find_device("auto")) as decoders:
        if reason := decoders.submit(os.fspath(path), cells).result().reason:
            raise ImageError(reason)
    with torch.inference_mode():
        maps = backbone(normalise(torch.from_numpy(cells)[None].to(device), backbone.preprocess))
    picture = cells if cells.dtype == np.uint8 else read_image(path, replace(backbone.preprocess, processor=""))
    return picture, {name: tensor[0].float().cpu().numpy() for name, tensor in maps.items()}


def _failed_before(target: Target) -> dict[str, str]:
    if not target.failed:
        return {}
    with FeatureFile(target.path, partial=target.state == "resume") as file:
        return dict(file.failed)


def _stored(stage: Stage, pool: Pool) -> Stage:
    if pool == "none":
        return stage
    return replace(stage, shape=(stage.channels,), stride=0.0)
