"""How good a network's samples are while it trains: the same scores as evaluate.py.

The samples are drawn with the moving average's weights.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoints.networks import Network
from conditions.condition import Values, condition_of
from conditions.labels import random_labels
from evaluation.features import Extractor
from evaluation.metrics import Summary, score
from evaluation.remarks import remarks
from evaluation.inputs import EvaluationInput, check_mixed, open_input, summarize_reference
from evaluation.summaries import deal, summarize
from layers.text import Text
from processes.process import Process
from runtime.image_size import ImageSize, sides
from runtime.team import Team
from sampling.sampler import Sampler
from vae import Space, to_uint8

GUIDANCE = 1.0  # of what is scored


class Stopped(Exception):
    """The evaluation was broken off, in every process."""


class Judge(NamedTuple):
    """What samples are scored by, and how many.

    The reference's Summary is None but in the first process.
    """

    extractor: Extractor
    side: EvaluationInput
    reference: Summary | None
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody calls
    batch_size: int
    team: Team


def load_judge(
    reference: Path | str, extractor: Extractor, image_size: ImageSize, count: int, batch_size: int,
    device: torch.device, team: Team, num_workers: int,
) -> Judge:  # fmt: skip
    """The Judge, for samples of image_size, by a reference as evaluate.py takes it.

    Raises ValueError if it does not fit.
    """
    side = open_input(reference, "eval_reference", share=slice(team.rank, None, team.world_size))
    check_mixed(side, extractor, device, team)
    height, width = sides(image_size)
    side.check_features(extractor, (width, height), device)
    summary, _ = summarize_reference(side, extractor, device, batch_size, team, num_workers)
    return Judge(extractor, side, summary, count, batch_size, team)


class Prompts(NamedTuple):
    """What samples of a network that reads captions are asked to be while it trains.

    drawn(indices) gives the captions of the samples with these indices, on the CPU; `null`, of one
    caption, is what they are guided against.
    """

    drawn: Callable[[Sequence[int]], Text]
    null: Text


def sampler_of(
    network: Network, process: Process, space: Space, cfg_scale: float, prompts: Prompts | None
) -> Sampler:
    """A Sampler for looking at a network while it trains: quick, and guided so much."""
    solver, steps = process.quick
    null = prompts.null if prompts else None
    return Sampler(
        network, space, None, steps, solver, cfg_scale=cfg_scale, process=process, null=null
    )


def score_samples(
    judge: Judge, network: Network, process: Process, space: Space, seed: int, device: torch.device,
    any_process: Callable[..., bool], prompts: Prompts | None = None,
) -> tuple[dict[str, float | None] | None, list[str] | None]:  # fmt: skip
    """(the scores, as of metrics.score, of samples from a network that learns `process`; remarks on
    them) in the first process of the job; else (None, None). Labels are drawn at random, or else
    captions as `prompts` has them.

    Image i depends on (seed, i) alone and nothing is drawn from torch's generators.
    any_process(flag, if None: whether to stop) says in each process whether it holds in one of
    them; it is asked before each batch, and once more before the score is made up. Raises Stopped
    in every process if it is to stop; ValueError in every process for images, and in the first for
    features, that are not finite.
    """
    sampler = sampler_of(network, process, space, GUIDANCE, prompts)

    def values_of(indices):
        if prompts is not None:
            return prompts.drawn(indices).to(device)
        return random_labels(seed, indices, max(1, network.num_classes)).to(device)

    def batches():
        for indices in deal(judge.count, judge.batch_size, judge.team):
            if any_process():
                raise Stopped
            latents = sampler.numbered_latents(seed, indices, values_of(indices))
            images = space.decode(latents)  # (n, 3, H, W)
            if any_process(not images.isfinite().all()):
                raise ValueError("the images that the network draws are not finite")
            yield to_uint8(images).permute(0, 3, 1, 2), None

    samples = failure = None
    try:
        samples, _ = summarize(
            judge.extractor, batches(), judge.count, with_logits=True, team=judge.team
        )
    except ValueError as error:
        failure = error
    # Which every process must come to, also the first alone with features that are not finite
    if any_process():
        raise Stopped
    if failure:
        raise failure
    if samples is None or judge.reference is None:  # not the first process
        return None, None
    scores, side = score(samples, judge.reference), judge.side
    height, width = space.shape.image(network.latent_shape)
    made, summaries = (judge.count, (width, height)), (samples, judge.reference)
    return scores, remarks(scores, made, side, summaries, judge.extractor.name)


PREVIEW_IMAGES, PREVIEW_GUIDANCE = 16, 4.0  # while training


def preview(
    network: Network, process: Process, space: Space, seed: int, device: torch.device | str,
    prompts: Prompts | None = None,
) -> Tensor:  # fmt: skip
    """PREVIEW_IMAGES images uint8 (N, H, W, 3), or clips (N, F, H, W, 3), of evenly spread classes,
    or of the first captions of `prompts`, on the device.

    The same seed gives the same noise.
    """
    guided = prompts is not None or condition_of(network).has_null
    scale, indices = PREVIEW_GUIDANCE if guided else 1.0, range(PREVIEW_IMAGES)
    sampler = sampler_of(network, process, space, scale, prompts)
    values: Values = torch.arange(PREVIEW_IMAGES) * network.num_classes // PREVIEW_IMAGES
    if prompts is not None:
        values = prompts.drawn(indices)
    return sampler.decode(sampler.numbered_latents(seed, indices, values.to(device)))
