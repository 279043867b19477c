"""Sample many images for an evaluation, as PNG files and as one .npz, on any number of processes.

    torchrun --nproc_per_node=8 sample_ddp.py --num-fid-samples 50000
    python sample_ddp.py --ckpt examples/digits/dit.safetensors --vae examples/digits/vae \\
      --num-fid-samples 100

Image i, its label included, depends on --global-seed, i and its size, however the work is shared.
Images go to SAMPLE_DIR/NAME/NNNNNN.png and then to SAMPLE_DIR/NAME.npz (uint8 `arr_0`, (N, H, W,
3)), where NAME tells checkpoint, guidance, steps, sampler, seed and number, and ends in a hash of
these and all else that decides the content (interval, precision, VAE, size …); NAME/manifest.json
lists it. The same command goes on where it stopped. A network that reads text takes --prompts; the
prompt of each image is a line of NAME/captions.txt and of NAME.captions.txt. Of a network of clips
a PNG file has the frames of a clip, side by side, and `arr_0` is (N, F, H, W, 3).
"""

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from dataclasses import fields

from sampling.flags import (
    add_sampling_flags, check_flags, network_choice, sampling_options,
)  # fmt: skip
from sampling.many import VAE, make_all, open_job
from sampling.options import ManyOptions

MANY = [field.name for field in fields(ManyOptions)]


def build_parser() -> Parser:
    parser = Parser(__file__, description=__doc__)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--num-fid-samples", type=int, default=ManyOptions.num_fid_samples,
        help="images in all (default: %(default)s)",
    )  # fmt: skip
    run.add_argument(
        "--per-proc-batch-size", type=int, default=ManyOptions.per_proc_batch_size,
        help="images at a time in each process; another number changes images by float rounding "
        "(default: %(default)s)",
    )  # fmt: skip
    run.add_argument(
        "--sample-dir", default=ManyOptions.sample_dir,
        help="where folder and .npz go (default: %(default)s)",
    )  # fmt: skip
    run.add_argument(
        "--global-seed", type=int, default=ManyOptions.global_seed, help="(default: %(default)s)"
    )
    run.add_argument(
        "--labels", default=ManyOptions.labels, metavar="{random,balanced,FILE}",
        help="random: drawn for each image; balanced: image i is of class i modulo their number; "
        "or a file with a number or name in each line (index:3 or name:3 where 3 is both), of "
        "which the first are used (default: %(default)s)",
    )  # fmt: skip
    run.add_argument(
        "--prompts", metavar="FILE",
        help="for a network that reads text: a file with a prompt in each line, the empty one in "
        "an empty line; they take turns: image i has that of line i modulo their number, counted "
        "from 0",
    )  # fmt: skip
    add_sampling_flags(parser, VAE, cfg_scale=1.5)
    return parser


@door("--per-proc-batch-size or --image-size", resumes=True)
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    with parser.refusing():
        check_flags(args)
        many = ManyOptions(**{name: getattr(args, name) for name in MANY})
        choice, options = network_choice(args, given), sampling_options(args, given)
        job = open_job(choice, options, many, device=args.device, tf32=args.tf32)
    try:
        make_all(job)
    except BrokenPipeError:  # of the output, which `door` answers
        raise
    except OSError as error:
        what = f"{error.filename or job.folder}: {error.strerror or error}"
        parser.fail(f"{what}; when that is mended, the same command goes on")
    except ValueError as error:
        parser.fail(str(error))


if __name__ == "__main__":
    main()
