"""Steps at which blocks are not asked: against diffusers' TaylorSeer, loops by hand, and what must
never change.
"""
from functools import partial
import gc
import json
import weakref

import numpy as np
import pytest
import torch

from checkpoints.networks import DynamicDiT, ExitDiT
from conftest import ROOT, fill_randomly, randn, small_dit
from layers.text import Text
from models import BLOCKS, DiT
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
import sample
import sample_ddp
from sampling import SamplingOptions
from sampling.caching import CachedRun, History, Taylor, parse_cache, written
from sampling.sampler import Sampler
from sampling.speed import prepare
from variants.mmdit import MMDiT
from variants.pixart import PixArt
from variants.video import TextVideo, VideoDiT
from vae import PixelSpace

DIGITS = ROOT / "examples" / "digits"
SMALL = dict(input_size=4, patch_size=2, in_channels=3, hidden_size=16, num_heads=2)
CLASSES = SMALL | dict(depth=3, num_classes=5)
STEPS = 12


class Unclipped(PixelSpace):
    clip_denoised = False


def network(**changes):
    return fill_randomly(DiT(**CLASSES | changes), std=0.2).eval().requires_grad_(False)


def of(net, solver="ddim", steps=STEPS, **options):
    return Sampler(net, Unclipped(), None, steps, solver, **options)


def drawn(sampler, indices=(0, 1, 2)):
    return sampler.numbered_latents(0, indices, torch.tensor(indices) % 5)


def at(history, time):
    return sum(weight * value for weight, value in history.weighted(time))


# ---- the polynomial, and which steps ----


@pytest.mark.parametrize("order", range(4))
def test_a_polynomial_of_its_degree_is_continued_exactly(order):
    factors, times = randn(order + 2, 5), [990.0, 985.0, 911.0, 905.0, 850.0, 820.0]

    def value(t, degree):
        return sum(factors[i] * (t / 100 - 9) ** i for i in range(degree + 1))

    exact, beyond = History(order + 1), History(order + 1)
    for t in times:
        exact.keep(t, value(t, order))
        beyond.keep(t, value(t, order + 1))
    assert len(exact.kept) == order + 1
    assert (at(exact, 790.0) - value(790.0, order)).abs().max() < 1e-10
    assert (at(beyond, 790.0) - value(790.0, order + 1)).abs().max() > 1e-3


def test_of_two_tensors_at_a_time_the_last_one_counts():
    """So many steps of dpm++ are asked at the same whole t twice."""
    history = History(3)
    for t, value in (3.0, 30), (2.0, 7), (2.0, 20):
        history.keep(t, torch.tensor(value))
    assert at(history, 1.0) == 10
    sampler = of(network(), "dpm++", 300, cache="taylor:3,1")
    assert len(set(sampler.steps())) < 300
    plain = drawn(of(network(), "dpm++", 300), (0,))
    assert drawn(sampler, (0,)).abs().max() < 2 * plain.abs().max()


@pytest.mark.parametrize("order", [0, 1])
def test_it_is_diffusers_taylorseer_of_orders_0_and_1(order):
    """From order 2 on theirs is a Taylor series with differences for derivatives, which does not
    continue a parabola.
    """
    hooks = pytest.importorskip("diffusers.hooks.taylorseer_cache")
    theirs = hooks.TaylorSeerState(taylor_factors_dtype=torch.float64, max_order=order)
    ours = History(order + 1)
    for step in (0, 1, 4, 9):
        theirs.current_step, value = step, randn(2, 3, seed=step)
        theirs.update((value,))
        ours.keep(step, value)
    theirs.current_step = 11
    assert (at(ours, 11) - theirs.predict()[0]).abs().max() < 1e-12


def test_which_steps_are_whole():
    def told(cache, guided):
        return "".join(".x"[whole] for whole in cache.computed(guided))

    assert told(Taylor(3, 0), [True] * 9) == "x..x..x.x"
    assert told(Taylor(3, 1), [True] * 12) == "xx..x..x..xx"
    assert told(Taylor(4, 2), [False] * 12) == "xxx...x...xx"
    assert told(Taylor(1, 1), [False] * 5) == "xxxxx"
    # Guidance ends after five steps
    assert told(Taylor(2, 1), [True] * 5 + [False] * 6) == "xx.x.xx.x.x"


