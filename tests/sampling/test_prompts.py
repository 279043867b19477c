"""Sampler, sample.py, sample_ddp.py and export.py with a network that reads text."""

from dataclasses import replace
import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont
import pytest
import torch

from checkpoints.weights import Weights, save_weights
from conditions.text import pieces
from conftest import fill_randomly, randn
from models import DiT
import evaluate
from evaluation.clip_score import captions_of
import export
import sample
import sample_ddp
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from runtime.npz import open_array
from sampling import load_sampler
from sampling.many_folder import CAPTIONS
from sampling.options import ManyOptions, SamplingOptions
from sampling.pictures import (
    FONT_SIZE, PROMPT_LINES, SETTINGS, Prompt, captions, picture, wrapped,
)  # fmt: skip
from sampling.sampler import Sampler
from starts import each_start
from vae import PixelSpace
from written import LONG, PROMPTS, READ, SIZES, reader, saved

CPU = torch.device("cpu")
LENGTH = SIZES["text_length"]


def flow_sampler(network=None, **options):
    options = dict(num_sampling_steps=2, sampler="euler", process=FlowProcess()) | options
    return Sampler(reader() if network is None else network, PixelSpace(), None, **options)


def labelled():
    network = DiT(
        input_size=8, patch_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2,
        num_classes=3,
    )  # fmt: skip
    return Sampler(fill_randomly(network).eval(), PixelSpace(), None, 2)


