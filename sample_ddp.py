"""Sample many images for an evaluation, as PNG files and as one .npz, on any number of processes.

    torchrun --nproc_per_node=8 sample_ddp.py --num-fid-samples 50000
    python sample_ddp.py --ckpt examples/digits/dit.safetensors --vae examples/digits/vae --num-fid-samples 100

Image i, its label included, depends on --global-seed and i alone, however the work is shared.
Images go to SAMPLE_DIR/NAME/NNNNNN.png and then to SAMPLE_DIR/NAME.npz (uint8 `arr_0`, (N, H, W,
3)), where NAME tells checkpoint, guidance, steps, sampler, seed and number, and ends in a hash of
these and all else that decides the content (interval, precision, VAE …); NAME/manifest.json lists
it. The same command goes on where it stopped.
"""

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from checkpoints.files import list_checkpoints
from checkpoints.loading import choose_vae, find_checkpoint
from checkpoints.names import weights_file
from runtime.devices import process_device
from runtime.surroundings import check_accelerate, own_place
from sampling.flags import add_sampling_flags, check_sampling_flags
from sampling.loading import load_sampler
from sampling.many import all_labels, make_all, open_folder, stamps


def build_parser() -> Parser:
    parser = Parser(__file__, description=__doc__)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--num-fid-samples", type=int, default=50000, help="images in all (default: %(default)s)"
    )
    batching = "images at a time in each process; another number changes images by float rounding (default: %(default)s)"
    run.add_argument("--per-proc-batch-size", type=int, default=32, help=batching)
    run.add_argument(
        "--sample-dir", default="samples", help="where folder and .npz go (default: %(default)s)"
    )
    run.add_argument("--global-seed", type=int, default=0, help="(default: %(default)s)")
    policies = (
        "random: drawn for each image; balanced: image i is of class i modulo their number; or a file with a number or name "
        "in each line (index:3 or name:3 where 3 is both), of which the first are used (default: %(default)s)"
    )
    run.add_argument("--labels", default="random", metavar="{random,balanced,FILE}", help=policies)
    add_sampling_flags(parser, vae="ema", cfg_scale=1.5)
    return parser


@door("--per-proc-batch-size", resumes=True)
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        check_accelerate(mixed_precision=args.mixed_precision)
        place = own_place()
        check_sampling_flags(args)
        device = process_device(args.device)
        if place.world_size > 1 and args.ckpt is not None and list_checkpoints(args.ckpt):
            raise ValueError(
                f"--ckpt {args.ckpt} is a run folder, whose newest checkpoint may change while processes start; give the "
                f"checkpoint itself, {weights_file(args.ckpt)}"
            )
        checkpoint = find_checkpoint(args) if args.ckpt is not None else None
        if checkpoint is not None:
            args.vae = choose_vae(args, checkpoint)
        before = stamps(checkpoint, args.vae)
        sampler = load_sampler(args, device, checkpoint)
        labels = all_labels(args, sampler)
        folder, manifest = open_folder(args, sampler, labels, device, place)
        if stamps(checkpoint, args.vae) != before:
            raise ValueError(
                f"{args.ckpt} or {args.vae} changed while it was read; give the same command again"
            )
    try:
        make_all(args, sampler, labels, folder, manifest, device, place)
    except BrokenPipeError:  # of the output, which `door` answers
        raise
    except OSError as error:
        what = f"{error.filename or folder}: {error.strerror or error}"
        parser.fail(f"{what}; when that is mended, the same command goes on")
    except ValueError as error:
        parser.fail(str(error))


if __name__ == "__main__":
    main()
