"""Which plan "auto" takes, and blocks that recompute themselves."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from dmap_core.gradient import STRATEGIES
from dmap_core.memory import SHARE, Budget, ShortOfMemory, checkpointed
from dmap_core.operators import SuperResolution
from dmap_core.posterior import Posterior

PLANS = tuple(STRATEGIES)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(prior, memory="auto"):
    y = SuperResolution(2)(randn(1, 3, 16, 16, seed=1).tanh())
    return Posterior(prior, SuperResolution(2), y, memory), randn(1, 2, 8, 8, seed=2)


def plan_with(prior, free):
    prior.free = free
    posterior, z = problem(prior)
    posterior.gradient(z, 0.7)
    return posterior.plan


def test_less_and_less_memory_gives_leaner_and_leaner_plans(conv_prior):
    prior = conv_prior()
    plans = [plan_with(prior, 2.0**e) for e in [40, *[k / 4 for k in range(88, 40, -1)], 1, 0]]
    order = [PLANS.index(plan) for plan in plans]
    assert order == sorted(order)
    assert set(plans) == set(PLANS)


@pytest.mark.parametrize("free", [float("inf"), 1e12, 1e5, 1e4, 1.0, 0.0, -1e9])
def test_auto_gives_the_same_gradient_whatever_it_chooses(conv_prior, free):
    posterior, z = problem(conv_prior(free=free))
    expected = problem(conv_prior(), "fast")[0].gradient(z, 0.7)
    for ours, theirs in zip(posterior.gradient(z, 0.7), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def saved_bytes(run):
    """Bytes of the distinct storages that autograd keeps for `run`."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()  # kept until the count is done: no address is used twice
    assert out.requires_grad
    return sum(sizes.values())


def needs(prior):
    """(denoiser's, decoder's) activations in bytes."""
    posterior, z = problem(prior)
    z.requires_grad_()
    weights = sum(p.numel() * p.element_size() for n in prior.networks() for p in n.parameters())
    denoiser = saved_bytes(lambda: prior.denoise(z, 0.7))
    z0 = prior.denoise(z, 0.7).detach().requires_grad_()
    decoder = saved_bytes(lambda: posterior.operator.distance(posterior.operator(prior.decode(z0)), posterior.y))
    return denoiser, decoder, weights


@pytest.mark.parametrize("denoiser_depth, decoder_depth", [(8, 1), (1, 4), (4, 1)])
def test_the_plan_is_chosen_by_what_the_networks_save(conv_prior, denoiser_depth, decoder_depth):
    """Fast needs room for both networks' activations, lean for the larger ones; weights are there anyway and do not count."""
    prior = conv_prior(denoiser_depth=denoiser_depth, decoder_depth=decoder_depth)
    denoiser, decoder, weights = needs(prior)
    both, larger = denoiser + decoder, max(denoiser, decoder)
    assert plan_with(prior, both / SHARE) == "fast"
    assert plan_with(prior, (both - weights) * 0.9 / SHARE) == "lean"
    assert plan_with(prior, larger / SHARE) == "lean"
    assert plan_with(prior, (larger - weights) * 0.9 / SHARE) == "checkpoint"


class Sines:
    """A prior of elementwise sines, each of which saves one tensor of the latent's size."""

    def __init__(self, denoiser, decoder, free):
        self.depths, self.free = (denoiser, decoder), free

    def denoise(self, z, sigma):
        for _ in range(self.depths[0]):
            z = torch.sin(z)
        return z

    def decode(self, z0):
        for _ in range(self.depths[1]):
            z0 = torch.sin(z0)
        return z0

    def networks(self):
        return ()

    def blocks(self):
        return ()

    def free_memory(self):
        return self.free


@pytest.mark.parametrize("pixels", [16, 64, 256])
@pytest.mark.parametrize("depths", [(20, 15), (15, 20)], ids=["denoiser-larger", "decoder-larger"])
def test_lean_is_refused_if_one_network_alone_does_not_fit(depths, pixels):
    """The decoder's activations are freed before the denoiser's are made, often at the same addresses: they count nevertheless."""
    z = randn(1, 3, pixels, pixels)
    posterior = Posterior(
        Sines(*depths, free=17.5 * z.numel() * 8 / SHARE), SuperResolution(2), SuperResolution(2)(randn(1, 3, pixels, pixels))
    )
    posterior.gradient(z, 0.7)
    assert posterior.plan == "checkpoint"


def test_the_budget_counts_a_storage_once_and_weights_not_at_all():
    layer = nn.Linear(100, 100)
    x = torch.randn(10, 100, requires_grad=True)
    budget = Budget(float("inf"), [layer])
    with budget.counted():
        out = layer(x) + x.view(100, 10).view(10, 100).pow(2)
    assert budget.saved == x.numel() * 4
    assert out.requires_grad


def test_the_budget_says_how_much_it_had():
    x = torch.randn(300, 300, requires_grad=True)
    with pytest.raises(ShortOfMemory, match=r"more than 0\.0 GiB"), Budget(1000, []).counted():
        x.exp()


