"""The multistep solvers, guidance inside an interval, and what makes sampling fast: what they may
change and what not.
"""

import json
import math

import numpy as np
import pytest
import torch

from checkpoints.weights import load_weights
from conftest import ROOT, fill_randomly, randn
from diffusion import create_diffusion
from models import DiT
from processes.gaussian import GaussianProcess
from processes.gaussian import SCHEDULERS
import sample
from sampling import loading
from sampling import speed
import sample_ddp
from processes.noise import ImageNoise
from sampling.sampler import Sampler
from sampling.speed import prepare
from checkpoints.choice import NetworkChoice
from checkpoints.loading import find_files
from sampling.flags import sampling_options
from vae import PixelSpace, load_vae

DIGITS = ROOT / "examples" / "digits"
SMALL = dict(
    input_size=4, patch_size=2, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=10
)
ABAR = create_diffusion("").alphas_cumprod
MULTISTEP = sorted(SCHEDULERS)
# Of the version before --cfg-interval and --compile
OLD_NAME = "dit-cfg-1.5-steps-3-ddpm-seed-0-n-2-2edc23ea"


class Unbounded(PixelSpace):
    clip_denoised = False


class Gaussian(torch.nn.Module):
    """A network for data N(mean, std²): its prediction of the noise is exact, and so is known where
    a path ends.
    """

    latent_shape, num_classes, null_label, learn_sigma = (3, 4, 4), 0, None, True
    mean, std = 0.3, 0.5

    def forward(self, x, t):
        abar = torch.from_numpy(ABAR)[t].view(-1, 1, 1, 1)
        variance = abar * self.std**2 + 1 - abar
        eps = (1 - abar).sqrt() * (x - abar.sqrt() * self.mean) / variance
        return torch.cat([eps, torch.zeros_like(x)], dim=1).to(x.dtype)

    def end(self, x):
        """Where the deterministic path from x_T = x ends."""
        return self.mean + self.std * (x - math.sqrt(ABAR[-1]) * self.mean) / math.sqrt(
            ABAR[-1] * self.std**2 + 1 - ABAR[-1]
        )


def network(**changes):
    return fill_randomly(DiT(**{**SMALL, **changes})).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def digits():
    """(load() → a fresh copy of the digits network, its autoencoder, labels, noise)."""
    weights = load_weights(DIGITS / "dit.safetensors")

    def load():
        found = DiT(**weights.config)
        found.load_state_dict(weights.tensors)
        return found.eval().requires_grad_(False)

    return load, load_vae(str(DIGITS / "vae"), "cpu"), torch.arange(10), randn(10, 4, 4, 4).float()


def grey(one, other):
    """The mean difference of two sets of images in grey levels."""
    return (one.float() - other.float()).abs().mean().item()


# ---- solvers ----


