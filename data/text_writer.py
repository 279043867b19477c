"""Encoding the captions of a folder of images, once, beside its cached latents, on one process or
several, as text_cache.py lays it out.

The same options go on where the work stopped. The result is the same on any number of processes.
"""

from dataclasses import dataclass
import json
from pathlib import Path
import zlib

import numpy as np
import torch
from tqdm.auto import tqdm

from conditions.encoders import EncoderReader, check_encoders, in_words, load_reader
from data.cache_format import CHUNKS, DTYPES, MANIFEST, PLAN, chunk_note
from data.cache_writer import (
    make_array, npy_layout, wait_for_chunks, wait_for_plan, write_array, write_durably, write_json,
)  # fmt: skip
from data.captions import Captions, read_captions, stand_ins
from data.listing import Listing, list_images
from data.options import TextCacheOptions
from data.text_cache import (
    CAPTIONS, COUNTS, FIRSTS, FOLDER, POOLED, ROWS, SHARED, SMALL, TOKENS, check_latents,
    check_text_manifest, filled, notes_on, small_sum, starts_of, whole_numbers,
)  # fmt: skip
from runtime.devices import process_device, tf32
from runtime.disk import write_whole
from runtime.json_files import read_json
from runtime.presence import Presence
from runtime.surroundings import Place, own_place

CHUNK = 256  # captions that are encoded, written and checksummed together
AT_ONCE = 4096  # captions whose tokens are counted together


@dataclass(frozen=True)
class PreparedText:
    """All that encoding needs: its folder, its encoders, and, in the first process, the captions of
    the images and the Listing of these.
    """

    options: TextCacheOptions
    folder: Path
    reader: EncoderReader
    captions: Captions | None
    listing: Listing | None
    place: Place


def prepare_text(options: TextCacheOptions) -> PreparedText:
    """The encoders, loaded, and the captions, read; nothing is written.

    Raises ValueError for whatever is wrong with the options, and if no image has a caption.
    """
    if options.latents_dtype not in DTYPES:
        raise ValueError(
            f"`latents_dtype` is {options.latents_dtype!r}; it must be {' or '.join(DTYPES)}"
        )
    place, folder = own_place(), Path(options.output) / FOLDER
    captions = listing = None
    if place.rank == 0:
        listing = list_images(options.data_path, options.num_classes)
        captions = read_captions(listing, options.data_path)
    device = process_device(options.device)
    reader = load_reader(options.text_encoder, options.text_length, device=device)
    if (folder / PLAN).exists():
        check_same_text(folder, options, reader)
    return PreparedText(options, folder, reader, captions, listing, place)


def cache_text(prepared: PreparedText) -> dict:
    """Encode and write the captions, whose images' latents must be there; the manifest, or in other
    processes than the first the plan.

    Raises ValueError, and OSError where the disk refuses; the same options then go on.
    """
    plan, folder = begin_text(prepared), prepared.folder
    with Presence(folder, prepared.place, only=True) as presence:
        with tf32(prepared.options.tf32):
            encode_rows(prepared, plan)
        return finish_text(folder, plan, presence) if prepared.place.rank == 0 else plan


# ---- the folder ----

def begin_text(prepared: PreparedText) -> dict:
    """Make the folder with its plan and arrays to fill, in the first process; the others wait.

    Returns the plan. Raises ValueError if the folder holds another text.
    """
    folder, captions = prepared.folder, None
    if prepared.place.rank:
        wait_for_plan(folder, prepared.place)
    else:
        captions, latents = of_latents(prepared)
        if not (folder / PLAN).exists():
            make_text_folder(prepared, captions, latents)
        check_latents(read_json(folder / PLAN), latents)
    plan = check_same_text(folder, prepared.options, prepared.reader, captions)
    for name, layout in layouts(plan).items():
        path, (_, size) = folder / name, npy_layout(*layout)
        if not path.exists() or path.stat().st_size != size:
            raise ValueError(f"{path} has lost its length; remove {folder} and make it again")
    return plan


