"""CLIP score: how near images are to their captions, in the eyes of a CLIP.

Of one pair it is 100·max(cosine, 0) of CLIP's two vectors. Hessel et al. 2021 (CLIPScore, section
3) have 2.5·max(cosine, 0), a 40th of it; most reports since, and torchmetrics, have the 100.
"""

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
import torch
from torch import Tensor
import torch.nn.functional as F

from conditions.pretrained import (
    PREPROCESSOR, files_hash, library, load_network, load_words, local_folder, read_config,
    refusal, tokens_of,
)  # fmt: skip
from evaluation.features import Batch
from evaluation.image_sets import hash_of, read_batches
from evaluation.inputs import EvaluationInput, find_sizes, open_input
from evaluation.options import EvaluationOptions
from evaluation.report import check_samples, input_facts
from evaluation.summaries import deal
from runtime.devices import tf32
from runtime.json_files import read_bounded, read_json
from runtime.team import Team

SCALE, PAPERS = 100.0, 2.5  # of the cosine: here, and in the paper
CAPTIONS = "captions.txt"  # where samples of prompts have theirs, as sample_ddp.py writes it
# Of the images that OpenAI's CLIPs were trained on, where a folder does not say
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
ARGUMENT = "clip"


class Captions(NamedTuple):
    """A caption for each image in order, and the file that they came from."""

    path: Path
    lines: list[str]
    sha256: str


def captions_of(samples: Path | str, given: Path | str | None = None) -> Captions:
    """The captions of samples: the lines of the file that is given, else of captions.txt in their
    folder, or of NAME.captions.txt beside NAME.npz.

    Raises ValueError if there are none.
    """
    samples = Path(samples)
    path = samples / CAPTIONS if samples.is_dir() else samples.with_suffix(f".{CAPTIONS}")
    path = path if given is None else Path(given)
    try:
        content = read_bounded(path)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"`captions` {path} cannot be read ({reason}); give a file in UTF-8 with a caption a "
            "line, one for each image in order"
        ) from None
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    return Captions(path, lines, hashlib.sha256(content).hexdigest())


class Clip:
    """A CLIP of transformers: images and captions to cosines. `sha256` is of its files.

    Raises ValueError if it cannot be loaded.
    """

    def __init__(self, name: str, device: torch.device | str) -> None:
        folder = local_folder(name, ARGUMENT)
        kind = read_config(folder, ARGUMENT).get("model_type")
        if kind != "clip":
            raise refusal(
                ARGUMENT, name,
                f"it is of the kind {str(kind)[:60]}; wanted is a CLIP of images and text (clip)",
            )  # fmt: skip
        self.network = load_network("CLIPModel", folder, ARGUMENT, device, torch.float32)
        self.words = load_words(folder, self.network.text_model, ARGUMENT)
        self.length = self.network.config.text_config.max_position_embeddings
        self.side = self.network.config.vision_config.image_size
        self.mean, self.std = (part.to(device) for part in channels(folder))  # (3, 1, 1) each
        self.sha256 = files_hash(folder, ARGUMENT)

    def seen(self, images: Tensor) -> Tensor:
        """Images uint8 (n, 3, H, W) as the network takes them, (n, 3, S, S): the shorter side
        brought to S by Pillow's bicubic filter, the middle cut out, and normalised.
        """
        height, width = images.shape[-2:]
        short = min(height, width)
        size = self.side * height // short, self.side * width // short
        x = images.float()
        for step in ((height, size[1]), size):  # as Pillow does, whole numbers after each
            if step != x.shape[-2:]:
                x = F.interpolate(x, step, mode="bicubic", antialias=True).round().clamp(0, 255)
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        x = x[..., top : top + self.side, left : left + self.side]  # (n, 3, S, S)
        return (x / 255 - self.mean) / self.std

    @torch.no_grad()
    def cosines(self, images: Batch, captions: list[str]) -> Tensor:
        """Cosines (n,) between images uint8 (n, 3, H, W), or n images (3, H, W) of sizes of their
        own, and their captions.
        """
        parts = [part[None] for part in images] if isinstance(images, list) else [images]
        pixels = torch.cat([self.seen(part) for part in parts])
        numbers, mask = tokens_of(self.words, captions, self.length, "longest")
        with tf32(False):
            found = self.network(
                input_ids=numbers.to(pixels.device), attention_mask=mask.to(pixels.device),
                pixel_values=pixels,
            )  # fmt: skip
        return F.cosine_similarity(found.image_embeds, found.text_embeds)

    def cut(self, captions: list[str]) -> int:
        """How many captions are longer than what is read."""
        with library():  # which warns of long ones
            made = self.words(captions, truncation=False)["input_ids"]
        return sum(len(numbers) > self.length for numbers in made)