def second_order_by_the_paper(eps, x, n):
    """Data of x_T = x by DPM-Solver++(2M), algorithm 2 of Lu et al. 2022, in float64: n equal steps
    of lambda, then x_0.
    """
    half_log_snr = np.log(ABAR / (1 - ABAR)) / 2
    lambdas = np.linspace(half_log_snr[-1], half_log_snr[0], n)
    steps = np.interp(-lambdas, -half_log_snr, np.arange(1000)).round().astype(int)
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-2 * lambdas))), np.sqrt(1 / (1 + np.exp(2 * lambdas)))
    before = None
    for i in range(n):
        x_start = (x - sigma[i] * eps(x, torch.full((len(x),), int(steps[i])))) / alpha[i]
        if i == n - 1:
            return x_start
        h = lambdas[i + 1] - lambdas[i]
        d = x_start
        if i > 0:
            r = (lambdas[i] - lambdas[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x_start - before / (2 * r)
        x, before = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * math.expm1(-h) * d, x_start


@pytest.mark.parametrize("steps", [3, 10, 20, 50])
def test_dpm_solver_is_that_of_the_paper(steps, digits):
    load, _, labels, noise = digits
    net, wide = load(), load().double()
    got = Sampler(net, Unbounded(), None, steps, "dpm++").latents(labels, noise)
    want = second_order_by_the_paper(lambda x, t: wide(x, t, labels)[:, :4], noise.double(), steps)
    assert (got - want).abs().max() < 2e-3 * want.abs().max()


@pytest.mark.parametrize("sampler", MULTISTEP)
def test_multistep_solvers_come_to_the_exact_end_in_second_order(sampler):
    x = randn(2, 3, 4, 4)
    exact = Gaussian().end(x)
    ddim, twenty, forty = (
        (Sampler(Gaussian(), Unbounded(), None, n, name).latents(torch.zeros(2), x) - exact)
        .abs()
        .max()
        for n, name in ((20, "ddim"), (20, sampler), (40, sampler))
    )
    assert forty < twenty / 3.5 and twenty < ddim / 9


def test_twenty_steps_come_nearer_to_the_exact_digits_than_fifty_of_ddim(digits):
    load, space, labels, noise = digits
    net = load()
    exact, fifty, *others = (
        Sampler(net, space, None, n, name, cfg_scale=1.5).latents(labels[:4], noise[:4])
        for n, name in ((500, "ddim"), (50, "ddim"), *((20, sampler) for sampler in MULTISTEP))
    )
    far = (fifty - exact).square().mean()
    assert len(others) == 2 and all((twenty - exact).square().mean() < far / 2 for twenty in others)


@pytest.mark.parametrize("sampler", MULTISTEP)
@pytest.mark.parametrize("steps", [1, 2, 999])
def test_every_number_of_steps_up_to_the_limit_works(sampler, steps):
    asked = []
    net = Gaussian()
    net.register_forward_pre_hook(lambda module, args: asked.append(args[1].tolist()))
    x = randn(2, 3, 4, 4)
    got = Sampler(net, Unbounded(), None, steps, sampler).latents(torch.zeros(2), x)
    assert len(asked) == steps and asked[0] == [999, 999] and all(0 <= t[0] <= 999 for t in asked)
    assert got.isfinite().all() and (steps < 999 or (got - net.end(x)).abs().max() < 1e-3)


@pytest.mark.parametrize("sampler", MULTISTEP)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_multistep_solvers_clip_where_the_space_has_bounds(sampler, scale):
    net, labels, noise = network(), torch.tensor([1, 2]), 3 * randn(2, 3, 4, 4).float()
    inside, outside = (
        Sampler(net, space, None, 5, sampler, cfg_scale=scale).latents(labels, noise)
        for space in (PixelSpace(), Unbounded())
    )
    assert inside.abs().max() <= 1 and outside.abs().max() > 1


@pytest.mark.parametrize("sampler", GaussianProcess.solvers)
def test_images_depend_on_seed_and_index_whatever_the_batch(sampler):
    sampler = Sampler(
        network(), Unbounded(), None, 6, sampler, cfg_scale=1.5, cfg_interval=(0.2, 0.7)
    )
    whole = sampler.numbered_latents(3, range(4), torch.arange(4))
    parts = [sampler.numbered_latents(3, [i], torch.tensor([i])) for i in (2, 0)]
    torch.testing.assert_close(torch.cat(parts), whole[[2, 0]], rtol=1e-4, atol=1e-5)
    again = sampler.numbered_latents(3, range(4), torch.arange(4))
    assert torch.equal(whole, again) and not torch.equal(
        whole, sampler.numbered_latents(4, range(4), torch.arange(4))
    )


@pytest.mark.parametrize("sampler", MULTISTEP)
def test_multistep_solvers_draw_nothing(sampler):
    def noise_fn(x):
        raise AssertionError("drawn")

    net, before = network(), torch.get_rng_state()
    Sampler(net, Unbounded(), None, 3, sampler).latents(
        torch.tensor([1]), randn(1, 3, 4, 4).float(), noise_fn
    )
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sampler", MULTISTEP)
@pytest.mark.parametrize("steps", [10, 20, 100])
def test_the_network_is_asked_at_the_steps_nearest_to_the_noise(sampler, steps):
    sampler = Sampler(Gaussian(), Unbounded(), None, steps, sampler)
    sigmas = sampler.process.scheduler(sampler.sampler, steps).sigmas[:-1]
    exact = np.interp(np.log(sigmas), np.log(np.sqrt(1 / ABAR - 1)), np.arange(1000))
    assert (
        np.abs(exact - sampler.steps()).max() <= 0.5
        and np.ptp(np.diff(np.log(sigmas))) < 1e-4
    )


@pytest.mark.parametrize("sampler", GaussianProcess.solvers)
def test_networks_without_a_variance_can_be_sampled(sampler):
    net = network(learn_sigma=False)
    assert Sampler(net, PixelSpace(), None, 4, sampler, cfg_scale=2.0).numbered_latents(
        0, [0, 1], torch.tensor([1, 2])
    ).isfinite().all()  # fmt: skip


# ---- guidance inside an interval ----


@pytest.mark.parametrize(
    "sampler, steps", [("ddpm", [0, 250, 500, 749, 999]), ("ddim", [0, 250, 500, 749, 999])]
)
def test_guidance_is_applied_inside_the_interval_alone(sampler, steps):
    net, labels, x = network(), torch.tensor([3, 5]), randn(2, 3, 4, 4).float()
    process = create_diffusion("5")
    assert process.timestep_map == [0, 250, 500, 749, 999]  # 749.25 is the running sum
    noise_fn = ImageNoise(1, [0, 1], "cpu")
    got = Sampler(
        net, Unbounded(), None, 5, sampler, cfg_scale=3.0, cfg_interval=(0.25, 0.749)
    ).latents(labels, x, noise_fn)
    noise_fn, want = ImageNoise(1, [0, 1], "cpu"), x
    for i in range(4, -1, -1):
        if 250 <= steps[i] <= 749:

            def model(x, t):
                doubled = (
                    torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, torch.full((2,), 10)]),
                )  # fmt: skip
                return net.forward_with_cfg(*doubled, 3.0)[:2]
        else:

            def model(x, t):
                return net(x, t, labels)

        step = process.p_sample if sampler == "ddpm" else process.ddim_sample
        want = step(model, want, torch.full((2,), i), clip_denoised=False, noise_fn=noise_fn)[
            "sample"
        ]
    assert torch.equal(got, want)


