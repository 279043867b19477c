"""The benchmarks: that each runs and says where, that sides do the same work, and that documents
show the committed numbers.
"""

import importlib
import inspect
import json
import os
import time
from types import SimpleNamespace

from PIL import Image
import pytest
import torch

from benchmarks import (
    caching, calibrated, calls, compiled, dynamic, exits, flow, forward, gpu, gpu_commands,
    gpu_sampling, gpu_tables, gpu_training, gpu_worker, loading, packing, plot_solvers, process,
    sampling, sides, solvers, space_time, train_deep, training,
)  # fmt: skip
from benchmarks.anchors import Plain, Twin
from benchmarks.networks import TINY, random_network, trained
from checkpoints import load_pretrained
from checkpoints.publish import save_pretrained
from conftest import ROOT, small_dit
from flow import create_flow
from models import DiT_models
from training.state import Recipe, new_state
from checkpoints.networks import DynamicDiT


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
    assert {name: one["i"] for name, one in found.items()} == {
        "x.json": 0, "x-2.json": 1, "x-3.json": 2,
    }  # fmt: skip
    assert {"date", "cpu", "threads", "torch", "commit", "command"} <= found["x.json"][
        "machine"
    ].keys()


@pytest.mark.parametrize("benchmark, flags", [
    (process, ["--rounds", "2", "--repeats", "2"]),
    (forward,
     ["--models", "DiT-Ti/8", "--no-compile", "DiT-Ti/8", "--rounds", "2", "--batch-size", "2"]),
    (training, ["--models", "DiT-Ti/8", "--rounds", "2", "--batch-size", "2"]),
    (flow, ["--models", TINY, "--rounds", "2", "--batch-size", "2"]),
    (loading, ["--images", "16", "--num-workers", "0", "--rounds", "2"]),
    (packing, ["--model", "DiT-Ti/2", "--rounds", "1", "--mixes", "1"]),
    (caching, ["euler", "--images", "1", "--samples", "0", "--rounds", "1"]),
    pytest.param(calibrated, ["sde", "--images", "1", "--samples", "0", "--rounds", "1"],
                 marks=pytest.mark.long),
    (space_time, ["--frames", "1", "2", "--rounds", "1", "--batch-size", "1"]),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_benchmarks_run_and_say_where(benchmark, flags, results):
    benchmark.main(flags)
    (path,) = results.glob("*.json")
    assert json.loads(path.read_text())["machine"]["torch"] in str(torch.__version__)


def test_a_deep_network_is_trained_as_any_other_and_sampled_without_its_name(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (32, 32)).save(tmp_path / "images" / "a" / f"{i}.png")
    train_deep.main([
        "--data-path", str(tmp_path / "images"), "--num-classes", "1", "--model", train_deep.NAME,
        "--image-size", "32", "--vae", str(solvers.DIGITS / "vae"), "--global-batch-size", "2",
        "--max-steps", "1", "--num-workers", "0", "--results-dir", str(tmp_path / "runs"),
    ])  # fmt: skip
    [run] = (tmp_path / "runs").iterdir()
    network, _ = load_pretrained(run)
    assert network.config["depth"] == 12 and train_deep.NAME not in DiT_models


@pytest.mark.long
def test_the_benchmark_of_sampling_runs(results):
    # A process may compile one forward pass so many times only, and other tests did
    torch._dynamo.reset()
    sampling.main(["--model", "DiT-Ti/8", "--steps", "2", "--rounds", "2", "--batch-size", "2"])
    assert list(results.glob("*-sampling-*.json"))


def test_the_benchmark_of_compiled_kinds_runs(results, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    compiled.main(["--images", "2", "--steps", "9", "--rounds", "1"])
    (path,) = results.glob("*-compiled.json")
    found = json.loads(path.read_text())
    assert set(found["of its own as it is"]) == {
        *(f"{kind}, compiled" for kind in ("plain", "exits", "pair", "cache", "dynamic")),
        "dynamic, complete and compiled",
    }  # fmt: skip
    assert all(float(far) < 1e-5 for far in found["farthest, of the largest"].values())


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


@pytest.mark.parametrize("method, once", [("euler", 1), ("heun", 2)])
def test_a_flow_s_steps_are_the_same_with_half_the_calls(method, once):
    network, process, ends = small_dit(), create_flow(), []
    x, noise = torch.randn(2, 2, 4, 8, 8).double()
    for step, wanted in ((flow.one_step, once), (flow.twice_asked, 2 * once)):
        counted = []
        hook = network.register_forward_pre_hook(lambda *_: counted.append(1))
        with torch.no_grad():
            ends.append(step(process, network, torch.tensor([1, 2]), x, noise, method))
        hook.remove()
        assert len(counted) == wanted
    assert (ends[0] - ends[1]).abs().max() < 1e-6 < (ends[0] - x).abs().max()


def test_exits_begin_with_the_final_layer_of_the_network():
    """Both sides of the comparison begin as the same network below the levels."""
    network = small_dit(depth=6).float().eval()
    x, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    for pairs in exits.sides(6).values():
        made = exits.begun(network, pairs)
        assert torch.equal(made(x, torch.tensor([5, 9]), y), network(x, torch.tensor([5, 9]), y))
        assert len(getattr(made, "exit_layers", ())) == len(pairs)


def test_a_dynamic_network_is_compared_with_its_control(results, tmp_path, monkeypatch):
    """On few steps and samples: what is written has all sides, and the control's time is 1."""
    monkeypatch.setattr(dynamic, "STEPS", 2)
    monkeypatch.setattr(dynamic, "FEWER", (1,))
    monkeypatch.setattr(dynamic, "BATCH", 4)
    control, _ = load_pretrained(ROOT / "examples" / "digits" / "dit.safetensors")
    routed = DynamicDiT(**{k: v for k, v in control.config.items() if k != "block"})
    routed.load_state_dict(routed.state_dict() | control.state_dict())
    for name, network in {"control": control, "dynamic": routed}.items():
        save_pretrained(network, tmp_path / name)
    checkpoints = [f"--{name}={tmp_path / name}" for name in ("dynamic", "control")]
    dynamic.main([*checkpoints, "--samples", "100", "--rounds", "1"])
    [file] = results.glob("*dynamic-6-blocks.json")
    found = json.loads(file.read_text())
    assert found["share of operations"] == pytest.approx(1, rel=1e-3)  # a fresh one has all on
    same = found["distance"]["control, 2 steps"]
    assert found["distance"]["dynamic, 2"] == pytest.approx(same, rel=1e-2)
    assert found["distance"]["before both"] == same != found["distance"]["control, 1"]
    assert found[sides.RATIO]["control, 2 steps"] == [1, 1, 1]


# ---- what the documents show ----


def test_the_figure_and_table_of_solvers_are_of_the_committed_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    scores, times = plot_solvers.read(sides.RESULTS, plot_solvers.SCORES)
    plot_solvers.draw(scores, times, tmp_path / "solvers.svg")
    assert (tmp_path / "solvers.svg").read_text() == (ROOT / "docs" / "solvers.svg").read_text()
    assert (
        "\n".join(plot_solvers.rows(scores, times)) in (ROOT / "docs" / "sampling.md").read_text()
    )


def test_the_figure_and_table_of_calls_are_of_the_committed_numbers(tmp_path):
    found = json.loads(calls.SCORES.read_text())["scores"]
    calls.draw(found, tmp_path / "calls.svg")
    assert (tmp_path / "calls.svg").read_text() == (ROOT / "docs" / "calls.svg").read_text()
    assert "\n".join(calls.rows(found)) in (ROOT / "docs" / "flow.md").read_text()


def test_what_is_not_scored_yet_is(tmp_path, monkeypatch):
    """One setting of each network; the other solver's score stays as it was."""
    chosen = [solver for solver in calls.SOLVERS if solver.sampler in ("ddim", "heun")]
    monkeypatch.setattr(calls, "SOLVERS", chosen)
    monkeypatch.setattr(calls, "CALLS", (2,))
    monkeypatch.setattr(calls, "SEEDS", (0,))
    monkeypatch.setattr(calls, "TOLERANCES", ())
    path = tmp_path / "scores.json"
    known = {"diffusion: ddim, 2 calls, seed 0": {"distance": 1.0, "calls": 2.0}}
    path.write_text(json.dumps({"samples": 60, "runs": [], "scores": known}))
    calls.main(["scores", "--samples", "60", "--output", str(path)])
    found = json.loads(path.read_text())["scores"]
    assert found.keys() == {*known, "flow: heun, 2 calls, seed 0"}
    assert found.items() >= known.items() and found["flow: heun, 2 calls, seed 0"]["calls"] == 2


def test_every_setting_is_scored_on_2000_samples():
    found = json.loads((sides.RESULTS / "solvers-scores.json").read_text())
    assert found["samples"] == 2000
    assert {f"{setting}, seed 0" for setting in solvers.SETTINGS} <= found["scores"].keys()
    assert sum(name.startswith(f"{solvers.BASE}, seed") for name in found["scores"]) == 2


# ---- everything on a GPU ----


@pytest.mark.parametrize("name", gpu.PARTS)
def test_each_part_is_a_function_that_takes_its_sizes(name):
    part = gpu.PARTS[name]
    signature = inspect.signature(getattr(importlib.import_module(part.module), part.function))
    for sizes in (part.sizes, part.tiny):
        signature.bind("report", **sizes)
        assert json.loads(json.dumps(sizes)) == sizes  # an order is a line of JSON


def test_a_run_of_one_part_is_written_with_the_machine_and_as_dry(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main(["--parts", "limits", "--dry-run", "--output", str(tmp_path / "a.json")])
    result = json.loads((tmp_path / "a.json").read_text())
    found = result["parts"]["limits"]["found"]
    assert result["dry_run"] and result["machine"]["torch"] and list(result["parts"]) == ["limits"]
    assert result["parts"]["limits"]["status"] == "done" and found["copy_terabytes_per_second"] > 0
    assert min(found["teraflops_per_second"].values()) > 0
    assert [goal["met"] for goal in result["goals"]] == [None] * 6
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.long
def test_a_dry_run_does_every_part(tmp_path):
    path = tmp_path / "a.json"
    gpu.main(["--dry-run", "--output", str(path)])
    result = json.loads(path.read_text())
    assert list(result["parts"]) == list(gpu.PARTS)
    for name, part in result["parts"].items():
        assert part["status"] in ("done", gpu_worker.STOPPED) and not part.get("failed"), (
            name,
            part,
        )
        assert part["found"], name
    parts = {name: part["found"] for name, part in result["parts"].items()}
    for name in ("training DiT-XL/2", "training DiT-B/2", "training DiT-S/2"):
        assert parts[name]["sides"].keys() == gpu_training.SIDES.keys()
    every = {*gpu_sampling.OURS, gpu_sampling.DIFFUSERS}
    assert (
        parts["sampling DiT-XL/2"]["DDIM 3"].keys()
        == parts["sampling DiT-XL/2"]["dpm++ 2"].keys()
        == every
    )
    assert parts["exactness"]["differences"]["float32, DDIM 3"]["largest"] == 0
    if not torch.cuda.is_available():
        assert parts["tests"]["collected"] == parts["tests"]["skipped"] > 4
    one = parts["one process"]["loss_of_the_first_step"]
    assert one["DDP"] == pytest.approx(one["bare"]) and one["FSDP2"] == pytest.approx(one["bare"])
    assert parts["scaling"]["preset"] == "tiny" and parts["scaling"]["finished"] >= 0
    for section in gpu_tables.SECTIONS.values():  # and what a GPU's would be is shown
        assert "tiny" not in section((path, result)) and "eager" in gpu_tables.training_section(
            (path, result)
        )


FAKE = """
import os, subprocess, sys, time
def hangs(report):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    report.set(child=child.pid)
    time.sleep(600)
def dies(report):
    report.set(so_far=1)
    os._exit(3)
"""


def alive(pid):
    """Whether a process runs; one that has ended and is not yet waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc"), reason="processes are looked for in /proc")
def test_a_part_that_hangs_is_cut_with_its_children_and_one_that_dies_is_told(
    tmp_path, monkeypatch
):
    (tmp_path / "fake_parts.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    workers = {name: gpu.Worker("fake_parts") for name in ("hangs", "dies")}
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(gpu, "time", clock)

    def changed(report):
        if "child" in report["found"]:
            clock.monotonic = lambda: float("inf")  # the limit, just after it reported something

    reports = {}
    for name in ("dies", "hangs"):
        order = {
            "name": name, "function": name, "sizes": {}, "path": str(tmp_path / name),
            "seconds": 60,
        }  # fmt: skip
        reports[name] = workers[name].follow(order, 60, changed)
    child = reports["hangs"]["found"]["child"]
    assert reports["dies"] == {
        "status": "error", "error": "its process ended with 3", "found": {"so_far": 1},
    }  # fmt: skip
    assert reports["hangs"]["status"] == "killed at its time limit" and alive(child)
    for worker in workers.values():
        worker.end()
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child)


def test_a_part_that_raises_and_one_that_lacks_a_library_say_so(tmp_path):
    def raises(report, what):
        report.set(half=1)
        gpu_worker.attempt(report, "a piece", int, "x")
        raise what

    def end(what):
        report = gpu_worker.Report(tmp_path / "report.json", 60)
        gpu_worker.run(report, raises, {"what": what})
        return json.loads((tmp_path / "report.json").read_text())

    error, missing = (
        end(torch.OutOfMemoryError("no room")),
        end(ModuleNotFoundError("no", name="diffusers")),
    )
    assert (
        error["status"] == "error"
        and error["error"] == "OutOfMemoryError: no room"
        and error["found"] == {"half": 1}
    )
    assert error["failed"] == {"a piece": "ValueError: invalid literal for int() with base 10: 'x'"}
    assert (missing["status"], missing["why"]) == ("left out", "diffusers is not installed")
    assert end(SystemExit("a door refused"))["error"] == "SystemExit: a door refused"


def test_a_part_without_time_for_another_round_ends_with_what_it_has():
    report, shown, order = gpu_worker.Report(None, 0), [], []
    sides = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = gpu_worker.take_turns(
        report, sides, 5, lambda seconds: shown.append(1), ready=order.append
    )
    assert order == ["a", "a", "b", "b"] and len(shown) == len(seconds["a"]) == 1
    assert report.outcome == {"status": gpu_worker.STOPPED}
    in_time = gpu_worker.Report(None, 60)
    assert len(gpu_worker.take_turns(in_time, sides, 5, lambda seconds: None)["b"]) == 5
    assert in_time.outcome == {"status": "done"} and "".join(order[4:]) == "abbaabbaab"


def deadlines(minutes, dry, *names):
    run = SimpleNamespace(args=SimpleNamespace(minutes=minutes, parts=names), dry=dry, began=100.0)
    return [gpu.Run.deadline(run, name) for name in names]


def test_a_part_may_take_its_share_and_what_earlier_ones_left():
    shares = [part.share for part in gpu.PARTS.values()]
    assert sum(shares) == 480  # seconds of the default
    found = deadlines(8, False, *gpu.PARTS)
    assert found == pytest.approx([100 + sum(shares[: i + 1]) for i in range(len(shares))])
    assert deadlines(1, False, "loader", "one process") == pytest.approx([100 + 60 * 15 / 33, 160])
    assert deadlines(1, True, "loader", "one process") == [160, 160]


@pytest.mark.parametrize("fixed, each, most, want", [
    (20e9, 5e8, 512, 144),  # (100·0.92 - 20) / 0.5
    (20e9, 5e8, 64, 64),
    (60e9, 19e8, 512, 16),  # the second of the two small ones does not fit
])  # fmt: skip
def test_a_batch_is_found_by_memory(fixed, each, most, want):
    tried = []

    def peak(batch):
        tried.append(batch)
        if fixed + each * batch > 100e9:
            raise torch.OutOfMemoryError
        return fixed + each * batch

    assert gpu_training.batch_that_fits(peak, 100e9, most) == want and len(tried) <= 3


def test_a_batch_that_does_not_fit_after_all_becomes_smaller():
    def peak(batch):
        if batch > 100:
            raise torch.OutOfMemoryError
        return batch

    assert gpu_training.batch_that_fits(peak, 1000, 512) == 96
    with pytest.raises(torch.OutOfMemoryError):
        gpu_training.fitting(lambda batch: peak(1000), 64)


def test_the_sides_of_training_share_a_state_whose_switches_they_set():
    state = new_state(trained(random_network(TINY)), Recipe())
    state.network.to("cpu")
    called = []
    blocks = [
        lambda *args, block=block: called.append(block) or block._call_impl(*args)
        for block in state.network.blocks
    ]
    eager, compiled = (
        gpu_training.Steps(state),
        gpu_training.Steps(state, blocks, checkpointing=True),
    )
    for side in (eager, compiled):
        side.resize(2)
    eager.ready()
    assert not called and not state.network.grad_checkpointing
    compiled.ready()
    assert called and state.network.grad_checkpointing
    begun = len(called)
    eager.ready()
    eager()
    assert len(called) == begun and state.step == 3 + gpu_training.STEPS
    eager.latents.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        eager.ready()


def test_values_read_back_in_a_step_are_counted():
    report = gpu_worker.Report(None, 60)
    report.set(counted_per_step={})

    def call(steps):
        torch.ones(3).sum().item()  # before the steps, and not of them
        for _ in range(steps):
            torch.ones(3).sum().item() + torch.ones(3).sum().item()

    gpu_sampling.count_steps(report, "sampling", call)
    assert report.found["counted_per_step"]["sampling"] == {
        "aten::_local_scalar_dense": 2,
        "aten::item": 2,
    }
    gpu_sampling.count_steps(report, "nothing", lambda steps: None)
    assert report.found["counted_per_step"]["nothing"] == {}


def sampled(compiled, theirs):
    """What a part of sampling may have found."""
    figures = {"compiled, bf16": compiled, "bf16": 0.6 * compiled, "diffusers, bf16": theirs}
    sides = {
        name: {gpu_tables.IMAGES: value, gpu_tables.SHARE: value / 20}
        for name, value in figures.items()
    }
    return {"status": "done", "found": {"DDIM 50": sides}}


def test_goals_are_met_missed_or_not_measured():
    figures = {
        gpu_tables.IMAGES: 520.0, gpu_tables.SHARE: 0.44, "batch": 160, gpu_tables.MEMORY: 70.0,
    }  # fmt: skip
    parts = {
        "training DiT-XL/2": {"status": "done", "found": {"sides": {"eager": figures}}},
        "sampling DiT-XL/2": sampled(12.0, 5.0),
    }
    found = {goal["goal"]: (goal["figure"], goal["met"]) for goal in gpu_tables.goals(parts)}
    assert found["training DiT-XL/2, images per second"] == (520, True)
    assert found["training DiT-XL/2, share of the limit"] == (0.44, False)
    assert found["sampling DiT-XL/2, DDIM 50, times diffusers"] == (2.4, True)
    assert found["sampling DiT-XL/2, DDIM 50, share of the limit"] == (0.6, True)
    assert found["sampling DiT-XL/2, dpm++ 20, times diffusers"] == (None, None)
    parts["sampling DiT-XL/2"]["found"]["DDIM 50"] = {
        "diffusers, bf16": {gpu_tables.IMAGES: 5.0, gpu_tables.SHARE: 0.9}
    }
    # diffusers' is not ours
    assert {goal["met"] for goal in gpu_tables.goals(parts) if "DDIM" in goal["goal"]} == {None}


def test_sections_show_what_was_measured_and_say_what_was_not(tmp_path):
    parts = {"sampling DiT-XL/2": sampled(12.0, 5.0)}
    result = {
        "machine": {"gpu": "A GPU", "torch": "2.11.0"}, "parts": parts,
        "goals": gpu_tables.goals(parts),
    }  # fmt: skip
    text = gpu_tables.sampling_section((tmp_path / "2030-01-02-gpu.json", result))
    assert (
        "| DDIM 50 | compiled, bf16 | 12 | 0.6 |" in text
        and "| dpm++ 20 | not measured | not measured |" in text
    )
    assert "times diffusers: 2.4, met (goal: at least 2)" in text and "2030-01-02-gpu.json" in text
    assert "Tests that need a GPU: not measured." in text
    assert "| DiT-S/2 | not measured |" in gpu_tables.training_section(
        (tmp_path / "2030-01-02-gpu.json", result)
    )


def test_the_newest_result_is_that_of_the_latest_day_and_number_and_no_dry_run(tmp_path):
    assert gpu_tables.newest(tmp_path) is None
    for name, dry in (
        ("2030-01-02-gpu-2", False), ("2030-01-02-gpu-10", False), ("2030-01-01-gpu-30", False),
        ("2030-01-03-gpu", True), ("2030-01-04-gpu-dry-run", False), ("2030-01-05-loading", False),
    ):  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps({"dry_run": dry}))
    assert gpu_tables.newest(tmp_path)[0].name == "2030-01-02-gpu-10.json"


@pytest.mark.parametrize("name, section", gpu_tables.SECTIONS.items())
def test_documents_show_the_newest_result_of_a_gpu(name, section):
    text, found = (ROOT / name).read_text(), gpu_tables.newest()
    assert text.count(gpu_tables.BEGIN) == text.count(gpu_tables.END) == 1
    assert gpu_tables.with_section(text, section(found)) == text, (
        "python -m benchmarks.gpu --tables brings it up to date"
    )


@pytest.mark.parametrize("flags, message", [
    (["--minutes", "nan"], "--minutes is nan; it must be above 0 and at most 1440"),
    (["--minutes", "0"], "--minutes is 0; it must be above 0"),
    (["--minutes", "1e9"], "--minutes is 1e+09; it must be above 0"),
    (["--parts", "tests", "tests"], "--parts has a part twice"),
    (["--parts", "test"], "invalid choice: 'test'"),
    (["--output", "pyproject.toml"],
     "--output pyproject.toml exists, and no result is overwritten"),
    (["--output", "nowhere/a.json"], "there is no folder nowhere; make it first"),
])  # fmt: skip
def test_what_a_run_cannot_be_is_refused_before_it_begins(flags, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as refused:
        gpu.main(flags)
    assert refused.value.code == 2 and message in capsys.readouterr().err


def test_every_test_that_needs_a_gpu_has_its_mark():
    """A skip of its own would hide it from benchmarks.gpu."""
    marked, needle = [], "needs a" + " GPU"
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text()
        assert f'reason="{needle}"' not in text, path.name
        marked += gpu_commands.MARKED.findall(text)
    assert len(marked) >= 4


def outcome(**values):
    """A report of pytest on a test."""
    return SimpleNamespace(
        **{"nodeid": "tests/a.py::b", "when": "call", "longrepr": None, **values}
    )


def test_tests_are_counted_once_and_failures_named():
    report = gpu_worker.Report(None, 60)
    recorder = gpu_commands.Recorder(report)
    recorder.pytest_collection_finish(SimpleNamespace(items="abcd"))
    recorder.pytest_collectreport(
        SimpleNamespace(failed=True, nodeid="tests/d.py", longrepr="no library")
    )
    for one in (
        outcome(when="setup", outcome="passed"), outcome(outcome="passed"),
        outcome(when="teardown", outcome="passed"),
        outcome(nodeid="tests/b.py::c", outcome="failed", longrepr="1 is not 2"),
        outcome(nodeid="tests/c.py::d", when="setup", outcome="skipped",
                longrepr=("c.py", 1, "Skipped: no library")),
        outcome(nodeid="tests/e.py::f", outcome="passed"),
        outcome(nodeid="tests/e.py::f", when="teardown", outcome="failed",
                longrepr="it left something"),
    ):  # fmt: skip
        recorder.pytest_runtest_logreport(one)
    found = report.found
    assert [found[kind] for kind in gpu_tables.KINDS] == [4, 1, 2, 1]
    assert found["failures"] == {
        "d.py": "no library", "b.py::c": "1 is not 2", "e.py::f": "it left something",
    }  # fmt: skip
    assert found["reasons"] == {"c.py::d": "Skipped: no library"}
    assert gpu.went_wrong({"status": "done", "found": found}) and not gpu.went_wrong(
        {"status": "left out"}
    )
