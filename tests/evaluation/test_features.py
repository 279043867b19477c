"""features.py: Inception tapped where it should be, classifiers, pixels, and how work is dealt and
put together.
"""

import hashlib
import json
from pathlib import Path

import pytest
from safetensors.torch import save_file
import timm
import torch
import torch.nn.functional as F

from conftest import ROOT, generator
from evaluation import features
from evaluation.features import Extractor, Rows, load_extractor
from evaluation.summaries import deal, spread, summarize
from runtime.team import Team
from evaluation.metrics import Moments

CPU = torch.device("cpu")
CLASSIFIER = ROOT / "examples" / "digits" / "classifier"


def images(n=6, side=12, seed=0):
    return torch.randint(0, 256, (n, 3, side, side), generator=generator(seed), dtype=torch.uint8)


# ---- Inception ----

# Every stage that the network consists of, in order, with the shape of what leaves it for an image
# of any size.
STAGES = {
    "Conv2d_1a_3x3": (32, 149, 149), "Conv2d_2a_3x3": (32, 147, 147),
    "Conv2d_2b_3x3": (64, 147, 147), "MaxPool_1": (64, 73, 73), "Conv2d_3b_1x1": (80, 73, 73),
    "Conv2d_4a_3x3": (192, 71, 71), "MaxPool_2": (192, 35, 35), "Mixed_5b": (256, 35, 35),
    "Mixed_5c": (288, 35, 35), "Mixed_5d": (288, 35, 35), "Mixed_6a": (768, 17, 17),
    "Mixed_6b": (768, 17, 17), "Mixed_6c": (768, 17, 17), "Mixed_6d": (768, 17, 17),
    "Mixed_6e": (768, 17, 17), "Mixed_7a": (1280, 8, 8), "Mixed_7b": (2048, 8, 8),
    "Mixed_7c": (2048, 8, 8), "AvgPool": (2048, 1, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def walk(inception_weights):
    """The extractor, its Rows of two images, and what entered and left each stage on the way, in
    order.
    """
    extractor = load_extractor("inception", CPU, inception_weights)
    seen = {}
    hooks = [
        getattr(extractor.extract.trunk, name).register_forward_hook(
            lambda module, args, output, name=name: seen.update(
                {name: (args[0].clone(), output.clone())}
            )
        )
        for name in STAGES
    ]
    rows = extractor(images(2, 40))
    for hook in hooks:
        hook.remove()
    return extractor, rows, seen


def test_every_stage_of_inception_has_its_place_and_shape(walk):
    _, _, seen = walk
    assert list(seen) == list(STAGES)
    assert {name: tuple(output.shape[1:]) for name, (_, output) in seen.items()} == STAGES
    stages = list(STAGES)
    for before, after in zip(stages, stages[1:]):
        assert torch.equal(seen[before][1], seen[after][0])
    assert all(output.std() > 1e-3 for _, output in seen.values())


def test_pooled_features_are_means_over_the_last_stage(walk):
    _, rows, seen = walk
    assert rows.features.shape == (2, 2048) and rows.features.dtype == torch.float32
    assert torch.allclose(rows.features, seen["Mixed_7c"][1].mean(dim=(2, 3)), atol=1e-5)


def test_spatial_features_are_seven_channels_of_mixed_6_in_tensorflows_order(walk):
    """mixed_6/conv of the TensorFlow graph: 1×1 convolution, batch norm and ReLU on what enters
    Mixed_6d.
    """
    extractor, rows, seen = walk
    assert rows.spatial.shape == (2, 17 * 17 * 7)
    branch = extractor.extract.trunk.Mixed_6d.branch1x1
    normed = F.conv2d(seen["Mixed_6d"][0], branch.conv.weight)
    normed = F.batch_norm(
        normed, branch.bn.running_mean, branch.bn.running_var, branch.bn.weight, branch.bn.bias,
        eps=1e-3,
    )  # fmt: skip
    found = rows.spatial.reshape(2, 17, 17, 7)
    for y, x, channel in [(0, 0, 0), (3, 11, 2), (16, 5, 6), (8, 8, 4)]:
        assert torch.allclose(found[:, y, x, channel], normed.relu()[:, channel, y, x], atol=1e-5)
    # The block's own first channels
    assert torch.allclose(found[..., 6], seen["Mixed_6d"][1][:, 6], atol=1e-5)
    assert found.std() > 1e-3


def test_logits_have_no_bias(walk):
    extractor, rows, _ = walk
    head = extractor.extract.trunk.fc
    assert rows.logits.shape == (2, 1008) and head.bias.abs().max() > 0.1
    assert torch.allclose(rows.logits, rows.features @ head.weight.T, atol=1e-4)


def test_images_enter_inception_as_in_tensorflow(walk):
    """299×299 by TensorFlow 1's bilinear rule, out[i] from in[i·in/out], then (x - 128) / 128."""
    _, _, seen = walk
    source = images(2, 40).float()
    places = torch.arange(299) * torch.tensor(40 / 299)
    low = places.long()
    high, share = (low + 1).clamp(max=39), places - low
    rows = source[:, :, low] + (source[:, :, high] - source[:, :, low]) * share[:, None]
    both = rows[..., low] + (rows[..., high] - rows[..., low]) * share
    assert torch.allclose(seen["Conv2d_1a_3x3"][0], (both - 128) / 128, atol=1e-5)


def test_inception_weights_that_are_none(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pickle.pth")
    for name in ("other.pth", "text.pth", "pickle.pth"):
        with pytest.raises(
            ValueError, match=f"{name} holds other weights .* as `inception_weights`"
        ) as raised:
            load_extractor("inception", CPU, tmp_path / name)
        # PyTorch's own advice is to do without that safeguard
        assert "weights_only" not in str(raised.value)
    with pytest.raises(ValueError, match="cannot read .*missing.pth"):
        load_extractor("inception", CPU, tmp_path / "missing.pth")


def test_inception_that_cannot_be_had(tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(url, path, hash_prefix):
        assert url == URL_INCEPTION_V3 and hash_prefix == "6726825d"
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(
        ValueError,
        match="no route to host.*put it at .*6726825d.pth, or pass evaluate.py `inception_w",
    ):
        load_extractor("inception", CPU)
    monkeypatch.setattr(features, "is_installed", lambda name: False)
    with pytest.raises(ValueError, match="needs torch-fidelity: pip install torch-fidelity"):
        load_extractor("inception", CPU)


def test_inception_is_fetched_once(tmp_path, monkeypatch, inception_weights):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    fetched = []

    def fetch(url, path, hash_prefix):
        fetched.append(url)
        Path(path).write_bytes(inception_weights.read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    first, second = (load_extractor("inception", CPU) for _ in range(2))
    assert len(fetched) == 1
    assert (
        first.sha256 == second.sha256 == hashlib.sha256(inception_weights.read_bytes()).hexdigest()
    )


# ---- classifiers and pixels ----


class Tiny(torch.nn.Module):
    """Two features of an image, and with both=True also logits."""

    def __init__(self, both: bool):
        super().__init__()
        self.both, self.head = both, torch.nn.Linear(2, 5)

    def forward(self, images):
        x = torch.stack(
            [images.float().mean(dim=(1, 2, 3)), images.float().amax(dim=(1, 2, 3))], dim=1
        )
        return x, self.head(x)


def test_a_torchscript_file_gives_features_and_logits(tmp_path):
    tiny = Tiny(True)
    torch.jit.script(tiny).save(str(tmp_path / "tiny.ts"))
    extractor = load_extractor(str(tmp_path / "tiny.ts"), CPU)
    rows, (wanted, logits) = extractor(images()), tiny(images())
    assert (
        torch.equal(rows.features, wanted)
        and torch.equal(rows.logits, logits)
        and rows.spatial is None
    )
    assert extractor.sha256 == hashlib.sha256((tmp_path / "tiny.ts").read_bytes()).hexdigest()
    torch.jit.trace(lambda x: x.float().mean(dim=(2, 3)), images(1)).save(
        str(tmp_path / "plain.ts")
    )
    rows = load_extractor(str(tmp_path / "plain.ts"), CPU)(images())
    assert rows.features.shape == (6, 3) and rows.logits is None


@pytest.mark.parametrize("function, message", [
    (lambda x: x.float().mean(dim=2),
     r"gives \(2, 3, 12\) features and None logits for 2 images; wanted are \(2, D\)"),
    (lambda x: x.float().mean(), r"gives \(\) features"),
    (lambda x: (x.float().mean(dim=(2, 3)),) * 3,
     r"cannot be used on uint8 images of 12x12 \(ValueError: too many"),
    (lambda x: {"features": x.float().mean(dim=(2, 3))},
     r"cannot be used on uint8 images of 12x12"),
    (lambda x: torch.nn.functional.conv2d(x, torch.ones(4, 3, 2, 2)).mean(dim=(2, 3)),
     r"cannot be used on uint8 images"),
])  # fmt: skip
def test_networks_that_give_something_else_are_found_out_on_two_images(tmp_path, function, message):
    example = images(1).float() if "conv2d" in function.__code__.co_names else images(1)
    torch.jit.trace(function, example, strict=False).save(str(tmp_path / "odd.ts"))
    with pytest.raises(ValueError, match=message):
        load_extractor(str(tmp_path / "odd.ts"), CPU).dimensions((12, 12), CPU)


def test_logits_without_features_are_found_out():
    with pytest.raises(
        ValueError, match=r"gives None features and \(2, 5\) logits for 2 images; wanted are"
    ):
        Extractor(lambda images: Rows(None, None, torch.zeros(2, 5)), "odd").dimensions(
            (12, 12), CPU
        )


def test_a_timm_classifier_gives_what_timm_computes():
    config = json.loads((CLASSIFIER / "config.json").read_text())
    model = timm.create_model(
        "resnet10t", checkpoint_path=CLASSIFIER / "model.safetensors", **config["model_args"]
    ).eval()
    for path in (CLASSIFIER, CLASSIFIER / "model.safetensors"):
        rows = load_extractor(str(path), CPU)(images(4, 32))
        x = images(4, 32).float() / 127.5 - 1
        assert torch.allclose(rows.logits, model(x), atol=1e-5) and rows.features.shape == (4, 64)
        assert torch.allclose(rows.features, model.forward_features(x).mean(dim=(2, 3)), atol=1e-5)
    # Brought to its size
    assert load_extractor(str(CLASSIFIER), CPU)(images(1, 48)).features.shape == (1, 64)


def test_a_network_without_a_classifier_has_no_logits(tmp_path):
    from timm.models import save_for_hf

    options = {"stem_width": 8, "stem_type": "", "channels": [8, 8, 8, 8], "num_classes": 0}
    save_for_hf(
        timm.create_model("resnet10t", **options), tmp_path / "bare", model_args=options,
        safe_serialization=True,
    )  # fmt: skip
    rows = load_extractor(str(tmp_path / "bare"), CPU)(images(2, 32))
    assert rows.features.shape == (2, 8) and rows.logits is None


def test_pixels_are_grey_levels_from_0_to_1():
    rows = load_extractor("pixels", CPU)(images())
    assert (
        torch.equal(rows.features, images().flatten(1) / 255)
        and rows.logits is rows.spatial is None
    )
    assert load_extractor("pixels", CPU).dimensions((5, 4), CPU) == (60, None)
    with pytest.raises(
        ValueError, match="`features` pixels makes 12,288 features of an image of 64x64"
    ):
        load_extractor("pixels", CPU).dimensions((64, 64), CPU)


def test_features_that_cannot_be_loaded(tmp_path):
    (tmp_path / "text.ts").write_text("nothing")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    for name, message in {
        "no": "there is no file no; give inception, pixels",
        str(CLASSIFIER.parent): "there is no file .*digits/model.safetensors",
        str(tmp_path / "text.ts"): "is no TorchScript file",
        str(tmp_path): "model.safetensors cannot be loaded .* with config.json beside it",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_extractor(name, CPU)
    (tmp_path / "config.json").write_text((CLASSIFIER / "config.json").read_text())
    with pytest.raises(ValueError, match="cannot be loaded .*Missing key|cannot be loaded .*Error"):
        load_extractor(str(tmp_path), CPU)


def changed(folder, **changes):
    """A copy of the digits' classifier with other entries in config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes((CLASSIFIER / "model.safetensors").read_bytes())
    config = json.loads((CLASSIFIER / "config.json").read_text())
    args = config["model_args"] | changes.pop("model_args", {})
    text = json.dumps(config | {"model_args": args} | changes, ensure_ascii=False)
    (folder / "config.json").write_text(text, encoding="utf-8-sig")
    return str(folder)


def test_a_timm_configuration_loads_nothing_beside_its_weights(tmp_path, monkeypatch):
    """Arguments of the factory, which fetch or open files, are dropped; those of the network itself
    count.
    """
    given = []
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model",
        lambda name, **options: given.append(options) or create(name, **options),
    )  # fmt: skip
    hostile = {
        "pretrained": True, "checkpoint_path": str(tmp_path / "evil.pt"), "pretrained_cfg": "x",
        "cache_dir": "/tmp", "pretrained_cfg_overlay": "x", "pretrained_strict": False,
        "features_only": True, "scriptable": True, "made_up": 1,
    }  # fmt: skip
    rows = load_extractor(changed(tmp_path / "c", model_args=hostile), CPU)(images(2, 32))
    assert torch.equal(rows.features, load_extractor(str(CLASSIFIER), CPU)(images(2, 32)).features)
    assert not hostile.keys() & given[0].keys() and given[0]["channels"] == [16, 32, 64, 64]


@pytest.mark.parametrize("changes, says", [
    ({"architecture": "hf-hub:some/one"}, "none of timm's"),
    ({"architecture": 5}, "none of timm's"),
    ({"architecture": "local-dir:/x"}, "none of timm's"),
    ({"model_args": {"num_classes": 10**9}}, "num_classes is 1000000000, far beyond"),
    ({"model_args": {"layers": [10**6] * 4}}, "layers is 1000000, far beyond"),
    ({"model_args": 5}, "TypeError"),
    ({"model_args": {"stem_width": {"a": 1}}}, "stem_width holds a dict"),
    ({"pretrained_cfg": 5}, "TypeError"),
    ({"pretrained_cfg": {"input_size": [3, 10**9, 4]}}, "input_size is no list"),
    ({"model_args": {"num_classes": "x"}}, "cannot be loaded"),
    ({"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [1, 1, 1], "std": [0, 1, 1]}},
     "those of std above 0"),
    ({"pretrained_cfg": {"input_size": [3, 32, 32], "mean": ["x"], "std": [1, 1, 1]}},
     "cannot be loaded"),
])  # fmt: skip
def test_nonsense_in_a_timm_configuration_is_one_message(tmp_path, changes, says):
    if not isinstance(changes.get("model_args", {}), dict):
        folder = changed(tmp_path / "c")
        config = json.loads((tmp_path / "c" / "config.json").read_text(encoding="utf-8-sig"))
        (tmp_path / "c" / "config.json").write_text(json.dumps(config | changes))
    else:
        folder = changed(tmp_path / "c", **changes)
    with pytest.raises(
        ValueError,
        match=rf"`features` {folder}/model.safetensors cannot be loaded .*{says}|{says}.*",
    ):
        load_extractor(folder, CPU)


# ---- many images ----


@pytest.mark.parametrize(
    "count, batch_size, world_size", [(10, 3, 1), (10, 3, 2), (1, 4, 3), (24, 4, 3), (7, 1, 4)]
)
def test_every_image_is_dealt_once_and_in_order(count, batch_size, world_size):
    hands = [list(deal(count, batch_size, Team(rank, world_size))) for rank in range(world_size)]
    assert len({len(hand) for hand in hands}) == 1 and all(
        len(batch) == batch_size for hand in hands for batch in hand
    )
    order = [i for turn in zip(*hands) for batch in turn for i in batch]
    assert order[:count] == list(range(count)) and set(order[count:]) <= {count - 1}


def test_spread_reaches_from_beginning_to_end():
    assert spread(5, 10) == [0, 1, 2, 3, 4] and spread(10, 5) == [0, 2, 4, 6, 8]
    chosen = spread(1_281_167, 10_000)
    assert len(set(chosen)) == 10_000 and chosen[0] == 0 and chosen[-1] > 1_281_000


def numbers(count):
    """An extractor and images with two features, a spatial one and logits that are functions of the
    image's number.
    """
    def extract(batch):
        x = batch.float()
        return Rows(torch.cat([x, x**2], dim=1), x + 1, torch.cat([x, -x, x], dim=1))

    return Extractor(extract, "numbers"), torch.arange(count, dtype=torch.float32)[:, None]


@pytest.mark.parametrize("batch_size", [1, 4, 11, 20])
def test_a_summary_is_of_all_images_in_their_order(batch_size):
    extractor, source = numbers(11)
    batches = ((source[batch], source[batch].to(torch.uint8)) for batch in deal(11, batch_size))
    summary, digests = summarize(extractor, batches, 11, with_logits=True)
    assert torch.equal(summary.features, torch.cat([source, source**2], dim=1))
    assert torch.equal(
        digests[:, 0], torch.arange(11, dtype=torch.uint8)
    ) and summary.logits.shape == (11, 3)
    moments = Moments()
    moments.add(summary.features)
    for found, wanted in zip(summary.statistics, moments.statistics()):
        assert found == pytest.approx(wanted, rel=1e-12)
    assert summary.spatial.mean == pytest.approx([6.0])


def test_a_summary_keeps_evenly_spread_features():
    extractor, source = numbers(40)
    summary, digests = summarize(
        extractor, ((source[batch], None) for batch in deal(40, 7)), 40, keep=10
    )
    assert (
        summary.features[:, 0].tolist() == spread(40, 10)
        and digests is None
        and summary.logits is None
    )
    assert summary.statistics.mean[0] == pytest.approx(19.5)


def test_processes_together_give_the_summary_of_one():
    """The rows of each turn are put together as gather would; the first process keeps them, the
    others nothing.
    """
    extractor, source = numbers(11)
    turns = list(zip(*(deal(11, 2, Team(rank, 3)) for rank in range(3))))

    def gathered(rows):
        both = [extractor(source[batch]) for batch in next(progress)]
        return [torch.cat(parts) for parts in zip(*(row[: len(rows)] for row in both))]

    progress = iter(turns)
    mine = ((source[turn[0]], None) for turn in turns)
    summary, _ = summarize(extractor, mine, 11, with_logits=True, team=Team(0, 3, gathered))
    alone, _ = summarize(extractor, ((source[b], None) for b in deal(11, 4)), 11, with_logits=True)
    assert torch.equal(summary.features, alone.features) and torch.equal(
        summary.logits, alone.logits
    )
    assert summary.statistics.covariance == pytest.approx(alone.statistics.covariance, rel=1e-12)
    progress = iter(turns)
    assert summarize(
        extractor, ((source[turn[1]], None) for turn in turns), 11, team=Team(1, 3, gathered)
    ) == (None, None)


@pytest.mark.gpu
def test_features_on_a_gpu_are_those_of_the_cpu(inception_weights):
    rows = [
        load_extractor("inception", torch.device(d), inception_weights)(images(4, 64).to(d))
        for d in ("cpu", "cuda")
    ]
    for on_cpu, on_gpu in zip(*rows):
        assert torch.allclose(on_cpu, on_gpu.cpu(), rtol=1e-3, atol=1e-3)
    moments = [Moments(), Moments()]
    for one, row in zip(moments, rows):
        one.add(row.features)
    assert moments[0].statistics().covariance == pytest.approx(
        moments[1].statistics().covariance, rel=1e-2, abs=1e-4
    )
