"""Load Photo: files as people have them."""

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def folder(lab, tmp_path):
    import folder_paths

    before = folder_paths.get_input_directory()
    folder_paths.set_input_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_input_directory(before)


def picture(width=40, height=24):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def load(lab, name, **settings):
    assert lab.NODES["DMAP_LoadPhoto"].validate_inputs(name) is True
    image, mask, alpha, jpeg, text = lab.call("DMAP_LoadPhoto", image=name, **{"transparent": "auto", **settings})
    return {"image": image, "mask": mask, "alpha": alpha, "jpeg": jpeg, "text": text}


def test_it_is_what_load_image_gives(lab, folder):
    picture().save(folder / "a.png")
    found = load(lab, "a.png")
    assert torch.equal(found["image"], lab.call("LoadImage", image="a.png")[0])
    assert not found["mask"].any() and found["alpha"].all() and found["jpeg"] is None


def test_a_jpegs_own_tables_and_orientation(lab, folder):
    exif = Image.Exif()
    picture().save(folder / "straight.jpg", quality=37)
    assert load(lab, "straight.jpg")["jpeg"].quality == 37
    exif[0x0112] = 6  # held upright
    picture().save(folder / "turned.jpg", quality=37, exif=exif)
    found = load(lab, "turned.jpg")
    assert found["image"].shape == (1, 40, 24, 3) and "turned upright" in found["text"]


def test_transparency_stays_or_is_missing(lab, folder):
    rgba = picture().convert("RGBA")
    alpha = Image.new("L", rgba.size, 255)
    alpha.paste(0, (5, 5, 15, 12))
    rgba.putalpha(alpha)
    rgba.save(folder / "cut.png")
    (folder / "clipspace").mkdir()
    rgba.save(folder / "clipspace" / "painted.png")
    values = torch.from_numpy(np.asarray(alpha, np.float32) / 255)[None]
    kept = load(lab, "cut.png")
    assert kept["image"].shape[-1] == 4 and torch.equal(kept["image"][..., 3], values) and not kept["mask"].any()
    for name, how in (("cut.png", {"transparent": "is missing"}), ("clipspace/painted.png [input]", {})):
        holes = load(lab, name, **how)
        assert holes["image"].shape[-1] == 3 and torch.equal(holes["mask"], 1 - values) and torch.equal(holes["alpha"], values)


def test_depths_and_colour_spaces(lab, folder):
    deep = (np.arange(24 * 40).reshape(24, 40) * 68).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    expected = (deep / 257).round() / 255
    assert np.abs(load(lab, "deep.png")["image"][0, ..., 0].numpy() - expected).max() < 1e-6
    picture().convert("CMYK").save(folder / "print.jpg")
    assert load(lab, "print.jpg")["image"].shape == (1, 24, 40, 3)
    frames = [picture(), Image.new("RGB", (40, 24))]
    frames[0].save(folder / "moving.png", save_all=True, append_images=frames[1:])
    found = load(lab, "moving.png")
    assert len(found["image"]) == 1 and "first of 2 frames" in found["text"]


def test_the_packs_samples_are_there_without_the_input_folder(lab, folder):
    for name in lab.NODES["DMAP_LoadPhoto"].GET_SCHEMA().inputs[1].options:
        if name.startswith("dmap/"):
            assert load(lab, name)["image"].shape[-1] in (3, 4)


@pytest.mark.parametrize("name", ["../../etc/passwd", "nothing.png", "dmap/../../secret.png", "/etc/passwd", "dmap/unknown.png", ""])
def test_only_files_of_comfyuis_folders(lab, folder, name):
    (folder.parent / "secret.png").write_bytes(b"")
    told = lab.NODES["DMAP_LoadPhoto"].validate_inputs(name)
    assert told is not True and "input folder" in told
    with pytest.raises(FileNotFoundError):
        lab.call("DMAP_LoadPhoto", image=name, transparent="auto")


def test_a_link_in_the_input_folder_is_followed(lab, folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("archive") / "a.png"
    picture().save(elsewhere)
    (folder / "linked.png").symlink_to(elsewhere)
    assert load(lab, "linked.png")["image"].shape == (1, 24, 40, 3)


def test_a_damaged_file_is_named(lab, folder):
    (folder / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="bad.png cannot be read"):
        lab.call("DMAP_LoadPhoto", image="bad.png", transparent="auto")


def test_samples_are_offered_once(lab, folder):
    import importlib

    folders = importlib.import_module("dmap_pack.nodes.host.folders")
    folders.offer_samples()
    offered = folder / folders.OFFERED
    assert sorted(path.name for path in offered.iterdir()) == sorted(folders.SAMPLE_FILES)
    (offered / folders.SAMPLE_FILES[0]).unlink()
    folders.offer_samples()
    assert not (offered / folders.SAMPLE_FILES[0]).exists(), "what a user removed stays removed"