def latents(sampler, prompts, indices=None, seed=0):
    indices = range(len(prompts)) if indices is None else indices
    return sampler.numbered_latents(seed, indices, sampler.conditions(prompts))


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A file with a network of pixels that reads text and has learned a flow."""
    return saved(tmp_path_factory.mktemp("ckpt") / "words.safetensors", reader())


# ---- the sampler ----


@pytest.mark.parametrize("options", [
    {}, {"cfg_scale": 3.0}, {"cfg_scale": 3.0, "negative_prompt": "a thin one"},
    {"cfg_scale": 2.0, "sampler": "ddpm", "process": None},
])  # fmt: skip
def test_an_image_depends_on_the_seed_its_index_and_its_prompt_alone(options):
    sampler = flow_sampler(**options)
    whole = latents(sampler, PROMPTS)
    for i in (2, 0, 1):
        assert (latents(sampler, [PROMPTS[i]], [i])[0] - whole[i]).abs().max() < 1e-3
    other = latents(sampler, ["a thin nine", *PROMPTS[1:]])
    assert (other[1:] - whole[1:]).abs().max() < 1e-3 < 1e-2 < (other[0] - whole[0]).abs().max()
    assert (latents(sampler, PROMPTS, seed=1) - whole).abs().amax(dim=(1, 2, 3)).min() > 0.1
    assert torch.equal(latents(sampler, PROMPTS), whole)


@pytest.mark.parametrize("negative", [None, "", "a thin seven"])
def test_guidance_leads_away_from_the_negative_prompt_or_the_empty_one(negative):
    """In float64: other + scale·(prompt - other), of every channel."""
    network, scale = reader().double(), 2.5
    sampler = flow_sampler(network, cfg_scale=scale, negative_prompt=negative)
    x, t = randn(3, 3, 8, 8), torch.full((3,), 0.3, dtype=torch.float64)
    got = sampler.predictor(sampler.conditions(PROMPTS))(x, t, 0)
    asked, other = pieces(PROMPTS, LENGTH), pieces([negative or ""] * 3, LENGTH)
    expected = network(x, t, other) + scale * (network(x, t, asked) - network(x, t, other))
    assert (got - expected).abs().max() < 1e-12
    assert (got - network(x, t, asked)).abs().max() > 1e-2


def test_the_empty_prompt_is_what_guidance_is_against():
    """So that it is sampled alike at any scale, and as the network alone has it."""
    network = reader()
    plain, guided = flow_sampler(network), flow_sampler(network, cfg_scale=4.0)
    null = Sampler(network, PixelSpace(), None, 2, "euler", process=FlowProcess(),
                   null=pieces([""], LENGTH))  # fmt: skip
    alone = null.latents(pieces([""] * 2, LENGTH), noise := randn(2, 3, 8, 8).float())
    for sampler in (plain, guided):
        for empty in ("", "  ", "\n"):
            found = sampler.latents(sampler.conditions([empty] * 2), noise)
            assert (found - alone).abs().max() < 1e-5
    assert np.array_equal(plain.images([""], seed=3), plain.images([" \t"], seed=3))
    with pytest.raises(ValueError, match="`labels` is empty"):
        plain.images([])


def test_guidance_has_an_interval():
    network, calls = reader(), []
    sampler = flow_sampler(
        network, num_sampling_steps=4, cfg_scale=3.0, cfg_interval=(0.0, 0.6),
        negative_prompt="thin",
    )  # fmt: skip
    network.register_forward_pre_hook(lambda _, args, kwargs: calls.append(len(args[0])),
                                      with_kwargs=True)  # fmt: skip
    sampler.images(PROMPTS)
    assert calls == [6 if guided else 3 for guided in sampler.guided()] and set(calls) == {3, 6}


def test_text_is_guided_in_all_channels_and_labels_in_three():
    assert flow_sampler().cfg_channels == "all" and labelled().cfg_channels == 3
    assert flow_sampler(cfg_channels=2).cfg_channels == 2
    options = SamplingOptions()
    channels = [
        options.settled(GaussianProcess(), text=text)["cfg_channels"] for text in (False, True)
    ]
    assert channels == [3, "all"]


def test_prompts_may_come_as_text():
    sampler, text = flow_sampler(), pieces(PROMPTS, LENGTH)
    assert np.array_equal(sampler.images(text, seed=1), sampler.images(PROMPTS, seed=1))
    null = replace(sampler, reader=None, null=pieces([""], LENGTH), cfg_scale=2.0)
    guided = replace(sampler, cfg_scale=2.0)
    assert np.array_equal(null.images(text), guided.images(PROMPTS))
    with pytest.raises(ValueError, match="`null` and no `reader`; give prompts as a Text"):
        null.images(PROMPTS)


@pytest.mark.parametrize("asked, message", [
    ([3, 1], "the network reads text, and was given class labels; give a list of prompts"),
    (torch.tensor([0]), "the network reads text, and was given class labels"),
    ("a three", "`prompts` is 'a three'; give a list of texts"),
    (["a", 3], "`prompts` has 3, which is no text"),
    (["a \udcff"], r'`prompts` "a \\udcff" has bytes that are no text'),
])  # fmt: skip
def test_what_is_no_prompt_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        flow_sampler().images(asked)


@pytest.mark.parametrize("asked", [["a three"], "a three", ["a", 3], pieces(["a"], LENGTH)])
def test_prompts_for_a_network_of_labels_are_refused(asked):
    with pytest.raises(ValueError, match="takes class labels, and was given prompts; give the num"):
        labelled().images(asked)


def test_negative_prompts_that_nothing_takes_are_refused():
    for kind in (flow_sampler, SamplingOptions):
        with pytest.raises(ValueError, match='`negative_prompt` "thin" is for guidance, and `cfg_'):
            kind(negative_prompt="thin")
        with pytest.raises(ValueError, match="`negative_prompt` is 3; give one text"):
            kind(negative_prompt=3, cfg_scale=2.0)
    with pytest.raises(ValueError, match="`negative_prompt` is for networks that read text"):
        replace(labelled(), negative_prompt="thin", cfg_scale=2.0)


def test_prompts_that_are_too_long_are_cut_and_told(capsys):
    sampler = flow_sampler(cfg_scale=2.0, negative_prompt="NO " + LONG)
    assert np.array_equal(sampler.images([LONG], seed=2), sampler.images([READ], seed=2))
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == (
        f'note: the prompt "{LONG[:40]}…" is too long for the network, which reads "{READ}" of it'
    )
    assert '"NO one two' in second and second == third
    assert sampler.notes([READ]) == [second.removeprefix("note: ")]
    *_, last = sampler.notes([f"{i} {LONG}" for i in range(9)])
    assert last == "6 more prompts are too long, and are cut likewise"


def test_load_sampler_takes_prompts(ckpt):
    sampler = load_sampler(ckpt, vae="none", steps=2, device="cpu", cfg_scale=2.0,
                           negative_prompt="thin")  # fmt: skip
    expected = flow_sampler(sampler="heun", cfg_scale=2.0, negative_prompt="thin")
    assert np.array_equal(sampler.images(PROMPTS), expected.images(PROMPTS))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_network_in_half_precision_reads_prompts(ckpt, precision):
    sampler = load_sampler(ckpt, vae="none", steps=2, device="cpu", mixed_precision=precision)
    expected = flow_sampler(sampler="heun")
    apart = np.abs(sampler.images(PROMPTS).astype(int) - expected.images(PROMPTS))
    assert apart.mean() < (1e-9 if precision == "no" else 5)


@pytest.mark.long
def test_a_compiled_network_reads_prompts(ckpt):
    sampler = load_sampler(ckpt, vae="none", steps=2, device="cpu", compile=True, cfg_scale=2.0)
    expected = flow_sampler(sampler="heun", cfg_scale=2.0)
    for prompts in (PROMPTS, PROMPTS[:2]):
        apart = np.abs(sampler.images(prompts).astype(int) - expected.images(prompts))
        assert apart.max() <= 1


def test_outside_encoders_read_the_prompts_of_a_network_that_names_them(tmp_path):
    pytest.importorskip("transformers", reason="text encoders: pip install .[text]")
    from conditions.encoders import load_reader
    from small_encoders import save_clip

    outside = load_reader([save_clip(tmp_path / "clip")])
    sizes = {"text_width": outside.width, "pooled_width": outside.pooled_width}
    network = reader(**sizes, text=outside.says)
    sampler = flow_sampler(network, cfg_scale=2.0, negative_prompt="thin")
    x, t = randn(1, 3, 8, 8).float(), torch.full((1,), 0.3)
    got = sampler.predictor(sampler.conditions(["a thick three"]))(x, t, 0)
    asked, other = outside.encode(["a thick three"]), outside.encode(["thin"])
    expected = network(x, t, other) + 2 * (network(x, t, asked) - network(x, t, other))
    assert (got - expected).abs().max() < 1e-4
    with pytest.raises(ValueError, match="does not say which; give one that names them"):
        flow_sampler(reader(**sizes))
    null = flow_sampler(reader(**sizes), null=outside.null)
    assert null.images(asked).shape == (1, 8, 8, 3)


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """(a file with a network that a CLIP reads for, the folder of that CLIP, which has moved)."""
    pytest.importorskip("transformers", reason="text encoders: pip install .[text]")
    from conditions.encoders import load_reader
    from small_encoders import save_clip

    folder = tmp_path_factory.mktemp("outside")
    read = load_reader([save_clip(folder / "there")])
    network = reader(text_width=read.width, pooled_width=read.pooled_width)
    weights = Weights(
        network.state_dict(), network.config, None, process=FlowProcess().config, text=read.says
    )
    save_weights(folder / "words.safetensors", weights)
    drawn_there = load_sampler(
        folder / "words.safetensors", vae="none", steps=2, device="cpu"
    ).images(PROMPTS)
    (folder / "there").rename(folder / "here")
    return str(folder / "words.safetensors"), str(folder / "here"), drawn_there


def test_encoders_that_have_moved_are_named(outside, tmp_path, ckpt):
    file, place, before = outside
    options = dict(vae="none", steps=2, device="cpu")
    with pytest.raises(ValueError, match="`text_encoder` .*there: there is no such folder"):
        load_sampler(file, **options)
    sampler = load_sampler(file, text_encoder=[place], **options)
    assert np.array_equal(sampler.images(PROMPTS), before)
    for names, message in (
        ([place, place], "has 2 names, and the captions were read by clip"),
        (place, "give a list, a name for each encoder"), (["x"] * 9, "it takes 8 at most"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_sampler(file, text_encoder=names, **options)
    with pytest.raises(ValueError, match="`text_encoder` is given, and the network reads text wi"):
        load_sampler(ckpt, text_encoder=[place], **options)
    labels = saved(tmp_path / "labels.safetensors", labelled().network, None)
    with pytest.raises(ValueError, match="`text_encoder` is given, and the network reads labels"):
        load_sampler(labels, text_encoder=[place], **options)


def test_every_door_is_told_where_encoders_are(outside, tmp_path, capsys):
    file, place, before = outside
    with pytest.raises(SystemExit):
        drawn(tmp_path, file, "--prompt", *PROMPTS[::2])
    assert "--text-encoder " in capsys.readouterr().err.splitlines()[-1]
    named = ["--text-encoder", place]
    found, settings = drawn(tmp_path, file, "--cfg-scale", "1", "--prompt", PROMPTS[0], *named)
    expected = picture(before[:1], captions(PROMPTS[:1], 0, None))
    assert np.array_equal(found, np.asarray(expected)) and settings["text_encoder"] == [place]
    folder = many(tmp_path, file, "a thick three", *named)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["options"]["text_encoder"] == [place]
    assert "text_encoder" not in manifest["decides"]
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(before[0]).save(images / "0.png")
    evaluate.main([
        "--likelihood", file, "--samples", str(images), "--vae", "none", "--num-workers", "0",
        *named,
    ])  # fmt: skip
    assert "bits_per_dim" in capsys.readouterr().out


# ---- one picture ----


def drawn(tmp_path, ckpt, *flags):
    """The file that sample.main writes with these flags, and its settings."""
    path = tmp_path / "out.png"
    sample.main([
        "--ckpt", ckpt, "--vae", "none", "--device", "cpu", "--steps", "2", "--output", str(path),
        *flags,
    ])  # fmt: skip
    with Image.open(path) as image:
        return np.asarray(image), json.loads(image.text[SETTINGS])


def test_sample_draws_prompts_and_keeps_them_in_the_picture(tmp_path, ckpt, capsys):
    prompts = ["a thick three", " ", LONG]
    found, settings = drawn(
        tmp_path, ckpt, "--prompt", *prompts, "--negative-prompt", "thin", "--seed", "4",
        "--trajectory", str(tmp_path / "way.gif"),
    )  # fmt: skip
    kept = ("prompt", "negative_prompt", "class_labels", "cfg_scale", "cfg_channels")
    assert [settings[name] for name in kept] == [prompts, "thin", None, 4.0, "all"]
    sampler = flow_sampler(sampler="heun", cfg_scale=4.0, negative_prompt="thin")
    texts = captions(prompts, 0, None)
    assert np.array_equal(found, np.asarray(picture(sampler.images(prompts, seed=4), texts)))
    assert f'which reads "{READ}" of it' in capsys.readouterr().err
    with Image.open(tmp_path / "way.gif") as way:
        assert way.n_frames == 2 and way.size == found.shape[1::-1]


@pytest.mark.parametrize("flags, message", [
    ([], "the network reads text; say with --prompt what it is to draw, such as --prompt"),
    (["--class-labels", "3"], "--class-labels: the network reads text; give --prompt instead"),
    (["--prompt", "a", "--negative-prompt", "b", "--cfg-scale", "1"],
     '--negative-prompt "b" is for guidance, and --cfg-scale 1 is none'),
    (["--prompt", "a\udcff"], "--prompt \"a\\udcff\" has bytes that are no text in UTF-8"),
    (["--prompt", ""], "--prompt is empty; give a value, or leave it out"),
    (["--prompt", *["a"] * 4097], "--prompt has 4097 values; it takes 4096 at most"),
])  # fmt: skip
def test_mistakes_with_prompts_are_one_message(tmp_path, ckpt, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        drawn(tmp_path, ckpt, *flags)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"sample.py: error: {message}")


@pytest.mark.parametrize("flags, message", [
    (["--prompt", "a"], "--prompt: the network does not read text; leave the flag out, and give"),
    (["--negative-prompt", "a"], "--negative-prompt is for networks that read text, and this one"),
])  # fmt: skip
def test_prompts_for_a_checkpoint_of_labels_are_refused(tmp_path, capsys, flags, message):
    ckpt = saved(tmp_path / "labels.safetensors", labelled().network, None)
    with pytest.raises(SystemExit):
        drawn(tmp_path, ckpt, *flags)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"sample.py: error: {message}")


def test_prompts_are_wrapped_and_other_texts_cut():
    font = ImageFont.load_default(FONT_SIZE)
    text = "a thick three leaning right, and nobody knows what else there may be to be seen on it"
    lines = wrapped(Prompt(text), font, 96)
    assert len(lines) == PROMPT_LINES and all(font.getlength(line) <= 96 for line in lines)
    assert text.startswith(" ".join(lines[:-1])) and lines[-1].endswith("…")
    assert wrapped(Prompt("a thick three leaning"), font, 96) == ["a thick three", "leaning"]
    (line,) = wrapped(text, font, 96)
    assert line.endswith("…") and font.getlength(line) <= 96
    assert len(wrapped(Prompt("w" * 150), font, 96)) == 1
    image = np.zeros((2, 96, 96, 3), np.uint8)
    heights = [
        picture(image, [first, Prompt(text)]).height - picture(image, ["", ""]).height
        for first in ("a", Prompt(text))
    ]
    assert heights == [4 + PROMPT_LINES * FONT_SIZE] * 2


@pytest.mark.parametrize(
    "text", ["漢字 🙂 \u202eabc", "\0\x1b[31m", "\udcff", "e\u0301" * 300, "", " ", "a\n\nb\u2028c"]
)
def test_any_prompt_can_stand_below_an_image(text):
    picture(np.zeros((1, 8, 8, 3), np.uint8), captions([text], 0, None))


# ---- many images ----


def many(tmp_path, ckpt, prompts, *flags):
    """The folder that sample_ddp.main makes of these lines."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(prompts if isinstance(prompts, bytes) else prompts.encode())
    before = set(tmp_path.glob("*.npz"))
    sample_ddp.main([
        "--ckpt", ckpt, "--vae", "none", "--device", "cpu", "--steps", "2", "--num-fid-samples",
        "5", "--per-proc-batch-size", "2", "--sample-dir", str(tmp_path), "--prompts", str(file),
        *flags,
    ])  # fmt: skip
    new = set(tmp_path.glob("*.npz")) - before
    return new.pop().with_suffix("") if new else None


