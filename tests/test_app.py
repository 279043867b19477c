"""The page: what it draws, without a browser; and, with one, that people get what they ask for."""

from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
import json
from pathlib import Path
import shutil
import socket
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
import torch

import app
from checkpoints import Weights, save_weights
from conftest import ROOT, fill_randomly
from models import DiT
from pictures import LEAST_TILE, MARGIN, PER_ROW, STRIP_MOMENTS
from sampling import SOLVERS, Sampler, imagenet_names, load_sampler
from vae import PixelSpace
from visitors import Visitors

CPU = torch.device("cpu")
STEPS = 4
TINY = dict(input_size=8, patch_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2)
FACTOR = LEAST_TILE // 32  # by which the picture enlarges digits


def arguments(*flags):
    args = app.build_parser().parse_args([*flags, "--device", "cpu"])
    app.choose_network(args)
    return args


@pytest.fixture(scope="module")
def digits():
    return load_sampler(arguments(), CPU)


@pytest.fixture(scope="module")
def quick(digits):
    return replace(digits, sampler="ddpm", num_sampling_steps=STEPS, cfg_scale=1.5)


def tiles(canvas, count, side=LEAST_TILE):
    """The images uint8 (count, side, side, 3) of a picture with captions."""
    pixels, below = np.asarray(canvas.convert("RGB")), 12 + 2 * MARGIN
    corners = [(MARGIN + i // PER_ROW * (side + below), MARGIN + i % PER_ROW * (side + MARGIN)) for i in range(count)]
    return np.stack([pixels[top : top + side, left : left + side] for top, left in corners])


def drawn(sampler, labels, seed):
    """The images (N, 32, 32, 3), as int, at the end of draw."""
    *_, (_, canvas, _) = app.draw(sampler, labels, seed, CPU)
    return tiles(canvas, len(labels))[:, ::FACTOR, ::FACTOR].astype(int)


def refusal(capsys, *flags):
    """What main says of these flags before it leaves."""
    with pytest.raises(SystemExit) as left:
        app.main(list(flags))
    assert left.value.code == 2
    return capsys.readouterr().err


# ---- the door ----


def test_page_opens_on_the_digits_from_any_folder_and_for_this_machine_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = arguments()
    assert (args.host, args.port) == ("127.0.0.1", 7860)
    sampler = load_sampler(args, CPU)
    assert sampler.classes == [str(i) for i in range(10)] and sampler.sampler == app.SOLVER
    assert arguments("--ckpt", "released").ckpt is None and arguments("--ckpt", "x.pt").vae == "mse"


def test_without_gradio_one_message_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    message = refusal(capsys).splitlines()[-1]
    assert message.endswith("error: the page needs Gradio, which is not installed here: pip install .[demo]")


@pytest.fixture
def with_gradio(monkeypatch):
    """As if it were installed: what is tested comes before it is imported."""
    monkeypatch.setattr(app, "find_spec", lambda name: name)


def test_taken_and_impossible_ports_are_refused_with_what_to_do(capsys, with_gradio):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = refusal(capsys, "--port", str(port)).splitlines()[-1]
    assert f"--port {port} cannot be used (Address already in use)" in message and "pass another --port" in message
    app.check_address("127.0.0.1", port)  # free again
    assert "from 1 to 65535" in refusal(capsys, "--port", "70000")
    assert "--host no.such.host.invalid" in refusal(capsys, "--host", "no.such.host.invalid")


def test_an_autoencoder_without_its_network_is_refused(capsys, with_gradio):
    assert "--vae ema goes with --ckpt" in refusal(capsys, "--vae", "ema", "--port", str(free_port()))


# ---- choices ----


def test_seeds_are_whole_numbers_below_2_to_the_63():
    assert [app.read_seed(text) for text in ("0", " 7 ", str(2**63 - 1))] == [0, 7, 2**63 - 1]
    for wrong in ("", "seven", "-1", "1.5", "1e3", "²", str(2**63), "9" * 5000):
        with pytest.raises(ValueError, match="it must be a whole number from 0 to"):
            app.read_seed(wrong)


def test_classes_take_turns():
    assert app.chosen_labels([3, 1, 4], 5, 10) == [3, 1, 4, 3, 1]
    assert app.chosen_labels([], 3, 0) == [0, 0, 0]
    with pytest.raises(ValueError, match="No class is chosen"):
        app.chosen_labels([], 3, 10)


def test_choices_have_numbers_and_names(digits):
    network = DiT(**TINY, num_classes=1000)
    choices = app.class_choices(network, imagenet_names())
    assert len(choices) == 1000 and choices[207] == ("207: golden retriever", 207)
    assert app.class_choices(network, None)[207] == ("207", 207)
    assert app.class_choices(digits.network, digits.classes)[3] == ("3", 3)


# ---- drawing ----


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
    alone = list(app.draw(quick, [1, 2], 7, CPU))
    turns = zip(
        app.draw(quick, [1, 2], 7, CPU), app.draw(replace(quick, cfg_scale=1.0), [3, 4, 5], 8, CPU), strict=True
    )
    assert [pair[0][1].tobytes() for pair in turns] == [canvas.tobytes() for _, canvas, _ in alone]


def test_previews_come_before_the_strip_of_the_first_images(digits):
    sampler = replace(digits, sampler="ddim", num_sampling_steps=40)
    *previews, (done, last, strip) = app.draw(sampler, [0, 1, 2, 3, 4], 0, CPU)
    steps = [step for step, _, _ in previews]
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == done == 40 and 30 <= len(steps) <= 38
    assert all(rows is None for _, _, rows in previews) and previews[0][1].tobytes() != last.tobytes()
    size = LEAST_TILE + MARGIN
    assert strip.size == (STRIP_MOMENTS * size + MARGIN, app.STRIP_ROWS * (size + 12 + MARGIN) + MARGIN)
    end = np.asarray(strip)[MARGIN : MARGIN + LEAST_TILE, -MARGIN - LEAST_TILE : -MARGIN]
    assert np.array_equal(end, tiles(last, 1)[0])


def test_a_single_step_has_a_preview_and_a_strip(digits):
    assert len(list(app.draw(replace(digits, sampler="ddpm", num_sampling_steps=1), [0], 0, CPU))) == 2


def test_the_png_has_the_settings_that_were_asked_for(digits):
    for answered in app.answer(digits, arguments(), CPU, [7, 2], 3, 2.5, "unipc", STEPS, "11"):
        status, shown, rows, path = answered
        assert (path is None) == (rows is None)
        if path:
            with Image.open(path) as image:
                settings, images = json.loads(image.text["settings"]), tiles(image, 3)
    assert status == "Seed 11" and shown == path and not Path(path).exists()
    sampler = replace(digits, sampler="unipc", num_sampling_steps=STEPS, cfg_scale=2.5)
    assert np.array_equal(images[:, ::FACTOR, ::FACTOR], drawn(sampler, [7, 2, 7], 11))
    asked = dict(class_labels=[7, 2, 7], cfg_scale=2.5, sampler="unipc", num_sampling_steps=STEPS, seed=11)
    assert settings.items() >= asked.items()
    assert settings["ckpt"] == "dit.safetensors" and settings["vae"] == "vae" and "port" not in settings
    assert str(ROOT) not in str(settings)


def test_wrong_choices_are_value_errors(digits):
    for choices, message in (
        (([7], 1, 4.0, "dpm++", STEPS, "seven"), "The seed is 'seven'"),
        (([], 1, 4.0, "dpm++", STEPS, "0"), "No class is chosen"),
        (([7], 2.5, 4.0, "dpm++", STEPS, "0"), "How many images is 2.5; it must be a whole number"),
        (([7], 1, 4.0, "dpm++", 3.5, "0"), "Steps is 3.5; it must be a whole number"),
        (([7], 1, 4.0, "dpm++", 1000, "0"), "Steps is 1000; it must be a whole number from 1 to 999"),
        (([7], None, 4.0, "dpm++", STEPS, "0"), "How many images is None; it must be a whole number"),
        (([7], 1, None, "dpm++", STEPS, "0"), "Guidance is None"),
        (([7], 1, 4.0, "euler", STEPS, "0"), "The solver is 'euler'; it must be one of ddpm"),
        (([7], 1, 4.0, "dpm++", STEPS, None), "The seed is 'None'"),
        (([10], 1, 4.0, "dpm++", STEPS, "0"), "give a list of whole numbers from 0 to 9"),
        ((7, 1, 4.0, "dpm++", STEPS, "0"), "No class is chosen"),
    ):
        with pytest.raises(ValueError, match=message):
            next(app.answer(digits, arguments(), CPU, *choices))


# ---- the page without a browser ----


@pytest.fixture
def gradio():
    return pytest.importorskip("gradio", reason="the page needs Gradio: pip install .[demo]")


def shown_controls(sampler):
    page = app.build_page(sampler, arguments(), CPU, Visitors(""))
    assert not page.analytics_enabled
    controls = {block.label: block for block in page.blocks.values() if getattr(block, "label", None)}
    return {label: control for label, control in controls.items() if control.visible}


def test_controls_for_a_network_with_a_thousand_names(gradio):
    controls = shown_controls(Sampler(DiT(**TINY, num_classes=1000), PixelSpace(), imagenet_names()))
    assert controls["Classes"].choices[207] == ("207: golden retriever", 207)
    assert controls["Classes"].value == list(range(0, 1000, 100))
    assert [name for name, _ in controls["Solver"].choices] == list(SOLVERS)
    assert (controls["Guidance"].minimum, controls["Guidance"].maximum) == (1, 10)
    assert (controls["How many images"].minimum, controls["How many images"].maximum) == (1, 16)


def test_what_a_network_does_not_have_is_not_shown(gradio):
    always = {"How many images", "Solver", "Steps", "Seed"}
    shown = shown_controls(Sampler(DiT(**TINY, num_classes=0), PixelSpace(), None)).keys()
    assert always <= shown and not {"Classes", "Guidance"} & shown
    unguided = DiT(**TINY, num_classes=3, class_dropout_prob=0)
    shown = shown_controls(Sampler(unguided, PixelSpace(), None)).keys()
    assert always | {"Classes"} <= shown and "Guidance" not in shown


# ---- the page in a browser ----


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def served(folder, *flags):
    """The address of `python app.py FLAGS`, run in the folder; it must end without ever having printed a traceback."""
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(free_port()), "--device", "cpu", *flags]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            line = process.stdout.readline()
            assert "the page is at http://127.0.0.1:" in line, line + (folder / "log.txt").read_text()
            yield line.split()[4]
        finally:
            process.terminate()
            process.wait(60)
    assert "Traceback" not in (folder / "log.txt").read_text()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    pytest.importorskip("gradio", reason="the page needs Gradio: pip install .[demo]")
    with served(tmp_path_factory.mktemp("page")) as address:
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
        "seen = new Set(); setInterval(() => seen.add(document.body.innerText.match(/Step .* of 20/)?.[0]), 10)"
    )
    choose(page, *"0123456789")
    assert chosen(page) == list("0123456789")
    begin(page, "2026")
    content, image = downloaded(page, 2026)
    assert page.evaluate("seen.size") >= 5  # previews while it denoises
    picture, strip = page.locator("img").evaluate_all("all => all.map(e => e.src)")
    assert page.request.get(picture).body() == content  # what is shown is what is downloaded
    width, height = Image.open(BytesIO(page.request.get(strip).body())).size
    assert width > STRIP_MOMENTS * LEAST_TILE and height > app.STRIP_ROWS * LEAST_TILE
    (ROOT / "demo").mkdir(exist_ok=True)
    page.screenshot(path=ROOT / "demo" / "page.png", full_page=True)
    settings = json.loads(image.text["settings"])
    assert settings["seed"] == 2026 and settings["class_labels"] == list(range(10))
    digits = make_dataset.reduce(tiles(image, 10)[:, ::FACTOR, ::FACTOR])
    right = judge.judge(digits, np.arange(10))["agreement with the asked-for class"]
    print(f"{10 * right:.0f} of the ten digits shown are classified as what was asked for")
    assert right >= 0.9
    assert len(asked) > 10 and not [url for url in asked if not url.startswith((address, "data:", "blob:"))]


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
    save_weights(tmp_path / "tiny.safetensors", Weights(network.state_dict(), network.config, imagenet_names()))
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
