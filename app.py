"""A page for sampling: choose classes or write prompts, and watch the images come about.

    python app.py                     # emoji by words, by class, and digits: nothing to download
    python app.py --ckpt released     # the released XL/2, ImageNet at 256 pixels, names to search
    python app.py --ckpt results/000-DiT-XL-2 --vae ema --port 7861

Needs Gradio: pip install .[demo]. Visitors wait for one another; what they draw does not depend on
it.
"""

from runtime.command_line import Parser, door, end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()  # what follows takes seconds to import

import argparse
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
import errno
import os
from pathlib import Path
import signal
import socket
from tempfile import TemporaryDirectory
import threading
import time
from typing import Any, NamedTuple

import torch

from checkpoints.choice import NetworkChoice
from checkpoints.loading import find_files
from page.layout import GUIDANCE, HOUR, Shown, build_page, page_theme
from page.visitors import Function, Gate, Visitors, endpoint
from runtime.devices import choose_device, tf32
from runtime.surroundings import is_installed
from sampling.flags import (
    CHECKPOINT_SAYS, add_encoder_flag, add_network_flags, check_flags, network_choice,
)  # fmt: skip
from sampling.loading import VAE, build_sampler
from sampling.options import OWN, SamplingOptions
from sampling.sampler import Sampler

EXAMPLES = Path(__file__).resolve().parent / "examples"
EMOJI, DIGITS = EXAMPLES / "emoji", EXAMPLES / "digits"
RELEASED = "released"
MOST_WAITING = 16  # drawings in the queue, of all visitors
END_SECONDS = 2
ALL = "everybody who reaches this machine, without a password"
ADVICE = {
    errno.EADDRINUSE:
        "another program has the port, perhaps another page; end it or pass another --port",
    errno.EACCES: "ports below 1024 are the administrator's; pass another --port",
}


class Opening(NamedTuple):
    """A network of the page, and what its tab opens with, until a visitor chooses something else.

    name: the tab's, where there are several; options: the solver and its steps; guidance and
    prompts as in Shown.
    """

    name: str
    choice: NetworkChoice
    options: SamplingOptions = SamplingOptions()
    guidance: float = GUIDANCE
    prompts: tuple[str, ...] = ()


# On which the page opens without --ckpt
OPENINGS = (
    Opening(
        "Emoji by words", NetworkChoice(EMOJI / "text.safetensors", vae=EMOJI / "vae"),
        SamplingOptions("heun", 20), 4.0,
        ("a green apple", "blue heart", "cat with a hat", "smiling face", "blue strawberry"),
    ),
    Opening(
        "Emoji by class", NetworkChoice(EMOJI / "classes.safetensors", vae=EMOJI / "vae"),
        SamplingOptions("heun", 20, cfg_channels="all"), 3.0,
    ),
    Opening("Digits", NetworkChoice(DIGITS / "dit.safetensors", vae=DIGITS / "vae")),
)  # fmt: skip


def build_parser() -> Parser:
    parser = Parser(__file__, description=__doc__)
    group = parser.add_argument_group("page")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        help="address of this machine to listen at. The default, %(default)s, lets in its own "
        f"users alone; 0.0.0.0 (::, with IPv6) lets in {ALL}. To reach a page on another machine, "
        "leave this as it is and open an SSH tunnel: ssh -L 7860:localhost:7860 MACHINE",
    )
    group.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    network = add_network_flags(
        parser,
        VAE,
        without=f"emoji and digits, of the networks in {EXAMPLES.name}/ beside this file and their "
        f"own VAEs; {RELEASED} is the released network, fetched on first use",
    )
    add_encoder_flag(network)
    network.add_argument(
        "--device", help="such as cpu or cuda:1 (default: the GPU if there is one)"
    )
    return parser


