"""Training a network to leave parts of itself out: its loss against one written by hand, steps in
parts and on processes, and what train.py refuses.
"""

import json

from accelerate.state import AcceleratorState
import numpy as np
from PIL import Image
import pytest
import torch

import count
from checkpoints import load_pretrained
from checkpoints.files import newest_checkpoint, read_checkpoint
from checkpoints.fitting import adapt
from checkpoints.publish import export_checkpoint, save_pretrained
from checkpoints.choice import NetworkChoice
from checkpoints.weights import Weights, load_weights, save_weights
from conftest import fill_randomly, randn
from models import DiT
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
import sample
from starts import fresh, forked
import train
from training.dynamic import ANNEALED, Aim, Target, dynamic_losses
from training.state import Recipe, new_state
from training.step import draw, train_step
from checkpoints.networks import DynamicDiT

SIZE, CLASSES = 16, 3
SMALL = dict(
    input_size=8, patch_size=4, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=4
)
TI8 = dict(
    input_size=SIZE, patch_size=8, in_channels=3, hidden_size=128, depth=6, num_heads=4,
    num_classes=CLASSES,
)  # fmt: skip
QUICK = [
    "--model", "DiT-Ti/8", "--image-size", str(SIZE), "--vae", "none", "--num-classes", "3",
    "--global-batch-size", "4", "--num-workers", "0", "--device", "cpu", "--log-every", "1", "--lr",
    "1e-3", "--ema-decay", "0.5", "--max-steps", "4",
]  # fmt: skip
FLOW = ["--process", "flow"]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate remembers its first settings for the life of a process; each run has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 3 classes with 4 images each."""
    folder, source = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(12):
        path = folder / "train" / ["ape", "bee", "cat"][i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(path)
    return folder / "train"


def weights_file(path, network, process=None):
    """A checkpoint of a network."""
    said = process.config if process else None
    save_weights(path, Weights(network.state_dict(), network.config, None, process=said))
    return path


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Files of a DiT that runs begin with: of the Gaussian process, and of a flow."""
    folder = tmp_path_factory.mktemp("begun")
    flow = fill_randomly(DiT(**TI8, learn_sigma=False))
    return {
        "diffusion": weights_file(folder / "dit.safetensors", fill_randomly(DiT(**TI8))),
        "flow": weights_file(folder / "flow.safetensors", flow, FlowProcess()),
    }


def folder_of(results):
    return sorted(results.iterdir())[-1]


def run(images, results, begun, *flags):
    """Train with QUICK, from a DiT, and these flags; the newest checkpoint's contents."""
    start = [] if begun is None else ["--init-from", str(begun)]
    train.main(
        ["--data-path", str(images), "--results-dir", str(results), *QUICK, *start, *flags]
    )
    return read_checkpoint(newest_checkpoint(folder_of(results)))


def rows(results):
    """The loss, the share of operations and the norm of the gradient, of each step of a run."""
    lines = (folder_of(results) / "metrics.jsonl").read_text().splitlines()
    values = [json.loads(line) for line in lines]
    return [row[name] for row in values for name in ("loss", "operations", "gradient_norm")]


def close(found, wanted, **tolerance):
    for part in ("model", "ema"):
        for name, tensor in wanted[part].items():
            torch.testing.assert_close(found[part][name], tensor, **tolerance)


# ---- the loss ----


def with_routers(**changes):
    """A small network of random weights, its routers at about 0, so that noise decides."""
    network = fill_randomly(DynamicDiT(**{**SMALL, **changes}), std=0.2)
    return network.train()


