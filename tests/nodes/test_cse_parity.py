"""ComfyUI's networks and diffusers' with the same weights: what they compute, and what a training makes of them.

The node trains with the one, the command line with the other. Both read the demo prior's file themselves.
"""

import json

import pytest
import torch

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.hosts("one"),
]

CLOSE = 1e-5  # of the largest value; ControlNet and denoised latent are equal to the bit where both use the same kernels
ROUNDING = 0.005  # (here 6e-5) of the way that the weights went. Adam divides gradients by their size, and so makes rounding errors of small ones large


@pytest.fixture(scope="module")
def theirs(lab, cses):
    """diffusers' networks with the demo prior's weights."""
    import importlib

    models = importlib.import_module(f"{cses.PACK}.dmap_core.backends.diffusers_files")
    with torch.inference_mode(False):
        base = models.open_base(lab.ROOT / "models" / "checkpoints" / lab.CHECKPOINT)
        return base.to(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def ours(lab, cses):
    """ComfyUI's, as TrainCSE has them."""
    model, vae = lab.shared()
    with torch.inference_mode():
        conditioning = lab.call("DMAP_DMAPUnconditional", model=model)
        with cses.training.training(model, vae, conditioning, "fp32", 32, 2) as base:
            yield base


@pytest.fixture(scope="module")
def networks(lab, cses, ours, theirs):
    """(ComfyUI's ControlNet, diffusers') with the same random weights."""
    with torch.inference_mode(False), torch.no_grad():
        weights = {name: tensor.float() for name, tensor in cses.weights(lab.shared()[0]).items()}
        return ours.new_controlnet(weights), theirs.new_controlnet(weights)


@pytest.fixture
def given():
    """(z0, timesteps, hint) of a batch of two, at noise levels far apart."""
    generator = torch.Generator().manual_seed(1)
    z0, hint = torch.randn(2, 4, 4, 4, generator=generator), torch.rand(2, 3, 32, 32, generator=generator)
    return z0, torch.tensor([130, 820]), hint


def close(a, b, tolerance=CLOSE):
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max()), float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("which", ["ours", "theirs"])
def test_levels_of_a_batch_are_those_of_its_samples(request, which, given):
    """A level for all, or one for each: what they share is the noise of a timestep."""
    prior, (z, timestep, _) = request.getfixturevalue(which), given
    with torch.inference_mode(False), torch.no_grad():
        sigma = prior.sigmas[timestep[:1]].expand(2)
        assert torch.equal(prior.denoise(z, sigma), prior.denoise(z, float(sigma[0])))


def test_the_bases_are_the_same(ours, theirs):
    assert theirs.prediction == ours.prediction == "eps" and len(theirs.sigmas) == 1000
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=0)


def test_fingerprints_are_the_same(lab, cses, theirs):
    assert cses.prior.base_fingerprint(lab.shared()[0]) == theirs.fingerprint


def test_encode_and_decode(lab, ours, theirs):
    image = lab.as_core(torch.cat([lab.picture(0), lab.picture(1)]))
    latents = [base.encode(image) for base in (ours, theirs)]
    assert latents[0].shape == (2, 4, 4, 4)
    close(*latents)
    close(*(base.decode(latents[0]) for base in (ours, theirs)))


def test_residuals(networks, ours, theirs, given):
    """What the ControlNets put out, block by block."""
    z, timestep, hint = given
    with torch.inference_mode(False), torch.no_grad():
        context = torch.zeros(2, 1, theirs.context.shape[-1])
        put_out = networks[0](x=z, hint=hint, timesteps=timestep.float(), context=context)
        down, middle = networks[1](z, timestep, encoder_hidden_states=context, controlnet_cond=hint, return_dict=False)
    assert len(put_out["output"]) == len(down) > 1 and len(put_out["middle"]) == 1
    for a, b in zip([*put_out["output"], *put_out["middle"]], [*down, middle], strict=True):
        assert float(b.abs().max()) > 0.01
        close(a, b)


