"""How good a network's samples are while it trains: the same scores as evaluate.py, from the moving average's weights."""

from typing import NamedTuple

from features import Extractor, Team, deal, summarize
from image_sets import open_side, summarize_reference
from metrics import Summary, score
from sampling import Sampler, random_labels

STEPS, SAMPLER, GUIDANCE = 50, "ddim", 1.0  # quick, and in published scores near 250 DDPM steps


class Stopped(Exception):
    """The evaluation was broken off, in every process."""


class Judge(NamedTuple):
    """What samples are scored by, and how many; the reference is None but in the first process."""

    extractor: Extractor
    reference: Summary | None
    count: int
    batch_size: int
    team: Team


def load_judge(reference, extractor, count, batch_size, device, team, num_workers):
    """The Judge for a reference as evaluate.py takes it. Raises ValueError if it cannot be had."""
    side = open_side(reference, "--eval-reference", share=slice(team.rank, None, team.world_size))
    side.check_features(extractor)
    summary, _ = summarize_reference(side, extractor, device, batch_size, team, num_workers)
    return Judge(extractor, summary, count, batch_size, team)


def score_samples(judge, network, space, seed, device, stopped):
    """The scores, a dict as of metrics.score, of samples from a network; None but in the first process.

    Image i depends on (seed, i) alone and nothing is drawn from torch's generators. stopped(), the same in every process, is
    asked before each batch. Raises Stopped where it said so, ValueError for images without finite features.
    """
    sampler = Sampler(network, space, None, STEPS, SAMPLER, cfg_scale=GUIDANCE)

    def batches():
        for indices in deal(judge.count, judge.batch_size, judge.team):
            if stopped():
                raise Stopped
            labels = random_labels(seed, indices, max(1, network.num_classes)).to(device)
            images = sampler.decode(sampler.numbered_latents(seed, indices, labels))
            yield images.permute(0, 3, 1, 2), None  # (n, 3, H, W)

    samples, _ = summarize(judge.extractor, batches(), judge.count, with_logits=True, team=judge.team)
    return None if samples is None else score(samples, judge.reference)
