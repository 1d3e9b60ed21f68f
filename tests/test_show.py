"""`bbx show`: which images are drawn, where the pictures go, and whose picture may be opened."""

from pathlib import Path

import pytest
from PIL import Image

from bbx import show
from tests.conftest import SAMPLES


@pytest.fixture
def file(bbx_cli, pictures):
    """A feature file of seven pictures, one of them bad, in the current folder."""
    (pictures / "006.png").write_bytes(b"")
    assert bbx_cli("extract", "-q", "--model", "toy", "--stages", "all", pictures).code == 4
    return "features.h5"


def names(ran) -> list[str]:
    assert ran.code == 0, ran.err
    assert all(Path(line).is_file() for line in ran.out.split())
    return [Path(line).name for line in ran.out.split()]


def test_a_grid_for_each_image_and_stage_and_a_sheet_for_each_image(bbx_cli, file):
    drawn = names(bbx_cli("show", file))
    assert len(drawn) == 6 * 4
    assert drawn[:4] == ["000.stem.png", "000.stage1.png", "000.stage2.png", "000.sheet.png"]


def test_images_are_chosen_by_key_glob_or_row(bbx_cli, file):
    assert names(bbx_cli("show", file, "--stages", "stem", "--image", "003.png")) == ["003.stem.png"]
    assert len(names(bbx_cli("show", file, "--stages", "stem", "--image", "00[01].png", "--image", "4"))) == 3


def test_an_unknown_image_is_named_with_the_nearest_and_a_failed_one_with_its_reason(bbx_cli, file):
    ran = bbx_cli("show", file, "--image", "0003.png")
    assert (ran.code, "003.png" in ran.err) == (2, True)
    ran = bbx_cli("show", file, "--image", "006.png")
    assert ran.code == 3
    assert "006.png has no features: " in ran.err


def test_only_some_of_many_images_are_drawn_and_that_is_said(bbx_cli, tmp_path, picture):
    for number in range(12):
        picture(tmp_path / "in" / f"{number:02}.png", number)
    bbx_cli("extract", "-q", "--model", "toy", "in")
    ran = bbx_cli("show", "features.h5")
    assert len(ran.out.split()) == show.DEFAULT_IMAGES
    assert "first 8 of 12" in ran.err


@pytest.mark.parametrize("name", ["one.png", "one.svg", "one.pdf"])
def test_a_single_figure_takes_the_name_given(bbx_cli, file, name):
    assert names(bbx_cli("show", file, "--image", "0", "--stages", "stage1", "-o", name)) == [name]


def test_several_figures_share_a_name_a_pdf_or_a_folder(bbx_cli, file):
    wanted = ["show", file, "--image", "0", "--stages", "stem,stage1", "-o"]
    assert names(bbx_cli(*wanted, "a.png")) == ["a.000.stem.png", "a.000.stage1.png", "a.000.sheet.png"]
    assert names(bbx_cli(*wanted, "a.pdf")) == ["a.pdf"]
    assert bbx_cli(*wanted, "some/folder").out.split()[0] == "some/folder/000.stem.png"
    assert bbx_cli(*wanted, "a.gif").code == 2


