"""Networks that have learned a flow: the Sampler, sample.py, sample_ddp.py, previews, and what is
refused.
"""

from collections import Counter
from dataclasses import replace
import json
from pathlib import Path
import sys

import numpy as np
from PIL import Image
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checkpoints.weights import Weights, save_weights
from conftest import ROOT, fill_randomly, randn
from models import DiT
from processes.flow import FlowProcess
from processes.noise import ImageNoise
import sample
import sample_ddp
from sampling import SamplingOptions, load_sampler, pictures
from sampling.sampler import Sampler
from training.scores import preview
from vae import PixelSpace

sys.path.insert(0, str(ROOT / "examples"))
import grids

CONFIG = dict(
    input_size=4, patch_size=2, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=10,
    learn_sigma=False,
)  # fmt: skip
SOLVERS = list(FlowProcess.solvers)
CALLS = {"euler": 1, "heun": 2, "sde": 1, "sde-heun": 2}  # of the network, a step
CHOICE = "choose one of euler, heun, dopri5, sde, sde-heun"


class Unbounded(PixelSpace):
    clip_denoised = False


def network(**changes):
    net = fill_randomly(DiT(**{**CONFIG, **changes}), std=0.3)
    return net.eval().requires_grad_(False)


def of(solver, steps=6, net=None, **options):
    process = options.pop("process", None) or FlowProcess()
    return Sampler(
        net or network(), Unbounded(), None, steps, solver, process=process, **options
    )  # fmt: skip


def asked(net):
    """[(t of the first sample, size of the batch)], which grows with each call of the network."""
    seen = []
    net.register_forward_pre_hook(
        lambda module, args: seen.append((args[1][0].item(), len(args[0])))
    )
    return seen


# ---- the Sampler ----


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_are_those_of_the_flows_own_loops(solver, scale):
    """With guidance those of the doubled batch, whose score follows from the guided velocity."""
    process, net, labels = FlowProcess(), network(), torch.tensor([3, 5])
    noise = randn(2, 3, 4, 4).float()
    got = of(solver, net=net, cfg_scale=scale).latents(labels, noise, ImageNoise(1, [0, 1], "cpu"))
    model, start, kwargs = net, noise, {"y": labels}
    if scale != 1:
        model, start = net.forward_with_cfg, torch.cat([noise, noise])
        kwargs = {"y": torch.cat([labels, torch.full((2,), 10)]), "cfg_scale": scale}
    own = dict(num_steps=6, model_kwargs=kwargs)
    if solver.startswith("sde"):
        method = "heun" if solver == "sde-heun" else "euler"
        noise_fn = ImageNoise(1, [0, 1], "cpu")
        want = process.flow.sde_sample_loop(
            model, start.shape, start, method=method, noise_fn=noise_fn, **own
        )
    else:
        want = process.flow.ode_sample_loop(model, start.shape, start, method=solver, **own)
    # dopri5 is told at six moments here, at its end there
    assert (got - want[:2]).abs().max() < 1e-5 * want.abs().max()
    assert (got - noise).abs().max() > 0.1


@pytest.mark.parametrize("solver", SOLVERS)
def test_images_depend_on_seed_and_index_whatever_the_batch(solver):
    sampler = of(solver, cfg_scale=2.0, cfg_interval=(0.2, 0.7))
    whole = sampler.numbered_latents(3, range(8), torch.arange(8))
    parts = [sampler.numbered_latents(3, [i], torch.tensor([i])) for i in (2, 0, 5)]
    far = (torch.cat(parts) - whole[[2, 0, 5]]).abs().max()
    assert far < 1e-5 * whole.abs().max()
    again = sampler.numbered_latents(3, range(8), torch.arange(8))
    other = sampler.numbered_latents(4, range(8), torch.arange(8))
    assert torch.equal(whole, again) and not torch.equal(whole, other)


@pytest.mark.parametrize("solver", CALLS)
def test_the_null_half_is_asked_inside_the_interval_alone(solver):
    net = network()
    seen = asked(net)
    sampler = of(solver, 10, net, cfg_scale=2.0, cfg_interval=(0.3, 0.6))
    sampler.latents(torch.tensor([0, 1, 2]), randn(3, 3, 4, 4).float())
    levels = sampler.process.levels(solver, 10)
    want = [6 if 0.3 <= level <= 0.6 else 3 for level in levels for _ in range(CALLS[solver])]
    if solver == "sde-heun":
        want.pop()  # the last step asks once
    assert [size for _, size in seen] == want and 0 < want.count(6) < len(want)
    assert [t for t, _ in seen[:: CALLS[solver]]] == pytest.approx(sampler.steps())