def channels(folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3, 1, 1) of the images that a CLIP was trained on.

    Raises ValueError for nonsense.
    """
    path = folder / PREPROCESSOR
    said: dict[str, Any] = read_json(path) if path.is_file() else {}
    found = [said.get(name, other) for name, other in (("image_mean", MEAN), ("image_std", STD))]
    for numbers in found:
        kinds = [type(number) in (int, float) for number in numbers] if numbers else []
        if len(kinds) != 3 or not all(kinds) or (numbers is found[1] and min(numbers) <= 0):
            raise refusal(ARGUMENT, folder, f"{PREPROCESSOR} has no image_mean and image_std")
    mean, std = (torch.tensor(numbers, dtype=torch.float32).view(3, 1, 1) for numbers in found)
    return mean, std


def score_by_clip(
    options: EvaluationOptions, name: str, captions: Captions, accelerator: Accelerator
) -> dict | None:
    """The report on how near samples are to their captions, to the CLIP of this name: a dict for
    JSON. The processes share the work, and all but the first return None.

    Raises ValueError for images or captions that do not fit.
    """
    team = Team(accelerator.process_index, accelerator.num_processes, accelerator.gather)
    share = slice(team.rank, None, team.world_size)
    samples = open_input(options.samples or "", "samples", share=share)
    notes = check_samples(samples)
    assert samples.images is not None  # check_samples looks at that
    if len(captions.lines) != len(samples.images):
        raise ValueError(
            f"`captions` {captions.path} has {len(captions.lines):,} lines for "
            f"{len(samples.images):,} images; give a line for each, in their order"
        )
    with accelerator.local_main_process_first():
        clip = Clip(name, accelerator.device)
    find_sizes(samples.images, accelerator.device, team)
    cosines, digests = gathered(clip, samples, captions.lines, options, accelerator.device, team)
    if team.rank:
        return None
    if cut := clip.cut(captions.lines):
        notes.append(
            f"{cut:,} of {len(captions.lines):,} captions are longer than the {clip.length} tokens "
            "that CLIP reads; they are cut"
        )
    return report_on(samples, captions, clip, name, cosines, digests, notes)


def gathered(
    clip: Clip, samples: EvaluationInput, lines: list[str], options: EvaluationOptions,
    device: torch.device, team: Team,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(cosines (N,), digests of pixels uint8 (N, 32)) of all images, in every process."""
    images, found = samples.images, list[list[Tensor]]()
    assert images is not None
    batches = read_batches(images, options.batch_size, device, team, options.num_workers)
    for indices, (batch, digests) in zip(deal(len(images), options.batch_size, team), batches):
        cosines = clip.cosines(batch, [lines[i] for i in indices])
        found.append([part.cpu() for part in team.gather([cosines, digests])])
    cosines, digests = (torch.cat(parts)[: len(images)] for parts in zip(*found))
    return cosines, digests


def report_on(
    samples: EvaluationInput, captions: Captions, clip: Clip, name: str, cosines: Tensor,
    digests: Tensor, notes: list[str],
) -> dict:  # fmt: skip
    """What is to be told of cosines (N,) of images and captions, a dict for JSON.

    The standard error is None of one image. Raises ValueError for cosines that are not finite.
    """
    scores = SCALE * cosines.double().clamp(min=0)
    if not scores.isfinite().all():
        raise refusal(ARGUMENT, name, "its vectors of some image or caption are not finite")
    error = float(scores.std()) / math.sqrt(len(scores)) if len(scores) > 1 else None
    return {
        "scores": {"clip_score": float(scores.mean()), "standard_error": error}, "notes": notes,
        "samples": input_facts(samples, hash_of(digests)),
        "captions": {"path": str(captions.path), "sha256_of_file": captions.sha256,
                     "different": len(set(captions.lines))},
        "clip": {"name": name, "sha256": clip.sha256},
        "settings": {"score": f"the mean of {SCALE:g} max(cosine, 0)",
                     "in_the_paper": f"{PAPERS:g} max(cosine, 0), {SCALE / PAPERS:g} times less",
                     "device": str(clip.mean.device.type)},
    }  # fmt: skip
