"""What stands where on the page: a gradio.Blocks with controls, pictures and their texts."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
import json
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from conditions.labels import readable
from page.drawing import (
    LONGEST_PROMPT, LONGEST_PROMPTS, MOST_GUIDANCE, MOST_IMAGES, STRIP_ROWS, Written, answer,
    class_choices,
)  # fmt: skip
from page.visitors import Visitors, endpoint
from sampling.sampler import Sampler

if TYPE_CHECKING:
    import gradio  # which is slow to import, and need not be there

GUIDANCE, COUNT = 1.5, 10  # what the page opens with
QUEUE = "drawing"  # the one in which all networks' visitors wait
HOUR = 3600  # seconds
HELP = (
    "Several classes take turns: the first image is of the first class, and so on. Image *i* "
    "depends on its class, *i*, the seed, guidance, solver and steps, up to rounding; not on how "
    "many images there are, nor on other visitors."
)
HELP_ON_TEXT = (
    "Several prompts take turns: the first image is of the first line, and so on. Image *i* "
    "depends on its prompt, the negative prompt, *i*, the seed, guidance, solver and steps, up to "
    "rounding; not on how many images there are, nor on other visitors."
)


class Shown(NamedTuple):
    """A network that the page shows.

    name: its tab's, where there are several; sampler: what draws, with the solver and the steps
    that the tab opens with; settings: as for `answer`. The tab opens with this guidance, for a
    network that can be guided, and with these prompts, for one that reads text.
    """

    name: str
    sampler: Sampler
    settings: dict[str, Any]
    guidance: float = GUIDANCE
    prompts: tuple[str, ...] = ()


def build_page(
    networks: Sequence[Shown], device: torch.device, visitors: Visitors
) -> "gradio.Blocks":
    """The page, a gradio.Blocks that does not run yet: a tab for each network, none for one alone.

    Network number i, from 0, is asked at endpoint(i). All networks' visitors wait in one queue.
    """
    import gradio as gr

    with gr.Blocks(title="DiT", analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as page:
        gr.Markdown("# DiT")
        if len(networks) == 1:
            add_network(gr, networks[0], endpoint(0), device, visitors)
            return page
        with gr.Tabs():
            for place, network in enumerate(networks):
                with gr.Tab(network.name):
                    add_network(gr, network, endpoint(place), device, visitors)
    return page


def add_network(
    gr: ModuleType, network: Shown, api_name: str, device: torch.device, visitors: Visitors
) -> None:
    """Add a network's controls and pictures to the part of the page that is being built."""
    sampler, settings = network.sampler, network.settings
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            choices, button = controls(gr, network)
        with gr.Column(scale=2, min_width=400):
            look = {"show_label": False, "interactive": False, "buttons": ["fullscreen"]}
            status = gr.Markdown("Nothing drawn yet", container=True)
            shown = gr.Image(
                label="Clips" if sampler.makes_clips else "Images", height=360, **look
            )
            download = gr.DownloadButton(
                "Download PNG, with its settings inside", interactive=False
            )
            gr.Markdown(
                f"How the first {STRIP_ROWS} came about: what the network took for the clean "
                f"{'middle frame' if sampler.makes_clips else 'image'} at time t"
            )
            rows = gr.Image(label="Over time", format="png", height=380, **look)
    gr.Markdown(HELP_ON_TEXT if sampler.reads_text else HELP)
    outputs = [status, shown, rows, download]
    gr.on(
        [button.click, choices[-1].submit], responder(sampler, settings, device, visitors),
        choices, outputs, show_progress_on=status, api_name=api_name, preprocess=False,
        concurrency_id=QUEUE,
    )  # fmt: skip


def responder(
    sampler: Sampler, settings: dict[str, Any], device: torch.device, visitors: Visitors
) -> Callable[..., Iterator[tuple]]:
    """What answers a visitor's choices, in the order of `controls`, with the page's outputs."""
    import gradio as gr

    def respond(
        asked: object, count: object, guidance: object, solver: object, steps: object,
        seed: object, request: gr.Request,
    ) -> Iterator[tuple]:  # fmt: skip
        wanted = partial(visitors.waits_for, request.session_hash)
        try:
            answered = answer(
                sampler, settings, device, asked, count, guidance, solver, steps, seed, wanted
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

    def respond_to_text(
        prompts: object, negative: object, count: object, guidance: object, solver: object,
        steps: object, seed: object, request: gr.Request,
    ) -> Iterator[tuple]:  # fmt: skip
        asked = Written(prompts, negative)
        yield from respond(asked, count, guidance, solver, steps, seed, request)

    return respond_to_text if sampler.reads_text else respond


def page_theme() -> "gradio.themes.Default":
    """Gradio's look in the fonts of the visitor's system.

    So nothing is fetched from elsewhere.
    """
    import gradio as gr

    return gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )


def controls(gr: ModuleType, network: Shown) -> tuple[list, "gradio.Button"]:
    """The inputs in the order of `answer`, and the button.

    All are in the part of the page that is being built.
    """
    sampler = network.sampler
    guidable = sampler.condition.has_null
    asked = prompt_boxes(gr, network.prompts) if sampler.reads_text else class_boxes(gr, sampler)
    count = gr.Slider(1, MOST_IMAGES, COUNT, step=1, label="How many images")
    guidance = gr.Slider(
        1, MOST_GUIDANCE, network.guidance if guidable else 1, step=0.1, visible=guidable,
        label="Guidance", info="1 is none",
    )  # fmt: skip
    solvers = sampler.process.solvers
    solver = gr.Dropdown(list(solvers), value=sampler.sampler, label="Solver")
    steps = gr.Slider(
        1, max(one.most for one in solvers.values()), sampler.num_sampling_steps, step=1,
        label="Steps",
    )  # fmt: skip
    seed = gr.Textbox("0", label="Seed", max_lines=1)
    own = json.dumps({name: one.steps for name, one in solvers.items()})
    solver.change(None, solver, steps, js=f"name => ({own})[name]")
    return [*asked, count, guidance, solver, steps, seed], gr.Button("Draw", variant="primary")


def class_boxes(gr: ModuleType, sampler: Sampler) -> list:
    """The input for classes, hidden for a network without."""
    total = sampler.network.num_classes
    classes = gr.Dropdown(
        class_choices(sampler.network, readable(sampler.classes)), multiselect=True,
        value=sorted({i * total // COUNT for i in range(COUNT)}) if total else [],
        visible=total > 0, label="Classes", info="type a name or number to search",
    )  # fmt: skip
    return [classes]


def prompt_boxes(gr: ModuleType, written: Sequence[str]) -> list:
    """The inputs for prompts, with those that are written there, and for the negative prompt."""
    prompts = gr.Textbox(
        "\n".join(written), label="Prompts", lines=4, max_length=LONGEST_PROMPTS,
        info="one a line; an empty line between others is the empty prompt",
    )  # fmt: skip
    negative = gr.Textbox(
        label="Negative prompt", info="what guidance leads away from; may be empty", max_lines=1,
        max_length=LONGEST_PROMPT,
    )  # fmt: skip
    return [prompts, negative]
