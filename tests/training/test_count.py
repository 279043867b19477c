"""count.py: the paper's numbers, memory against what real networks keep, and what users get wrong.
"""

from itertools import accumulate
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from checkpoints.networks import MODELS, create_network
from conftest import fill_randomly
import count
from starts import each_start
from training import cost as training_cost
from models import BLOCKS, DiT, DiT_models
from test_blocks import PAPER
from training.state import Recipe, new_state
from training.step import draw, train_step
from variants.video import VideoDiT

SMALL = dict(input_size=16, patch_size=2, hidden_size=64, depth=3, num_heads=4, num_classes=10)


def printed(capsys, *flags):
    """The rows that count.py prints, as lists of words."""
    count.main(list(flags))
    header, *rows = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{2,}", header) == list(count.HEADER)
    return [re.split(r"\s{2,}", row) for row in rows]


def test_the_papers_numbers(capsys):
    rows = printed(capsys, "--model", "DiT-XL/2", "--block", *BLOCKS)
    assert [row[1] for row in rows] == list(BLOCKS)
    for row in rows:
        assert int(row[2].replace(",", "")) / 1e6 == pytest.approx(PAPER[row[1]][0], rel=5e-3)
        assert float(row[3]) == pytest.approx(PAPER[row[1]][1], rel=5e-3)
        assert float(row[4]) == pytest.approx(6 * float(row[3]) / 1000, abs=1e-4)
    assert rows[0][2:5] == ["675,129,632", "118.621", "0.7117"] and rows[0][5:7] == [
        "2.52 GiB",
        "12.58 GiB",
    ]


def test_other_sizes_of_images(capsys):
    (row,) = printed(capsys, "--model", "DiT-XL/2", "--image-size", "512")
    assert row[2] == "676,014,368" and float(row[3]) == pytest.approx(524.5, rel=1e-3)
    (row,) = printed(
        capsys, "--model", "DiT-Ti/4", "--vae", "none", "--image-size", "32", "--num-classes", "0"
    )
    with torch.device("meta"):
        network = DiT_models["DiT-Ti/4"](input_size=32, in_channels=3, num_classes=0)
    assert row[2] == f"{sum(p.numel() for p in network.parameters()):,}"


def test_other_parts_cost_what_arithmetic_says(capsys):
    """At XL/2 a SwiGLU has 3·D·3072 weights and as many multiply-adds, as the MLP has 2·D·4608."""
    d, depth, tokens, hidden = 1152, 28, 256, 3072
    flags = ["--model", "DiT-XL/2", "--num-classes", "1000"]
    (plain,), (other,) = printed(capsys, *flags), printed(
        capsys, *flags, "--positions", "rope", "--norm", "rms", "--mlp", "swiglu", "--qk-norm"
    )
    count_of = [int(row[2].replace(",", "")) for row in (plain, other)]
    biases = depth * (2 * hidden - 4 * d)
    norms = (2 * depth + 1) * d + depth * 2 * d // 16
    assert count_of[1] - count_of[0] == biases + norms - tokens * d
    assert other[3] == plain[3]
    (both,) = printed(capsys, *flags, "--positions", "table+rope")
    assert both[2:4] == plain[2:4]


def test_one_row_for_each_model_and_block(capsys):
    rows = printed(capsys, "--model", "DiT-Ti/8", "DiT-Ti/4", "--block", "adaln", "in_context")
    assert [row[:2] for row in rows] == [
        ["DiT-Ti/8", "adaln"], ["DiT-Ti/8", "in_context"], ["DiT-Ti/4", "adaln"],
        ["DiT-Ti/4", "in_context"],
    ]  # fmt: skip
    assert len({tuple(row[2:]) for row in rows}) == 4


