"""Which files are rows, in which order, under which keys; and that nothing is left out in silence."""

from __future__ import annotations

import inspect
import io
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bbx.errors import ImageError, StartError
from bbx.images import ImageList, find_images, read_image
from bbx.images.formats import trusted_suffixes
from bbx.spec import Preprocess

PREPROCESS = Preprocess((4, 4), 4, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def encoded(kind: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(data, kind)
    return data.getvalue()


PNG = encoded("PNG")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test's own folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(*names: str, data: bytes = PNG) -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def reason(found: ImageList, key: str) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(found.path(found.keys.index(key)), PREPROCESS)
    return str(caught.value)


# Folders


def test_a_folder_is_walked_in_the_order_of_names_whatever_the_file_system_says(monkeypatch):
    make("p/b.png", "p/a.png", "p/c/2.png", "p/c/10.png", "p/B.png", "p/c/d/x.png")
    expected = ["B.png", "a.png", "b.png", "c/10.png", "c/2.png", "c/d/x.png"]
    assert find_images(["p"]).keys == expected
    listed = os.scandir

    class Backwards:
        def __init__(self, path):
            with listed(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(os, "scandir", Backwards)
    assert find_images(["p"]).keys == expected


def test_a_path_opens_the_file_of_its_key():
    make("p/a/1.png", "p/2.png")
    found = find_images([Path("p")])
    assert [found.path(row) for row in range(len(found))] == ["p/2.png", "p/a/1.png"]
    assert found.path(-1) == "p/a/1.png"
    assert found.roots == ["p"]
    with pytest.raises(IndexError):
        found.path(2)


@pytest.mark.parametrize("spelled", ["p", "p/", "./p", "p/../p", "{here}/p"])
def test_a_folder_may_be_spelled_in_any_way(spelled, here):
    make("p/a/1.png")
    found = find_images([spelled.format(here=here)])
    assert found.keys == ["a/1.png"]
    assert Path(found.path(0)).samefile("p/a/1.png")


def test_the_current_folder_is_a_folder():
    make("a.png")
    assert find_images(["."]).keys == ["a.png"]


def test_hidden_files_and_folders_are_left_out_unless_named():
    make("p/.a.png", "p/.git/b.png", "p/c.png", "p/._c.png")
    assert find_images(["p"]).keys == ["c.png"]
    assert find_images(["p/.a.png"]).keys == [".a.png"]
    assert find_images(["p/.git"]).keys == ["b.png"]


def test_a_folder_with_the_name_of_an_image_is_a_folder():
    make("p/x.jpg/1.png")
    assert find_images(["p"]).keys == ["x.jpg/1.png"]
    assert find_images(["p/x.jpg"]).keys == ["1.png"]


def test_folders_may_nest_deeper_than_python_calls_do():
    make("p/" + "d/" * 150 + "x.png")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        found = find_images(["p"])
    finally:
        sys.setrecursionlimit(limit)
    assert found.keys == ["d/" * 150 + "x.png"]


def test_a_linked_folder_is_followed_and_a_loop_is_not():
    make("p/a/1.png", "elsewhere/2.png")
    Path("p/b").symlink_to(Path("elsewhere").absolute())
    Path("p/a/up").symlink_to(Path("p").absolute())
    Path("p/a/self").symlink_to(".")
    found = find_images(["p"])
    assert found.keys == ["a/1.png", "b/2.png"]
    assert [warning.split()[2] for warning in found.warnings] == ["p/a/self/", "p/a/up/"]
    assert "leads back into itself" in found.warnings[0]


def test_two_links_to_one_folder_are_two_sets_of_rows():
    make("all/1.png")
    Path("p").mkdir()
    Path("p/train").symlink_to(Path("all").absolute())
    Path("p/val").symlink_to(Path("all").absolute())
    assert find_images(["p"]).keys == ["train/1.png", "val/1.png"]


def test_a_folder_that_cannot_be_read_is_skipped_with_a_warning(monkeypatch):
    make("p/a/1.png", "p/b/2.png")
    listed = os.scandir

    def guarded(path):
        if os.fspath(path).rstrip("/").endswith("a"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    with monkeypatch.context() as patched:  # pytest, too, lists folders
        patched.setattr(os, "scandir", guarded)
        found = find_images(["p"])
    assert found.keys == ["b/2.png"]
    assert found.warnings == ["the folder p/a/ cannot be read (Permission denied): skipped"]


@pytest.mark.parametrize(
    "name",
    ["with space.png", "日本 ümläut.png", "new\nline.png", "100%.png", "-dash.png", "a" * 251 + ".png", "tab\t.png",
     "back\\slash.png", "quote'\".png", "[glob]*?.png", os.fsdecode(b"\xff\xfe.png")],
)  # fmt: skip
def test_any_name_works(name):
    make(f"p/{name}")
    found = find_images(["p"])
    assert found.keys == [name]
    assert read_image(found.path(0), PREPROCESS).shape == (4, 4, 3)
    assert find_images([f"p/{name}"]).keys == [name]


# What counts as an image


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".gif", ".webp", ".tif", ".mpo", ".jp2", ".avif", ".ppm"])
def test_a_known_suffix_is_taken_on_trust(suffix):
    make(f"p/a{suffix}", data=b"no image at all")
    assert find_images(["p"]).keys == [f"a{suffix}"]


@pytest.mark.parametrize("suffix", [".h5", ".hdf", ".mpg", ".mpeg", ".bufr", ".grib", ".wmf", ".pdf", ".palm"])
def test_a_suffix_that_pillow_only_names_is_not_known(suffix):
    assert suffix not in trusted_suffixes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "PCX", "ICO", "SGI", "JPEG2000"])
