"""Write a checkpoint as a folder for the Hugging Face hub, a pipeline of diffusers, or one file.

    python export.py --ckpt results/000-DiT-XL-2 --output my-dit    # for the hub, with model card
    python export.py --ckpt results/000-DiT-XL-2 --format diffusers --output my-pipeline
    python export.py --ckpt my-pipeline --format safetensors --output dit.safetensors  # and back

--ckpt takes whatever sample.py takes, so also what this script wrote, and pipelines of diffusers.
The autoencoder is the one that the checkpoint names; where it names none, --vae does.
"""

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

from checkpoints.publish import FORMATS, export_checkpoint
from sampling.flags import add_network_flags, check_flags, network_choice


def build_parser() -> Parser:
    parser = Parser(__file__, description=__doc__)
    group = parser.add_argument_group("export")
    group.add_argument(
        "--output", required=True,
        help="folder or, for safetensors, file to write; it must not exist",
    )  # fmt: skip
    group.add_argument(
        "--format",
        choices=FORMATS,
        default=FORMATS[0],
        help="hub: model.safetensors, config.json and a model card; diffusers: a DiTPipeline, "
        "autoencoder included; safetensors: one file (default: %(default)s)",
    )
    group.add_argument(
        "--half", action="store_true", help="numbers in float16, in half of the space"
    )
    add_network_flags(parser, vae=None, size="that the network was trained on")
    return parser


@door()
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    with parser.refusing():
        check_flags(args)
        try:
            export_checkpoint(network_choice(args, given), args.output, args.format, args.half)
        except OSError as error:
            raise ValueError(
                f"{error.filename or args.output}: {error.strerror or error}; nothing is left of "
                "it: mend that, or give another --output, and give the command again"
            ) from None
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
