"""Which steps are trained on: frequencies, weights that keep the mean loss unbiased, history,
several processes.
"""
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from diffusion import create_diffusion
from diffusion.timestep_sampler import (
    LossSecondMomentResampler, UniformSampler, create_named_schedule_sampler,
)  # fmt: skip


def sampler(steps=5, **options):
    return LossSecondMomentResampler(create_diffusion(steps), **options)


def warmed(losses_per_step, **options):
    """A sampler that has seen these losses, a list for each step."""
    s = sampler(len(losses_per_step), history_per_term=len(losses_per_step[0]), **options)
    for t, losses in enumerate(losses_per_step):
        s.update_with_all_losses([t] * len(losses), losses)
    return s


@pytest.mark.parametrize(
    "name, kind", [("uniform", UniformSampler), ("loss-second-moment", LossSecondMomentResampler)]
)
def test_samplers_have_names(name, kind):
    s = create_named_schedule_sampler(name, create_diffusion("7"))
    assert type(s) is kind and s.num_timesteps == 7


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'loss'.*uniform.*loss-second-moment"):
        create_named_schedule_sampler("loss", create_diffusion("7"))


@pytest.mark.parametrize("name", ["uniform", "loss-second-moment"])
def test_uniform_draws(name):
    torch.manual_seed(0)
    steps, weights = create_named_schedule_sampler(name, create_diffusion("8")).sample(
        16_000, "cpu"
    )
    assert (
        steps.dtype == torch.int64
        and weights.dtype == torch.float32
        and steps.shape == weights.shape == (16_000,)
    )
    assert torch.equal(weights, torch.ones(16_000))
    counts = torch.bincount(steps, minlength=8)
    assert len(counts) == 8 and (counts - 2000).abs().max() < 5 * 2000**0.5


@pytest.mark.parametrize("name", ["uniform", "loss-second-moment"])
def test_the_seed_or_the_generator_decides(name):
    s = create_named_schedule_sampler(name, create_diffusion("1000"))

    def draw(seed, generator=None):
        torch.manual_seed(seed)
        return s.sample(64, "cpu", generator)[0]

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    one, same = (draw(seed, torch.Generator().manual_seed(3)) for seed in (1, 2))
    assert torch.equal(one, same) and not torch.equal(one, draw(1))
    untouched = torch.Generator().manual_seed(2).get_state()
    draw(2, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), untouched)


def test_samples_land_on_the_device():
    steps, weights = UniformSampler(create_diffusion("8")).sample(4, "meta")
    assert steps.device.type == weights.device.type == "meta"


def test_uniform_until_every_step_has_its_history():
    s = sampler(3, history_per_term=2)
    s.update_with_all_losses([0, 0, 1, 1, 2], [9.0, 9.0, 1.0, 1.0, 4.0])
    assert s.weights().tolist() == [1, 1, 1]
    s.update_with_all_losses([2], [4.0])
    assert len(set(s.weights().tolist())) == 3


@pytest.mark.parametrize("uniform_prob", [0.0, 0.001, 0.5])
def test_frequencies_follow_the_root_mean_square_loss(uniform_prob):
    losses = [[1.0, 7.0], [2.0, 2.0], [0.0, 1.0], [3.0, 4.0]]
    s = warmed(losses, uniform_prob=uniform_prob)
    root_mean_square = torch.tensor(
        [((a * a + b * b) / 2) ** 0.5 for a, b in losses], dtype=torch.float64
    )
    p = (1 - uniform_prob) * root_mean_square / root_mean_square.sum() + uniform_prob / 4
    weights = s.weights()
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights / weights.sum(), p, rtol=0, atol=1e-14)


def test_defaults():
    s = sampler(2)
    for t, losses in enumerate(([1.0] * 10, [3.0] * 10)):
        s.update_with_all_losses([t] * 9, losses[:9])
    assert s.weights().tolist() == [1, 1]
    s.update_with_all_losses([0, 1], [1.0, 3.0])
    p = s.weights() / s.weights().sum()
    assert p.tolist() == pytest.approx([0.999 * 0.25 + 0.0005, 0.999 * 0.75 + 0.0005], abs=1e-14)


