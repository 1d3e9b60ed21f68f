"""Pictures say what the arrays hold: which channel, on which scale, and what is wrong with it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from bbx.errors import UsageError, WriteError
from bbx.plots import PLOTS, channel_grid, contact_sheet, parse_channels, save, token_matrix, vector_bars
from bbx.plots.page import tidy
from bbx.plots.tiles import NAN, NEGINF, POSINF, Tiles, choose_colours, columns_for, enlarge, mosaic, paint

MAPS = np.random.default_rng(0).random((6, 3, 12)).astype(np.float32)
SIGNED = np.random.default_rng(1).normal(size=(6, 3, 12)).astype(np.float32)
PICTURE = np.random.default_rng(2).integers(0, 256, (12, 48, 3), np.uint8)


def pixels(figure: Figure) -> np.ndarray[Any, Any]:
    """The figure as drawn, `(h, w, 3)`, any warning being an error."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def texts(figure: Figure) -> str:
    return "\n".join(found.get_text() for found in figure.findobj(Text))  # type: ignore[attr-defined]


def count(figure: Figure, colour: tuple[int, int, int]) -> int:
    return int((pixels(figure) == colour).all(-1).sum())


def painted(maps: np.ndarray[Any, Any], scale: str = "shared", cmap: str | None = None) -> np.ndarray[Any, Any]:
    """One pixel per cell."""
    values = np.asarray(maps, np.float64)
    return paint(Tiles.of(values, [""] * len(values), scale, cmap), values.shape[1:])


# Channels: --channels


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0:3", [0, 1, 2]),
        ("3,1", [3, 1]),
        ("5", [5]),
        ("-1", [5]),
        ("::2", [0, 2, 4]),
        ("4:64", [4, 5]),
        ("all", [0, 1, 2, 3, 4, 5]),
        ("1, 0:3, 1", [1, 0, 2]),
    ],
)
def test_channels_are_indices_and_ranges_in_the_order_named(text: str, expected: list[int]) -> None:
    assert parse_channels(text, MAPS) == expected


@pytest.mark.parametrize(("by", "expected"), [("", [2, 0]), (":mean", [2, 0]), (":max", [1, 2]), (":std", [1, 0])])
def test_top_ranks_by_finite_values(by: str, expected: list[int]) -> None:
    maps = np.array([[[1.0, 2.0]], [[-9.0, 9.0]], [[5.0, np.nan]], [[np.nan, np.nan]]])
    assert parse_channels(f"top:2{by}", maps) == expected


def test_top_of_more_than_there_are_is_all() -> None:
    assert sorted(parse_channels("top:99", MAPS)) == list(range(6))


@pytest.mark.parametrize("word", ["6", "-7", "x", "top:0", "top:3:median", "1:2:0", "1.5", "", ",", "6:9", "²"])
def test_a_wrong_selection_is_named_with_what_is_valid(word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_channels(word, MAPS)
    assert repr(word) in caught.value.message or word in caught.value.message
    assert "0–5" in caught.value.hint


def test_ranking_survives_large_values() -> None:
    maps = np.array([[[1e300, -1e300]], [[1.0, 2.0]], [[3e38, 3e38]]])
    assert parse_channels("top:3:std", maps) == [0, 1, 2]


# Colours


def test_a_tile_is_the_colour_map_applied_to_its_channel() -> None:
    low, high = 0.0, np.percentile(MAPS.astype(np.float64), 99.5)
    expected = colormaps["magma"](np.clip((MAPS.astype(np.float64) - low) / (high - low), 0, 1), bytes=True)[..., :3]
    assert np.abs(painted(MAPS).astype(int) - expected).max() <= 1


def test_per_channel_scale_spans_each_tile() -> None:
    tiles = painted(MAPS * np.arange(1, 7)[:, None, None], "channel", "gray")
    assert tiles.min((1, 2, 3)).tolist() == [0] * 6
    assert tiles.max((1, 2, 3)).tolist() == [255] * 6


def test_both_signs_are_centred_on_zero() -> None:
    colours = choose_colours(SIGNED.astype(np.float64), "shared", None)
    assert colours.centred
    assert (colours.low == -colours.high).all()


def test_a_sequential_map_by_request_is_not_centred() -> None:
    assert not choose_colours(SIGNED.astype(np.float64), "shared", "viridis").centred


def test_one_outlier_does_not_dim_the_rest_and_the_label_says_so() -> None:
    maps = np.tile(np.linspace(0, 1, 400).reshape(1, 20, 20), (4, 1, 1))
    maps[0, 0, 0] = 1000.0
    assert choose_colours(maps, "shared", None).high.max() <= 1.0
    assert "of values lie beyond the ends" in texts(channel_grid(maps))


def test_a_sparse_map_keeps_its_few_values() -> None:
    maps = np.zeros((1, 30, 30))
    maps[0, 4, 4] = 7.0
    assert choose_colours(maps, "shared", None).high.max() == 7.0


def test_an_unknown_colour_map_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        channel_grid(MAPS, cmap="virids")
    assert "viridis" in caught.value.hint


def test_an_unknown_scale_names_the_valid() -> None:
    with pytest.raises(UsageError) as caught:
        channel_grid(MAPS, scale="global")
    assert caught.value.hint == "valid: shared, channel"


def test_enlarging_does_not_move_what_is_where() -> None:
    ramp = np.arange(8.0).reshape(1, 1, 8)
    assert np.allclose(enlarge(ramp, (2, 16))[0, 0, 2:-2], (np.arange(16) / 2 - 0.25)[2:-2])


# The mosaic


def test_tile_and_corner_agree() -> None:
    tiles = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 4, 3), np.uint8)
    board, corners = mosaic(tiles, 2, (2, 1))
    assert board.shape == (15, 9, 3)
    for number, (x, y) in enumerate(corners):
        assert (board[y : y + 3, x : x + 4] == number).all()
    assert (board[0] == 255).all()


