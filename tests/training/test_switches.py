"""The switches of training: what each changes, and that the others change nothing but rounding."""

import json
import os

import numpy as np
from PIL import Image
import pytest
import torch

from checkpoints.fitting import adapt, read_label_map
from checkpoints.weights import Weights, load_weights, weights_choice
from conftest import fill_randomly, randn
from diffusion import create_diffusion
from models import DiT, DiT_models
import sample
from starts import each_start, forked, fresh
from training import loop
from test_runs import rows
from test_train import ASKED, LEARNED, QUICK, SIZE, pixel_state, run, same
from test_train import fresh_accelerator, images  # noqa: F401
import train
from training.cost import training_flops
from processes.gaussian import GaussianProcess
from processes.process import QUARTERS
from training.state import Recipe, Window
from training.step import draw, train_step

each_process = pytest.mark.parametrize("process", LEARNED)


def batch(n=8, seed=0, step=0, process="diffusion"):
    """Latents (n, 3, 8, 8), labels and the draws of a step, for pixel_state."""
    return (
        randn(n, 3, 8, 8, seed=seed, dtype=torch.float32), torch.arange(n) % 4,
        draw(0, step, n, (3, 8, 8), 0.5, LEARNED[process], "cpu"),
    )  # fmt: skip


def steps(state, count=3):
    """The state after some steps, and the report of the last."""
    for step in range(count):
        report = train_step(state, *batch(step=step, process=state.process.word))
    return state, report


