"""examples/captions: measurements against shapes that are drawn to measure, captions of digits, a
tiny study, and the committed weights.
"""

import json
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT

pytest.importorskip("sklearn", reason="the digits come with scikit-learn: pip install .[digits]")
EXAMPLE = ROOT / "examples" / "captions"
WEIGHTS = EXAMPLE / "mmdit.safetensors"
sys.path[:0] = [str(ROOT / "examples" / name) for name in ("digits", "scaling", "captions")]

import caption_plot  # noqa: E402
import caption_study  # noqa: E402
import judge_captions  # noqa: E402
import learning  # noqa: E402
import make_captions  # noqa: E402
import measure  # noqa: E402
import scores  # noqa: E402
import words  # noqa: E402
from conditions.text import cut  # noqa: E402
from processes.table import process_of  # noqa: E402
from training.state import Recipe, new_state  # noqa: E402
from vae import load_vae  # noqa: E402
from words import Said  # noqa: E402


@pytest.fixture(scope="module")
def loaded():
    """({"train", "left-out", "heldout": Digits}, the Scale, combinations left out)."""
    return words.load_captioned()


def bar(thickness, slant=0.0, length=20, soft=0.3, brightness=255):
    """A straight stroke (32, 32) of a thickness in pixels across, leaning, with soft edges."""
    y, x = np.mgrid[:32, :32] - 15.5
    across = np.abs(x + slant * y) / np.hypot(1, slant)
    along = np.abs(y) * np.hypot(1, slant)

    def inside(distance, limit):
        return 1 / (1 + np.exp((distance - limit) / soft * 2))

    return brightness * inside(across, thickness / 2) * inside(along, length / 2)


# ---- measurements ----


@pytest.mark.parametrize("slant", [0, 0.2, -0.4])
@pytest.mark.parametrize("thickness", [3, 4, 6])
def test_thickness_of_a_stroke(thickness, slant):
    """The ends of a stroke of length L add their edges: 2·t·L / (2·(L + t))."""
    found = measure.thickness(bar(thickness, slant)[None])
    assert found == pytest.approx(thickness * 20 / (20 + thickness), rel=0.07)


def test_thickness_does_not_depend_on_brightness():
    bright, dim = measure.thickness(np.stack([bar(4), bar(4, brightness=120)]))
    assert bright == pytest.approx(dim)


@pytest.mark.parametrize("slant", [-0.5, -0.1, 0.0, 0.2, 0.4])
def test_slant_of_a_stroke(slant):
    """Up is a smaller row, right a larger column."""
    picture = bar(2, slant)
    assert measure.slant(picture[None])[0] == pytest.approx(slant, abs=0.03)
    if slant:
        assert picture[6, 16:].sum() != pytest.approx(picture[6, :16].sum())
        assert (picture[6, 16:].sum() > picture[6, :16].sum()) == (slant > 0)


def test_width_of_an_ellipse_whether_upright_or_sheared():
    """Of filled ellipses of half axes a and b it is a / b, also once they are sheared."""
    y, x = np.mgrid[:64, :64] - 31.5
    for a, b, shear in [(8, 16, 0), (12, 16, 0), (16, 16, 0), (8, 16, 0.5), (12, 16, -0.3)]:
        picture = np.float64(((x + shear * y) / a) ** 2 + (y / b) ** 2 < 1)
        assert measure.width(picture[None])[0] == pytest.approx(a / b, rel=0.03)
        assert measure.slant(picture[None])[0] == pytest.approx(shear, abs=0.01)


def test_nothing_measures_nothing():
    black = np.zeros((2, 32, 32))
    for name, found in words.measured(black).items():
        assert found.tolist() == [0, 0], name


# ---- words ----


def test_captions_say_what_is_asked():
    assert Said(7, {"thickness": 0, "slant": 0}).caption == "a thin seven leaning left"
    assert Said(3, {"slant": 2, "width": 0, "thickness": 2}).caption == (
        "a thick narrow three leaning right"
    )
    assert Said(None, {"slant": 1}).caption == "a digit upright" and Said(0, {}).caption == "a zero"


def test_every_word_is_one_piece_and_every_caption_fits(loaded):
    every = {said.caption for said in words.every_prompt()}
    assert len(every) == 640
    assert all(len(cut(caption)) == len(caption.split()) <= 7 for caption in every)


def test_levels_are_quarter_half_and_quarter_of_each_digit_with_gaps(loaded):
    parts, _, _ = loaded
    digits = np.concatenate([parts[name].digits for name in ("train", "left-out")])
    for name in words.MEASURES:
        levels, clear = (
            np.concatenate([getattr(parts[part], what)[name] for part in ("train", "left-out")])
            for what in ("levels", "clear")
        )
        for digit in range(10):
            own = digits == digit
            counts = np.bincount(levels[own], minlength=3) / own.sum()
            assert np.abs(counts - [1 / 4, 1 / 2, 1 / 4]).max() < 0.01
            assert clear[own].mean() == pytest.approx(1 - 2 * words.GAP, abs=0.02)


