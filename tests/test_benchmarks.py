"""The benchmarks: that each runs and says where, that sides do the same work, and that documents show the committed numbers."""

import json

import pytest
import torch

from benchmarks import depth, forward, loading, plot_solvers, process, sampling, sides, solvers, training
from benchmarks.anchors import Plain, Twin
from conftest import ROOT, small_dit
from models import DiT


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder for results, and a small product as the machine's limit."""
    monkeypatch.setattr(sides, "RESULTS", tmp_path)
    monkeypatch.setattr(sides, "PRODUCT_SIDES", (16, 32, 64))
    return tmp_path


def test_sides_take_turns_forwards_and_backwards():
    called = []
    seconds = sides.alternate({name: lambda name=name: called.append(name) for name in "abc"}, 3)
    assert "".join(called) == "abccbaabc" and {len(times) for times in seconds.values()} == {3}


def test_ratios_are_of_medians_and_their_spread_of_rounds():
    found = sides.ratios({"a": [1.0, 2.0, 4.0], "b": [3.0, 3.0, 2.0]}, "a")
    assert found == {"a": [1.0, 1.0, 1.0], "b": [1.5, 1.0, 2.25]}
    assert sides.ratios({"a": [2.0], "b": [3.0]}, "a")["b"] == [1.5, 1.5, 1.5]


def test_a_share_of_the_limit_is_a_ratio_of_rates():
    assert sides.share_of_limit([2.0, 4.0, 9.0], 100, ([1.0, 1.0], 50)) == 0.5


def test_a_result_is_never_overwritten(results):
    for i in range(3):
        sides.write("x", {"i": i})
    found = {path.name[11:]: json.loads(path.read_text()) for path in results.iterdir()}
    assert {name: one["i"] for name, one in found.items()} == {"x.json": 0, "x-2.json": 1, "x-3.json": 2}
    assert {"date", "cpu", "threads", "torch", "commit", "command"} <= found["x.json"]["machine"].keys()


@pytest.mark.parametrize("benchmark, flags", [
    (process, ["--rounds", "2", "--repeats", "2"]),
    (forward, ["--models", "DiT-Ti/8", "--no-compile", "DiT-Ti/8", "--rounds", "2", "--batch-size", "2"]),
    (training, ["--models", "DiT-Ti/8", "--rounds", "2", "--batch-size", "2"]),
    (loading, ["--images", "16", "--num-workers", "0", "--rounds", "2"]),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_benchmarks_run_and_say_where(benchmark, flags, results):
    benchmark.main(flags)
    (path,) = results.glob("*.json")
    assert json.loads(path.read_text())["machine"]["torch"] in str(torch.__version__)


@pytest.mark.long
def test_the_benchmark_of_sampling_runs(results):
    torch._dynamo.reset()  # a process may compile one forward pass so many times only, and other tests did
    sampling.main(["--model", "DiT-Ti/8", "--steps", "2", "--rounds", "2", "--batch-size", "2"])
    assert list(results.glob("*-sampling-*.json"))


def test_both_anchors_compute_what_the_network_does():
    network = small_dit()
    x, t, y = torch.randn(3, 4, 8, 8).double(), torch.tensor([0, 500, 999]), torch.tensor([1, 2, 3])
    drop = torch.tensor([0, 1, 0])
    with torch.no_grad():
        want = network(x, t, y, drop)
        for anchor in (Twin(network), Plain(network)):
            assert (anchor(x, t, y, drop) - want).abs().max() < 1e-4


def test_computing_once_changes_nothing_but_rounding():
    network, n = small_dit(), 3
    y = torch.tensor([1, 2, 3, 10, 10, 10])
    x, t = torch.randn(6, 4, 8, 8).double(), torch.full((6,), 400)
    with torch.no_grad():
        want = network.forward_with_cfg(x, t, y, 2.0)
        assert (sampling.once(network, n).forward_with_cfg(x, t, y, 2.0) - want).abs().max() < 1e-12


def test_looked_up_tables_give_the_same_steps():
    """benchmarks.process compares them before it times them; here that its comparison can fail."""
    tables = {"betas": torch.linspace(0, 1, 5).double().numpy()}
    x, t = torch.zeros(2, 3, 4), torch.tensor([1, 4])
    small, large = (process.Lookup(tables, t, x, spread).betas for spread in (False, True))
    assert small.shape == (2, 1, 1) and large.shape == x.shape and large.is_contiguous()
    assert small.flatten().tolist() == [0.25, 1.0] and torch.equal(large, small.expand_as(x))


def test_step_dependent_depth_leaves_blocks_out_above_the_threshold_only():
    network = small_dit(depth=3)
    shallow = depth.build(network, (1,), 500).double()
    without = DiT(**network.config | {"depth": 2}).double().eval()
    kept = {k.replace("blocks.2.", "blocks.1."): v for k, v in network.state_dict().items() if "blocks.1." not in k}
    without.load_state_dict(kept)
    x, t, y = torch.randn(4, 4, 8, 8).double(), torch.tensor([0, 499, 500, 999]), torch.tensor([1, 2, 3, 4])
    with torch.no_grad():
        got, whole, thin = shallow(x, t, y), network(x, t, y), without(x, t, y)
    torch.testing.assert_close(got, torch.cat([whole[:2], thin[2:]]))
    assert not torch.allclose(whole[2:], thin[2:]) and list(shallow.state_dict()) == list(network.state_dict())


# ---- what the documents show ----


def test_the_figure_and_table_of_solvers_are_of_the_committed_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    scores, times = plot_solvers.read(sides.RESULTS, plot_solvers.SCORES)
    plot_solvers.draw(scores, times, tmp_path / "solvers.svg")
    assert (tmp_path / "solvers.svg").read_text() == (ROOT / "docs" / "solvers.svg").read_text()
    assert "\n".join(plot_solvers.rows(scores, times)) in (ROOT / "docs" / "sampling.md").read_text()


def test_every_setting_is_scored_on_2000_samples():
    found = json.loads((sides.RESULTS / "solvers-scores.json").read_text())
    assert found["samples"] == 2000
    assert {f"{setting}, seed 0" for setting in solvers.SETTINGS} <= found["scores"].keys()
    assert sum(name.startswith(f"{solvers.BASE}, seed") for name in found["scores"]) == 2
