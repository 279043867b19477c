"""A page in the browser for sampling: choose classes, guidance and solver, and watch the images come about.

    python app.py                                            # the digits of examples/digits, with nothing to download
    python app.py --ckpt released                            # the released XL/2, ImageNet at 256 pixels, names to search
    python app.py --ckpt results/000-DiT-XL-2 --vae ema --port 7861

Needs Gradio: pip install .[demo]. Visitors wait for one another; what they draw does not depend on it.
"""

from command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import argparse
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
import socket
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING

from PIL import Image
import torch

from devices import choose_device, tf32
from models import DiT
from pictures import GIF_MOMENTS, STRIP_MOMENTS, captions, evenly, picture, save, strip
from sampling import SOLVERS, ImageNoise, Sampler, load_sampler, readable
from sampling_flags import add_network_flags, check_sampling_flags

if TYPE_CHECKING:
    import gradio  # which is slow to import, and need not be there

EXAMPLE = Path(__file__).resolve().parent / "examples" / "digits"
DIGITS, DIGITS_VAE = str(EXAMPLE / "dit.safetensors"), str(EXAMPLE / "vae")
RELEASED, RELEASED_VAE = "released", "mse"
SOLVER, GUIDANCE, MOST_GUIDANCE = "dpm++", 1.5, 10.0
COUNT, MOST_IMAGES = 10, 16
STRIP_ROWS = 4  # of sixteen images at 512 pixels a strip would have 34 million pixels
SEEDS = 2**63
HOUR = 3600
HELP = (
    "Several classes take turns: the first image is of the first class, and so on. Image *i* depends on its class, *i*, the "
    "seed, guidance, solver and steps, up to rounding; not on how many images there are, nor on other visitors."
)


def build_parser() -> Parser:
    parser = Parser(__file__, description=__doc__)
    group = parser.add_argument_group("page")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0 lets in whoever reaches this machine, without a password (default: %(default)s)",
    )
    group.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    network = add_network_flags(
        parser,
        vae=RELEASED_VAE,
        without=f"the digits of {EXAMPLE.parent.name}/{EXAMPLE.name} beside this file and their own VAE; {RELEASED} is the "
        "released network, fetched on first use",
    )
    network.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    parser.set_defaults(  # what visitors choose, and what nobody does
        sampler=SOLVER, num_sampling_steps=SOLVERS[SOLVER].steps, cfg_scale=1.0, eta=0.0, cfg_channels=3,
        cfg_interval=[0.0, 1.0], mixed_precision="no", compile=False,
    )  # fmt: skip
    return parser


@door("--image-size")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.refusing():
        if find_spec("gradio") is None:
            raise ValueError("the page needs Gradio, which is not installed here: pip install .[demo]")
        check_port(args.host, args.port)
        choose_network(args)
        check_sampling_flags(args)
        device = choose_device(args.device)
        sampler = load_sampler(args, device)
    page = build_page(sampler, args, device).queue(default_concurrency_limit=1)
    with tf32(True):
        _, address, _ = page.launch(
            server_name=args.host, server_port=args.port, share=False, quiet=True, prevent_thread_lock=True, footer_links=[],
            theme=page_theme(),
        )  # fmt: skip
        print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
        page.block_thread()


def check_port(host: str, port: int) -> None:
    """Raise ValueError unless a server can listen there."""
    try:
        if not 0 < port < 2**16:
            raise OSError(None, "ports go from 1 to 65535")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a page that has just ended is not in the way
            probe.bind((host, port))
    except OSError as error:
        raise ValueError(
            f"--host {host} --port {port} cannot be used ({error.strerror}); if another program has the port, perhaps another "
            "page, end it or pass another --port"
        ) from None


def choose_network(args: argparse.Namespace) -> None:
    """Set --ckpt and --vae to the digits' if there is no --ckpt, and --ckpt to None, load_sampler's word for it, if RELEASED.

    Raises ValueError for an autoencoder without a checkpoint.
    """
    if args.ckpt is None:
        if "vae" in getattr(args, "said", ()):
            raise ValueError(
                f"--vae {args.vae} goes with --ckpt; without it the page opens on digits, which have their own"
            )
        args.ckpt, args.vae = DIGITS, DIGITS_VAE
    elif args.ckpt == RELEASED:
        args.ckpt = None


