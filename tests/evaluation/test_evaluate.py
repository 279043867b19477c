"""evaluate.py and evaluation: what can be compared, what a report says, reference files, and
what users get wrong.
"""

from dataclasses import replace
import hashlib
import json
import zipfile

import numpy as np
from PIL import Image
import pytest
import torch

from conftest import ROOT
import evaluate
import evaluation
from evaluation import image_sets
from evaluation import metrics
from evaluation import remarks
from evaluation import remarks
from evaluation import report as evaluation_report
from evaluation import inputs
from runtime import npz
from evaluation.features import load_extractor
from evaluation.inputs import open_input
from evaluation.options import EvaluationOptions
from runtime.npz import open_array, write_npz
from starts import each_start
from test_metrics import exponential_divergence, shares

CLASSIFIER = str(ROOT / "examples" / "digits" / "classifier")
QUICK = ["--device", "cpu", "--num-workers", "0", "--batch-size", "16"]
CPU = torch.device("cpu")


def pictures(count, side=8, seed=0):
    """Smooth random images uint8 (count, side, side, 3)."""
    source = np.random.default_rng(seed)
    rough = source.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side))) for image in rough])


def write_folder(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:06d}.png")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder holding two sets of 8×8 images, each as a folder and as an .npz."""
    root = tmp_path_factory.mktemp("sets")
    for name, count, seed in (("samples", 240, 0), ("real", 300, 1)):
        images = pictures(count, seed=seed)
        write_folder(root / name, images)
        np.savez(root / f"{name}.npz", images)
    return root


@pytest.fixture(autouse=True)
def fresh_accelerator():
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def run(capsys, *flags):
    """evaluate.main with these flags; (what it reports, what it says beside it)."""
    evaluate.main([*QUICK, *map(str, flags)])
    out, err = capsys.readouterr()
    return (json.loads(out) if out.startswith("{") else out), err


def refused(capsys, *flags):
    """The message that these flags get."""
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*QUICK, *map(str, flags)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


# ---- scores ----


def test_folder_and_npz_are_the_same_set(sets, capsys):
    reports = [
        run(
            capsys,
            "--samples",
            sets / f"samples{a}",
            "--reference",
            sets / f"real{b}",
            "--features",
            CLASSIFIER,
        )[0]
        for a, b in (("", ""), (".npz", ".npz"), (".npz", ""))
    ]
    assert reports[0]["scores"] == reports[1]["scores"] == reports[2]["scores"]
    for side in ("samples", "reference"):
        assert len({report[side]["sha256_of_pixels"] for report in reports}) == 1
    first = reports[0]
    assert first["samples"] | {"path": 0, "sha256_of_pixels": 0} == {
        "path": 0, "images": 240, "size": [8, 8], "sha256_of_pixels": 0, "sha256_of_file": None,
    }  # fmt: skip
    assert first["features"]["dimension"] == 64 and len(first["features"]["sha256"]) == 64
    assert first["settings"] == {
        "neighbours": 3, "reference_images_in_precision_and_recall": 300,
        "inception_score_split": 5000, "device": "cpu",
    }  # fmt: skip
    assert torch.__version__.startswith(first["versions"]["torch"])


def test_scores_are_those_computed_from_the_features_one_by_one(sets, capsys):
    scores = run(
        capsys, "--samples", sets / "samples", "--reference", sets / "real", "--features",
        CLASSIFIER,
    )[0]["scores"]  # fmt: skip
    extractor = load_extractor(CLASSIFIER, CPU)
    ours, theirs = (
        extractor(torch.from_numpy(pictures(count, seed=seed)).permute(0, 3, 1, 2))
        for count, seed in ((240, 0), (300, 1))
    )
    a, b = (rows.features.double().numpy() for rows in (ours, theirs))
    from scipy.linalg import sqrtm

    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    fid = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(
        first + second - 2 * sqrtm(first @ second).real
    )
    # float32 features in another batch, of almost equal directions
    assert scores["fid"] == pytest.approx(fid, rel=1e-4)
    assert (scores["precision"], scores["recall"]) == pytest.approx(shares(a, b, 3), abs=0.01)
    probabilities = ours.logits.double().softmax(dim=1).numpy()
    assert scores["inception_score"] == pytest.approx(
        exponential_divergence(probabilities), rel=1e-5
    )
    assert scores["sfid"] is None