@pytest.mark.parametrize("grad_checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_what_is_kept_is_what_a_real_network_keeps(block, bf16, grad_checkpointing):
    config = SMALL | {"block": block}
    network = fill_randomly(DiT(**config)).train()
    network.grad_checkpointing = grad_checkpointing
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    sizes = []
    for n in (2, 5):
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                network(torch.randn(n, 4, 16, 16), torch.arange(n), torch.arange(n))
        sizes.append(sum(size for size, _ in kept.values()))
    fixed, per_image = training_cost.kept(config, bf16, grad_checkpointing)
    assert per_image == (sizes[1] - sizes[0]) / 3 > 0 and fixed == sizes[0] - 2 * per_image
    cost = training_cost.count(config, bf16, grad_checkpointing)
    assert cost.training == training_cost.TRAINING_BYTES * cost.parameters + fixed
    assert cost.per_image > per_image if grad_checkpointing else cost.per_image == per_image


@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointing_is_given_one_block_more(bf16):
    """Against the most that tensors take at any time of a real backward pass, by what the allocator
    hands out.
    """
    config = dict(input_size=32, patch_size=2, hidden_size=64, depth=8, num_heads=4, num_classes=10)
    network = fill_randomly(DiT(**config)).train()
    network.grad_checkpointing = True
    peaks = []
    for n in (8, 24):
        x, t, y = torch.randn(n, 4, 32, 32), torch.arange(n), torch.arange(n) % 10
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = network(x, t, y)
            out.float().square().mean().backward()
        network.zero_grad()
        events = [
            event
            for event in profiler.profiler.kineto_results.events()
            if event.name() == "[memory]"
        ]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        peaks.append(max(accumulate(changes)))
    assert training_cost.count(config, bf16, True).per_image == pytest.approx(
        (peaks[1] - peaks[0]) / 16, rel=0.15
    )


def test_training_state_is_20_bytes_per_parameter():
    state = new_state(DiT(**SMALL), Recipe())
    latents, labels = torch.randn(2, 4, 16, 16), torch.tensor([1, 2])
    taken = []
    state.opt.register_step_pre_hook(
        lambda *_: taken.extend(p.grad for p in state.network.parameters() if p.grad is not None)
    )
    train_step(
        state, latents, labels, draw(0, 0, 2, (4, 16, 16), 0.1, state.process, "cpu")
    )
    tensors = [*state.network.parameters(), *state.ema.parameters(), *taken]
    tensors += [v for moments in state.opt.state.values() for v in moments.values() if v.dim()]
    cost = training_cost.count(SMALL)
    frozen = 12 * state.network.pos_embed.numel()  # the table has neither gradient nor moments
    assert cost.weights == sum(p.numel() * 4 for p in state.network.parameters())
    assert cost.training - frozen == sum(t.numel() * t.element_size() for t in tensors)


def test_checkpointing_keeps_less_and_bf16_about_half(capsys):
    plain, checkpointed, half = (
        training_cost.count(SMALL, *flags).per_image for flags in ((), (False, True), (True,))
    )
    assert checkpointed < plain / 2 and 0.4 < half / plain < 0.8


@pytest.mark.parametrize("flags, message", [
    (["--image-size", "100"], "image size 100 is not a multiple of"),
    (["--model", "DiT-S/2", "DiT-XXL/2"], "invalid choice: 'DiT-XXL/2'"),
    (["--block", "adaln-zero"], "invalid choice: 'adaln-zero'"),
    (["--vae", "no/such/folder"], "no/such/folder"),
    (["--num-classes", "-1"], "num_classes is -1"),
    (["--ckpt", "dit.safetensors", "--image-size", "64"], "leave out --image-size, or --ckpt"),
])  # fmt: skip
def test_mistakes_get_one_message(capsys, flags, message, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stopped:
        count.main(flags)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and message in captured.err and captured.out == ""


@each_start
def test_as_a_script(start):
    flags = ["--model", "DiT-Ti/1", "--vae", "examples/digits/vae", "--image-size", "32"]
    done = start("count.py", *flags)
    assert done.returncode == 0 and "DiT-Ti/1" in done.stdout.splitlines()[1], done.stderr


def test_networks_that_read_captions(capsys):
    """Beside a DiT, which has none of their flags. The sizes of released ones are counted in
    test_text_networks.py.
    """
    flags = ["--vae", "none", "--image-size", "16", "--num-classes", "3"]
    outside = ["--text-width", "12", "--pooled-width", "6", "--text-length", "40"]
    names = ["MMDiT-Ti/2", "PixArt-Ti/2", "DiT-Ti/8"]
    rows = printed(capsys, "--model", *names, *flags, *outside)
    assert [row[0].split()[0] for row in rows] == names and rows[2][1] == "adaln_zero"
    sizes = dict(input_size=16, in_channels=3)
    options = [dict(text_width=12, pooled_width=6), dict(text_width=12), dict(num_classes=3)]
    with torch.device("meta"):
        networks = [MODELS[name](**sizes, **more) for name, more in zip(names, options)]
    for row, network in zip(rows, networks, strict=True):
        assert f"{sum(p.numel() for p in network.parameters()):,}" in row
    own = printed(capsys, "--model", "MMDiT-Ti/2", *flags)[0]
    assert float(own[-5].split()[0]) > 0 and own[-6] != rows[0][-6]


@pytest.mark.parametrize(("flags", "says"), [
    (["DiT-Ti/4", "--text-width", "8"], "--text-width is 8, and DiT-Ti/4 has no such part"),
    (["PixArt-Ti/2", "--norm", "rms"], "--norm is rms, and PixArt-Ti/2 has no such part"),
    (["MMDiT-Ti/2", "--text-width", "8"], "pooled_width None, but MMDiT takes a vector"),
    (["MMDiT-Ti/2", "--text-length", "0"], "text_length is 0"),
])  # fmt: skip
def test_what_a_network_has_not_is_named(capsys, flags, says):
    with pytest.raises(SystemExit):
        count.main(["--vae", "none", "--image-size", "16", "--model", *flags])
    assert says in capsys.readouterr().err


# ---- clips ----


@pytest.mark.parametrize(
    ("attention", "growth"),
    [
        # Blocks over space cost as much for each frame; of those along the frames, S² for each of
        # the T places
        ("latte", lambda depth, tokens: depth // 2 * tokens),
        ("alternate", lambda depth, tokens: depth // 2 * tokens),
        ("full", lambda depth, tokens: depth * tokens**2),
    ],
)
def test_operations_grow_with_frames_as_arithmetic_says(attention, growth):
    """The second difference over frames is what attention grows by: each token with each other one
    is 2·D multiply-adds, forward.
    """
    network = VideoDiT(**{**SMALL, "depth": 4}, attention=attention)
    few, more, many = (
        training_cost.training_flops(network.config | {"frames": frames}) for frames in (2, 4, 6)
    )
    tokens = 64  # of 16 / 2 a side
    second = (many - 2 * more + few) / 2  # of the count's square term, times the step squared
    assert second == 6 * growth(4, tokens) * 2 * 64 * 2**2
    assert few > 0 and more > 1.9 * few


def test_clips_are_counted_by_the_door(capsys):
    flags = ["--image-size", "128", "--model", "Latte-Ti/2"]
    rows = [printed(capsys, *flags, "--frames", str(frames))[0] for frames in (2, 4)]
    assert [row[0] for row in rows] == ["Latte-Ti/2 VideoDiT"] * 2
    few, more = ([float(words.split()[0]) for words in row[2:]] for row in rows)
    assert more[-1] == pytest.approx(2 * few[-1], rel=0.05)  # of each clip
    assert more[0] == pytest.approx(2 * few[0], rel=0.05)
    (_, config), = count.described(count.build_parser().parse_args(flags))
    assert create_network(MODELS["Latte-Ti/2"].keywords | config).frames == 16


def test_memory_of_a_clip_is_what_its_frames_keep():
    """Without attention over all, a clip of F frames keeps about F times what one frame does."""
    config = VideoDiT(**SMALL, attention="latte").config
    one, four = (training_cost.kept(config | {"frames": f}, False, False)[1] for f in (2, 8))
    assert four == pytest.approx(4 * one, rel=0.02)


@pytest.mark.parametrize(("flags", "message"), [
    (["--model", "DiT-Ti/2", "--frames", "8"], "--frames is 8, and DiT-Ti/2 has no such part"),
    (["--model", "SpaceTime-Ti/2x2", "--frames", "7"], "frames 7 is not a multiple of patch_frame"),
    (["--model", "Latte-Ti/2", "--frames", "0"], "frames is 0; it must be at least 1"),
])  # fmt: skip
def test_wrong_numbers_of_frames_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit):
        count.main(flags)
    assert message in capsys.readouterr().err
