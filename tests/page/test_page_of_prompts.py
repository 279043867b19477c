"""The page of a network that reads text: what visitors may write, and what is drawn of it."""

from dataclasses import replace
import json
from pathlib import Path

import numpy as np
from PIL import Image
import pytest

import app
from page import drawing, visitors
from page.drawing import LONGEST_PROMPT, LONGEST_PROMPTS, Written
from page.layout import Shown
from page.visitors import Visitors
from processes.flow import FlowProcess
from sampling.pictures import SETTINGS
from sampling.sampler import Sampler
from test_app import CPU, ask, free_port, listen, request
from vae import PixelSpace
from written import LONG, PROMPTS, READ, reader, saved

CHOICES = ["a thick three\n\na thin seven leaning left", "", 3, 2.0, "euler", 2, "5"]


@pytest.fixture(scope="module")
def sampler():
    return Sampler(reader(), PixelSpace(), None, 2, "euler", process=FlowProcess())


def answered(sampler, prompts, negative="", count=3, guidance=2.0, seed="5"):
    """The last of what `answer` yields, the picture and its settings."""
    *_, last = _kept(
        drawing.answer(
            sampler, {}, CPU, Written(prompts, negative), count, guidance, "euler", 2, seed
        )
    )
    return last


def _kept(found):
    """Each answer, its file read before it is gone: (status, picture, settings or None)."""
    for status, drawn, _, path in found:
        if path is None:
            yield status, np.asarray(drawn), None
        else:
            with Image.open(path) as image:
                yield status, np.asarray(image), json.loads(image.text[SETTINGS])


def test_the_page_draws_prompts_in_turn_and_keeps_them(sampler):
    status, drawn, settings = answered(sampler, CHOICES[0] + "\n", "thin", count=4)
    turns = [*PROMPTS, PROMPTS[0]]
    kept = ("prompt", "negative_prompt", "cfg_scale", "seed")
    assert (status, [settings[name] for name in kept]) == ("Seed 5", [turns, "thin", 2.0, 5])
    guided = replace(sampler, cfg_scale=2.0, negative_prompt="thin")
    latents = guided.numbered_latents(5, range(4), guided.conditions(turns))
    texts = drawing.captions(turns, 0, None)
    assert np.array_equal(drawn, drawing.picture(guided.decode(latents).numpy(), texts))


def test_an_empty_box_is_the_empty_prompt_and_a_long_one_is_told(sampler):
    assert answered(sampler, " \n ")[2]["prompt"] == [""] * 3
    status, _, settings = answered(sampler, LONG, count=1)
    assert settings["prompt"] == [LONG] and status.startswith("Seed 5; the prompt ")
    assert status.endswith(f'is too long for the network, which reads "{READ}" of it')


@pytest.mark.parametrize("prompts, negative, guidance, message", [
    (["a"], "", 2.0, "What is to be drawn is .'a'.; it must be a text of at most 16,016"),
    (None, "", 2.0, "What is to be drawn is None; it must be a text"),
    ("x" * (LONGEST_PROMPTS + 1), "", 2.0, "What is to be drawn is 'xx.*; it must be a text"),
    ("a\n" + "x" * (LONGEST_PROMPT + 1), "", 2.0, "Line 2 of the prompts is .*at most 1,000 char"),
    ("a \udcff", "", 2.0, "What is to be drawn is .*; it must be a text"),
    ("a", 3, 2.0, "The negative prompt is 3; it must be a text"),
    ("a", "x" * (LONGEST_PROMPT + 1), 2.0, "The negative prompt is 'xx.*at most 1,000 characters"),
    ("a", "b", 1, "A negative prompt needs guidance, and 1 is none: choose more, or none"),
    ("a", "", 11, "Guidance is 11; it must be a number from 1 to 10"),
])  # fmt: skip
def test_nonsense_gets_one_readable_message(sampler, prompts, negative, guidance, message):
    with pytest.raises(ValueError, match=message) as refused:
        answered(sampler, prompts, negative, guidance=guidance)
    text = str(refused.value)
    assert len(text) < 200 and text.isprintable() and text[0].isupper()


def test_the_page_opens_on_a_checkpoint_that_reads_text(tmp_path, monkeypatch):
    ckpt, opened = saved(tmp_path / "words.safetensors", reader()), []
    monkeypatch.setattr(app, "is_installed", lambda name: True)
    monkeypatch.setattr(app, "serve", lambda *given: opened.append(given))
    app.main(["--ckpt", ckpt, "--vae", "none", "--device", "cpu", "--port", str(free_port())])
    ((((_, found, settings, *_),), _, _),) = opened
    assert found.reads_text and settings["cfg_channels"] == "all"


def test_boxes_for_prompts_stand_in_the_place_of_classes(sampler):
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install .[demo]")
    page = app.build_page([Shown("", sampler, {})], CPU, Visitors(""))
    labels = [getattr(block, "label", None) for block in page.blocks.values()]
    assert {"Prompts", "Negative prompt", "Guidance"} <= {*labels} and "Classes" not in labels
    (function,) = [fn for fn in page.fns.values() if fn.api_name == visitors.ENDPOINT]
    assert len(function.inputs) == len(CHOICES)


def test_a_visitor_gets_what_the_prompts_say(sampler):
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install .[demo]")
    place = ("127.0.0.1", free_port())
    networks = [Shown("", sampler, {})]
    with app.private_folder() as folder, app.served(networks, CPU, folder, place):
        name, (status, _, _, download) = listen(place[1], ask(place[1], CHOICES)[1])
        assert (name, status) == ("complete", "Seed 5")
        code, content = request(place[1], "GET", f"{visitors.FILE}{download['value']['path']}")
        (Path(folder) / "shown.png").write_bytes(content)
        with Image.open(Path(folder) / "shown.png") as image:
            assert json.loads(image.text[SETTINGS])["prompt"] == PROMPTS
        name, data = listen(place[1], ask(place[1], [["a"], *CHOICES[1:]])[1])
        assert name == "error" and data["error"].startswith("What is to be drawn is")
        assert ask(place[1], CHOICES[1:])[0] == 422
