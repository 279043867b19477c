"""Text encoders outside of a network: T5 and CLIP, one or several joined as in Stable Diffusion 3.

Of T5 the tokens are the last hidden states, and there is no pooled vector. Of CLIP the tokens are
the hidden states before the last layer, as Stable Diffusion 3 takes them, and the pooled vector is
the projected one; CLIPTextModel has no projection, and its vector is that of the last token.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conditions.pretrained import (
    files_hash, library, load_network, load_words, local_folder, read_config, tokens_of,
)  # fmt: skip
from conditions.text import Share
from layers.text import Text

# Tokens that T5 reads, if nothing else is asked for: as many as CLIP, as in Stable Diffusion 3's
# paper; a network pays for each in every step. PixArt-α has 120, diffusers' pipelines 256.
T5_LENGTH = 77
LENGTHS = (2, 4096)  # the least and the most
MOST_ENCODERS = 8
LONGEST_NAME = 4096  # of an encoder, in characters: as long as a path
# What becomes of tokens that fill a caption up: nothing attends to them; or all read them like
# others, as Stable Diffusion 3 was trained
MASKED, READ = "masked", "read"
BATCH = 64  # captions that are read together
ARGUMENT = "text_encoder"

# (network, numbers of tokens (N, L), mask (N, L) or None) → (tokens (N, L, E), pooled (N, P))
Reading = Callable[[Any, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def read_clip(network: Any, numbers: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The hidden states (N, L, E) before the last layer, and the vector (N, P) of each caption."""
    found = network(input_ids=numbers, attention_mask=mask, output_hidden_states=True)
    projected = "text_embeds" in found
    return found.hidden_states[-2], found.text_embeds if projected else found.pooler_output


