"""The page: what it draws, without a browser; and, with one, that people get what they ask for."""

import asyncio
from contextlib import contextmanager
from dataclasses import replace
import http.client
from io import BytesIO
import json
import os
from pathlib import Path
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
from PIL import Image
import pytest
import torch

import app
from page import drawing, visitors
from checkpoints.weights import Weights, save_weights
from conftest import ROOT, fill_randomly
from models import DiT
from sampling.pictures import LEAST_TILE, MARGIN, PER_ROW, STRIP_MOMENTS
from conditions.labels import imagenet_names
from page.layout import Shown
from sampling.loading import QUICK, VAE
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from sampling.sampler import Sampler
from vae import PixelSpace
from page.visitors import ENDPOINT, Function, Gate, Visitors

CPU = torch.device("cpu")
STEPS = 4
TINY = dict(input_size=8, patch_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2)
FACTOR = LEAST_TILE // 32  # by which the picture enlarges digits
DIGITS = ["--ckpt", str(app.DIGITS / "dit.safetensors"), "--vae", str(app.DIGITS / "vae")]


def arguments(*flags):
    """The arguments of a command line, and the network that it chooses."""
    args, openings = chosen_by(*flags)
    (opening,) = openings
    return args, opening


def chosen_by(*flags):
    """The arguments of a command line, and the networks that it chooses."""
    parser, words = app.build_parser(), [*flags, "--device", "cpu"]
    args = parser.parse_args(words)
    return args, app.choose_networks(args, parser.given(words))


def opened(*flags):
    """The Sampler that the page opens with."""
    args, opening = arguments(*flags)
    return app.opened(opening, args, CPU).sampler


@pytest.fixture(scope="module")
def digits():
    return opened(*DIGITS)


@pytest.fixture(scope="module")
def quick(digits):
    return replace(digits, sampler="ddpm", num_sampling_steps=STEPS, cfg_scale=1.5)


def tiles(canvas, count, side=LEAST_TILE):
    """The images uint8 (count, side, side, 3) of a picture with captions."""
    pixels, below = np.asarray(canvas.convert("RGB")), 12 + 2 * MARGIN
    corners = [
        (MARGIN + i // PER_ROW * (side + below), MARGIN + i % PER_ROW * (side + MARGIN))
        for i in range(count)
    ]
    return np.stack([pixels[top : top + side, left : left + side] for top, left in corners])


def drawn(sampler, labels, seed):
    """The images (N, 32, 32, 3), as int, at the end of draw."""
    *_, (_, canvas, _) = drawing.draw(sampler, labels, seed, CPU)
    return tiles(canvas, len(labels))[:, ::FACTOR, ::FACTOR].astype(int)


def refusal(capsys, *flags):
    """What main says of these flags before it leaves."""
    with pytest.raises(SystemExit) as left:
        app.main(list(flags))
    assert left.value.code == 2
    return capsys.readouterr().err


# ---- the door ----


def test_a_checkpoint_alone_is_on_the_page_and_for_this_machine_alone(digits):
    args, opening = arguments("--ckpt", "x.pt")
    assert (args.host, args.port) == ("127.0.0.1", 7860)
    assert opening.choice.ckpt == "x.pt" and opening.choice.vae is None and VAE == "mse" == args.vae
    assert arguments("--ckpt", "released")[1].choice.ckpt is None
    assert digits.classes == [str(i) for i in range(10)] and digits.sampler == QUICK


def test_without_gradio_one_message_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    message = refusal(capsys).splitlines()[-1]
    assert message.endswith(
        "error: the page needs Gradio, which is not installed here: pip install .[demo]"
    )


@pytest.fixture
def with_gradio(monkeypatch):
    """As if it were installed: what is tested comes before it is imported."""
    monkeypatch.setattr(app, "is_installed", lambda name: True)


def test_taken_and_impossible_ports_are_refused_with_what_to_do(capsys, with_gradio):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refusal(capsys, "--port", str(port)).splitlines()[-1]
    assert (
        f"--port {port} cannot be used (Address already in use)" in message
        and "pass another --port" in message
    )
    app.check_address("127.0.0.1", port)  # free again
    assert "from 1 to 65535" in refusal(capsys, "--port", "70000")
    for host in ("no.such.host.invalid", " ", "192.0.2.1", "a" * 80, ".."):
        assert "cannot be used" in refusal(capsys, f"--host={host}")


@pytest.mark.skipif(not socket.has_ipv6, reason="there is no IPv6 here")
def test_ipv6_addresses_are_taken_with_and_without_brackets():
    for host in ("::1", "[::1]"):
        app.check_address(host, free_port())


def test_help_says_whom_a_host_lets_in(capsys):
    with pytest.raises(SystemExit):
        app.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "0.0.0.0 (::, with IPv6) lets in everybody who reaches this machine, without a password"
        in said
    )
    assert "ssh -L 7860:localhost:7860" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_the_page_with_their_code_and_clean_up(number):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left, app.ended_by_signals(), app.private_folder() as folder:
        assert os.stat(folder).st_mode & 0o777 == 0o700 and os.environ["GRADIO_TEMP_DIR"] == folder
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert left.value.code == 128 + number and not os.path.exists(folder)
    assert signal.getsignal(number) == before and "GRADIO_TEMP_DIR" not in os.environ