# ---- the Sampler ----


def blocks_added(net, x, t, y):
    """(tokens (N, T, D) before the blocks, after them, and the DiT's output for others' tokens)."""
    tokens, layout = net.tokens(x)
    c = net.t_embedder(t) + net.y_embedder.embedding_table(y)
    out = tokens
    for block in net.blocks:
        out = block(out, c)
    return tokens, out, lambda other: net.images(net.final_layer(other, c), x)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_it_is_a_loop_by_hand(scale):
    """In float64, and at any x: straight lines through the last two whole steps."""
    net = small_dit(depth=2)
    sampler = of(net, cfg_scale=scale, cfg_channels="all", cache="taylor:3,1")
    predict, labels = sampler.predictor(torch.tensor([1, 7])), torch.tensor([1, 7])
    if scale != 1:
        labels = torch.cat([labels, torch.full((2,), net.null_label)])
    before = []
    for step, time in enumerate(sampler.steps()):
        x = randn(2, *net.latent_shape, seed=step)
        got = predict(x, torch.full((2,), time), step)
        doubled = torch.cat([x] * (len(labels) // 2))
        tokens, out, finish = blocks_added(net, doubled, torch.full((len(labels),), time), labels)
        if step in (0, 1, 4, 7, 10, 11):
            before = [*before[-1:], (time, out - tokens)]
        else:
            (early, first), (late, second) = before
            slope = (second - first) / (late - early)
            out = tokens + second + slope * (time - late)
        want = finish(out)
        if scale != 1:
            cond, null = want.chunk(2)
            channels = net.in_channels
            guided = null[:, :channels] + scale * (cond - null)[:, :channels]
            want = torch.cat([guided, cond[:, channels:]], dim=1)
        assert (got - want).abs().max() < 1e-10


SOLVERS = [
    (process, name) for process in (GaussianProcess, FlowProcess) for name in process.solvers
]


@pytest.mark.parametrize("process, solver", SOLVERS, ids=[name for _, name in SOLVERS])
def test_solvers_leave_blocks_out_or_are_refused(process, solver):
    net = network(learn_sigma=process.learns_sigma)
    options = dict(process=process.of(net, {}), cfg_scale=2.0, cfg_interval=(0.2, 0.6))
    if not process.solvers[solver].at_beginnings:
        with pytest.raises(ValueError, match=f"ask the network once a step, .*; .* is {solver}"):
            of(net, solver, cache="taylor:2,1", **options)
        return
    sampler, sizes = of(net, solver, cache="taylor:2,1", **options), []
    hook = net.blocks[1].register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    got = drawn(sampler)
    hook.remove()
    whole = parse_cache(sampler.cache).computed(sampler.guided())
    wanted = [3 + 3 * guided for guided, asked in zip(sampler.guided(), whole) if asked]
    assert sizes == wanted and len(wanted) < STEPS and len(set(wanted)) == 2
    plain = drawn(of(net, solver, **options))
    assert 0 < (got - plain).abs().max() and got.isfinite().all()


def test_an_interval_of_1_changes_no_bit():
    net = network()
    plain = drawn(of(net, cfg_scale=2.0))
    assert torch.equal(drawn(of(net, cfg_scale=2.0, cache="taylor:1,2")), plain)
    assert not torch.equal(drawn(of(net, cfg_scale=2.0, cache="taylor:2,0")), plain)


def test_a_batch_may_be_split():
    sampler = of(network(), "ddpm", cfg_scale=2.0, cache="taylor:3,1")
    together = drawn(sampler, (0, 1, 2, 3))
    apart = torch.cat([drawn(sampler, (0,)), drawn(sampler, (1, 2, 3))])
    assert (together - apart).abs().max() < 1e-4 * together.abs().max()


def test_nothing_remains_of_a_trajectory():
    """Neither after one that ended, nor after one that broke off; and the network is as it was."""
    net = network()
    names, blocks, plain = [*net.state_dict()], [*net.blocks], of(net)
    sampler = of(net, cache="taylor:3,1")
    first, uncached = drawn(sampler), drawn(plain)
    way = sampler.trajectory(torch.tensor([1]), torch.zeros(1, *net.latent_shape))
    for _ in range(4):
        next(way)
    fail = net.final_layer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(way)
    fail.remove()
    assert torch.equal(drawn(sampler), first) and torch.equal(drawn(plain), uncached)
    assert [*net.state_dict()] == names and [*net.blocks] == blocks
    assert "forward" not in vars(net)


def test_two_trajectories_at_a_time_do_not_meet():
    sampler = of(network(), cache="taylor:3,1")
    labels, noise = torch.tensor([1, 2]), torch.randn(2, 3, 4, 4)
    alone = sampler.latents(labels, noise)
    one, other = (sampler.trajectory(labels, x) for x in (noise, 2 * noise))
    for here, _ in zip(one, other):
        last = here["sample"]
    assert torch.equal(last, alone)


def test_memory_is_what_the_documents_say_and_ends_with_the_trajectory():
    net = network()
    run = CachedRun(net, Taylor(2, 2), [*range(9)], [True] * 9)
    for step in range(9):
        run.at(step)(torch.zeros(6, 3, 4, 4), torch.zeros(6), torch.zeros(6, dtype=torch.long))
    kept = [value for _, value in run.memory.added.kept]
    assert [value.shape for value in kept] == 3 * [(6, 4, 16)] and run.memory.entered is None
    there = weakref.ref(run.memory)
    gc.disable()  # it goes without
    try:
        del run, kept
        assert there() is None
    finally:
        gc.enable()


def of_words(kind, **changes):
    words = dict(text_width=6, text_length=5, depth=2)
    vectors = torch.randn(2, 4) if "pooled_width" in changes else None
    return kind(**SMALL | words | changes), Text(
        torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.bool), vectors
    )


CLIPS = dict(frames=2, depth=2)
NETWORKS = {
    **{block: lambda block=block: (DiT(**CLASSES, block=block), None) for block in BLOCKS},
    "one block": lambda: (DiT(**CLASSES | {"depth": 1}), None),
    "MMDiT": lambda: of_words(MMDiT, pooled_width=4),
    "PixArt": lambda: of_words(PixArt),
    **{
        kind: lambda kind=kind: (VideoDiT(**SMALL, **CLIPS, num_classes=5, attention=kind), None)
        for kind in ("latte", "alternate", "full")
    },
    "TextVideo": lambda: of_words(TextVideo, **CLIPS),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_says_the_same_at_the_same_place(name):
    """What blocks added is used again, so at the same x and t the output is the network's; it is
    another one at another x, and no block is asked.
    """
    torch.manual_seed(0)
    net, y = NETWORKS[name]()
    fill_randomly(net, std=0.2).eval().requires_grad_(False)
    y = torch.tensor([1, 2]) if y is None else y
    x, t = torch.randn(2, 2, *net.latent_shape), torch.full((2,), 400)
    run = CachedRun(net, Taylor(2, 0), [*range(5)], [False] * 5)
    want = net(x[0], t, y)
    assert torch.equal(run.at(0)(x[0], t, y), want)
    hooks = [block.register_forward_pre_hook(lambda *_: 1 / 0) for block in net.blocks]
    network = run.at(1)
    assert (network(x[0], t, y) - want).abs().max() < 1e-5 * want.abs().max()
    assert not torch.allclose(network(x[1], t, y), want)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_blocks_of_any_network_are_compiled_as_a_graph_each(name, monkeypatch):
    """fullgraph=True raises where Python has to step in; here with a back end that takes no time.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    torch.manual_seed(0)
    net, y = NETWORKS[name]()
    fill_randomly(net, std=0.2).eval().requires_grad_(False)
    y = torch.tensor([1, 2]) if y is None else y
    x, t = torch.randn(2, *net.latent_shape), torch.full((2,), 400)
    want = net(x, t, y)
    prepare(net, compile=True, by_blocks=True)
    torch._dynamo.utils.counters.clear()
    assert (net(x, t, y) - want).abs().max() < 1e-5 * want.abs().max()
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= len(net.blocks)
    run = CachedRun(net, Taylor(2, 0), [*range(5)], [False] * 5)
    asked, spared = run.at(0)(x, t, y), run.at(1)(x, t, y)
    assert (asked - want).abs().max() < 1e-5 * want.abs().max()
    assert (spared - want).abs().max() < 1e-5 * want.abs().max()


def test_half_precision_stays_near():
    net = network()
    plain = drawn(of(net, cache="taylor:3,1"))
    half = drawn(of(net, cache="taylor:3,1", mixed_precision="bf16"))
    assert half.dtype == torch.float32
    assert 0 < (half - plain).abs().max() < 0.1 * plain.abs().max()


# ---- what is refused, and the doors ----


class Scheduling(DiT):
    def schedule(self, times):
        pass

    def expect(self, step):
        pass


@pytest.mark.parametrize("text, message", [
    ("taylor", "`cache` is 'taylor'; give taylor:INTERVAL,ORDER, such as taylor:3,1"),
    ("taylor:3", "give taylor:INTERVAL,ORDER"), ("taylor:3,1,1", "give taylor:INTERVAL,ORDER"),
    ("fora:3,0", "give taylor:INTERVAL,ORDER"), ("taylor:3,-1", "give taylor:INTERVAL,ORDER"),
    ("taylor:²,1", "give taylor:INTERVAL,ORDER"), ("", "`cache` is ''"),
    ("taylor:0,1", "has the interval 0; it must be from 1 to 1,000"),
    ("taylor:2,5", "has the order 5; it must be from 0 to 4"),
])  # fmt: skip
def test_texts_that_ask_for_nothing_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(cache=text)


def test_options_have_one_form_for_one_cache():
    assert SamplingOptions(cache="taylor:03,01").cache == "taylor:3,1"
    assert written(parse_cache("taylor:2,0")) == "taylor:2,0"
    with pytest.raises(ValueError, match="`cache` is 3; give a text"):
        SamplingOptions(cache=3)


def test_networks_that_cannot_are_refused():
    exits = ExitDiT(**CLASSES, exits=[[2, 0.5]])
    for net in (Scheduling(**CLASSES), DynamicDiT(**CLASSES), exits):
        with pytest.raises(ValueError, match="one network that does as much at all times"):
            of(net, cache="taylor:3,1")
    with pytest.raises(ValueError, match="two by turns .`ckpt_high`. do not"):
        of(network(), high=network(depth=2), high_from=0.5, cache="taylor:3,1")
    compiled = network()
    compiled.forward = lambda *_: None
    with pytest.raises(ValueError, match="compiled as a whole; prepare it with `by_blocks=True`"):
        of(compiled, cache="taylor:3,1")
    with pytest.raises(ValueError, match="taylor:3,1 leaves nothing out in 3 steps, of which"):
        of(network(), steps=3, cache="taylor:3,1")


def test_a_picture_is_what_the_sampler_draws(tmp_path, capsys):
    common = ["--ckpt", str(DIGITS / "dit.safetensors"), "--vae", str(DIGITS / "vae"), "--steps"]
    common += ["9", "--sampler", "ddim", "--class-labels", "3", "--device", "cpu", "--output"]
    files = [tmp_path / f"{name}.png" for name in ("whole", "cached", "neutral")]
    for file, flags in zip(files, ([], ["--cache", "taylor:2,1"], ["--cache", "taylor:1,1"])):
        sample.main([*common, str(file), *flags])
    whole, cached, neutral = (np.asarray(sample.Image.open(file)) for file in files)
    assert np.array_equal(neutral, whole) and not np.array_equal(cached, whole)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        sample.main([*common, str(files[0]), "--cache", "taylor:9,0,1"])
    assert "--cache is 'taylor:9,0,1'; give taylor:INTERVAL,ORDER" in capsys.readouterr().err


def test_many_images_have_a_folder_of_their_own(tmp_path):
    common = ["--ckpt", str(DIGITS / "dit.safetensors"), "--vae", str(DIGITS / "vae")]
    common += ["--sampler", "ddim", "--steps", "6", "--num-fid-samples", "3", "--device", "cpu"]
    common += ["--sample-dir", str(tmp_path), "--per-proc-batch-size"]
    for flags in (["2"], ["2", "--cache", "taylor:2,1"]):
        sample_ddp.main([*common, *flags])
    found = {
        json.loads(path.read_text())["decides"].get("cache"): path.parent
        for path in tmp_path.glob("*/manifest.json")
    }
    assert found.keys() == {None, "taylor:2,1"}
    plain, cached = (np.load(f"{folder}.npz")["arr_0"] for folder in found.values())
    assert not np.array_equal(plain, cached)