def test_a_set_against_itself(sets, capsys):
    report, err = run(
        capsys, "--samples", sets / "real", "--reference", sets / "real.npz", "--features", "pixels"
    )
    assert report["scores"] | {"fid": 0} == {
        "fid": 0, "sfid": None, "inception_score": None, "precision": 1, "recall": 1,
    }  # fmt: skip
    assert 0 <= report["scores"]["fid"] < 1e-8
    assert "300 samples; published scores are of 50,000" in err and "too few for" not in err


def once_each(function):
    """The function of an array, computed once for each array: 2,048 eigenvectors take seconds."""
    found = {}

    def remembered(array):
        key = array.tobytes()
        if key not in found:
            found[key] = function(array)
        return found[key]

    return remembered


def test_reference_of_adm_with_inception(sets, capsys, tmp_path, inception_weights, monkeypatch):
    """A file with mu, sigma, mu_s, sigma_s and arr_0, made here, scores like the images that it was
    made of.
    """
    monkeypatch.setattr(metrics, "_root", once_each(metrics._root))
    images = pictures(6, seed=3)
    folder, flags = (
        write_folder(tmp_path / "real", images),
        ["--inception-weights", inception_weights, "--batch-size", "3"],
    )
    samples = write_folder(tmp_path / "samples", pictures(5, seed=4))
    out, _ = run(capsys, "--make-reference", folder, "--output", tmp_path / "ref.npz", *flags)
    assert "mu, sigma, mu_s, sigma_s, arr_0, made_from of 6 images, 6 of them as arr_0" in out
    with np.load(tmp_path / "ref.npz") as file:
        assert {name: file[name].shape for name in ("mu", "sigma", "mu_s", "sigma_s")} == {
            "mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023),
        }  # fmt: skip
        assert np.array_equal(file["arr_0"], images) and file["mu"].dtype == np.float64
        rows = load_extractor("inception", CPU, inception_weights)(
            torch.from_numpy(images).permute(0, 3, 1, 2)
        )
        assert np.allclose(file["mu_s"], rows.spatial.double().mean(0), atol=1e-5)
        assert np.allclose(
            file["sigma"], np.cov(rows.features.double().numpy(), rowvar=False), atol=1e-5
        )
        as_adm = {name: file[name] for name in file.files if name != "made_from"}
    np.savez(tmp_path / "adm.npz", **as_adm)
    (from_folder, err), *from_files = (
        run(capsys, "--samples", samples, "--reference", path, *flags)
        for path in (folder, tmp_path / "adm.npz")
    )
    assert all(value is not None for value in from_folder["scores"].values())
    for report, _ in from_files:
        assert report["scores"] == pytest.approx(from_folder["scores"], rel=1e-9)
        assert len(report["reference"]["sha256_of_file"]) == 64
    for too_few in ("5 samples", "6 reference images"):
        assert f"{too_few} are too few for 2,048 features: their covariance has no full rank" in err


def test_file_statistics_come_before_those_of_its_images(sets, capsys, tmp_path):
    """As in ADM's files, whose mu and sigma are of the whole training set and arr_0 of 10,000
    images.
    """
    run(
        capsys, "--make-reference", sets / "real", "--output", tmp_path / "whole.npz", "--features",
        "pixels",
    )  # fmt: skip
    whole = np.load(tmp_path / "whole.npz")
    np.savez(
        tmp_path / "part.npz", mu=whole["mu"], sigma=whole["sigma"], arr_0=pictures(100, seed=9)
    )
    found = {
        name: run(
            capsys,
            "--samples",
            sets / "samples",
            "--reference",
            tmp_path / name,
            "--features",
            "pixels",
        )[0]["scores"]
        for name in ("whole.npz", "part.npz")
    }
    assert (
        found["whole.npz"]["fid"] == found["part.npz"]["fid"]
        and found["part.npz"]["recall"] != found["whole.npz"]["recall"]
    )