@pytest.mark.parametrize("name", ["noSuffix", "wrong.txt", "x.0001"])
def test_an_unknown_suffix_is_believed_by_its_content(kind, name):
    make(f"p/{name}", data=encoded(kind))
    found = find_images(["p"])
    assert found.keys == [name]
    assert read_image(found.path(0), PREPROCESS).shape == (4, 4, 3)


@pytest.mark.parametrize("nbytes", [8, 20, 40])
def test_what_claims_to_be_an_image_and_is_cut_short_is_a_row(nbytes):
    make("p/a", data=PNG[:nbytes])
    assert "PNG" in reason(find_images(["p"]), "a") or "truncated" in reason(find_images(["p"]), "a")


@pytest.mark.parametrize(
    "data",
    [b"", b"\n", b"P", b"B", b"GIF", b"BMW is a maker of cars", b"P6 is a format\n", b"DDS is one too", b"icns, qoif",
     b"#define WIDTH 3\n", b"# README\n" * 999, b"\x89HDF\r\n\x1a\n" + bytes(99), b"\x93NUMPY\x01\x00v\x00{'d",
     b"GRIB" + bytes(99), b"BUFR" + bytes(99), b"\x00\x00\x01\xb3" + bytes(99), b"%PDF-1.7", b"\x0a\x05\x01\x08",
     bytes(3), bytes(999), b"\xff" * 999],
)  # fmt: skip
def test_what_is_no_image_is_skipped_and_counted(data):
    make("p/README", "p/data.bin", data=data)
    make("p/a.png")
    found = find_images(["p"])
    assert (found.keys, found.skipped, found.warnings) == (["a.png"], 2, [])


def test_the_output_beside_the_images_is_never_a_row():
    make("p/features.h5", "p/features.h5.partial", data=b"\x89HDF\r\n\x1a\n" + bytes(5000))
    make("p/features.h5.lock", data=b"host 123\n")
    make("p/features.hdf", data=b"")
    make("p/a.png")
    assert find_images(["p"]).keys == ["a.png"]


def test_a_decompression_bomb_without_suffix_claims_to_be_an_image():
    make("p/bomb", data=b"P5 99999 99999 255\n")
    assert "too large (9999800001 pixels" in reason(find_images(["p"]), "bomb")


def test_a_file_of_unknown_suffix_that_cannot_be_read_is_named(monkeypatch):
    make("p/a.png", "p/secret")
    opened = os.open

    def guarded(path, *rest, **options):
        if os.fspath(path) == "p/secret":
            raise PermissionError(13, "Permission denied")
        return opened(path, *rest, **options)

    monkeypatch.setattr(os, "open", guarded)
    found = find_images(["p"])
    assert (found.keys, found.skipped) == (["a.png"], 1)
    assert found.warnings == ["p/secret cannot be read (Permission denied)"]


