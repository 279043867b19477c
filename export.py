"""Write a checkpoint in a form that others read: a folder for the Hugging Face hub, a pipeline of
diffusers, or one file.

    python export.py --ckpt results/000-DiT-XL-2 --output my-dit                              # for the hub, with a model card
    python export.py --ckpt results/000-DiT-XL-2 --format diffusers --output my-pipeline
    python export.py --ckpt my-pipeline --format safetensors --output dit.safetensors         # and back

--ckpt takes whatever sample.py takes, so also what this script wrote, and pipelines of diffusers.
The autoencoder is the one that the checkpoint names; where it names none, --vae does.
"""

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import argparse
from pathlib import Path

from checkpoints.weights import Weights, load_weights, save_weights
from runtime.disk import check_name
from checkpoints.publish import export_diffusers, save_pretrained
from runtime.limits import check_numbers
from checkpoints.loading import build_network, choose_vae, class_names, find_checkpoint
from runtime.disk import check_writable
from sampling.flags import add_network_flags
from processes.table import process_of
from vae import latent_shape, load_vae

FORMATS = ("hub", "diffusers", "safetensors")


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
        default="hub",
        help="hub: model.safetensors, config.json and a model card; diffusers: a DiTPipeline, autoencoder included; "
        "safetensors: one file (default: %(default)s)",
    )
    add_network_flags(parser, vae=None)
    return parser


@door()
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        check_numbers(args)
        try:
            write(args)
        except OSError as error:
            raise ValueError(
                f"{error.filename or args.output}: {error.strerror or error}; nothing is left of it: mend that, or give "
                "another --output, and give the command again"
            ) from None
    print(f"wrote {args.output}")


def write(args: argparse.Namespace) -> None:
    """Write what the flags ask for. Raises ValueError, or OSError where the disk refuses."""
    output = Path(args.output)
    check_name(output)
    if output.exists():
        raise ValueError(f"--output {output} exists already; give another name")
    if args.format == "safetensors":
        check_writable(output)
        if output.suffix != ".safetensors":
            raise ValueError(
                f"--output {output} is to be one file; give a name that ends in .safetensors"
            )
    checkpoint = find_checkpoint(args)
    weights = load_weights(checkpoint, args.weights)
    args.vae = trained_with(args, checkpoint, weights)
    network, classes = (
        build_network(args, weights, latent_shape(args.vae)),
        class_names(args, weights),
    )
    process = process_of(network, weights.process)
    if args.format == "diffusers":
        export_diffusers(network, load_vae(args.vae), output, classes)
    elif args.format == "hub":
        save_pretrained(network, output, classes, weights.training, args.vae, process)
    else:
        tensors = network.state_dict()
        save_weights(output, Weights(tensors, network.config, classes, process=process.config))


def trained_with(args: argparse.Namespace, checkpoint: Path, weights: Weights) -> str:
    """The autoencoder's name: --vae, the pipeline's own, or what the checkpoint says.

    Raises ValueError if nobody says it.
    """
    recorded = ((weights.training or {}).get("args") or {}).get("vae")
    recorded = recorded if isinstance(recorded, str) else None
    vae = choose_vae(args, checkpoint) or recorded or ("ema" if args.ckpt is None else None)
    if vae is None:
        raise ValueError(
            f"{args.ckpt} does not say behind which autoencoder it was trained; pass --vae"
        )
    return vae


if __name__ == "__main__":
    main()