def test_statistics_alone_leave_some_scores(sets, capsys, tmp_path):
    run(
        capsys, "--make-reference", sets / "real", "--output", tmp_path / "whole.npz", "--features",
        "pixels",
    )  # fmt: skip
    whole = np.load(tmp_path / "whole.npz")
    np.savez(tmp_path / "bare.npz", mu=whole["mu"], sigma=whole["sigma"])
    report, err = run(
        capsys, "--samples", sets / "samples", "--reference", tmp_path / "bare.npz", "--features",
        "pixels",
    )  # fmt: skip
    assert [name for name, value in report["scores"].items() if value is not None] == ["fid"]
    assert (
        "precision needs more than 3 images; recall needs more than 3 images. What remains: fid"
        in err
    )
    assert report["reference"]["images"] is None and report["notes"][-1] in err


def test_spatial_statistics_alone_leave_nothing(sets, capsys, tmp_path):
    np.savez(tmp_path / "s.npz", mu_s=np.ones(7), sigma_s=np.eye(7))
    report, err = run(
        capsys, "--samples", sets / "samples", "--reference", tmp_path / "s.npz", "--features",
        "pixels",
    )  # fmt: skip
    assert set(report["scores"].values()) == {None} and "What remains: nothing" in err


def test_a_reference_of_three_images_has_no_third_neighbours(sets, capsys, tmp_path):
    np.savez(tmp_path / "three.npz", pictures(3))
    report, err = run(
        capsys, "--samples", sets / "samples", "--reference", tmp_path / "three.npz", "--features",
        "pixels",
    )  # fmt: skip
    assert [name for name, value in report["scores"].items() if value is not None] == ["fid"]
    assert (
        "recall needs more than 3 images" in err
        and "3 reference images are too few for 192 features" in err
    )


def test_all_images_of_a_file_count_and_of_a_folder_those_that_are_kept(sets, capsys, monkeypatch):
    monkeypatch.setattr(inputs, "MANIFOLD_IMAGES", 100)
    for name, kept in (("real.npz", 300), ("real", 100)):
        report, _ = run(
            capsys, "--samples", sets / "samples", "--reference", sets / name, "--features",
            "pixels",
        )  # fmt: skip
        assert report["settings"]["reference_images_in_precision_and_recall"] == kept


def test_what_is_odd_is_remarked(sets, capsys, tmp_path):
    run(
        capsys, "--make-reference", sets / "real", "--output", tmp_path / "r.npz", "--features",
        "pixels",
    )  # fmt: skip
    flags = ["--features", "pixels"]
    swapped = run(capsys, "--samples", tmp_path / "r.npz", "--reference", sets / "samples", *flags)[
        1
    ]
    assert "r.npz has statistics as a reference has; of samples the images alone count" in swapped
    pooled = run(capsys, "--samples", sets, "--reference", sets / "real", *flags)[1]
    assert "540 samples; " in pooled and f"samples come from 2 folders at or below {sets}" in pooled
    whole = np.load(tmp_path / "r.npz")
    np.savez(tmp_path / "unsigned.npz", **{name: whole[name] for name in ("mu", "sigma", "arr_0")})
    unsigned = run(
        capsys, "--samples", sets / "samples", "--reference", tmp_path / "unsigned.npz", *flags
    )[1]
    assert (
        "does not say of which features its mu and sigma are; taken for those of pixels" in unsigned
    )


def test_an_unfinished_folder_of_samples_is_refused(sets, capsys, tmp_path):
    folder = write_folder(tmp_path / "s", pictures(5))
    (folder / "manifest.json").write_text(json.dumps({"decides": {"num_fid_samples": 6}}))
    err = refused(capsys, "--samples", folder, "--reference", sets / "real", "--features", "pixels")
    assert (
        "holds 5 images, its manifest.json says 6: give the same sample_ddp.py command again" in err
    )
    (folder / "manifest.json").write_text("[" * 100_000)
    run(capsys, "--samples", folder, "--reference", sets / "real", "--features", "pixels")


