"""Sample images of classes, or of prompts, into one labelled picture.

    python sample.py                             # the released XL/2, ImageNet at 256 pixels
    python sample.py --image-size 512 --seed 1 --class-labels 207 88
    python sample.py --ckpt results/000-DiT-XL-2 --vae ema --sampler ddim --num-sampling-steps 50
    python sample.py --ckpt examples/digits/dit.safetensors --vae examples/digits/vae \\
      --class-labels 3 1 4 --trajectory 314.gif
    python sample.py --ckpt results/000-MMDiT-Ti-1 --prompt "a thick three" "a thin seven"
    python sample.py --ckpt results/000-VideoDiT-S-2 --frames 16 --given first.png --output a.gif

A checkpoint of this project says itself how its network is built; for others --model and
--num-classes do. --image-size 384 or 256x384, HEIGHTxWIDTH, asks for other pictures than the
network was trained on. A network of clips draws as many frames as it was trained on, unless
--frames says otherwise: as a .gif or .mp4 that plays, or as a strip in another file.
"""

from runtime.command_line import Parser, door, end_at_interrupt, reason

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from argparse import Namespace
from collections.abc import Collection, Sequence
import os
import sys
from typing import Any, NamedTuple

from PIL import Image
import numpy as np

from checkpoints.choice import NUM_CLASSES
from checkpoints.loading import find_files
from conditions.given import Given, places_in
from conditions.labels import label_indices, readable
from conditions.reading import checked_prompts
from runtime.clip_files import probe_clip, read_frames
from runtime.devices import choose_device, tf32
from runtime.disk import check_writable
from runtime.image_size import sides
from sampling.pictures import (
    CLIP_ENDINGS, ENDINGS, FRAME_RATE, GIF_MOMENTS, STRIP_MOMENTS, captions, check_clip_file,
    check_clip_size, ending, moments, picture, save, save_clips, save_trajectory,
)  # fmt: skip
from sampling.flags import (
    CHECKPOINT_SAYS, add_sampling_flags, check_flags, network_choice, sampling_options,
)  # fmt: skip
from sampling.loading import VAE, build_sampler
from sampling.options import SamplingOptions
from sampling.sampler import Sampler

IMAGENET_LABELS = [207, 360, 387, 974, 88, 979, 417, 279]
CLIP_OUTPUT, GIVEN_FRAMES = "sample.gif", "0"  # of clips, where nobody says it


class ClipWishes(NamedTuple):
    """What is asked of a network that makes clips: the file to write, frames a second, and frames
    that are given, None for none.
    """

    output: str
    frame_rate: float
    given: Given | None