@pytest.mark.parametrize(("number", "columns"), [(1, 1), (16, 4), (32, 8), (64, 8), (96, 12)])
def test_common_channel_counts_fill_the_page(number: int, columns: int) -> None:
    assert columns_for(number, (7, 7)) == columns


def test_each_cell_is_drawn_in_its_colour_and_whole() -> None:
    maps = np.linspace(0, 1, 12).reshape(1, 3, 4)
    drawn = pixels(channel_grid(maps, scale="channel", cmap="viridis"))
    for value in maps.flat:
        colour = colormaps["viridis"](float(value), bytes=True)[:3]
        cells = np.argwhere((drawn[60:-84] == colour).all(-1))
        height, width = np.ptp(cells, axis=0) + 1
        assert height * width == len(cells)
        assert height == width > 50


# Marks


def test_nan_and_both_infinities_have_their_own_colours() -> None:
    maps = MAPS.copy()
    maps[0, 0, 0], maps[1, 1, 1], maps[2, 2, 2] = np.nan, np.inf, -np.inf
    tiles = painted(maps)
    assert tuple(tiles[0, 0, 0]) == NAN
    assert tuple(tiles[1, 1, 1]) == POSINF
    assert tuple(tiles[2, 2, 2]) == NEGINF


def test_marks_are_visible_and_in_the_legend_only_when_present() -> None:
    clean, marked = MAPS, MAPS.copy()
    marked[3, 0, 0], marked[3, 1, 1], marked[4, 2, 2] = np.nan, np.inf, -np.inf
    for maps, present in ((clean, False), (marked, True)):
        figure = channel_grid(maps)
        drawn = pixels(figure)
        for colour, words in ((NAN, "NaN: 1 value"), (POSINF, "+inf: 1 value"), (NEGINF, "−inf: 1 value")):
            assert ((drawn == colour).all(-1).sum() > 1000) == present
            assert (words in texts(figure)) == present


def test_dead_and_constant_channels_are_hatched_and_named() -> None:
    maps = MAPS.copy()
    maps[1], maps[4] = 0, 0.3125
    tiles = painted(maps)
    assert (np.ptp(tiles[1].astype(int), axis=-1) < 10).all()
    words = texts(channel_grid(maps))
    assert "dead (all 0): 1 channel" in words
    assert "const\n0.3125" in words


def test_a_channel_of_one_cell_is_not_constant() -> None:
    assert "const" not in texts(channel_grid(MAPS[:, :1, :1]))


def test_trouble_in_channels_not_shown_is_told() -> None:
    maps = MAPS.copy()
    maps[5] = np.nan
    assert "NaN or inf in 1 channels not shown" in texts(channel_grid(maps, channels="0:3"))


# Titles and texts