def test_the_choice_is_made_once(conv_prior):
    prior = conv_prior(free=1.0)
    posterior, z = problem(prior)
    posterior.gradient(z, 0.7)
    assert posterior.plan == "checkpoint"
    prior.free = float("inf")
    asked = prior.asked_for_memory
    posterior.gradient(z, 0.7)
    assert posterior.plan == "checkpoint"
    assert prior.asked_for_memory == asked


def test_a_chosen_plan_stays_even_without_memory(conv_prior):
    for plan in PLANS:
        posterior, z = problem(conv_prior(free=0.0), plan)
        posterior.gradient(z, 0.7)
        assert posterior.plan == plan


def out_of_memory_in(prior, network, times):
    """The first `times` calls with gradient run out of memory."""
    original = getattr(prior, network)
    left = [times]

    def starved(*args):
        if torch.is_grad_enabled() and left[0] > 0:
            left[0] -= 1
            raise torch.OutOfMemoryError("out of memory")
        return original(*args)

    setattr(prior, network, starved)


@pytest.mark.parametrize("network", ["denoise", "decode"])
@pytest.mark.parametrize("times, plan", [(1, "lean"), (2, "checkpoint")])
def test_auto_falls_back_where_the_estimate_was_too_hopeful(conv_prior, network, times, plan):
    prior = conv_prior()
    out_of_memory_in(prior, network, times)
    posterior, z = problem(prior)
    grad = posterior.gradient(z, 0.7)[0]
    assert posterior.plan == plan
    torch.testing.assert_close(grad, problem(conv_prior(), "fast")[0].gradient(z, 0.7)[0], rtol=1e-12, atol=1e-12)


def test_auto_falls_back_later_too(conv_prior):
    """Somebody else may take the memory between two steps."""
    prior = conv_prior()
    posterior, z = problem(prior)
    expected = posterior.gradient(z, 0.7)[0]
    assert posterior.plan == "fast"
    out_of_memory_in(prior, "decode", 1)
    torch.testing.assert_close(posterior.gradient(z, 0.7)[0], expected, rtol=1e-12, atol=1e-12)
    assert posterior.plan == "lean"


def test_the_last_plan_has_nothing_to_fall_back_to(conv_prior):
    prior = conv_prior()
    out_of_memory_in(prior, "decode", 3)
    posterior, z = problem(prior)
    with pytest.raises(torch.OutOfMemoryError):
        posterior.gradient(z, 0.7)


@pytest.mark.parametrize("plan", PLANS)
def test_a_chosen_plan_does_not_fall_back(conv_prior, plan):
    prior = conv_prior()
    out_of_memory_in(prior, "decode", 1)
    posterior, z = problem(prior, plan)
    with pytest.raises(torch.OutOfMemoryError):
        posterior.gradient(z, 0.7)


def watch_activations(prior):
    """Weak references to everything that a block or the last layer of a network puts out."""
    seen = []
    for network in prior.networks():
        for module in network.modules():
            module.register_forward_hook(lambda module, args, out: seen.append(StorageWeakRef(out.untyped_storage())))
    return seen


@pytest.mark.parametrize("plan", PLANS)
def test_activations_are_gone_after_a_gradient(conv_prior, plan):
    prior = conv_prior()
    seen = watch_activations(prior)
    posterior, z = problem(prior, plan)
    posterior.gradient(z, 0.7)
    assert seen
    assert all(storage.expired() for storage in seen)


@pytest.mark.parametrize("share_of_decoder, plan", [(1.1, "fast"), (0.5, "lean")])
def test_activations_of_given_up_plans_are_gone(conv_prior, share_of_decoder, plan):
    """What the fast plan had saved until it was short of memory must not stay: the lean plan needs the room."""
    prior = conv_prior(denoiser_depth=3, decoder_depth=3)
    denoiser, decoder, _ = needs(prior)
    prior.free = (denoiser + share_of_decoder * decoder) / SHARE
    seen = watch_activations(prior)
    posterior, z = problem(prior)
    posterior.gradient(z, 0.7)
    assert posterior.plan == plan
    assert seen
    assert all(storage.expired() for storage in seen)


def test_activations_are_gone_after_the_device_ran_out_of_memory(conv_prior):
    prior = conv_prior()
    seen = watch_activations(prior)
    out_of_memory_in(prior, "decode", 1)
    posterior, z = problem(prior)
    posterior.gradient(z, 0.7)
    assert posterior.plan == "lean"
    assert all(storage.expired() for storage in seen)


def overridden(prior):
    return [type(m).__name__ for network in prior.networks() for m in network.modules() if "forward" in vars(m)]


def test_checkpointed_covers_the_blocks_and_gives_them_back(conv_prior):
    prior = conv_prior(denoiser_depth=2, decoder_depth=1)
    assert not overridden(prior)
    with checkpointed(prior.blocks()) as n:
        assert n == len(prior.blocks()) == 4
        assert sorted(overridden(prior)) == ["ResBlock", "ResBlock", "ResBlock", "Upsample"]
    assert not overridden(prior)