# Links, FIFOs, sockets: never waited for


def test_a_dangling_link_with_a_known_suffix_is_a_row_that_fails():
    make("p/a.png")
    Path("p/gone.png").symlink_to("nowhere.png")
    Path("p/round.png").symlink_to("round.png")
    found = find_images(["p"])
    assert found.keys == ["a.png", "gone.png", "round.png"]
    assert reason(found, "gone.png") == "no such file"
    assert reason(found, "round.png") == "a symbolic link that leads to itself"


def test_a_fifo_with_a_known_suffix_is_a_row_that_fails():
    make("p/a.png")
    os.mkfifo("p/pipe.png")
    found = find_images(["p"])
    assert found.keys == ["a.png", "pipe.png"]
    assert reason(found, "pipe.png") == "a FIFO, not a regular file"


def test_links_to_nothing_and_special_files_of_unknown_suffix_are_skipped_with_a_warning():
    make("p/a.png")
    Path("p/gone").symlink_to("nowhere")
    os.mkfifo("p/pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("p/socket")
        Path("p/null").symlink_to("/dev/null")
        found = find_images(["p"])
    assert (found.keys, found.skipped) == (["a.png"], 4)
    assert found.warnings == [
        "p/gone is a link that leads nowhere: skipped",
        "p/null is no regular file: skipped",
        "p/pipe is no regular file: skipped",
        "p/socket is no regular file: skipped",
    ]


def test_a_linked_file_is_judged_like_the_file():
    make("all/1", "all/2.png")
    make("all/3", data=b"text")
    Path("p").mkdir()
    for name in ("1", "2.png", "3"):
        Path("p", name).symlink_to(Path("all", name).absolute())
    found = find_images(["p"])
    assert (found.keys, found.skipped) == (["1", "2.png"], 1)


def test_a_fifo_or_a_device_that_is_named_is_a_row_that_fails():
    os.mkfifo("pipe")
    found = find_images(["pipe", "/dev/null"])
    assert reason(found, "dev/null") == "a device, not a regular file"
    assert [key.rsplit("/")[-1] for key in found.keys] == ["pipe", "null"]


# Single files, their common root, order


def test_one_file_is_relative_to_its_folder():
    make("p/q/a.png")
    found = find_images(["p/q/a.png"])
    assert found.keys == ["a.png"]
    assert Path(found.path(0)).samefile("p/q/a.png")


def test_single_files_share_their_deepest_common_folder():
    make("p/c/x.png", "p/c-d/x.png", "p/c/e/x.png")
    found = find_images(["p/c/x.png", "p/c/e/x.png", "p/c-d/x.png"])
    assert found.keys == ["c/x.png", "c/e/x.png", "c-d/x.png"]
    assert found.roots == [str(Path("p").absolute())]
    assert [Path(found.path(row)).read_bytes() for row in range(3)] == [PNG] * 3


def test_keys_never_climb(monkeypatch):
    make("p/a.png", "q/b.png")
    monkeypatch.chdir("p")
    assert find_images(["../p/a.png", "../q/b.png"]).keys == ["p/a.png", "q/b.png"]


def test_dots_after_a_link_mean_what_the_system_means():
    make("real/deep/x.png", "real/a.png", "a.png")
    Path("link").symlink_to("real/deep")
    found = find_images(["link/../a.png"])
    assert Path(found.path(0)).samefile("real/a.png")


def test_inputs_keep_their_order():
    make("z.png", "m/2.png", "m/1.png", "a.png")
    found = find_images(["z.png", "m", "a.png"])
    assert found.keys == ["z.png", "1.png", "2.png", "a.png"]
    assert [Path(found.path(row)).name for row in range(4)] == ["z.png", "1.png", "2.png", "a.png"]
    assert found.roots == [str(Path().absolute()), "m"]


def test_a_file_named_that_is_no_image_is_skipped_with_a_warning():
    make("a.png")
    make("README", data=b"text")
    found = find_images(["a.png", "README"])
    assert (found.keys, found.skipped, found.warnings) == (["a.png"], 1, ["README is no image: skipped"])


# Keys of several roots


def test_roots_whose_keys_differ_need_no_prefix():
    make("train/1.png", "val/2.png")
    assert find_images(["train", "val"]).keys == ["1.png", "2.png"]


def test_roots_whose_keys_collide_are_told_apart_by_their_names():
    make("train/1.png", "val/1.png", "val/2.png")
    found = find_images(["train", "val"])
    assert found.keys == ["train/1.png", "val/1.png", "val/2.png"]
    assert [found.path(row) for row in range(3)] == found.keys


def test_the_prefix_is_the_shortest_end_that_parts_the_roots():
    make("a/train/img/1.png", "a/val/img/1.png", "b/val/img/1.png")
    assert find_images(["a/train/img", "a/val/img"]).keys == ["train/img/1.png", "val/img/1.png"]
    keys = ["a/train/img/1.png", "a/val/img/1.png", "b/val/img/1.png"]
    assert find_images(["a/train/img", "a/val/img", "b/val/img"]).keys == keys


def test_single_files_and_a_folder_are_told_apart_too(here):
    make("x/1.png", "p/1.png")
    found = find_images(["p", "x/1.png"])
    assert found.keys == ["p/1.png", "x/1.png"]
    assert [Path(found.path(row)).parent.name for row in range(2)] == ["p", "x"]


@pytest.mark.parametrize("again", [["p"], ["./p/"], ["p/a/1.png"], ["p/a"], ["p/a", "p/../p"], ["p/*"], ["p/**"]])
def test_a_file_that_is_named_twice_is_one_row(again):
    make("p/a/1.png", "p/2.png")
    found = find_images(["p", *again])
    assert found.keys == ["2.png", "a/1.png"]
    assert any("more than once" in warning for warning in found.warnings)


def test_a_single_file_named_twice_is_one_row():
    make("a.png", "b.png")
    found = find_images(["a.png", "./a.png", "b.png"])
    assert found.keys == ["a.png", "b.png"]
    assert found.warnings == ["./a.png was named more than once: it is one row"]


# Globs


def test_a_glob_is_expanded_sorted_where_no_file_has_that_name():
    make("p/b.png", "p/a.png", "p/c.jpg", "p/q/d.png", "p/.h.png")
    assert find_images(["p/*.png"]).keys == ["a.png", "b.png"]
    assert find_images(["p/**/*.png"]).keys == ["a.png", "b.png", "q/d.png"]
    assert find_images(["p/[ab].png"]).keys == ["a.png", "b.png"]
    make("p/[ab].png")
    assert find_images(["p/[ab].png"]).keys == ["[ab].png"]


def test_folders_that_a_glob_matches_are_walked():
    make("p/x1/a.png", "p/x2/b.png", "p/y/c.png")
    assert find_images(["p/x*"]).keys == ["a.png", "b.png"]


def test_what_a_glob_matches_beside_images_is_counted():
    make("p/a.png")
    make("p/README", data=b"text")
    found = find_images(["p/*"])
    assert (found.keys, found.skipped) == (["a.png"], 1)


# Lists


@pytest.mark.parametrize(
    "data",
    [b"p/b.png\np/a.png\n", b"p/b.png\np/a.png", b"p/b.png\r\n\r\n  \np/a.png\r\n", b"p/b.png\0p/a.png\0",
     b"p/b.png\0p/a.png", b"\xef\xbb\xbfp/b.png\np/a.png\n"],
)  # fmt: skip
def test_a_list_holds_a_path_per_line_or_between_nuls(data):
    make("p/a.png", "p/b.png")
    make("list.txt", data=data)
    assert find_images(["@list.txt"]).keys == ["b.png", "a.png"]
    assert find_images(["-"], stdin=io.BytesIO(data)).keys == ["b.png", "a.png"]


@pytest.mark.parametrize("items", [["p/b.png", "p/a.png"], ["p/b.png\n", "p/a.png\n"], [b"p/b.png", b"p/a.png"]])
def test_stdin_may_be_any_lines(items):
    assert find_images(["-"], stdin=items).keys == ["b.png", "a.png"]


def test_stdin_is_the_process_own_by_default(monkeypatch):
    class Stdin:
        buffer = io.BytesIO(b"p/a.png\n")

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert find_images(["-"]).keys == ["a.png"]


def test_names_in_lists_may_hold_spaces_newlines_and_any_bytes():
    names = [" lead.png", "trail .png", "new\nline.png", os.fsdecode(b"\xff.png"), "*.png", "@x.png"]
    make(*(f"p/{name}" for name in names))
    data = b"\0".join(os.fsencode(f"p/{name}") for name in names)
    found = find_images(["-"], stdin=[data])
    assert found.keys == names
    assert all(read_image(found.path(row), PREPROCESS) is not None for row in range(len(found)))


def test_what_a_list_names_without_it_being_there_is_a_row_that_fails():
    make("p/a.png")
    found = find_images(["-"], stdin=["p/a.png", "p/gone.png", "p/gone", "x" * 300 + ".png"])
    assert len(found) == 4
    assert reason(found, "p/gone.png") == "no such file"
    assert reason(found, "p/gone") == "no such file"
    assert reason(found, "x" * 300 + ".png") == "the file name is too long"


def test_a_listed_path_of_known_suffix_is_not_looked_at(monkeypatch):
    def looked(path):
        raise AssertionError(path)

    monkeypatch.setattr(os, "stat", looked)
    monkeypatch.setattr(os, "lstat", looked)
    assert len(find_images(["-"], stdin=[f"p/{row}.jpg\n" for row in range(1000)])) == 1000


def test_a_listed_folder_is_walked_and_a_listed_text_is_skipped():
    make("p/q/a.png", "p/b.png")
    make("p/notes.txt", data=b"text")
    found = find_images(["-"], stdin=["p/q", "p/notes.txt", "p/b.png"])
    assert (found.keys, found.skipped) == (["a.png", "b.png"], 1)
    assert found.warnings == ["p/notes.txt is no image: skipped"]


def test_a_file_whose_name_begins_with_an_at_sign_is_given_by_its_folder():
    make("@x.png")
    assert find_images(["./@x.png"]).keys == ["@x.png"]


# What cannot start


@pytest.mark.parametrize(
    ("given", "message", "hint"),
    [("pictures", "no such file or folder: pictures", "did you mean picture?"),
     ("picture/cot.png", "no such file or folder: picture/cot.png", "did you mean picture/cat.png?"),
     ("picture/cat.png/x", "no such file or folder: picture/cat.png/x", "picture/cat.png is a file, not a folder"),
     ("picture/*.tif", "no file matches the glob picture/*.tif", ""),
     ("@liszt.txt", "the list liszt.txt cannot be read (No such file or directory)", "did you mean list.txt?"),
     ("@picture", "the list picture cannot be read (Is a directory)", ""),
     ("", "an input is empty", "name a folder"),
     ("a\0b", "no such file or folder: a\\x00b", ""),
     ("bad\udcff\n", "no such file or folder: bad\\xff\\n", "")],
)  # fmt: skip
def test_an_input_that_names_nothing_stops_the_run(given, message, hint):
    make("picture/cat.png", "list.txt")
    with pytest.raises(StartError) as caught:
        find_images([given])
    assert caught.value.message == message
    assert hint in caught.value.hint
    assert caught.value.exit_code == 3


def test_no_image_at_all_stops_the_run_and_says_what_there_was():
    make("p/a.txt", "p/b.txt", "p/README", data=b"text")
    with pytest.raises(StartError, match="no image in p") as caught:
        find_images(["p"])
    assert caught.value.hint == "skipped 3 files that are no image (2 .txt, 1 without suffix)"


@pytest.mark.parametrize("inputs", [[], ["-"]])
def test_nothing_given_stops_the_run(inputs):
    with pytest.raises(StartError, match="no image in"):
        find_images(inputs, stdin=[])


# The list itself


def test_warnings_are_bounded():
    make("p/a.png")
    for number in range(50):
        Path(f"p/gone{number}").symlink_to("nowhere")
    found = find_images(["p"])
    assert len(found.warnings) == 21
    assert found.warnings[-1] == "and 30 more warnings"
    assert found.skipped == 50


def test_the_list_is_compact_and_survives_pickling():
    found = find_images(["-"], stdin=[f"folder/image_{row:06d}.jpg\n" for row in range(10_000)])
    again = pickle.loads(pickle.dumps(found))
    assert again == found
    assert again.path(9_999) == found.path(9_999)
    assert len(pickle.dumps(found)) < 10_000 * 40


def test_finding_and_reading_load_no_torch():
    code = "import sys, bbx.images; print([name for name in ('torch', 'torchvision', 'h5py') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