def test_pictures_are_read_only_below_a_root_that_is_named_or_near(bbx_cli, file, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    subject = next(show.from_file(file))
    assert subject.picture.shape == (32, 32, 3)  # the recorded folder lies beside the file
    (tmp_path / file).rename(elsewhere / file)
    monkeypatch.chdir(elsewhere)
    assert next(show.from_file(file)).picture is None
    assert next(show.from_file(file, root=tmp_path / "pictures")).picture is not None
    assert next(show.from_file(file, root=tmp_path)).picture is None


def test_a_picture_is_decoded_only_where_it_is_drawn(bbx_cli, file, monkeypatch):
    asked = []
    monkeypatch.setattr("bbx.images.decode_one", lambda path, _: asked.append(path.name) or "changed since")
    alone = bbx_cli("show", file, "--image", "0", "--stages", "stem")
    assert (names(alone), asked, alone.err) == (["000.stem.png"], [], "")
    assert "the picture of 000.png is not drawn" in bbx_cli("show", file, "--image", "0").err
    assert asked == ["000.png"]


def test_an_overlay_without_a_picture_says_what_to_name(bbx_cli, file, tmp_path):
    (tmp_path / "pictures" / "000.png").unlink()
    ran = bbx_cli("show", file, "--image", "000.png", "--overlay")
    assert ran.code == 3
    assert "--root" in ran.err


def test_a_key_from_outside_cannot_leave_the_folder():
    names = [
        show._file_name(show.Subject(key, 5, {}, {}, lambda: None))
        for key in ("../../etc/passwd", "/abs", "a/b.png", "x\n.png")
    ]
    assert names == ["etc_passwd-5", "abs-5", "a_b-5", "x-5"]


def test_two_images_of_one_stem_are_two_figures(bbx_cli, tmp_path, picture):
    picture(tmp_path / "in" / "a.png", 1)
    picture(tmp_path / "in" / "a.jpg", 2)
    bbx_cli("extract", "-q", "--model", "toy", "in")
    assert len(set(names(bbx_cli("show", "features.h5")))) == 2


def test_straight_from_an_image_and_a_model(bbx_cli):
    ran = bbx_cli("show", SAMPLES / "coffee.png", "--model", "toy", "--seed", "3", "--channels", "0,2")
    assert names(ran) == ["coffee.stem.png", "coffee.stage1.png", "coffee.stage2.png", "coffee.sheet.png"]


def test_what_is_no_image_is_refused_by_name(bbx_cli, file):
    ran = bbx_cli("show", file, "--model", "toy")
    assert ran.code == 3
    assert "features.h5: " in ran.err


def test_pooled_and_token_stages_are_drawn_too(bbx_cli, pictures):
    bbx_cli("extract", "-q", "--model", "toy", "--stages", "all", "--pool", "avg", pictures, "-o", "pooled.h5")
    assert names(bbx_cli("show", "pooled.h5", "--image", "0")) == ["000.stem.png", "000.stage1.png", "000.stage2.png"]


def test_an_unfinished_file_is_shown_as_far_as_it_goes(bbx_cli, pictures, tmp_path):
    from bbx.errors import InterruptedRunError
    from bbx.runner import extract

    with pytest.raises(InterruptedRunError):
        extract(pictures, model="toy", batch_size=2, stop=lambda: 2, output=tmp_path / "features.h5")
    assert len(names(bbx_cli("show", "features.h5"))) == 2


def test_the_pictures_are_pictures(bbx_cli, file):
    bbx_cli("show", file, "--image", "0", "--stages", "stem", "-o", "x.png")
    with Image.open("x.png") as image:
        assert min(image.size) > 100
        assert len(set(image.convert("RGB").get_flattened_data())) > 50


def test_without_a_display_a_window_is_refused_with_the_way_out(bbx_cli, file, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    ran = bbx_cli("show", file, "--window")
    assert ran.code == 3
    assert "leave --window out" in ran.err


def test_names_with_dots_are_folders_and_files_like_any_other(bbx_cli, file, tmp_path):
    (tmp_path / file).rename(tmp_path / "run.v1.h5")
    assert bbx_cli("show", "run.v1.h5", "--image", "0").out.split()[0] == "run.v1_grids/000.stem.png"
    drawn = bbx_cli("show", "run.v1.h5", "--image", "0", "-o", "results.2024").out.split()
    assert drawn[0] == "results.2024/000.stem.png"


def test_pictures_of_roots_that_share_a_name_are_found_below_either(bbx_cli, tmp_path, picture):
    for number, root in enumerate(("r1/imgs", "r2/imgs")):
        picture(tmp_path / root / "a.png", number)
    bbx_cli("extract", "-q", "--model", "toy", "r1/imgs", "r2/imgs")
    assert [subject.key for subject in show.from_file("features.h5") if subject.picture is not None] == [
        "r1/imgs/a.png",
        "r2/imgs/a.png",
    ]
    subject = next(show.from_file("features.h5", root="r1/imgs"))
    assert subject.picture is not None


def test_an_overlay_of_what_has_no_grid_is_refused(bbx_cli, pictures):
    bbx_cli("extract", "-q", "--model", "toy", "--pool", "avg", pictures, "-o", "pooled.h5")
    assert bbx_cli("show", "pooled.h5", "--image", "0", "--overlay").code == 2


def test_many_stages_are_several_sheets(bbx_cli):
    ran = bbx_cli("show", SAMPLES / "coffee.png", "--model", "vit-base-32", "--weights", "random")
    assert [name for name in names(ran) if "sheet" in name] == [f"coffee.sheet{n}.png" for n in (1, 2, 3)]


def test_an_image_without_a_model_is_told_what_to_type(bbx_cli):
    ran = bbx_cli("show", SAMPLES / "coffee.png")
    assert (ran.code, "--model NAME" in ran.err) == (2, True)