def test_the_title_tells_image_stage_shape_stride_and_what_is_shown() -> None:
    words = texts(channel_grid(np.ones((96, 7, 7)), image="cat.jpg", stage="stage1", stride=4.0))
    assert "cat.jpg  ·  stage1" in words
    assert "96 × 7 × 7  ·  stride 4  ·  channels 0–63 of 96" in words


@pytest.mark.parametrize(("scale", "words"), [("shared", "one scale for all tiles"), ("channel", "its own minimum")])
def test_the_colour_bar_says_what_it_means(scale: str, words: str) -> None:
    assert words in texts(channel_grid(MAPS, scale=scale))


@pytest.mark.parametrize("name", [r"$\frac{$ \alpha", "a\nb\x00\x1b[31m", "\udcff", "图像", "\u202egpj"])
def test_any_file_name_is_drawn_as_it_is(name: str, tmp_path: Path) -> None:
    figure = channel_grid(MAPS, image=name, stage="$s$")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(figure, tmp_path / "out.svg")
    if name.isprintable():
        assert name in texts(figure)


def test_long_names_are_shortened_in_the_middle() -> None:
    short = tidy("a" * 100 + ".jpg", 20)
    assert len(short) == 20
    assert short.startswith("aaa")
    assert short.endswith("….jpg") or short.endswith(".jpg")
    assert "…" in short
    assert len(tidy("图" * 100, 20)) <= 11


def test_control_characters_become_a_replacement_sign() -> None:
    assert tidy("a\n\tb\u2028c\u202e", 50) == "a\ufffd\ufffdb\ufffdc\ufffd"


# Shapes and numbers


@pytest.mark.parametrize(
    "shape", [(1, 7, 7), (3, 1, 1), (2, 224, 224), (5, 3, 90), (5, 90, 3), (1, 1, 900), (70, 2, 2)]
)
def test_any_shape_draws(shape: tuple[int, ...]) -> None:
    figure = channel_grid(np.random.default_rng(0).normal(size=shape))
    assert " × ".join(map(str, shape)) in texts(figure)
    assert len(np.unique(pixels(figure)[..., :3].reshape(-1, 3), axis=0)) > 10


def test_every_one_of_2048_channels_has_its_tile() -> None:
    maps = np.random.default_rng(0).random((2048, 1, 1))
    figure = channel_grid(maps, channels="all")
    assert "all 2048 channels" in texts(figure)
    assert max(figure.get_size_inches() * figure.dpi) < 4000
    board = max((image.get_array() for image in figure.axes[0].images), key=np.size)
    assert board is not None
    codes = np.asarray(board)[..., :3].astype(int) @ (65536, 256, 1)
    assert set(np.unique(painted(maps).astype(int) @ (65536, 256, 1))) == set(np.unique(codes)) - {0xFFFFFF}


@pytest.mark.parametrize(
    "maps",
    [
        np.full((2, 3, 3), np.nan),
        np.full((2, 3, 3), np.inf),
        np.array([[[1e30, -1e30]]]),
        np.array([[[1e300, -1e300]]]),
        np.array([[[0.0, 5e-324]]]),
        np.array([[[1e-45, 0.0]]], np.float32),
        MAPS.astype(np.float16) * 60000,
        np.arange(24, dtype=np.int64).reshape(2, 3, 4),
        np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        MAPS > 0.5,
        np.full((2, 3, 3), -4.0),
        MAPS + 1e6,
        -MAPS,
    ],
    ids=["nan", "inf", "1e30", "1e300", "denormal", "tiny", "half", "int64", "uint8", "bool", "const", "offset", "neg"],
)
def test_any_numbers_draw_without_a_warning(maps: np.ndarray[Any, Any]) -> None:
    assert pixels(channel_grid(maps)).dtype == np.uint8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert painted(maps, "channel").shape == (*np.shape(maps), 3)
        assert painted(maps, "shared", "RdBu").shape == (*np.shape(maps), 3)
        paint(Tiles.of(np.asarray(maps, np.float64), [""] * len(maps), "shared", None), (9, 7), PICTURE)


@pytest.mark.parametrize("scale", ["shared", "channel"])
def test_a_sheet_of_nothing_finite_draws(scale: str) -> None:
    figure = contact_sheet({"stem": np.full((2, 3, 3), np.nan), "stage1": MAPS}, picture=PICTURE, scale=scale)
    assert count(figure, NAN) > 0


