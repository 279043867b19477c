"""train.py and training.py: the recipe's formulas, runs on one and two processes, resuming, and
what users get wrong.
"""

import argparse
from functools import lru_cache
import json
import os
from pathlib import Path

from accelerate.state import AcceleratorState
import huggingface_hub
import numpy as np
from PIL import Image
import pytest
import torch

from checkpoints.files import list_checkpoints, newest_checkpoint, read_checkpoint
from conftest import ROOT, fill_randomly, randn
from diffusion import create_diffusion
from models import DiT, DiT_models
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from starts import each_start, forked
from training import cost
from training import flags as training_flags
from training import folder_lock
from training import loop
from training import run_folder
import train
from training.options import TrainOptions
from training.state import Recipe, Window, new_state
from training.step import draw, train_step, update_ema

SIZE = 16
PROCESS = GaussianProcess()
# What is learned, and the flags that ask for it
LEARNED = {
    "diffusion": PROCESS,
    "flow": FlowProcess(path="gvp", time_sampling="logit-normal:0,1", cosine_loss=True),
}  # fmt: skip
ASKED = {
    "diffusion": [],
    "flow": [
        "--process", "flow", "--path", "gvp", "--time-sampling", "logit-normal:0,1",
        "--cosine-loss",
    ],
}  # fmt: skip
QUICK = [
    "--model", "DiT-Ti/8", "--image-size", str(SIZE), "--vae", "none", "--num-classes", "3",
    "--global-batch-size", "4", "--num-workers", "0", "--device", "cpu", "--log-every", "2", "--lr",
    "1e-2", "--ema-decay", "0.5",
]  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerator(monkeypatch):
    """Accelerate remembers its first settings for the life of a process; each run here has its own.

    What a network costs is counted once, which takes as long as two short runs.
    """
    monkeypatch.setattr(
        cost, "training_flops", lambda config, *space: flops_of(json.dumps(config), *space)
    )
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@lru_cache
def flops_of(config, *space, counted=cost.training_flops):
    """What training_flops returns for a configuration, here as JSON, and a space."""
    return counted(json.loads(config), *space)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 3 classes with 4 images each."""
    folder, source = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(12):
        path = folder / "train" / ["ape", "bee", "cat"][i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.integers(0, 256, (SIZE, SIZE + 5, 3), dtype=np.uint8)).save(path)
    return folder / "train"


def run(images, results, *flags):
    """Train with QUICK flags and these; the newest checkpoint's contents."""
    train.main(["--data-path", str(images), "--results-dir", str(results), *QUICK, *flags])
    folder = sorted(Path(results).iterdir())[-1]
    return read_checkpoint(newest_checkpoint(folder))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_flags_found_in_the_wild_keep_their_defaults():
    args = vars(training_flags.build_parser("").parse_args(["--data-path", "x"]))
    wild = dict(
        data_path="x", results_dir="results", model="DiT-XL/2", image_size=256, num_classes=1000,
        epochs=1400, global_batch_size=256, global_seed=0, vae="ema", num_workers=4, log_every=100,
        ckpt_every=50000,
    )  # fmt: skip
    assert {name: args[name] for name in wild} == wild
    ours = dict(
        max_steps=None, lr=1e-4, ema_decay=[0.9999], mixed_precision="no", resume=None, device=None,
        flip=True, skip_bad_images=False, latents=None, init_from=None, init_labels="keep",
        warmup_steps=0, weight_decay=0.0, grad_clip=None, max_bad_steps=10, grad_accum=1,
        grad_checkpointing=False, compile=False, tf32=True, fsdp=False, ckpt_minutes=None,
        keep_last=None, on_save_error="stop", sample_every=None, log_with=None, eval_every=None,
        eval_samples=10_000, eval_reference=None, eval_features="inception", block="adaln_zero",
        learn_sigma=None, process="diffusion", path=None, prediction=None, loss_weight=None,
        time_sampling=None, time_shift=None, cosine_loss=None, train_eps=None, positions="table",
        norm="layer", mlp="gelu", qk_norm=False, extrapolation=None, aspect_buckets=False,
        pack=None, condition=None, text_length=None, text_encoder=None, frames=None, frame_stride=1,
        frame_rate=None, given_frames=0.0, exits=None, dynamic=None,
    )  # fmt: skip
    assert args == wild | ours


