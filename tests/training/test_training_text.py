"""Training with captions: runs on any number of workers and processes, resuming, previews, cached
latents, outside encoders, and what users get wrong.
"""

import json
import re
import shutil

import numpy as np
from PIL import Image
import pytest
import torch

from checkpoints.files import newest_checkpoint, read_checkpoint
from checkpoints.networks import create_network
from conditions.text import PieceReader, Share, TextCondition, pieces
from conftest import fill_randomly, randn
from data.opening import open_source
from data.options import DataOptions
import export
import extract_latents
from small_encoders import save_encoders
from starts import forked
from test_runs import rows
from test_train import fresh_accelerator, same  # noqa: F401
import train
from training.options import TrainOptions
from training.state import Recipe, new_state
from training.step import draw, train_step, warm_up
from variants.mmdit import MMDiT

SIZE = 16
TEXT = [
    "--model", "MMDiT-Ti/4", "--image-size", str(SIZE), "--vae", "none", "--text-length", "8",
    "--global-batch-size", "4", "--num-workers", "0", "--device", "cpu", "--log-every", "2", "--lr",
    "1e-3", "--ema-decay", "0.5",
]  # fmt: skip
FLOW = ["--process", "flow"]


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Twelve images, most with one or two captions."""
    folder, source = tmp_path_factory.mktemp("said"), np.random.default_rng(0)
    for i in range(12):
        path = folder / f"{i:02d}.png"
        Image.fromarray(source.integers(0, 256, (SIZE, SIZE + 5, 3), dtype=np.uint8)).save(path)
        if i < 11:
            captions = f"number {i}\nan image of {i}\n"
            path.with_suffix(".txt").write_text(captions[: 9 + 99 * (i % 2)])
    return folder


def run(data, results, *flags):
    """Train with TEXT and these flags; the newest checkpoint's contents."""
    train.main(["--data-path", str(data), "--results-dir", str(results), *TEXT, *flags])
    return read_checkpoint(newest_checkpoint(sorted(results.iterdir())[-1]))


def refusal(data, results, capsys, *flags):
    """What train.py refuses these flags with."""
    with pytest.raises(SystemExit):
        run(data, results, *flags)
    return capsys.readouterr().err


# ---- runs ----


def test_a_checkpoint_says_what_was_read(said, tmp_path, capsys):
    contents = run(said, tmp_path, "--max-steps", "2")
    assert contents["classes"] is None and contents["args"]["num_classes"] == 0
    assert contents["args"]["condition"] == "text" and contents["args"]["text_length"] == 8
    config = contents["config"]
    assert config["_class_name"] == "MMDiT" and config["text_length"] == 8
    assert "text" not in config and config["process"]["name"] == "gaussian"
    network = create_network({key: config[key] for key in config if key != "process"})
    network.load_state_dict(contents["model"])
    out = capsys.readouterr().out
    assert "1 of 12 images have no caption" in out and "MMDiT-Ti/4, captions: " in out


@pytest.mark.parametrize("process", [FLOW, pytest.param([], marks=pytest.mark.long)])
def test_workers_and_accumulation_change_nothing(said, tmp_path, process):
    flags = ["--max-steps", "4", *process]
    alone = run(said, tmp_path / "0", *flags)
    helped = run(said, tmp_path / "2", *flags, "--num-workers", "2")
    assert same(alone["model"], helped["model"]) and same(alone["ema"], helped["ema"])
    parts = run(said, tmp_path / "3", *flags, "--grad-accum", "2", "--grad-checkpointing")
    for name, tensor in alone["model"].items():
        torch.testing.assert_close(parts["model"][name], tensor, rtol=1e-3, atol=1e-4)


def test_captions_reach_the_network(said, tmp_path):
    """A run learns otherwise when one caption is another."""
    one = run(said, tmp_path / "a", "--max-steps", "3")
    other = tmp_path / "said"
    other.mkdir()
    for path in said.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
        if path.suffix == ".txt":
            (other / path.name).write_text("the same for all")
    assert not same(one["model"], run(other, tmp_path / "b", "--max-steps", "3")["model"])


