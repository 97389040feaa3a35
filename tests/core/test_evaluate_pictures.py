"""Which pictures a table run takes, and which folders it refuses."""

import hashlib
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dmap_core.evaluate.config import ConfigError
from dmap_core.evaluate.pictures import Picture, find_pictures

TURNED = 6  # the EXIF orientation of a camera on its side


def picture(file, width=40, height=32, exif=None):
    x = np.random.default_rng(len(file.name)).integers(0, 256, (height, width, 3)).astype(np.uint8)
    options = {}
    if exif:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = exif
    Image.fromarray(x).save(file, **options)
    return x


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.jpg", "c.webp"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def refused(*given, **more):
    with pytest.raises(ConfigError) as caught:
        find_pictures(*given, **more)
    return str(caught.value)


def test_the_first_by_name(folder):
    found = find_pictures(folder, 2, None)
    assert [(p.file.name, p.name, p.index, p.repeat) for p in found] == [("a.jpg", "a", 0, None), ("b.png", "b", 1, None)]
    assert [p.name for p in find_pictures(folder, None, None)] == ["a", "b", "c"]
    assert found[1].identity == {
        "file": "b.png",
        "sha256": hashlib.sha256((folder / "b.png").read_bytes()).hexdigest(),
        "index": 1,
    }


def test_repeats_have_names_and_places_of_their_own(folder):
    found = find_pictures(folder, 2, None, repeats=3)
    assert [p.name for p in found] == ["a-0000", "a-0001", "a-0002", "b-0000", "b-0001", "b-0002"]
    assert [p.index for p in found] == list(range(6))


def test_folders_without_the_pictures(folder, tmp_path):
    assert refused(tmp_path / "nowhere", None, None) == f"images: there is no folder {tmp_path / 'nowhere'}."
    assert "there is no folder" in refused(folder / "b.png", None, None)
    (tmp_path / "empty").mkdir()
    assert "empty holds no pictures (.png, .jpg" in refused(tmp_path / "empty", None, None)
    assert "4 pictures are wanted and" in refused(folder, 4, None) and "holds 3; lower --count" in refused(folder, 4, None)