def test_a_run_leaves_a_log_and_checkpoints_that_say_all(images, tmp_path, capsys):
    contents = run(images, tmp_path, "--max-steps", "5", "--ckpt-every", "2")
    folder = tmp_path / "000-DiT-Ti-8"
    assert [p.name for p in list_checkpoints(folder)] == ["0000002.pt", "0000004.pt", "0000005.pt"]
    assert set(contents) == {
        "model", "ema", "opt", "args", "step", "config", "classes", "rng", "log",
    }  # fmt: skip
    assert (
        contents["step"] == 5
        and contents["classes"] == ["ape", "bee", "cat"]
        and contents["args"]["lr"] == 1e-2
    )
    network = DiT(**contents["config"])
    network.load_state_dict(contents["model"])
    assert list(contents["ema"]) == list(contents["model"]) == list(network.state_dict())
    assert not torch.equal(
        contents["ema"]["final_layer.linear.weight"], contents["model"]["final_layer.linear.weight"]
    )
    log = (folder / "log.txt").read_text()
    assert log == capsys.readouterr().out
    lines = [line for line in log.splitlines() if " images/s" in line]
    assert [line.split("] ")[1].split(" of")[0] for line in lines] == [
        "step 0000002", "step 0000004", "step 0000005",
    ]  # fmt: skip
    assert all(name.replace("_", " ") in line for line in lines for name in Window(PROCESS).shown)


def test_loss_falls(images, tmp_path, capsys):
    run(images, tmp_path, "--max-steps", "60", "--log-every", "20", "--lr", "2e-3")
    losses = [
        float(line.split("loss ")[1].split(",")[0])
        for line in capsys.readouterr().out.splitlines()
        if " loss " in line
    ]
    assert len(losses) == 3 and losses[-1] < 0.9 * losses[0]


def test_epochs_end_a_run(images, tmp_path):
    assert run(images, tmp_path, "--epochs", "2")["step"] == 6


def test_workers_change_nothing(images, tmp_path):
    alone, helped = (
        run(images, tmp_path / n, "--max-steps", "4", "--num-workers", n) for n in ("0", "2")
    )
    assert same(alone["model"], helped["model"]) and same(alone["ema"], helped["ema"])


def test_seed_decides(images, tmp_path):
    one, other = (
        run(images, tmp_path / s, "--max-steps", "2", "--global-seed", s) for s in ("1", "2")
    )
    assert not same(one["model"], other["model"])


OTHER_PARTS = ["--positions", "table+rope", "--norm", "rms", "--mlp", "swiglu", "--qk-norm"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="draws other noise on a GPU")
@each_start
def test_two_processes_learn_what_one_does(images, tmp_path, start):
    learns_alike(images, tmp_path, start)


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="draws other noise on a GPU")
@pytest.mark.parametrize("more", [[], ["--fsdp"]])
def test_two_processes_learn_what_one_does_with_other_parts(images, tmp_path, more):
    learns_alike(images, tmp_path, forked, OTHER_PARTS, more)


def learns_alike(images, tmp_path, start, parts=(), more=()):
    """Whether two processes, started so, learn what one does, with these parts; `more` are flags of
    the two.
    """
    default_device = QUICK.index("--device")  # without the flag: the CPU, if there is nothing else
    flags = [
        "--data-path", str(images), "--max-steps", "4", *QUICK[:default_device],
        *QUICK[default_device + 2 :], *parts,
    ]  # fmt: skip
    done = start("train.py", *flags, *more, "--results-dir", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout and os.listdir(tmp_path / "two") == ["000-DiT-Ti-8"]
    two = read_checkpoint(newest_checkpoint(tmp_path / "two" / "000-DiT-Ti-8"))
    one = run(images, tmp_path / "one", "--max-steps", "4", *parts)
    for part in ("model", "ema"):
        assert list(one[part]) == list(two[part])
        for name in one[part]:
            torch.testing.assert_close(two[part][name], one[part][name], rtol=1e-3, atol=2e-4)
    lines = [[x for x in text.splitlines() if " loss " in x] for text in (
        done.stdout, (tmp_path / "one" / "000-DiT-Ti-8" / "log.txt").read_text())]  # fmt: skip
    losses = [[float(x.split("loss ")[1].split(",")[0]) for x in some] for some in lines]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4) and len(losses[0]) == 2