@door("--image-size")
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args, given = parser.parse_args(argv), parser.given(argv)
    with ended_by_signals(), parser.refusing():
        if not is_installed("gradio"):
            raise ValueError(
                "the page needs Gradio, which is not installed here: pip install .[demo]"
            )
        check_address(args.host, args.port)
        openings = choose_networks(args, given)
        check_flags(args)
        device = choose_device(args.device)
        networks = [opened(opening, args, device) for opening in openings]
        serve(networks, device, (args.host, args.port))


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within it, Ctrl-C, SIGTERM and a closed terminal raise SystemExit, with 128 + the number.

    The exception is raised once, and in the main thread.
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
    """A new folder for the page's pictures that this user alone can read, gone afterwards.

    Gradio is told of it. Raises ValueError if there is no place for one.
    """
    before = os.environ.get("GRADIO_TEMP_DIR")
    try:
        folder = TemporaryDirectory(
            prefix="dit-page-", dir=before or None, ignore_cleanup_errors=True
        )
    except OSError as error:
        raise ValueError(
            f"there is no place for temporary files ({error.strerror or error}); set TMPDIR to a "
            "folder that you can write"
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


def choose_networks(args: argparse.Namespace, given: Collection[str]) -> tuple[Opening, ...]:
    """The networks that the flags ask for: one with --ckpt, OPENINGS without. `given` are the names
    of the flags that the command line gives.

    Raises ValueError for a flag about a network without a checkpoint.
    """
    choice = network_choice(args, given)
    if choice.ckpt is not None:
        return (Opening("", replace(choice, ckpt=None) if choice.ckpt == RELEASED else choice),)
    for field in fields(choice):
        if getattr(choice, field.name) != field.default:
            raise ValueError(
                f"`{field.name}` goes with `ckpt`; without `ckpt` the page opens on emoji and "
                f"digits, which need no such flag: pass `ckpt`, or leave `{field.name}` out"
            )
    return OPENINGS


def opened(opening: Opening, args: argparse.Namespace, device: torch.device) -> Shown:
    """A network of the page, loaded.

    Raises ValueError for a checkpoint and an autoencoder that do not fit together.
    """
    files = find_files(opening.choice, VAE)
    sampler = build_sampler(opening.choice, files, opening.options, device, quick=True)
    settings = picture_settings(args, opening, files.vae, sampler)
    return Shown(opening.name, sampler, settings, opening.guidance, opening.prompts)


def picture_settings(
    args: argparse.Namespace, opening: Opening, vae: str, sampler: Sampler
) -> dict[str, Any]:
    """What a picture depends on beside a visitor's choices, to be written into it.

    Where files lie on this machine is not in it, nor what the checkpoint answers.
    """
    left_out = {"host", "port"} | {
        name for name in CHECKPOINT_SAYS if getattr(opening.choice, name) is None
    }  # fmt: skip
    flags = {name: value for name, value in vars(args).items() if name not in left_out}
    names = {"ckpt": Path(opening.choice.ckpt or RELEASED).name, "vae": Path(vae).name}
    chosen = dict.fromkeys(("sampler", "num_sampling_steps", "cfg_scale"))  # come first
    settled = opening.options.settled(
        sampler.process, sampler.sampler, sampler.reads_text, sampler.makes_clips
    )
    # A solver's own come with a visitor's choice
    options = {name: value for name, value in settled.items() if name not in OWN}
    size = {"image_size": sampler.image_size}
    return flags | names | size | chosen | options | {"frames": sampler.frames}


# ---- the page ----


def serve(networks: Sequence[Shown], device: torch.device, address: tuple[str, int]) -> None:
    """Run the page of these networks at an address, (host, port), until SystemExit ends it.

    Raises ValueError if it cannot be started.
    """
    try:
        with (
            tf32(True), private_folder() as folder,
            served(networks, device, folder, address) as url,
        ):  # fmt: skip
            print(f"the page is at {url} (Ctrl-C ends it)", flush=True)
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
    networks: Sequence[Shown], device: torch.device, folder: str, address: tuple[str, int]
) -> Iterator[str]:
    """Within it, the page runs at an address, (host, port), with its files in the folder; its URL
    comes back.

    Raises ValueError if it cannot be started.
    """
    from starlette.middleware import Middleware

    visitors = Visitors(folder)
    page = build_page(networks, device, visitors)
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)
    visitors.queue = page._queue
    numbers = {fn.api_name: number for number, fn in page.fns.items()}
    names = map(endpoint, range(len(networks)))
    functions = {
        name: Function(numbers[name], len(page.fns[numbers[name]].inputs)) for name in names
    }
    gate = Middleware(Gate, visitors, functions)
    host, port = bare(address[0]), address[1]
    ask_directly(host)
    try:
        _, url, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host, server_port=port, share=False,
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
        yield url
    finally:
        visitors.closed = True
        page.close(verbose=False)


def ask_directly(host: str) -> None:
    """Have this process reach itself without the proxy that the environment may name.

    Gradio asks whether its server is up.
    """
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(
        filter(None, [others, "localhost", host])
    )


if __name__ == "__main__":
    main()