@pytest.mark.parametrize("shape", [(0, 3, 3), (3, 0, 3), (3, 3, 0), (0,), (0, 4), (), (2, 3, 4, 5)])
def test_nothing_to_draw_is_a_usage_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="nothing to draw"):
        channel_grid(np.zeros(shape))


# The other plots


def test_overlay_shows_the_picture_where_the_map_is_silent() -> None:
    maps = np.zeros((1, 4, 4))
    maps[0, 0, 0] = 1.0
    tiles = Tiles.of(maps, ["0"], "channel", None)
    white = np.full((8, 8, 3), 200, np.uint8)
    shown = paint(tiles, (8, 8), white)[0]
    assert np.ptp(shown[7, 7].astype(int)) == 0
    assert 150 < shown[7, 7, 0] < 200
    assert np.ptp(shown[0, 0].astype(int)) > 20


def test_a_vector_is_bars_and_says_nan() -> None:
    vector = np.linspace(-1, 1, 300)
    vector[7] = np.nan
    figure = channel_grid(vector, image="cat.jpg", stage="pooled")
    assert count(figure, NAN) > 100
    assert "vector of 300" in texts(figure)
    pixels(vector_bars(np.array([1.0])))


def test_equal_values_of_a_vector_are_no_dead_channel() -> None:
    assert "dead" not in texts(vector_bars(np.zeros(5)))


@pytest.mark.parametrize("picture", [PICTURE[..., 0], PICTURE / 255, PICTURE[:0]])
def test_a_picture_must_be_eight_bit_colour(picture: np.ndarray[Any, Any]) -> None:
    with pytest.raises(UsageError, match="picture"):
        channel_grid(MAPS, overlay=picture)
    with pytest.raises(UsageError, match="picture"):
        contact_sheet({"stem": MAPS}, picture=picture)


def test_tokens_are_one_matrix_of_the_chosen_features() -> None:
    tokens = np.random.default_rng(0).normal(size=(5, 12))
    assert "5 tokens × 12 features" in texts(channel_grid(tokens))
    assert "features 0–3 of 12" in texts(token_matrix(tokens, channels="0:4"))


def test_the_sheet_shows_the_input_and_every_stage_at_one_size() -> None:
    stages = {"stem": MAPS, "stage1": SIGNED[:, :2, :2], "pooled": np.ones(9)}
    figure = contact_sheet(stages, picture=PICTURE, image="cat.jpg")
    words = texts(figure)
    for expected in ("cat.jpg", "as the network saw it", "stem", "6 × 3 × 12", "stage1", "6 × 2 × 2", "input 12 × 48"):
        assert expected in words
    assert "left out, having no grid: pooled" in words
    pixels(figure)


def test_the_sheet_without_a_picture_starts_with_the_stem() -> None:
    assert "as the network saw it" not in texts(contact_sheet({"stem": MAPS}, picture=None))


def test_the_sheet_tells_when_it_cuts() -> None:
    maps = np.random.default_rng(0).random((20, 3, 3))
    assert "at most 6 a stage" in texts(contact_sheet({"stem": maps}, picture=None, channels="0:20"))


def test_the_sheet_needs_a_map() -> None:
    with pytest.raises(UsageError, match="no stage"):
        contact_sheet({"pooled": np.ones(4)}, picture=PICTURE)


def test_the_table_names_every_plot() -> None:
    assert list(PLOTS) == ["grid", "sheet", "tokens", "vector"]


# Saving


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".PDF", b"%PDF"), (".svg", b"<?xml")])
def test_the_suffix_picks_the_format_and_the_bytes_are_the_same_again(
    suffix: str, magic: bytes, tmp_path: Path
) -> None:
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    for path in (first, second):
        save(channel_grid(SIGNED, image="cat.jpg"), path)
    assert first.read_bytes().startswith(magic)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("name", ["out.gif", "out", "out.png.txt"])
def test_another_suffix_is_a_usage_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot draw into"):
        save(channel_grid(MAPS), tmp_path / name)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="nowhere"):
        save(channel_grid(MAPS), tmp_path / "nowhere" / "a.png")


def test_drawing_loads_neither_pyplot_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from bbx.plots import channel_grid, save\n"
        f"save(channel_grid(np.ones((2, 3, 3))), {str(tmp_path / 'a.png')!r})\n"
        "print([name for name in ('matplotlib.pyplot', 'torch', 'h5py', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
