"""The flags of train.py: one for each of TrainOptions, with its default."""

import argparse
from collections.abc import Callable, Collection
from typing import Any

from checkpoints.networks import MODELS, arguments_of
from runtime.command_line import Parser, read_size
from training.options import CHOICES, NETWORK_OPTIONS, TEXT_LENGTH, TrainOptions, defaults

Add = Callable[..., None]  # adds a flag, as an argparse.ArgumentParser's add_argument


def build_parser(description: str | None = None) -> Parser:
    """The parser of train.py's command line.

    The usage is one line, so that no error is buried below it.
    """
    parser = Parser(
        "train.py", description=description,
        usage="%(prog)s --data-path DIR [flags; --help lists them]",
    )  # fmt: skip
    for title, add_flags in GROUPS.items():
        add_flags(adder(parser.add_argument_group(title)))
    return parser


def read_options(args: argparse.Namespace, given: Collection[str] = ()) -> TrainOptions:
    """The TrainOptions that a parsed command line asks for; `given` names what it gives itself,
    also at its default.

    Raises ValueError for what is wrong whatever the data and the machine.
    """
    options, asked = TrainOptions(**vars(args)), vars(args)
    known = arguments_of(options.network_class.__name__)
    for name in NETWORK_OPTIONS:
        if name in given and name not in known and asked[name]:  # no classes is what there are
            raise options.has_no(name, asked[name])
    return options


def adder(group: Any) -> Add:
    """A function that adds a flag to a group of argparse.

    Default and choices are those of TrainOptions.
    """
    default_of = defaults()

    def add(flag, **settings):
        name = flag.removeprefix("--").replace("-", "_")
        if name in CHOICES:
            settings["choices"] = CHOICES[name]
        group.add_argument(flag, default=default_of[name], **settings)

    return add


def add_data_flags(add: Add) -> None:
    add(
        "--data-path",
        help="folder with one folder of images per class, or of captioned images in any folders; "
        "required unless --latents is given",
    )
    add(
        "--latents", metavar="DIR",
        help="folder that extract_latents.py wrote: no image is read, no VAE run",
    )  # fmt: skip
    add(
        "--image-size", type=read_size,
        help="pixels along each side, or HEIGHTxWIDTH, after the crop (default: %(default)s)",
    )  # fmt: skip
    add(
        "--num-classes", type=int,
        help="0: none, all images below --data-path (default: %(default)s; of a network that reads "
        "text 0)",
    )  # fmt: skip
    reading = (
        "what is learned with each image: its class folder, or its captions, from NAME.txt beside "
        "it or a metadata.jsonl (default: what --model reads)"
    )
    add("--condition", help=reading)
    length = (
        "tokens that the network's own encoder reads of a caption: one, and one for each word, or "
        f"each 8 bytes of a longer one (default: {TEXT_LENGTH})"
    )
    add("--text-length", type=int, metavar="L", help=length)
    encoders = (
        "instead of an encoder of the network's own: those whose output lies beside --latents, as "
        "extract_latents.py --text-encoder wrote it"
    )
    add("--text-encoder", nargs="+", metavar="NAME", help=encoders)
    add(
        "--flip", action=argparse.BooleanOptionalAction,
        help="mirror half of the images (default: on)",
    )  # fmt: skip
    skipping = "put the next image in place of an unreadable one and list it, instead of stopping"
    add("--skip-bad-images", action="store_true", help=skipping)
    buckets = (
        "images keep their aspect: each is brought to the nearest of some sizes of about "
        "--image-size squared pixels, and the images of a step have one size"
    )
    add("--aspect-buckets", action="store_true", help=buckets)
    packing = (
        "images keep their aspect, and those below --image-size squared pixels their size; "
        "several share a row of LENGTH tokens"
    )
    add("--pack", type=int, metavar="LENGTH", help=packing)
    add_clip_flags(add)


def add_clip_flags(add: Add) -> None:
    frames = (
        "train on clips of so many frames: of videos, GIFs and folders of frames below --data-path,"
        " or of --latents that extract_latents.py --clips wrote (default: images)"
    )
    add("--frames", type=int, metavar="F", help=frames)
    stride = "take every so many-th frame of a clip (default: %(default)s)"
    add("--frame-stride", type=int, metavar="S", help=stride)
    rate = (
        "bring clips to so many frames a second first; needed where theirs differ (default: as "
        "they are)"
    )
    add("--frame-rate", type=float, metavar="R", help=rate)
    given = (
        "share of the clips, 0 to 1, of which the network is given some frames clean, to learn "
        "how a picture or a clip goes on (default: %(default)s)"
    )
    add("--given-frames", type=float, metavar="P", help=given)