def test_weights_keep_a_mean_unbiased():
    torch.manual_seed(0)
    s = warmed([[1.0], [2.0], [10.0], [4.0]], uniform_prob=0.1)
    steps, weights = s.sample(40_000, "cpu")
    p = s.weights() / s.weights().sum()
    weight_of = torch.zeros(4).index_copy(0, steps, weights)
    assert torch.equal(weight_of[steps], weights) and (weight_of > 0).all()
    # p·w = 1/T for each step, so that the expectation of w·f is the mean of f over all steps
    torch.testing.assert_close(p * weight_of, torch.full((4,), 0.25).double(), rtol=1e-6, atol=0)
    frequency = torch.bincount(steps, minlength=4) / 40_000
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / 40_000).sqrt()).all()


def test_old_losses_make_room():
    s = sampler(2, history_per_term=3, uniform_prob=0.0)
    s.update_with_all_losses([0] * 5 + [1] * 3, [100.0, 50.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0])
    p = s.weights() / s.weights().sum()
    assert (p[0] / p[1]).item() == pytest.approx(3**0.5)  # rms of 1, 2, 2 against 1, 1, 1
    s.update_with_all_losses([0], [10.0])  # and the 1 goes next
    p = s.weights() / s.weights().sum()
    assert (p[0] / p[1]).item() == pytest.approx(((4 + 4 + 100) / 3) ** 0.5)


def test_losses_of_zero_leave_the_draws_uniform():
    weights = warmed([[0.0], [0.0], [0.0]]).weights()
    assert (weights / weights.sum()).tolist() == pytest.approx([1 / 3] * 3, abs=1e-14)


def test_local_losses_are_tensors_and_count_without_other_processes():
    s, expected = sampler(3, history_per_term=1), warmed([[1.0], [2.0], [4.0]])
    s.update_with_local_losses(
        torch.tensor([2, 0, 1]), torch.tensor([4.0, 1.0, 2.0], requires_grad=True)
    )
    assert torch.equal(s.weights(), expected.weights())
    with pytest.raises(ValueError):
        s.update_with_all_losses([0, 1], [1.0])


def update_in_process(rank, folder, batches):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=len(batches)
    )
    s = sampler(4, history_per_term=2)
    for ts, losses in batches[rank]:
        s.update_with_local_losses(torch.tensor(ts, dtype=torch.int64), torch.tensor(losses))
    torch.save(
        {"losses": s.losses, "counts": s.counts, "weights": s.weights()}, f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


def test_all_processes_end_with_the_same_history(tmp_path):
    batches = [  # for each rank its batches, of sizes that differ, one of them empty
        [([0, 1, 2], [1.0, 2.0, 3.0]), ([3], [4.0]), ([], [])],
        [([0], [5.0]), ([1, 2, 3, 0], [6.0, 7.0, 8.0, 9.0]), ([3, 3], [0.5, 0.25])],
    ]
    mp.spawn(update_in_process, (str(tmp_path), batches), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = sampler(4, history_per_term=2)
    for together in zip(*batches):
        for ts, losses in together:
            alone.update_with_all_losses(ts, losses)
    assert alone.counts.tolist() == [3, 2, 2, 4]
    for key, expected in (
        ("losses", alone.losses), ("counts", alone.counts), ("weights", alone.weights()),
    ):  # fmt: skip
        assert torch.equal(first[key], second[key]) and torch.equal(first[key], expected)


@pytest.mark.parametrize("loss", [float("inf"), float("nan")])
def test_a_loss_that_is_not_finite_is_left_out(loss):
    sampler = LossSecondMomentResampler(create_diffusion("5"), history_per_term=2)
    sampler.update_with_all_losses(list(range(5)) * 2, [1.0, 1.0, 1.0, 1.0, 4.0] * 2)
    before = sampler.weights()
    sampler.update_with_all_losses([2, 3], [loss, loss])
    assert torch.equal(sampler.weights(), before) and before[4] > 3.9 * before[0]
