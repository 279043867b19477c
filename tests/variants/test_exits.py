"""A DiT whose depth depends on the noise level, against DiTs cut to their depth."""
from copy import deepcopy

import pytest
import torch
from torch import nn

from checkpoints.fitting import adapt, check_design
from checkpoints.loading import load_pretrained
from checkpoints.networks import DynamicDiT, ExitDiT
from checkpoints.publish import export_checkpoint
from checkpoints.choice import NetworkChoice
from checkpoints.weights import Weights, load_weights, save_weights
from conftest import fill_randomly
import count
from layers.schedule import Scheduled, at_step
from models import DiT
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from sampling.loading import load_sampler
from sampling.sampler import Sampler
from training.cost import most_macs, sampled, training_flops
from vae import PixelSpace
from variants.video import VideoDiT

SIZES = dict(
    input_size=4, patch_size=2, in_channels=3, hidden_size=16, depth=4, num_heads=2, num_classes=3
)
EXITS = ((3, 0.3), (1, 0.6))
LEVELS = (0.1, 0.9, 0.3, 0.6, 0.59, 0.0)  # of a batch
DEPTHS = (4, 1, 3, 1, 3, 4)
TIMES = {GaussianProcess: dict(t_clean=0.0, t_noise=1000.0), FlowProcess: dict(
    t_clean=1.0, t_noise=0.0
)}  # fmt: skip


def network(process=GaussianProcess, exits=EXITS, **changes):
    sizes = {**SIZES, "learn_sigma": process.learns_sigma, **TIMES[process], **changes}
    made = fill_randomly(ExitDiT(exits=exits, **sizes), 0, std=0.2).eval()
    made.process = process.of(made, {}).config
    made.pos_embed.requires_grad_(False)
    return made


def cut(whole, depth):
    """The DiT of its first blocks, with the final layer of that depth."""
    config = {
        name: value for name, value in whole.config.items()
        if name not in ("_class_name", "exits", "t_clean", "t_noise")
    }  # fmt: skip
    found = DiT(**config).to(whole.x_embedder.proj.weight.dtype).eval()
    found.load_state_dict(whole.state_dict(), strict=False)
    found.blocks = nn.ModuleList(found.blocks[:depth])
    for (exit, _), layer in zip(whole.exits, whole.exit_layers):
        if exit == depth:
            found.final_layer = deepcopy(layer)
    return found


def batch(process, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(LEVELS), 3, 4, 4, generator=generator, dtype=dtype)
    levels = torch.tensor(LEVELS, dtype=dtype)
    t = (levels * 1000).round().long() if process is GaussianProcess else 1 - levels
    return x, t, torch.tensor([0, 1, 2, 0, 1, 3])