# ---- from choices to pictures ----


def class_choices(network: DiT, classes: list[str] | None) -> list[tuple[str, int]]:
    """[(text, class index)] to search in: the number and the name, the number alone if there is no other name."""
    texts = captions(range(network.num_classes), network.num_classes, classes)
    return [(text if text == str(i) else f"{i}: {text}", i) for i, text in enumerate(texts)]


def read_seed(text: str) -> int:
    """The seed that a visitor wrote. Raises ValueError if it is none."""
    text = str(text).strip()
    if not text.isdecimal() or len(text) > len(str(SEEDS)) or int(text) >= SEEDS:
        raise ValueError(f"The seed is {text[:40]!r}; it must be a whole number from 0 to 2^63 - 1, such as 0.")
    return int(text)


def whole(name: str, number: float) -> int:
    """The number that a visitor gave, as an int; its bounds are the page's business. Raises ValueError if it is not whole."""
    if not isinstance(number, (int, float)) or number % 1:
        raise ValueError(f"{name} is {number}; it must be a whole number.")
    return int(number)


def chosen_labels(classes: list[int], count: int, num_classes: int) -> list[int]:
    """The class indices of `count` images, for which the chosen classes take turns. Raises ValueError if none is chosen."""
    if num_classes == 0:
        return [0] * count  # placeholders: the network is not given them
    if not isinstance(classes, list) or not classes:
        raise ValueError("No class is chosen: search for one by its name or number.")
    if not all(type(label) is int and 0 <= label < num_classes for label in classes):
        raise ValueError(f"The classes are {classes}; give a list of whole numbers from 0 to {num_classes - 1}.")
    return [classes[i % len(classes)] for i in range(count)]


def draw(
    sampler: Sampler, labels: list[int], seed: int, device: torch.device
) -> Iterator[tuple[int, Image.Image, Image.Image | None]]:
    """Yields (steps done, PIL picture of the images as predicted, None) at up to about GIF_MOMENTS steps, and at the end
    (steps, picture of the images, strip of how the first STRIP_ROWS came about).

    Image i depends on (seed, i), its label and the sampler alone, up to rounding. Raises ValueError as Sampler.decode.
    """
    texts = captions(labels, sampler.network.num_classes, readable(sampler.classes))
    noise_fn = ImageNoise(seed, range(len(labels)), device)
    noise = noise_fn(torch.empty(len(labels), *sampler.latent, device=device))
    steps, frames = len(sampler.steps()), []
    in_strip = evenly(steps, STRIP_MOMENTS)
    previewed = {*evenly(steps, GIF_MOMENTS), *in_strip}
    for i, out in enumerate(sampler.trajectory(torch.tensor(labels, device=device), noise, noise_fn)):
        if i in previewed:
            images = sampler.decode(out["pred_xstart"]).cpu().numpy()
            if i in in_strip:
                frames.append((out["t"], images[:STRIP_ROWS]))
            yield i + 1, picture(images, texts), None
    images = sampler.decode(out["sample"]).cpu().numpy()
    yield steps, picture(images, texts), strip([*frames[:-1], (None, images[:STRIP_ROWS])], texts[:STRIP_ROWS])