def test_another_order_of_samples_changes_hash_and_nothing_else(sets, capsys, tmp_path):
    np.savez(tmp_path / "turned.npz", pictures(240)[::-1])
    flags = ["--reference", sets / "real", "--features", "pixels"]
    a, b = (
        run(capsys, "--samples", path, *flags)[0]
        for path in (sets / "samples", tmp_path / "turned.npz")
    )
    assert a["samples"]["sha256_of_pixels"] != b["samples"]["sha256_of_pixels"]
    assert (
        a["scores"]["fid"] == pytest.approx(b["scores"]["fid"], rel=1e-9)
        and a["scores"]["recall"] == b["scores"]["recall"]
    )


@each_start
def test_two_processes_score_like_one(sets, capsys, tmp_path, start):
    flags = [
        "--samples", sets / "samples", "--reference", sets / "real", "--features", CLASSIFIER,
        *QUICK,
    ]  # fmt: skip
    alone = run(capsys, *flags)[0]
    more = ["--num-workers", "1", "--output", tmp_path / "two.json"]
    done = start("evaluate.py", *flags, *more, processes=2)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    assert (
        json.loads(done.stdout) == two
        and two["samples"] == alone["samples"]
        and two["reference"] == alone["reference"]
    )
    assert two["scores"].pop("sfid") is alone["scores"].pop("sfid") is None
    assert two["scores"] == pytest.approx(alone["scores"], rel=1e-5)


def test_reference_of_photographs_is_cropped_as_training_crops(capsys, tmp_path):
    folder = tmp_path / "photographs" / "a"
    folder.mkdir(parents=True)
    for i, (mode, size) in enumerate(
        [("RGB", (30, 20)), ("L", (16, 16)), ("RGBA", (9, 40)), ("RGB", (8, 8))]
    ):
        Image.fromarray(pictures(1, 40, i)[0]).resize(size).convert(mode).save(folder / f"{i}.png")
    out, _ = run(
        capsys, "--make-reference", folder.parent, "--image-size", "8", "--features", "pixels",
        "--output", tmp_path / "r.npz",
    )  # fmt: skip
    from data.images import ImageDataset
    from data.listing import list_images

    dataset = ImageDataset(list_images(folder, 0), 8)
    wanted = np.stack([dataset[i, False][0].permute(1, 2, 0).numpy() for i in range(4)])
    with np.load(tmp_path / "r.npz") as file:
        assert np.array_equal(file["arr_0"], wanted)
        made_from = json.loads(str(file["made_from"]))
    assert (
        made_from["images"] == 4
        and made_from["features"] == "pixels"
        and made_from["size"] == [8, 8]
    )


def test_a_reference_keeps_evenly_spread_images(sets, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_report, "MANIFOLD_IMAGES", 30)
    run(
        capsys, "--make-reference", sets / "real", "--output", tmp_path / "r.npz", "--features",
        "pixels",
    )  # fmt: skip
    with np.load(tmp_path / "r.npz") as file:
        assert np.array_equal(file["arr_0"], pictures(300, seed=1)[::10])


# ---- from Python ----


def test_an_evaluation_from_python_is_the_doors(sets, capsys, tmp_path):
    options = EvaluationOptions(
        samples=sets / "samples", reference=sets / "real", features="pixels", num_workers=0,
        batch_size=16, device="cpu",
    )  # fmt: skip
    flags = ["--samples", sets / "samples", "--reference", sets / "real", "--features", "pixels"]
    by_door, _ = run(capsys, *flags, "--output", tmp_path / "door.json")
    report = evaluation.evaluate(options)
    assert capsys.readouterr().out == "" and report == by_door
    evaluation.write_report(report, tmp_path / "python.json")
    assert (tmp_path / "python.json").read_bytes() == (tmp_path / "door.json").read_bytes()
    with pytest.raises(ValueError, match="^`batch_size` is 0; it must be at least 1$"):
        evaluation.evaluate(replace(options, batch_size=0))
    with pytest.raises(ValueError, match="^`samples` nowhere: there is no such file or folder"):
        evaluation.evaluate(replace(options, samples="nowhere"))


