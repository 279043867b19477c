"""The block designs: sizes of the paper's table, networks written once more from torch's own
attention, ways to use them.
"""

import json
import math

import pytest
import torch
from torch import nn

from conftest import ROOT, SMALL, fill_randomly, randn, small_dit
from models import BLOCKS, DiT, DiT_models
import sample
import sample_ddp
from test_models import inputs, parameters_and_macs
from test_runs import rows
from starts import forked, fresh
from test_train import QUICK, fresh_accelerator, images, run, same  # noqa: F401
import train

IDENTITIES = {"adaln_zero", "adaln_single"}  # at the start
every_block = pytest.mark.parametrize("block", BLOCKS)

# The paper's figure 5 and section 5 at XL/2: millions of parameters, billions of multiply-adds. The
# last is arithmetic.
PAPER = {
    "in_context": (449, 119.4), "cross_attention": (598, 137.6), "adaln": (600, 118.6),
    "adaln_zero": (675, 118.6), "adaln_single": (460, 118.4),
}  # fmt: skip


# ---- sizes and names ----


@every_block
def test_size_at_xl_2(block):
    count, macs = parameters_and_macs(DiT_models["DiT-XL/2"], block=block)
    assert count / 1e6 == pytest.approx(PAPER[block][0], rel=5e-3)
    assert macs == pytest.approx(PAPER[block][1], rel=5e-3)


def test_adaln_single_saves_what_arithmetic_says():
    zero, single = (
        parameters_and_macs(DiT_models["DiT-XL/2"], block=b)[0]
        for b in ("adaln_zero", "adaln_single")
    )
    d, depth = 1152, 28
    assert zero - single == depth * (6 * d * d + 6 * d) - (6 * d * d + 6 * d) - depth * 6 * d
    assert 1 - single / zero == pytest.approx(0.318, abs=1e-3)


def test_an_adaln_final_layer_would_miss_the_table():
    """Why in_context and cross_attention end in LayerNorm + Linear: 2·D² + 2·D more would be 452
    and 601 million.
    """
    for block, wrong in (("in_context", 452), ("cross_attention", 601)):
        count, _ = parameters_and_macs(DiT_models["DiT-XL/2"], block=block)
        assert round((count + 2 * 1152 * 1152) / 1e6) == wrong