@pytest.mark.parametrize("process", [[], pytest.param(FLOW, marks=pytest.mark.long)])
def test_a_resumed_run_is_that_run(said, tmp_path, process):
    flags = ["--max-steps", "6", "--resume", "auto", *process]
    whole = run(said, tmp_path / "whole", *flags)
    run(said, tmp_path / "halves", "--max-steps", "3", *flags[2:])
    halves = run(said, tmp_path / "halves", *flags)
    assert halves["step"] == 6 and same(whole["model"], halves["model"])
    assert same(whole["ema"], halves["ema"])
    assert len(list((tmp_path / "halves").iterdir())) == 1


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="draws other noise on a GPU")
@pytest.mark.parametrize("more", [
    [], ["--fsdp", "--sample-every", "2"], ["--grad-accum", "2", *FLOW], ["--aspect-buckets"],
])  # fmt: skip
def test_two_processes_learn_what_one_does(said, tmp_path, more):
    shared = [*TEXT, "--max-steps", "4", *(flag for flag in more if flag != "--fsdp")]
    flags = [*shared, *more[: "--fsdp" in more]]
    done = forked(
        "train.py", "--data-path", said, *flags, "--results-dir", tmp_path / "two", processes=2
    )
    assert done.returncode == 0, done.stderr
    two = read_checkpoint(newest_checkpoint(tmp_path / "two" / "000-MMDiT-Ti-4"))
    one = run(said, tmp_path / "one", *shared[len(TEXT) :])
    for name, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][name], tensor, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("flags", [
    ["--mixed-precision", "bf16", "--qk-norm"], ["--aspect-buckets", "--model", "PixArt-Ti/2"],
    pytest.param(["--compile"], marks=pytest.mark.long),
    pytest.param(["--aspect-buckets", "--image-size", "32"], marks=pytest.mark.long),
])  # fmt: skip
def test_captions_go_with_the_other_switches(said, tmp_path, flags):
    contents = run(said, tmp_path, "--max-steps", "3", *flags)
    (folder,) = tmp_path.iterdir()
    assert contents["step"] == 3 and all(0 < row["loss"] < 3 for row in rows(folder))
    assert contents["config"].get("qk_norm", False) == ("--qk-norm" in flags)


def test_previews_are_of_captions_and_the_same_each_time(said, tmp_path, monkeypatch):
    """Previews change nothing of what is learned."""
    seen = []
    plain = run(said, tmp_path / "plain", "--max-steps", "4", *FLOW)
    monkeypatch.setattr(
        "sampling.sampler.Sampler.numbered_latents",
        lambda self, seed, indices, text: seen.append(text) or torch.zeros(len(text), 3, 16, 16),
    )
    with_previews = run(said, tmp_path / "some", "--max-steps", "4", "--sample-every", "2", *FLOW)
    assert same(plain["model"], with_previews["model"])
    source = open_source(
        DataOptions(said, image_size=SIZE, num_classes=0, condition="text", text_length=8)
    )
    wanted = source.drawn(0, range(16))
    assert len(seen) == 2
    assert all(torch.equal(text.tokens, wanted.tokens) for text in seen)
    previews = (tmp_path / "some" / "000-MMDiT-Ti-4" / "previews").iterdir()
    assert sorted(path.name for path in previews) == ["0000002.png", "0000004.png"]


def test_previews_and_scores_are_drawn(said, tmp_path):
    reference = tmp_path / "reference"
    reference.mkdir()
    for path in said.glob("*.png"):
        Image.open(path).crop((0, 0, SIZE, SIZE)).save(reference / path.name)
    run(
        said, tmp_path / "runs", "--max-steps", "2", "--sample-every", "2", "--eval-samples", "4",
        "--eval-every", "2", "--eval-reference", str(reference), "--eval-features", "pixels", *FLOW,
    )  # fmt: skip
    (folder,) = (tmp_path / "runs").iterdir()
    with Image.open(folder / "previews" / "0000002.png") as image:
        assert len(image.convert("L").getcolors(10**6)) > 50
    assert [row["eval_samples"] for row in rows(folder) if "eval_samples" in row] == [4]