def test_captions_of_a_digit_are_true_of_it(loaded):
    parts, scale, left = loaded
    train = parts["train"]
    few = train.chosen(slice(40))
    for i, captions in enumerate(few.captions()):
        true = {words.DIGITS[few.digits[i]], "digit", "a"}
        for name in words.MEASURES:
            true.update(words.WORDS[name][few.levels[name][i]].split())
        assert all(set(caption.split()) <= true for caption in captions)
        clear = sum(few.clear[name][i] for name in words.MEASURES)
        assert len(set(captions)) == len(captions) == 2**clear + 1
        assert len(captions[0].split()) == max(len(caption.split()) for caption in captions)
    assert len(train.digits) == 1251 and not np.isin(train.combinations(), left).any()
    assert len(left) == 12
    assert np.isin(parts["left-out"].combinations(), left).all()
    assert np.bincount(parts["left-out"].combinations())[left].min() >= words.ENOUGH
    assert len({words.combination(n).digit for n in left}) == 9
    assert not any(np.isin(left, few.combinations()))


def test_a_data_set_is_written_once_and_as_image_folders_have_it(
    tmp_path, capsys, monkeypatch, loaded
):
    parts, scale, left = loaded
    few = {name: digits.chosen(slice(30)) for name, digits in parts.items()}
    monkeypatch.setattr(make_captions, "load_captioned", lambda: (few, scale, left))
    make_captions.main(["--output", str(tmp_path / "data")])
    told = capsys.readouterr().out
    assert "30 digits" in told and "a thin six leaning left" in told
    rows = [
        json.loads(line)
        for line in (tmp_path / "data" / "heldout" / "metadata.jsonl").read_text().splitlines()
    ]
    heldout = tmp_path / "data" / "heldout"
    assert len(rows) == 30 and all((heldout / row["file_name"]).exists() for row in rows)
    assert all(isinstance(text, str) for row in rows for text in row["text"])
    first = tmp_path / "data" / "train" / "0000.png"
    first.write_bytes(b"kept")
    make_captions.main(["--output", str(tmp_path / "data")])
    assert first.read_bytes() == b"kept"


# ---- scores ----


@pytest.fixture(scope="module")
def judge(loaded):
    return scores.load_judge(loaded[1])


def test_real_digits_are_what_their_captions_say(loaded, judge):
    heldout = loaded[0]["heldout"]
    asked = caption_study.as_heldout(heldout, 360)
    met = judge.met(scores.coloured(heldout.images), asked)
    assert all(met[name].all() for name in words.MEASURES) and met["digit"].mean() > 0.98
    assert judge.distance(scores.coloured(heldout.images)) == pytest.approx(0.24, abs=0.01)
    others = [said._replace(levels={"slant": (said.levels["slant"] + 1) % 3}) for said in asked]
    assert not judge.met(scores.coloured(heldout.images), others)["slant"].any()


def test_shares_are_of_those_that_are_asked_and_chance_is_what_guessing_reaches():
    asked = [Said(0, {}), Said(1, {"slant": 0}), Said(2, {"slant": 1, "thickness": 2})]
    met = {
        "digit": np.array([True, True, False]), "thickness": np.array([True, True, True]),
        "width": np.array([True, True, True]), "slant": np.array([True, False, True]),
    }  # fmt: skip
    found = judge_captions.shares(met, asked)
    assert found == {
        "digit": pytest.approx(2 / 3), "thickness": 1, "slant": 0.5, "thickness and slant": 1,
        "all": pytest.approx(1 / 3),
    }  # fmt: skip
    every = list(words.every_prompt())
    rng, draws = np.random.default_rng(0), 200
    sizes = np.array([0.25, 0.5, 0.25])
    hits = [
        rng.integers(10, size=draws) == said.digit
        if not said.levels else np.all([
            rng.integers(10, size=draws) == said.digit,
            *(rng.choice(3, draws, p=sizes) == level for level in said.levels.values()),
        ], axis=0)
        for said in every
    ]  # fmt: skip
    assert judge_captions.chance(every)["all"] == pytest.approx(np.mean(hits), rel=0.05)


@pytest.mark.parametrize("have, want", [(7, 3), (3, 7), (4, 4)])
def test_repeated(have, want):
    found = judge_captions.repeated(list(range(have)), want)
    assert len(found) == want
    assert sorted(set(found)) == sorted(range(have)) if want >= have else len(set(found)) == want


# ---- training ----