def test_dopri5_takes_no_step_across_the_ends_of_an_interval():
    net = network()
    seen = asked(net)
    sampler = of("dopri5", 10, net, cfg_scale=2.0, cfg_interval=(0.3, 0.65))
    sampler.latents(torch.tensor([0, 1, 2]), randn(3, 3, 4, 4).float())
    assert sampler.breaks() == [4, 8]
    # Levels 0.3 to 0.65 hold the steps that begin at t = 0.4 to 0.7
    inside = {size for t, size in seen if 0.401 < t < 0.799}
    outside = {size for t, size in seen if t < 0.399 or t > 0.801}
    assert inside == {6} and outside == {3}
    assert Counter(size for _, size in seen)[6] >= 6
    assert of("dopri5", cfg_scale=2.0).breaks() == of("dopri5").breaks() == []


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_trajectory_goes_through_the_times_and_ends_in_the_latents(solver):
    sampler, labels = of(solver, 5), torch.tensor([1, 3])
    noise = randn(2, 3, 4, 4).float()
    torch.manual_seed(0)
    way = list(sampler.trajectory(labels, noise))
    torch.manual_seed(0)
    assert torch.equal(way[-1]["sample"], sampler.latents(labels, noise))
    times = [out["t"] for out in way]
    assert times == sampler.steps() == sorted(times) and times[0] == 0 and len(way) == 5
    if solver == "sde-heun":  # which adds noise before it asks
        return
    slope = sampler.network(noise, torch.zeros(2), labels)
    # At t = 0 of the linear path the data are x + v; dopri5 has v as the slope of its solution
    bar = 0.02 if solver == "dopri5" else 1e-5
    assert (way[0]["pred_xstart"] - noise - slope).abs().max() < bar * slope.abs().max()


def test_predictions_are_clipped_where_the_space_has_bounds_and_samples_are_not():
    sampler = replace(of("heun"), space=PixelSpace())
    noise = 3 * randn(2, 3, 4, 4).float()
    free, clipped = (
        list(each.trajectory(torch.tensor([1, 3]), noise)) for each in (of("heun"), sampler)
    )
    assert max(out["pred_xstart"].abs().max() for out in clipped) == 1
    assert all(torch.equal(a["sample"], b["sample"]) for a, b in zip(free, clipped))


@pytest.mark.parametrize("solver, options", [
    ("euler", {"time_shift": 3.0}), ("heun", {"sample_eps": 0.1}), ("dopri5", {"rtol": 1e-6}),
    ("sde", {"diffusion_form": "linear", "diffusion_norm": 0.5}), ("sde", {"last_step": None}),
    ("sde-heun", {"last_step": "euler", "last_step_size": 0.2}),
])  # fmt: skip
def test_options_reach_the_solver_and_change_the_images(solver, options):
    process = FlowProcess(prediction="noise") if "sample_eps" in options else FlowProcess()
    plain = of(solver, process=process)
    told = replace(plain, solver_options=options)
    labels = torch.tensor([1, 3])
    one, other = (each.numbered_latents(0, [0, 1], labels) for each in (plain, told))
    assert not torch.equal(one, other)
    noise = ImageNoise(0, [0, 1], "cpu")
    out = process.trajectory(
        plain.predictor(labels), noise(torch.empty(2, 3, 4, 4)), solver, 6, noise_fn=noise,
        **options,
    )  # fmt: skip
    assert torch.equal([step["sample"] for step in out][-1], other)


def test_steps_are_shifted_as_the_network_was_trained_unless_told():
    trained = FlowProcess(time_shift=3.0)
    even = [i / 4 for i in range(4)]
    shifted = [t / (3 - 2 * t) for t in even]
    assert of("euler", 4, process=trained).steps() == pytest.approx(shifted)
    unshifted = of("euler", 4, process=trained, solver_options={"time_shift": 1.0})
    assert unshifted.steps() == pytest.approx(even) == of("euler", 4).steps()


