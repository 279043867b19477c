"""The study of clips: what its runs have as much of, how they are measured, and that it goes on."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT

EXAMPLE = ROOT / "examples" / "moving_digits"
sys.path[:0] = [str(EXAMPLE.parent / "digits"), str(EXAMPLE)]
pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install .[digits]")

import clip_study  # noqa: E402
import make_moving_digits  # noqa: E402
from data.buckets import ClipBatches  # noqa: E402
from data.cache_writer import cache_latents  # noqa: E402
from data.listing import list_clips  # noqa: E402
from data.options import CacheOptions  # noqa: E402
from processes.table import process_of  # noqa: E402
from runtime.clip_files import read_clip  # noqa: E402
from vae import load_vae  # noqa: E402

VAE = str(EXAMPLE / "vae")


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """{flag: folder of cached latents}, of 40 clips, of these and 40 images, and of 40 clips."""
    folder = tmp_path_factory.mktemp("study")
    flags = ["--clips", "40", "--heldout", "40"]
    for name, images in (("plain", 0), ("mixed", 40)):
        out = ["--output", str(folder / name), "--images", str(images)]
        make_moving_digits.main([*flags, *out])
    found = {"latents": "plain/train", "mixed": "mixed/train", "heldout": "plain/heldout"}
    for flag, path in found.items():
        cache_latents(CacheOptions(
            folder / path, folder / f"{flag}-latents", image_size=32, num_classes=10,
            flip=False, vae=VAE, clips=True, num_workers=0, device="cpu",
        ))  # fmt: skip
    return {flag: folder / f"{flag}-latents" for flag in found} | {"folder": folder}


def flags(caches, output, **changes):
    named = {name: caches[name] for name in ("latents", "mixed", "heldout")} | {
        "vae": VAE, "steps": 3, "batch_size": 4, "output": output, **changes,
    }  # fmt: skip
    return [w for k, v in named.items() for w in (f"--{k.replace('_', '-')}", str(v))]


def test_images_among_the_clips_show_the_same_digits(caches):
    listing = list_clips(caches["folder"] / "mixed" / "train", num_classes=10)
    clips = [read_clip(path).frames for path in listing.paths]
    pictures = [clip for clip in clips if len(clip) == 1]
    assert (len(clips), len(pictures)) == (80, 40)
    assert pictures[0].shape == (1, 32, 32, 3) and all(clip.max() > 200 for clip in pictures)
    kinds = {(path.split("/")[-2], path[-9:-4]) for path in listing.paths}
    assert len(kinds) == 40  # an image's number is of the digit that the clip's is of


@pytest.mark.parametrize("prices", [(0, 1), (1, 16), (3, 7)])
def test_steps_are_as_many_as_a_budget_pays(prices):
    lengths, budget = [1] * 40 + [16] * 24, 60
    options = SimpleNamespace(global_batch_size=4, global_seed=3)
    clips, images = clip_study.steps_within(options, lengths, prices, budget)
    steps = list(ClipBatches(lengths, 4, 3, 0, clips + images + 1))
    kinds = [int(step[0][0] >= 40) for step in steps]
    assert [kinds[:-1].count(kind) for kind in (1, 0)] == [clips, images]
    paid = [sum(prices[kind] for kind in some) for some in (kinds[:-1], kinds)]
    assert paid[0] <= budget < paid[1]


def test_the_loss_is_that_of_noise_and_data_at_even_times(caches):
    """A network that says 0 errs by the mean square of noise minus data: 1 and that of the data."""
    args = clip_study.build_parser().parse_args(flags(caches, "out"))
    source = clip_study.opened(clip_study.options_of(args, "full", 0), latents=args.heldout)
    times, space = [], load_vae(VAE)

    def network(x, t, y):
        times.extend(t.tolist())
        assert x.shape == (len(t), 4, 16, 8, 8) and len(y) == len(t)
        return torch.zeros_like(x)

    learner = SimpleNamespace(in_channels=4, learn_sigma=False)
    process = process_of(learner, {"name": "flow"})
    sampler = SimpleNamespace(network=network, space=space, process=process)
    loss = clip_study.heldout_loss(sampler, source)
    mean, std = torch.stack([source[i, False][0] for i in range(40)], dim=1).float()
    square = ((mean - space.shift) ** 2 + std**2) * space.scale**2
    assert loss == pytest.approx(1 + square.mean().item(), rel=0.02)
    assert sorted(times) == pytest.approx([(i + 0.5) / 40 for i in range(40)])
    assert clip_study.heldout_loss(sampler, source) == loss


@pytest.mark.long
def test_a_study_has_equal_operations_and_goes_on(caches, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clip_study, "SEEDS", (0,))
    out = tmp_path / "out"
    more = dict(samples=2, sampling_steps=2)
    clip_study.main(flags(caches, out, **more))
    files = {name: out / f"{name}-seed-0.json" for name in clip_study.ARMS}
    found = {name: json.loads(file.read_text()) for name, file in files.items()}
    plans = {name: one["plan"] for name, one in found.items()}
    assert all(0 < one["heldout_loss"] < 3 and one["samples"]["clips"] == 2
               for one in found.values())  # fmt: skip
    assert plans["alternating"]["clip_steps"] == plans["with-images"]["clip_steps"] == 3
    assert plans["with-images"]["image_steps"] > 0 == plans["full"]["image_steps"]
    budget = plans["alternating"]["operations"]
    assert plans["with-images"]["operations"] > budget
    for name in ("full", "with-images-equal"):
        assert budget / 2 < plans[name]["operations"] <= budget
    table = capsys.readouterr().out.splitlines()[-6:]
    for line, name in zip(table[2:], clip_study.ARMS):
        assert line.startswith(f"| {name} | ") and f"{found[name]['heldout_loss']:.4f}" in line

    files["full"].unlink()
    kept = files["alternating"].read_text()
    trained = []

    def noted(args, plan):
        trained.append(plan.arm)
        return found[plan.arm]

    monkeypatch.setattr(clip_study, "train_and_measure", noted)
    clip_study.main(flags(caches, out, **more))
    assert trained == ["full"] and files["alternating"].read_text() == kept
    with pytest.raises(SystemExit):
        clip_study.main(flags(caches, out, steps=2, **more))
    assert "has alternating-seed-0.json of other latents, steps" in capsys.readouterr().err
    assert trained == ["full"]


@pytest.mark.parametrize(("changes", "wanted"), [
    ({"latents": "mixed"}, "--latents {mixed} has clips of one frame, and is to have none"),
    ({"mixed": "latents"}, "--mixed {latents} has no clips of one frame, and is to have some"),
    ({"heldout": "mixed"}, "--heldout {mixed} has clips of one frame; give latents without"),
])  # fmt: skip
def test_latents_of_another_kind_are_refused(caches, tmp_path, capsys, changes, wanted):
    with pytest.raises(SystemExit):
        changed = {flag: caches[name] for flag, name in changes.items()}
        clip_study.main(flags(caches, tmp_path / "out", **changed))
    assert wanted.format(**caches) in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