def test_a_reference_from_python_is_the_doors(sets, capsys, tmp_path):
    options = EvaluationOptions(
        make_reference=sets / "real", output=tmp_path / "python.npz", features="pixels",
        num_workers=0, batch_size=16, device="cpu",
    )  # fmt: skip
    told = evaluation.make_reference(options)
    flags = ["--make-reference", sets / "real", "--features", "pixels"]
    out, _ = run(capsys, *flags, "--output", tmp_path / "door.npz")
    assert out == f"{told}\n".replace("python.npz", "door.npz")
    assert (tmp_path / "python.npz").read_bytes() == (tmp_path / "door.npz").read_bytes()
    with pytest.raises(ValueError, match="`make_reference=DIR` goes with `output=FILE.npz`, and "):
        evaluation.make_reference(replace(options, output=None))


def test_flags_are_the_options_with_their_defaults():
    flags = vars(evaluate.build_parser().parse_args([]))
    of_others = {"likelihood", "clip", *evaluate.OF_LIKELIHOOD, *evaluate.OF_CLIP}
    of_others |= {"frames", *evaluate.OF_FRAMES}
    assert flags.keys() >= of_others
    others = {name: value for name, value in flags.items() if name not in of_others}
    assert others == vars(EvaluationOptions())


# ---- mistakes ----


def test_unequal_and_colourless_images_are_named(sets, capsys, tmp_path):
    folder = write_folder(tmp_path / "a", pictures(5))
    flags = ["--reference", sets / "real", "--features", "pixels"]
    Image.fromarray(pictures(1, 12)[0]).save(folder / "000003.png")
    assert (
        "000003.png is 12x12, " in (err := refused(capsys, "--samples", folder, *flags))
        and "000000.png is 8x8" in err
    )
    Image.fromarray(pictures(1)[0]).convert("L").save(folder / "000003.png")
    assert "000003.png is of mode L; wanted is RGB. Convert it" in refused(
        capsys, "--samples", folder, *flags
    )
    (folder / "000003.png").write_bytes(b"no picture")
    assert "000003.png cannot be read" in refused(capsys, "--samples", folder, *flags)
    Image.fromarray(pictures(1)[0]).save(folder / "000003.png")
    whole = (folder / "000003.png").read_bytes()
    (folder / "000003.png").write_bytes(whole[:-30])  # a header and no end
    for workers in ("0", "1"):
        assert "000003.png cannot be read" in refused(
            capsys, "--samples", folder, *flags, "--num-workers", workers
        )


@pytest.mark.parametrize("arrays, message", [
    ({"mu": np.ones(192), "sigma": np.full((192, 192), np.nan)},
     "mu or sigma has values that are not finite"),
    ({"mu": np.full(192, np.inf), "sigma": np.eye(192)},
     "mu or sigma has values that are not finite"),
    ({"mu": np.ones(192), "sigma": np.eye(191)},
     "mu has the shape (192,), sigma (191, 191); wanted are (D,) and (D, D)"),
    ({"mu": np.ones(2048), "sigma": np.eye(2048)},
     "has 2048 features in its mu and sigma, samples have 192 by --features pixels"),
    ({"arr_0": np.zeros((4, 8, 8, 3), np.float32)},
     "arr_0 is float32 (4, 8, 8, 3); wanted are images, uint8 (N, H, W, 3)"),
    ({"arr_0": np.zeros((4, 8, 8), np.uint8)}, "arr_0 is uint8 (4, 8, 8); wanted are images"),
    ({"arr_0": np.zeros((0, 8, 8, 3), np.uint8)}, "wanted are images, uint8 (N, H, W, 3)"),
    ({"images": np.zeros(3)}, "has images; wanted is arr_0 (uint8 images), or mu and sigma"),
    ({"arr_0": np.zeros((5, 8, 0, 3), np.uint8)}, "wanted are images, uint8 (N, H, W, 3)"),
    ({"arr_0": np.zeros((5, 9, 9, 3), np.uint8)},
     "has 243 features in its images, samples have 192 by --features pixels"),
    ({"mu": np.ones(192), "arr_0": np.zeros((5, 8, 8, 3), np.uint8)},
     "it has mu or sigma alone; wanted are both"),
    ({"mu": np.ones(0), "sigma": np.ones((0, 0))}, "mu has the shape (0,)"),
    ({"mu": np.array(["x"] * 3), "sigma": np.eye(3)},
     "mu is <U1, sigma float64; wanted are floating-point"),
    ({"arr_0": np.zeros((5, 8, 8, 3), np.uint8), "arr_1": np.zeros(4)},
     "5 images and arr_1, their labels, the shape (4,)"),
    ({"arr_0": np.zeros((5, 8, 8, 3), np.uint8), "arr_1": np.zeros(())},
     "5 images and arr_1, their labels, the shape ()"),
    ({"arr_0": np.zeros((1, 1, 20_000, 3), np.uint8)},
     "images of 20000x1; at most 16384 pixels a side"),
    ({"mu": np.ones(192), "sigma": -np.eye(192)},
     "sigma has variances below 0, so it is no covariance"),
    ({"arr_0": np.array([{}], object)}, "arr_0 holds Python objects, which are not read"),
])  # fmt: skip
def test_references_that_cannot_be_used(sets, capsys, tmp_path, arrays, message):
    np.savez(tmp_path / "r.npz", **arrays)
    err = refused(
        capsys, "--samples", sets / "samples", "--reference", tmp_path / "r.npz", "--features",
        "pixels",
    )  # fmt: skip
    assert message in err


