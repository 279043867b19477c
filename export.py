"""Write a checkpoint in a form that others read: a folder for the Hugging Face hub, a pipeline of diffusers, or one file.

    python export.py --ckpt results/000-DiT-XL-2 --output my-dit                              # for the hub, with a model card
    python export.py --ckpt results/000-DiT-XL-2 --vae ema --format diffusers --output my-pipeline
    python export.py --ckpt my-pipeline --format safetensors --output dit.safetensors         # and back

--ckpt takes whatever sample.py takes, so also what this script wrote, and pipelines of diffusers.
"""

import argparse
from pathlib import Path

from checkpoints import load_weights, save_weights
from hub import export_diffusers, save_pretrained
from sampling import build_network, class_names, find_checkpoint
from sampling_flags import add_network_flags
from vae import latent_shape, load_vae

FORMATS = ("hub", "diffusers", "safetensors")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    group = parser.add_argument_group("export")
    group.add_argument("--output", required=True, help="folder or, for safetensors, file to write; it must not exist")
    group.add_argument(
        "--format",
        choices=FORMATS,
        default="hub",
        help="hub: model.safetensors, config.json and a model card; diffusers: a DiTPipeline, autoencoder included; "
        "safetensors: one file (default: %(default)s)",
    )
    add_network_flags(parser, vae="ema")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        write(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {args.output}")


def write(args: argparse.Namespace) -> None:
    """Write what the flags ask for. Raises ValueError, or OSError where the disk refuses."""
    if Path(args.output).exists():
        raise ValueError(f"--output {args.output} exists already; give another name")
    checkpoint = find_checkpoint(args)
    weights = load_weights(checkpoint, args.weights)
    network, classes = build_network(args, weights, latent_shape(args.vae)), class_names(args, weights)
    if args.format == "diffusers":
        export_diffusers(network, load_vae(args.vae), args.output, classes)
    elif args.format == "hub":
        save_pretrained(network, args.output, classes, weights.training, args.vae)
    else:
        save_weights(Path(args.output), weights._replace(tensors=network.state_dict(), config=network.config, classes=classes))


if __name__ == "__main__":
    main()