def test_captions_that_are_too_long_are_told_once(said, tmp_path, capsys):
    run(said, tmp_path, "--max-steps", "1", "--text-length", "3")
    out = capsys.readouterr().out
    assert out.count("captions are longer than --text-length 3; the longest, of ") == 1
    # The even images have the first line alone; 5 odd ones have "an image of"
    assert re.search(r"note: 5 of 16 captions are longer", out)


# ---- a step ----


def text_state(*shares, **recipe):
    network = fill_randomly(
        MMDiT(
            input_size=8, patch_size=4, in_channels=3, hidden_size=32, depth=2, num_heads=2,
            text_length=8,
        )
    )  # fmt: skip
    condition = TextCondition(PieceReader(8).null, shares or PieceReader(8).shares)
    return new_state(network, Recipe(**recipe), condition=condition)


def test_a_dropped_caption_is_the_empty_one():
    """With a probability of 1 whatever the captions are, with 0 they count."""
    weights = {}
    for probability in (0.0, 1.0):
        for said in ("some words", "others"):
            state = text_state(lr=1e-2)
            draws = draw(
                0, 0, 4, (3, 8, 8), probability, state.process, "cpu", drops=state.condition.drops
            )
            latents = randn(4, 3, 8, 8, dtype=torch.float32)
            train_step(state, latents, pieces([said] * 4, 8), draws)
            weights[probability, said] = state.network.state_dict()
    assert not same(weights[0.0, "some words"], weights[0.0, "others"])
    assert same(weights[1.0, "some words"], weights[1.0, "others"])


def test_warming_up_leaves_nothing_behind():
    state = text_state(Share(slice(0, 4)), Share(slice(4, None)))
    before = {name: tensor.clone() for name, tensor in state.network.state_dict().items()}
    warm_up(state, torch.zeros(3, 3, 8, 8))
    assert same(before, state.network.state_dict()) and not state.opt.state
    assert all(p.grad is None for p in state.network.parameters())


# ---- weights of other runs ----


@pytest.fixture(scope="module")
def trained(said, tmp_path_factory):
    """A run of two steps."""
    from accelerate.state import AcceleratorState

    results = tmp_path_factory.mktemp("trained")
    run(said, results, "--max-steps", "2")
    AcceleratorState._reset_state(reset_partial_state=True)
    return newest_checkpoint(results / "000-MMDiT-Ti-4")


def test_a_new_run_begins_with_weights_that_read_text(said, trained, tmp_path):
    begun = run(
        said, tmp_path, "--init-from", str(trained), "--max-steps", "1", "--lr", "1e-12",
        "--image-size", "24",
    )  # fmt: skip
    ema = read_checkpoint(trained)["ema"]
    for name in ("text_encoder.bytes", "blocks.0.text.qkv.weight", "final_layer.linear.weight"):
        torch.testing.assert_close(begun["model"][name], ema[name], rtol=0, atol=1e-6)


OTHERS = [
    (["--text-length", "9"], "has text_length 8, the network here 9; pass --text-length 8"),
    (["--qk-norm"], "has qk_norm False, the network here True; pass --no-qk-norm"),
    (["--model", "MMDiT-Ti/2"], "has patch_size 4, the network here 2; give the --model"),
    (
        ["--model", "DiT-Ti/4", "--num-classes", "0"],
        "has the weights of a MMDiT, the network here is a DiT; pass a --model",
    ),
]  # fmt: skip


@pytest.mark.parametrize("flags, message", OTHERS)
@pytest.mark.parametrize("start", ["--init-from", "--resume"])
def test_weights_that_read_otherwise_are_refused(
    said, trained, tmp_path, capsys, start, flags, message
):
    if "DiT-Ti/4" in flags:
        labels = [flag for flag in TEXT if flag not in ("--text-length", "8")]
        with pytest.raises(SystemExit):
            train.main(
                ["--data-path", str(said), "--results-dir", str(tmp_path), *labels, *flags, start,
                 str(trained), "--max-steps", "9"]
            )  # fmt: skip
        error = capsys.readouterr().err
    else:
        error = refusal(said, tmp_path, capsys, *flags, start, str(trained), "--max-steps", "9")
    wanted = message.replace("; pass --no-qk-norm", "")
    assert f"{start} {trained} " in error and wanted in error


