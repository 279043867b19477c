"""A page in the browser for sampling: choose classes, guidance and solver, and watch the images
come about.

    python app.py                                            # the digits of examples/digits, with nothing to download
    python app.py --ckpt released                            # the released XL/2, ImageNet at 256 pixels, names to search
    python app.py --ckpt results/000-DiT-XL-2 --vae ema --port 7861

Needs Gradio: pip install .[demo]. Visitors wait for one another; what they draw does not depend on
it.
"""

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
import errno
from functools import partial
import json
import os
from pathlib import Path
import reprlib
import signal
import socket
from tempfile import TemporaryDirectory
import threading
import time
from types import ModuleType
from typing import TYPE_CHECKING

from PIL import Image
import torch

from runtime.devices import choose_device, tf32
from models import DiT
from sampling.pictures import (
    GIF_MOMENTS, STRIP_MOMENTS, captions, evenly, legible, picture, save, strip,
)  # fmt: skip
from conditions.labels import readable
from sampling.loading import load_sampler
from processes.table import SOLVERS
from sampling.sampler import ImageNoise, Sampler
from sampling.flags import add_network_flags, check_sampling_flags
from runtime.surroundings import is_installed
from page.visitors import ENDPOINT, Gate, Visitors

if TYPE_CHECKING:
    import gradio  # which is slow to import, and need not be there

EXAMPLE = Path(__file__).resolve().parent / "examples" / "digits"
DIGITS, DIGITS_VAE = str(EXAMPLE / "dit.safetensors"), str(EXAMPLE / "vae")
RELEASED, RELEASED_VAE = "released", "mse"
SOLVER, GUIDANCE, MOST_GUIDANCE = "dpm++", 1.5, 10.0
COUNT, MOST_IMAGES = 10, 16
STRIP_ROWS = 4  # of sixteen images at 512 pixels a strip would have 34 million pixels
SEEDS = 2**63
WHOLE = "whole number"
MOST_WAITING = 16  # drawings in the queue, of all visitors
HOUR, END_SECONDS = 3600, 2
ALL = "everybody who reaches this machine, without a password"
ADVICE = {
    errno.EADDRINUSE: "another program has the port, perhaps another page; end it or pass another --port",
    errno.EACCES: "ports below 1024 are the administrator's; pass another --port",
}
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
        help=f"address of this machine to listen at. The default, %(default)s, lets in its own users alone; 0.0.0.0 (::, with "
        f"IPv6) lets in {ALL}. To reach a page on another machine, leave this as it is and open an SSH tunnel: "
        "ssh -L 7860:localhost:7860 MACHINE",
    )
    group.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    network = add_network_flags(
        parser,
        vae=RELEASED_VAE,
        without=f"the digits of {EXAMPLE.parent.name}/{EXAMPLE.name} beside this file and their own VAE; {RELEASED} is the "
        "released network, fetched on first use",
    )
    network.add_argument(
        "--device", help="such as cpu or cuda:1 (default: the GPU if there is one)"
    )
    parser.set_defaults(  # what visitors choose, and what nobody does
        sampler=SOLVER, num_sampling_steps=SOLVERS[SOLVER].steps, cfg_scale=1.0, eta=0.0, cfg_channels=3,
        cfg_interval=[0.0, 1.0], mixed_precision="no", compile=False,
    )  # fmt: skip
    return parser