def test_many_images_of_prompts_that_take_turns(tmp_path, ckpt):
    folder = many(tmp_path, ckpt, "\ufeffa thick three\r\n\n a thin seven leaning left \n")
    turns = [PROMPTS[i % 3] for i in range(5)]
    written = "".join(f"{prompt}\n" for prompt in turns)
    for path in (folder / CAPTIONS, folder.with_name(f"{folder.name}.{CAPTIONS}")):
        assert path.read_bytes() == written.encode()
    decides = json.loads((folder / "manifest.json").read_text())["decides"]
    assert decides["prompts"] == hashlib.sha256(written.encode()).hexdigest()
    assert "labels" not in decides and decides["cfg_channels"] == "all"
    images = open_array(Path(f"{folder}.npz"), "arr_0")
    sampler = flow_sampler(sampler="heun", cfg_scale=1.5)
    for first in (0, 2, 4):
        indices = range(first, min(first + 2, 5))
        found = latents(sampler, [turns[i] for i in indices], indices)
        assert np.array_equal(images[first : first + 2], sampler.decode(found).numpy())


def test_only_the_end_of_a_line_ends_a_prompt(tmp_path, ckpt):
    """Captions from the web have separators of other kinds."""
    prompts = ["one\u2028two\x85three", "a\x0bb\x1ec\rd"]
    folder = many(tmp_path, ckpt, "".join(f"{prompt}\r\n" for prompt in prompts))
    turns = [prompts[i % 2] for i in range(5)]
    assert captions_of(folder).lines == turns