def test_files_that_are_no_npz(sets, capsys, tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    whole = (sets / "real.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    flags = ["--samples", sets / "samples", "--features", "pixels", "--reference"]
    for name, message in {
        "text.npz": "text.npz cannot be read as an .npz",
        "short.npz": "short.npz cannot be read as an .npz",
        "missing": "there is no such file or folder; give a folder of images or an .npz",
    }.items():
        assert message in refused(capsys, *flags, tmp_path / name)
    assert "holds no images" in refused(capsys, *flags, tmp_path / "empty")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_changed_byte_in_an_npz_is_noticed(sets, capsys, tmp_path, save):
    save(tmp_path / "r.npz", pictures(300))
    content = bytearray((tmp_path / "r.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "r.npz").write_bytes(content)
    err = refused(
        capsys, "--samples", sets / "samples", "--reference", tmp_path / "r.npz", "--features",
        "pixels",
    )  # fmt: skip
    assert (
        "arr_0.npy is damaged; fetch or make it again" in err or "cannot be read as an .npz" in err
    )


HEADER = "{{'descr': '{0}', 'fortran_order': {1}, 'shape': {2}, }}"


@pytest.mark.parametrize("header, message", [
    (HEADER.format("|u1", False, (10**12, 8, 8, 3)), "arr_0 is cut short, or its header is wrong"),
    (HEADER.format("|u1", True, (10**12, 8, 8, 3)), "arr_0 is cut short, or its header is wrong"),
    (HEADER.format("|u1", False, (-5, 8, 8, 3)), "arr_0 is cut short, or its header is wrong"),
    (HEADER.format("|u1", False, (2**62, 2**62, 8, 3)),
     "arr_0 is cut short, or its header is wrong"),
    (HEADER.format("|O", False, (5, 8, 8, 3)), "arr_0 holds Python objects"),
    (HEADER.format("|V0", False, ()), "arr_0"),
    (HEADER.format("nonsense", False, (5,)), "arr_0 has a header that is none"),
    ("5", "arr_0 has a header that is none"),
    (HEADER.format("|u1", False, "(" * 5000), "arr_0 has a header that is none"),
    ("[" * 9000, "arr_0 has a header that is"),
    (HEADER.format("|u1", False, "(5, 'x', 1.5)"), "arr_0 has a header that is none"),
    ("", "arr_0 has a header that is none"),
    (HEADER.format("|u1", 5, (5, 8, 8, 3)), "arr_0 has a header that is none"),
    ("x" * 60_000, "arr_0 has a header"),
])  # fmt: skip
@pytest.mark.parametrize("packed", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_headers_of_arrays_that_are_nonsense(tmp_path, header, message, packed):
    data = header.encode() + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(data).to_bytes(2, "little") + data + bytes(5 * 8 * 8 * 3)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", packed) as archive:
        archive.writestr("arr_0.npy", content)
    with pytest.raises(ValueError, match=f"`samples` {tmp_path}/a.npz.*{message}"):
        open_input(tmp_path / "a.npz", "samples")


def test_archives_that_are_traps_or_of_other_forms(tmp_path, monkeypatch):
    def refuses(message):
        with pytest.raises(ValueError, match=f"`samples` {tmp_path}/a.npz.*{message}"):
            open_input(tmp_path / "a.npz", "samples")

    monkeypatch.setattr(npz, "SMALL", 1000)
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((5000, 8, 8, 3), np.uint8))
    refuses("arr_0.npy has 960,128 bytes, packed in")
    for name in ("arr_0", "../arr_0.npy", "arr_0.npy/"):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr(name, b"")
        refuses("cannot be read as an .npz|wanted is arr_0")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"\x93NUMPY\x03\x00\x00\x00\x00\x00")
    refuses("arr_0 is in version .3, 0. of .npy's format")


def test_samples_class_by_class_are_remarked(tmp_path, capsys, monkeypatch):
    """The Inception Score is taken of consecutive images, so it is another where they are sorted.
    """
    for module in (remarks, metrics):
        monkeypatch.setattr(module, "SPLIT", 100)

    class Bright(torch.nn.Module):
        def forward(self, images: torch.Tensor):
            features = images.float().flatten(1) / 255
            logit = (features.mean(1, keepdim=True) - 0.5) * 40
            return features, torch.cat([logit, -logit], 1)

    path = tmp_path / "bright.pt"
    torch.jit.save(torch.jit.trace(Bright(), torch.zeros(3, 3, 2, 2, dtype=torch.uint8)), path)
    source = np.random.default_rng(0)
    images = np.repeat(np.array([20, 220]), 100)[:, None, None, None] + source.integers(
        -15, 15, (200, 2, 2, 3)
    )
    told = {}
    for name, order in {"sorted": np.arange(200), "mixed": source.permutation(200)}.items():
        np.savez(tmp_path / f"{name}.npz", images[order].astype(np.uint8))
        flags = ["--reference", tmp_path / "sorted.npz", "--features", path]
        report, told[name] = run(capsys, "--samples", tmp_path / f"{name}.npz", *flags)
    assert "inception_score depends on the order of the samples" in told["sorted"]
    assert (
        "it is 1 in this order, perhaps class by class, and 1.98 in a random one" in told["sorted"]
    )
    assert "order" not in told["mixed"] and report["scores"]["inception_score"] == pytest.approx(
        2, rel=0.02
    )


def test_a_made_from_of_somebody_else_is_passed_over(sets, capsys, tmp_path):
    np.savez(tmp_path / "r.npz", arr_0=pictures(300), made_from=np.array("2021"))
    assert run(
        capsys, "--samples", sets / "samples", "--reference", tmp_path / "r.npz", "--features",
        "pixels",
    )[0]["scores"]  # fmt: skip


def test_samples_without_images(sets, capsys, tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.ones(192), sigma=np.eye(192))
    err = refused(
        capsys, "--samples", tmp_path / "s.npz", "--reference", sets / "real", "--features",
        "pixels",
    )  # fmt: skip
    assert "has statistics and no images" in err


def test_statistics_of_other_features_are_refused(sets, capsys, tmp_path):
    run(
        capsys, "--make-reference", sets / "real", "--output", tmp_path / "r.npz", "--features",
        CLASSIFIER,
    )  # fmt: skip
    flags = ["--samples", sets / "samples", "--reference", tmp_path / "r.npz"]
    assert "was made with --features" in refused(capsys, *flags, "--features", "pixels")
    assert (
        run(capsys, *flags, "--features", CLASSIFIER + "/model.safetensors")[0]["scores"]["fid"] > 0
    )


def test_features_that_are_not_finite(sets, capsys, tmp_path):
    class Broken(torch.nn.Module):
        def forward(self, images):
            return images.float().mean(dim=(2, 3)) / 0

    torch.jit.script(Broken()).save(str(tmp_path / "broken.ts"))
    flags = [
        "--samples", sets / "samples", "--reference", sets / "real", "--features",
        tmp_path / "broken.ts",
    ]  # fmt: skip
    assert "the features of some image are not finite" in refused(capsys, *flags)

    class BrokenLogits(torch.nn.Module):
        def forward(self, images):
            features = images.float().mean(dim=(2, 3))
            return features, features / 0

    torch.jit.script(BrokenLogits()).save(str(tmp_path / "broken.ts"))
    assert "the logits of some image are not finite" in refused(capsys, *flags)


@pytest.mark.parametrize("flags, message", [
    ([], "--samples and --reference are wanted, or --make-reference"),
    (["--samples", "a"], "--samples and --reference are wanted"),
    (["--make-reference", "tests"], "--make-reference DIR goes with --output FILE.npz"),
    (["--make-reference", "tests", "--output", "o.npz", "--samples", "a"],
     "without --samples and --reference"),
    (["--make-reference", "nowhere", "--output", "o.npz"], "nowhere is no folder"),
    (["--samples", "a", "--reference", "b", "--image-size", "8"],
     "--image-size is for --make-reference"),
    (["--samples", "a", "--reference", "b", "--batch-size", "0"],
     "--batch-size is 0; it must be at least 1"),
    (["--samples", "a", "--reference", "b", "--num-workers", "-1"], "--num-workers is -1"),
    (["--samples", "a", "--reference", "b", "--output", "README.md"],
     "--output README.md exists already"),
    (["--samples", "a", "--reference", "b", "--output", "no/where.json"],
     "cannot write no/where.json (No such file"),
    (["--make-reference", "tests", "--output", "/proc/r.npz"], "cannot write /proc/r.npz"),
    (["--samples", "a", "--reference", "b", "--features", "pixels", "--inception-weights", "w"],
     "is for --features inc"),
    (["--samples", "a", "--reference", "b"], "--samples a: there is no such file or folder"),
])  # fmt: skip
def test_mistakes_in_the_flags(capsys, monkeypatch, flags, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*flags, "--device", "cpu"])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_output_is_the_report_and_is_never_replaced(sets, capsys, tmp_path):
    flags = ["--samples", sets / "samples", "--reference", sets / "real", "--features", "pixels"]
    report, _ = run(capsys, *flags, "--output", tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text()) == report
    assert "exists already; remove it or give another name" in refused(
        capsys, *flags, "--output", tmp_path / "scores.json"
    )


# ---- .npz files ----


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_of_an_npz_are_mapped_where_they_can_be(tmp_path, save):
    images = pictures(20)
    save(tmp_path / "a.npz", first=np.arange(1000), arr_0=images)
    found = open_array(tmp_path / "a.npz", "arr_0")
    assert np.array_equal(found, images) and isinstance(found, np.memmap) == (save is np.savez)


def test_an_npz_written_row_by_row_is_as_numpy_reads_it(tmp_path):
    images = pictures(7)
    arrays = {
        "mu": np.arange(5.0), "arr_0": (images.shape, np.uint8, iter(images)),
        "text": np.array("a word"),
    }  # fmt: skip
    digests = set()
    for name in ("a.npz", "b.npz"):
        with open(tmp_path / name, "wb") as file:
            write_npz(file, arrays | {"arr_0": (images.shape, np.uint8, iter(images))})
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    with np.load(tmp_path / "a.npz") as found:
        assert np.array_equal(found["arr_0"], images) and str(found["text"]) == "a word"
        assert np.array_equal(found["mu"], np.arange(5.0))
    assert len(digests) == 1 and isinstance(open_array(tmp_path / "a.npz", "arr_0"), np.memmap)


def test_a_worker_is_not_sent_the_images(sets):
    import pickle

    side = open_input(sets / "real.npz", "reference")
    sent = pickle.dumps(side.images)
    assert len(sent) < 2000 and torch.equal(pickle.loads(sent)[5][0], side.images[5][0])
    assert image_sets.hash_of(side.images[0][1]) != image_sets.hash_of(side.images[1][1])