class Operations(TorchDispatchMode):
    """Lists what runs inside it: the operation's name, and (device, axes) of its tensors."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.ran.append((operation.name(), {(t.device.type, t.dim()) for t in tensors}))
        return out


def between_devices(ran):
    """The operations that copy from one device to the other, or read a value back from the GPU. A
    number of the host in an operation on the GPU, a tensor without axes, is neither.
    """
    copies = ("_to_copy", "copy_", "_local_scalar_dense", "item", "nonzero")
    found = []
    for name, tensors in ran:
        devices = {device for device, _ in tensors}
        array = any(device == "cpu" and axes for device, axes in tensors)
        read = "cuda" in devices and "_local_scalar_dense" in name
        moved = len(devices) > 1 and (array or any(word in name for word in copies))
        if read or moved:
            found.append(name)
    return found


@pytest.mark.parametrize("prediction", ["velocity", "noise"])
@pytest.mark.parametrize("solver", CALLS)
def test_steps_copy_nothing_between_devices_and_read_nothing_back(solver, prediction):
    with FakeTensorMode():
        with torch.device("cuda"):
            net = DiT(**CONFIG).eval().requires_grad_(False)
            x, labels = torch.randn(4, 3, 4, 4), torch.zeros(4, dtype=torch.long)
        sampler = of(
            solver, 4, net, cfg_scale=2.0, cfg_interval=(0.2, 0.6),
            process=FlowProcess(prediction=prediction),
        )  # fmt: skip
        with Operations() as log:
            for out in sampler.trajectory(labels, x):
                assert out["sample"].device.type == "cuda"
    assert len(log.ran) > 100 and not between_devices(log.ran)


def test_the_list_of_operations_sees_copies():
    """The test above can fail: each of these is what it must catch."""
    with FakeTensorMode():
        x = torch.randn(3, device="cuda")
        for call in (
            lambda: torch.tensor([1.0, 2.0], device="cuda"),
            lambda: torch.ones(3).to("cuda"),
            lambda: torch.tensor(1.0).to("cuda"),
            lambda: x.cpu(),
        ):
            with Operations() as log:
                call()
            assert between_devices(log.ran)
        with Operations() as log:
            x * torch.tensor(2.0, dtype=torch.float64)
        assert not between_devices(log.ran)


@pytest.mark.gpu
@pytest.mark.parametrize("solver", CALLS)
def test_steps_on_a_gpu_wait_for_nothing(solver):
    sampler = of(solver, 4, network().cuda(), cfg_scale=2.0, cfg_interval=(0.2, 0.6))
    x, labels = torch.randn(4, 3, 4, 4, device="cuda"), torch.zeros(4, dtype=torch.long).cuda()
    sampler.latents(labels, x)  # what is made once may be copied
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = sampler.latents(labels, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.isfinite().all()


@pytest.mark.gpu
def test_dopri5_on_a_gpu_comes_to_the_end_of_a_cpu():
    x, labels = torch.randn(4, 3, 4, 4), torch.zeros(4, dtype=torch.long)
    options = {"atol": 1e-6, "rtol": 1e-6}
    net = network()
    want = of("dopri5", net=net, solver_options=options).latents(labels, x)
    found = of("dopri5", net=net.cuda(), solver_options=options).latents(labels.cuda(), x.cuda())
    assert (found.cpu() - want).abs().max() < 1e-3


# ---- the doors ----


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(a checkpoint of a flow, one of diffusion), on pixels, of random weights."""
    folder, state = tmp_path_factory.mktemp("ckpt"), network().state_dict()
    found = folder / "flow.safetensors", folder / "diffusion.safetensors"
    for path, process in zip(found, (FlowProcess().config, None)):
        save_weights(path, Weights(state, CONFIG, None, process=process))
    return found


@pytest.fixture
def flow(files):
    """The flags for the flow's checkpoint."""
    return ["--ckpt", str(files[0]), "--vae", "none", "--device", "cpu"]


def settings_of(path):
    with Image.open(path) as image:
        return json.loads(image.text["settings"])