def test_a_run_with_other_captions_is_another_one(said, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for path in said.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    flags = ["--max-steps", "2", "--resume", "auto"]
    run(data, tmp_path / "results", *flags)
    (data / "03.txt").write_text("something else")
    run(data, tmp_path / "results", *flags)
    folders = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert folders == ["000-MMDiT-Ti-4", "001-MMDiT-Ti-4"]
    assert "has other images or captions in --data-path" in capsys.readouterr().out


# ---- what is wrong ----


WRONG = [
    (["--condition", "labels"], "--condition is labels, and --model MMDiT-Ti/4 reads text; leave"),
    (["--num-classes", "10"], "--num-classes is 10, and --model MMDiT-Ti/4, which reads text, has"),
    (["--num-classes", "1000"], "--num-classes is 1000, and --model MMDiT-Ti/4, which reads text"),
    (["--block", "adaln_zero"], "--block is adaln_zero, and --model MMDiT-Ti/4, which reads text"),
    (["--block", "adaln"], "--block is adaln, and --model MMDiT-Ti/4, which reads text, has no"),
    (["--positions", "rope"], "--positions is rope, and --model MMDiT-Ti/4"),
    (["--norm", "rms"], "--norm is rms, and --model MMDiT-Ti/4"),
    (["--mlp", "swiglu"], "--mlp is swiglu, and --model MMDiT-Ti/4"),
    (["--extrapolation", "extend"], "--extrapolation is extend, and --model MMDiT-Ti/4"),
    (["--pack", "16"], "--pack is for networks that read labels; "),
    (["--init-from", "x", "--init-labels", "drop"], "--init-labels is about classes"),
    (["--text-length", "1"], "--text-length is 1; it must be at least 2"),
    (["--text-encoder", "t5"], "--text-length is of the network's own encoder, and --text-encoder"),
]  # fmt: skip


@pytest.mark.parametrize("flags, message", WRONG)
def test_what_a_text_network_has_not_is_refused(said, tmp_path, capsys, flags, message):
    error = refusal(said, tmp_path, capsys, *flags)
    assert message.split(";")[0] in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_label_network_takes_no_text():
    for given, message in (
        ({"condition": "text"}, "`condition` is text, and `model` DiT-Ti/8 reads labels; leave"),
        ({"text_length": 8}, "`text_length` is 8, and `model` DiT-Ti/8, which reads labels, has"),
        ({"text_encoder": ("t5",)}, "`text_encoder` is given, and `model` DiT-Ti/8 reads labels"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainOptions(data_path="x", model="DiT-Ti/8", **given)
    assert TrainOptions(data_path="x").condition == "labels"


def test_no_captions_and_no_latents(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        Image.new("RGB", (SIZE, SIZE)).save(data / f"{i}.png")
    assert "none of the 4 images has a caption" in refusal(data, tmp_path / "r", capsys)
    encoder = [flag for flag in TEXT if flag not in ("--text-length", "8")]
    with pytest.raises(SystemExit):
        train.main(
            ["--data-path", str(data), "--results-dir", str(tmp_path / "r"), *encoder,
             "--text-encoder", "t5"]
        )  # fmt: skip
    assert "--text-encoder names encoders whose output lies beside" in capsys.readouterr().err


# ---- cached latents and outside encoders ----


def extract(said, output, vae, *flags):
    extract_latents.main(
        ["--data-path", str(said), "--output", str(output), "--vae", vae, "--image-size", "16",
         "--num-classes", "0", "--num-workers", "0", "--device", "cpu", *flags]
    )  # fmt: skip


def run_latents(results, latents, vae, *flags):
    """A run from latents; TEXT's --vae and --text-length do not count."""
    own = ["--text-length", "8"] if "--text-encoder" not in flags else []
    kept = TEXT[:4] + TEXT[8:]
    train.main(
        ["--latents", str(latents), "--vae", vae, "--results-dir", str(results), *kept, *own,
         "--model", "MMDiT-Ti/2", *flags]
    )  # fmt: skip
    return read_checkpoint(newest_checkpoint(sorted(results.iterdir())[-1]))


def test_cached_latents_bring_their_captions(said, vae, tmp_path):
    extract(said, tmp_path / "latents", vae)
    flags = [tmp_path / "latents", vae, "--max-steps", "3"]
    alone = run_latents(tmp_path / "a", *flags)
    both = run_latents(tmp_path / "b", *flags, "--data-path", str(said), "--num-workers", "2")
    assert same(alone["model"], both["model"]) and alone["config"]["in_channels"] == 4


@pytest.fixture(scope="module")
def encoded(said, vae, tmp_path_factory):
    """Latents with the output of encoders beside them, and the encoders."""
    folder = tmp_path_factory.mktemp("encoded")
    encoders = [str(encoder) for encoder in save_encoders(folder / "encoders")]
    extract(said, folder / "latents", vae, "--text-encoder", *encoders, "--text-length", "6")
    return folder / "latents", encoders


def test_outside_encoders_are_learned_with_and_said(said, encoded, vae, tmp_path, capsys):
    latents, encoders = encoded
    flags = [latents, vae, "--text-encoder", *encoders, "--resume", "auto", *FLOW]
    whole = run_latents(tmp_path / "whole", *flags, "--max-steps", "4", "--num-workers", "2")
    config = whole["config"]
    assert [one["name"] for one in config["text"]] == encoders
    tokens = config["text_length"], config["text_width"], config["pooled_width"]
    assert None not in tokens and "text_encoder.bytes" not in whole["model"]
    assert "1 of 12 images have no caption" in capsys.readouterr().out
    run_latents(tmp_path / "halves", *flags, "--max-steps", "2")
    halves = run_latents(tmp_path / "halves", *flags, "--max-steps", "4", "--sample-every", "4")
    assert same(whole["model"], halves["model"]) and same(whole["ema"], halves["ema"])


def test_encoders_that_did_not_read_the_captions_are_refused(
    said, encoded, vae, tmp_path, capsys
):
    latents, encoders = encoded
    for named in (encoders[:1], [*encoders[1:], encoders[0]], ["elsewhere"]):
        with pytest.raises(SystemExit):
            run_latents(tmp_path, latents, vae, "--text-encoder", *named)
        assert "have the output of " in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    for path in said.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "03.txt").write_text("something else")
    with pytest.raises(SystemExit):
        run_latents(
            tmp_path, latents, vae, "--text-encoder", *encoders, "--data-path", str(other)
        )
    assert "holds other captions than --text-encoder has read" in capsys.readouterr().err


def test_encoders_that_are_not_named_are_told(encoded, vae, tmp_path, capsys):
    run_latents(tmp_path, encoded[0], vae, "--max-steps", "1")
    assert "have the output of text encoders beside them, which is not used" in (
        capsys.readouterr().out
    )


def test_what_is_learned_becomes_a_pipeline_and_goes_on_from_one(encoded, vae, tmp_path):
    """Stable Diffusion 3's way to tell the noise level is that of a flow with outside encoders."""
    latents, encoders = encoded
    flags = [latents, vae, "--text-encoder", *encoders, "--max-steps", "1", "--lr", "1e-12"]
    learned = run_latents(tmp_path / "a", *flags, *FLOW)
    assert learned["config"]["noise_steps"] == 1000
    pipeline = tmp_path / "pipeline"
    ckpt = str(tmp_path / "a" / "000-MMDiT-Ti-2")
    export.main(["--ckpt", ckpt, "--vae", vae, "--format", "diffusers", "--output", str(pipeline)])
    begun = run_latents(tmp_path / "b", *flags, *FLOW, "--init-from", str(pipeline))
    for name, tensor in learned["ema"].items():
        torch.testing.assert_close(begun["model"][name], tensor, rtol=0, atol=1e-6)
    alone = tmp_path / "alone"  # which says nothing of encoders, nor how many tokens they give
    shutil.copytree(pipeline / "transformer", alone)
    said = json.loads((alone / "config.json").read_text())
    kept = {name: value for name, value in said.items() if not name.startswith("_dit")}
    (alone / "config.json").write_text(json.dumps(kept))
    begun = run_latents(tmp_path / "c", *flags, *FLOW, "--init-from", str(alone))
    assert begun["config"]["text_length"] == learned["config"]["text_length"]
    diffusion = run_latents(tmp_path / "d", *flags)
    assert diffusion["config"]["noise_steps"] is None
