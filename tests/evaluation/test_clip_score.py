"""CLIP score against transformers' own CLIP, Pillow and the closed form."""

import json
import shutil

import numpy as np
from PIL import Image
import pytest
import torch

import evaluate
from evaluation.clip_score import MEAN, STD, Clip, captions_of
from small_encoders import CLIP_LENGTH, IMAGE, save_both, save_clip
from starts import each_start

CAPTIONS = ["a thin three", "", "a thick seven leaning left", "one", "a one one one one one one"]
SIZES = [(64, 64)] * 5


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_both(tmp_path_factory.mktemp("clip"), seed=7)  # signs of cosines vary


def pictures(sizes, seed=0):
    draw = np.random.default_rng(seed)
    found = []
    for height, width in sizes:
        coarse = draw.integers(0, 256, (5, 5, 3), np.uint8)
        found.append(np.array(Image.fromarray(coarse).resize((width, height))))
    return found


def folder_of(folder, sizes=SIZES, captions=CAPTIONS):
    folder.mkdir()
    for number, pixels in enumerate(pictures(sizes)):
        Image.fromarray(pixels).save(folder / f"{number:06d}.png")
    (folder / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    return folder


def by_transformers(clip, images, captions, index):
    """The cosine of one image and caption: Pillow's filter, and the logits of the library's CLIP.
    """
    from transformers import AutoTokenizer, CLIPModel

    network = CLIPModel.from_pretrained(clip).eval()
    words = AutoTokenizer.from_pretrained(clip)
    image = Image.fromarray(images[index])
    short = min(image.size)
    image = image.resize([side * IMAGE // short for side in image.size], Image.BICUBIC)
    left, top = ((side - IMAGE) // 2 for side in image.size)
    image = image.crop((left, top, left + IMAGE, top + IMAGE))
    pixels = (np.array(image) / 255 - MEAN) / STD
    ids = words(captions[index], truncation=True, max_length=CLIP_LENGTH, return_tensors="pt")
    with torch.no_grad():
        found = network(
            input_ids=ids["input_ids"],
            pixel_values=torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None],
        )
        return float(found.logits_per_image[0, 0] / network.logit_scale.exp())


def score(capsys, *flags):
    evaluate.main([*map(str, flags), "--device", "cpu", "--num-workers", "0"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("sizes", [SIZES, [(64, 64), (40, 90), (90, 41), (32, 32), (17, 20)]])
def test_the_score_is_that_of_each_pair_by_itself(clip, tmp_path, capsys, sizes):
    folder = folder_of(tmp_path / "samples", sizes)
    report = score(capsys, "--samples", folder, "--clip", clip, "--batch-size", 2)
    cosines = [by_transformers(clip, pictures(sizes), CAPTIONS, i) for i in range(5)]
    assert min(cosines) < 0 < max(cosines)
    each = [100 * max(cosine, 0) for cosine in cosines]
    assert report["scores"]["clip_score"] == pytest.approx(np.mean(each), abs=0.05)
    error = np.std(each, ddof=1) / 5**0.5
    assert report["scores"]["standard_error"] == pytest.approx(error, abs=0.05)
    assert report["settings"]["score"] == "the mean of 100 max(cosine, 0)"
    assert report["samples"]["images"] == 5 == report["captions"]["different"]
    assert report["versions"]["transformers"]


def test_batches_change_nothing(clip, tmp_path, capsys):
    folder = folder_of(tmp_path / "samples")
    found = [
        score(capsys, "--samples", folder, "--clip", clip, "--batch-size", size)["scores"]
        for size in (1, 3, 5)
    ]
    for one in found[1:]:
        assert one["clip_score"] == pytest.approx(found[0]["clip_score"], abs=1e-4)


def test_the_closed_form():
    """Vectors that are known: of an image its mean colour, of a caption what is said."""
    made = Clip.__new__(Clip)
    made.mean, made.std = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    made.side, made.length = 4, 9
    vectors = {"red": [1.0, 0, 0], "not red": [-1.0, 0, 0], "red and green": [1.0, 1.0, 0]}

    class Found:
        pass

    def network(input_ids, attention_mask, pixel_values):
        found = Found()
        found.image_embeds = pixel_values.mean(dim=(2, 3))
        found.text_embeds = torch.tensor([list(vectors.values())[i] for i in input_ids[:, 0]])
        return found

    made.network = network
    made.words = lambda captions, **_: {
        "input_ids": torch.tensor([[list(vectors).index(one)] for one in captions]),
        "attention_mask": torch.ones(len(captions), 1),
    }
    red = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    red[:, 0] = 200
    torch.testing.assert_close(
        made.cosines(red, list(vectors)), torch.tensor([1.0, -1.0, 0.5**0.5])
    )


def test_images_are_seen_as_pillow_has_them(clip):
    made = Clip(clip, "cpu")
    for pixels in pictures([(64, 64), (40, 90), (90, 41), (32, 32), (300, 70)], seed=3):
        seen = made.seen(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
        image = Image.fromarray(pixels)
        short = min(image.size)
        image = image.resize([side * IMAGE // short for side in image.size], Image.BICUBIC)
        left, top = ((side - IMAGE) // 2 for side in image.size)
        wanted = np.array(image)[top : top + IMAGE, left : left + IMAGE]
        levels = (seen.permute(1, 2, 0).numpy() * STD + MEAN) * 255
        assert np.abs(levels - wanted).max() < 1.01  # a grey level: Pillow's are whole numbers
        assert np.abs(levels - wanted).mean() < 0.02


def test_an_npz_with_captions_beside_it(clip, tmp_path, capsys):
    folder = folder_of(tmp_path / "samples")
    np.savez(tmp_path / "samples.npz", arr_0=np.stack(pictures(SIZES)))
    shutil.move(folder / "captions.txt", tmp_path / "samples.captions.txt")
    of_array = score(capsys, "--samples", tmp_path / "samples.npz", "--clip", clip)
    assert of_array["captions"]["path"] == str(tmp_path / "samples.captions.txt")
    of_folder = score(
        capsys, "--samples", folder, "--clip", clip, "--captions", tmp_path / "samples.captions.txt"
    )
    assert of_array["scores"] == of_folder["scores"]
    assert of_array["samples"]["sha256_of_pixels"] == of_folder["samples"]["sha256_of_pixels"]


@pytest.mark.long
@each_start
def test_two_processes_find_what_one_does(clip, tmp_path, capsys, start):
    folder = folder_of(tmp_path / "samples")
    alone = score(capsys, "--samples", folder, "--clip", clip, "--batch-size", 2)
    done = start(
        "evaluate.py", "--samples", str(folder), "--clip", clip, "--batch-size", "2", "--device",
        "cpu", "--num-workers", "0", processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    both = json.loads(done.stdout)
    assert both["samples"] == alone["samples"]
    assert both["scores"]["clip_score"] == pytest.approx(alone["scores"]["clip_score"], abs=1e-4)


def test_the_own_normalisation_counts(clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "clip")
    said = {"image_mean": [0, 0.5, 1], "image_std": [1, 0.5, 2.0]}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    seen = Clip(str(folder), "cpu").seen(torch.full((1, 3, IMAGE, IMAGE), 51, dtype=torch.uint8))
    torch.testing.assert_close(seen[0, :, 0, 0], torch.tensor([0.2, -0.6, -0.4]))
    for nonsense in ({"image_std": [1, 0, 1]}, {"image_mean": None}, {"image_mean": [1, 2]}):
        (folder / "preprocessor_config.json").write_text(json.dumps(said | nonsense))
        with pytest.raises(ValueError, match="preprocessor_config.json has no image_mean and"):
            Clip(str(folder), "cpu")


def test_long_captions_are_told(clip, tmp_path, capsys):
    folder = folder_of(tmp_path / "samples", captions=[*CAPTIONS[:4], "a " * 30])
    (note,) = score(capsys, "--samples", folder, "--clip", clip)["notes"]
    assert note == (
        "1 of 5 captions are longer than the 10 tokens that CLIP reads; they are cut"
    )


# ---- mistakes ----

def test_captions_are_lines(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_bytes("\ufeffa\r\n\r\n\x0bÜ\u2028b\r\n".encode())
    assert captions_of(tmp_path).lines == ["a", "", "\x0bÜ\u2028b"]
    path.write_bytes(b"a\xff")
    with pytest.raises(ValueError, match="`captions` .*cannot be read .*give a file in UTF-8"):
        captions_of(tmp_path)
    with pytest.raises(ValueError, match=r"x\.captions\.txt cannot be read .No such file"):
        captions_of(tmp_path / "x.npz")


@pytest.mark.parametrize("flags, message", [
    (["--clip", "CLIP"], "--samples are wanted with --clip"),
    (["--captions", "x", "--samples", "S"], "--captions goes with --clip"),
    (["--clip", "CLIP", "--samples", "S", "--reference", "S"], "--reference does not go with"),
    (["--clip", "CLIP", "--samples", "S", "--features", "pixels"], "--features does not go with"),
    (["--clip", "CLIP", "--samples", "S", "--image-size", "8"], "--image-size does not go with"),
    (["--clip", "CLIP", "--samples", "S", "--seed", "8"], "--seed goes with --likelihood"),
    (["--clip", "CLIP", "--samples", "S", "--likelihood", "S"], "does not go with"),
    (["--clip", "nothing", "--samples", "S"], "--clip nothing: there is no such folder"),
    (["--clip", "TEXT", "--samples", "S"], "of the kind clip_text_model; wanted is a CLIP of"),
    (["--clip", "CLIP", "--samples", "S", "--captions", "FEW"], "has 2 lines for 5 images"),
    (["--clip", "CLIP", "--samples", "S", "--captions", "none"], "--captions none cannot be read"),
])  # fmt: skip
def test_a_mistake_gets_one_message(clip, tmp_path, capsys, flags, message):
    (tmp_path / "few").write_text("a\nb\n")
    places = {
        "CLIP": clip, "S": str(folder_of(tmp_path / "samples")), "FEW": str(tmp_path / "few"),
        "TEXT": save_clip(tmp_path / "text"),
    }  # fmt: skip
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*(places.get(word, word) for word in flags), "--device", "cpu"])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
