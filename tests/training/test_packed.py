"""Training on images of their own shape, in buckets and packed: losses, runs, and what is refused.
"""

import re

import numpy as np
from PIL import Image
import pytest
import torch

from checkpoints.files import newest_checkpoint, read_checkpoint
from conftest import fill_randomly, randn, small_dit
from kill_campaign import end, launcher, start
from layers.packing import pack
from models import DiT
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from test_runs import rows, without_rates
from test_train import QUICK, fresh_accelerator, pixel_state, run, same  # noqa: F401
from training import TrainOptions
from training.cost import flops_per_image, training_flops
from training.packed import first_numbers, first_tokens, packed_losses
from training.state import Recipe, new_state
from training.step import draw, train_step
from vae import LatentShape

PROCESSES = {
    "diffusion": (GaussianProcess(), [0, 400, 999, 3, 77, 650]),
    "flow": (FlowProcess(path="gvp", cosine_loss=True), [0.1, 0.9, 0.5, 0.33, 0.8, 0.01]),
}
GRIDS = [(4, 4), (2, 6), (1, 3), (5, 3), (4, 4), (2, 2)]


# ---- a step ----


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("positions", ["table", "rope"])
def test_losses_and_gradients_are_those_of_each_image_alone(process, positions):
    learned, times = PROCESSES[process]
    network = small_dit(positions=positions, learn_sigma=process == "diffusion")
    network.requires_grad_(True)
    latents = [randn(4, 2 * h, 2 * w, seed=i) for i, (h, w) in enumerate(GRIDS)]
    noise, t, labels = randn(6, 4, 8, 8, seed=9), torch.tensor(times), torch.arange(6)
    found = packed_losses(
        learned, lambda x, t: network(x, t, labels), latents, t, noise, 2, length=20
    )
    assert set(found) == set(learned.parts)
    alone: dict = {name: [] for name in found}
    for i, latent in enumerate(latents):
        own = noise[i].flatten()[: latent.numel()].view(1, *latent.shape)
        one = learned.losses(
            lambda x, t: network(x, t, labels[i : i + 1]), latent[None], t[i : i + 1], own
        )
        for name, value in one.items():
            alone[name].append(value)
    for name, values in alone.items():
        torch.testing.assert_close(found[name], torch.cat(values), rtol=1e-10, atol=1e-10)
    weights, parameters = torch.arange(1.0, 7), [p for p in network.parameters() if p.dim() > 1]
    ours, theirs = (
        torch.autograd.grad((loss * weights).sum(), parameters, allow_unused=True)
        for loss in (found["loss"], torch.cat(alone["loss"]))
    )
    assert sum(grad is not None for grad in ours) > 10
    for one, other in zip(ours, theirs):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_first_tokens_and_first_numbers():
    packed = pack([randn(1, 2 * h, 2 * w, seed=i) for i, (h, w) in enumerate(GRIDS)], 2, 20)
    numbers = packed.taken(packed.image).tolist()
    assert first_tokens(packed).tolist() == [numbers.index(i) for i in range(6)]
    noise = randn(2, 3, 4, 4)
    assert first_numbers(noise, (3, 4, 4)) is noise
    assert torch.equal(first_numbers(noise, (3, 2, 5))[1].flatten(), noise[1].flatten()[:30])


def state_of(**recipe):
    network = DiT(
        input_size=8, patch_size=2, in_channels=3, hidden_size=16, depth=2, num_heads=2,
        num_classes=4, positions="table+rope",
    )  # fmt: skip
    return new_state(fill_randomly(network), Recipe(lr=1e-3, ema_decay=(0.5,), **recipe))


def parameters_of(state):
    return torch.cat([p.detach().flatten() for p in state.network.parameters()])


def step_of(state, *batch):
    """The report of a step, and its gradients side by side."""
    found, step = [], state.opt.step

    def noted():
        found.extend(p.grad.flatten() for p in state.network.parameters() if p.requires_grad)
        step()

    state.opt.step = noted
    return train_step(state, *batch), torch.cat(found)


