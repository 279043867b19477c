"""Losses of clips of which some frames are given: against loops written by hand, and what a step
draws.
"""

import pytest
import torch

from conditions.given import draw_masks
from conftest import fill_randomly, generator, randn
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from training.given_frames import given_losses
from training.state import Recipe, new_state
from training.step import draw, train_step
from variants.video import VideoDiT

N, C, F, SIDE, CLASSES = 4, 3, 4, 4, 3
PROCESSES = {
    "diffusion": (GaussianProcess(), [0, 400, 999, 77]),
    "flow": (FlowProcess(path="gvp", cosine_loss=True), [0.1, 0.9, 0.5, 0.33]),
    "noise": (FlowProcess(prediction="noise", loss_weight="velocity"), [0.1, 0.9, 0.5, 0.33]),
}
NONE = torch.zeros(4, 0, dtype=torch.bool)
MASK = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.bool)


def small_video(**changes):
    """A small network of clips of random weights."""
    sizes = dict(
        input_size=SIDE, frames=F, patch_size=2, in_channels=C, hidden_size=16, depth=2,
        num_heads=2, num_classes=CLASSES, learn_sigma=False,
    )  # fmt: skip
    return fill_randomly(VideoDiT(**{**sizes, **changes}), std=0.3)


def loss_of_frame(process, network, x, t, noise, mask, frame, y):
    """The parts of one frame's loss: of the process asked for this frame alone, by a network that
    puts it among the noisy and the given others.
    """
    noisy = []

    def kept(x_t, _):
        noisy.append(x_t)
        return torch.zeros(1, C * (1 + process_learns(process)), SIDE, SIDE, dtype=x.dtype)

    for one in range(F):
        process.losses(kept, x[None, :, one], t[None], noise[None, :, one])
    clip = torch.stack([x[:, f] if mask[f] else noisy[f][0] for f in range(F)], dim=1)
    times = torch.tensor([process.clean if mask[f] else t.item() for f in range(F)], dtype=t.dtype)
    out = network(clip[None], times[None], y[None])[0]
    return process.losses(lambda *_: out[None, :, frame], x[None, :, frame], t[None],
                          noise[None, :, frame])  # fmt: skip


def process_learns(process):
    return getattr(process, "learn_sigma", False)


@pytest.mark.parametrize("name", PROCESSES)
def test_losses_are_those_of_each_frame_that_is_left(name):
    process, times = PROCESSES[name]
    network = small_video(learn_sigma=process_learns(process)).double().eval()
    x, noise = (randn(N, C, F, SIDE, SIDE, seed=seed) for seed in (1, 2))
    t, y = torch.tensor(times), torch.arange(N) % CLASSES
    found = given_losses(process, lambda x, t: network(x, t, y), x, t, noise, MASK)
    assert set(found) == set(process.parts)
    for i in range(N):
        alone = [
            loss_of_frame(process, network, x[i], t[i], noise[i], MASK[i], f, y[i])
            for f in range(F)
            if not MASK[i, f]
        ]
        for part, values in found.items():
            wanted = sum(one[part] for one in alone) / len(alone)
            torch.testing.assert_close(values[i : i + 1], wanted, rtol=1e-9, atol=1e-10)