@pytest.mark.parametrize("sampler", GaussianProcess.solvers)
def test_the_null_half_is_evaluated_inside_the_interval_alone(sampler):
    net, seen = network(), []
    net.register_forward_pre_hook(
        lambda module, args: seen.append((len(args[0]), args[1][0].item()))
    )
    labels, noise = torch.tensor([0, 1, 2]), randn(3, 3, 4, 4).float()

    def latents(scale, interval):
        seen.clear()
        torch.manual_seed(0)
        return Sampler(
            net, Unbounded(), None, 10, sampler, cfg_scale=scale, cfg_interval=interval
        ).latents(labels, noise)  # fmt: skip

    partly = latents(2.0, (0.3, 0.6))
    assert len(seen) == 10 and {n for n, _ in seen} == {3, 6}
    assert all((n == 6) == (300 <= t <= 600) for n, t in seen)
    everywhere = latents(2.0, (0.0, 1.0))
    assert {n for n, _ in seen} == {6}
    plain = latents(1.0, (0.0, 1.0))
    assert {n for n, _ in seen} == {3}
    assert not torch.equal(partly, everywhere) and not torch.equal(partly, plain)


def test_the_number_of_the_step_says_whether_it_is_guided():
    net, labels, x = network(), torch.tensor([3, 5]), randn(2, 3, 4, 4).float()
    sampler = Sampler(net, Unbounded(), None, 5, cfg_scale=3.0, cfg_interval=(0.25, 0.749))
    predict, t = sampler.predictor(labels), torch.full((2,), 500)
    plain = net(x, t, labels)
    assert sampler.guided() == [False, True, True, True, False]
    for step in (4, 2, 0, 3, 3):
        assert torch.equal(predict(x, t, step), plain) == (step in (0, 4))


@pytest.mark.parametrize("sampler", GaussianProcess.solvers)
def test_an_interval_without_a_step_is_refused(sampler):
    with pytest.raises(
        ValueError, match=f"`cfg_interval` 0.9995 1.0 holds none of the 5 steps of {sampler}"
    ):
        Sampler(network(), Unbounded(), None, 5, sampler, cfg_scale=2.0, cfg_interval=(0.9995, 1.0))
    Sampler(network(), Unbounded(), None, 5, sampler, cfg_scale=2.0, cfg_interval=(0.999, 1.0))


