"""Training a flow: a step against one written by hand, what its options refuse, and its runs."""

import json
import math
import shlex

import pytest
import torch

from checkpoints.files import newest_checkpoint, read_checkpoint
from conftest import ROOT, fill_randomly, randn
from kill_campaign import end, launcher, start
from models import DiT
from processes.flow import FlowProcess
from test_commands import commands
from test_runs import rows, without_rates
from test_train import ASKED, QUICK, fresh_accelerator, images, run, same  # noqa: F401
import train
from training.flags import build_parser, read_options
from training.options import TrainOptions
from training.run_record import Data, differences
from training.state import Recipe, Window, new_state
from training.step import draw, train_step

FLOW = ["--process", "flow"]
N, C, SIDE, CLASSES = 6, 3, 8, 4


def network(learn_sigma=False):
    """A small network of random weights."""
    return fill_randomly(
        DiT(
            input_size=SIDE, patch_size=4, in_channels=C, hidden_size=16, depth=1, num_heads=2,
            num_classes=CLASSES, learn_sigma=learn_sigma,
        )
    )  # fmt: skip


def flow_state(process, learn_sigma=False, **recipe):
    return new_state(network(learn_sigma), Recipe(**recipe), process=process)


def a_batch(process):
    """Latents, labels and draws of a step."""
    draws = draw(0, 0, N, (C, SIDE, SIDE), 0.5, process, "cpu")
    return randn(N, C, SIDE, SIDE, dtype=torch.float32), torch.arange(N) % CLASSES, draws


# ---- a step, written by hand ----


def path_at(path, t):
    """alpha, sigma and their derivatives at t, by hand: t = 0 is noise."""
    if path == "linear":
        return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
    if path == "gvp":
        angle = math.pi / 2 * t
        return (
            angle.sin(), angle.cos(), math.pi / 2 * angle.cos(), -math.pi / 2 * angle.sin(),
        )  # fmt: skip
    # d(log alpha)/dt is beta/2, of which the integral from t to 1 is the square's difference
    beta = 0.1 + 19.9 * (1 - t)
    alpha = torch.exp(-(beta**2 - 0.1**2) / (4 * 19.9))
    sigma = torch.sqrt(1 - alpha**2)
    return alpha, sigma, alpha * beta / 2, -(alpha**2) * beta / 2 / sigma


def parts_by_hand(out, x, t, noise, at, process):
    """The parts of the loss, (N,) each, in float64."""
    alpha, sigma, d_alpha, d_sigma = at
    flow = process.flow
    velocity = d_alpha * x + d_sigma * noise
    error = {
        "velocity": out - velocity, "noise": out - noise, "score": sigma * out + noise,
    }[flow.prediction]  # fmt: skip
    diffusion = d_alpha / alpha * sigma**2 - sigma * d_sigma
    weight = {
        None: torch.ones_like(t), "velocity": (diffusion / sigma) ** 2,
        "likelihood": diffusion / sigma**2,
    }[flow.loss_weight]  # fmt: skip
    found = {"mse": (error**2).mean(dim=(1, 2, 3)), "loss": (weight * error**2).mean(dim=(1, 2, 3))}
    if flow.cosine_loss:
        lengths = out.norm(dim=1) * velocity.norm(dim=1)  # (N, H, W)
        cosine = 1 - ((out * velocity).sum(dim=1) / lengths).mean(dim=(1, 2))  # (N,)
        found |= {"cosine": cosine, "loss": found["loss"] + cosine}
    return found


SAID = [
    {}, {"path": "gvp"}, {"path": "vp"}, {"cosine_loss": True},
    {"path": "gvp", "cosine_loss": True, "time_sampling": "mode:1"}, {"prediction": "noise"},
    {"prediction": "noise", "loss_weight": "velocity"},
    {"prediction": "noise", "loss_weight": "likelihood", "path": "vp"}, {"prediction": "score"},
    {"prediction": "score", "loss_weight": "velocity", "path": "gvp"},
    {"prediction": "score", "loss_weight": "likelihood", "time_sampling": "logit-normal:0,1"},
]  # fmt: skip


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("said", SAID, ids=lambda said: " ".join(map(str, said.values())) or "-")
def test_a_step_is_adamw_on_the_loss_of_the_paper(said, learn_sigma):
    """Loss and gradient against float64; then AdamW's first step, with a decay of the weights."""
    process = FlowProcess(**said)
    state = flow_state(process, learn_sigma, lr=1e-2, weight_decay=0.1, ema_decay=(0.9,))
    start, gradients = {k: v.clone() for k, v in state.network.state_dict().items()}, {}
    step_of = state.opt.step

    def noted():
        gradients.update({k: p.grad.clone() for k, p in trained(state.network)})
        step_of()

    state.opt.step = noted
    x, labels, draws = a_batch(process)
    report = train_step(state, x, labels, draws)

    reference, t = network(learn_sigma).double().train(), draws.t.double()
    at = path_at(process.flow.path, t.reshape(-1, 1, 1, 1))
    noise, x = draws.noise.double(), x.double()
    y = torch.where(draws.drop == 1, CLASSES, labels)
    out = reference.eval()(at[0] * x + at[1] * noise, t, y)[:, :C]
    parts = parts_by_hand(out, x, t.reshape(-1, 1, 1, 1), noise, at, process)
    assert set(parts) == set(process.parts)
    for name, values in parts.items():
        assert report[name] == pytest.approx(values.sum().item(), rel=2e-5)
    parts["loss"].mean().backward()
    for name, p in trained(reference):
        most = p.grad.abs().max().item()
        torch.testing.assert_close(gradients[name].double(), p.grad, rtol=1e-4, atol=3e-5 * most)
        g, before = gradients[name].double(), start[name].double()
        wanted = before * (1 - 1e-2 * 0.1) - 1e-2 * g / (g.abs() + 1e-8)
        now = state.network.get_parameter(name).double()
        torch.testing.assert_close(now, wanted, rtol=0, atol=1e-6)
        average = state.ema.get_parameter(name).double()
        torch.testing.assert_close(average, 0.9 * before + 0.1 * now, rtol=0, atol=1e-6)


