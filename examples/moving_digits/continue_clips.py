"""Go on with clips of moving digits from their first frames, for judge_clips.py --truth.

    python examples/moving_digits/continue_clips.py --ckpt results/000-VideoDiT-Ti-2 \\
        --truth moving-digits/heldout --num-clips 200 --output continued.npz

The network is given the first frames of each clip and its digit. The .npz has the clips that it
makes, uint8 `arr_0` (N, F, 32, 32, 3), in the order of the true ones: evenly spread over all of
them. Clip i depends on --seed and i alone.
"""

from pathlib import Path
import sys

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES.parent), str(EXAMPLES / "moving_digits")]

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import torch
from tqdm.auto import trange

from checkpoints.choice import NetworkChoice
from checkpoints.loading import find_files
from conditions.given import Given
from judge_clips import HERE
from moving_judge import read_clips, spread_out
from processes.noise import ImageNoise
from runtime.disk import check_writable, write_whole
from runtime.image_size import settled, written
from runtime.limits import Range, check_numbers
from runtime.npz import IMAGES, write_npz
from sampling.loading import build_sampler
from sampling.options import SamplingOptions, check_seed


def go_on(sampler, clips, given, seed, batch_size):
    """Clips uint8 (N, F, 32, 32, 3) that a Sampler makes where the first `given` frames of Clips,
    and their digits, are given.
    """
    made = []
    for start in trange(0, len(clips.frames), batch_size, unit="batch"):
        part = clips.frames[start : start + batch_size]
        labels = sampler.conditions(clips.digits[start : start + batch_size].tolist())
        each = [sampler.give(clip[:given], range(given)) for clip in part]
        whole = Given(
            torch.cat([one.clips for one in each]), torch.cat([one.mask for one in each]),
            each[0].clean,
        )  # fmt: skip
        noise_fn = ImageNoise(seed, range(start, start + len(part)), labels.device)
        noise = noise_fn(torch.empty(whole.clips.shape, device=labels.device))
        made.append(sampler.decode(sampler.latents(labels, noise, noise_fn, given=whole)).cpu())
    return torch.cat(made).numpy()


def check_fit(sampler, clips, args):
    """Raise ValueError unless a Sampler makes clips as the true ones are, from those given."""
    frames = clips.frames.shape[1]
    if clips.digits is None:
        raise ValueError(
            f"`truth` {args.truth}: its folders are not called 0 to 9; give moving-digits/heldout"
        )
    if not sampler.makes_clips:
        raise ValueError(
            f"`ckpt` {args.ckpt} makes images; give a network of clips, such as train.py --frames "
            "trains"
        )
    if sampler.frames != frames:
        raise ValueError(
            f"`ckpt` {args.ckpt} makes clips of {sampler.frames} frames, those of `truth` have "
            f"{frames}; give a network that was trained on as many"
        )
    size = settled(clips.frames.shape[2:4])
    if sampler.image_size != size:
        raise ValueError(
            f"`ckpt` {args.ckpt} with `vae` {args.vae} makes frames of "
            f"{written(sampler.image_size)} pixels, those of `truth` have {written(size)}; give "
            "the `vae` that the network was trained with"
        )
    if args.given_frames >= frames:
        raise ValueError(f"`given_frames` is {args.given_frames} of {frames}; give fewer")


def build_parser():
    parser = Parser(__file__, description=__doc__)
    add = parser.add_argument
    add("--ckpt", required=True, help="of a network that was trained with --given-frames")
    add("--vae", default=HERE / "vae", help="(default: that of the moving digits)")
    add("--truth", type=Path, required=True, help="folder of true clips, moving-digits/heldout")
    add("--given-frames", type=int, default=4, help="of each clip (default: %(default)s)")
    add("--num-clips", type=int, default=200, help="(default: %(default)s)")
    add("--num-sampling-steps", type=int, default=25, help="(default: %(default)s)")
    add("--cfg-scale", type=float, default=1.0, help="(default: %(default)s)")
    add("--batch-size", type=int, default=20, help="clips at a time (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--device", choices=["cpu", "cuda", "mps"], default="cpu", help="(default: %(default)s)")
    add("--output", type=Path, required=True, help="the .npz to write")
    return parser


@door("--batch-size")
def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        check_numbers(args, given_frames=Range(1, 10**4), num_clips=Range(1, 10**6))
        check_seed(args.seed)
        if args.output.exists():
            raise ValueError(f"`output` {args.output} exists already; give another name")
        check_writable(args.output)
        options = SamplingOptions(
            num_sampling_steps=args.num_sampling_steps, cfg_scale=args.cfg_scale
        )
        choice = NetworkChoice(args.ckpt, vae=args.vae)
        files = find_files(choice, args.vae)
        sampler = build_sampler(choice, files, options, torch.device(args.device))
        clips = read_clips(args.truth, "truth")
        check_fit(sampler, clips, args)
        chosen = spread_out(clips, args.num_clips)
        made = go_on(sampler, chosen, args.given_frames, args.seed, args.batch_size)
        write(args.output, made)
    print(f"{len(made)} clips in {args.output}")


def write(path, clips):
    """Write clips uint8 (N, F, H, W, 3) as an .npz, whole or not at all."""

    def write(temporary):
        with open(temporary, "wb") as file:
            write_npz(file, {IMAGES: clips})

    write_whole(path, write)


if __name__ == "__main__":
    main()
