"""What a visitor of the page chooses or writes, and the pictures that come of it."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
import reprlib
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from PIL import Image
import torch

from checkpoints.networks import Network
from conditions.labels import readable
from sampling.pictures import (
    FRAME_RATE, GIF_MOMENTS, STRIP_MOMENTS, captions, evenly, legible, picture, played, save,
    save_moving, strip,
)  # fmt: skip
from processes.noise import ImageNoise
from sampling.sampler import Sampler

MOST_GUIDANCE, MOST_IMAGES = 10.0, 16
STRIP_ROWS = 4  # of sixteen images at 512 pixels a strip would have 34 million pixels
SEEDS = 2**63
LONGEST_PROMPT = 1000  # characters
LONGEST_PROMPTS = MOST_IMAGES * (LONGEST_PROMPT + 1)  # in as many lines as there are images
WHOLE = "whole number"
CLASSES, PROMPTS = "class_labels", "prompt"  # under which a picture's settings have what was asked


class Written(NamedTuple):
    """What a visitor wrote for a network that reads text, of whatever type: prompts, one a line,
    and what samples are guided away from.
    """

    prompts: object
    negative: object


def class_choices(network: Network, classes: list[str] | None) -> list[tuple[str, int]]:
    """[(text, class index)] to search in.

    The text is the number and the name, the number alone if there is no other name.
    """
    texts = map(legible, captions(range(network.num_classes), network.num_classes, classes))
    return [(text if text == str(i) else f"{i}: {text}", i) for i, text in enumerate(texts)]


def read_seed(text: object) -> int:
    """The seed that a visitor wrote. Raises ValueError if it is none."""
    text = text.strip() if isinstance(text, str) else repr(text)
    if not text.isdecimal() or len(text) > len(str(SEEDS)) or int(text) >= SEEDS:
        raise ValueError(
            f"The seed is {text[:40]!r}; it must be a whole number from 0 to 2^63 - 1, such as 0."
        )
    return int(text)


def bounded(name: str, number: object, least: float, most: float, kind: str = "number") -> float:
    """The number that a visitor gave.

    Raises ValueError if it is none, not from `least` to `most`, or not of the kind.
    """
    if (
        isinstance(number, (int, float))
        and not isinstance(number, bool)
        and least <= number <= most
    ):
        if kind != WHOLE or number % 1 == 0:
            return number
    raise ValueError(
        f"{name} is {reprlib.repr(number)}; it must be a {kind} from {least:g} to {most:g}."
    )


def whole(name: str, number: object, least: int, most: int) -> int:
    """`bounded` for whole numbers, as an int."""
    return int(bounded(name, number, least, most, WHOLE))


def chosen_labels(classes: object, count: int, num_classes: int) -> list[int]:
    """The class indices of `count` images: the chosen classes take turns.

    Raises ValueError if none is chosen.
    """
    if num_classes == 0:
        return [0] * count  # placeholders: the network is not given them
    if not isinstance(classes, list) or not classes:
        raise ValueError("No class is chosen: search for one by its name or number.")
    if not all(type(label) is int and 0 <= label < num_classes for label in classes):
        raise ValueError(
            f"The classes are {reprlib.repr(classes)}; give a list of whole numbers from 0 to "
            f"{num_classes - 1}."
        )
    return [classes[i % len(classes)] for i in range(count)]


def written_text(name: str, written: object, longest: int) -> str:
    """The text that a visitor wrote. Raises ValueError if it is none, or longer than this."""
    with suppress(UnicodeEncodeError):  # of half a character
        if isinstance(written, str) and len(written) <= longest:
            written.encode()
            return written.strip()
    raise ValueError(
        f"{name} is {reprlib.repr(written)}; it must be a text of at most {longest:,} characters."
    )


def written_prompts(written: object, count: int) -> list[str]:
    """The prompts of `count` images: the lines take turns; an empty line is the empty prompt.

    Raises ValueError for lines that are too long, or no text.
    """
    lines = written_text("What is to be drawn", written, LONGEST_PROMPTS).splitlines() or [""]
    prompts = [
        written_text(f"Line {number} of the prompts", line, LONGEST_PROMPT)
        for number, line in enumerate(lines, start=1)
    ]
    return [prompts[i % len(prompts)] for i in range(count)]


def written_negative(written: object, guidance: float) -> str | None:
    """The negative prompt that a visitor wrote, None for an empty one.

    Raises ValueError for one that is too long or no text, and where nothing is guided.
    """
    text = written_text("The negative prompt", written, LONGEST_PROMPT)
    if text and guidance == 1:
        raise ValueError("A negative prompt needs guidance, and 1 is none: choose more, or none.")
    return text or None


def always() -> bool:
    """True."""
    return True


def draw(
    sampler: Sampler, labels: list[int] | list[str], seed: int, device: torch.device,
    wanted: Callable[[], bool] = always,
) -> Iterator[tuple[int, Image.Image | list[Image.Image], Image.Image | None]]:  # fmt: skip
    """Yields (steps done, PIL picture of the images as predicted, None) at up to about GIF_MOMENTS
    steps, and at the end (steps, picture of the images, strip of how the first STRIP_ROWS came
    about). Of clips the pictures are those of middle frames, and the last one is all pictures of
    one that plays.

    Image i depends on (seed, i), its label or prompt and the sampler alone, up to rounding. Raises
    ValueError as Sampler.decode, and before a step if wanted() does not hold.
    """
    texts = captions(labels, sampler.network.num_classes, readable(sampler.classes))
    noise_fn = ImageNoise(seed, range(len(labels)), device)
    noise = noise_fn(torch.empty(len(labels), *sampler.latent, device=device))
    steps, frames = len(sampler.steps()), []
    in_strip = evenly(steps, STRIP_MOMENTS)
    previewed = {*evenly(steps, GIF_MOMENTS), *in_strip}
    way = sampler.trajectory(sampler.conditions(labels), noise, noise_fn)
    for i, out in enumerate(while_wanted(way, wanted)):
        if i in previewed:
            images = sampler.decode(middle(out["pred_xstart"])).cpu().numpy()
            if i in in_strip:
                frames.append((out["t"], images[:STRIP_ROWS]))
            yield i + 1, picture(images, texts), None
    whole = sampler.decode(out["sample"]).cpu().numpy()
    images = whole[:, whole.shape[1] // 2] if sampler.makes_clips else whole  # (N, H, W, 3)
    yield (
        steps, played(whole, texts) if sampler.makes_clips else picture(images, texts),
        strip([*frames[:-1], (None, images[:STRIP_ROWS])], texts[:STRIP_ROWS]),
    )  # fmt: skip


def middle(latents: torch.Tensor) -> torch.Tensor:
    """The middle frames (N, C, H, W) of clips (N, C, F, H, W); images as they are."""
    return latents[:, :, latents.shape[2] // 2] if latents.dim() > 4 else latents


def while_wanted(way: Iterator[dict], wanted: Callable[[], bool]) -> Iterator[dict]:
    """What `way` yields. Raises ValueError before its next step if wanted() does not hold."""
    for _ in iter(wanted, False):
        if (step := next(way, None)) is None:
            return
        yield step
    raise ValueError("Nobody waits for these images any more, so they were not drawn to the end.")


def answer(
    base: Sampler, settings: dict[str, Any], device: torch.device, asked: object, count: object,
    guidance: object, solver: object, steps: object, seed: object,
    wanted: Callable[[], bool] = always,
) -> Iterator[tuple[str, Any, Image.Image | None, str | None]]:  # fmt: skip
    """draw for a visitor's choices, of whatever type, of a base Sampler: classes are asked for, or
    what is Written; yields (status, picture, strip, PNG file), the last two None before the end.
    At the end the picture is that file too, which is gone when the generator goes on, and plays if
    it is of clips. The PNG file has the choices inside, and `settings`: what a picture depends on
    beside them.

    Raises ValueError for choices that make no sense, before any work, and as draw.
    """
    sampler, chosen = read_choices(base, asked, count, guidance, solver, steps, seed)
    number, labels = chosen["seed"], chosen[PROMPTS if base.reads_text else CLASSES]
    for done, drawn, rows in draw(sampler, labels, number, device, wanted):
        if rows is None:
            yield f"Step {done} of {sampler.num_sampling_steps}", drawn, None, None
    with TemporaryDirectory() as folder:  # Gradio copies what is not in its own
        path = str(Path(folder) / f"dit-seed-{number}.png")
        if isinstance(drawn, list):
            save_moving(drawn, path, base.frame_rate or FRAME_RATE, settings | chosen)
        else:
            save(drawn, path, settings | chosen)
        yield "; ".join([f"Seed {number}", *sampler.notes(labels)]), path, rows, path


def read_choices(
    base: Sampler, asked: object, count: object, guidance: object, solver: object, steps: object,
    seed: object,
) -> tuple[Sampler, dict]:  # fmt: skip
    """(the Sampler for a visitor's choices, the settings that they are).

    Raises ValueError for those that make no sense.
    """
    solvers = base.process.solvers
    if not isinstance(solver, str) or solver not in solvers:
        raise ValueError(
            f"The solver is {reprlib.repr(solver)}; it must be one of {', '.join(solvers)}."
        )
    steps = whole("Steps", steps, solvers[solver].least, solvers[solver].most)
    guidance = bounded(
        "Guidance", guidance, 1, MOST_GUIDANCE if base.condition.has_null else 1
    )
    images = whole("How many images", count, 1, MOST_IMAGES)
    chosen: dict[str, Any] = dict(
        cfg_scale=guidance, sampler=solver, num_sampling_steps=steps
    )  # fmt: skip
    what: dict[str, Any] = {}
    if not base.reads_text:
        what[CLASSES] = chosen_labels(asked, images, base.network.num_classes)
    else:
        prompts, negative = asked if isinstance(asked, Written) else (asked, "")
        what[PROMPTS] = written_prompts(prompts, images)
        chosen["negative_prompt"] = written_negative(negative, guidance)
    sampler = replace(base, **chosen, solver_options={})
    own = solvers[solver].options
    return sampler, {**own, **chosen, "seed": read_seed(seed), **what}