def trained(net):
    return [(name, p) for name, p in net.named_parameters() if p.requires_grad]


def test_a_learned_variance_is_dropped():
    """Its half of the last layer gets no gradient; all else is as without it."""
    process = FlowProcess(cosine_loss=True)
    whole, half = (flow_state(process, learn_sigma, lr=1e-2) for learn_sigma in (True, False))

    def rows_of(state, part):
        """Rows of the last layer, channels innermost: (p·p, C, ...) of one of the halves."""
        linear = state.network.final_layer.linear
        return [
            tensor.detach().unflatten(0, (16, -1))[:, part]
            for tensor in (linear.weight, linear.bias)
        ]

    mean, variance = slice(0, C), slice(C, 2 * C)
    with torch.no_grad():
        tensors = whole.network.state_dict()
        for ours, theirs in zip(
            ("final_layer.linear.weight", "final_layer.linear.bias"), rows_of(whole, mean)
        ):
            tensors[ours] = theirs.flatten(0, 1).clone()
        half.network.load_state_dict(tensors)
    before = [tensor.clone() for tensor in rows_of(whole, variance)]
    for step in range(3):
        draws = draw(0, step, N, (C, SIDE, SIDE), 0.5, process, "cpu")
        latents, labels, _ = a_batch(process)
        reports = [train_step(state, latents, labels, draws) for state in (whole, half)]
        assert reports[0] == pytest.approx(reports[1], rel=1e-5)
    assert all(map(torch.equal, rows_of(whole, variance), before))
    for ours, theirs in zip(rows_of(whole, mean), rows_of(half, slice(0, C))):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.equal(rows_of(whole, mean)[0], before[0])


def test_quarters_are_of_the_noise_level():
    """The first is nearly clean: t from 3/4 to 1."""
    process = FlowProcess(cosine_loss=True)
    state, (latents, labels, draws) = flow_state(process), a_batch(process)
    draws = draws._replace(t=torch.tensor([0.0, 0.2, 0.3, 0.76, 0.9, 1.0]))
    report = train_step(state, latents, labels, draws)
    assert [report[f"samples_q{q}"] for q in (1, 2, 3, 4)] == [3, 0, 1, 2]
    quarters = [report[f"mse_q{q}"] for q in (1, 2, 3, 4)]
    assert sum(quarters) == pytest.approx(report["mse"], rel=1e-5) and quarters[1] == 0
    assert report["loss"] == pytest.approx(report["mse"] + report["cosine"], rel=1e-5)
    y = torch.where(draws.drop == 1, CLASSES, labels)[2:3]
    t, noise, x = draws.t[2:3], draws.noise[2:3], latents[2:3]
    out = network().eval()(0.3 * x + 0.7 * noise, t, y)
    assert quarters[2] == pytest.approx(((out - x + noise) ** 2).mean().item(), rel=1e-4)
    assert set(Window(process).shown) == {"loss", "mse", "cosine", "gradient_norm"}


# ---- what the options say ----

