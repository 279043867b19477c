"""Outside text encoders against transformers' own calls, on networks of random weights."""

from itertools import product
import json
import os
from pathlib import Path
import shutil

import pytest
import torch

from conditions import pretrained
from conditions.encoders import (
    READ, check_encoders, load_reader, reader_of,
)  # fmt: skip
from conditions.text import TextCondition
from small_encoders import (
    CLIP_LENGTH, PROJECTED, T5_WIDTH, save_both, save_clip, save_encoders, save_t5,
)  # fmt: skip
from variants.mmdit import MMDiT

LENGTH = 6  # of T5
CAPTIONS = ["a thin three", "", "a thick seven leaning left", "one", "a one one one one one one"]
close = dict(rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def reader(folders):
    return load_reader(folders, t5_length=LENGTH)


def by_transformers(folder, kind, caption, length, **padding):
    """(tokens (L, E), pooled or None) of one caption by transformers itself."""
    import transformers

    network = getattr(transformers, kind).from_pretrained(folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    ids = words(caption, truncation=True, max_length=length, return_tensors="pt", **padding)
    with torch.no_grad():
        if kind == "T5EncoderModel":
            return network(ids["input_ids"]).last_hidden_state[0], None
        out = network(ids["input_ids"], output_hidden_states=True)
    vectors = out.pooler_output if kind == "CLIPTextModel" else out.text_embeds
    return out.hidden_states[-2][0], vectors[0]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_each_encoder_gives_its_share(folders, reader, caption):
    text = reader.encode([caption])
    kinds = ["CLIPTextModelWithProjection"] * 2 + ["T5EncoderModel"]
    kept = torch.zeros_like(text.tokens, dtype=torch.bool)
    for folder, kind, share in zip(folders, kinds, reader.shares, strict=True):
        length = LENGTH if kind == "T5EncoderModel" else CLIP_LENGTH
        tokens, pooled = by_transformers(folder, kind, caption, length)
        at = slice(share.tokens.start, share.tokens.start + len(tokens))
        torch.testing.assert_close(text.tokens[0, at, share.numbers], tokens, **close)
        assert text.mask[0, share.tokens].tolist() == [
            place < len(tokens) for place in range(length)
        ]
        if pooled is None:
            assert text.pooled[0, share.pooled].numel() == 0
        else:
            torch.testing.assert_close(text.pooled[0, share.pooled], pooled, **close)
        kept[0, at, share.numbers] = True
    assert not text.tokens[~kept].any()
    assert text.tokens.shape == (1, CLIP_LENGTH + LENGTH, 28) and text.pooled.shape == (1, 16)


def test_what_is_read_together_changes_nothing(reader):
    many = CAPTIONS * 15  # more than are read at a time
    together = reader.encode(many)
    for place, caption in list(enumerate(many))[:3] + [(66, many[66])]:
        alone = reader.encode([caption])
        torch.testing.assert_close(together[place : place + 1].tokens, alone.tokens, **close)
        torch.testing.assert_close(together[place : place + 1].pooled, alone.pooled, **close)
        assert torch.equal(together.mask[place : place + 1], alone.mask)
    assert len(reader.encode([])) == 0
    assert together.tokens.device.type == "cpu" and not together.tokens.requires_grad


def test_more_room_changes_nothing(folders):
    short, long = (load_reader(folders[2:], length).encode(CAPTIONS[:3]) for length in (6, 9))
    torch.testing.assert_close(long.tokens[:, :6], short.tokens, **close)
    assert not long.tokens[:, 6:].any() and not long.mask[:, 6:].any()


def test_padding_that_is_read(folders):
    """As Stable Diffusion 3 reads it: no mask, neither inside the encoders nor of the tokens."""
    reader = load_reader(folders, LENGTH, padding=READ)
    text = reader.encode(["a thin three"])
    assert text.mask is None and reader.null.mask is None
    assert {one["padding"] for one in reader.says} == {"read"}
    kinds = ["CLIPTextModelWithProjection"] * 2 + ["T5EncoderModel"]
    for folder, kind, share in zip(folders, kinds, reader.shares):
        length = share.tokens.stop - share.tokens.start
        tokens, _ = by_transformers(folder, kind, "a thin three", length, padding="max_length")
        torch.testing.assert_close(text.tokens[0, share.tokens, share.numbers], tokens, **close)
    counts, cut = reader.counts(CAPTIONS)
    assert counts.tolist() == [[CLIP_LENGTH, LENGTH]] * len(CAPTIONS) and cut.tolist() == [
        False, False, False, False, True,
    ]  # fmt: skip


def test_t5_alone_has_no_vectors(folders):
    reader = load_reader(folders[2:], LENGTH)
    assert reader.encode(CAPTIONS).pooled is None and reader.null.pooled is None
    assert reader.null.tokens.shape == (1, LENGTH, T5_WIDTH)
    with pytest.raises(ValueError, match="takes a vector of each caption.*add a CLIP"):
        MMDiT(hidden_size=32, depth=1, num_heads=2, text_width=T5_WIDTH, text_length=LENGTH)


@pytest.mark.parametrize("save, kind, width", [
    (lambda folder: save_clip(folder, kind="CLIPTextModel"), "CLIPTextModel", 16),
    (save_both, "CLIPTextModelWithProjection", PROJECTED),
])  # fmt: skip
def test_clips_of_other_kinds(tmp_path, save, kind, width):
    """A text encoder without a projection, and a CLIP with its images."""
    folder = save(tmp_path / "clip")
    tokens, pooled = by_transformers(folder, kind, "a thin three", CLIP_LENGTH)
    text = load_reader([folder]).encode(["a thin three"])
    assert text.pooled.shape == (1, width) and text.tokens.shape == (1, CLIP_LENGTH, 16)
    torch.testing.assert_close(text.tokens[0, : len(tokens)], tokens, **close)
    torch.testing.assert_close(text.pooled[0], pooled, **close)


@pytest.mark.parametrize("gone", product([0, 1], repeat=3))
def test_dropping_each_encoder_leaves_the_others(reader, gone):
    text, null = reader.encode(["a thin three"]), reader.null
    condition = TextCondition(null, reader.shares)
    assert condition.drops == (3,)
    left = condition.dropped(text, torch.tensor([gone]))["y"]
    for share, lost in zip(reader.shares, gone, strict=True):
        wanted, other = (null, text) if lost else (text, null)
        regions = {"tokens": (0, share.tokens, share.numbers), "pooled": (0, share.pooled)}
        for name, region in regions.items():
            found = getattr(left, name)[region]
            assert torch.equal(found, getattr(wanted, name)[region])
            assert not found.numel() or not torch.equal(found, getattr(other, name)[region])
    # CLIPs share their tokens' mask, which is the null text's only without either
    of_clips, of_t5 = slice(0, CLIP_LENGTH), slice(CLIP_LENGTH, None)
    for places, all_gone in ((of_clips, gone[0] and gone[1]), (of_t5, gone[2])):
        assert torch.equal(left.mask[:, places], (null if all_gone else text).mask[:, places])


def test_counts_are_the_mask(reader):
    counts, cut = reader.counts(CAPTIONS)
    mask = reader.encode(CAPTIONS).mask
    sums = [mask[:, :CLIP_LENGTH].sum(1), mask[:, CLIP_LENGTH:].sum(1)]
    assert torch.equal(counts, torch.stack(sums, dim=1))
    assert cut.tolist() == [False, False, False, False, True]  # 5 words and an end are 6
    assert reader.counts([""])[0].tolist() == [[2, 1]]


def test_where_a_caption_is_cut(reader, folders):
    assert reader.cut_at("a thick seven leaning left") is None
    assert reader.cut_at("A  thick seven, leaning left one") == "A  thick seven, leaning"
    clips = load_reader(folders[:2])
    assert clips.cut_at("a  one one one one one one one") is None
    read = "a  one one one one one one one"
    assert clips.cut_at(f"{read} Übermut") == read


def test_words_of_sentencepiece_alone(tmp_path):
    """As released T5s have them."""
    import sentencepiece

    folder = Path(save_t5(tmp_path / "t5"))
    for name in pretrained.WORDS:
        (folder / name).unlink(missing_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b ab ba aab", "b a ba"] * 20), vocab_size=7, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, model_prefix=str(folder / "spiece"), minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "T5Tokenizer", "extra_ids": 0})
    )
    reader = load_reader([str(folder)], LENGTH)
    pieces = sentencepiece.SentencePieceProcessor(str(folder / "spiece.model"))
    counts, _ = reader.counts(["a b", "ab"])
    assert counts[:, 0].tolist() == [len(pieces.encode(words)) + 1 for words in ("a b", "ab")]


# ---- what is kept of encoders ----

def test_what_a_reader_says_makes_it_again(folders, reader, tmp_path):
    says = json.loads(json.dumps(reader.says))
    assert [one["kind"] for one in says] == ["clip", "clip", "t5"]
    assert [one["length"] for one in says] == [CLIP_LENGTH, CLIP_LENGTH, LENGTH]
    moved = [shutil.copytree(folder, tmp_path / str(i)) for i, folder in enumerate(folders)]
    for names in (None, [str(folder) for folder in moved]):
        again = reader_of(says, names)
        ours, theirs = (one.encode(["a thin one"]) for one in (reader, again))
        assert torch.equal(ours.tokens, theirs.tokens)
    check_encoders(says, again.says)  # their names differ alone
    with pytest.raises(ValueError, match="has 1 names, and the captions were read by clip"):
        reader_of(says, [folders[0]])


def test_clips_come_first_wherever_they_are_named(folders, reader):
    other = load_reader([folders[2], *folders[:2]], LENGTH)
    ours, theirs = (one.encode(["a thin one"]) for one in (reader, other))
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.pooled, theirs.pooled)
    for kept in ("says", "shares"):
        first, second, last = getattr(reader, kept)
        assert list(getattr(other, kept)) == [last, first, second]
    swapped = load_reader([folders[1], folders[0], folders[2]], LENGTH)
    assert not torch.equal(swapped.encode(["a thin one"]).tokens, ours.tokens)


def test_other_encoders_are_refused(folders, reader, tmp_path):
    other = save_t5(tmp_path / "t5", seed=9)
    with pytest.raises(ValueError, match="has other files than the encoders.*; give those"):
        reader_of(reader.says, [*folders[:2], other])
    for given in (load_reader(folders[:2]), load_reader(folders, LENGTH + 1)):
        with pytest.raises(ValueError, match="were read by clip.* and t5 .*6 tokens.; give those"):
            check_encoders(reader.says, given.says)


@pytest.mark.parametrize("name", pretrained.WORDS[:2] + ("config.json", "model.safetensors"))
def test_the_hash_is_of_every_file(folders, tmp_path, name):
    folder = Path(shutil.copytree(folders[0], tmp_path / "clip"))
    before = pretrained.files_hash(folder, "text_encoder")
    assert before == pretrained.files_hash(Path(folders[0]), "text_encoder")
    (folder / "README.md").write_text("it is not read")
    assert pretrained.files_hash(folder, "text_encoder") == before
    with open(folder / name, "ab") as file:
        file.write(b" ")
    assert pretrained.files_hash(folder, "text_encoder") != before


def test_the_hash_of_a_large_file_looks_at_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "BLOCK", 8)
    monkeypatch.setattr(pretrained, "BLOCKS", 4)
    path, found = tmp_path / "weights", set()
    for place in (None, 0, 7, 31, 62, 99):  # blocks begin at 0, 30, 61, 92
        content = bytearray(100)
        if place is not None:
            content[place] = 1
        path.write_bytes(content)
        found.add(pretrained._digest(path))
    path.write_bytes(bytes(101))
    found.add(pretrained._digest(path))
    assert len(found) == 7