OF_EVERY_BLOCK = {
    "attn.qkv.weight": (96, 32), "attn.qkv.bias": (96,), "attn.proj.weight": (32, 32),
    "attn.proj.bias": (32,), "mlp.fc1.weight": (128, 32), "mlp.fc1.bias": (128,),
    "mlp.fc2.weight": (32, 128), "mlp.fc2.bias": (32,),
}  # fmt: skip
NORMS = {f"{norm}.{part}": (32,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
OWN = {
    "adaln_zero": {"adaLN_modulation.1.weight": (192, 32), "adaLN_modulation.1.bias": (192,)},
    "adaln": {"adaLN_modulation.1.weight": (128, 32), "adaLN_modulation.1.bias": (128,)},
    "adaln_single": {"scale_shift_table": (6, 32)},
    "in_context": NORMS,
    "cross_attention": NORMS | {
        "norm_cross.weight": (32,), "norm_cross.bias": (32,),
        "cross_attn.q.weight": (32, 32), "cross_attn.q.bias": (32,),
        "cross_attn.kv.weight": (64, 32), "cross_attn.kv.bias": (64,),
        "cross_attn.proj.weight": (32, 32), "cross_attn.proj.bias": (32,),
    },
}  # fmt: skip
ADALN_END = {"adaLN_modulation.1.weight": (64, 32), "adaLN_modulation.1.bias": (64,)}
VIT_END = {"norm_final.weight": (32,), "norm_final.bias": (32,)}


@every_block
def test_state_dict_keys_and_shapes(block):
    found = {
        name: tuple(value.shape) for name, value in small_dit(block=block).state_dict().items()
    }
    for i in range(SMALL["depth"]):
        part = {
            name.split(".", 2)[2]: found.pop(name)
            for name in list(found)
            if name.startswith(f"blocks.{i}.")
        }
        assert part == OF_EVERY_BLOCK | OWN[block]
    end = {
        name.split(".", 1)[1]: found.pop(name)
        for name in list(found)
        if name.startswith("final_layer.")
    }
    vit = block in ("in_context", "cross_attention")
    assert end == {"linear.weight": (32, 32), "linear.bias": (32,)} | (
        VIT_END if vit else ADALN_END
    )
    shared = {name: found.pop(name) for name in list(found) if name.startswith("shared_modulation")}
    assert shared == (
        {"shared_modulation.1.weight": (192, 32), "shared_modulation.1.bias": (192,)}
        if block == "adaln_single"
        else {}
    )
    assert {name.split(".")[0] for name in found} == {
        "pos_embed", "x_embedder", "t_embedder", "y_embedder",
    }  # fmt: skip


@pytest.mark.parametrize("wrong", ["adaln-zero", "", None, ["adaln"]])
def test_an_unknown_block_is_refused(wrong):
    with pytest.raises(
        (ValueError, TypeError), match="block is .*choose one of adaln_zero|unhashable"
    ):
        DiT(**SMALL, block=wrong)


# ---- the same networks from torch's own parts ----


class PlainReference(nn.Module):
    """A ViT with conditions, in_context or cross_attention, from torch's MultiheadAttention; batch
    first, float64.
    """

    def __init__(self, ours):
        super().__init__()
        d, heads, depth = (ours.config[key] for key in ("hidden_size", "num_heads", "depth"))
        # Not a submodule: embedders are taken from it, they have tests of their own
        self.ours = [ours]
        self.width = d
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(d, heads, batch_first=True) for _ in range(depth)
        )
        self.cross = nn.ModuleList(
            nn.MultiheadAttention(d, heads, batch_first=True) for _ in range(depth)
        )
        weights = ours.state_dict()
        for i in range(depth):
            self.fill(self.attention[i], weights, f"blocks.{i}.attn", ["qkv"])
            if f"blocks.{i}.cross_attn.q.weight" in weights:
                self.fill(self.cross[i], weights, f"blocks.{i}.cross_attn", ["q", "kv"])
        self.double().eval()

    def fill(self, attention, weights, name, parts):
        projection, bias = (
            torch.cat([weights[f"{name}.{part}.{kind}"] for part in parts])
            for kind in ("weight", "bias")
        )
        attention.load_state_dict(
            {"in_proj_weight": projection, "in_proj_bias": bias,
             "out_proj.weight": weights[f"{name}.proj.weight"],
             "out_proj.bias": weights[f"{name}.proj.bias"]}
        )  # fmt: skip

    def norm(self, x, name):
        weights = self.ours[0].state_dict()
        return nn.functional.layer_norm(
            x, (self.width,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6
        )

    def mlp(self, x, name):
        weights = self.ours[0].state_dict()
        hidden = nn.functional.linear(x, weights[f"{name}.fc1.weight"], weights[f"{name}.fc1.bias"])
        hidden = (
            hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        )
        return nn.functional.linear(
            hidden, weights[f"{name}.fc2.weight"], weights[f"{name}.fc2.bias"]
        )

    def forward(self, x, t, y):
        ours = self.ours[0]
        tokens = ours.x_embedder(x) + ours.pos_embed
        conditions = torch.stack([ours.t_embedder(t), ours.y_embedder.embedding_table(y)], dim=1)
        count = tokens.shape[1]
        in_context = ours.config["block"] == "in_context"
        if in_context:
            tokens = torch.cat([tokens, conditions], dim=1)
        for i, attention in enumerate(self.attention):
            normed = self.norm(tokens, f"blocks.{i}.norm1")
            tokens = tokens + attention(normed, normed, normed)[0]
            if not in_context:
                normed = self.norm(tokens, f"blocks.{i}.norm_cross")
                tokens = tokens + self.cross[i](normed, conditions, conditions)[0]
            tokens = tokens + self.mlp(self.norm(tokens, f"blocks.{i}.norm2"), f"blocks.{i}.mlp")
        weights = ours.state_dict()
        last = self.norm(tokens[:, :count], "final_layer.norm_final")
        return ours.unpatchify(
            nn.functional.linear(
                last, weights["final_layer.linear.weight"], weights["final_layer.linear.bias"]
            )
        )


@pytest.mark.parametrize("std", [0.05, 0.5])
@pytest.mark.parametrize("block", ["in_context", "cross_attention"])
def test_outputs_are_those_of_torchs_own_attention(block, std):
    model = fill_randomly(DiT(**SMALL, block=block), std=std).double().eval()
    with torch.no_grad():
        out, expected = model(*inputs()), PlainReference(model)(*inputs())
    assert out.abs().max() > 1e-4
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block", ["adaln", "adaln_single"])
def test_outputs_of_the_adaln_designs(block):
    """Against the formulas written out, shift and scale first for the attention and then for the
    MLP.
    """
    model = fill_randomly(DiT(**SMALL, block=block), std=0.3).double().eval()
    x, t, y = inputs()
    with torch.no_grad():
        c = model.t_embedder(t) + model.y_embedder.embedding_table(y)
        tokens, norm = (
            model.x_embedder(x) + model.pos_embed,
            lambda z: nn.functional.layer_norm(z, (32,), eps=1e-6),
        )
        for part in model.blocks:
            if block == "adaln":
                regress = part.adaLN_modulation[1]
                vectors = (nn.functional.silu(c) @ regress.weight.T + regress.bias).view(
                    3, 4, 1, 32
                )
                shift1, scale1, shift2, scale2 = vectors.unbind(1)
                gate1 = gate2 = 1
            else:
                regress = model.shared_modulation[1]
                vectors = (nn.functional.silu(c) @ regress.weight.T + regress.bias).view(
                    3, 6, 1, 32
                )
                shift1, scale1, gate1, shift2, scale2, gate2 = (
                    vectors + part.scale_shift_table[:, None]
                ).unbind(1)
            tokens = tokens + gate1 * part.attn(norm(tokens) * (1 + scale1) + shift1)
            tokens = tokens + gate2 * part.mlp(norm(tokens) * (1 + scale2) + shift2)
        expected = model.unpatchify(model.final_layer(tokens, c))
        torch.testing.assert_close(model(x, t, y), expected, rtol=0, atol=1e-10)


# ---- initialisation ----


@every_block
def test_at_the_start_the_output_is_zero_and_adaln_regresses_nothing(block):
    torch.manual_seed(0)
    model = DiT(**SMALL, block=block)
    assert not model(*inputs(dtype=torch.float32)).any()
    fill_randomly(model)
    model.initialize_weights()
    for name, parameter in model.named_parameters():
        if "modulation" in name or "scale_shift_table" in name or name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif "final_layer" not in name:
            assert parameter.std() > 0.01, name


@every_block
def test_which_blocks_start_as_the_identity(block):
    torch.manual_seed(0)
    model = DiT(**SMALL, block=block)
    x, (first, *_) = randn(3, 16, 32, dtype=torch.float32), model.blocks
    embeddings = [randn(3, 32, seed=i, dtype=torch.float32) for i in (1, 2)]
    tokens, c = model.design.condition(x, embeddings)
    out = first(tokens, model.shared_modulation(c))
    assert out.shape == tokens.shape
    if block in IDENTITIES:
        assert torch.equal(out, tokens)
    else:
        assert (out - tokens).abs().amax(dim=(1, 2)).min() > 0.1
    if block == "adaln":  # then a ViT block, whatever the condition
        assert torch.equal(out, first(tokens, 5 * c))


# ---- in use ----


@every_block
def test_gradients_reach_every_parameter(block):
    model = small_dit(block=block)
    (model(*inputs()) * randn(3, 8, 8, 8, seed=5)).sum().backward()
    for name, parameter in model.named_parameters():
        if name == "pos_embed":
            assert parameter.grad is None
        else:
            assert parameter.grad.abs().max() > 1e-9, name


@every_block
def test_steps_labels_and_samples_each_matter(block):
    model, (x, t, y) = small_dit(block=block), inputs()
    with torch.no_grad():
        out = model(x, t, y)
        for other in (model(x + 0.1, t, y), model(x, t + 100, y), model(x, t, (y + 1) % 10)):
            assert (other - out).abs().amax(dim=(1, 2, 3)).min() > 1e-7
        alone = model(x[1:2], t[1:2], y[1:2])
    torch.testing.assert_close(alone[0], out[1], rtol=0, atol=1e-12)


@every_block
def test_guidance_and_label_dropout(block):
    model, (x, t, y) = small_dit(block=block, class_dropout_prob=1.0), inputs()
    null = torch.full_like(y, model.null_label)
    with torch.no_grad():
        kept, dropped = model(x, t, y), model(x, t, null)
        guided = model.forward_with_cfg(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]), 2.5
        )
        torch.testing.assert_close(
            guided[:3, :3], (dropped + 2.5 * (kept - dropped))[:, :3], rtol=0, atol=1e-12
        )
        assert torch.equal(model.train()(x, t, y), dropped)
        assert torch.equal(model(x, t, y, force_drop_ids=torch.zeros_like(y)), kept)