REFUSED = [
    (["--path", "linear"], "--path is a setting of --process flow, and --process is diffusion"),
    (["--cosine-loss"], "--cosine-loss is a setting of --process flow"),
    (["--train-eps", "0"], "--train-eps is a setting of --process flow"),
    (["--process", "ddpm"], "invalid choice: 'ddpm'"),
    ([*FLOW, "--path", "straight"], "invalid choice: 'straight'"),
    ([*FLOW, "--prediction", "x0"], "invalid choice: 'x0'"),
    (
        [*FLOW, "--loss-weight", "velocity"],
        "--loss-weight is for a score or the noise as the prediction, and --prediction is velocity",
    ),
    (
        [*FLOW, "--prediction", "noise", "--cosine-loss"],
        "--cosine-loss is for a velocity as the prediction, and --prediction is noise",
    ),
    ([*FLOW, "--path", "vp", "--train-eps", "0"], "--train-eps is 0, and with the path vp"),
    ([*FLOW, "--prediction", "score", "--train-eps", "0"], "--train-eps is 0, and with"),
    ([*FLOW, "--train-eps", "nan"], "--train-eps is nan"),
    ([*FLOW, "--train-eps", "0.5"], "--train-eps is 0.5; it must be at least 0 and below 0.5"),
    ([*FLOW, "--time-sampling", "lognormal"], "--time-sampling is 'lognormal'; give one of"),
    ([*FLOW, "--time-sampling", "mode:1.8"], "--time-sampling is mode:1.8; that number of mode"),
    ([*FLOW, "--time-sampling", "logit-normal:nan,1"], "--time-sampling is logit-normal:nan,1"),
    ([*FLOW, "--time-sampling", "logit-normal:0,0"], "must be from 0.001 to 100"),
    ([*FLOW, "--time-sampling", "cosmap:1"], "cosmap takes 0 number(s)"),
    ([*FLOW, "--time-shift", "nan"], "--time-shift is nan; it must be from 0.001 to 1000"),
    ([*FLOW, "--time-shift", "0"], "--time-shift is 0.0"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[" ".join(f) for f, _ in REFUSED])
def test_contradictions_are_refused_before_any_data_is_read(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--data-path", "nowhere", "--results-dir", str(tmp_path / "r"), *QUICK, *flags])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and message in error and "nowhere" not in error
    assert not (tmp_path / "r").exists()


def test_python_is_told_in_its_own_words():
    with pytest.raises(ValueError) as refused:
        TrainOptions(data_path="x", time_shift=3.0, path="gvp")
    assert str(refused.value) == (
        '`path` is a setting of `process="flow"`, and `process` is diffusion; '
        "pass that, or leave `path` out"
    )
    with pytest.raises(ValueError, match="`cosine_loss` is 1; it is true or false"):
        TrainOptions(data_path="x", process="flow", cosine_loss=1)
    with pytest.raises(ValueError, match="`learn_sigma` is 'no'; it is true or false"):
        TrainOptions(data_path="x", process="flow", learn_sigma="no")


def recorded(*flags):
    return read_options(build_parser().parse_args(["--data-path", "x", *flags])).recorded()


def test_a_default_that_is_given_is_no_difference():
    defaults = [
        "--path", "linear", "--prediction", "velocity", "--time-sampling", "uniform",
        "--time-shift", "1", "--train-eps", "0", "--no-learn-sigma",
    ]  # fmt: skip
    assert recorded(*FLOW, *defaults) == recorded(*FLOW)
    spelt = [recorded(*FLOW, "--time-sampling", x) for x in ("logit-normal", "logit-normal:0,1.0")]
    assert spelt[0] == spelt[1] != recorded(*FLOW)
    assert recorded("--process", "diffusion", "--learn-sigma") == recorded()
    noise = recorded(*FLOW, "--prediction", "noise")
    assert noise["train_eps"] == 1e-3 and noise == recorded(
        *FLOW, "--prediction", "noise", "--train-eps", "1e-3"
    )


def test_a_record_without_a_process_is_of_a_diffusion(tmp_path):
    """As those of versions that knew no other."""
    options = {key: TrainOptions(data_path="x", process=key) for key in ("diffusion", "flow")}
    later = {"process", "learn_sigma", *FlowProcess.settings}
    args = {k: v for k, v in options["diffusion"].recorded().items() if k not in later}
    (tmp_path / "run.json").write_text(json.dumps({"args": args, "data": "d", "id": "i"}))
    assert differences(tmp_path, options["diffusion"], Data("d")) == ""
    assert differences(tmp_path, options["flow"], Data("d")).startswith("`process`, `path`")


# ---- runs ----


def test_a_run_says_what_it_learns(images, tmp_path, capsys):
    contents = run(images, tmp_path, "--max-steps", "2", *FLOW, "--cosine-loss")
    said = FlowProcess(cosine_loss=True).config
    assert contents["config"]["process"] == said and contents["config"]["learn_sigma"] is False
    settings = {name: contents["args"][name] for name in FlowProcess.settings}
    assert contents["args"]["process"] == "flow" and {"name": "flow"} | settings == said
    (row,) = rows(tmp_path / "000-DiT-Ti-8")
    assert row["loss"] == pytest.approx(row["mse"] + row["cosine"], rel=1e-6) and "vb" not in row
    assert f", cosine {row['cosine']:.4f}" in capsys.readouterr().out


def test_a_process_is_not_taken_for_another(images, tmp_path, capsys):
    """Nor for one with other settings; auto begins another run beside it."""
    run(images, tmp_path / "diffusion", "--max-steps", "1")
    run(images, tmp_path / "flow", "--max-steps", "1", *FLOW)
    capsys.readouterr()
    gvp = [*FLOW, "--path", "gvp", "--time-shift", "3"]
    for name, flags, message in (
        ("diffusion", FLOW, "has learned the process diffusion, and --process is flow; pass "
         "--process diffusion, or start a new run from its weights with --init-from"),
        ("flow", [], "has learned the process flow, and --process is diffusion; pass"),
        ("flow", gvp, "learned with --path linear, --time-shift 1.0, and here is --path gvp, "
         "--time-shift 3.0; pass the same, or"),
        ("flow", [*FLOW, "--learn-sigma"], "with no --learn-sigma, and here is --learn-sigma"),
        ("flow", [*FLOW, "--cosine-loss"], "with no --cosine-loss, and here is --cosine-loss"),
    ):  # fmt: skip
        path = str(tmp_path / name / "000-DiT-Ti-8")
        with pytest.raises(SystemExit) as stopped:
            run(images, tmp_path / name, "--max-steps", "2", *flags, "--resume", path)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and error.count("error:") == 1
    run(images, tmp_path / "flow", "--max-steps", "1", *FLOW, "--path", "gvp", "--resume", "auto")
    assert "000-DiT-Ti-8 has other --path)" in capsys.readouterr().out
    assert len(list((tmp_path / "flow").iterdir())) == 2


def test_metrics_and_log_window_go_on(images, tmp_path):
    """Where the log's window is longer, by the cosine, and a restart falls into its middle."""
    flags = ["--log-every", "4", "--ckpt-every", "3", *ASKED["flow"], "--learn-sigma"]
    whole = run(images, tmp_path / "whole", "--max-steps", "5", *flags)
    run(images, tmp_path / "parts", "--max-steps", "3", *flags)
    parts = run(images, tmp_path / "parts", "--max-steps", "5", *flags, "--resume", "auto")
    folders = [tmp_path / name / "000-DiT-Ti-8" for name in ("whole", "parts")]
    found = [[row for row in without_rates(f) if row["step"] != 3] for f in folders]
    assert [row["step"] for row in found[0]] == [4, 5] and found[0][1:] == found[1][1:]
    assert same(whole["model"], parts["model"]) and same(whole["ema"], parts["ema"])


def test_a_diffusion_without_a_learned_variance(images, tmp_path):
    contents = run(images, tmp_path, "--max-steps", "1", "--no-learn-sigma")
    contents = run(images, tmp_path, "--max-steps", "2", "--no-learn-sigma", "--resume", "auto")
    assert contents["config"]["learn_sigma"] is False and contents["step"] == 2
    assert contents["config"]["process"]["name"] == "gaussian"
    assert len(contents["log"]["window"]) == len(Window(FlowProcess()).sums)


@pytest.fixture(scope="module")
def context():
    return launcher()


def test_recipes_in_the_documentation_are_options_that_go_together():
    recipes = [
        shlex.split(text.partition("train.py")[2])
        for text in commands(ROOT / "docs" / "training.md")
        if "--process flow" in text
    ]
    assert len(recipes) >= 3
    assert {read_options(build_parser().parse_args(words)).process for words in recipes} == {"flow"}


def test_two_processes_learn_what_one_does_whole_and_split(images, tmp_path, context):
    """Also from a checkpoint that one process left, in parts, computed again, with previews."""
    flags = [*ASKED["flow"], "--lr", "1e-3", "--grad-clip", "0.5", "--max-steps", "4"]
    alone = run(images, tmp_path / "alone", *flags)
    run(images, tmp_path / "split" / "results", *flags[:-1], "2")
    for name, more in {
        "two": [],
        "split": [
            "--fsdp", "--grad-accum", "2", "--grad-checkpointing", "--sample-every", "4",
            "--resume", "auto",
        ],
    }.items():  # fmt: skip
        end(start(context, images, tmp_path / name, 2, run=[*QUICK, *flags, *more]), 0)
        (folder,) = (tmp_path / name / "results").iterdir()
        found = read_checkpoint(newest_checkpoint(folder))
        for part in ("model", "ema"):
            assert list(alone[part]) == list(found[part])
            for key, tensor in alone[part].items():
                torch.testing.assert_close(found[part][key], tensor, rtol=1e-3, atol=5e-4)
        for ours, theirs in zip(rows(folder), rows(tmp_path / "alone" / "000-DiT-Ti-8")):
            for key in ("loss", "mse", "cosine", "gradient_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3)
    assert (folder / "previews" / "0000004.png").exists()