def test_other_parts_are_refused_by_name(images, tmp_path, capsys):
    run(images, tmp_path / "first", "--max-steps", "1", *OTHER_PARTS)
    here = ["--max-steps", "2", "--resume", str(tmp_path / "first" / "000-DiT-Ti-8")]
    for flag, at in {"positions": 0, "norm": 2, "mlp": 4, "qk-norm": 6}.items():
        kept = [word for i, word in enumerate(OTHER_PARTS) if i not in (at, at + 1)]
        with pytest.raises(SystemExit):
            run(images, tmp_path / "second", *here, *kept)
        assert f"; pass --{flag}" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize("resume, process", [
    ("auto", "diffusion"), ("PATH", "diffusion"), ("auto", "flow"),
])  # fmt: skip
def test_resumed_run_ends_as_one_that_was_not_interrupted(images, tmp_path, resume, process):
    flags = ASKED[process]
    whole = run(images, tmp_path / "whole", "--max-steps", "6", *flags)
    run(images, tmp_path / "parts", "--max-steps", "3", *flags)
    folder = tmp_path / "parts" / "000-DiT-Ti-8"
    resumed = run(
        images, tmp_path / "parts", "--max-steps", "6", *flags, "--resume",
        resume.replace("PATH", str(folder)),
    )  # fmt: skip
    assert [p.name for p in (tmp_path / "parts").iterdir()] == [folder.name]
    assert same(whole["model"], resumed["model"]) and same(whole["ema"], resumed["ema"])
    for theirs, ours in zip(
        whole["opt"]["state"].values(), resumed["opt"]["state"].values(), strict=True
    ):
        assert same(theirs, ours)


def test_a_finished_run_says_so(images, tmp_path, capsys):
    run(images, tmp_path, "--max-steps", "2")
    checkpoint = list_checkpoints(tmp_path / "000-DiT-Ti-8")[-1].stat()
    run(images, tmp_path, "--max-steps", "2", "--resume", "auto")
    assert "at its last step already; raise --epochs or --max-steps" in capsys.readouterr().out
    assert list_checkpoints(tmp_path / "000-DiT-Ti-8")[-1].stat() == checkpoint


def test_resume_auto_starts_anew_beside_a_run_with_other_arguments(images, tmp_path, capsys):
    run(images, tmp_path, "--max-steps", "2")
    assert (
        run(images, tmp_path, "--max-steps", "2", "--resume", "auto", "--global-seed", "5")["step"]
        == 2
    )
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["000-DiT-Ti-8", "001-DiT-Ti-8"]
    assert "000-DiT-Ti-8 has other --global-seed" in capsys.readouterr().out


def test_resuming_with_other_arguments_leaves_the_first_run_alone(images, tmp_path, capsys):
    run(images, tmp_path, "--max-steps", "2")
    contents = run(
        images, tmp_path, "--max-steps", "3", "--lr", "3e-4", "--resume",
        str(tmp_path / "000-DiT-Ti-8"),
    )  # fmt: skip
    assert contents["step"] == 3 and contents["opt"]["param_groups"][0]["lr"] == 3e-4
    assert [p.name for p in list_checkpoints(tmp_path / "000-DiT-Ti-8")] == ["0000002.pt"]
    assert "which was made with other --lr" in capsys.readouterr().out


def test_runs_that_share_a_number_or_come_from_elsewhere_do_not_hide_one(
    images, tmp_path, monkeypatch, capsys
):
    run(images, tmp_path, "--max-steps", "2")
    (tmp_path / "000-backup").mkdir()
    foreign = tmp_path / "001-DiT-XL-2" / "checkpoints" / "0000100.pt"
    foreign.parent.mkdir(parents=True)
    torch.save({"model": {}, "ema": {}, "opt": {}, "args": argparse.Namespace(lr=1)}, foreign)
    damaged = tmp_path / "002-DiT-XL-2" / "checkpoints" / "0000100.pt"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(foreign.read_bytes()[:300])
    monkeypatch.chdir(images.parent)
    train.main(
        [
            "--data-path",
            images.name,
            "--results-dir",
            str(tmp_path),
            *QUICK,
            "--max-steps",
            "3",
            "--resume",
            "auto",
        ]
    )
    assert "going on from" in capsys.readouterr().out
    assert len(list_checkpoints(tmp_path / "000-DiT-Ti-8")) == 2