def test_batches_are_those_of_training(loaded):
    """The same images, captions and noise, whether the steps are done at once or one by one."""
    space = load_vae(str(learning.VAE))
    data = learning.captioned(loaded[0]["heldout"].chosen(slice(12)), space)
    plan, states = caption_study.PRESETS["tiny"], []
    for parts in ([3], [1, 2, 3]):
        torch.manual_seed(0)
        network = caption_study.network_of(plan, "MM-DiT")
        states.append(new_state(network, Recipe(), process=process_of(network, {"name": "flow"})))
        for steps in parts:
            learning.learn(states[-1], data, space, 0, 4, steps)
    assert all(map(torch.equal, *(state.network.state_dict().values() for state in states)))
    fresh = caption_study.network_of(plan, "MM-DiT").state_dict()
    assert not all(map(torch.equal, states[0].network.state_dict().values(), fresh.values()))


def test_loss_of_a_network_that_returns_nothing(loaded):
    """It predicts 0 for noise - data or the like: the loss is the sum of both variances."""
    space = load_vae(str(learning.VAE))
    data = learning.captioned(loaded[0]["heldout"], space)
    network = caption_study.network_of(caption_study.PRESETS["tiny"], "in context").eval()
    found = learning.heldout_loss(network, process_of(network, {"name": "flow"}), data, space)
    latents = space.draw(data.mean, data.std, torch.zeros_like(data.mean))
    assert found == pytest.approx(1 + latents.square().mean().item(), rel=0.02)


# ---- the study ----


def test_networks_of_the_study_have_as_many_parameters():
    plan = caption_study.PRESETS["small"]
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in caption_study.network_of(plan, name).parameters())
            for name in caption_study.NETWORKS
        }
    assert max(counts.values()) < 1.05 * min(counts.values()), counts


def test_a_study_has_every_network_and_goes_on(tmp_path, monkeypatch, capsys, loaded, judge):
    parts, *rest = loaded
    few = {name: digits.chosen(slice(40)) for name, digits in parts.items()}
    for name, value in {"load_captioned": (few, *rest), "load_judge": judge}.items():
        monkeypatch.setattr(caption_study, name, lambda *_, value=value: value)
    monkeypatch.setattr(caption_study, "SEEDS", (0,))
    plan = caption_study.PRESETS["tiny"]
    flags = ["--output", str(tmp_path / "study"), "--preset", "tiny", "--device", "cpu"]
    caption_study.main([*flags, "--workers", "1"])
    points = tmp_path / "study" / "points.jsonl"
    text = points.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["network"] for row in rows] == list(caption_study.NETWORKS)
    for row in rows:
        assert [place["step"] for place in row["curve"]] == list(plan.scored_at)
        assert row["curve"][-1]["heldout_mse"] < 2.2 and 0 <= row["left_out"]["all"] <= 1
    first, *rest = text.splitlines(keepends=True)
    points.write_text("".join(rest))
    capsys.readouterr()
    caption_study.main([*flags, "--workers", "1"])
    assert "2 networks are done, 1 are left" in capsys.readouterr().out
    again = json.loads(points.read_text().splitlines()[0])
    assert {**again, "seconds": 0} == {**rows[0], "seconds": 0}


def test_committed_numbers_are_whole_and_drawn(tmp_path, capsys):
    caption_plot.main(["--output", str(tmp_path)])
    page = (EXAMPLE / "README.md").read_text()
    assert all(line in page for line in capsys.readouterr().out.splitlines())
    assert (tmp_path / "captions.svg").read_bytes() == (ROOT / "docs/captions.svg").read_bytes()


# ---- the committed network ----


def test_committed_weights_are_small_and_draw_what_is_asked(judge, loaded):
    assert WEIGHTS.stat().st_size <= 8 * 10**6
    args = judge_captions.build_parser().parse_args(["--num-sampling-steps", "6"])
    sampler = judge_captions.load_sampler(args)
    asked = judge_captions.repeated(list(words.every_prompt()), 50)
    found = judge_captions.judged(judge, sampler, asked, seed=1)
    assert found["digit"] >= 0.9 and found["thickness"] >= 0.7 and found["slant"] >= 0.7


def test_judging_tells_all_figures(tmp_path, capsys):
    path = tmp_path / "judged.json"
    judge_captions.main(
        ["--num-samples", "20", "--num-sampling-steps", "2", "--output", str(path)]
    )
    found, committed = (
        json.loads(file.read_text()) for file in (path, EXAMPLE / "results" / "judged.json")
    )
    assert json.loads(capsys.readouterr().out) == found and found.keys() == committed.keys()
    assert found["all prompts"]["samples"] == 20 and len(found["guidance"]) == 5
    for shares in found["negative prompt"].values():
        assert sum(shares[word] for word in words.WORDS["slant"]) == pytest.approx(1)
    assert sum(found["empty prompt"][name] for name in words.DIGITS) == pytest.approx(1)


def test_other_checkpoints_are_refused(capsys):
    digits = ROOT / "examples" / "digits" / "dit.safetensors"
    with pytest.raises(SystemExit):
        judge_captions.main(["--ckpt", str(digits), "--num-samples", "20"])
    assert "make_captions.py" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        judge_captions.main(["--num-samples", "3"])
    assert "--num-samples is 3; it must be" in capsys.readouterr().err