def test_prompts_decide_the_folder_and_the_same_command_goes_on(tmp_path, ckpt, capsys):
    folder = many(tmp_path, ckpt, "a\nb\n")
    assert many(tmp_path, ckpt, "a\nb\na\nb\na\nc") is None  # the same five
    before = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    (folder / "000003.png").unlink()
    capsys.readouterr()
    assert many(tmp_path, ckpt, "a\nb\n") is None and "4 of 5 images" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == before
    others = {many(tmp_path, ckpt, "a\nc"), many(tmp_path, ckpt, "a\nb", "--negative-prompt", "c"),
              folder}  # fmt: skip
    assert None not in others and len(others) == 3


def test_long_prompts_of_many_images_are_told_once(tmp_path, ckpt, capsys):
    many(tmp_path, ckpt, f"{LONG}\na\n")
    assert capsys.readouterr().out.count(f'which reads "{READ}" of it') == 1


@each_start
def test_two_processes_draw_the_prompts_of_one(tmp_path, ckpt, start):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = [
        "--ckpt", ckpt, "--vae", "none", "--num-fid-samples", "5", "--steps", "2",
        "--per-proc-batch-size", "2", "--device", "cpu", "--prompts", tmp_path / "prompts.txt",
    ]  # fmt: skip
    sample_ddp.main([*map(str, flags), "--sample-dir", str(tmp_path / "1")])
    done = start("sample_ddp.py", *flags, "--sample-dir", tmp_path / "2", processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.*") if path.is_file()}
        for name in "12"
    )
    assert one.keys() == two.keys() and len(one) == 5 + 4
    assert all(one[name] == two[name] for name in one if name != "manifest.json")