def answer(
    base: Sampler, args: argparse.Namespace, device: torch.device, classes: list[int], count: float, guidance: float,
    solver: str, steps: float, seed: str,
) -> Iterator[tuple[str, Image.Image | str, Image.Image | None, str | None]]:  # fmt: skip
    """draw for a visitor's choices, of a base Sampler; yields (status, picture, strip, PNG file), the last two None before
    the end. At the end the picture is that file too, which is gone when the generator goes on.

    Raises ValueError for choices that make no sense.
    """
    count, steps = whole("How many images", count), whole("Steps", steps)
    if not isinstance(guidance, (int, float)) or solver not in SOLVERS:
        raise ValueError(f"Guidance is {guidance} and the solver {solver}; give a number, and one of {', '.join(SOLVERS)}.")
    number, labels = read_seed(seed), chosen_labels(classes, count, base.network.num_classes)
    sampler = replace(base, cfg_scale=guidance, sampler=solver, num_sampling_steps=steps)
    chosen = {
        "cfg_scale": guidance,
        "sampler": solver,
        "num_sampling_steps": steps,
        "seed": number,
        "class_labels": labels,
    }
    for done, drawn, rows in draw(sampler, labels, number, device):
        if rows is None:
            yield f"Step {done} of {steps}", drawn, None, None
    with TemporaryDirectory() as folder:
        path = str(Path(folder) / f"dit-seed-{number}.png")
        save(drawn, path, settings(args) | chosen)
        yield f"Seed {number}", path, rows, path


def settings(args: argparse.Namespace) -> dict:
    """What a picture depends on beside a visitor's choices, to be written into it; not where files lie on this machine."""
    names = {"ckpt": Path(args.ckpt or RELEASED).name, "vae": Path(args.vae).name}
    return {key: value for key, value in vars(args).items() if key not in ("host", "port", "said")} | names


# ---- the page ----


def build_page(sampler: Sampler, args: argparse.Namespace, device: torch.device) -> "gradio.Blocks":
    """The page, a gradio.Blocks that does not run yet."""
    import gradio as gr

    def respond(*choices):
        try:
            for text, drawn, rows, path in answer(sampler, args, device, *choices):
                yield text, drawn, rows, gr.DownloadButton(value=path, interactive=path is not None)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except torch.OutOfMemoryError:
            raise gr.Error(
                "The device's memory is too small for this: draw fewer images.", print_exception=False
            ) from None

    with gr.Blocks(title="DiT", analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as page:
        gr.Markdown("# DiT")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                choices, button = controls(gr, sampler)
            with gr.Column(scale=2, min_width=400):
                look = {"show_label": False, "interactive": False, "buttons": ["fullscreen"]}
                status = gr.Markdown("Nothing drawn yet", container=True)
                shown = gr.Image(label="Images", height=360, **look)
                download = gr.DownloadButton("Download PNG, with its settings inside", interactive=False)
                gr.Markdown(
                    f"How the first {STRIP_ROWS} came about: what the network took for the clean image at step t"
                )
                rows = gr.Image(label="Over time", format="png", height=380, **look)
        gr.Markdown(HELP)
        outputs = [status, shown, rows, download]
        gr.on([button.click, choices[-1].submit], respond, choices, outputs, show_progress_on=status)
    return page


def page_theme() -> "gradio.themes.Default":
    """Gradio's look in the fonts of the visitor's system, so that nothing is fetched from elsewhere."""
    import gradio as gr

    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def controls(gr: ModuleType, sampler: Sampler) -> tuple[list, "gradio.Button"]:
    """The inputs in the order of `answer`, and the button, in the part of the page that is being built."""
    network = sampler.network
    total, has_classes, guidable = network.num_classes, network.num_classes > 0, network.null_label is not None
    classes = gr.Dropdown(
        class_choices(network, readable(sampler.classes)), multiselect=True,
        value=sorted({i * total // COUNT for i in range(COUNT)}) if total else [],
        visible=has_classes, label="Classes", info="type a name or number to search",
    )  # fmt: skip
    count = gr.Slider(1, MOST_IMAGES, COUNT, step=1, label="How many images")
    guidance = gr.Slider(
        1, MOST_GUIDANCE, GUIDANCE if guidable else 1, step=0.1, visible=guidable, label="Guidance", info="1 is none"
    )
    solver = gr.Dropdown(list(SOLVERS), value=SOLVER, label="Solver")
    steps = gr.Slider(1, max(one.most for one in SOLVERS.values()), SOLVERS[SOLVER].steps, step=1, label="Steps")
    seed = gr.Textbox("0", label="Seed", max_lines=1)
    solver.change(lambda name: SOLVERS[name].steps, solver, steps, api_visibility="private")
    return [classes, count, guidance, solver, steps, seed], gr.Button("Draw", variant="primary")


if __name__ == "__main__":
    main()
