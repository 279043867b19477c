"""Training a DiT with exits: runs of train.py, and what they refuse."""
import pytest
import torch

from checkpoints.files import newest_checkpoint
from checkpoints.loading import load_pretrained
from checkpoints.networks import ExitDiT
from sampling.loading import load_sampler
from starts import forked
from test_train import fresh_accelerator, images, learns_alike, run, same  # noqa: F401
from training.options import TrainOptions

EXITS = ["--exits", "4:0.3", "2:0.6"]


@pytest.fixture(scope="module")
def begun(images, tmp_path_factory):
    """{process: a checkpoint of a DiT}, each after a step."""
    folder = tmp_path_factory.mktemp("begun")
    for process in ("diffusion", "flow"):
        run(images, folder / process, "--max-steps", "1", "--process", process)
    return {
        process: str(newest_checkpoint(folder / process / "000-DiT-Ti-8"))
        for process in ("diffusion", "flow")
    }


@pytest.mark.parametrize("process, span", [("diffusion", [0, 1000]), ("flow", [1, 0])])
def test_a_run_goes_on_from_a_dit_and_from_itself(images, begun, tmp_path, process, span):
    """Interrupted and resumed, in bf16 and parts of a batch, it ends as it does in one go."""
    flags = [
        *EXITS, "--init-from", begun[process], "--process", process, "--mixed-precision", "bf16",
        "--grad-accum", "2", "--resume", "auto",
    ]  # fmt: skip
    run(images, tmp_path / "parts", *flags, "--max-steps", "2")
    parts = run(images, tmp_path / "parts", *flags, "--max-steps", "4")
    whole = run(images, tmp_path / "whole", *flags, "--max-steps", "4")
    assert same(parts["model"], whole["model"]) and same(parts["ema"], whole["ema"])
    config = whole["config"]
    assert config["exits"] == [[4, 0.3], [2, 0.6]]
    assert [config["t_clean"], config["t_noise"]] == span
    assert whole["args"]["exits"] == ["4:0.3", "2:0.6"]
    folder = tmp_path / "whole" / "000-DiT-Ti-8"
    network, _ = load_pretrained(folder)
    assert isinstance(network, ExitDiT) and network.process["name"] in ("gaussian", "flow")
    layers = [network.final_layer, *network.exit_layers]
    assert not same(*(layer.state_dict() for layer in layers[:2]))  # each has learned its own
    sampler = load_sampler(folder, vae="none", steps=4, device="cpu")
    assert sampler.images([0, 1]).shape == (2, 16, 16, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="draws other noise on a GPU")
def test_two_processes_learn_what_one_does(images, begun, tmp_path):
    """Two samples each, so that there often is none of some depth."""
    flags = [*EXITS, "--init-from", begun["diffusion"], "--lr", "1e-3"]
    learns_alike(images, tmp_path, forked, flags)


@pytest.mark.parametrize("flags, message", [
    ([], "--exits are trained from a whole network's weights; give them with --init-from"),
    (["--exits", "6:0.3"], "from 1 to 5"),
    (["--exits", "2:1.3"], "from 0, clean, to 1"),
    (["--exits", "2:0.3", "4:0.6"], "rising noise levels and falling depths"),
    (["--exits", "2"], "give DEPTH:LEVEL"),
    (["--exits", "２:0.6"], "give DEPTH:LEVEL"),
    (["--exits", "2: 0.6"], "give DEPTH:LEVEL"),
    (["--exits", "2:1"], "noise alone"),
    (["--block", "adaln"], "are for a DiT with blocks of adaln_zero"),
    (["--model", "MMDiT-Ti/1"], "are for a DiT with blocks of adaln_zero"),
    (["--model", "VideoDiT-Ti/4", "--frames", "4"], "are for a DiT with blocks of adaln_zero"),
    (["--pack", "64"], "--exits and --pack do not go together"),
    (["--dynamic", "0.5"], "--exits and --dynamic do not go together"),
    (["--compile"], "--exits and --compile do not go together"),
    (["--fsdp"], "--exits and --fsdp do not go together"),
])  # fmt: skip
def test_what_is_refused(images, tmp_path, capsys, flags, message):
    begin = ["--init-from", "a.pt"] if flags else []
    with pytest.raises(SystemExit) as end:
        run(images, tmp_path / "runs", *EXITS, *begin, *flags)
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_weights_that_do_not_fit(images, begun, tmp_path, capsys):
    run(images, tmp_path / "first", "--max-steps", "1", "--block", "cross_attention")
    other = newest_checkpoint(tmp_path / "first" / "000-DiT-Ti-8")
    with pytest.raises(SystemExit):
        run(images, tmp_path / "runs", *EXITS, "--init-from", str(other))
    assert "cross_attention, and a network with --exits has those" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_exits_are_pairs_in_the_options():
    options = TrainOptions("x", init_from="a", model="DiT-Ti/8", exits=["4:0.3"], process="flow")
    assert options.exits == ("4:0.3",) and options.network_class is ExitDiT
    found = {name: options.network_arguments[name] for name in ("exits", "t_clean", "t_noise")}
    assert found == {"exits": [(4, 0.3)], "t_clean": 1.0, "t_noise": 0.0}


@pytest.mark.parametrize("text", ["4:0.3", "04:.3", "4:0.30", "4:3e-1"])
def test_other_words_for_the_same_exits_are_the_same_run(text):
    options = TrainOptions("x", init_from="a", model="DiT-Ti/8", exits=[text])
    assert options.recorded()["exits"] == ["4:0.3"]