def of_latents(prepared: PreparedText) -> tuple[Captions, dict]:
    """(the captions of the images whose latents are cached, the manifest of these).

    Raises ValueError if there are none, or they are of other images.
    """
    captions, listing, options = prepared.captions, prepared.listing, prepared.options
    assert captions is not None and listing is not None  # prepare_text reads both here
    try:
        latents = read_json(Path(options.output) / MANIFEST)
    except ValueError as error:
        raise ValueError(f"`output` {options.output} holds no latents yet ({error}); cache these "
                         "first") from None  # fmt: skip
    if latents.get("files_sha256") != listing.hash(options.data_path):
        raise ValueError(
            f"`output` {options.output} holds latents of other images than those of `data_path`; "
            "give their folder, and `num_classes` as it was"
        )
    if bad := latents.get("bad_images"):
        captions = captions.chosen(stand_ins(listing.paths, bad))
    return captions, latents


def check_same_text(
    folder: Path, options: TextCacheOptions, reader: EncoderReader,
    captions: Captions | None = None,
) -> dict:  # fmt: skip
    """A folder's plan. Raises ValueError if it is damaged, or of other encoders or captions."""
    plan = read_json(folder / PLAN)
    try:
        check_text_manifest(plan)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; remove the folder and make it again") from None
    check_encoders(plan["encoders"], reader.says, str(folder))
    other = "dtype" if plan["dtype"] != options.latents_dtype else ""
    if captions is not None and captions.hash != plan["captions_sha256"]:
        other = "captions"
    if other:
        raise ValueError(
            f"`output` {folder.parent} holds what the encoders made with other {other}; remove "
            f"{folder}, or give a new folder"
        )
    return plan


def make_text_folder(prepared: PreparedText, captions: Captions, latents: dict) -> None:
    """Make the folder, what is known before anything is encoded, arrays to fill and, last, the
    plan. Raises ValueError if something else is there, or the disk refuses.
    """
    folder, reader = prepared.folder, prepared.reader
    if folder.exists() and any(folder.iterdir()) and not (folder / CHUNKS).exists():
        raise ValueError(f"{folder} holds something else; give a new `output`")
    texts, rows, firsts = numbered(captions)
    counts, cut = counted(reader, texts)
    plan = {
        **{name: latents.get(name) for name in SHARED}, "captions_sha256": captions.hash,
        "captions": captions.count, "missing": captions.missing, "cut": cut, "rows": len(texts),
        "tokens": int(counts.sum(dtype=np.int64)), "width": reader.width,
        "pooled_width": reader.pooled_width, "parts": reader.parts,
        "masked": reader.null.mask is not None, "dtype": prepared.options.latents_dtype,
        "encoders": reader.says,
        "shares": [[[part.start, part.stop] for part in share] for share in reader.shares],
        "chunk": CHUNK,
    }  # fmt: skip
    check_text_manifest(plan)
    try:
        (folder / CHUNKS).mkdir(parents=True, exist_ok=True)
        for name, array in ((COUNTS, counts), (ROWS, rows), (FIRSTS, firsts)):
            write_array(folder / name, array)
        write_texts(folder / CAPTIONS, texts)
        for name, layout in layouts(plan).items():
            make_array(folder / name, *npy_layout(*layout))
        sums = {f"{name}_crc32": small_sum(folder / name) for name in SMALL}
        write_json(folder / PLAN, plan | sums)
    except OSError as error:
        raise ValueError(
            f"cannot write {folder} ({error.strerror}); choose another `output`"
        ) from None


def layouts(plan: dict) -> dict[str, tuple[tuple[int, int], str]]:
    """{array to fill: its shape and kind of number} by a plan."""
    shapes = {TOKENS: (plan["tokens"], plan["width"]), POOLED: (plan["rows"], plan["pooled_width"])}
    return {name: (shape, plan["dtype"]) for name, shape in shapes.items() if shape[1]}