@pytest.mark.parametrize("positions", ["table", "rope"])
@pytest.mark.parametrize("process", TIMES)
def test_each_sample_is_of_the_dit_cut_to_its_depth(process, positions):
    whole = network(process, positions=positions, hidden_size=16).double() if (
        positions == "table"
    ) else ExitDiT(
        exits=EXITS, **{**SIZES, **TIMES[process], "positions": "rope", "hidden_size": 32}
    ).double().eval()  # fmt: skip
    if positions == "rope":
        fill_randomly(whole, 1, std=0.2)
    x, t, y = batch(process)
    found = whole(x, t, y)
    for i, depth in enumerate(DEPTHS):
        one = slice(i, i + 1)
        wanted = cut(whole, depth)(x[one], t[one], y[one])
        assert torch.allclose(found[one], wanted, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(whole(x, t, y), found, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grad_checkpointing", [False, True])
@pytest.mark.parametrize("process", TIMES)
def test_gradients_are_those_of_the_cut_dits(process, grad_checkpointing):
    whole = network(process).double()
    whole.grad_checkpointing = grad_checkpointing
    x, t, y = batch(process)
    drop = torch.tensor([0, 0, 1, 0, 0, 0])
    whole.train()(x, t, y, drop).square().sum().backward()
    wanted = {name: torch.zeros_like(p) for name, p in whole.named_parameters()}
    for i, depth in enumerate(DEPTHS):
        one, part = slice(i, i + 1), cut(whole, depth).train()
        part(x[one], t[one], y[one], drop[one]).square().sum().backward()
        last = {1: "exit_layers.1.", 3: "exit_layers.0.", 4: "final_layer."}[depth]
        for name, p in part.named_parameters():
            if p.grad is not None:
                wanted[name.replace("final_layer.", last)] += p.grad
    for name, p in whole.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.grad, wanted[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("levels", [(0.1,), (0.9,), (0.4, 0.5)])
def test_every_parameter_has_a_gradient_in_any_batch(levels):
    """As DistributedDataParallel wants it: 0 where no sample is of a depth."""
    whole = network().train()
    t = (torch.tensor(levels) * 1000).long()
    x = torch.randn(len(t), 3, 4, 4)
    whole(x, t, torch.zeros_like(t)).square().sum().backward()
    for name, p in whole.named_parameters():
        assert not p.requires_grad or p.grad is not None and p.grad.isfinite().all(), name
    used = {4: "final_layer", 3: "exit_layers.0", 1: "exit_layers.1"}
    depth = 4 if max(levels) < 0.3 else 1 if min(levels) >= 0.6 else 3
    for each, name in used.items():
        gradient = whole.get_submodule(name).linear.weight.grad
        assert gradient.any() == (each == depth)
    assert whole.blocks[depth - 1].mlp.fc1.weight.grad.any()
    assert depth == 4 or not whole.blocks[depth].mlp.fc1.weight.grad.any()


@pytest.mark.parametrize("process", TIMES)
def test_below_its_levels_it_is_the_dit_bit_for_bit(process):
    whole = network(process, exits=((2, 1.0),))
    x, t, y = batch(process, torch.float32)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(whole(x, t, y), cut(whole, 4)(x, t, y))


@pytest.mark.parametrize("process", TIMES)
def test_where_a_step_is_expected_all_samples_have_its_depth(process):
    whole = network(process)
    assert isinstance(whole, Scheduled)
    x, _, y = batch(process, torch.float32)
    clean, noise = TIMES[process].values()
    times = [clean + level * (noise - clean) for level in (0.95, 0.45, 0.05)]
    whole.schedule(times)
    runs = []
    for i, block in enumerate(whole.blocks):
        block.register_forward_hook(lambda *_, i=i: runs.append(i))
    for step, (time, depth) in enumerate(zip(times, (1, 3, 4))):
        t = torch.full((len(x),), time)
        runs.clear()
        with at_step(whole, step), torch.no_grad():
            told = whole(x, t, y)
        assert runs == list(range(depth))
        runs.clear()
        with torch.no_grad():
            assert torch.equal(whole(x, t, y), told) and runs == list(range(depth))
        assert torch.equal(told, cut(whole, depth)(x, t, y))


SOLVERS = [(process, name) for process in TIMES for name in process.solvers if name != "dopri5"]


@pytest.mark.parametrize("process, solver", SOLVERS, ids=[name for _, name in SOLVERS])
def test_sampling_with_every_solver(process, solver):
    """Guided inside an interval: the same as of a network that is told nothing, and in any split
    of the batch.
    """
    whole = network(process).requires_grad_(False)
    how = dict(cfg_scale=2.0, cfg_interval=(0.2, 0.7), process=process.of(whole, {}))
    labels = torch.tensor([0, 2])
    sampler = Sampler(whole, PixelSpace(), None, 6, solver, **how)
    found = sampler.numbered_latents(0, [0, 1], labels)
    whole.expect = lambda step: None  # untold
    assert torch.allclose(sampler.numbered_latents(0, [0, 1], labels), found, atol=1e-5)
    del whole.expect
    one = sampler.numbered_latents(0, [1], labels[1:])
    assert torch.allclose(one, found[1:], atol=1e-4)


@pytest.mark.parametrize("exits, message", [
    ([], "give pairs"), ([3], "give pairs"), ("3:0.5", "give pairs"),
    ([(0, 0.5)], "from 1 to 3"), ([(4, 0.5)], "from 1 to 3"), ([(1.5, 0.5)], "from 1 to 3"),
    ([(2, -0.1)], "from 0, clean"), ([(2, 1.1)], "from 0, clean"), ([(2, "x")], "from 0, clean"),
    ([(2, float("nan"))], "from 0, clean"),
    ([(2, 0.5), (3, 0.6)], "rising noise levels and falling depths"),
    ([(3, 0.5), (2, 0.5)], "rising noise levels and falling depths"),
])  # fmt: skip
def test_exits_that_there_cannot_be(exits, message):
    with pytest.raises(ValueError, match=message):
        ExitDiT(exits=exits, **SIZES)


def test_the_two_times_differ():
    with pytest.raises(ValueError, match="must differ"):
        ExitDiT(exits=EXITS, **SIZES, t_clean=1.0, t_noise=1.0)


def weights_of(made):
    return Weights(made.state_dict(), made.config, None, process=made.process)


def test_a_dits_weights_begin_it(tmp_path):
    """Where the exits' layers are the DiT's; and it goes on from its own."""
    start = fill_randomly(DiT(**SIZES), 3, std=0.2).eval()
    start.process = GaussianProcess.of(start, {}).config
    fresh = ExitDiT(exits=EXITS, **SIZES, **TIMES[GaussianProcess]).eval()
    fresh.load_state_dict(adapt(weights_of(start), fresh, "keep", "a.pt"))
    x, t, y = batch(GaussianProcess, torch.float32)
    for depth in (4, 3, 1):
        part = cut(fresh, depth)
        assert torch.equal(part.final_layer.linear.weight, start.final_layer.linear.weight)
    again = ExitDiT(exits=EXITS, **SIZES)
    again.load_state_dict(adapt(weights_of(network()), again, "keep", "a.pt"))
    with pytest.raises(ValueError, match="pass `exits` 3:0.3 1:0.6$"):
        adapt(weights_of(network()), ExitDiT(exits=[(2, 0.5)], **SIZES), "keep", "a.pt")
    other = DiT(**SIZES, block="adaln")
    other.process = None
    with pytest.raises(ValueError, match="design adaln, and a network with `exits`"):
        adapt(weights_of(other), fresh, "keep", "a.pt")
    with pytest.raises(ValueError, match="has norm rms"):
        rms = DiT(**SIZES, norm="rms")
        rms.process = None
        adapt(weights_of(rms), fresh, "keep", "a.pt")


def test_it_is_saved_exported_and_sampled(tmp_path):
    made = network()
    save_weights(tmp_path / "a.safetensors", weights_of(made))
    choice = NetworkChoice(tmp_path / "a.safetensors", vae="none")
    export_checkpoint(choice, tmp_path / "hub", "hub")
    x, t, y = batch(GaussianProcess, torch.float32)
    for name in ("a.safetensors", "hub"):
        loaded, _ = load_pretrained(tmp_path / name)
        assert type(loaded) is ExitDiT and torch.equal(loaded(x, t, y), made(x, t, y))
    with pytest.raises(ValueError, match="a ExitDiT goes into no pipeline"):
        export_checkpoint(choice, tmp_path / "pipeline", "diffusers")
    sampler = load_sampler(tmp_path / "a.safetensors", vae="none", steps=4, device="cpu")
    assert sampler.images([0]).shape == (1, 4, 4, 3)
    weights = load_weights(tmp_path / "a.safetensors")
    for damaged in (3, [[9, 0.5]], [["a", 0.5]]):
        save_weights(tmp_path / "b.safetensors", weights._replace(
            config=weights.config | {"exits": damaged}
        ))  # fmt: skip
        with pytest.raises(ValueError, match="`exits`"):
            load_pretrained(tmp_path / "b.safetensors")


def test_operations_are_the_mean_over_noise_levels(capsys):
    config = network().config
    parts = [training_flops(cut(network(), 4).config | {"depth": depth}) for depth in (4, 3, 1)]
    wanted = sum(share * flops for share, flops in zip((0.3, 0.3, 0.4), parts))
    assert training_flops(config) == pytest.approx(wanted, rel=1e-6)
    assert most_macs(config) == parts[0] // 6
    count.main(["--model", "DiT-Ti/2", "--exits", "3:0.5"])
    some = capsys.readouterr().out.split()
    count.main(["--model", "DiT-Ti/2"])
    every = capsys.readouterr().out.split()
    assert "ExitDiT" in some and 0.7 < float(some[-8]) / float(every[-8]) < 0.8


OTHER_CLASSES = {
    DynamicDiT: "pass `exits` 3:0.3 1:0.6, and leave `dynamic` out",
    DiT: "pass `exits` 3:0.3 1:0.6",
    VideoDiT: "pass a `model` whose name begins with DiT, and `exits` 3:0.3 1:0.6",
}


@pytest.mark.parametrize("kind", OTHER_CLASSES)
def test_weights_with_exits_are_told_what_they_want(kind):
    made = network()
    with pytest.raises(ValueError) as error:
        check_design(kind(**SIZES), made.state_dict(), "a.pt", made.config)
    assert str(error.value).endswith(OTHER_CLASSES[kind])
    begun = DiT(**SIZES)
    with pytest.raises(ValueError, match="leave `exits` out, or start a new run"):
        check_design(made, begun.state_dict(), "a.pt", begun.config)
    flow = network(FlowProcess, learn_sigma=True)
    with pytest.raises(ValueError, match="pass the `process` that it has learned"):
        check_design(flow, made.state_dict(), "a.pt", made.config)
    damaged = made.config | {"exits": 3}
    with pytest.raises(ValueError, match="pass .*`exits` that it was trained with"):
        check_design(kind(**SIZES), made.state_dict(), "a.pt", damaged)


def test_what_exits_leave_out_is_counted(tmp_path):
    """Against the complete DiT, counted as it is sampled itself."""
    made, whole = network(), cut(network(), 4)
    whole.process = made.process
    for name, one in (("exits", made), ("whole", whole)):
        save_weights(tmp_path / f"{name}.safetensors", weights_of(one))
    exits, complete = (sampled(tmp_path / f"{name}.safetensors") for name in ("exits", "whole"))
    assert exits.most == complete.most and exits.macs < 0.8 * exits.most