def test_a_packed_step_on_squares_is_the_ordinary_step():
    """Whatever the rows' length, and in parts, which pack their images by themselves."""
    latents, labels = randn(8, 3, 8, 8, dtype=torch.float32), torch.arange(8) % 4
    draws = draw(0, 0, 8, (3, 8, 8), 0.5, GaussianProcess(), "cpu")
    wanted, gradients = step_of(state_of(), latents, labels, draws)
    assert gradients.abs().max() > 1e-2
    for recipe in ({"pack": 16}, {"pack": 40}, {"pack": 33, "grad_accum": 4}):
        report, found = step_of(state_of(**recipe), list(latents), labels, draws)
        assert report == pytest.approx(wanted, rel=2e-5)
        torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-6)


def test_a_step_in_a_bucket_takes_the_first_numbers_of_its_noise():
    latents, labels = randn(4, 3, 4, 12, dtype=torch.float32), torch.arange(4)
    draws = draw(0, 0, 4, (3, 8, 8), 0.5, GaussianProcess(), "cpu")
    cut = draws.noise.flatten(1)[:, :144].reshape(4, 3, 4, 12)
    first, second = state_of(), state_of()
    report = train_step(first, latents, labels, draws)
    assert report == train_step(second, latents, labels, draws._replace(noise=cut))
    assert torch.equal(parameters_of(first), parameters_of(second))


@pytest.mark.long
def test_compiled_blocks_take_rows_that_come_in_any_number():
    network = small_dit(positions="rope")
    images = [randn(4, 2 * h, 2 * w, seed=i) for i, (h, w) in enumerate(GRIDS)]
    t, labels = torch.arange(6.0), torch.arange(6)
    packs = [pack(images, 2, length) for length in (20, 30, 40)]
    eager = [network(packed, t, labels) for packed in packs]
    for block in network.blocks:
        block.compile(backend="aot_eager")
    for packed, expected in zip(packs, eager):
        torch.testing.assert_close(network(packed, t, labels), expected, rtol=1e-9, atol=1e-10)
    for grid in GRIDS:
        x = randn(6, 4, 2 * grid[0], 2 * grid[1])
        assert network(x, t, labels).shape == (6, 8, *x.shape[2:])


