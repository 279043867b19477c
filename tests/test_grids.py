"""examples/grids.py: the ends of a way are the classes, a column is what the Sampler draws at its
scale, and user errors.
"""

import json
import sys

import numpy as np
from PIL import Image
import pytest
import torch

from checkpoints.weights import Weights, save_weights
from conftest import ROOT, fill_randomly
from models import DiT
from sampling.flags import sampling_options

sys.path.insert(0, str(ROOT / "examples"))
import grids

CONFIG = dict(
    input_size=8, patch_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=4
)
NAMES = ["zero", "one", "two", "three"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """The flags for a network of random weights on pixels, whose images depend on the class."""
    path = tmp_path_factory.mktemp("ckpt") / "dit.safetensors"
    save_weights(path, Weights(fill_randomly(DiT(**CONFIG), std=0.5).state_dict(), CONFIG, NAMES))
    return ["--ckpt", str(path), "--vae", "none", "--device", "cpu", "--steps", "3"]


def parsed(*flags):
    parser = grids.build_parser()
    return grids.filled(parser.parse_args(flags)), parser.given(flags)


def sampler_images(args, given, labels, indices, **others):
    """What the Sampler itself draws."""
    sampler = grids.sampler_of(args, given, sampling_options(args, given, **others), CPU)
    return grids.draw(sampler, args.seed, indices, torch.tensor(labels))


@pytest.mark.parametrize(
    "solver", [["dpm++"], ["ddim", "--eta", "1"]], ids=["without draws", "with draws"]
)
def test_ends_of_a_way_are_the_classes_and_the_middle_is_neither(network, solver):
    asked = parsed("interpolate", *network, "--sampler", *solver, "--steps", "3",
                   "--class-labels", "1", "three", "0", "0", "--steps-between", "3",
                   "--seed", "5")  # fmt: skip
    images, texts, _ = grids.interpolation(*asked, CPU)
    assert images.shape == (2, 5, 8, 8, 3)
    assert texts == [
        ["one", "0.25", "0.5", "0.75", "three"],
        ["zero", "0.25", "0.5", "0.75", "zero"],
    ]
    of_one, of_three = (sampler_images(*asked, [label] * 5, [0] * 5)[0] for label in (1, 3))
    assert np.array_equal(images[0, 0], of_one) and np.array_equal(images[0, -1], of_three)
    assert len({image.tobytes() for image in images[0]}) == 5
    of_zero = sampler_images(*asked, [0] * 5, [1] * 5)
    # Same class, same noise
    assert np.array_equal(images[1], of_zero) and (of_zero == of_zero[0]).all()


def test_classes_between_have_embeddings_on_the_line_and_the_rest_is_the_networks():
    network = fill_randomly(DiT(**CONFIG))
    new = grids.between(network, [(0, 2), (3, 1)], [0.0, 0.25, 1.0])
    table, mixed = network.y_embedder.embedding_table.weight, new.y_embedder.embedding_table.weight
    expected = [
        table[0], 0.75 * table[0] + 0.25 * table[2], table[2], table[3],
        0.75 * table[3] + 0.25 * table[1], table[1],
    ]  # fmt: skip
    assert (
        torch.allclose(mixed, torch.stack([*expected, table[4]]))
        and new.null_label == 6
        and not new.training
    )
    others = {
        name: tensor for name, tensor in network.state_dict().items() if "y_embedder" not in name
    }
    assert all(torch.equal(new.state_dict()[name], tensor) for name, tensor in others.items())
    # untouched
    assert (
        torch.equal(table[4], network.y_embedder.embedding_table.weight[4])
        and network.null_label == 4
    )


def test_columns_of_guidance_are_the_samplers_own_pictures(network):
    asked = parsed(
        "guidance", *network, "--class-labels", "two", "0", "--cfg-scale", "1", "4",
        "--cfg-interval", "0.2", "1",
    )  # fmt: skip
    images, texts, _ = grids.guidance_sweep(*asked, CPU)
    assert images.shape == (2, 2, 8, 8, 3) and texts[1] == ["scale 1: zero", "scale 4: zero"]
    for column, options in enumerate(
        [dict(cfg_scale=1.0, cfg_interval=[0.0, 1.0]), dict(cfg_scale=4.0, cfg_interval=[0.2, 1.0])]
    ):
        assert np.array_equal(
            images[:, column], sampler_images(*asked, [2, 0], range(2), **options)
        )
    assert not np.array_equal(images[:, 0], images[:, 1])


@pytest.mark.parametrize("kind, size", [("interpolate", (3, 4)), ("guidance", (2, 4))])
def test_digits_are_drawn_without_further_flags(tmp_path, capsys, monkeypatch, kind, size):
    monkeypatch.chdir(tmp_path)
    few = ["--steps-between", "1"] if kind == "interpolate" else ["--cfg-scale", "1", "3"]
    grids.main([kind, "--device", "cpu", "--steps", "2", *few])
    canvas = Image.open(tmp_path / f"{kind}.png")
    columns, rows = size
    assert canvas.size == (columns * 100 + 4, rows * 116 + 4)
    assert json.loads(canvas.info["settings"])["sampler"] == "dpm++"
    assert capsys.readouterr().out == f"wrote {kind}.png: {rows} rows of {columns} images\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["interpolate", "--class-labels", "1", "2", "3"], "3 given; give two for each row"),
        (
            ["interpolate", "--class-labels", "1", "10"],
            "--class-labels 10: give a number from 0 to 9",
        ),
        (["interpolate", "--steps-between", "-1"], "--steps-between is -1; 0 is the least"),
        (["interpolate", "--cfg-scale", "nan"], "--cfg-scale is nan"),
        (["interpolate", "--ckpt", "other.pt"], "--ckpt and --vae go together"),
        (["guidance", "--vae", "mse"], "--ckpt and --vae go together"),
        (["guidance", "--cfg-scale", "2", "inf"], "--cfg-scale is inf"),
        (["guidance", "--output", "grid.txt"], ".txt is not an image format"),
        (["guidance", "--output", "missing/grid.png"], "cannot write missing/grid.png"),
        (["guidance", "--cfg-scale"], "expected at least one argument"),
        ([], "the following arguments are required"),
    ],
)
def test_mistakes_get_one_message(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        grids.main([*flags, *(["--device", "cpu"] if flags else [])])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_network_without_classes_is_refused(tmp_path, capsys):
    config = {**CONFIG, "num_classes": 0}
    save_weights(tmp_path / "dit.safetensors", Weights(DiT(**config).state_dict(), config, None))
    flags = [
        "--ckpt", str(tmp_path / "dit.safetensors"), "--vae", "none", "--device", "cpu",
        "--cfg-scale", "1",
    ]  # fmt: skip
    for kind in grids.KINDS:
        with pytest.raises(SystemExit):
            grids.main([kind, *flags, "--output", str(tmp_path / "out.png")])
        assert "trained without classes" in capsys.readouterr().err


def test_documented_commands_are_understood():
    text = grids.__doc__ + (ROOT / "docs" / "sampling.md").read_text()
    commands = [
        line.split("#")[0].split()
        for line in text.splitlines()
        if "python examples/grids.py" in line
    ]
    assert len(commands) > 4
    for command in commands:
        grids.build_parser().parse_args(command[2:])