def test_a_number_that_is_taken_meanwhile_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "run_folders", lambda results_dir: [])
    options = TrainOptions(data_path="x", results_dir=str(tmp_path), model="DiT-S/2")
    with folder_lock.FolderLock() as lock:
        folders = [run_folder.new_folder(options, run_folder.Data(""), lock).name for _ in range(3)]
    assert folders == ["000-DiT-S-2", "001-DiT-S-2", "002-DiT-S-2"]


@pytest.mark.parametrize("part, value", [
    ("opt", {}), ("opt", None), ("step", "x"), ("step", -3), ("ema", {}), ("model", None),
    ("step", torch.tensor(2)),
])  # fmt: skip
def test_a_checkpoint_with_a_wrong_part_is_refused(images, tmp_path, capsys, part, value):
    contents = run(images, tmp_path / "good", "--max-steps", "1")
    torch.save({**contents, part: value}, tmp_path / "wrong.pt")
    with pytest.raises(SystemExit):
        run(images, tmp_path / "new", "--max-steps", "2", "--resume", str(tmp_path / "wrong.pt"))
    assert "wrong.pt" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize("flag", ["--resume", "--init-from"])
@pytest.mark.parametrize("changes, message", [
    ({"new_part": 3}, "has a configuration that this version does not know"),
    ({"block": "new_design"}, "block is 'new_design'; choose one of"),
])  # fmt: skip
def test_a_network_of_a_newer_version_is_not_trained_on(
    images, tmp_path, capsys, flag, changes, message
):
    """Its weights fit, and what it computes with them may be something else."""
    contents = run(images, tmp_path / "good", "--max-steps", "1")
    path = tmp_path / "newer.pt"
    torch.save({**contents, "config": contents["config"] | changes}, path)
    with pytest.raises(SystemExit):
        run(images, tmp_path / "new", "--max-steps", "2", flag, str(path))
    error = capsys.readouterr().err
    assert message in error and flag in error and not (tmp_path / "new").exists()


def test_interrupted_from_the_keyboard(images, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train_step", interrupt)
    with pytest.raises(SystemExit) as stopped:
        run(images, tmp_path, "--max-steps", "2")
    assert stopped.value.code == 130 and "interrupted after step 0" in capsys.readouterr().out


def test_no_readable_image_at_all(images, tmp_path):
    for path in images.glob("*/*.png"):
        target = tmp_path / "all" / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"no image")
    with pytest.raises(SystemExit, match="cannot read"):
        run(tmp_path / "all", tmp_path / "results", "--epochs", "1", "--skip-bad-images")


def test_resuming_an_older_checkpoint_overwrites_none(images, tmp_path):
    run(images, tmp_path, "--max-steps", "4", "--ckpt-every", "2")
    kept = (tmp_path / "000-DiT-Ti-8" / "checkpoints" / "0000004.pt").stat()
    path = tmp_path / "000-DiT-Ti-8" / "checkpoints" / "0000002.pt"
    assert run(images, tmp_path, "--max-steps", "4", "--resume", str(path))["step"] == 4
    assert (tmp_path / "000-DiT-Ti-8" / "checkpoints" / "0000004.pt").stat() == kept
    assert (tmp_path / "001-DiT-Ti-8" / "checkpoints" / "0000004.pt").exists()


def test_bf16_keeps_float32_weights(images, tmp_path):
    exact = run(images, tmp_path / "no", "--max-steps", "3")
    AcceleratorState._reset_state(reset_partial_state=True)
    mixed = run(images, tmp_path / "bf16", "--max-steps", "3", "--mixed-precision", "bf16")
    assert all(tensor.dtype == torch.float32 for tensor in mixed["model"].values())
    assert not same(exact["model"], mixed["model"])
    for name, tensor in exact["model"].items():
        # Three steps of 1e-2 in either direction at most
        assert (mixed["model"][name] - tensor).abs().max() < 0.07