@pytest.mark.parametrize("prompts, flags, message", [
    ("", [], "has no line; write a prompt in each"),
    (b"\xff", [], "prompts.txt cannot be read ('utf-8' codec"),
    ("a", ["--prompts", "nowhere"], "--prompts nowhere cannot be read (No such file"),
    ("a", ["--labels", "balanced"], "--labels balanced: the network reads text; give --prompts"),
    ("a", ["--negative-prompt", "b", "--cfg-scale", "1"], '--negative-prompt "b" is for guidance'),
])  # fmt: skip
def test_mistakes_with_files_of_prompts(tmp_path, ckpt, capsys, prompts, flags, message):
    with pytest.raises(SystemExit) as stopped:
        many(tmp_path, ckpt, prompts, *flags)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_many_images_are_asked_what_they_are_to_be(tmp_path, ckpt):
    def job(checkpoint, **options):
        from sampling import NetworkChoice, sample_many

        choice = NetworkChoice(checkpoint, vae="none")
        sample_many(choice, SamplingOptions(num_sampling_steps=2),
                    ManyOptions(1, 1, tmp_path, **options), device="cpu")  # fmt: skip

    with pytest.raises(ValueError, match="the network reads text; say with `prompts` what"):
        job(ckpt)
    labels = saved(tmp_path / "labels.safetensors", labelled().network, None)
    with pytest.raises(ValueError, match="`prompts` x: the network does not read text; leave"):
        job(labels, prompts="x")


def test_what_is_exported_draws_the_same(tmp_path, ckpt):
    made = tmp_path / "exported.safetensors"
    export.main([
        "--ckpt", ckpt, "--vae", "none", "--format", "safetensors", "--output", str(made)
    ])  # fmt: skip
    first, second = (drawn(tmp_path, str(path), "--prompt", *PROMPTS[::2]) for path in (ckpt, made))
    assert np.array_equal(first[0], second[0]) and first[0].std() > 0