@every_block
def test_without_classes(block):
    model, (x, t, _) = small_dit(block=block, num_classes=0), inputs()
    with torch.no_grad():
        assert (
            model(x, t).shape == (3, 8, 8, 8)
            and (model(x, t) - model(x, t + 99)).abs().max() > 1e-7
        )


@every_block
def test_bf16(block):
    model = fill_randomly(DiT(**SMALL, block=block), std=0.2).eval()
    x, t, y = inputs(dtype=torch.float32)
    with torch.no_grad():
        exact = model(x, t, y)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x, t, y)
        whole = model.bfloat16()(x.bfloat16(), t, y)
    assert mixed.dtype == whole.dtype == torch.bfloat16
    for out in (mixed, whole):
        assert 0 < (out.float() - exact).norm() / exact.norm() < 0.05


@every_block
def test_compiles_as_one_graph(block):
    model, (x, t, y) = small_dit(block=block), inputs(n=2)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, t, y), model(x, t, y), rtol=0, atol=1e-12)


@pytest.mark.long
@every_block
def test_compiles_with_the_default_backend_and_trains(block):
    """Forward and backward, as one graph each."""
    model, (x, t, y) = small_dit(block=block).train(), inputs(n=2)
    compiled, keep = torch.compile(model, fullgraph=True), torch.zeros(2)
    gradients = []
    for network in (model, compiled):
        out = network(x, t, y, force_drop_ids=keep)
        out.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    # Waves of the timestep are float32 here too: of an angle of 300, 1e-5 is rounding
    for a, b in zip(*gradients):
        assert (a - b).norm() < 1e-4 * a.norm()