def add_network_flags(add: Add) -> None:
    names = ", ".join(MODELS)
    models = f"{names}; SiT's are DiT's with --process flow (default: %(default)s)"
    add("--model", metavar="MODEL", help=models)
    add("--block", help="how t and y reach the tokens (default: %(default)s)")
    add(
        "--positions",
        help="how tokens know where they are: a table that is added to them, rotated queries and "
        "keys (RoPE), or both (default: %(default)s)",
    )  # fmt: skip
    add("--norm", help="LayerNorm or RMSNorm (default: %(default)s)")
    add("--mlp", help="GELU, or SwiGLU with about as many parameters (default: %(default)s)")
    qk_norm = "normalise the queries and keys of each head (default: off)"
    add("--qk-norm", action="store_true", help=qk_norm)
    add(
        "--extrapolation",
        help="positions of tokens in images of another size than --image-size: interpolated "
        "within the known ones, extended beyond these, a crop of their middle, or ntk, which "
        "extends and slows rotations down (default: interpolate; extend with --positions rope)",
    )  # fmt: skip
    add(
        "--vae",
        help="ema, mse, a hub id, a local folder, or none for pixels (default: %(default)s)",
    )  # fmt: skip
    starting = (
        "a new run starts from these weights (EMA); another --image-size or --num-classes is "
        "allowed"
    )
    add("--init-from", metavar="CKPT", help=starting)
    labels = (
        "label table of --init-from: keep, drop, or a JSON file {label: label there} "
        "(default: %(default)s)"
    )
    add("--init-labels", metavar="{keep,drop,FILE}", help=labels)
    sigma = (
        "channels for a learned variance (default: on for diffusion, off for a flow, which does "
        "not train them)"
    )
    add("--learn-sigma", action=argparse.BooleanOptionalAction, help=sigma)
    add(
        "--exits", nargs="+", metavar="DEPTH:LEVEL",
        help="train the DiT of --init-from to have fewer blocks where noise is high: from a noise "
        "level on, 0 clean and 1 noise, so many run, such as 4:0.3 3:0.6 (default: all everywhere)",
    )  # fmt: skip
    routing = (
        "teach the DiT of --init-from to do with this share of its blocks' operations: which heads "
        "and channels are used depends on t, which tokens pass an MLP on these (default: all are)"
    )
    add("--dynamic", type=float, metavar="RATIO", help=routing)


def add_process_flags(add: Add) -> None:
    learning = (
        "what lies between data and noise: diffusion (DDPM), or flow (flow matching, as SiT's and "
        "rectified flow), whose settings the following are (default: %(default)s)"
    )
    add("--process", help=learning)
    add("--path", help="from noise, t = 0, to data, t = 1 (default: linear)")
    add("--prediction", help="what the network predicts (default: velocity)")
    add("--loss-weight", help="of a score or the noise as the prediction (default: none)")
    sampling = (
        "how t is drawn: uniform, logit-normal:MEAN,STD, mode:SCALE or cosmap; a mean above 0 "
        "leans to data, as one below 0 does in Stable Diffusion 3; logit-normal alone is 0,1, mode "
        "1.29 (default: uniform)"
    )
    add("--time-sampling", metavar="LAW", help=sampling)
    shifting = (
        "move t towards noise, for large images, as Stable Diffusion 3's shift: t / (A + (1 - A) t)"
        " (default: 1, not at all)"
    )
    add("--time-shift", type=float, metavar="A", help=shifting)
    cosine = "also learn the velocity's direction: add 1 - its cosine, as LightningDiT"
    add("--cosine-loss", action="store_true", help=cosine)
    eps = (
        "how far from the ends t stays (default: 1e-5 on vp; on linear and gvp 0 for velocities, "
        "else 1e-3)"
    )
    add("--train-eps", type=float, metavar="EPS", help=eps)