def test_without_a_place_for_temporary_files_one_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "missing"))
    with pytest.raises(
        ValueError, match="no place for temporary files .No such file or directory.; set"
    ):
        with app.private_folder():
            pass


@pytest.mark.parametrize("flag, value", [
    ("--vae", "ema"), ("--image-size", "64"), ("--weights", "raw"), ("--num-classes", "10"),
])  # fmt: skip
def test_a_flag_about_a_network_without_one_is_refused(capsys, with_gradio, flag, value):
    said = refusal(capsys, flag, value, "--port", str(free_port())).splitlines()[-1]
    assert f"{flag} goes with --ckpt; without" in said and f"leave {flag} out" in said


# ---- choices ----


def test_seeds_are_whole_numbers_below_2_to_the_63():
    assert [drawing.read_seed(text) for text in ("0", " 7 ", str(2**63 - 1))] == [0, 7, 2**63 - 1]
    for wrong in ("", "seven", "-1", "1.5", "1e3", "²", str(2**63), "9" * 5000):
        with pytest.raises(ValueError, match="it must be a whole number from 0 to"):
            drawing.read_seed(wrong)


def test_classes_take_turns():
    assert drawing.chosen_labels([3, 1, 4], 5, 10) == [3, 1, 4, 3, 1]
    assert drawing.chosen_labels([], 3, 0) == [0, 0, 0]
    with pytest.raises(ValueError, match="No class is chosen"):
        drawing.chosen_labels([], 3, 10)


def test_choices_have_numbers_and_names(digits):
    network = DiT(**TINY, num_classes=1000)
    choices = drawing.class_choices(network, imagenet_names())
    assert len(choices) == 1000 and choices[207] == ("207: golden retriever", 207)
    assert drawing.class_choices(network, None)[207] == ("207", 207)
    assert drawing.class_choices(digits.network, digits.classes)[3] == ("3", 3)


def test_names_that_no_encoding_holds_can_be_sent(digits):
    names = ["\udcff", "two\nlines", "x" * 10**6]
    choices = drawing.class_choices(DiT(**TINY, num_classes=3), names)
    assert (
        json.dumps(choices, ensure_ascii=False).encode()
        and choices[1][0] == "1: two lines"
        and len(choices[2][0]) < 300
    )


@pytest.mark.parametrize("value", [
    float("nan"), float("inf"), -float("inf"), 1e308, 10**400, True, None, "x" * 10**6, "\ud800",
    [1], {"path": "x"}, -1, [[1]],
], ids=lambda value: repr(value)[:12])  # fmt: skip
@pytest.mark.parametrize("place", range(6))
def test_whatever_is_no_choice_is_refused_in_one_short_line(digits, place, value):
    choices = [[7], 1, 1.5, "dpm++", STEPS, "0"]
    if (place, value) == (0, [1]):
        return
    choices[place] = value
    with pytest.raises(ValueError) as refused:
        drawing.read_choices(digits, *choices)
    message = str(refused.value)
    assert (
        len(message) < 200 and message.encode() and message.isprintable() and message[0].isupper()
    )


def test_classes_are_whole_numbers_and_no_booleans(digits):
    for wrong in ([True], [0.0], [-1], ["1"], [None]):
        with pytest.raises(
            ValueError, match="The classes are .*; give a list of whole numbers from 0 to 9"
        ):
            drawing.chosen_labels(wrong, 1, 10)


def test_guidance_is_refused_for_a_network_without_a_null_class():
    sampler = Sampler(DiT(**TINY, num_classes=3, class_dropout_prob=0), PixelSpace(), None)
    assert drawing.read_choices(sampler, [0], 1, 1, "ddim", 5, "0")[1]["cfg_scale"] == 1
    with pytest.raises(ValueError, match="Guidance is 2; it must be a number from 1 to 1"):
        drawing.read_choices(sampler, [0], 1, 2, "ddim", 5, "0")


# ---- drawing ----