@door("--image-size")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    with ended_by_signals(), parser.refusing():
        if not is_installed("gradio"):
            raise ValueError(
                "the page needs Gradio, which is not installed here: pip install .[demo]"
            )
        check_address(args.host, args.port)
        choose_network(args)
        check_sampling_flags(args)
        device = choose_device(args.device)
        serve(load_sampler(args, device), args, device)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within it, in the main thread, Ctrl-C, SIGTERM and a closed terminal raise SystemExit, once,
    with 128 + the number.
    """
    handled = [
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    ]
    before = {number: signal.getsignal(number) for number in handled}

    def end(number, frame):
        for other in handled:
            signal.signal(other, signal.SIG_IGN)  # what follows cleans up
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in handled:
        # As nohup has it
        if number != getattr(signal, "SIGHUP", None) or before[number] is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number] or signal.SIG_DFL)


@contextmanager
def private_folder() -> Iterator[str]:
    """A new folder for the page's pictures that this user alone can read, gone afterwards; Gradio
    is told of it.

    Raises ValueError if there is no place for one.
    """
    before = os.environ.get("GRADIO_TEMP_DIR")
    try:
        folder = TemporaryDirectory(
            prefix="dit-page-", dir=before or None, ignore_cleanup_errors=True
        )
    except OSError as error:
        raise ValueError(
            f"there is no place for temporary files ({error.strerror or error}); set TMPDIR to a folder that you can write"
        ) from None
    with folder as path:
        os.environ["GRADIO_TEMP_DIR"] = os.path.realpath(path)
        try:
            yield os.environ["GRADIO_TEMP_DIR"]
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            os.environ.update({"GRADIO_TEMP_DIR": before} if before else {})


def check_address(host: str, port: int) -> None:
    """Raise ValueError unless a server can listen there."""
    if not 0 < port < 2**16:
        raise ValueError(f"--port is {port}; ports go from 1 to 65535")
    try:
        if not host.strip():
            raise OSError(None, "it is empty")
        family, kind, protocol, _, place = socket.getaddrinfo(
            bare(host), port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # A page that has just ended is not in the way
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except (OSError, UnicodeError) as error:
        advice = ADVICE.get(
            getattr(error, "errno", None) or 0, "give an address of this machine, such as 127.0.0.1"
        )
        reason = getattr(error, "strerror", None) or "no host has such a name"
        raise ValueError(
            f"--host {host} --port {port} cannot be used ({reason}); {advice}"
        ) from None


def bare(host: str) -> str:
    """A host without the brackets that IPv6 has in addresses of pages."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def choose_network(args: argparse.Namespace) -> None:
    """Set --ckpt and --vae to the digits' if there is no --ckpt, and --ckpt to None, load_sampler's
    word for it, if RELEASED.

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
    """[(text, class index)] to search in: the number and the name, the number alone if there is no
    other name.
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
    """The class indices of `count` images, for which the chosen classes take turns.

    Raises ValueError if none is chosen.
    """
    if num_classes == 0:
        return [0] * count  # placeholders: the network is not given them
    if not isinstance(classes, list) or not classes:
        raise ValueError("No class is chosen: search for one by its name or number.")
    if not all(type(label) is int and 0 <= label < num_classes for label in classes):
        raise ValueError(
            f"The classes are {reprlib.repr(classes)}; give a list of whole numbers from 0 to {num_classes - 1}."
        )
    return [classes[i % len(classes)] for i in range(count)]


def always() -> bool:
    """True."""
    return True


def draw(
    sampler: Sampler, labels: list[int], seed: int, device: torch.device,
    wanted: Callable[[], bool] = always,
) -> Iterator[tuple[int, Image.Image, Image.Image | None]]:  # fmt: skip
    """Yields (steps done, PIL picture of the images as predicted, None) at up to about GIF_MOMENTS
    steps, and at the end (steps, picture of the images, strip of how the first STRIP_ROWS came
    about).

    Image i depends on (seed, i), its label and the sampler alone, up to rounding. Raises ValueError
    as Sampler.decode, and before a step if wanted() does not hold.
    """
    texts = captions(labels, sampler.network.num_classes, readable(sampler.classes))
    noise_fn = ImageNoise(seed, range(len(labels)), device)
    noise = noise_fn(torch.empty(len(labels), *sampler.latent, device=device))
    steps, frames = len(sampler.steps()), []
    in_strip = evenly(steps, STRIP_MOMENTS)
    previewed = {*evenly(steps, GIF_MOMENTS), *in_strip}
    way = sampler.trajectory(torch.tensor(labels, device=device), noise, noise_fn)
    for i, out in enumerate(while_wanted(way, wanted)):
        if i in previewed:
            images = sampler.decode(out["pred_xstart"]).cpu().numpy()
            if i in in_strip:
                frames.append((out["t"], images[:STRIP_ROWS]))
            yield i + 1, picture(images, texts), None
    images = sampler.decode(out["sample"]).cpu().numpy()
    yield (
        steps, picture(images, texts),
        strip([*frames[:-1], (None, images[:STRIP_ROWS])], texts[:STRIP_ROWS]),
    )  # fmt: skip


