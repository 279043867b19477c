"""Frames of a clip that are given: which ones training draws, and what a network is asked then."""

import pytest
import torch

from conditions.given import Given, draw_masks
from conftest import generator, randn

MANY = 30_000


def drawn(frames, share=1.0, count=MANY, seed=0):
    """Masks (N, F)."""
    return draw_masks(count, frames, share, generator(seed))


def close_to(shares, expected):
    """Whether shares of MANY draws are as expected, up to five standard deviations."""
    return abs(shares - expected) < 5 * (expected * (1 - expected) / MANY) ** 0.5 + 1e-9


@pytest.mark.parametrize("frames", [1, 2, 3, 16])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_at_least_one_frame_is_left(frames, share):
    mask = drawn(frames, share)
    assert mask.shape == (MANY, frames) and mask.dtype == torch.bool
    assert not mask.all(dim=1).any()
    assert mask.any() == (share > 0 and frames > 1)


@pytest.mark.parametrize("share", [0.25, 0.8, 1.0])
def test_so_many_clips_have_given_frames(share):
    """But for those of which any may be given, and none is."""
    frames = 8
    given = drawn(frames, share).any(dim=1).double().mean().item()
    assert close_to(given, share * (1 - 2**-frames / 3))


def test_each_kind_comes_as_often():
    """Of 8 frames chance makes the first ones, or the ends, in 1 of 256 clips each."""
    frames, mask = 8, drawn(8)
    any_has_it = 2**-frames / 3
    for length in range(1, frames):
        first = torch.arange(frames) < length
        share = (mask == first).all(dim=1).double().mean().item()
        assert close_to(share, 1 / 3 / (frames - 1) + any_has_it), length
    ends = torch.tensor([1, 0, 0, 0, 0, 0, 0, 1]).bool()
    assert close_to((mask == ends).all(dim=1).double().mean().item(), 1 / 3 + any_has_it)
    # Whatever is in between is given by any alone
    others = mask[:, 3] & ~mask[:, 2]
    assert close_to(others.double().mean().item(), 1 / 3 / 4)


def test_of_two_frames_one_is_given_the_first_mostly():
    """The first ones: the first. Both ends: one of them, left to chance. Any: a quarter each is
    none, one or the other; both are one of them.
    """
    mask = drawn(2)
    first, last = (mask[:, i].double().mean().item() for i in (0, 1))
    assert close_to(first, 1 / 3 + 1 / 6 + (1 / 4 + 1 / 8) / 3)
    assert close_to(last, 1 / 6 + (1 / 4 + 1 / 8) / 3)


def test_masks_are_the_generators_alone():
    same, again, other = drawn(6, 0.5), drawn(6, 0.5), drawn(6, 0.5, seed=1)
    assert torch.equal(same, again) and not torch.equal(same, other)
    source = generator()
    both = [draw_masks(50, 6, 0.5, source) for _ in range(2)]
    assert not torch.equal(*both)


def test_more_are_given_where_the_share_is_larger():
    """By the same draws: who compares shares compares the same clips."""
    few, many = drawn(6, 0.2, 1000), drawn(6, 0.7, 1000)
    assert torch.equal(few & many, few) and few.sum() < many.sum()


def example():
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 1]]).bool()
    return Given(randn(3, 2, 3, 4, 4), mask, 0.0), randn(3, 2, 3, 4, 4, seed=1)


def test_given_frames_are_held_and_the_others_let_go():
    given, x = example()
    held = given.held(x.float())
    assert held.dtype == torch.float32
    for n in range(3):
        for f in range(3):
            source = given.clips if given.mask[n, f] else x
            assert torch.equal(held[n, :, f], source[n, :, f].float())


@pytest.mark.parametrize("clean", [0.0, 1.0])
def test_given_frames_have_the_time_of_clean_data(clean):
    given = example()[0]._replace(clean=clean)
    t = torch.tensor([0.2, 0.5, 0.9])
    expected = torch.tensor([[clean, 0.2, 0.2], [0.5, 0.5, 0.5], [clean, 0.9, clean]])
    assert torch.equal(given.times(t), expected)
    own = torch.arange(1.0, 10.0).view(3, 3)
    mixed = torch.tensor([[clean, 2.0, 3.0], [4.0, 5.0, 6.0], [clean, 8.0, clean]])
    assert torch.equal(given.times(own), mixed)
    steps = given.times(torch.tensor([200, 500, 900]))
    assert steps.dtype == torch.int64 and steps[0].tolist() == [clean, 200, 200]


def test_a_network_is_asked_with_given_frames_and_says_0_of_them():
    given, x = example()
    asked = []

    def network(x, t, y, scale=1.0):
        asked.append((x, t, y))
        return torch.cat([x + 3, x - 3], dim=1)

    out = given.asked(network)(x, torch.tensor([0.2, 0.5, 0.9]), "a label")
    ((seen, t, y),) = asked
    assert torch.equal(seen, given.held(x)) and y == "a label"
    assert torch.equal(t, given.times(torch.tensor([0.2, 0.5, 0.9])))
    there = given.mask[:, None, :, None, None].expand_as(out)
    assert not out[there].any()
    assert torch.equal(out[~there], torch.cat([x + 3, x - 3], dim=1)[~there])