@every_block
def test_built_without_memory_from_its_configuration(block):
    model = small_dit(block=block)
    with torch.device("meta"):
        again = DiT(**model.config).double().eval()
    assert all(p.is_meta for p in again.parameters()) and again.config["block"] == block
    again.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(again(*inputs()), model(*inputs()))


def test_the_default_is_adaln_zero_and_older_configurations_mean_it():
    config = {key: value for key, value in small_dit().config.items() if key != "block"}
    assert DiT(**config).config["block"] == "adaln_zero" == DiT(**SMALL).config["block"]


# ---- through the doors ----


@every_block
def test_trained_saved_resumed_and_sampled_without_a_flag(block, images, tmp_path, monkeypatch):
    whole = run(images, tmp_path / "whole", "--block", block, "--max-steps", "4")
    run(images, tmp_path / "parts", "--block", block, "--max-steps", "2")
    parts = run(
        images, tmp_path / "parts", "--block", block, "--max-steps", "4", "--resume", "auto"
    )
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["000-DiT-Ti-8"]
    assert whole["config"]["block"] == whole["args"]["block"] == block
    assert same(whole["model"], parts["model"]) and same(whole["ema"], parts["ema"])
    seen = []
    monkeypatch.setattr(
        DiT, "forward_with_cfg",
        lambda self, *a, _f=DiT.forward_with_cfg, **k: seen.append(self) or _f(self, *a, **k),
    )  # fmt: skip
    sample.main(
        ["--ckpt", str(tmp_path / "whole" / "000-DiT-Ti-8"), "--vae", "none",
         "--class-labels", "0", "2", "--device", "cpu", "--num-sampling-steps", "2",
         "--output", str(tmp_path / "x.png")]
    )  # fmt: skip
    assert seen[0].config["block"] == block and same(seen[0].state_dict(), whole["ema"])
    assert (tmp_path / "x.png").stat().st_size > 100


@pytest.mark.parametrize("start, more", [
    (forked, []), pytest.param(fresh, ["--fsdp", "--grad-checkpointing"], marks=pytest.mark.long),
])  # fmt: skip
def test_two_processes_learn_what_one_does(start, more, images, tmp_path):
    """Every design, in one launch."""
    script = tmp_path / "every_block.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from accelerate import Accelerator\n"
        "import torch\n"
        "import train\n"
        # Processes that have found one another stay together
        "Accelerator.end_training = lambda self: None\n"
        "for block in sys.argv[1].split(','):\n"
        "    train.main([*sys.argv[3:], '--block', block, '--results-dir', "
        "f'{sys.argv[2]}/{block}'])\n"
        "torch.distributed.destroy_process_group()\n"
    )
    flags = ["--data-path", str(images), *QUICK, "--max-steps", "3", "--log-every", "1"]
    done = start(script, ",".join(BLOCKS), tmp_path, *flags, *more, processes=2)
    assert done.returncode == 0, done.stderr
    for block in BLOCKS:
        run(images, tmp_path / "alone", "--block", block, "--max-steps", "3", "--log-every", "1")
        alone, together = (
            rows(sorted(f.iterdir())[-1]) for f in (tmp_path / "alone", tmp_path / block)
        )
        assert [row["step"] for row in together] == [1, 2, 3]
        for a, b in zip(alone, together):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-3) and b[
                "gradient_norm"
            ] == pytest.approx(a["gradient_norm"], rel=1e-2)


