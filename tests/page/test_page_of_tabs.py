"""The page of several networks, a tab for each: what it opens with, and one queue for all."""

from io import BytesIO
from itertools import groupby
import json

from PIL import Image
import pytest

import app
from conftest import ROOT, fill_randomly
from models import DiT
from page import drawing, visitors
from page.layout import QUEUE, Shown
from page.visitors import Visitors, endpoint
from processes.flow import FlowProcess
from sampling.loading import QUICK
from sampling.pictures import SETTINGS
from sampling.sampler import Sampler
from test_app import (  # noqa: F401  browser, gradio and visit are fixtures
    CPU, STEPS, Slow, TINY, ask, begin, browser, chosen_by, downloaded, free_port, gradio, listen,
    request, served, visit,
)  # fmt: skip
from written import reader

WORDS = ["a cat\na dog", "", 3, 2.0, "euler", 2, "5"]  # what the first tab is asked for
CLASSES = [[1, 2], 3, 2.0, "ddpm", STEPS, "6"]  # and the second
SECOND = endpoint(1)


class Noted(Slow):
    """Pixels that note under a name when they are shown."""

    def __init__(self, name, notes):
        super().__init__()
        self.name, self.notes = name, notes

    def decode(self, latents):
        self.notes.append(self.name)
        return super().decode(latents)


@pytest.fixture(scope="module")
def notes():
    """The names of the networks in the order in which they showed something."""
    return []


@pytest.fixture(scope="module")
def networks(notes):
    """A small network that reads text and one of classes, each with random weights."""
    words = Sampler(
        reader(), Noted("words", notes), None, 20, "euler", process=FlowProcess()
    )
    network = fill_randomly(DiT(**TINY, num_classes=3)).eval().requires_grad_(False)
    classes = Sampler(network, Noted("classes", notes), None, STEPS)
    return [
        Shown("Words", words, {"ckpt": "words"}, 4.0, ("a cat", "a dog")),
        Shown("Classes", classes, {"ckpt": "classes"}, 2.5),
    ]


@pytest.fixture(scope="module")
def live(networks):
    """The port of a page of both networks in this process."""
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install .[demo]")
    port = free_port()
    with (
        app.private_folder() as folder,
        app.served(networks, CPU, folder, ("127.0.0.1", port)),
    ):
        yield port


@pytest.fixture(scope="module")
def page(networks):
    """The page of both networks, which does not run."""
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install .[demo]")
    return app.build_page(networks, CPU, Visitors(""))


def test_the_page_opens_on_emoji_and_on_digits_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, openings = chosen_by()
    words, classes, digits = (app.opened(opening, args, CPU) for opening in openings)
    assert words.sampler.reads_text and words.prompts and words.sampler.image_size == 64
    assert classes.sampler.network.num_classes == 12 and classes.sampler.image_size == 64
    assert digits.sampler.network.num_classes == 10 and digits.sampler.sampler == QUICK
    names = [network.settings["ckpt"] for network in (words, classes, digits)]
    assert names == ["text.safetensors", "classes.safetensors", "dit.safetensors"]
    for network, opening in zip((words, classes, digits), openings):
        settings = network.settings
        assert settings["sampler"] == network.sampler.sampler and settings["vae"] == "vae"
        assert settings["image_size"] == network.sampler.image_size
        choices = [network.guidance, network.sampler.sampler, network.sampler.num_sampling_steps]
        asked = "\n".join(network.prompts) if network.prompts else [0]
        drawing.read_choices(network.sampler, asked, 1, *choices, "0")  # refuses nothing
        assert len(network.prompts) <= drawing.MOST_IMAGES and opening.name


def test_each_tab_has_controls_of_its_own_and_opens_with_its_own_choices(page):
    tabs = [block for block in page.blocks.values() if type(block).__name__ == "Tab"]
    assert [tab.label for tab in tabs] == ["Words", "Classes"]
    functions = {fn.api_name: fn for fn in page.fns.values()}
    found = [
        {block.label: block.value for block in functions[name].inputs}
        for name in (visitors.ENDPOINT, SECOND)
    ]
    assert (found[0]["Prompts"], found[0]["Guidance"]) == ("a cat\na dog", 4.0)
    assert (found[0]["Solver"], found[0]["Steps"]) == ("euler", 20)
    assert (found[1]["Classes"], found[1]["Guidance"]) == ([0, 1, 2], 2.5)
    assert (found[1]["Solver"], found[1]["Steps"]) == ("ddpm", STEPS)
    parts = [
        {block._id for block in [*functions[name].inputs, *functions[name].outputs]}
        for name in (visitors.ENDPOINT, SECOND)
    ]
    assert not parts[0] & parts[1]