def test_drawing_ends_before_the_next_step_when_nobody_waits(quick):
    asked = iter([True, True, False])
    drawn = drawing.draw(quick, [1], 0, CPU, lambda: next(asked))
    assert [next(drawn)[0], next(drawn)[0]] == [1, 2]
    with pytest.raises(ValueError, match="Nobody waits for these images"):
        next(drawn)


def test_an_image_depends_on_its_class_the_seed_and_its_place_alone(quick):
    torch.manual_seed(1)
    three = drawn(quick, [3, 1, 4], seed=5)
    torch.manual_seed(2)
    four = drawn(quick, [8, 1, 4, 4], seed=5)
    assert np.abs(three[1:] - four[1:3]).max() <= 1  # rounding: the batch has another size
    for other in (three[0] - four[0], four[2] - four[3], three - drawn(quick, [3, 1, 4], seed=6)):
        assert np.abs(other).max() > 50
    expected = quick.decode(quick.numbered_latents(5, range(3), torch.tensor([3, 1, 4]))).numpy()
    assert np.array_equal(three, expected)


def test_two_drawings_that_take_turns_do_not_disturb_each_other(quick):
    alone = list(drawing.draw(quick, [1, 2], 7, CPU))
    turns = zip(
        drawing.draw(quick, [1, 2], 7, CPU),
        drawing.draw(replace(quick, cfg_scale=1.0), [3, 4, 5], 8, CPU),
        strict=True,
    )  # fmt: skip
    assert [pair[0][1].tobytes() for pair in turns] == [canvas.tobytes() for _, canvas, _ in alone]


def test_previews_come_before_the_strip_of_the_first_images(digits):
    sampler = replace(digits, sampler="ddim", num_sampling_steps=40)
    *previews, (done, last, strip) = drawing.draw(sampler, [0, 1, 2, 3, 4], 0, CPU)
    steps = [step for step, _, _ in previews]
    assert (
        steps == sorted(set(steps))
        and steps[0] == 1
        and steps[-1] == done == 40
        and 30 <= len(steps) <= 38
    )
    assert (
        all(rows is None for _, _, rows in previews) and previews[0][1].tobytes() != last.tobytes()
    )
    size = LEAST_TILE + MARGIN
    assert strip.size == (
        STRIP_MOMENTS * size + MARGIN,
        drawing.STRIP_ROWS * (size + 12 + MARGIN) + MARGIN,
    )
    end = np.asarray(strip)[MARGIN : MARGIN + LEAST_TILE, -MARGIN - LEAST_TILE : -MARGIN]
    assert np.array_equal(end, tiles(last, 1)[0])


def test_a_single_step_has_a_preview_and_a_strip(digits):
    single = replace(digits, sampler="ddpm", num_sampling_steps=1)
    assert len(list(drawing.draw(single, [0], 0, CPU))) == 2


def test_the_png_has_the_settings_that_were_asked_for(digits):
    settings = app.picture_settings(*arguments(*DIGITS), DIGITS[-1], digits)
    for answered in drawing.answer(digits, settings, CPU, [7, 2], 3, 2.5, "unipc", STEPS, "11"):
        status, shown, rows, path = answered
        assert (path is None) == (rows is None)
        if path:
            with Image.open(path) as image:
                settings, images = json.loads(image.text["settings"]), tiles(image, 3)
    assert status == "Seed 11" and shown == path and not Path(path).exists()
    sampler = replace(digits, sampler="unipc", num_sampling_steps=STEPS, cfg_scale=2.5)
    assert np.array_equal(images[:, ::FACTOR, ::FACTOR], drawn(sampler, [7, 2, 7], 11))
    asked = dict(
        class_labels=[7, 2, 7], cfg_scale=2.5, sampler="unipc", num_sampling_steps=STEPS, seed=11
    )
    assert settings.items() >= asked.items()
    assert (
        settings["ckpt"] == "dit.safetensors"
        and settings["vae"] == "vae"
        and "port" not in settings
    )
    assert str(ROOT) not in str(settings)
    # The checkpoint says them
    assert not {"model", "num_classes", "process", "text_encoder"} & settings.keys()
    said = app.picture_settings(*arguments(*DIGITS, "--num-classes", "10"), DIGITS[-1], digits)
    assert said["num_classes"] == 10