def test_another_block_is_another_run(images, tmp_path, capsys):
    run(images, tmp_path, "--max-steps", "2")
    run(images, tmp_path, "--max-steps", "2", "--block", "adaln", "--resume", "auto")
    assert len(list(tmp_path.iterdir())) == 2 and "DiT-Ti/8, adaln: " in capsys.readouterr().out


def test_a_run_from_before_there_were_designs_goes_on(images, tmp_path):
    contents = run(images, tmp_path, "--max-steps", "2")
    record = tmp_path / "000-DiT-Ti-8" / "run.json"
    text = record.read_text()
    assert '"block": "adaln_zero"' in text
    record.write_text(text.replace(',\n  "block": "adaln_zero"', ""))
    assert "block" not in record.read_text()
    contents = run(images, tmp_path, "--max-steps", "3", "--resume", "auto")
    assert contents["step"] == 3 and len(list(tmp_path.iterdir())) == 1


def test_weights_of_another_design_are_refused_with_its_name(images, tmp_path, capsys):
    run(images, tmp_path / "old", "--max-steps", "1", "--block", "in_context")
    folder = tmp_path / "old" / "000-DiT-Ti-8"
    for flag in ("--init-from", "--resume"):
        with pytest.raises(SystemExit):
            train.main(
                [
                    "--data-path",
                    str(images),
                    *QUICK,
                    "--max-steps",
                    "2",
                    flag,
                    str(folder),
                    "--results-dir",
                    str(tmp_path / "new"),
                ]
            )
        message = capsys.readouterr().err
        assert (
            f"{flag} {folder}" in message
            and "design in_context, the network here adaln_zero; pass --block in_context" in message
        )
    assert not (tmp_path / "new").exists()


@every_block
def test_the_design_of_bare_weights_is_seen(block, tmp_path, monkeypatch):
    network = fill_randomly(
        DiT_models["DiT-Ti/8"](input_size=16, in_channels=3, num_classes=3, block=block)
    )
    torch.save(network.state_dict(), tmp_path / "bare.pt")
    seen = []
    monkeypatch.setattr(
        DiT, "forward_with_cfg",
        lambda self, *a, _f=DiT.forward_with_cfg, **k: seen.append(self) or _f(self, *a, **k),
    )  # fmt: skip
    sample.main(
        ["--ckpt", str(tmp_path / "bare.pt"), "--model", "DiT-Ti/8", "--image-size", "16",
         "--num-classes", "3", "--vae", "none", "--class-labels", "1", "2", "--device", "cpu",
         "--num-sampling-steps", "1", "--output", str(tmp_path / "x.png")]
    )  # fmt: skip
    assert seen[0].config == network.config and same(seen[0].state_dict(), network.state_dict())


def test_folders_of_samples_keep_their_names(images, tmp_path):
    """The default design is not in what names a folder: those from before there were others are
    gone on with.
    """
    for block in ("adaln_zero", "adaln"):
        run(images, tmp_path / block, "--max-steps", "1", "--block", block)
        sample_ddp.main(
            ["--ckpt", str(tmp_path / block / "000-DiT-Ti-8"), "--vae", "none", "--device", "cpu",
             "--num-sampling-steps", "1", "--num-fid-samples", "2", "--per-proc-batch-size", "2",
             "--cfg-scale", "1", "--sample-dir", str(tmp_path / f"{block}-samples")]
        )  # fmt: skip
        (manifest,) = (tmp_path / f"{block}-samples").glob("*/manifest.json")
        network = json.loads(manifest.read_text())["decides"]["network"]
        assert (
            network.get("block") == {"adaln_zero": None, "adaln": "adaln"}[block]
            and network["depth"] == 6
        )


def test_an_unknown_block_is_an_error_of_the_door(images, capsys):
    with pytest.raises(SystemExit):
        train.main(["--data-path", str(images), *QUICK, "--block", "adaln-zero"])
    assert "argument --block: invalid choice: 'adaln-zero'" in capsys.readouterr().err