def test_a_flow_written_by_hand():
    """The first clip alone, its first frame given: x_t, the target and the mean without a process.
    """
    network = small_video().double().eval()
    x, noise = (randn(1, C, F, SIDE, SIDE, seed=seed) for seed in (1, 2))
    t, y, mask = torch.tensor([0.3], dtype=torch.float64), torch.tensor([1]), MASK[:1]
    found = given_losses(FlowProcess(), lambda x, t: network(x, t, y), x, t, noise, mask)
    clip = 0.3 * x + 0.7 * noise
    clip[:, :, 0] = x[:, :, 0]
    out = network(clip, torch.tensor([[1, 0.3, 0.3, 0.3]], dtype=torch.float64), y)
    error = (out - (x - noise))[:, :, 1:]
    torch.testing.assert_close(found["loss"], (error**2).mean()[None], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", PROCESSES)
def test_without_given_frames_losses_are_those_of_clips(name):
    process, times = PROCESSES[name]
    network = small_video(learn_sigma=process_learns(process)).double().eval()
    x, noise = (randn(N, C, F, SIDE, SIDE, seed=seed) for seed in (1, 2))
    t, y = torch.tensor(times), torch.arange(N) % CLASSES

    def asked(x, t):
        return network(x, t, y)

    found = given_losses(process, asked, x, t, noise, torch.zeros(N, F, dtype=torch.bool))
    for part, values in process.losses(asked, x, t, noise).items():
        torch.testing.assert_close(found[part], values, rtol=1e-9, atol=1e-10)


def test_what_is_said_of_given_frames_teaches_nothing():
    network = small_video().double()
    x, noise = (randn(N, C, F, SIDE, SIDE, seed=seed) for seed in (1, 2))
    seen = []

    def asked(x, t):
        out = network(x, t, torch.arange(N) % CLASSES)
        out.retain_grad()
        seen.append(out)
        return out

    t = torch.full((N,), 0.5)
    given_losses(FlowProcess(), asked, x, t, noise, MASK)["loss"].sum().backward()
    gradient = seen[0].grad.abs().amax(dim=(1, 3, 4))  # (N, F)
    assert torch.equal(gradient == 0, MASK)


# ---- a step ----


@pytest.mark.parametrize("patch", [1, 2])
def test_masks_are_drawn_after_all_else(patch):
    latent, process = (C, F, SIDE, SIDE), FlowProcess()
    plain = draw(5, 7, 16, latent, 0.5, process, "cpu")
    assert plain.given.shape == (16, 0)
    drawn = draw(
        5, 7, 16, latent, 0.5, process, "cpu", given_frames=0.75, patch_frames=patch
    )
    for name in ("t", "drop", "vae_noise", "noise"):
        assert torch.equal(getattr(plain, name), getattr(drawn, name))
    assert drawn.given.shape == (16, F) and 0 < drawn.given.sum() < drawn.given.numel()
    tubes = drawn.given.unflatten(1, (-1, patch))
    assert torch.equal(tubes.all(dim=2), tubes.any(dim=2)) and not drawn.given.all(dim=1).any()
    halves = [
        draw(5, 7, 16, latent, 0.5, process, "cpu", rank, 2, (), 0.75, patch).given
        for rank in (0, 1)
    ]
    assert torch.equal(torch.cat(halves), drawn.given)
    other = draw(5, 8, 16, latent, 0.5, process, "cpu", given_frames=0.75, patch_frames=patch)
    assert not torch.equal(other.given, drawn.given)


def test_a_share_of_the_clips_has_given_frames():
    mask = draw_masks(4000, F, 0.4, generator())
    assert mask.any(dim=1).float().mean().item() == pytest.approx(0.4, abs=0.03)


def state_of(**recipe):
    return new_state(
        small_video(), Recipe(lr=1e-3, ema_decay=(0.5,), **recipe), process=FlowProcess()
    )


def weights(state):
    return torch.cat([p.detach().flatten() for p in state.network.parameters()])


def test_a_step_in_parts_is_the_step():
    latents, labels = randn(4, C, F, SIDE, SIDE, dtype=torch.float32), torch.arange(4) % CLASSES
    draws = draw(0, 0, 4, (C, F, SIDE, SIDE), 0.5, FlowProcess(), "cpu", given_frames=1.0)
    assert draws.given.any(dim=1).all()
    whole, parts, plain = state_of(), state_of(grad_accum=4), state_of()
    report = train_step(whole, latents, labels, draws)
    assert train_step(parts, latents, labels, draws) == pytest.approx(report, rel=2e-5)
    other = train_step(plain, latents, labels, draws._replace(given=NONE))
    assert other["loss"] != pytest.approx(report["loss"], rel=1e-3)


def test_single_images_are_learned_without_given_frames():
    images, labels = randn(4, C, 1, SIDE, SIDE, dtype=torch.float32), torch.arange(4) % CLASSES
    draws = draw(0, 0, 4, (C, F, SIDE, SIDE), 0.5, FlowProcess(), "cpu", given_frames=1.0)
    first, second = state_of(), state_of()
    report = train_step(first, images, labels, draws)
    assert report == train_step(second, images, labels, draws._replace(given=NONE))
    assert torch.equal(weights(first), weights(second)) and report["loss"] > 0
