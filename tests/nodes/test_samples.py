"""The pictures and the checkpoint that come with the pack."""

import pytest

pytestmark = pytest.mark.hosts("one")

DAMAGED = {"rooster-small-64": 64, "rooster-blurred-512": 512, "rooster-old-photo-128": 128}


def sample(lab, name):
    return lab.call("DMAP_SamplePicture", picture=name)


def names(lab):
    (picture,) = lab.NODES["DMAP_SamplePicture"].GET_SCHEMA().inputs
    return picture.options


def test_it_gives_what_load_image_gives(lab):
    import folder_paths
    import torch

    before = folder_paths.get_input_directory()
    for name, folder in (("dmap-demo-07", "held-out"), ("rooster-holes-512", "samples")):
        folder_paths.set_input_directory(str(lab.ROOT / "demo" / folder))
        try:
            image, mask = lab.call("LoadImage", image=f"{name}.png")
        finally:
            folder_paths.set_input_directory(before)
        own, own_mask = sample(lab, name)
        assert torch.equal(own, image) and own.dtype == torch.float32
        assert own_mask.shape == own.shape[:3]
        # of a picture without holes LoadImage gives an empty mask of its own size
        assert torch.equal(own_mask, mask) if folder == "samples" else not own_mask.any() and not mask.any()


def test_every_picture_is_listed_once_and_opens(lab):
    listed = names(lab)
    assert listed == [path.stem for folder in ("held-out", "samples") for path in sorted((lab.ROOT / "demo" / folder).glob("*.png"))]
    assert len(listed) == len(set(listed)) == 74
    for name in (listed[0], *listed[64:]):
        image, _ = sample(lab, name)
        assert image.shape[0] == 1 and image.shape[3] == 3 and image.min() >= 0 and image.max() <= 1


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pictures_are_what_the_operator_of_their_workflow_makes(lab, name):
    """To the 8 bits of a file."""

    def add(kind, **inputs):
        return lab.call(f"DMAP_Operator{kind}", **inputs)

    old = {"first": add("Grayscale"), "second": add("GaussianBlur", sigma=1.5, kernel_size=61), "third": add("SuperResolution", scale=4)}
    operator = {
        "rooster-small-64": lambda: add("SuperResolution", scale=8),
        "rooster-blurred-512": lambda: add("GaussianBlur", sigma=3.0, kernel_size=61),
        "rooster-old-photo-128": lambda: add("Compose", **old),
    }[name]()
    good, _ = sample(lab, "rooster-512")
    measurement = lab.call("DMAP_Degrade", image=good, operator=operator, noise_sigma=0.0, seed=0)
    shipped, _ = sample(lab, name)
    assert tuple(shipped.shape[1:3]) == (DAMAGED[name], DAMAGED[name])
    assert (shipped - measurement.clamp(0, 1)).abs().max() < 0.5001 / 255


def test_the_pack_offers_its_checkpoints_and_lists_nothing_else(lab):
    """What `make demo-prior` writes below demo/run/ is no checkpoint of the user's."""
    import folder_paths

    folders = [lab.Path(folder) for folder in folder_paths.get_folder_paths("checkpoints")]
    ours = [folder for folder in folders if lab.ROOT in folder.parents]
    offered = [folder for folder in ours if lab.ROOT / ".host" not in folder.parents]  # where ComfyUI itself may be
    assert {folder.relative_to(lab.ROOT).as_posix() for folder in offered} == {"models/checkpoints"}
    assert sorted(path.name for path in offered[0].rglob("*") if path.is_file()) == ["dmap-demo-flow-prior.safetensors", lab.CHECKPOINT]