def add_recipe_flags(add: Add) -> None:
    add("--epochs", type=int, help="passes over the data (default: %(default)s)")
    add("--max-steps", type=int, help="stop after this many steps, if that comes before --epochs")
    add(
        "--global-batch-size", type=int,
        help="samples per step, all processes (default: %(default)s)",
    )  # fmt: skip
    add("--lr", type=float, help="AdamW's learning rate, constant (default: %(default)s)")
    add("--warmup-steps", type=int, help="over which it rises from 0 (default: %(default)s)")
    add("--weight-decay", type=float, help="AdamW's (default: %(default)s)")
    add("--grad-clip", type=float, metavar="NORM", help="scale larger gradients down to this norm")
    decays = (
        "of the weights' moving averages; the first is the one that is sampled from "
        "(default: 0.9999)"
    )
    add("--ema-decay", type=float, nargs="+", metavar="DECAY", help=decays)
    add("--global-seed", type=int, help="decides every random number (default: %(default)s)")
    bf16 = "bf16: autocast, with float32 weights, norms and losses (default: %(default)s)"
    add("--mixed-precision", help=bf16)
    bad = (
        "stop after this many steps in a row whose loss or gradient is not finite "
        "(default: %(default)s)"
    )
    add("--max-bad-steps", type=int, help=bad)


def add_speed_flags(add: Add) -> None:
    add(
        "--grad-accum", type=int,
        help="parts that a batch is run in, to save memory (default: %(default)s)",
    )  # fmt: skip
    checkpointing = "compute activations again in the backward pass: less memory, slower"
    add("--grad-checkpointing", action="store_true", help=checkpointing)
    add(
        "--compile", action="store_true", help="compile the blocks: minutes once, then faster steps"
    )
    tf32_help = "TF32 on NVIDIA GPUs: faster, slightly less exact (default: on)"
    add("--tf32", action=argparse.BooleanOptionalAction, help=tf32_help)
    add(
        "--fsdp", action="store_true",
        help="split weights, averages and optimizer over the processes (FSDP2)",
    )  # fmt: skip


def add_run_flags(add: Add) -> None:
    add("--results-dir", help="where run folders are made (default: %(default)s)")
    resuming = (
        "auto: the newest run with equal arguments, else a new one; or a checkpoint or run folder"
    )
    add("--resume", metavar="{auto,PATH}", help=resuming)
    add("--log-every", type=int, help="steps between log lines (default: %(default)s)")
    saving = "steps between checkpoints; the last step always is one (default: %(default)s)"
    add("--ckpt-every", type=int, help=saving)
    add(
        "--ckpt-minutes", type=float, metavar="M",
        help="also save when the last checkpoint is this old",
    )  # fmt: skip
    add(
        "--keep-last", type=int, metavar="N",
        help="delete this run's older checkpoints (default: keep all)",
    )  # fmt: skip
    failing = "when a checkpoint cannot be written, the disk being full, say (default: %(default)s)"
    add("--on-save-error", help=failing)
    add(
        "--sample-every", type=int, metavar="N",
        help="steps between preview pictures, of clips a row of frames, from the EMA weights",
    )  # fmt: skip
    add("--log-with", help="also send the metrics there")
    add(
        "--num-workers", type=int,
        help="loader processes per training process (default: %(default)s)",
    )  # fmt: skip
    add("--device", help="default: the GPU if there is one")


def add_evaluation_flags(add: Add) -> None:
    scoring = (
        "steps between scores (FID and others) of samples from the EMA weights: 50 DDIM steps, of "
        "a flow 25 steps of heun; no guidance"
    )
    add("--eval-every", type=int, metavar="N", help=scoring)
    add("--eval-samples", type=int, help="how many are sampled for a score (default: %(default)s)")
    add(
        "--eval-reference", metavar="PATH",
        help="what they are compared with; as evaluate.py --reference",
    )  # fmt: skip
    features = (
        "by which features; as evaluate.py --features, so a TorchScript file, too, which is a "
        "program: trust where it comes from (default: %(default)s)"
    )
    add("--eval-features", metavar="{inception,pixels,PATH}", help=features)


# Title of a group in --help → what adds its flags
GROUPS: dict[str, Callable[[Add], None]] = {
    "data": add_data_flags, "network": add_network_flags,
    "process": add_process_flags, "recipe": add_recipe_flags,
    "speed and memory: these change a result by rounding at most": add_speed_flags,
    "run": add_run_flags, "scores while training": add_evaluation_flags,
}  # fmt: skip