def while_wanted(way: Iterator[dict], wanted: Callable[[], bool]) -> Iterator[dict]:
    """What `way` yields. Raises ValueError before its next step if wanted() does not hold."""
    for _ in iter(wanted, False):
        if (step := next(way, None)) is None:
            return
        yield step
    raise ValueError("Nobody waits for these images any more, so they were not drawn to the end.")


def answer(
    base: Sampler, args: argparse.Namespace, device: torch.device, classes: object, count: object,
    guidance: object, solver: object, steps: object, seed: object,
    wanted: Callable[[], bool] = always,
) -> Iterator[tuple[str, Image.Image | str, Image.Image | None, str | None]]:  # fmt: skip
    """draw for a visitor's choices, of whatever type, of a base Sampler; yields (status, picture,
    strip, PNG file), the last two None before the end. At the end the picture is that file too,
    which is gone when the generator goes on.

    Raises ValueError for choices that make no sense, before any work, and as draw.
    """
    sampler, chosen = read_choices(base, classes, count, guidance, solver, steps, seed)
    number, labels = chosen["seed"], chosen["class_labels"]
    for done, drawn, rows in draw(sampler, labels, number, device, wanted):
        if rows is None:
            yield f"Step {done} of {sampler.num_sampling_steps}", drawn, None, None
    with TemporaryDirectory() as folder:  # Gradio copies what is not in its own
        path = str(Path(folder) / f"dit-seed-{number}.png")
        save(drawn, path, settings(args) | chosen)
        yield f"Seed {number}", path, rows, path


def read_choices(
    base: Sampler, classes: object, count: object, guidance: object, solver: object, steps: object,
    seed: object,
) -> tuple[Sampler, dict]:  # fmt: skip
    """(the Sampler for a visitor's choices, the settings that they are).

    Raises ValueError for those that make no sense.
    """
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise ValueError(
            f"The solver is {reprlib.repr(solver)}; it must be one of {', '.join(SOLVERS)}."
        )
    steps = whole("Steps", steps, 1, SOLVERS[solver].most)
    guidance = bounded(
        "Guidance", guidance, 1, MOST_GUIDANCE if base.network.null_label is not None else 1
    )
    labels = chosen_labels(
        classes, whole("How many images", count, 1, MOST_IMAGES), base.network.num_classes
    )
    chosen = dict(
        cfg_scale=guidance, sampler=solver, num_sampling_steps=steps, seed=read_seed(seed),
        class_labels=labels,
    )  # fmt: skip
    return replace(base, cfg_scale=guidance, sampler=solver, num_sampling_steps=steps), chosen


def settings(args: argparse.Namespace) -> dict:
    """What a picture depends on beside a visitor's choices, to be written into it; not where files
    lie on this machine.
    """
    names = {"ckpt": Path(args.ckpt or RELEASED).name, "vae": Path(args.vae).name}
    return {
        key: value for key, value in vars(args).items() if key not in ("host", "port", "said")
    } | names


# ---- the page ----


def serve(sampler: Sampler, args: argparse.Namespace, device: torch.device) -> None:
    """Run the page until SystemExit ends it. Raises ValueError if it cannot be started."""
    try:
        with (
            tf32(True), private_folder() as folder,
            served(sampler, args, device, folder) as address,
        ):  # fmt: skip
            print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
            while True:
                time.sleep(HOUR)
    except SystemExit as end:
        others = [
            one
            for one in threading.enumerate()
            if not one.daemon and one is not threading.main_thread()
        ]
        for thread in others:
            thread.join(END_SECONDS / len(others))
        # Python would wait for the step that it computes
        if any(thread.is_alive() for thread in others):
            os._exit(int(end.code or 0))
        raise


@contextmanager
def served(
    sampler: Sampler, args: argparse.Namespace, device: torch.device, folder: str
) -> Iterator[str]:
    """Within it, the page runs, at the address that comes back, with its files in the folder.

    Raises ValueError if it cannot be started.
    """
    from starlette.middleware import Middleware

    visitors = Visitors(folder)
    page = build_page(sampler, args, device, visitors)
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)
    visitors.queue = page._queue
    function = next(number for number, fn in page.fns.items() if fn.api_name == ENDPOINT)
    gate = Middleware(Gate, visitors, function, len(page.fns[function].inputs))
    host = bare(args.host)
    ask_directly(host)
    try:
        _, address, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host, server_port=args.port, share=False,
            quiet=True, prevent_thread_lock=True, footer_links=[], theme=page_theme(),
            app_kwargs={"middleware": [gate]}, max_file_size=1, ssr_mode=False, mcp_server=False,
            enable_monitoring=False,
        )  # fmt: skip
    except Exception as error:  # Gradio raises many kinds, for one a bare Exception
        page.close(verbose=False)
        raise ValueError(
            f"the page cannot be started ({error}); try another --host or --port"
        ) from None
    try:
        yield address
    finally:
        visitors.closed = True
        page.close(verbose=False)