def test_a_network_alone_has_no_tab(gradio, networks):
    page = app.build_page(networks[:1], CPU, Visitors(""))
    assert not {"Tab", "Tabs"} & {type(block).__name__ for block in page.blocks.values()}
    assert SECOND not in {fn.api_name for fn in page.fns.values()}


def test_both_tabs_answer_with_their_own_networks_and_settings(live):
    for choices, name, ckpt, asked in (
        (WORDS, visitors.ENDPOINT, "words", {"prompt": ["a cat", "a dog", "a cat"], "seed": 5}),
        (CLASSES, SECOND, "classes", {"class_labels": [1, 2, 1], "seed": 6}),
    ):
        event, (status, shown, _, download) = listen(live, ask(live, choices, name)[1], name)
        assert (event, status) == ("complete", f"Seed {asked['seed']}")
        _, content = request(live, "GET", f"{visitors.FILE}{download['value']['path']}")
        settings = json.loads(Image.open(BytesIO(content)).text[SETTINGS])
        assert settings.items() >= (asked | {"ckpt": ckpt}).items()


def test_a_tab_refuses_what_the_other_takes(live):
    assert ask(live, CLASSES)[0] == ask(live, WORDS, SECOND)[0] == 422  # another number of choices
    for choices, name, message in (
        ([["a cat"], *WORDS[1:]], visitors.ENDPOINT, "What is to be drawn is"),
        (["a cat", *CLASSES[1:]], SECOND, "No class is chosen"),
        ([*CLASSES[:3], "euler", *CLASSES[4:]], SECOND, "The solver is 'euler'; it must be one of"),
    ):
        event, data = listen(live, ask(live, choices, name)[1], name)
        assert event == "error" and data["error"].startswith(message)


def test_drawings_of_both_tabs_wait_for_one_another(page, live, notes, monkeypatch):
    functions = {fn.api_name: fn for fn in page.fns.values()}
    assert functions[visitors.ENDPOINT].concurrency_id == functions[SECOND].concurrency_id == QUEUE
    monkeypatch.setattr(visitors, "PATIENCE", 60)  # while the other is listened to
    notes.clear()
    first = ask(live, [[0], 1, 1.0, "ddpm", 30, "0"], SECOND)[1]
    second = ask(live, ["a cat", "", 1, 1.0, "euler", 30, "0"])[1]
    assert listen(live, second)[0] == listen(live, first, SECOND)[0] == "complete"
    assert [name for name, _ in groupby(notes)] == ["classes", "words"] and len(notes) > 20


def test_a_visitor_has_a_few_jobs_at_a_time_in_all_tabs_together(live, monkeypatch):
    monkeypatch.setattr(visitors, "PATIENCE", 60)
    config = json.loads(request(live, "GET", "/config")[1])
    numbers = {one["api_name"]: one["id"] for one in config["dependencies"]}
    endless = {
        visitors.ENDPOINT: ["a cat", "", 16, 2.0, "euler", 1000, "0"],
        SECOND: [[0], 16, 2.0, "ddpm", 1000, "0"],
    }
    statuses = []
    for i in range(visitors.MOST_EACH + 1):
        name = (visitors.ENDPOINT, SECOND)[i % 2]
        asked = {"data": endless[name], "fn_index": numbers[name], "session_hash": "greedy"}
        statuses.append(request(live, "POST", visitors.JOIN, asked)[0])
    assert statuses == [200] * visitors.MOST_EACH + [429]


# ---- in a browser ----


@pytest.mark.long
def test_emoji_by_words_in_a_browser_and_digits_one_click_away(tmp_path, visit):
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install .[demo]")
    with served(tmp_path) as address:
        page = visit(address)
        begin(page, "2026")
        written = page.get_by_label("Prompts").input_value().splitlines()
        first = json.loads(downloaded(page, 2026)[1].text[SETTINGS])
        assert first["ckpt"] == "text.safetensors" and first["prompt"][: len(written)] == written
        (ROOT / "demo").mkdir(exist_ok=True)
        page.screenshot(path=ROOT / "demo" / "page.png", full_page=True)
        page.get_by_role("tab", name="Digits").click()
        begin(page.get_by_role("tabpanel"), "7")
        second = json.loads(downloaded(page, 7)[1].text[SETTINGS])
        assert second["ckpt"] == "dit.safetensors" and second["class_labels"] == [*range(10)]