@pytest.mark.parametrize("given, want", [
    ([], {"sampler": "heun", "num_sampling_steps": 125, "time_shift": None, "sample_eps": None,
          "diffusion_form": None}),
    (["--sampler", "sde", "--steps", "5", "--last-step", "none", "--diffusion-norm", "2"],
     {"sampler": "sde", "num_sampling_steps": 5, "diffusion_form": "sigma", "diffusion_norm": 2.0,
      "last_step": "none", "last_step_size": 0.04}),
    (["--sampler", "dopri5", "--steps", "5", "--atol", "1e-4"],
     {"sampler": "dopri5", "atol": 1e-4, "rtol": 1e-3, "last_step": None}),
    (["--sampler", "sde", "--steps", "5", "--diffusion-form", "sbdm", "--sample-eps", "0.001"],
     {"diffusion_form": "sbdm", "sample_eps": 0.001}),
])  # fmt: skip
def test_a_picture_says_which_solver_drew_it_and_how(tmp_path, flow, given, want):
    output = tmp_path / "out.png"
    sample.main([*flow, "--class-labels", "1", "2", "--output", str(output), *given])
    assert settings_of(output).items() >= want.items()
    own = [word.removeprefix("--") for word in given]
    options = dict(zip(own[::2], given[1::2]))
    sampler = load_sampler(
        flow[1], vae="none", device="cpu", cfg_scale=4.0, steps=want.get("num_sampling_steps", 5),
        **{
            name.replace("-", "_"): float(value) if value[0] in "0123456789" else value
            for name, value in options.items() if name != "steps"
        },
    )  # fmt: skip
    texts = ["1", "2"]
    expected = np.asarray(pictures.picture(sampler.images([1, 2], seed=0), texts))
    assert np.array_equal(np.asarray(Image.open(output)), expected)


def test_a_strip_tells_the_times_of_a_flow(tmp_path, flow, monkeypatch):
    texts = []

    def picture(images, below, per_row):
        texts.extend(below)
        return Image.new("L", (1, 1))

    monkeypatch.setattr(pictures, "picture", picture)
    sample.main([
        *flow, "--steps", "3", "--class-labels", "1", "--output", str(tmp_path / "out.png"),
        "--trajectory", str(tmp_path / "way.png"),
    ])  # fmt: skip
    assert texts == ["t = 0", "t = 0.3333", "1"]