def test_operations_are_the_mean_over_images_each_by_itself():
    config = small_dit().config
    sizes, shape = [(32, 32), (16, 48), (8, 8), (32, 32)], LatentShape(4, 4)
    alone = [training_flops(config, (h // 4, w // 4)) for h, w in sizes]
    assert len(set(alone)) == 3
    assert flops_per_image(config, sizes, shape) == pytest.approx(sum(alone) / 4, rel=1e-12)
    assert flops_per_image(config, None, shape) == training_flops(config) == alone[0]


# ---- runs ----

SHAPED = [*QUICK, "--model", "DiT-Ti/4", "--lr", "1e-3"]
KINDS = {
    "buckets": ["--aspect-buckets"],
    "packed": ["--pack", "20", "--positions", "rope", "--process", "flow"],
}
SHAPES = [(20, 12), (16, 16), (12, 20), (40, 24), (10, 8), (30, 90), (16, 17)]


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """A folder of 3 classes with 9 images each, of SHAPES in turn."""
    folder, source = tmp_path_factory.mktemp("shaped"), np.random.default_rng(0)
    for i in range(27):
        path = folder / "train" / "abc"[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = source.integers(0, 256, (*SHAPES[i % len(SHAPES)], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder / "train"


def log_of(results):
    (folder,) = results.iterdir()
    return (folder / "log.txt").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_resumed_ends_as_one_that_was_not(shaped, tmp_path, vae, kind):
    """With an autoencoder of ratio 2, whose noise is cut as well."""
    flags = [*SHAPED, *KINDS[kind], "--vae", vae, "--model", "DiT-Ti/2"]
    whole = run(shaped, tmp_path / "whole", *flags, "--max-steps", "6")
    run(shaped, tmp_path / "cut", *flags, "--max-steps", "3")
    cut = run(
        shaped, tmp_path / "cut", *flags, "--max-steps", "6", "--resume", "auto", "--grad-accum",
        "1",
    )  # fmt: skip
    assert same(cut["model"], whole["model"]) and same(cut["ema"], whole["ema"])
    ends = [without_rates(tmp_path / name / "000-DiT-Ti-2")[-1] for name in ("cut", "whole")]
    assert ends[0] == ends[1] and ends[0]["step"] == 6
    told = {
        "buckets": "buckets, height x width and images: 12x20 8, 16x16 11, 20x12 8",
        "packed": r"packed in rows of 20 tokens: images of 4 to 16, 1\d\.\d on average",
    }  # fmt: skip
    assert re.search(told[kind], log_of(tmp_path / "whole"))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [[], ["--fsdp", "--grad-accum", "2", "--grad-checkpointing"]])
def test_two_processes_learn_what_one_does(shaped, tmp_path, kind, more):
    flags = [*SHAPED, *KINDS[kind], "--max-steps", "4"]
    alone = run(shaped, tmp_path / "alone", *flags)
    end(start(launcher(), shaped, tmp_path / "two", 2, run=[*flags, *more]), 0)
    (folder,) = (tmp_path / "two" / "results").iterdir()
    found = read_checkpoint(newest_checkpoint(folder))
    for part in ("model", "ema"):
        for key, tensor in alone[part].items():
            torch.testing.assert_close(found[part][key], tensor, rtol=1e-3, atol=5e-4)
    both = rows(folder), rows(tmp_path / "alone" / "000-DiT-Ti-4")
    for ours, theirs in zip(*both, strict=True):
        for key in ("loss", "mse", "gradient_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_runs_learn_what_eager_ones_do(shaped, tmp_path, kind):
    flags = [*SHAPED, *KINDS[kind], "--max-steps", "6"]
    eager = run(shaped, tmp_path / "eager", *flags)
    compiled = run(shaped, tmp_path / "compiled", *flags, "--compile")
    for name in eager["ema"]:
        torch.testing.assert_close(compiled["ema"][name], eager["ema"][name], rtol=1e-3, atol=1e-4)


# ---- what is refused ----

WRONG = [
    ({"aspect_buckets": True, "pack": 64}, "`aspect_buckets` and `pack` both say"),
    ({"pack": 64, "block": "in_context"}, "`block` in_context does not take packed images; choose "
     "from adaln_zero, adaln, adaln_single, or pass `aspect_buckets=True`"),
    ({"pack": 64, "block": "cross_attention"}, "`block` cross_attention does not take packed"),
    ({"pack": 0}, "`pack` is 0; it must be at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message"), WRONG)
def test_what_does_not_go_together(more, message):
    with pytest.raises(ValueError) as refused:
        TrainOptions(data_path="x", **more)
    assert message in str(refused.value)
    TrainOptions(data_path="x", aspect_buckets=True, block="in_context")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pack", "15"], r"--pack 15 is too short for an image of (16x16|20x12), which has 1"),
        (["--aspect-buckets", "--global-batch-size", "12"], "no bucket has the 12 images"),
        (["--aspect-buckets", "--image-size", "18"], "image size 18 is not a multiple of 4"),
        (["--aspect-buckets", "--extrapolation", "crop"], "a grid of 5 x 3|a grid of 3 x 5"),
    ],
)
def test_what_does_not_fit_the_images_is_refused_before_the_work(
    shaped, tmp_path, capsys, flags, message
):
    with pytest.raises(SystemExit):
        run(shaped, tmp_path / "results", *SHAPED, *flags)
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "results").exists()


def test_a_run_in_buckets_is_another_run(shaped, tmp_path):
    for flags in ([], ["--aspect-buckets"], ["--pack", "16"]):
        run(shaped, tmp_path, *SHAPED, "--max-steps", "1", "--resume", "auto", *flags)
    assert len(list(tmp_path.iterdir())) == 3