# ---- what is fast may not be different ----


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_casting_weights_once_is_what_autocast_does_each_time(precision, digits):
    load, _, labels, noise = digits
    plain, cast = load(), load()
    prepare(cast, precision)
    assert cast.blocks[0].mlp.fc1.weight.dtype == speed.PRECISIONS[precision]
    assert cast.pos_embed.dtype == cast.y_embedder.embedding_table.weight.dtype == torch.float32
    one, other = (
        Sampler(
            net, Unbounded(), None, 4, "unipc", cfg_scale=1.5, mixed_precision=precision
        ).latents(labels, noise)
        for net in (plain, cast)
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("sampler, steps", [("ddim", 20), ("unipc", 10)])
def test_lower_precision_draws_the_same_digits(sampler, steps, digits):
    load, space, labels, noise = digits
    images = {}
    for precision in ("no", "bf16", "fp16"):
        net = load()
        prepare(net, precision)
        fast = Sampler(net, space, None, steps, sampler, cfg_scale=1.5, mixed_precision=precision)
        images[precision] = fast.decode(fast.latents(labels, noise))
    assert 0 < grey(images["bf16"], images["no"]) < 2 and 0 < grey(images["fp16"], images["no"]) < 2


def test_what_cannot_be_compiled_is_said_at_once(monkeypatch, tmp_path, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found\nand a long tale")

    monkeypatch.setattr(torch, "compile", broken)
    output = tmp_path / "out.png"
    with pytest.raises(SystemExit):
        sample.main([
            "--ckpt", str(DIGITS / "dit.safetensors"), "--vae", str(DIGITS / "vae"), "--compile",
            "--output", str(output),
        ])  # fmt: skip
    assert (
        "cannot compile here (No working C++ compiler found); leave the flag out"
        in capsys.readouterr().err
    )
    assert not output.exists()


@pytest.mark.long
@pytest.mark.parametrize("sampler, steps", [("ddpm", 20), ("unipc", 10)])
def test_compiled_networks_draw_the_same_digits(sampler, steps, digits):
    """Also with guidance that comes and goes, which is another shape of batch, and in bf16."""
    load, space, labels, noise = digits
    # A process may compile one forward pass so many times only, and other tests did
    torch._dynamo.reset()
    for precision, bar in (("no", 0.1), ("bf16", 2)):
        images = []
        for compiled in (False, True):
            net = load()
            prepare(net, precision, compiled)
            torch.manual_seed(0)
            fast = Sampler(
                net, space, None, steps, sampler, cfg_scale=1.5, mixed_precision=precision,
                cfg_interval=(0.3, 0.7),
            )  # fmt: skip
            images.append(fast.decode(fast.latents(labels, noise)))
        assert grey(*images) < bar


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_gpu_with_graphs_draws_the_digits_of_float32(precision, digits):
    load, _, labels, noise = digits
    space = load_vae(str(DIGITS / "vae"), "cuda")
    images = []
    for fast in (False, True):  # two sizes of batch, with and without guidance
        net = load().cuda()
        prepare(net, precision if fast else "no", compile=fast)
        sampler = Sampler(
            net, space, None, 20, "unipc", cfg_scale=1.5, cfg_interval=(0.2, 1.0),
            mixed_precision=precision if fast else "no",
        )  # fmt: skip
        images.append(sampler.decode(sampler.latents(labels.cuda(), noise.cuda())))
    assert grey(*images) < 2


@pytest.mark.gpu
def test_graphs_are_safe_beside_decoding_and_a_smaller_last_batch(tmp_path):
    common = [
        "--ckpt", str(DIGITS / "dit.safetensors"), "--vae", str(DIGITS / "vae"),
        "--num-fid-samples", "7", "--steps", "10", "--per-proc-batch-size", "4", "--sampler",
        "dpm++", "--cfg-interval", "0.2", "0.9", "--sample-dir", str(tmp_path),
    ]  # fmt: skip
    sample_ddp.main(common)
    (plain,) = tmp_path.glob("*.npz")
    sample_ddp.main([*common, "--compile"])
    (compiled,) = set(tmp_path.glob("*.npz")) - {plain}
    one, other = (torch.from_numpy(np.load(path)["arr_0"]) for path in (plain, compiled))
    assert grey(one, other) < 0.5


# ---- the doors ----


def loaded(monkeypatch, *given):
    """load_sampler with these flags, and what was given to torch.compile."""
    compiled = []

    def record(function, **options):
        compiled.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", record)
    choice = NetworkChoice(str(DIGITS / "dit.safetensors"), vae=str(DIGITS / "vae"))
    files = find_files(choice, loading.VAE)
    return loading.build_sampler(choice, files, flags(*given), torch.device("cpu")), compiled


def test_flags_reach_the_network(monkeypatch):
    plain, compiled = loaded(monkeypatch)
    assert (
        plain.cfg_interval == (0.0, 1.0)
        and plain.network.blocks[0].mlp.fc1.weight.dtype == torch.float32
        and not compiled
    )
    fast, compiled = loaded(
        monkeypatch, "--cfg-interval", "0.2", "0.7", "--mixed-precision", "bf16", "--compile",
        "--sampler", "unipc", "--steps", "9",
    )  # fmt: skip
    assert (fast.cfg_interval, fast.sampler, fast.num_sampling_steps) == ((0.2, 0.7), "unipc", 9)
    assert (
        fast.mixed_precision == "bf16"
        and fast.network.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    )
    (_, (forward, options)) = compiled  # the first is a trial
    assert forward.__self__ is fast.network and options == {"dynamic": True, "fullgraph": True}
    assert fast.network.forward.__wrapped__ == forward


def flags(*given):
    parser = sample.build_parser()
    return sampling_options(parser.parse_args(given), parser.given(given))


def steps_of(*given):
    return flags(*given).settled(GaussianProcess())["num_sampling_steps"]


def test_each_sampler_has_steps_of_its_own_unless_told():
    for name, solver in GaussianProcess.solvers.items():
        assert steps_of("--sampler", name) == solver.steps
        assert steps_of("--sampler", name, "--steps", "250") == 250
        assert steps_of("--num-sampling-steps", "7", "--sampler", name) == 7
    assert {name: solver.steps for name, solver in GaussianProcess.solvers.items()} == {
        "ddpm": 250, "ddim": 250, "dpm++": 20, "unipc": 20,
    }  # fmt: skip


@pytest.mark.parametrize("given, message", [
    (["--sampler", "dpm++", "--steps", "1000"],
     "must be from 1 to 999; --sampler dpm++ takes at most 999"),
    (["--sampler", "unipc", "--steps", "0"], "--num-sampling-steps is 0; it must be from 1 to 999"),
    (["--sampler", "unipc", "--eta", "0.5"], "--eta 0.5 is for --sampler ddim; unipc adds none"),
    (["--cfg-interval", "0.7", "0.3"], "--cfg-interval is 0.7 0.3; give two shares"),
    (["--cfg-interval", "-0.1", "0.3"], "--cfg-interval is -0.1 0.3; give two shares"),
    (["--cfg-interval", "0", "nan"], "--cfg-interval is 0.0 nan; give two shares"),
    (["--cfg-interval", "0", "1000"], "--cfg-interval is 0.0 1000.0; give two shares"),
    (["--cfg-interval", "0", "0.5", "--cfg-scale", "1"],
     "is for guidance, and --cfg-scale 1 is none"),
])  # fmt: skip
def test_what_a_solver_cannot_do_is_refused(given, message, capsys):
    for door in (sample, sample_ddp):
        with pytest.raises(SystemExit):
            door.main(given)
        assert message in capsys.readouterr().err


def test_a_sampler_refuses_steps_that_it_cannot_take():
    with pytest.raises(ValueError, match="takes at most 999"):
        Sampler(network(), PixelSpace(), None, 1000, "unipc")


def test_folders_of_samples_keep_their_names_and_tell_new_options_apart(tmp_path):
    """The name that this command had before there were --cfg-interval and --compile, taken from
    that version.
    """
    common = [
        "--ckpt", str(DIGITS / "dit.safetensors"), "--vae", str(DIGITS / "vae"),
        "--num-fid-samples", "2", "--device", "cpu", "--sample-dir", str(tmp_path), "--steps", "3",
    ]  # fmt: skip
    sample_ddp.main(common)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert folder.name == OLD_NAME
    sample_ddp.main([*common, "--cfg-interval", "0.2", "0.9"])
    sample_ddp.main([*common, "--sampler", "unipc"])
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    decided = [json.loads((path / "manifest.json").read_text())["decides"] for path in folders]
    assert len(folders) == 3 and [one.get("cfg_interval") for one in decided].count([0.2, 0.9]) == 1
    assert len({(path / "000000.png").read_bytes() for path in folders}) == 3