@pytest.mark.parametrize("given, message", [
    ("--sampler ddpm", "--sampler ddpm is one of diffusion's; this network has learned the process "
     f"flow: {CHOICE}"),
    ("--sampler dpm++ --steps 5", "--sampler dpm++ is one of diffusion's"),
    ("--eta 0.5", "--eta 0.5 is for --sampler ddim"),
    ("--sampler sde --eta 0.5", "--eta 0.5 is for --sampler ddim; sde has its own noise"),
    ("--sampler heun --eta 0.5", "--eta 0.5 is for --sampler ddim; heun adds none"),
    ("--diffusion-form sigma",
     "--diffusion-form is for the samplers sde and sde-heun; --sampler is heun"),
    ("--sampler heun --last-step mean", "--last-step is for the samplers sde and sde-heun"),
    ("--sampler sde --atol 1e-3", "--atol is for the sampler dopri5; --sampler is sde"),
    ("--sampler dopri5 --atol 0", "--atol is 0.0; it must be from 1e-15 to 1000"),
    ("--sampler dopri5 --rtol -1", "--rtol is -1.0; it must be from"),
    ("--sampler dopri5 --rtol nan", "--rtol is nan; it must be from"),
    ("--sampler dopri5 --atol inf", "--atol is inf; it must be from"),
    ("--sampler sde --last-step-size 1", "--last-step-size is 1.0; it must be at least 0 and"),
    ("--sampler sde --last-step-size 1.5", "--last-step-size is 1.5; it must be from 0 to 1"),
    ("--sampler sde --last-step-size nan", "--last-step-size is nan; it must be from 0 to 1"),
    ("--sampler sde --last-step none --last-step-size 0.1", "leave --last-step-size out"),
    ("--sampler sde --last-step middle", "--last-step: invalid choice: 'middle'"),
    ("--sampler sde --diffusion-form round", "--diffusion-form: invalid choice: 'round'"),
    ("--sampler sde --diffusion-form sbdm",
     "sbdm is infinite at t = 0; give another form, or --sample-eps 0.001"),
    ("--sampler sde --diffusion-norm -1", "--diffusion-norm is -1.0; it must be from 0"),
    ("--sampler sde --diffusion-norm inf", "--diffusion-norm is inf; it must be from 0"),
    ("--sampler sde-heun --last-step none", "the score is infinite at t = 1"),
    ("--sample-eps 0.5", "--sample-eps is 0.5; it must be at least 0 and below 0.5"),
    ("--sample-eps nan", "--sample-eps is nan; it must be from 0 to 0.5"),
    ("--time-shift 0", "--time-shift is 0.0; it must be from 0.001 to 1000"),
    ("--time-shift nan", "--time-shift is nan; it must be from 0.001 to 1000"),
    ("--steps 0", "--num-sampling-steps is 0; it must be from 1 to 10000"),
    ("--steps 10001", "--num-sampling-steps is 10001; it must be from 1 to 10000"),
    ("--sampler sde --steps 1", "--num-sampling-steps is 1; it must be from 2 to 10000; --sampler "
     "sde takes at least 2"),
    ("--steps 3 --cfg-interval 0.1 0.11", "holds none of the 3 steps of heun"),
])  # fmt: skip
def test_what_a_flow_cannot_do_is_refused(flow, tmp_path, capsys, given, message):
    ends = (sample, ["--output", "out.png"]), (sample_ddp, ["--sample-dir", "many"])
    for door, (name, file) in ends:
        with pytest.raises(SystemExit) as stopped:
            door.main([*flow, "--cfg-scale", "2", *given.split(), name, str(tmp_path / file)])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given, message", [
    ("--sampler heun", "--sampler heun is one of flow's; this network has learned the process "
     "diffusion: choose one of ddpm, ddim, dpm++, unipc"),
    ("--sampler sde --diffusion-form sigma", "--sampler sde is one of flow's"),
    ("--diffusion-form sigma",
     "--diffusion-form is for the samplers sde and sde-heun; --sampler is ddpm"),
    ("--time-shift 3", "--time-shift is for the samplers euler, heun, dopri5, sde and sde-heun"),
    ("--steps 1001", "--num-sampling-steps is 1001; it must be from 1 to 1000"),
])  # fmt: skip
def test_what_diffusion_cannot_do_is_refused(files, tmp_path, capsys, given, message):
    flags = ["--ckpt", str(files[1]), "--vae", "none", "--device", "cpu", *given.split()]
    for door, name in ((sample, "--output"), (sample_ddp, "--sample-dir")):
        with pytest.raises(SystemExit) as stopped:
            door.main([*flags, name, str(tmp_path / "out.png")])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_options_of_python_have_no_choices_but_messages():
    for values, message in (
        ({"diffusion_form": "round"}, "`diffusion_form` is round; give one of constant, sbdm"),
        ({"last_step": "middle"}, "`last_step` is middle; give one of mean, euler, tweedie, none"),
        ({"sampler": "euler", "rtol": 0.1}, "`rtol` is for the sampler dopri5; `sampler` is euler"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingOptions(**values)
    settled = SamplingOptions(sampler="sde", diffusion_norm=2).settled(FlowProcess())
    assert {name: settled[name] for name in list(settled)[13:]} == dict(
        time_shift=None, sample_eps=None, diffusion_form="sigma", diffusion_norm=2.0,
        last_step="mean", last_step_size=0.04,
    )  # fmt: skip


# ---- many images ----


def many(flow, folder, *given, batch=2):
    """The images of sample_ddp.py, and the folder that is new."""
    before = set(folder.glob("*.npz"))
    sample_ddp.main([
        *flow, "--num-fid-samples", "6", "--steps", "4", "--cfg-scale", "2", "--sample-dir",
        str(folder), "--per-proc-batch-size", str(batch), *given,
    ])  # fmt: skip
    (npz,) = set(folder.glob("*.npz")) - before
    return np.load(npz)["arr_0"].astype(int), Path(str(npz).removesuffix(".npz"))


@pytest.mark.parametrize("solver", SOLVERS)
def test_many_images_depend_neither_on_the_batch_nor_on_processes(
    tmp_path, flow, monkeypatch, solver
):
    flags = ["--sampler", solver, "--cfg-interval", "0.2", "0.8"]
    images, folder = many(flow, tmp_path / "one", *flags)
    assert len({image.tobytes() for image in images}) == 6
    wide, _ = many(flow, tmp_path / "wide", *flags, batch=6)
    assert np.abs(images - wide).max() <= 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError):  # the first process writes the .npz
        many(flow, tmp_path / "two", *flags)
    share = sorted(path.stem for path in tmp_path.glob("two/*/*.png"))
    assert share == ["000002", "000003"]
    monkeypatch.setenv("RANK", "0")
    shared, again = many(flow, tmp_path / "two", *flags)
    assert np.array_equal(shared, images) and again.name == folder.name


def test_folders_tell_solvers_and_their_options_apart(tmp_path, flow):
    jobs = [
        [], ["--time-shift", "2"], ["--sampler", "euler"], ["--sampler", "sde"],
        ["--sampler", "sde", "--diffusion-form", "linear"],
        ["--sampler", "sde", "--last-step", "none"], ["--sampler", "dopri5", "--rtol", "0.1"],
    ]  # fmt: skip
    found = [many(flow, tmp_path, *given)[1] for given in jobs]
    names = [folder.name.split("-steps-")[1].split("-seed-")[0] for folder in found]
    assert names == ["4-heun", "4-heun", "4-euler", "4-sde", "4-sde", "4-sde", "4-dopri5"]
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in found]
    for key in ("decides", "options"):
        own = [manifest[key] for manifest in manifests]
        assert own[1]["time_shift"] == 2.0 and own[0]["time_shift"] is None
        assert own[4]["diffusion_form"] == "linear" and own[3]["diffusion_form"] == "sigma"
        assert own[5]["last_step"] == "none" and own[6]["rtol"] == 0.1
        assert not {"diffusion_form", "rtol"} & own[0].keys()
    # What is said to be the default is the same job
    sample_ddp.main([
        *flow, "--num-fid-samples", "6", "--num-sampling-steps", "4", "--cfg-scale", "2",
        "--sample-dir", str(tmp_path), "--per-proc-batch-size", "2", "--sampler", "sde",
        "--diffusion-form", "sigma", "--last-step", "mean",
    ])  # fmt: skip
    assert len(list(tmp_path.glob("*.npz"))) == len(jobs)