def test_unconditional_training_on_a_flat_folder(images, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in images.glob("*/*.png"):
        (flat / path.name).write_bytes(path.read_bytes())
    contents = run(flat, tmp_path / "results", "--num-classes", "0", "--max-steps", "2")
    assert contents["classes"] is None and not any(
        name.startswith("y_embedder") for name in contents["model"]
    )


@pytest.fixture
def broken(images, tmp_path):
    """The images, one of them cut short."""
    for path in images.glob("*/*.png"):
        target = tmp_path / "broken" / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    victim = tmp_path / "broken" / "bee" / "04.png"
    victim.write_bytes(victim.read_bytes()[:60])
    return tmp_path / "broken"


def test_unreadable_image_stops_the_run_by_name(broken, tmp_path):
    with pytest.raises(SystemExit, match=r"cannot read .*04\.png .*--skip-bad-images"):
        run(broken, tmp_path / "results", "--epochs", "1")


def test_unreadable_image_is_skipped_and_listed_once(broken, tmp_path, capsys):
    assert run(broken, tmp_path / "results", "--epochs", "2", "--skip-bad-images")["step"] == 6
    lines = [line for line in capsys.readouterr().out.splitlines() if "skipped unreadable" in line]
    assert len(lines) == 1 and "04.png" in lines[0] and "1 so far" in lines[0]


BAD = [
    (["--model", "DiT-M/2"], "invalid choice: 'DiT-M/2'"),
    (["--image-size", "20"], "image size 20 is not a multiple of 8"),
    (
        ["--image-size", "250", "--vae", "ema", "--model", "DiT-XL/2"],
        "image size 250 is not a multiple of 16",
    ),
    (["--data-path", "nowhere"], "nowhere is not a folder"),
    (["--num-classes", "2"], "3 class folders, --num-classes is 2: there is no room for cat"),
    (["--global-batch-size", "13"], "12 images do not fill one batch of 13"),
    (["--global-batch-size", "0"], "--global-batch-size is 0"),
    (["--max-steps", "0"], "--max-steps is 0"),
    (["--lr", "-1"], "--lr is -1.0"),
    (["--lr", "nan"], "--lr is nan"),
    (["--ema-decay", "1"], "--ema-decay is 1.0"),
    (["--global-seed", "-1"], "--global-seed is -1"),
    (["--vae", "no/such/vae"], "cannot load VAE 'no/such/vae'"),
    (["--resume", "nowhere.pt"], "--resume nowhere.pt: there is no such checkpoint"),
    (
        ["--resume", str(ROOT / "examples/digits/dit.safetensors")],
        "dit.safetensors holds weights alone; a new run starts from them with --init-from",
    ),
    (["--results-dir", "/proc/results"], "cannot make the run folder"),
]


@pytest.mark.parametrize("flags, message", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_a_mistake_gets_one_message_and_leaves_nothing(
    images, tmp_path, capsys, monkeypatch, flags, message
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    results = tmp_path / "results"
    with pytest.raises(SystemExit) as stopped:
        run(images, results, *flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not results.exists()


def test_resuming_another_network_names_keys_and_shapes(images, tmp_path, capsys):
    run(images, tmp_path, "--max-steps", "1")
    with pytest.raises(SystemExit):
        run(images, tmp_path, "--model", "DiT-Ti/4", "--resume", str(tmp_path / "000-DiT-Ti-8"))
    error = capsys.readouterr().err
    assert (
        "of another configuration" in error
        and "pos_embed is (1, 4, 128), wanted (1, 16, 128)" in error
    )


@each_start
def test_batch_that_processes_cannot_share(images, tmp_path, start):
    flags = [
        "--data-path", str(images), "--results-dir", str(tmp_path / "r"), *QUICK,
        "--global-batch-size", "5",
    ]  # fmt: skip
    done = start("train.py", *flags, processes=2)
    assert (
        done.returncode != 0
        and "--global-batch-size 5 cannot be shared equally by 2 process(es)" in done.stderr
    )
    # Torchrun shows a traceback of its own, none of ours
    assert 'train.py", line' not in done.stderr


def pixel_state(process="diffusion", **recipe):
    learned = LEARNED[process]
    network = fill_randomly(
        DiT(
            input_size=8,
            patch_size=4,
            in_channels=3,
            hidden_size=16,
            depth=1,
            num_heads=2,
            num_classes=4,
            learn_sigma=learned.learns_sigma,
        )
    )
    recipe = {"lr": 1e-2, "ema_decay": (0.9,)} | recipe
    return new_state(network, Recipe(**recipe), process=learned)


@pytest.mark.parametrize("process", LEARNED.values(), ids=LEARNED)
def test_draws_of_all_processes_are_those_of_one(process):
    whole = draw(3, 7, 8, (3, 4, 4), 0.5, process, "cpu")
    shares = [draw(3, 7, 8, (3, 4, 4), 0.5, process, "cpu", rank, 4) for rank in range(4)]
    for i, values in enumerate(whole):
        assert torch.equal(values, torch.cat([share[i] for share in shares]))
    assert not torch.equal(whole.vae_noise, whole.noise)
    other = [
        draw(seed, step, 8, (3, 4, 4), 0.5, process, "cpu").noise for seed, step in ((3, 8), (4, 7))
    ]
    assert not any(torch.equal(whole.noise, noise) for noise in other)


def test_draws_have_their_distributions():
    draws = draw(0, 0, 20000, (1, 1, 1), 0.1, PROCESS, "cpu")
    assert 0.09 < draws.drop.double().mean() < 0.11
    assert draws.t.min() == 0 and draws.t.max() == 999 and abs(draws.t.double().mean() - 499.5) < 10
    assert abs(draws.noise.mean()) < 0.03 and abs(draws.noise.std() - 1) < 0.03


def test_train_step_is_adamw_on_the_mean_loss_with_labels_dropped_as_drawn():
    state, reference = pixel_state(), pixel_state().network.train()
    x = randn(6, 3, 8, 8, dtype=torch.float32)
    labels, draws = torch.arange(6) % 4, draw(0, 0, 6, (3, 8, 8), 0.5, PROCESS, "cpu")
    assert 0 < draws.drop.sum() < 6
    start = {name: p.detach().clone() for name, p in reference.named_parameters()}
    report = train_step(state, x, labels, draws)

    y = torch.where(draws.drop == 1, 4, labels)
    losses = create_diffusion("").training_losses(
        reference.eval(), x, draws.t, dict(y=y), noise=draws.noise
    )
    losses["loss"].mean().backward()
    grads = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in grads.values()))
    expected = {k: losses[k].sum().item() for k in ("loss", "mse", "vb")} | {
        "gradient_norm": norm.item()
    }
    assert {name: report[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    for name, p in state.network.named_parameters():
        if name == "pos_embed":
            assert torch.equal(p, start[name])
            continue
        # AdamW's first step, no weight decay
        step = 1e-2 * grads[name] / (grads[name].abs() + 1e-8)
        torch.testing.assert_close(p, start[name] - step, rtol=1e-3, atol=1e-5)
        ema = dict(state.ema.named_parameters())[name]
        torch.testing.assert_close(ema, 0.9 * start[name] + 0.1 * p.detach(), rtol=1e-5, atol=1e-6)


def test_update_ema_follows_the_formula_and_leaves_the_frozen_table():
    network = fill_randomly(DiT_models["DiT-Ti/8"](input_size=8, num_classes=3))
    average = fill_randomly(DiT_models["DiT-Ti/8"](input_size=8, num_classes=3), seed=1)
    before = {name: p.detach().clone() for name, p in average.named_parameters()}
    with torch.no_grad():
        network.pos_embed.add_(1.0)
    train.update_ema(average, network, decay=0.75)
    for (name, now), (_, live) in zip(average.named_parameters(), network.named_parameters()):
        wanted = before[name] if name == "pos_embed" else 0.75 * before[name] + 0.25 * live
        torch.testing.assert_close(now, wanted, rtol=1e-6, atol=1e-7)


def test_update_ema_copies_buffers_and_takes_wrapped_networks():
    networks = [
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)) for _ in range(2)
    ]
    networks[1](randn(5, 2, dtype=torch.float32))
    update_ema(networks[0], networks[1], decay=0.5)
    for ours, theirs in zip(networks[0].buffers(), networks[1].buffers()):
        assert torch.equal(ours, theirs)
    assert train.requires_grad(networks[0], False) is networks[0]
    assert not any(p.requires_grad for p in networks[0].parameters())


def test_names_that_others_import():
    assert train.center_crop_arr.__module__ == "data.images"
    assert train.update_ema is update_ema