def test_checkpointed_blocks_run_again_in_the_backward_pass(conv_prior):
    prior = conv_prior(denoiser_depth=3)
    runs = []
    for block in prior.blocks():
        block.conv.register_forward_pre_hook(lambda module, args: runs.append(module))
    for plan, times in (("fast", 1), ("checkpoint", 2)):
        runs.clear()
        posterior, z = problem(prior, plan)
        posterior.gradient(z, 0.7)
        assert [runs.count(block.conv) for block in prior.blocks()] == [times] * 5


class Broken(Exception):
    pass


def test_checkpointed_gives_back_after_an_exception(conv_prior):
    prior = conv_prior()
    with pytest.raises(Broken), checkpointed(prior.blocks()):
        raise Broken
    assert not overridden(prior)


@pytest.mark.parametrize("network", ["denoiser", "decoder"])
def test_a_gradient_that_fails_gives_back_too(conv_prior, network):
    prior = conv_prior()

    def fail(module, args):
        raise Broken

    handle = getattr(prior, network).last.register_forward_pre_hook(fail)
    posterior, z = problem(prior, "checkpoint")
    with pytest.raises(Broken):
        posterior.gradient(z, 0.7)
    handle.remove()
    assert not overridden(prior)
    posterior.gradient(z, 0.7)


def test_a_forward_that_somebody_else_had_replaced_comes_back(conv_prior):
    """Offloading libraries hook a module by an attribute of the instance."""
    prior = conv_prior()
    block = prior.blocks()[0]
    original, calls = block.forward, []

    def hooked(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = hooked
    with checkpointed(prior.blocks()):
        prior.denoise(randn(1, 2, 4, 4), 0.7)
    assert calls
    assert vars(block).get("forward") is hooked


def test_a_block_that_is_listed_twice(conv_prior):
    prior = conv_prior()
    with checkpointed([*prior.blocks()[:2], *prior.blocks()[:2]]) as n:
        assert n == 2
    assert not overridden(prior)


def test_no_blocks():
    with checkpointed(()) as n:
        assert n == 0


def test_a_budget_does_not_hide_that_something_was_changed_in_place():
    x = torch.rand(3, requires_grad=True)
    with Budget(1e9, ()).counted():
        y = x.exp()  # saves its result
        z = (2 * y).sum()
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match=r"\(3,\).*changed in place"):
        z.backward()


class Pair(torch.Tensor):
    """A tensor that is a wrapper around two others, as quantised ones are: it has no bytes of its own."""

    @staticmethod
    def __new__(cls, high, low):
        return torch.Tensor._make_wrapper_subclass(cls, high.shape, dtype=high.dtype, requires_grad=high.requires_grad)

    def __init__(self, high, low):
        self.high, self.low = high, low

    def __tensor_flatten__(self):
        return ["high", "low"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["high"], inner["low"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def whole(value):
            return value.high + value.low if isinstance(value, cls) else value

        if function is torch.ops.aten.detach.default:
            return cls(args[0].high, args[0].low)
        return function(*torch.utils._pytree.tree_map(whole, args), **(kwargs or {}))


def test_the_bytes_of_quantised_weights():
    """Those of its parts: a weight is none of the activations that a plan has to fit in, and what is no weight counts whole."""
    network = nn.Linear(64, 64, bias=False)
    network.weight = nn.Parameter(Pair(torch.ones(64, 64), torch.zeros(64, 64)), requires_grad=False)
    budget = Budget(1e9, [network])
    budget._pack(network.weight)
    assert budget.saved == 0
    x = torch.ones(1, 64, requires_grad=True)
    with budget.counted():
        out = network(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, torch.full((1, 64), 64.0))
    stranger = Budget(1e9, [])
    stranger._pack(network.weight)
    assert stranger.saved == 2 * 64 * 64 * 4
    with pytest.raises(ShortOfMemory):
        Budget(64 * 64 * 4, [])._pack(network.weight)


class ResBlock(nn.Module):
    """A block that acts as the dict says, and writes into it."""

    def forward(self, x, options):
        out = x * options["factor"] * torch.tanh(x)
        options["factor"] = 100.0
        return out


@pytest.mark.parametrize("named", [False, True])
def test_blocks_recompute_what_they_were_told_at_first(named):
    """The caller goes on changing the dict that it passes from block to block, as ComfyUI does."""
    blocks = nn.ModuleList([ResBlock(), ResBlock()])

    def gradient():
        x = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
        h, options = x, {}
        for i, block in enumerate(blocks):
            options["factor"] = 2.0 + i
            h = block(h, options=options) if named else block(h, options)
        options["factor"] = -5.0
        return torch.autograd.grad(h.sum(), x)[0]

    plain = gradient()
    with checkpointed(blocks) as count:
        assert count == 2
        assert torch.equal(gradient(), plain)