# ---- previews, grids ----


def test_previews_are_drawn_by_the_process_itself():
    images = preview(network(), FlowProcess(), PixelSpace(), 0, "cpu")
    solver, steps = FlowProcess.quick
    sampler = replace(of(solver, steps, cfg_scale=4.0), space=PixelSpace())
    labels = torch.arange(16) * 10 // 16
    want = sampler.decode(sampler.numbered_latents(0, range(16), labels))
    assert images.shape == (16, 4, 4, 3) and torch.equal(images, want)


@pytest.mark.parametrize("given, solver", [
    ([], "heun"), (["--sampler", "sde", "--diffusion-norm", "0.5"], "sde"),
])  # fmt: skip
def test_grids_are_drawn_of_a_flow(tmp_path, flow, given, solver):
    for kind, few in (("guidance", ["--cfg-scale", "1", "3"]), ("interpolate", [])):
        output = tmp_path / f"{kind}.png"
        grids.main([
            kind, *flow, "--steps", "3", *few, "--class-labels", "1", "2", "--output", str(output),
            *given,
        ])  # fmt: skip
        settings = settings_of(output)
        assert (settings["sampler"], settings["num_sampling_steps"]) == (solver, 3)
        assert settings["cfg_scale"] == ([1.0, 3.0] if few else 1.5)
        assert settings["diffusion_norm"] == (0.5 if given else None)


@pytest.mark.parametrize("solver", ["euler", "heun", "dopri5"])
def test_a_distance_that_would_change_nothing_is_refused(solver):
    message = f"`sample_eps` 0.1 changes nothing of {solver} for a velocity on the path linear"
    with pytest.raises(ValueError, match=message):
        of(solver, solver_options={"sample_eps": 0.1})
    of(solver, process=FlowProcess("vp"), solver_options={"sample_eps": 0.1})
    with pytest.raises(ValueError, match="`atol` is 'x'; give a number"):
        SamplingOptions(sampler="dopri5", atol="x")