@pytest.mark.parametrize("process", [GaussianProcess(), FlowProcess()], ids=["diffusion", "flow"])
def test_the_loss_is_that_of_both_passes_and_of_the_operations(process):
    """Value and gradient, against the network asked twice and the square written out."""
    network = with_routers(learn_sigma=process.learns_sigma).double()
    x, noise = randn(5, 3, 8, 8, seed=1), randn(5, 3, 8, 8, seed=2)
    draws = draw(1, 2, 5, (3, 8, 8), 0.5, process, "cpu", routes=network.routes)
    t, y, drop, routing = draws.t, torch.arange(5) % 4, draws.drop, draws.routing.double()

    def asked(x, t, noise):
        return network(x, t, y, drop, noise=noise)

    aim = Aim(0.6, lambda shares: shares.detach().mean())
    losses = dynamic_losses(process, asked, x, t, noise, routing, aim)
    losses["loss"].mean().backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad(set_to_none=True)
    drawn = process.losses(lambda x, t: asked(x, t, routing)[0], x, t, noise)
    everything = process.losses(lambda x, t: network(x, t, y, drop, noise=routing)[1], x, t, noise)
    kept = []
    process.losses(lambda x, t: (out := asked(x, t, routing), kept.append(out[2]))[0][0],
                   x, t, noise)  # fmt: skip
    want = (drawn["loss"] + everything["loss"]).mean() + 2 * (kept[0].mean() - 0.6) ** 2
    want.backward()
    assert losses["loss"].mean().item() == pytest.approx(want.item(), rel=1e-10)
    assert 0.2 < kept[0].min() < kept[0].max() < 1
    assert torch.equal(losses["operations"], kept[0])
    for name, gradient in found.items():
        other = network.get_parameter(name).grad
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-10)
    assert found["blocks.0.router_heads.bias"].any() and found["blocks.0.attn.qkv.weight"].any()


def test_the_target_falls_from_1_to_the_ratio():
    target = Target(0.5)
    assert [target.at(step) for step in (0, 100, 550, 1000, 10**6)] == pytest.approx(
        [1, 1, 0.75, 0.5, 0.5]
    )
    assert Target(0.5, 10 * ANNEALED).at(550) == target.at(550)
    short = Target(0.2, 400)  # a quarter of them
    assert [short.at(step) for step in (0, 10, 55, 100, 400)] == pytest.approx(
        [1, 1, 0.6, 0.2, 0.2]
    )


def test_switches_are_drawn_last_and_are_differences_of_gumbels():
    plain = draw(5, 7, 8, (3, 8, 8), 0.5, GaussianProcess(), "cpu")
    drawn = draw(5, 7, 8, (3, 8, 8), 0.5, GaussianProcess(), "cpu", routes=(20, 100))
    assert plain.routing.shape == (8, 0) and drawn.routing.shape == (8, 20, 100)
    for before, now in zip(plain[:-1], drawn[:-1], strict=True):
        assert torch.equal(before, now)
    halves = [
        draw(5, 7, 8, (3, 8, 8), 0.5, GaussianProcess(), "cpu", rank, 2, routes=(20, 100)).routing
        for rank in (0, 1)
    ]
    assert torch.equal(torch.cat(halves), drawn.routing)
    # Their distribution function is the sigmoid
    for at in (-2.0, 0.0, 1.0):
        share = (drawn.routing < at).double().mean()
        assert share.item() == pytest.approx(torch.tensor(at).sigmoid().item(), abs=0.02)


def state_of(**recipe):
    recipe = Recipe(lr=1e-3, ema_decay=(0.5,), dynamic=Target(0.3, 8), **recipe)
    state = new_state(with_routers(), recipe, process=GaussianProcess())
    state.step = 3
    return state