def ask_directly(host: str) -> None:
    """Have this process reach itself without the proxy that the environment may name: Gradio asks
    whether its server is up.
    """
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(
        filter(None, [others, "localhost", host])
    )


def build_page(
    sampler: Sampler, args: argparse.Namespace, device: torch.device, visitors: Visitors
) -> "gradio.Blocks":
    """The page, a gradio.Blocks that does not run yet."""
    import gradio as gr

    def respond(
        classes: object, count: object, guidance: object, solver: object, steps: object,
        seed: object, request: gr.Request,
    ) -> Iterator[tuple]:  # fmt: skip
        wanted = partial(visitors.waits_for, request.session_hash)
        try:
            answered = answer(
                sampler, args, device, classes, count, guidance, solver, steps, seed, wanted
            )
            for text, drawn, rows, path in answered:
                yield text, drawn, rows, gr.DownloadButton(value=path, interactive=path is not None)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except torch.OutOfMemoryError:
            raise gr.Error(
                "The device's memory is too small for this: draw fewer images.",
                print_exception=False,
            ) from None
        finally:
            visitors.tidy()

    with gr.Blocks(title="DiT", analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as page:
        gr.Markdown("# DiT")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                choices, button = controls(gr, sampler)
            with gr.Column(scale=2, min_width=400):
                look = {"show_label": False, "interactive": False, "buttons": ["fullscreen"]}
                status = gr.Markdown("Nothing drawn yet", container=True)
                shown = gr.Image(label="Images", height=360, **look)
                download = gr.DownloadButton(
                    "Download PNG, with its settings inside", interactive=False
                )
                gr.Markdown(
                    f"How the first {STRIP_ROWS} came about: what the network took for the clean image at step t"
                )
                rows = gr.Image(label="Over time", format="png", height=380, **look)
        gr.Markdown(HELP)
        outputs = [status, shown, rows, download]
        gr.on(
            [button.click, choices[-1].submit], respond, choices, outputs, show_progress_on=status,
            api_name=ENDPOINT, preprocess=False,
        )  # fmt: skip
    return page


def page_theme() -> "gradio.themes.Default":
    """Gradio's look in the fonts of the visitor's system, so that nothing is fetched from
    elsewhere.
    """
    import gradio as gr

    return gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )


def controls(gr: ModuleType, sampler: Sampler) -> tuple[list, "gradio.Button"]:
    """The inputs in the order of `answer`, and the button, in the part of the page that is being
    built.
    """
    network = sampler.network
    total, has_classes, guidable = (
        network.num_classes, network.num_classes > 0, network.null_label is not None,
    )  # fmt: skip
    classes = gr.Dropdown(
        class_choices(network, readable(sampler.classes)), multiselect=True,
        value=sorted({i * total // COUNT for i in range(COUNT)}) if total else [],
        visible=has_classes, label="Classes", info="type a name or number to search",
    )  # fmt: skip
    count = gr.Slider(1, MOST_IMAGES, COUNT, step=1, label="How many images")
    guidance = gr.Slider(
        1, MOST_GUIDANCE, GUIDANCE if guidable else 1, step=0.1, visible=guidable, label="Guidance",
        info="1 is none",
    )  # fmt: skip
    solver = gr.Dropdown(list(SOLVERS), value=SOLVER, label="Solver")
    steps = gr.Slider(
        1, max(one.most for one in SOLVERS.values()), SOLVERS[SOLVER].steps, step=1, label="Steps"
    )
    seed = gr.Textbox("0", label="Seed", max_lines=1)
    own = json.dumps({name: one.steps for name, one in SOLVERS.items()})
    solver.change(None, solver, steps, js=f"name => ({own})[name]")
    return [classes, count, guidance, solver, steps, seed], gr.Button("Draw", variant="primary")


if __name__ == "__main__":
    main()