@pytest.mark.parametrize("controlled", [True, False], ids=["with the CSE", "without"])
def test_denoise(networks, ours, theirs, given, controlled):
    z0, timestep, hint = given
    z = z0 + ours.sigmas[timestep].view(-1, 1, 1, 1) * torch.randn(z0.shape, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode(False), torch.no_grad():
        answers = [
            (base.controlled(network, hint.clone()) if controlled else base).denoise(z.clone(), base.sigmas[timestep])
            for base, network in zip((ours, theirs), networks, strict=True)
        ]
        plain = theirs.denoise(z.clone(), theirs.sigmas[timestep])
    for i in range(2):  # a sample each: their noise levels differ by a factor of 20
        close(answers[0][i], answers[1][i])
    assert (float((answers[1] - plain).abs().max()) > 0.05 * float(plain.abs().max())) == controlled


def test_the_loss_and_its_gradient(lab, cses, networks, ours, theirs, given):
    """Of a batch as the trainers have it, with respect to the ControlNet's weights."""
    import importlib

    loss = importlib.import_module(f"{cses.PACK}.dmap_core.cse.loss")
    operator = lab.call("DMAP_OperatorSuperResolution", scale=8)
    with torch.inference_mode(False), torch.enable_grad():
        batch = {"image": lab.as_core(cses.pictures(2, size=32)).clone(), "timestep": torch.tensor([130, 820])}
        batch |= {"noise_seeds": [1, 2], "measurement_seeds": [3, 4]}
        settings = cses.settings.TrainingSettings(batch_size=2, size=32)
        losses, gradients = [], []
        for base, network in zip((ours, theirs), networks, strict=True):
            value = loss.batch_loss(base, network, operator, batch, settings)
            names, weights = zip(*network.named_parameters(), strict=True)
            found = torch.autograd.grad(value, weights, materialize_grads=True)
            losses.append(float(value))
            gradients.append(dict(zip(names, found, strict=True)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    gradients[1] = cses.keys.to_ldm(gradients[1])
    size = sum(float(g.square().sum()) for g in gradients[1].values()) ** 0.5
    assert size > 1e-3 and cses.distance(*gradients) < 2e-5 * size


@pytest.fixture(scope="module")
def trainings(lab, cses, tmp_path_factory):
    """Two steps with the same pictures, settings and seed: by the node, by the command line, begun by one and ended by the other. Paths by name."""
    import importlib

    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)  # what a new process has: tests of other files may have trained in another precision
    GradientState._reset_state()
    main = importlib.import_module(f"{cses.PACK}.dmap_core.cli").main
    root = tmp_path_factory.mktemp("trainings")
    with pytest.MonkeyPatch.context() as patch, cses.Folders(root) as folders, torch.inference_mode():
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(cses.validation, "LEVELS", 2)
        patch.setattr(cses.validation.restore.__wrapped__, "__defaults__", (2,))  # behind torch.no_grad
        photos = cses.fill(folders.input / "photos", 3)

        def node(name, steps):
            cses.train(save_name=name, folder="input/photos", pictures=None, validation=None, steps=steps, save_every=1)

        def line(name, steps):
            where = {
                "checkpoint": lab.ROOT / "models" / "checkpoints" / lab.CHECKPOINT,
                "pictures": photos,
                "operator": json.dumps(cses.SR8),
            }
            where |= {"out": folders.controlnet / f"{name}.safetensors", "steps": steps}
            options = [
                "--batch-size",
                "2",
                "--learning-rate",
                "1e-3",
                "--size",
                "32",
                "--seed",
                "0",
                "--workers",
                "0",
                "--validate-every",
                "1",
            ]
            with torch.inference_mode(False):
                main(["train-cse", *(str(part) for name, value in where.items() for part in (f"--{name}", value)), *options])

        for name, first, second in (("node", node, node), ("line", line, line), ("to-line", node, line), ("to-node", line, node)):
            if first is not second:
                first(name, 1)
            second(name, 2)
    return {name: folders.controlnet / f"{name}.safetensors" for name in ("node", "line", "to-line", "to-node")}


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["line", "to-line", "to-node"])
def test_trainings_agree(lab, cses, trainings, name):
    """The node and the command line, and a training that crosses over, in either direction: equal but for the rounding of two implementations."""
    node, other = (cses.state(trainings[n]) for n in ("node", name))
    assert other["step"] == len(other["losses"]) == len(other["validations"]) == 2
    assert other["losses"] == pytest.approx(node["losses"], rel=1e-4)
    assert [loss for _, loss in other["validations"]] == pytest.approx([loss for _, loss in node["validations"]], rel=1e-3)
    start = cses.network.initial_controlnet(lab.shared()[0].model.diffusion_model.state_dict(), 0)
    way = cses.distance(node["weights"], start)
    assert way > 0.5 and cses.distance(node["weights"], other["weights"]) < ROUNDING * way
    a, b = ({**vars(cses.checkpoint.read_cse(trainings[n])[1]), "base": "", "source": ""} for n in ("node", name))
    assert a == b


def test_the_state_has_the_original_names(lab, cses, trainings):
    """Whoever wrote it."""
    names = set(cses.network.initial_controlnet(lab.shared()[0].model.diffusion_model.state_dict(), 0))
    for path in trainings.values():
        state = cses.state(path)
        assert set(state["weights"]) == set(state["optimizer"]) == names
        assert all(set(moments) == {"step", "exp_avg", "exp_avg_sq"} for moments in state["optimizer"].values())