def numbered(captions: Captions) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(different captions, the empty one first; which of them each of the M captions is, (M,);
    firsts (images + 1,): where those of each image begin).
    """
    known, rows, firsts = {"": 0}, list[int](), [0]
    for several in captions:
        rows += [known.setdefault(caption, len(known)) for caption in several]
        firsts.append(len(rows))
    return list(known), np.array(rows, np.int64), np.array(firsts, np.int64)


def counted(reader: EncoderReader, texts: list[str]) -> tuple[np.ndarray, int]:
    """(how many tokens each caption has in each part, int32 (rows, parts); how many captions are
    cut).
    """
    found, cut = list[torch.Tensor](), 0
    for at in range(0, len(texts), AT_ONCE):
        counts, is_cut = reader.counts(texts[at : at + AT_ONCE])
        found.append(counts)
        cut += int(is_cut.sum())
    return torch.cat(found).numpy().astype(np.int32), cut


def write_texts(path: Path, texts: list[str]) -> None:
    """Write captions as JSON, one a line, whole or not at all. Raises OSError."""
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    write_whole(path, lambda temporary: temporary.write_text(lines, encoding="ascii"))


def read_texts(folder: Path, plan: dict) -> list[str]:
    """The captions of each row. Raises ValueError if they are damaged."""
    path = folder / CAPTIONS
    content = path.read_bytes()
    if zlib.crc32(content) != plan.get(f"{CAPTIONS}_crc32"):
        raise ValueError(f"{path} is damaged; remove {folder} and make it again")
    return [json.loads(line) for line in content.splitlines()]


# ---- the work ----

def encode_rows(prepared: PreparedText, plan: dict) -> None:
    """Encode and write the chunks that this process is to do and that are not there yet.

    Raises ValueError, OSError.
    """
    folder, reader, place, rows = prepared.folder, prepared.reader, prepared.place, plan["rows"]
    size = plan["chunk"]
    dealt = range(0, rows, size)[place.rank :: place.world_size]
    left = [first for first in dealt if not chunk_note(folder, first // size).exists()]
    if not left:
        return
    texts = read_texts(folder, plan)
    counts = np.array(whole_numbers(folder, COUNTS, (rows, len(plan["parts"]))))
    starts = starts_of(counts)
    for first in tqdm(left, unit="chunk", disable=None if place.rank == 0 else True):
        chosen = slice(first, first + size)
        contents = encoded(reader, texts[chosen], counts[chosen], plan, first)
        crc32 = 0
        for name, begin in ((TOKENS, starts[first]), (POOLED, first)):
            if name in contents:
                write_rows(folder / name, plan, int(begin), contents[name])
                crc32 = zlib.crc32(contents[name], crc32)
        # Only now, when the data are safely there
        write_json(chunk_note(folder, first // size), {"crc32": crc32}, indent=None)


def encoded(
    reader: EncoderReader, texts: list[str], counts: np.ndarray, plan: dict, first: int
) -> dict[str, bytes]:
    """The rows of captions as they are stored, by the name of their array.

    Raises ValueError, naming the first row, if the cache's kind of number is too small.
    """
    text = reader.encode(texts)
    mask = filled(counts, plan["parts"])
    assert text.mask is None or torch.equal(text.mask, mask)
    parts = {TOKENS: text.tokens[mask]} | ({} if text.pooled is None else {POOLED: text.pooled})
    stored = {name: part.numpy().astype(plan["dtype"]) for name, part in parts.items()}
    if not all(np.isfinite(part).all() for part in stored.values()):
        raise ValueError(
            f"captions {first} and following have numbers beyond {plan['dtype']}; pass "
            "`latents_dtype=float32`"
        )
    return {name: part.tobytes() for name, part in stored.items()}


def write_rows(path: Path, plan: dict, begin: int, content: bytes) -> None:
    """Write rows of an array to fill, from number `begin` on, and wait until the disk has them."""
    shape, dtype = layouts(plan)[path.name]
    row = shape[1] * np.dtype(dtype).itemsize
    with open(path, "r+b") as file:
        write_durably(file, path.stat().st_size - (shape[0] - begin) * row, content)


def finish_text(folder: Path, plan: dict, presence: Presence) -> dict:
    """Wait for every chunk, then write manifest.json, which is returned.

    Raises ValueError if a process has ended without its share, or a chunk's note is damaged.
    """
    notes = [chunk_note(folder, number) for number in range(-(-plan["rows"] // plan["chunk"]))]
    wait_for_chunks(folder, {path.name for path in notes}, presence)
    if (folder / MANIFEST).exists():
        return read_json(folder / MANIFEST)
    sums = [read_json(path).get("crc32") for path in notes]
    for path, crc32 in zip(notes, sums):
        if type(crc32) is not int:
            raise ValueError(f"{path} is damaged; remove it and give the same command again")
    manifest = plan | {"crc32": sums}
    write_json(folder / MANIFEST, manifest)
    return manifest


def told(manifest: dict) -> tuple[str, ...]:
    """Sentences on a text that is written."""
    return (
        f"{manifest['captions']:,} captions, {manifest['rows'] - 1:,} of them different, read by "
        f"{in_words(manifest['encoders'])}",
        *notes_on(manifest),
    )