def test_wrong_choices_are_value_errors(digits):
    for choices, message in (
        (([7], 1, 4.0, "dpm++", STEPS, "seven"), "The seed is 'seven'"),
        (([], 1, 4.0, "dpm++", STEPS, "0"), "No class is chosen"),
        (([7], 2.5, 4.0, "dpm++", STEPS, "0"), "How many images is 2.5; it must be a whole number"),
        (([7], 1, 4.0, "dpm++", 3.5, "0"), "Steps is 3.5; it must be a whole number"),
        (
            ([7], 1, 4.0, "dpm++", 1000, "0"),
            "Steps is 1000; it must be a whole number from 1 to 999",
        ),
        (
            ([7], None, 4.0, "dpm++", STEPS, "0"),
            "How many images is None; it must be a whole number",
        ),
        (([7], 1, None, "dpm++", STEPS, "0"), "Guidance is None"),
        (([7], 1, 4.0, "euler", STEPS, "0"), "The solver is 'euler'; it must be one of ddpm"),
        (([7], 1, 4.0, "dpm++", STEPS, None), "The seed is 'None'"),
        (([10], 1, 4.0, "dpm++", STEPS, "0"), "give a list of whole numbers from 0 to 9"),
        ((7, 1, 4.0, "dpm++", STEPS, "0"), "No class is chosen"),
    ):
        with pytest.raises(ValueError, match=message):
            next(drawing.answer(digits, {}, CPU, *choices))


@pytest.fixture
def flow(tmp_path):
    """The Sampler that the page has of a flow of random weights on pixels."""
    config = {**TINY, "num_classes": 3, "learn_sigma": False}
    state = fill_randomly(DiT(**config), std=0.3).state_dict()
    path = tmp_path / "dit.safetensors"
    save_weights(path, Weights(state, config, None, process=FlowProcess().config))
    return opened("--ckpt", str(path), "--vae", "none")