@pytest.mark.parametrize("more", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_a_step_in_parts_is_the_step(more):
    """The mean of the operations is that of all samples, also where they are done in parts."""
    x, y = randn(6, 3, 8, 8, dtype=torch.float32), torch.arange(6) % 4
    whole, parts = state_of(**more), state_of(grad_accum=3, **more)
    draws = draw(0, 0, 6, (3, 8, 8), 0.5, GaussianProcess(), "cpu", routes=whole.network.routes)
    report = train_step(whole, x, y, draws)
    other = train_step(parts, x, y, draws)
    tolerance = 2e-2 if more else 2e-5
    assert other == pytest.approx(report, rel=tolerance)
    assert 0 < report["operations"] < 6 and report["gradient_norm"] > 0
    assert whole.window.means(6)["operations"] == pytest.approx(report["operations"] / 6)


def test_operations_come_near_the_target():
    """With the loss of operations alone to be had, for the targets are noise."""
    state = new_state(
        DynamicDiT(**SMALL), Recipe(lr=3e-2, ema_decay=(0.5,), dynamic=Target(0.5, 120)),
        process=FlowProcess(),
    )  # fmt: skip
    routes, shares = state.network.routes, []
    for step in range(120):
        draws = draw(0, step, 16, (3, 8, 8), 0.1, FlowProcess(), "cpu", routes=routes)
        x = randn(16, 3, 8, 8, seed=step, dtype=torch.float32)
        shares.append(train_step(state, x, torch.arange(16) % 4, draws)["operations"] / 16)
    assert shares[0] > 0.95 and np.mean(shares[-20:]) == pytest.approx(0.5, abs=0.06)


# ---- weights to begin with ----


def test_a_dit_begins_it_and_it_then_is_that_dit():
    dit = fill_randomly(DiT(**SMALL))
    weights = Weights(dit.state_dict(), dit.config, None)
    network = DynamicDiT(**SMALL)
    network.load_state_dict(adapt(weights, network, "keep", "a"))
    x, t, y = randn(3, 3, 8, 8), torch.tensor([1, 500, 999]), torch.arange(3)
    found = network.double().eval()(x, t, y)
    torch.testing.assert_close(found, dit.double().eval()(x, t, y), rtol=1e-12, atol=1e-12)
    for name, changes in {
        "num_heads 2, .* goes on from one with 4": {"num_heads": 4},
        "is of another configuration": {"depth": 3},
    }.items():
        with pytest.raises(ValueError, match=name):
            adapt(weights, DynamicDiT(**{**SMALL, **changes}), "keep", "a")
    for name, changes in {
        "a DiT with block adaln, ": {"block": "adaln"},
        "a DiT with positions rope, .*; no other can begin one": {"positions": "rope"},
        "a DiT with mlp swiglu": {"mlp": "swiglu"},
    }.items():
        other = DiT(**SMALL | {"num_heads": 1} | changes)
        with pytest.raises(ValueError, match=name):
            adapt(Weights(other.state_dict(), other.config, None), network, "keep", "a")


# ---- runs ----


def test_a_run_leaves_a_network_that_is_sampled_counted_and_exported(
    images, tmp_path, begun, capsys
):
    contents = run(images, tmp_path / "r", begun["diffusion"], "--dynamic", "0.5",
                   "--sample-every", "4")  # fmt: skip
    folder = folder_of(tmp_path / "r")
    assert contents["config"]["_class_name"] == "DynamicDiT" and contents["args"]["dynamic"] == 0.5
    assert "operations" in (folder / "log.txt").read_text()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0.9 < rows[0]["operations"] <= 1
    network, _ = load_pretrained(folder)
    assert type(network) is DynamicDiT
    save_pretrained(network, tmp_path / "hub")
    for ckpt in (tmp_path / "hub", folder):
        sample.main(
            ["--ckpt", str(ckpt), "--vae", "none", "--num-sampling-steps", "3", "--device", "cpu",
             "--cfg-scale", "1.5", "--class-labels", "0", "2", "--output", str(tmp_path / "a.png")]
        )  # fmt: skip
    choice = NetworkChoice(folder, vae="none")
    export_checkpoint(choice, tmp_path / "a.safetensors", "safetensors")
    assert load_weights(tmp_path / "a.safetensors").config["_class_name"] == "DynamicDiT"
    with pytest.raises(ValueError, match="a DynamicDiT goes into no pipeline of diffusers'"):
        export_checkpoint(choice, tmp_path / "pipeline", "diffusers")
    capsys.readouterr()
    count.main(["--ckpt", str(tmp_path / "a.safetensors")])
    assert "GMAC in a step, " in capsys.readouterr().out


@pytest.mark.parametrize("process, more", [
    ("diffusion", ["--grad-accum", "2", "--grad-checkpointing"]), ("flow", ["--num-workers", "1"]),
])  # fmt: skip
def test_a_run_is_the_same_however_it_is_done(images, tmp_path, begun, process, more):
    flags = ["--dynamic", "0.4", *(FLOW if process == "flow" else [])]
    plain = run(images, tmp_path / "a", begun[process], *flags)
    other = run(images, tmp_path / "b", begun[process], *flags, *more)
    close(other, plain, rtol=1e-3, atol=1e-4)
    assert rows(tmp_path / "b") == pytest.approx(rows(tmp_path / "a"), rel=1e-4)


def test_a_run_goes_on_where_it_was(images, tmp_path, begun):
    flags = ["--dynamic", "0.4", "--resume", "auto", "--ckpt-every", "2"]
    whole = run(images, tmp_path / "a", begun["flow"], *flags, *FLOW)
    log = (folder_of(tmp_path / "a") / "checkpoints")
    (log / "0000004.pt").unlink()
    again = run(images, tmp_path / "a", begun["flow"], *flags, *FLOW)
    assert len(list((tmp_path / "a").iterdir())) == 1
    close(again, whole, rtol=0, atol=0)
    first = log / "0000002.pt"
    other = run(images, tmp_path / "b", None, "--dynamic", "0.4", *FLOW, "--resume", str(first))
    close(other, whole, rtol=0, atol=0)


def test_half_precision_learns_about_the_same(images, tmp_path, begun):
    flags = ["--dynamic", "0.4"]
    whole = run(images, tmp_path / "a", begun["diffusion"], *flags)
    half = run(images, tmp_path / "b", begun["diffusion"], *flags, "--mixed-precision", "bf16")
    name = "blocks.0.router_heads.bias"
    assert not torch.equal(half["model"][name], whole["model"][name])
    close(half, whole, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("start, more", [
    (forked, []), pytest.param(fresh, [], marks=pytest.mark.long),
    pytest.param(
        forked, ["--fsdp", "--grad-accum", "2", "--sample-every", "4"], marks=pytest.mark.long
    ),
])  # fmt: skip
def test_two_processes_learn_as_one(images, tmp_path, begun, start, more):
    shared = ["--dynamic", "0.4", *FLOW]
    one = run(images, tmp_path / "one", begun["flow"], *shared)
    done = start(
        "train.py", "--data-path", images, *QUICK, "--init-from", begun["flow"], *shared, *more,
        "--results-dir", tmp_path / "two", processes=2,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    two = read_checkpoint(newest_checkpoint(folder_of(tmp_path / "two")))
    close(two, one, rtol=1e-3, atol=1e-4)
    assert rows(tmp_path / "two") == pytest.approx(rows(tmp_path / "one"), rel=1e-4)


@pytest.mark.long
def test_blocks_are_compiled(images, tmp_path, begun):
    plain = run(images, tmp_path / "a", begun["flow"], "--dynamic", "0.4", *FLOW)
    other = run(images, tmp_path / "b", begun["flow"], "--dynamic", "0.4", *FLOW, "--compile")
    close(other, plain, rtol=1e-3, atol=1e-4)


# ---- what is refused ----


@pytest.mark.parametrize("flags, words", [
    (["--dynamic", "0"], "--dynamic is 0.0; it must be from 0.01 to 1"),
    (["--dynamic", "1.5"], "--dynamic is 1.5; it must be from 0.01 to 1"),
    (["--dynamic", "nan"], "--dynamic is nan; it must be from 0.01 to 1"),
    (["--dynamic", "0.5", "--block", "adaln"], "--block is adaln, and --model DiT-Ti/8, with"),
    (["--dynamic", "0.5", "--positions", "rope"], "--positions is rope, and --model DiT-Ti/8"),
    (["--dynamic", "0.5", "--mlp", "swiglu"], "leave --mlp out"),
    (["--dynamic", "0.5", "--qk-norm"], "leave --qk-norm out"),
    (["--dynamic", "0.5", "--pack", "64"], "pass --aspect-buckets instead"),
    (["--dynamic", "0.5", "--model", "MMDiT-Ti/4"], "--model MMDiT-Ti/4 has no routers; choose a"),
    (["--dynamic", "0.5", "--model", "VideoDiT-Ti/2", "--frames", "4"], "has no routers; choose"),
])  # fmt: skip
def test_what_it_cannot_be_is_refused(images, tmp_path, begun, capsys, flags, words):
    with pytest.raises(SystemExit):
        run(images, tmp_path, begun["diffusion"], *flags)
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_it_begins_with_a_dit(images, tmp_path, begun, capsys):
    with pytest.raises(SystemExit):
        run(images, tmp_path, None, "--dynamic", "0.5")
    wanted = "--dynamic is 0.5, which goes on from a trained DiT; name its checkpoint with --init-f"
    assert wanted in capsys.readouterr().err
    ours = weights_file(tmp_path / "d.safetensors", fill_randomly(DynamicDiT(**TI8)))
    with pytest.raises(SystemExit):
        run(images, tmp_path / "r", ours)
    said = "has the weights of a DynamicDiT, the network here is a DiT; pass --dynamic, the share"
    assert said in capsys.readouterr().err
    contents = run(images, tmp_path / "r", ours, "--dynamic", "0.3")  # another ratio
    assert contents["step"] == 4
    plain = run(images, tmp_path / "s", begun["diffusion"])
    assert "_class_name" not in plain["config"]
    with pytest.raises(SystemExit):
        run(images, tmp_path / "t", None, "--dynamic", "0.3", "--resume",
            str(folder_of(tmp_path / "s")))  # fmt: skip
    assert "leave --dynamic out, or start a new run from" in capsys.readouterr().err