def build_parser() -> Parser:
    parser = Parser(__file__, description=__doc__)
    group = parser.add_argument_group("picture")
    group.add_argument(
        "--class-labels", nargs="+", metavar="LABEL",
        help="numbers, or names if the checkpoint knows them; index:3 or name:3 where 3 is both "
        "(default: eight classes)",
    )  # fmt: skip
    group.add_argument(
        "--prompt", nargs="+", metavar="TEXT",
        help="for a network that reads text: what to draw, a text for each image; ' ' is the empty "
        "prompt",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    group.add_argument(
        "--output", default="sample.png",
        help="file to write, replaced if it exists (default: %(default)s; of clips "
        f"{CLIP_OUTPUT})",
    )  # fmt: skip
    group.add_argument(
        "--trajectory",
        metavar="FILE",
        help="also write how the images came about, as what the network takes for the clean image "
        f"at up to {GIF_MOMENTS} steps: FILE.gif is an animation, another ending a strip of "
        f"{STRIP_MOMENTS}; replaced if it exists",
    )
    add_sampling_flags(parser, VAE, cfg_scale=4.0)
    add_clip_flags(parser)
    return parser


def add_clip_flags(parser: Parser) -> None:
    """Add those that are about clips alone, which are None where they are not given."""
    group = parser.add_argument_group("clips, of a network that makes them")
    group.add_argument(
        "--frame-rate", type=float, metavar="RATE",
        help="frames a second at which the output plays (default: as many as the clips of a run of "
        f"train.py had with --frame-rate, else {FRAME_RATE:g})",
    )  # fmt: skip
    group.add_argument(
        "--given", metavar="FILE",
        help="frames that every clip is to have: a picture, a video, a GIF or a folder of frames, "
        "scaled and cropped centrally as training does it; of more than --given-frames names the "
        "first ones",
    )  # fmt: skip
    group.add_argument(
        "--given-frames", metavar="PLACES",
        help="which frames of the clip those are, in order, counted from 0: 0, 0-3, 0,15 or, for "
        f"the last one, -1; the last two with =, --given-frames=-2--1 (default: {GIVEN_FRAMES})",
    )  # fmt: skip


@door("--image-size or the number of --class-labels, or of prompts")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    with parser.refusing():
        check_flags(args)
        choice, options = network_choice(args, given), sampling_options(args, given)
        check_output("--output", args.output, CLIP_ENDINGS)
        if args.trajectory:
            check_output("--trajectory", args.trajectory)
            if os.path.realpath(args.trajectory) == os.path.realpath(args.output):
                raise ValueError(
                    f"--trajectory and --output are both {args.output}; give two files"
                )
        device = choose_device(args.device)
        files = find_files(choice, VAE)
        sampler = build_sampler(choice, files, options, device)
        asked = parse_asked(args.class_labels, args.prompt, sampler)
        texts = captions(asked, sampler.network.num_classes, readable(sampler.classes))
        clip = clip_wishes(args, "output" in given, sampler, texts)
    for note in sampler.notes(asked):
        print(f"note: {note}", file=sys.stderr)
    shown = moments(len(sampler.steps()), args.trajectory) if args.trajectory else ()
    used = settings(args, given, sampler, options) | {
        "vae": files.vae, "prompt" if sampler.reads_text else "class_labels": asked,
    }  # fmt: skip
    try:
        with tf32(args.tf32):
            images, frames = (
                sample(sampler, asked, args.seed, shown) if clip is None
                else sample(sampler, asked, args.seed, shown, given=clip.given)
            )  # fmt: skip
        if clip is not None:
            write_clips(images, clip, texts, used)
            return
        save(picture(images, texts), args.output, used)
        size = f"{images.shape[1]}x{images.shape[2]}"  # height x width, as --image-size
        print(f"wrote {args.output}: {len(images)} images of {size} pixels")
        if args.trajectory:
            save_trajectory([*frames[:-1], (None, images)], args.trajectory, texts)
            print(
                f"wrote {args.trajectory}: the images as predicted at {len(frames)} of "
                f"{len(sampler.steps())} steps"
            )
    except (ValueError, OSError) as error:  # Pillow's, too, of a picture too large for its format
        parser.fail(reason(error))


def settings(
    args: Namespace, given: Collection[str], sampler: Sampler, options: SamplingOptions
) -> dict[str, Any]:
    """How the picture is made, as its file tells it: all flags, those with settled values that
    have them, and without those that the checkpoint answers.
    """
    flags = {
        name: value for name, value in vars(args).items()
        if name in given or name not in CHECKPOINT_SAYS
    }  # fmt: skip
    clips, text = sampler.makes_clips, sampler.reads_text
    settled = options.settled(sampler.process, text=text, clips=clips)
    return flags | settled | {"image_size": sampler.image_size}


def check_output(flag: str, path: str, known: Sequence[str] = ENDINGS) -> None:
    """Raise ValueError unless a picture can be written at path, in the format of its ending, which
    is to be one of those that are known.
    """
    try:
        check_writable(path)
        ending(path, known)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def clip_wishes(
    args: Namespace, output_given: bool, sampler: Sampler, texts: Sequence[str]
) -> ClipWishes | None:
    """What a command line asks of a network that makes clips, None for another network; whether it
    gives --output, and the texts of its clips.

    Raises ValueError for flags that are not this network's, and for what cannot be had.
    """
    if not sampler.makes_clips:
        for name in ("given", "given_frames", "frame_rate"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"`{name}` is for networks that make clips, and this one makes images; leave "
                    "the argument out"
                )
        check_output("--output", args.output)
        return None
    if args.trajectory:
        raise ValueError(
            "`trajectory` shows how images came about, and this network makes clips; leave the "
            "argument out"
        )
    output = args.output if output_given or sampler.frames == 1 else CLIP_OUTPUT
    rate = args.frame_rate or sampler.frame_rate or FRAME_RATE
    check_output("--output", output, CLIP_ENDINGS)
    check_clip_file(output, rate)
    check_kept(args.given, output)
    assert sampler.frames is not None  # the network makes clips
    shape = (len(texts), sampler.frames, *sides(sampler.image_size), 3)
    check_clip_size(output, shape, texts)
    return ClipWishes(output, rate, read_given(args.given, args.given_frames, sampler))


def check_kept(given: str | None, output: str) -> None:
    """Raise ValueError if the output would replace, or lie among, the frames that are given."""
    if given is None:
        return
    place, kept = (os.path.realpath(path) for path in (output, given))
    if kept in (place, os.path.dirname(place)):
        raise ValueError(
            f"`output` {output} is what `given` names, or lies in it, and would change it; give "
            "another file"
        )


def read_given(path: str | None, named: str | None, sampler: Sampler) -> Given | None:
    """The frames that --given and --given-frames give, None for none; with a note, printed, if not
    all of the file's frames are taken, or if they are brought to another size.

    Raises ValueError for a file that cannot be read or has too few frames, and for places that the
    clip does not have.
    """
    if path is None:
        if named is not None:
            raise ValueError(
                f"`given_frames` {named[:60]} goes with `given`, the file that has these frames; "
                "give both, or leave the argument out"
            )
        return None
    from data.images import cover  # here, since it takes a second

    assert sampler.frames is not None  # the network makes clips
    places = places_in(named or GIVEN_FRAMES, sampler.frames)
    info = probe_clip(path, "given")
    if info.frames < len(places):
        raise ValueError(
            f"`given` {path} has {info.frames} of the {len(places)} frames that `given_frames` "
            "names; name as many as it has, or give a longer clip"
        )
    frames, size = read_frames(path, range(len(places)), "given"), sides(sampler.image_size)
    if info.frames > len(places):
        first = "one is" if len(places) == 1 else f"{len(places)} are"
        print(
            f"note: of the {info.frames} frames of {path} the first {first} given", file=sys.stderr
        )
    if frames.shape[1:3] != size:
        was, now = (f"{height}x{width}" for height, width in (frames.shape[1:3], size))
        print(
            f"note: {path} has {was} pixels; it is scaled and cropped centrally to {now}",
            file=sys.stderr,
        )
        frames = np.stack([np.asarray(cover(Image.fromarray(one), size)) for one in frames])
    return sampler.give(frames, places)


def write_clips(
    clips: np.ndarray, wishes: ClipWishes, texts: Sequence[str], settings: dict
) -> None:
    """Write clips (N, F, H, W, 3) with their texts, and tell it.

    Raises ValueError as save_clips.
    """
    count, frames, height, width, _ = clips.shape
    own = {"output": wishes.output, "frame_rate": wishes.frame_rate, "frames": frames}
    save_clips(clips, wishes.output, texts, wishes.frame_rate, settings | own)
    named = "a frame" if frames == 1 else f"{frames} frames"
    print(f"wrote {wishes.output}: {count} clips of {named} of {height}x{width} pixels")


def parse_asked(
    labels: list[str] | None, prompts: list[str] | None, sampler: Sampler
) -> list[int] | list[str]:
    """What --class-labels or --prompt ask a network for: class indices, or prompts where it reads
    text.

    Raises ValueError for the flag that the network does not have, for labels that it does not have,
    and without prompts.
    """
    if not sampler.reads_text:
        if prompts:
            raise ValueError(
                "--prompt: the network does not read text; leave the flag out"
                + (", and give --class-labels" if sampler.network.num_classes else "")
            )
        return parse_labels(labels, sampler.network.num_classes, sampler.classes)
    if labels:
        raise ValueError("--class-labels: the network reads text; give --prompt instead")
    if not prompts:
        raise ValueError(
            'the network reads text; say with --prompt what it is to draw, such as --prompt "a '
            'thick three" "a thin seven"; " " is the empty prompt'
        )
    return checked_prompts(prompts, "prompt")


def parse_labels(given: list[str] | None, num_classes: int, classes: list[str] | None) -> list[int]:
    """The class indices for --class-labels, numbers or names, or the default ones.

    Raises ValueError for a label that the network does not have.
    """
    if num_classes == 0:
        if given:
            raise ValueError(
                "--class-labels: the network was trained without classes; leave the flag out"
            )
        # placeholders, one per image: the network is not given them
        return [0] * len(IMAGENET_LABELS)
    if not given:
        return (
            IMAGENET_LABELS
            if num_classes == NUM_CLASSES
            else list(range(min(num_classes, len(IMAGENET_LABELS))))
        )
    try:
        return label_indices(given, num_classes, classes)
    except ValueError as error:
        raise ValueError(f"--class-labels {error}") from None


def sample(
    sampler: Sampler, asked: list[int] | list[str], seed: int, shown: Collection[int] = (),
    given: Given | None = None,
) -> tuple[np.ndarray, list[tuple[float, np.ndarray]]]:  # fmt: skip
    """Images (N, H, W, 3) of labels or prompts, a uint8 array, or clips (N, F, H, W, 3), and [(t,
    images as predicted at step t)] for the steps with the indices in `shown`.

    From torch's generator, seeded with `seed` just before the first draw.
    """
    frames = []
    for i, out in enumerate(sampler.seeded_trajectory(asked, seed, progress=True, given=given)):
        if i in shown:
            frames.append((out["t"], sampler.decode(out["pred_xstart"]).cpu().numpy()))
    return sampler.decode(out["sample"]).cpu().numpy(), frames


if __name__ == "__main__":
    main()