def read_t5(network: Any, numbers: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
    """The last hidden states (N, L, E)."""
    return network(input_ids=numbers, attention_mask=mask).last_hidden_state, None


# What config.json calls a network → its kind here
KINDS = {"clip": "clip", "clip_text_model": "clip", "t5": "t5"}
READINGS: dict[str, Reading] = {"clip": read_clip, "t5": read_t5}


class Encoder(NamedTuple):
    """One text encoder. Its tokens are `width` wide, its vectors `pooled_width`, 0 without.

    `length` is how many tokens it reads, `padding` what becomes of those that fill up, `sha256` a
    hash of its files.
    """

    kind: str
    name: str
    length: int
    padding: str
    sha256: str
    width: int
    pooled_width: int
    network: Any
    words: Any  # its tokenizer

    @property
    def says(self) -> dict[str, Any]:
        """What tells it from others, as a checkpoint keeps it."""
        kept = ("kind", "name", "length", "padding", "sha256")
        return {name: getattr(self, name) for name in kept}

    @torch.no_grad()
    def read(self, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        """(tokens (N, L, E), float32; which of them there are, bool (N, L); vectors (N, P) or None)
        of captions, on the CPU. L is at most `length`.
        """
        masked = self.padding == MASKED
        filled = "longest" if masked else "max_length"
        numbers, there = tokens_of(self.words, captions, self.length, filled)
        device, mask = self.network.device, there if masked else None
        if mask is not None:
            mask = mask.to(device)
        tokens, pooled = READINGS[self.kind](self.network, numbers.to(device), mask)
        pooled = None if pooled is None else pooled.float().cpu()
        return tokens.float().cpu(), there if masked else torch.ones_like(there), pooled

    def counts(self, captions: Sequence[str]) -> list[int]:
        """How many tokens each caption has, if none is cut off."""
        with library():  # which warns of long ones
            made = self.words(list(captions), truncation=False, return_attention_mask=False)
        return [len(numbers) for numbers in made["input_ids"]]

    def end(self, caption: str) -> int:
        """How many characters of a caption are read."""
        if self.counts([caption])[0] <= self.length:
            return len(caption)
        made = self.words(
            caption, truncation=True, max_length=self.length, return_offsets_mapping=True
        )
        return max(stop for _, stop in made["offset_mapping"])


class EncoderReader:
    """A Reader (conditions/text.py) by encoders outside of the network.

    Tokens of CLIPs come first, their numbers beside one another in the same tokens; then, along the
    sequence, those of each T5. Numbers that an encoder does not fill are 0, up to the widest.
    Pooled vectors are joined end to end. `shares` and `says` are in the order in which the encoders
    are given, and `parts` are the tokens of each part of the sequence: [77, 77], say. The same
    caption has the same Text whatever is read with it, but for rounding.
    """

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        beside = [encoder for encoder in encoders if encoder.kind == "clip"]
        after = [encoder for encoder in encoders if encoder.kind != "clip"]
        if lengths := sorted({encoder.length for encoder in beside})[1:]:
            raise ValueError(
                f"`{ARGUMENT}` has CLIPs of {beside[0].length} and {lengths[0]} tokens, which "
                "cannot share theirs; give CLIPs of one length"
            )
        self.encoders = list(encoders)
        groups = ([beside] if beside else []) + [[encoder] for encoder in after]
        self.parts = [group[0].length for group in groups]
        self.groups = groups
        self.width = max(sum(encoder.width for encoder in group) for group in groups)
        self.pooled_width = sum(encoder.pooled_width for encoder in self.encoders)
        shares = dict(self._shares())
        self.shares: tuple[Share, ...] = tuple(shares[id(encoder)] for encoder in encoders)
        self.says: list[dict[str, Any]] = [encoder.says for encoder in self.encoders]
        self.null: Text = self.encode([""])

    def _shares(self):
        pooled = 0
        for group, end in zip(self.groups, accumulate(self.parts)):
            number, tokens = 0, slice(end - group[0].length, end)
            for encoder in group:
                numbers = slice(number, number + encoder.width)
                vector = slice(pooled, pooled + encoder.pooled_width)
                yield id(encoder), Share(tokens, numbers, vector)
                number, pooled = numbers.stop, vector.stop

    def encode(self, captions: Sequence[str]) -> Text:
        """The Text of N captions, on the CPU, float32: tokens (N, sum of parts, width) and, if
        there is a CLIP, pooled (N, pooled_width). The mask is None if all padding is read.

        What is too long is cut.
        """
        groups = [captions[at : at + BATCH] for at in range(0, len(captions), BATCH)]
        return Text.join([self._read(group) for group in groups or [[]]])

    def _read(self, captions):
        count, length = len(captions), sum(self.parts)
        tokens = torch.zeros(count, length, self.width)
        mask = torch.zeros(count, length, dtype=torch.bool)
        pooled = torch.zeros(count, self.pooled_width)
        for encoder, share in zip(self.encoders, self.shares if count else ()):
            found, there, vectors = encoder.read(captions)
            at = slice(share.tokens.start, share.tokens.start + there.shape[1])
            tokens[:, at, share.numbers] = found.where(there[..., None], 0)
            mask[:, at] |= there
            if vectors is not None:
                pooled[:, share.pooled] = vectors
        masked = any(encoder.padding == MASKED for encoder in self.encoders)
        return Text(tokens, mask if masked else None, pooled if self.pooled_width else None)

    def counts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(how many tokens each of N captions has in each part, int64 (N, parts); which captions
        are cut, bool (N,)). The first of so many tokens of a part are those that the mask has.
        """
        counted, cut = [], torch.zeros(len(captions), dtype=torch.bool)
        for group in self.groups:
            most = torch.zeros(len(captions), dtype=torch.int64)
            for encoder in group:
                found = torch.tensor(encoder.counts(captions), dtype=torch.int64)
                cut |= found > encoder.length
                read = found if encoder.padding == MASKED else encoder.length
                most = torch.maximum(most, torch.as_tensor(read).clamp(max=encoder.length))
            counted.append(most)
        return torch.stack(counted, dim=1), cut  # (N, parts)

    def cut_at(self, caption: str) -> str | None:
        """The part of a caption that every encoder reads, if that is not all of it; else None."""
        end = min(encoder.end(caption) for encoder in self.encoders)
        return caption[:end] if end < len(caption) else None


def load_reader(
    names: Sequence[str], t5_length: int = T5_LENGTH, padding: str = MASKED,
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
) -> EncoderReader:  # fmt: skip
    """The EncoderReader of encoders, each a local folder or a hub id, on a device.

    T5 reads t5_length tokens, CLIP as many as it can. Raises ValueError for what is no text
    encoder, and if transformers is not installed.
    """
    if not 1 <= len(names) <= MOST_ENCODERS:
        raise ValueError(
            f"`{ARGUMENT}` has {len(names)} names; give from 1 to {MOST_ENCODERS} encoders"
        )
    if not LENGTHS[0] <= t5_length <= LENGTHS[1]:
        raise ValueError(
            f"`text_length` is {t5_length}; it must be from {LENGTHS[0]} to {LENGTHS[1]:,}"
        )
    return EncoderReader([load_encoder(name, t5_length, padding, device, dtype) for name in names])


def load_encoder(
    name: str, t5_length: int, padding: str, device: torch.device | str, dtype: torch.dtype,
    fetch: bool = True,
) -> Encoder:  # fmt: skip
    """The Encoder of a name, fetched if it is not here and `fetch` is on. Raises ValueError as
    load_reader.
    """
    folder = local_folder(name, ARGUMENT, fetch)
    config = read_config(folder, ARGUMENT)
    called = config.get("model_type")
    if not isinstance(called, str) or called not in KINDS:
        raise ValueError(
            f"`{ARGUMENT}` {name} is of the kind {str(called)[:60]}; captions are read by "
            f"{' or '.join(KINDS)}"
        )
    kind = KINDS[called]
    plain = config.get("architectures") == ["CLIPTextModel"]  # without a projection
    clip = "CLIPTextModel" if plain else "CLIPTextModelWithProjection"
    network = load_network(
        "T5EncoderModel" if kind == "t5" else clip, folder, ARGUMENT, device, dtype
    )
    sizes, words = network.config, load_words(folder, network, ARGUMENT)
    width = sizes.d_model if kind == "t5" else sizes.hidden_size
    pooled = 0 if kind == "t5" else width if plain else sizes.projection_dim
    length = t5_length if kind == "t5" else sizes.max_position_embeddings
    return Encoder(
        kind, name, length, padding, files_hash(folder, ARGUMENT), width, pooled, network, words
    )


# ---- what a checkpoint, or a cache, keeps of encoders ----

SAID: dict[str, type] = {"kind": str, "name": str, "length": int, "padding": str, "sha256": str}


def check_says(says: Any) -> None:
    """Raise ValueError unless this is what an EncoderReader says of itself."""
    right = isinstance(says, list) and 1 <= len(says) <= MOST_ENCODERS
    for one in says if right else ():
        right &= isinstance(one, dict) and one.keys() == SAID.keys()
        right = right and all(type(one[name]) is kind for name, kind in SAID.items())
        right = right and len(one["name"]) <= LONGEST_NAME
        right = right and one["kind"] in READINGS and one["padding"] in (MASKED, READ)
        right = right and LENGTHS[0] <= one["length"] <= LENGTHS[1]
    if not right:
        raise ValueError(f"what it says of its text encoders is damaged: {str(says)[:100]}")


def in_words(says: Sequence[dict[str, Any]]) -> str:
    """What encoders there are, for a message."""
    fillers = {MASKED: "", READ: ", those that fill up among them"}
    return " and ".join(
        f"{one['kind']} {one['name']} ({one['length']} tokens{fillers[one['padding']]})"
        for one in says
    )


def check_encoders(
    wanted: list[dict[str, Any]], given: list[dict[str, Any]], whose: str = "the network"
) -> None:
    """Raise ValueError unless given encoders are those that `whose` captions were read by.

    They may lie elsewhere, and must have the same files, where it is known which these were.
    """
    given = [
        one if known["sha256"] else one | {"sha256": ""}
        for one, known in zip(given, wanted)
    ] if len(given) == len(wanted) else given  # fmt: skip

    def facts(says):
        return [{name: one[name] for name in SAID if name != "name"} for one in says]

    if facts(wanted) == facts(given):
        return
    without = [[one | {"sha256": ""} for one in facts(says)] for says in (wanted, given)]
    if without[0] == without[1]:
        raise ValueError(
            f"`{ARGUMENT}` {in_words(given)} has other files than the encoders that read the "
            f"captions of {whose}, {in_words(wanted)}; give those"
        )
    raise ValueError(
        f"`{ARGUMENT}` is {in_words(given)}, and the captions of {whose} were read by "
        f"{in_words(wanted)}; give those"
    )


def reader_of(
    says: Any, names: Sequence[str] | None = None, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> EncoderReader:  # fmt: skip
    """The EncoderReader that said this of itself, loaded again; `names` say where its encoders lie
    now, in the same order. Without them nothing is fetched: what was said may be a stranger's.

    Raises ValueError if what it said is damaged, and for encoders that are others.
    """
    check_says(says)
    if names is not None and len(names) != len(says):
        raise ValueError(
            f"`{ARGUMENT}` has {len(names)} names, and the captions were read by {in_words(says)}; "
            "name each of those"
        )
    places = [one["name"] for one in says] if names is None else names
    found = EncoderReader([
        load_encoder(name, one["length"], one["padding"], device, dtype, names is not None)
        for name, one in zip(places, says)
    ])  # fmt: skip
    check_encoders(says, found.says)
    return found