@pytest.mark.parametrize("solver", FlowProcess.solvers)
def test_a_flow_is_drawn_by_its_own_solvers(flow, solver, monkeypatch):
    assert (flow.sampler, flow.num_sampling_steps) == ("heun", 125)
    settings, told = app.picture_settings(*arguments(*DIGITS), "none", flow), []
    monkeypatch.setattr(drawing, "strip", lambda frames, texts: told.append(frames))
    way = drawing.answer(flow, settings, CPU, [2, 0], 2, 1.5, solver, STEPS, "7")
    *_, (_, _, _, path) = iter_copied(way)
    settings = json.loads(path.text["settings"])
    assert settings["sampler"] == solver and settings["num_sampling_steps"] == STEPS
    own = FlowProcess.solvers[solver].options
    assert settings.items() >= own.items()
    others = {name for one in FlowProcess.solvers.values() for name in one.options} - set(own)
    # Flags of the page that a solver lacks are not there at all
    assert not others & settings.keys()
    sampler = replace(flow, sampler=solver, num_sampling_steps=STEPS, cfg_scale=1.5)
    assert [t for t, _ in told[0]] == [*sampler.steps()[:-1], None]
    want = sampler.decode(sampler.numbered_latents(7, range(2), torch.tensor([2, 0])))
    enlarged = tiles(path, 2)[:, :: LEAST_TILE // 8, :: LEAST_TILE // 8]
    assert np.array_equal(enlarged, want.numpy())


def iter_copied(way):
    """What `way` yields, the file of its end as an image, before the file is gone."""
    for status, shown, rows, path in way:
        if path:
            path = Image.open(path)
            path.load()
        yield status, shown, rows, path


def test_what_a_flow_cannot_draw_is_refused(flow, digits):
    for sampler, solver, steps, message in (
        (flow, "ddpm", 5, "The solver is 'ddpm'; it must be one of euler, heun, dopri5, sde"),
        (digits, "heun", 5, "The solver is 'heun'; it must be one of ddpm"),
        (flow, "sde", 1, "Steps is 1; it must be a whole number from 2 to 10000"),
    ):
        with pytest.raises(ValueError, match=message):
            drawing.read_choices(sampler, [0], 1, 1.5, solver, steps, "0")


# ---- the page without a browser ----


@pytest.fixture
def gradio():
    return pytest.importorskip("gradio", reason="the page needs Gradio: pip install .[demo]")


def shown_controls(sampler):
    page = app.build_page([Shown("", sampler, {})], CPU, Visitors(""))
    assert not page.analytics_enabled
    controls = {
        block.label: block for block in page.blocks.values() if getattr(block, "label", None)
    }
    return {label: control for label, control in controls.items() if control.visible}


def test_controls_for_a_network_with_a_thousand_names(gradio):
    controls = shown_controls(
        Sampler(DiT(**TINY, num_classes=1000), PixelSpace(), imagenet_names())
    )
    assert controls["Classes"].choices[207] == ("207: golden retriever", 207)
    assert controls["Classes"].value == list(range(0, 1000, 100))
    assert [name for name, _ in controls["Solver"].choices] == list(GaussianProcess.solvers)
    assert (controls["Guidance"].minimum, controls["Guidance"].maximum) == (1, 10)
    assert (controls["How many images"].minimum, controls["How many images"].maximum) == (1, 16)


def test_the_page_of_a_flow_offers_its_solvers(gradio, flow, digits):
    controls = shown_controls(flow)
    assert [name for name, _ in controls["Solver"].choices] == list(FlowProcess.solvers)
    assert (controls["Solver"].value, controls["Steps"].value) == ("heun", 125)
    controls = shown_controls(digits)
    assert (controls["Solver"].value, controls["Steps"].value) == (QUICK, 20)


def test_what_a_network_does_not_have_is_not_shown(gradio):
    always = {"How many images", "Solver", "Steps", "Seed"}
    shown = shown_controls(Sampler(DiT(**TINY, num_classes=0), PixelSpace(), None)).keys()
    assert always <= shown and not {"Classes", "Guidance"} & shown
    unguided = DiT(**TINY, num_classes=3, class_dropout_prob=0)
    shown = shown_controls(Sampler(unguided, PixelSpace(), None)).keys()
    assert always | {"Classes"} <= shown and "Guidance" not in shown


# ---- visitors ----

CHOICES = [[0], 2, 1.5, "dpm++", STEPS, "0"]
CALL = f"{visitors.CALL}/{ENDPOINT}"
JSON = {"Content-Type": "application/json"}
OTHER = visitors.endpoint(1)


def at_the_gate(method, path, body=b"", chunk=2**16):
    """(status of the answer, what the app behind the Gate was given) for a request."""
    passed, answers = [], []
    chunks = [body[i : i + chunk] for i in range(0, len(body), chunk)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in chunks]
    messages[-1]["more_body"] = False

    async def behind(scope, receive, send):
        passed.append((await receive())["body"] if scope["method"] == "POST" else b"")
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return messages.pop(0)

    async def send(message):
        answers.append(message)

    there = Visitors("/folder")
    there.queue = SimpleNamespace(event_ids_to_events={}, pending_messages_per_session={"known"})
    scope = {
        "type": "http", "method": method, "path": path, "headers": [],
        "query_string": b"session_hash=known",
    }  # fmt: skip
    functions = {ENDPOINT: Function(number=3, inputs=6), OTHER: Function(number=5, inputs=7)}
    asyncio.run(Gate(behind, there, functions)(scope, receive, send))
    return answers[0]["status"], passed, len(messages)


@pytest.mark.parametrize(("method", "path"), [
    ("POST", "/gradio_api/upload"), ("POST", "/upload"), ("POST", "//gradio_api/upload"),
    ("PUT", "/gradio_api/upload"), ("POST", "/gradio_api/process_recording"),
    ("POST", "/gradio_api/component_server"), ("POST", "/gradio_api/run/respond"),
    ("POST", "/gradio_api/api/respond"), ("POST", "/gradio_api/stream/1"), ("POST", "/login"),
    ("GET", "/monitoring"), ("GET", "/gradio_api/proxy=http://other"),
    ("GET", "/gradio_api/file=http://other"), ("GET", "/gradio_api/file=/etc/passwd"),
    ("GET", "/gradio_api/file=/folder/../etc/passwd"), ("GET", "/gradio_api/deep_link"),
    ("GET", "/gradio_api/file/folder/a"), ("GET", "/gradio_api/call/respond/nobody"),
    ("GET", "/gradio_api/call/respond_3/known"), ("GET", "/gradio_api/call/respond/a/known"),
    ("POST", "/gradio_api/call/respond_3"), ("POST", "/gradio_api/call/"), ("DELETE", "/"),
])  # fmt: skip
def test_what_the_page_has_no_use_for_is_refused_unread(method, path):
    status, passed, unread = at_the_gate(method, path, b"x")
    assert status in (403, 404) and not passed and unread == 1


@pytest.mark.parametrize("path", [
    "/", "/config", "/theme.css", "/assets/a.js", "/gradio_api/info", "/gradio_api/queue/data",
    "/gradio_api/heartbeat/abc", "/gradio_api/file=/folder/a/image.webp",
    "/gradio_api/call/respond/known", "/gradio_api/call/respond_2/known",
])  # fmt: skip
def test_what_the_page_needs_is_let_through(path):
    assert at_the_gate("GET", path)[:2] == (200, [b""])


def test_of_a_job_gradio_is_told_what_it_needs_and_no_files():
    file = {"path": "http://other/", "meta": {"_type": "gradio.FileData"}}
    asked = {
        "data": [[file, 1, [2]], file, None, "ddpm", 5, "0"], "session_hash": "abc",
        "batched": True, "event_data": 1,
    }  # fmt: skip
    status, passed, _ = at_the_gate("POST", CALL, json.dumps(asked).encode(), chunk=7)
    told = json.loads(passed[0])
    assert (
        status == 200
        and told.keys() == {"data", "session_hash", "fn_index"}
        and told["fn_index"] == 3
    )
    assert not any(isinstance(value, dict) for value in [*told["data"], *told["data"][0]])
    assert told["data"][2:] == asked["data"][2:]
    assert told["data"][0][1] == 1 and "http://other/" in told["data"][1]


@pytest.mark.parametrize(("path", "number", "count", "want"), [
    (CALL, None, 6, 3), (CALL, 5, 6, 3), (f"{visitors.CALL}/{OTHER}", None, 7, 5),
    (visitors.JOIN, None, 6, 3), (visitors.JOIN, 3, 6, 3), (visitors.JOIN, 5, 7, 5),
    (visitors.JOIN, 5, 6, None), (visitors.JOIN, 3, 7, None), (visitors.JOIN, 4, 6, None),
    (visitors.JOIN, True, 6, None), (visitors.JOIN, "3", 6, None), (visitors.JOIN, [3], 6, None),
    (f"{visitors.CALL}/{OTHER}", 3, 6, None),
])  # fmt: skip
def test_a_job_is_for_one_of_the_pages_functions(path, number, count, want):
    asked = {"data": [0] * count} | ({} if number is None else {"fn_index": number})
    status, passed, _ = at_the_gate("POST", path, json.dumps(asked).encode())
    assert (status, [json.loads(body)["fn_index"] for body in passed]) == (
        (422, []) if want is None else (200, [want])
    )


@pytest.mark.parametrize(("body", "status"), [
    (b"", 422), (b"{", 422), (b"[]", 422), (b"null", 422), (b"[" * 100_000, 422),
    (b"9" * 5000, 422), (b"\xff", 422), (json.dumps({"data": CHOICES[1:]}).encode(), 422),
    (json.dumps({"data": CHOICES, "session_hash": "\ud800"}).encode(), 422),
    (b" " * (visitors.LARGEST_BODY + 1), 413), (json.dumps({"data": CHOICES}).encode(), 200),
], ids=lambda value: repr(value)[:12])  # fmt: skip
def test_requests_that_are_none_do_not_reach_gradio(body, status):
    answered, passed, _ = at_the_gate("POST", visitors.JOIN, body)
    assert (answered, len(passed)) == (status, status == 200)


def test_the_oldest_pictures_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr(visitors, "MOST_KEPT", 250)
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(bytes(100))
        os.utime(tmp_path / f"{i}.png", (i, i))
    Visitors(str(tmp_path)).tidy()
    assert sorted(os.listdir(tmp_path)) == ["2.png", "3.png"]


class Slow(PixelSpace):
    """Pixels that take a moment to be shown."""

    def decode(self, latents):
        time.sleep(0.02)
        return super().decode(latents)


@pytest.fixture(scope="module")
def live():
    """(port, folder) of a page in this process, with a small network of random weights."""
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install .[demo]")
    network = fill_randomly(DiT(**TINY, num_classes=3)).eval().requires_grad_(False)
    port = free_port()
    networks = [Shown("", Sampler(network, Slow(), None), {})]
    place = ("127.0.0.1", port)
    with app.private_folder() as folder, app.served(networks, CPU, folder, place):
        yield port, Path(folder)
    assert not Path(folder).exists()


def request(port, method, path, body=None):
    """(status, content) of an answer to the end."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(
        method, path, body if body is None or isinstance(body, bytes) else json.dumps(body), JSON
    )
    with connection.getresponse() as answer:
        return answer.status, answer.read()


def ask(port, choices, endpoint=ENDPOINT):
    """The status of the answer to a request for images, and what its job is called."""
    status, content = request(port, "POST", f"{visitors.CALL}/{endpoint}", {"data": choices})
    return status, json.loads(content).get("event_id")


def listen(port, job, endpoint=ENDPOINT):
    """The last event of a job, as (name, data)."""
    _, content = request(port, "GET", f"{visitors.CALL}/{endpoint}/{job}")
    *_, name, data = content.decode().strip().splitlines()
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_a_visitor_gets_a_picture_and_cannot_leave_a_byte(live):
    port, folder = live
    name, (status, shown, strip, download) = listen(port, ask(port, CHOICES)[1])
    assert name == "complete" and status == "Seed 0"
    for picture in (shown, strip, download["value"]):
        code, content = request(port, "GET", f"{visitors.FILE}{picture['path']}")
        assert code == 200 and Image.open(BytesIO(content)).format == "PNG"
    before = sorted(folder.rglob("*"))
    assert (
        request(
            port,
            "POST",
            "/gradio_api/upload",
            b'--x\r\nContent-Disposition: form-data; name="files"',
        )[0]
        == 403
    )
    assert sorted(folder.rglob("*")) == before


def test_nonsense_is_one_readable_error_over_the_api(live, capfd):
    port, _ = live
    for place, value in [
        (2, float("nan")), (1, 1e308), (4, True), (0, [[1]]), (0, {"path": "/etc/passwd"}),
        (5, "x" * 10**6),
    ]:  # fmt: skip
        name, data = listen(port, ask(port, [*CHOICES[:place], value, *CHOICES[place + 1 :]])[1])
        assert name == "error" and len(data["error"]) < 200 and data["error"][0].isupper()
    assert "Traceback" not in capfd.readouterr().err


def test_jobs_of_those_who_left_make_room(live, monkeypatch):
    port, _ = live
    monkeypatch.setattr(visitors, "PATIENCE", 60)  # while the asking takes its time
    endless = [[0], 16, 1.5, "ddpm", 1000, "0"]
    accepted = sum(ask(port, endless)[0] == 200 for _ in range(25))
    assert 1 <= accepted <= app.MOST_WAITING + 1
    monkeypatch.setattr(visitors, "PATIENCE", 0.5)
    time.sleep(0.6)
    began = time.monotonic()
    assert listen(port, ask(port, CHOICES)[1])[0] == "complete" and time.monotonic() - began < 5


def test_a_visitor_has_a_few_jobs_at_a_time(live, monkeypatch):
    port, _ = live
    monkeypatch.setattr(visitors, "PATIENCE", 60)
    asked = {"data": [[0], 16, 1.5, "ddpm", 1000, "0"], "session_hash": "greedy"}
    statuses = [
        request(port, "POST", visitors.JOIN, asked)[0] for _ in range(visitors.MOST_EACH + 1)
    ]
    assert statuses == [200] * visitors.MOST_EACH + [429]


# ---- the page in a browser ----


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def served(folder, *flags):
    """The address of `python app.py FLAGS`, run in the folder; it must end without ever having
    printed a traceback.
    """
    command = [
        sys.executable, str(ROOT / "app.py"), "--port", str(free_port()), "--device", "cpu", *flags,
    ]  # fmt: skip
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            line = process.stdout.readline()
            assert "the page is at http://127.0.0.1:" in line, (
                line + (folder / "log.txt").read_text()
            )
            yield line.split()[4]
        finally:
            process.terminate()
            process.wait(60)
    assert "Traceback" not in (folder / "log.txt").read_text()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install .[demo]")
    with served(tmp_path_factory.mktemp("page"), *DIGITS) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    """Chromium that reaches this machine only, as for a user without a network."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="make test-long installs it")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("there is no chromium; make test-long installs it")
    with sync_api.sync_playwright() as playwright:
        rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        browser = playwright.chromium.launch(executable_path=chromium, args=[rules])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """visit(address) → the page as a new visitor has it, with nothing of others."""
    contexts = []

    def visit(address):
        contexts.append(browser.new_context(viewport={"width": 1200, "height": 1000}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.goto(address)
        page.get_by_role("button", name="Draw").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()


def choose(page, *texts):
    """Search for classes one after another, in place of those that are chosen."""
    page.get_by_title("Clear").click()
    box = page.get_by_label("Classes")
    for text in texts:
        box.fill(text)
        box.press("Enter")
    box.press("Escape")


def chosen(page):
    """The numbers of the chosen classes, in the order in which they take turns."""
    return [
        title.removeprefix("Remove ")
        for title in page.get_by_title("Remove ").evaluate_all("all => all.map(e => e.title)")
    ]


def begin(page, seed, **options):
    """Fill in a seed and, by label, numbers; then ask for the images."""
    for label, number in options.items():
        page.get_by_label(f"number input for {label.replace('_', ' ')}").fill(str(number))
    page.get_by_label("Seed").fill(seed)
    page.get_by_role("button", name="Draw").click()


def downloaded(page, seed):
    """The PNG that a visitor gets once the images are there: (its bytes, its image)."""
    page.get_by_text(f"Seed {seed}", exact=True).wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download PNG").click()
    content = Path(download.value.path()).read_bytes()
    return content, Image.open(BytesIO(content))


@pytest.mark.long
def test_ten_digits_in_a_browser_without_a_network(address, visit):
    from test_digits import judge, make_dataset  # needs scikit-learn

    page, asked = visit(address), []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.get_by_role("button", name="Draw").wait_for()
    page.evaluate(
        "seen = new Set(); setInterval(() => seen.add(document.body.innerText.match(/Step .* of "
        "20/)?.[0]), 10)"
    )
    choose(page, *"0123456789")
    assert chosen(page) == list("0123456789")
    begin(page, "2026")
    content, image = downloaded(page, 2026)
    assert page.evaluate("seen.size") >= 5  # previews while it denoises
    picture, strip = page.locator("img").evaluate_all("all => all.map(e => e.src)")
    assert page.request.get(picture).body() == content  # what is shown is what is downloaded
    width, height = Image.open(BytesIO(page.request.get(strip).body())).size
    assert width > STRIP_MOMENTS * LEAST_TILE and height > drawing.STRIP_ROWS * LEAST_TILE
    settings = json.loads(image.text["settings"])
    assert settings["seed"] == 2026 and settings["class_labels"] == list(range(10))
    digits = make_dataset.reduce(tiles(image, 10)[:, ::FACTOR, ::FACTOR])
    right = judge.judge(digits, np.arange(10))["agreement with the asked-for class"]
    print(f"{10 * right:.0f} of the ten digits shown are classified as what was asked for")
    assert right >= 0.9
    assert len(asked) > 10 and not [
        url for url in asked if not url.startswith((address, "data:", "blob:"))
    ]


@pytest.mark.long
def test_a_wrong_seed_gets_a_message_and_the_page_goes_on(address, visit):
    page = visit(address)
    begin(page, "seven")
    page.get_by_text("The seed is 'seven'; it must be a whole number").first.wait_for()
    assert "Traceback" not in page.content()
    begin(page, "7", How_many_images=1)
    assert json.loads(downloaded(page, 7)[1].text["settings"])["class_labels"] == [0]


@pytest.mark.long
def test_two_visitors_at_once_both_get_what_they_asked_for(address, visit):
    first, second = visit(address), visit(address)
    begin(first, "1", Steps=80)
    begin(second, "2", Steps=80)
    second.get_by_text("queue: 1/1").first.wait_for()  # not refused: it waits
    contents = {}
    for page, seed in ((first, 1), (second, 2)):
        contents[seed], image = downloaded(page, seed)
        assert json.loads(image.text["settings"])["seed"] == seed
    assert contents[1] != contents[2]
    alone = visit(address)
    begin(alone, "2", Steps=80)
    assert downloaded(alone, 2)[0] == contents[2]


@pytest.mark.long
def test_a_thousand_names_are_searched_and_a_solver_sets_its_steps(tmp_path, visit):
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install .[demo]")
    network = fill_randomly(DiT(**TINY, num_classes=1000))
    save_weights(
        tmp_path / "tiny.safetensors",
        Weights(network.state_dict(), network.config, imagenet_names()),
    )
    with served(tmp_path, "--ckpt", "tiny.safetensors", "--vae", "none") as address:
        page = visit(address)
        choose(page, "golden retr", "88", "7")
        assert chosen(page) == ["207", "88", "7"]
        assert page.get_by_text("207: golden retriever").first.is_visible()
        page.get_by_label("Solver").click()
        page.get_by_role("option", name="ddpm").click()
        steps = page.get_by_label("number input for Steps")
        page.wait_for_function("input => input.value == '250'", arg=steps.element_handle())
        begin(page, "0", Steps=5, How_many_images=4)
        settings = json.loads(downloaded(page, 0)[1].text["settings"])
        assert settings["class_labels"] == [207, 88, 7, 207]
        assert (settings["sampler"], settings["num_sampling_steps"]) == ("ddpm", 5)


@pytest.mark.long
def test_ctrl_c_ends_a_page_that_is_drawing(tmp_path):
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install .[demo]")
    port = free_port()
    with open(tmp_path / "log.txt", "w") as log:
        page = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--device", "cpu"],
            stdout=subprocess.PIPE, stderr=log, env=os.environ | {"TMPDIR": str(tmp_path)},
        )  # fmt: skip
    assert b"the page is at" in page.stdout.readline() and list(tmp_path.glob("dit-page-*"))
    assert ask(port, ["a cat", "", 16, 1.5, "euler", 1000, "0"])[0] == 200
    page.send_signal(signal.SIGINT)
    assert page.wait(30) == 130
    assert (tmp_path / "log.txt").read_text() == "" and not list(tmp_path.glob("dit-page-*"))