def parameters_of(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


# ---- the recipe ----


@each_process
def test_accumulation_changes_rounding_only(process):
    (plain, report), (parts, same_report) = (
        steps(pixel_state(process, lr=1e-3, grad_accum=n)) for n in (1, 4)
    )
    before = pixel_state(process).network
    assert not torch.equal(parameters_of(plain.network), parameters_of(before))
    torch.testing.assert_close(
        parameters_of(parts.network), parameters_of(plain.network), rtol=1e-4, atol=2e-5
    )
    assert same_report == pytest.approx(report, rel=1e-4)


@each_process
def test_checkpointing_changes_nothing_and_calls_each_block_twice(process):
    plain, again = pixel_state(process), pixel_state(process)
    again.network.grad_checkpointing = True
    calls = []
    again.network.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    steps(plain), steps(again)
    assert len(calls) == 6
    assert torch.equal(parameters_of(plain.network), parameters_of(again.network))
    again.network.eval()(batch()[0], torch.zeros(8), torch.zeros(8, dtype=torch.long))
    assert len(calls) == 7


def test_clipping_scales_the_gradient_to_the_norm():
    norms = []
    for limit in (None, 0.01, 1e6):
        state = pixel_state(lr=1e-2, grad_clip=limit)
        step_of = state.opt.step

        def step():
            norms.append(
                torch.nn.utils.get_total_norm(
                    [p.grad for p in state.network.parameters() if p.grad is not None]
                )
            )
            step_of()

        state.opt.step = step
        report = train_step(state, *batch())
    assert norms[0] == norms[2] == pytest.approx(report["gradient_norm"]) and norms[0] > 0.02
    assert norms[1].item() == pytest.approx(0.01, rel=1e-3)


def test_warmup_is_linear_and_ends():
    recipe = Recipe(lr=8.0, warmup_steps=4)
    assert [recipe.rate(step) for step in range(6)] == [2, 4, 6, 8, 8, 8]
    assert Recipe(lr=3.0).rate(0) == 3
    state, _ = steps(pixel_state(lr=1e-2, warmup_steps=10), 2)
    assert state.opt.param_groups[0]["lr"] == pytest.approx(2e-3)


def test_weight_decay_is_adamws():
    plain, decayed = (steps(pixel_state(lr=1e-2, weight_decay=decay), 1)[0] for decay in (0.0, 0.5))
    before = pixel_state().network
    for p, q, start in zip(
        plain.network.parameters(), decayed.network.parameters(), before.parameters()
    ):
        if p.requires_grad:
            torch.testing.assert_close(q, p - 1e-2 * 0.5 * start, rtol=1e-4, atol=1e-7)


@each_process
def test_each_decay_has_its_average(process):
    state, _ = steps(pixel_state(process, ema_decay=(0.9, 0.0)))
    alone, _ = steps(pixel_state(process, ema_decay=(0.9,)))
    assert torch.equal(parameters_of(state.ema), parameters_of(alone.ema))
    torch.testing.assert_close(parameters_of(state.emas[0.0]), parameters_of(state.network))


@each_process
def test_bf16_runs_the_network_in_bf16_and_the_rest_in_float32(process, monkeypatch):
    state, seen = pixel_state(process, bf16=True), {}
    state.network.blocks[0].attn.register_forward_hook(
        lambda _, __, out: seen.update(attention=out.dtype)
    )
    state.network.final_layer.norm_final.register_forward_hook(
        lambda _, __, out: seen.update(norm=out.dtype)
    )
    losses_of = state.process.losses
    monkeypatch.setattr(
        state.process, "losses", lambda *args, **kw: seen.update(losses_of(*args, **kw)) or seen
    )
    train_step(state, *batch(process=process))
    assert seen["attention"] == torch.bfloat16 and seen["norm"] == torch.float32
    assert {seen[key].dtype for key in state.process.parts} == {torch.float32}
    assert {p.dtype for p in state.network.parameters()} == {torch.float32}
    assert {v.dtype for moments in state.opt.state.values() for v in moments.values()} == {
        torch.float32
    }


# ---- the report ----


def test_the_report_adds_up():
    state = pixel_state()
    latents, labels, draws = batch(16)
    report = train_step(state, latents, labels, draws, stop=True)
    assert report["stop"] == 1 and report["save"] == 0 and report["bad"] == 0
    counts = [report[f"samples_q{q + 1}"] for q in range(QUARTERS)]
    assert counts == torch.histc(draws.t.float(), 4, 0, 1000).tolist() and sum(counts) == 16
    assert sum(report[f"mse_q{q + 1}"] for q in range(QUARTERS)) == pytest.approx(
        report["mse"], rel=1e-5
    )
    reference = fill_randomly(DiT(**state.network.config)).train()
    y = torch.where(draws.drop == 1, 4, labels)
    mse = create_diffusion("").training_losses(
        reference.eval(), latents, draws.t, dict(y=y), noise=draws.noise
    )["mse"]
    assert report["mse_q2"] == pytest.approx(
        mse[(draws.t >= 250) & (draws.t < 500)].sum().item(), rel=1e-4
    )


def test_the_report_is_summed_over_processes():
    report = train_step(
        pixel_state(), *batch(), reduce=lambda values: 3 * values, save=True
    )
    alone = train_step(pixel_state(), *batch())
    assert report["save"] == 3 and report["loss"] == pytest.approx(3 * alone["loss"])
    assert report["gradient_norm"] == alone["gradient_norm"]


@each_process
def test_one_read_per_step(monkeypatch, process):
    state, reads = pixel_state(process), []
    steps(state, 1)
    for name in ("item", "tolist", "__bool__", "__float__", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name,
            lambda self, *a, _o=original, _n=name: reads.append(_n) or _o(self, *a),
        )  # fmt: skip
    arguments = batch(process=process)
    train_step(state, *arguments)
    assert reads.count("tolist") == 1 and set(reads) == {"tolist"}


def test_window_means():
    window = Window(GaussianProcess())
    report = dict.fromkeys(window.shown, 4.0)
    report |= {f"{name}_q{q}": 0.0 for name in ("mse", "samples") for q in range(1, 5)} | {
        "mse_q2": 3.0,
        "samples_q2": 2.0,
    }
    assert set(window.means(2).values()) == {None}
    window.add(report)
    window.add({**report, "gradient_norm": 8.0})
    assert window.means(2) == dict(
        loss=2.0, mse=2.0, vb=2.0, gradient_norm=6.0, mse_q1=None, mse_q2=1.5, mse_q3=None,
        mse_q4=None,
    )  # fmt: skip


def test_operations_of_training():
    assert training_flops(dict(DiT_models["DiT-XL/2"].keywords)) == pytest.approx(
        6 * 118.621e9, rel=1e-4
    )
    assert training_flops(dict(input_size=8, patch_size=2, num_classes=0)) > 0


# ---- the guard ----


def poisoned(monkeypatch, bad_steps):
    """train_step, with latents that are not a number at these steps."""
    step_of = loop.train_step

    def step(state, latents, *args, **kwargs):
        latents = latents * float("nan") if state.step in bad_steps else latents
        return step_of(state, latents, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", step)


@each_process
def test_a_bad_step_changes_nothing_and_is_counted(process):
    state, _ = steps(pixel_state(process))
    before = [parameters_of(x) for x in (state.network, state.ema)]
    moments = [v.clone() for m in state.opt.state.values() for v in m.values()]
    window = list(state.window.sums)
    latents, labels, draws = batch(process=process)
    latents[3, 0, 0, 0] = float("inf")
    report = train_step(state, latents, labels, draws)
    assert report["bad"] == 1 and (state.step, state.bad_steps, state.bad_in_a_row) == (4, 1, 1)
    assert all(torch.equal(a, parameters_of(b)) for a, b in zip(before, (state.network, state.ema)))
    assert all(
        torch.equal(a, b)
        for a, b in zip(moments, [v for m in state.opt.state.values() for v in m.values()])
    )
    assert state.window.sums == window and all(p.grad is None for p in state.network.parameters())
    report = train_step(state, *batch(process=process))
    assert report["bad"] == 0 and (state.bad_steps, state.bad_in_a_row) == (1, 0)


def test_a_bad_gradient_alone_is_bad_and_another_process_can_find_it():
    state = pixel_state()
    state.network.final_layer.linear.weight.register_hook(lambda grad: grad * float("nan"))
    assert train_step(state, *batch())["bad"] == 1

    def other_process_found_one(values):
        values[2] += 1
        return values

    state = pixel_state()
    before = parameters_of(state.network)
    assert (
        train_step(state, *batch(), reduce=other_process_found_one)["bad"]
        == 1
    )
    assert torch.equal(before, parameters_of(state.network))


def test_bad_steps_are_logged_with_their_samples(images, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, {1})
    contents = run(images, tmp_path, "--max-steps", "4")
    order = np.random.default_rng([0, 0, 0]).permutation(12)
    out = capsys.readouterr().out
    assert (
        "step 0000002: loss or gradient is not finite, step skipped (1 in a row, 1 in all); "
        f"samples {order[4:8].tolist()}"
        in out
    )
    assert contents["log"]["bad_steps"] == 1
    found = rows(tmp_path / "000-DiT-Ti-8")
    assert [row["bad_steps"] for row in found] == [1, 1] and all(
        np.isfinite(row["loss"]) for row in found
    )


def test_too_many_bad_steps_stop_the_run_before_a_checkpoint(images, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, range(3, 20))
    with pytest.raises(SystemExit) as stopped:
        run(images, tmp_path, "--max-steps", "20", "--max-bad-steps", "3", "--ckpt-every", "2")
    assert (
        stopped.value.code == 1 and "stopped after 3 such steps in a row" in capsys.readouterr().out
    )
    assert sorted(p.name for p in (tmp_path / "000-DiT-Ti-8" / "checkpoints").iterdir()) == [
        "0000002.pt",
        "0000004.pt",
    ]


def test_steps_that_were_bad_before_a_restart_count(images, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, {2, 3, 4, 5})
    with pytest.raises(SystemExit):
        run(images, tmp_path, "--max-steps", "4")
    with pytest.raises(SystemExit):
        run(images, tmp_path, "--max-steps", "8", "--max-bad-steps", "3", "--resume", "auto")
    assert "3 in a row, 3 in all" in capsys.readouterr().out


def test_a_window_of_bad_steps_alone(images, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, {0, 1})
    with pytest.raises(SystemExit):
        run(images, tmp_path, "--max-steps", "2")
    assert "step 0000002 of 2: loss none" in capsys.readouterr().out
    assert rows(tmp_path / "000-DiT-Ti-8")[0]["loss"] is None


def test_a_run_that_ends_in_bad_steps_says_so_and_deletes_nothing(
    images, tmp_path, monkeypatch, capsys
):
    """Again and again, until it goes on with a good step."""
    poisoned(monkeypatch, {3})
    flags = ["--ckpt-every", "2", "--keep-last", "1", "--resume", "auto"]
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            run(images, tmp_path, "--max-steps", "4", *flags)
        assert "the run ended badly: its last 1 step(s) were skipped" in stopped.value.code
        out = capsys.readouterr().out
        assert (
            "done" not in out and "going on from" in out or "no older checkpoint was deleted" in out
        )
    checkpoints = tmp_path / "000-DiT-Ti-8" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["0000002.pt", "0000004.pt"]
    assert run(images, tmp_path, "--max-steps", "6", *flags)["step"] == 6
    assert "done" in capsys.readouterr().out and [path.name for path in checkpoints.iterdir()] == [
        "0000006.pt"
    ]


def test_a_run_whose_last_step_ruins_the_weights_says_so(images, tmp_path, monkeypatch, capsys):
    step = loop.train_step

    def ruins(state, *args, **kwargs):
        report = step(state, *args, **kwargs)
        if state.step == 3:
            torch.nn.init.constant_(state.network.final_layer.linear.bias, float("inf"))
        return report

    monkeypatch.setattr(loop, "train_step", ruins)
    with pytest.raises(SystemExit) as stopped:
        run(images, tmp_path, "--max-steps", "3", "--ckpt-every", "2", "--keep-last", "1")
    assert "the run ended badly: it has weights that are not finite" in stopped.value.code
    assert len(list((tmp_path / "000-DiT-Ti-8" / "checkpoints").iterdir())) == 2


# ---- seeing the run ----


@each_process
def test_preview_pictures_do_not_touch_the_run(images, tmp_path, process):
    flags = ["--max-steps", "4", "--ckpt-every", "4", *ASKED[process]]
    plain = run(images, tmp_path / "plain", *flags)
    seen = run(images, tmp_path / "seen", *flags, "--sample-every", "2")
    assert same(plain["model"], seen["model"]) and same(plain["ema"], seen["ema"])
    folder = tmp_path / "seen" / "000-DiT-Ti-8" / "previews"
    assert sorted(os.listdir(folder)) == ["0000002.png", "0000004.png"]
    pictures = [np.asarray(Image.open(folder / name)) for name in sorted(os.listdir(folder))]
    assert pictures[0].shape == (4 * 18 + 2, 4 * 18 + 2, 3) and not np.array_equal(*pictures)


@each_process
def test_tensorboard_gets_the_metrics(images, tmp_path, process):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ["--log-with", "tensorboard", "--log-every", "1", *ASKED[process]]
    run(images, tmp_path, "--max-steps", "3", *flags)
    (tmp_path / "000-DiT-Ti-8" / "checkpoints" / "0000003.pt").unlink()
    run(images, tmp_path, "--max-steps", "4", "--resume", "auto", *flags)
    folder = tmp_path / "000-DiT-Ti-8"
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    third = {"diffusion": "vb", "flow": "cosine"}[process]
    for name in (
        "loss", "mse", third, "gradient_norm", "images_per_second", "model_flops_per_second",
        "learning_rate",
    ):  # fmt: skip
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({row["step"]: row[name] for row in rows(folder)}, rel=1e-5)
    assert len(rows(folder)) == 4


def test_tensorboard_gets_the_previews(images, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(images, tmp_path, "--max-steps", "2", "--sample-every", "1", "--log-with", "tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "000-DiT-Ti-8" / "tensorboard"))
    events.Reload()
    shown = events.Images("previews")
    assert [one.step for one in shown] == [1, 2] and shown[0].width * shown[
        0
    ].height == 16 * SIZE**2


def test_a_tracker_that_accelerate_does_not_find(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", lambda *args, **kwargs: None)
    with pytest.raises(SystemExit):
        run(images, tmp_path, "--log-with", "tensorboard")
    assert "--log-with tensorboard cannot start" in capsys.readouterr().err


def test_a_tracker_that_is_not_installed(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("runtime.surroundings.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run(images, tmp_path / "r", "--log-with", "wandb")
    assert "--log-with wandb: it is not installed; pip install wandb" in capsys.readouterr().err


def test_plotted_metrics(images, tmp_path):
    run(images, tmp_path, "--max-steps", "6")
    pytest.importorskip("matplotlib")
    done = forked(
        "examples/plot_run.py", tmp_path / "000-DiT-Ti-8", "--output", tmp_path / "run.png"
    )
    assert done.returncode == 0, done.stderr
    assert min(Image.open(tmp_path / "run.png").size) > 200


# ---- starting from something ----


def test_fine_tuning_starts_from_the_average_with_another_size_and_other_classes(
    images, tmp_path, capsys
):
    first = run(images, tmp_path / "first", "--max-steps", "3", "--model", "DiT-Ti/4")
    checkpoint = str(tmp_path / "first" / "000-DiT-Ti-4" / "checkpoints" / "0000003.pt")
    flags = [
        "--model", "DiT-Ti/4", "--init-from", checkpoint, "--max-steps", "1", "--lr", "1e-9",
        "--ema-decay", "0",
    ]  # fmt: skip
    second = run(images, tmp_path / "second", *flags, "--image-size", "32")
    assert second["model"]["pos_embed"].shape == (1, 64, 128)
    assert second["step"] == 1
    for name, tensor in first["ema"].items():
        if name != "pos_embed":
            torch.testing.assert_close(second["model"][name], tensor, atol=1e-7, rtol=0)
    third = run(images, tmp_path / "third", *flags, "--num-classes", "5", "--init-labels", "drop")
    tables = [
        contents["y_embedder.embedding_table.weight"] for contents in (first["ema"], third["model"])
    ]
    assert tables[1].shape == (6, 128)
    torch.testing.assert_close(tables[1][5], tables[0][3], atol=1e-7, rtol=0)  # the null class
    assert (tables[1][:3] - tables[0][:3]).abs().max() > 0.01
    unconditional = run(images, tmp_path / "fourth", *flags, "--num-classes", "0")
    assert not any(name.startswith("y_embedder") for name in unconditional["model"])
    with pytest.raises(SystemExit):
        run(images, tmp_path / "fifth", *flags, "--num-classes", "5")
    assert "has 3 classes, the new network 5; pass --init-labels drop" in capsys.readouterr().err


def test_a_restart_does_not_need_the_weights_that_the_run_began_with(images, tmp_path):
    run(images, tmp_path / "first", "--max-steps", "2")
    checkpoint = tmp_path / "first" / "000-DiT-Ti-8" / "checkpoints" / "0000002.pt"
    flags = ["--init-from", str(checkpoint)]
    run(images, tmp_path / "second", "--max-steps", "2", *flags)
    checkpoint.unlink()
    assert (
        run(images, tmp_path / "second", "--max-steps", "3", *flags, "--resume", "auto")["step"]
        == 3
    )
    assert len(os.listdir(tmp_path / "second")) == 1


def test_labels_are_mapped_by_a_file(tmp_path):
    source, network = fill_randomly(DiT(**small(3))), fill_randomly(DiT(**small(2)), seed=1)
    weights = Weights(source.state_dict(), source.config, ["ape", "bee", "cat"])
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"kitten": "cat"}))
    pairs = read_label_map(path, (["dog", "kitten"], 2), weights)
    assert pairs == {1: 2}
    key = "y_embedder.embedding_table.weight"
    table = adapt(weights, network, pairs, "x")[key]
    theirs, own = source.state_dict()[key], network.state_dict()[key]
    assert torch.equal(table, torch.stack([own[0], theirs[2], theirs[3]]))
    for wrong, message in (
        ({"wolf": "cat"}, "'wolf' is no label of the new network, which has 2"),
        ({"0": "3"}, "'3' is no label of the checkpoint, which has 3"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            read_label_map(path, (["dog", "kitten"], 2), weights)
    numeric = weights._replace(classes=["1", "2", "0"])
    # 1 without quotes is no name
    path.write_text(json.dumps({"dog": 1, "index:1": "name:1"}), encoding="utf-8-sig")
    assert read_label_map(path, (["dog", "kitten"], 2), numeric) == {0: 1, 1: 0}
    for wrong, message in (
        ({"dog": "1"}, "'1' is no label of the checkpoint.*give index:1 or name:1"),
        ({"dog": 1, "0": 2}, "'0' is class 0, which is there twice"),
        ({"dog": True}, "True is no label"),
        ({"dog": None}, "None is no label"),
    ):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            read_label_map(path, (["dog", "kitten"], 2), numeric)
    for wrong in ("[1]", "{", "[" * 10**5):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="is no JSON file of"):
            read_label_map(path, (None, 2), weights)


def test_another_label_file_makes_another_run_and_other_classes_are_not_kept(
    images, tmp_path, capsys
):
    run(images, tmp_path / "first", "--max-steps", "1")
    checkpoint, path = (
        tmp_path / "first" / "000-DiT-Ti-8" / "checkpoints" / "0000001.pt",
        tmp_path / "map.json",
    )
    flags = ["--init-from", str(checkpoint), "--max-steps", "1", "--resume", "auto"]
    for pairs in ({"ape": "cat"}, {"ape": "bee"}):
        path.write_text(json.dumps(pairs))
        run(images, tmp_path / "second", *flags, "--init-labels", str(path))
    assert len(os.listdir(tmp_path / "second")) == 2
    path.write_text(json.dumps({"ape": [1]}))
    contents = torch.load(checkpoint, weights_only=True)
    torch.save({**contents, "classes": ["ape", "cat", "dog"]}, checkpoint)
    for more, message in (
        (["--init-labels", str(path)], "[1] is no label; give one number or one name"),
        ([], "knows other classes (ape, cat, dog ...) than the data (ape, bee, cat ...)"),
        (["--resume", str(checkpoint)], "--init-from and --resume PATH both say"),
    ):
        with pytest.raises(SystemExit):
            run(images, tmp_path / "third", *flags, *more)
        assert message in capsys.readouterr().err and not (tmp_path / "third").exists()


def small(num_classes):
    return dict(
        input_size=8, patch_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2,
        num_classes=num_classes,
    )  # fmt: skip


def test_released_weights_have_a_null_class_and_no_configuration():
    source, network = fill_randomly(DiT(**small(7))), DiT(**small(7))
    network.load_state_dict(adapt(Weights(source.state_dict(), None, None), network, "keep", "x"))
    assert torch.equal(parameters_of(network), parameters_of(source))
    with pytest.raises(ValueError, match="x is of another configuration: x_embedder"):
        adapt(
            Weights(source.state_dict(), None, None), DiT(**{**small(7), "hidden_size": 32}),
            "keep", "x",
        )  # fmt: skip


# ---- several averages ----


def test_an_average_is_chosen_by_its_decay(images, tmp_path):
    contents = run(images, tmp_path, "--max-steps", "3", "--ema-decay", "0.9", "0.5")
    folder = tmp_path / "000-DiT-Ti-8"
    assert list(contents["emas"]) == [0.5] and not same(contents["emas"][0.5], contents["ema"])
    for which, wanted in (("ema", "ema"), ("raw", "model"), ("ema@0.9", "ema")):
        assert same(load_weights(folder, weights_choice(which)).tensors, contents[wanted])
    assert same(load_weights(folder, "ema@0.5").tensors, contents["emas"][0.5])
    with pytest.raises(
        ValueError, match="no 'ema@0.7' weights.*`weights` can be ema, raw, ema@0.9, ema@0.5"
    ):
        load_weights(folder, "ema@0.7")
    for wrong in ("best", "ema@", "ema@x", "raw@0.5"):
        with pytest.raises(ValueError, match="is none of ema, raw and ema@DECAY"):
            weights_choice(wrong)


def test_resuming_with_other_decays_takes_over_those_that_are_there(images, tmp_path):
    run(images, tmp_path, "--max-steps", "3", "--ema-decay", "0.9", "0.5")
    path = str(tmp_path / "000-DiT-Ti-8")
    whole = run(images, tmp_path / "whole", "--max-steps", "5", "--ema-decay", "0.5", "0.9")
    swapped = run(
        images, tmp_path / "more", "--max-steps", "5", "--ema-decay", "0.5", "0.9", "--resume", path
    )
    assert same(whole["ema"], swapped["ema"]) and same(whole["emas"][0.9], swapped["emas"][0.9])


def test_sampling_from_one_of_several_averages_in_bf16(images, tmp_path, capsys):
    run(images, tmp_path, "--max-steps", "3", "--ema-decay", "0.9", "0.5")
    flags = [
        "--ckpt", str(tmp_path / "000-DiT-Ti-8"), "--vae", "none", "--device", "cpu",
        "--num-sampling-steps", "4",
    ]  # fmt: skip
    pictures = {}
    for name, more in {
        "first": [], "named": ["--weights", "ema@0.9"], "second": ["--weights", "ema@0.50"],
        "bf16": ["--mixed-precision", "bf16"], "fp16": ["--mixed-precision", "fp16"],
    }.items():  # fmt: skip
        sample.main([*flags, "--output", str(tmp_path / f"{name}.png"), *more])
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
    assert np.array_equal(pictures["first"], pictures["named"]) and not np.array_equal(
        pictures["first"], pictures["second"]
    )
    for name in ("bf16", "fp16"):
        assert (
            0 < np.abs(pictures["first"] - pictures[name]).max()
            and np.abs(pictures["first"] - pictures[name]).mean() < 4
        )
    with pytest.raises(SystemExit):
        sample.main([*flags, "--weights", "ema@0.7"])
    assert "--weights can be ema, raw, ema@0.9, ema@0.5" in capsys.readouterr().err


# ---- two processes ----


def on_two(start, images, results, *flags):
    """The checkpoint of a run on two processes, and what the run printed."""
    done = start(
        "train.py", "--data-path", images, "--results-dir", results, *QUICK, "--num-workers", "1",
        *flags, processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = list((results / sorted(os.listdir(results))[-1]).glob("checkpoints/*.pt"))
    return torch.load(path, weights_only=True), done.stdout


@each_start
def test_split_networks_learn_what_whole_ones_do_and_leave_the_same_checkpoints(
    images, tmp_path, start
):
    flags = ["--ema-decay", "0.5", "0.25", "--grad-clip", "0.5", "--keep-last", "1", "--lr", "1e-3"]
    alone = run(images, tmp_path / "alone", "--max-steps", "4", *flags)
    # Begun whole, gone on with split, ended whole
    run(images, tmp_path / "split", "--max-steps", "2", *flags)
    split, out = on_two(
        start, images, tmp_path / "split", "--max-steps", "4", *flags, "--fsdp", "--grad-accum",
        "2", "--grad-checkpointing", "--sample-every", "4", "--resume", "auto",
    )  # fmt: skip
    assert "going on from" in out and "written by 1 process(es) on cpu" in out
    for part in ("model", "ema"):
        assert list(alone[part]) == list(split[part])
        for name in alone[part]:
            torch.testing.assert_close(split[part][name], alone[part][name], rtol=1e-3, atol=5e-4)
    assert (
        list(split["emas"]) == [0.25]
        and split["opt"]["state"].keys() == alone["opt"]["state"].keys()
    )
    assert (tmp_path / "split" / "000-DiT-Ti-8" / "previews" / "0000004.png").exists()
    ended = run(images, tmp_path / "split", "--max-steps", "6", *flags, "--resume", "auto")
    whole = run(images, tmp_path / "alone", "--max-steps", "6", *flags, "--resume", "auto")
    for name in whole["ema"]:
        torch.testing.assert_close(ended["ema"][name], whole["ema"][name], rtol=1e-3, atol=5e-4)


@pytest.mark.long
@each_process
def test_compiled_blocks_learn_what_eager_ones_do(images, tmp_path, process):
    flags = ["--max-steps", "4", "--lr", "1e-3", *ASKED[process]]
    eager = run(images, tmp_path / "eager", *flags)
    compiled = run(images, tmp_path / "compiled", *flags, "--compile", "--grad-checkpointing")
    assert list(eager["model"]) == list(compiled["model"])
    for name in eager["ema"]:
        torch.testing.assert_close(compiled["ema"][name], eager["ema"][name], rtol=1e-3, atol=1e-4)
    both, _ = on_two(
        fresh, images, tmp_path / "both", *flags, "--compile", "--fsdp", "--mixed-precision", "bf16"
    )
    assert list(both["model"]) == list(eager["model"])


BAD = [
    (
        ["--grad-accum", "3"],
        "cannot be shared equally by 1 process(es) in 3 part(s) each; use a multiple of 3",
    ),
    (["--grad-accum", "0"], "--grad-accum is 0"),
    (["--grad-clip", "0"], "--grad-clip is 0.0"),
    (["--warmup-steps", "-1"], "--warmup-steps is -1"),
    (["--weight-decay", "nan"], "--weight-decay is nan"),
    (["--ema-decay", "0.9", "0.9"], "each must be at least 0 and below 1, and stand there once"),
    (["--fsdp"], "--fsdp splits a network over processes and there is one"),
    (["--mixed-precision", "fp16"], "invalid choice: 'fp16'"),
    (["--init-labels", "drop"], "--init-labels drop is about --init-from, which is not given"),
    (["--init-from", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
    (["--keep-last", "0"], "--keep-last is 0"),
    (["--ckpt-minutes", "0"], "--ckpt-minutes is 0.0"),
    (["--latents", "nowhere"], "--latents with --vae none"),
    (["--latents", "nowhere", "--vae", "ema"], "--latents nowhere holds no complete latents"),
]


@pytest.mark.parametrize("flags, message", BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_a_mistake_gets_one_message_and_leaves_nothing(images, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(images, tmp_path / "r", *flags)
    assert (
        stopped.value.code == 2
        and message in capsys.readouterr().err
        and not (tmp_path / "r").exists()
    )


def test_neither_images_nor_latents(capsys):
    with pytest.raises(SystemExit):
        train.main(QUICK)
    assert (
        "--data-path is missing; give a folder of images, or --latents" in capsys.readouterr().err
    )