def test_the_data_set_that_a_table_expects_is_named(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    hint = "the first 100 of ImageNet's validation set"
    for where, count in ((tmp_path / "nowhere", None), (tmp_path / "empty", None), (folder, 9)):
        assert refused(where, count, None, hint).endswith(f" This table expects {hint}.")


def test_pictures_of_several_sizes(folder):
    picture(folder / "d.png", 48, 32)
    picture(folder / "e.png", 32, 40)
    message = refused(folder, None, None)
    assert "most pictures in" in message and "are 40x32, but 2 are not (d.png 48x32, e.png 32x40)" in message and "--size N" in message
    assert len(find_pictures(folder, None, 32)) == 5
    assert len(find_pictures(folder, 3, None)) == 3  # the odd ones do not take part


def test_many_odd_pictures_are_not_all_named(folder):
    for i in range(9):
        picture(folder / f"x{i}.png")
        picture(folder / f"y{i}.png", 64, 33 + i)
    message = refused(folder, None, None)
    assert "but 9 are not" in message and message.count("64x") == 4


def test_pictures_that_are_smaller_than_the_size(folder, caplog):
    picture(folder / "d.png", 48, 31)
    with caplog.at_level("WARNING", "dmap.evaluate"):
        found = find_pictures(folder, None, 32)
    assert "1 of 4 pictures are smaller than 32 pixels and are enlarged (d.png 48x31)" in caplog.text
    assert len(found) == 4 and found[3].open(32).shape == (1, 3, 32, 32)
    caplog.clear()
    find_pictures(folder, None, 31)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_files_of_one_stem(folder):
    picture(folder / "b.bmp")
    assert "several files in" in refused(folder, None, None) and "are called b; " in refused(folder, None, None)
    assert len(find_pictures(folder, 1, None)) == 1


def test_a_file_that_would_take_the_place_of_the_rows_settings(folder):
    (folder / "a.jpg").rename(folder / "row.jpg")
    assert "row" in refused(folder, None, None) and "rename" in refused(folder, None, None)
    assert [p.name for p in find_pictures(folder, 1, None, repeats=2)] == ["b-0000", "b-0001"]
    assert len(find_pictures(folder, None, None, repeats=2)) == 6  # row-0000 and row-0001 are in nobody's way


@pytest.mark.parametrize("damage", ["cut", "text", "folder"])
def test_damaged_files_are_named(folder, damage):
    if damage == "cut":
        (folder / "d.png").write_bytes((folder / "b.png").read_bytes()[:20])
    elif damage == "text":
        (folder / "d.png").write_text("<!DOCTYPE html>")
    else:
        (folder / "d.png").mkdir()
    message = refused(folder, None, None)
    assert f"images: {folder / 'd.png'} cannot be read" in message and "mend or remove it" in message


def test_the_cameras_rotation_counts(tmp_path):
    picture(tmp_path / "a.png", 40, 32)
    x = picture(tmp_path / "b.png", 32, 40, exif=TURNED)
    (upright, turned) = find_pictures(tmp_path, None, None)
    assert turned.open(None).shape == upright.open(None).shape == (1, 3, 32, 40)
    found = ((turned.open(None)[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(found, np.rot90(x, -1))


def test_crops_are_centred(tmp_path):
    x = np.zeros((32, 48, 3), np.uint8)
    x[:, 8:40] = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    Image.fromarray(x).save(tmp_path / "wide.png")
    found = Picture(tmp_path / "wide.png", 0).open(32)
    assert found.shape == (1, 3, 32, 32) and found.dtype == torch.float32
    assert torch.equal(((found[0] + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(x[:, 8:40]))
    Image.fromarray(x.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    tall = Picture(tmp_path / "tall.png", 0).open(32)
    assert torch.equal(tall, found.transpose(2, 3))


def test_the_shorter_side_is_resized(tmp_path):
    picture(tmp_path / "a.png", 96, 64)
    assert Picture(tmp_path / "a.png", 0).open(32).shape == (1, 3, 32, 32)
    flat = np.full((64, 96, 3), 77, np.uint8)
    Image.fromarray(flat).save(tmp_path / "flat.png")
    assert torch.allclose(Picture(tmp_path / "flat.png", 0).open(32), torch.tensor(77 / 127.5 - 1))


def bad_files(folder):
    """A folder with two good pictures and one of every kind that a run must not begin with."""
    (folder / "c.webp").unlink()
    whole = folder / "whole.jpg"
    picture(whole, 640, 480)
    (folder / "cut.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])  # its header is whole
    whole.unlink()
    Image.new("1", (9500, 9500)).save(folder / "large.png")
    os.mkfifo(folder / "pipe.png")
    shutil.copy(folder / "b.png", os.fsencode(folder) + b"/z\xff.png")
    return ["cut.jpg", "large.png", "pipe.png", "z\\udcff.png"]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_file_is_opened_whole_before_a_run(folder, caplog):
    bad = bad_files(folder)
    message = refused(folder, None, None)
    assert f"images: {folder / 'cut.jpg'} cannot be read" in message and "truncated" in message and "--unreadable skip" in message
    assert f"The same holds for {', '.join(bad[1:])}." in message
    (folder / "cut.jpg").unlink()
    message = refused(folder, None, None)
    assert f"{folder / 'large.png'} cannot be read (it has 9500x9500 pixels, and Pillow opens up to" in message
    assert [p.name for p in find_pictures(folder, 2, None)] == ["a", "b"]  # the others are not asked for
    caplog.clear()
    with caplog.at_level("INFO", "dmap.evaluate"):
        found = find_pictures(folder, None, None, unreadable="skip")
    assert [(p.name, p.index) for p in found] == [("a", 0), ("b", 1)]
    assert f"3 files of {folder} cannot be read and are left out: {', '.join(bad[1:])}" in caplog.text
    assert f"1 file of {folder} ignored, not ending in .png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff: notes.txt" in caplog.text


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_as_many_good_pictures_as_are_wanted(folder):
    bad_files(folder)
    picture(folder / "y.png")
    assert [p.name for p in find_pictures(folder, 3, None, unreadable="skip")] == ["a", "b", "y"]
    assert "4 pictures are wanted and 3 of those in" in refused(folder, 4, None, unreadable="skip")


def test_names_that_results_could_not_have(folder):
    (folder / "a.jpg").rename(folder / f"{'x' * 236}.jpg")
    message = refused(folder, None, None)
    assert "is 236 bytes long, and files called after it may have 200; rename it" in message
    assert [p.name for p in find_pictures(folder, None, None, unreadable="skip")] == ["b", "c"]
    (folder / f"{'x' * 236}.jpg").rename(folder / f"{'x' * 200}.jpg")
    assert len(find_pictures(folder, None, None)) == 3