@pytest.mark.parametrize("says", [
    None, [], {}, "t5", [None], [{}], [{"kind": "t5"}], 9 * ["x"],
    [dict(kind="bert", name="x", length=6, padding="masked", sha256="")],
    [dict(kind="t5", name=3, length=6, padding="masked", sha256="")],
    [dict(kind="t5", name="x", length=True, padding="masked", sha256="")],
    [dict(kind="t5", name="x", length=10**9, padding="masked", sha256="")],
    [dict(kind="t5", name="x", length=6, padding="left", sha256="")],
    [dict(kind="t5", name="x" * 4097, length=6, padding="masked", sha256="")],
    [dict(kind="t5", name="x", length=6, padding="masked", sha256="", more=1)],
])  # fmt: skip
def test_damaged_sayings(says):
    with pytest.raises(ValueError, match="what it says of its text encoders is damaged"):
        reader_of(says)


# ---- mistakes ----

def write_config(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("make, message", [
    (lambda f: str(f / "nothing" / "here" / "at" / "all"), "there is no such folder; give one"),
    (lambda f: str(f), "the folder has no config.json"),
    (lambda f: write_config(f, model_type="bert"), "is of the kind bert; captions are read by"),
    (lambda f: write_config(f, model_type=["t5"]), "is of the kind .'t5'.; captions are read by"),
    (lambda f: write_config(f, model_type="t5"), "it cannot be loaded"),
    (lambda f: without(save_t5(f), "tokenizer.json", "tokenizer_config.json"), "has no tokenizer"),
    (lambda f: broken(save_t5(f), "config.json"), "cannot read"),
    (lambda f: broken(save_t5(f), "tokenizer.json"), "no tokenizer can be loaded"),
    (lambda f: broken(save_t5(f), "model.safetensors"), "it cannot be loaded"),
    (lambda f: lacking(save_t5(f)), "it lacks weights, 1 of them, such as encoder.block.0"),
    (lambda f: of_another(save_t5(f), save_clip(f / "clip")), "tokenizer has 99 words"),
])  # fmt: skip
def test_what_is_no_encoder_gets_one_message(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_reader([make(tmp_path)])
    assert "`text_encoder`" in str(raised.value) and len(str(raised.value)) < 700


def without(folder, *names):
    for name in names:
        (Path(folder) / name).unlink()
    return folder


def broken(folder, name):
    (Path(folder) / name).write_text("{")
    return folder


def lacking(folder):
    from safetensors.torch import load_file, save_file

    path = Path(folder) / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.block.0.layer.1.DenseReluDense.wo.weight"]
    save_file(tensors, path, {"format": "pt"})
    return folder


def of_another(folder, _):
    path = Path(folder) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {f"word{i}": i for i in range(13, 99)}
    path.write_text(json.dumps(tokenizer))
    return folder


def test_numbers_of_names_and_tokens(folders):
    for names in ([], folders * 3):
        with pytest.raises(ValueError, match=f"has {len(names)} names; give from 1 to 8"):
            load_reader(names)
    for length in (0, 1, 5000):
        with pytest.raises(ValueError, match=f"`text_length` is {length}; it must be from 2"):
            load_reader(folders, length)


def test_clips_of_two_lengths(folders, tmp_path):
    with pytest.raises(ValueError, match="has CLIPs of 10 and 12 tokens"):
        load_reader([folders[0], save_clip(tmp_path / "clip", length=12)])


def test_without_transformers(folders, monkeypatch):
    monkeypatch.setattr(pretrained, "is_installed", lambda name: name != "transformers")
    for name in (folders[0], "openai/clip"):
        with pytest.raises(ValueError, match=r"not installed here: pip install \.\[text\]"):
            load_reader([name])


def test_names_on_the_hub(folders, tmp_path, monkeypatch):
    """A pipeline's folders, a tokenizer beside each encoder."""
    import huggingface_hub

    asked = []

    def fetch(repository, allow_patterns, local_files_only):
        asked.append((repository, allow_patterns))
        if repository == "no/network" or local_files_only:
            raise ConnectionError("no")
        return str(tmp_path)

    inside = tmp_path / "text_encoder_3"
    shutil.copytree(folders[2], inside)
    (tmp_path / "tokenizer_3").mkdir()
    for path in inside.glob("tokenizer*"):
        path.rename(tmp_path / "tokenizer_3" / path.name)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    reader = load_reader(["owner/sd3/text_encoder_3"], LENGTH)
    (repository, patterns), = asked
    assert repository == "owner/sd3" and "text_encoder_3/config.json" in patterns
    assert "tokenizer_3/spiece.model" in patterns and not any("bin" in one for one in patterns)
    assert torch.equal(
        reader.encode(["a one"]).tokens, load_reader(folders[2:], LENGTH).encode(["a one"]).tokens
    )
    with pytest.raises(ValueError, match="cannot be fetched from the hub .this machine has no"):
        load_reader(["no/network"])
    with pytest.raises(ValueError, match="there is no such folder"):
        load_reader(["owner/name/../../etc"])
    says = [dict(reader.says[0])]
    with pytest.raises(ValueError, match="nothing is fetched that a checkpoint alone names; name"):
        reader_of(says)
    assert reader_of(says, ["owner/sd3/text_encoder_3"]).says == says
    (inside / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="it has no weights"):
        load_reader(["owner/sd3/text_encoder_3"])


class Bomb:
    """Makes a folder where somebody unpickles it."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_nothing_in_a_folder_of_others_is_run(tmp_path):
    """Neither pickled weights, nor code that a configuration points to."""
    folder, marks = Path(save_t5(tmp_path / "t5")), [tmp_path / "weights", tmp_path / "code"]
    (folder / "code.py").write_text(f"import os; os.mkdir({str(marks[1])!r})")
    for name in ("config.json", "tokenizer_config.json"):
        said = json.loads((folder / name).read_text())
        auto = {kind: "code.Mine" for kind in ("AutoModel", "AutoConfig")}
        said["auto_map"] = auto | {"AutoTokenizer": ["code.Mine", "code.Mine"]}
        (folder / name).write_text(json.dumps(said))
    assert load_reader([str(folder)], LENGTH).width == 24
    (folder / "model.safetensors").unlink()
    torch.save({"shared.weight": Bomb(str(marks[0]))}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="it cannot be loaded"):
        load_reader([str(folder)], LENGTH)
    assert not any(mark.exists() for mark in marks)
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marks[0].exists()  # whoever trusts it
