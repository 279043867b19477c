"""Networks of others that the transformers library reads: text encoders, and CLIP for scores.

This room alone knows that library. What it reads is a folder that save_pretrained wrote, or a
repository on the Hugging Face hub, whose files become a folder first.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
import hashlib
from pathlib import Path
import re
from typing import Any

import torch

from runtime.json_files import read_json
from runtime.offline import cache_of_the_hub, why_offline
from runtime.surroundings import is_installed

CONFIG = "config.json"
# OWNER/NAME on the hub, or OWNER/NAME/FOLDER where a pipeline keeps several networks
HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*))?")
# Files of a tokenizer, and of weights in the order in which they are looked for
WORDS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "spiece.model",
)  # fmt: skip
WEIGHTS = ("*.safetensors", "*.bin")
PREPROCESSOR = "preprocessor_config.json"  # of a CLIP's images
# Of a larger file so many blocks of so many bytes are hashed, evenly spread: some have 40 GB
BLOCKS, BLOCK = 64, 1 << 20


@contextmanager
def library() -> Iterator[Any]:
    """The transformers library, silent for the while. Raises ValueError if it is not installed."""
    if not is_installed("transformers"):
        raise ValueError(
            "text encoders and CLIP are read by transformers, which is not installed here: "
            "pip install .[text]"
        )
    import transformers
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def local_folder(name: str, argument: str, fetch: bool = True) -> Path:
    """The folder that a name means: itself; or, for OWNER/NAME or OWNER/NAME/FOLDER on the hub, the
    copy of what is there, fetched if it is not here yet, unless `fetch` is off.

    Errors call it by the name of the `argument` that gave it. Raises ValueError if there is none.
    """
    if _is_folder(name):
        if (Path(name) / CONFIG).is_file():
            return Path(name)
        raise refusal(
            argument, name, f"the folder has no {CONFIG}; give one that save_pretrained wrote"
        )
    on_the_hub = HUB_NAME.fullmatch(name)
    if not on_the_hub:
        raise refusal(argument, name, "there is no such folder; give one, or a hub id OWNER/NAME")
    with library():
        return _fetched(on_the_hub[1], on_the_hub[2], argument, fetch)


def _is_folder(name):
    with suppress(OSError, ValueError):  # of names that no file can have
        return Path(name).is_dir()
    return False


def refusal(argument: str, name: object, reason: str) -> ValueError:
    """What is wrong with a network of others, called as the `argument` gave it."""
    return ValueError(f"`{argument}` {name}: {reason}")


def _fetched(repository, inside, argument, fetch):
    """The folder of a repository's copy, or of a folder inside it."""
    from huggingface_hub import snapshot_download

    places = [f"{inside}/", f"{_beside(inside)}/"] if inside else [""]
    try:
        for weights in WEIGHTS:
            wanted = [CONFIG, PREPROCESSOR, *WORDS, weights]
            patterns = [f"{place}{pattern}" for place in places for pattern in wanted]
            copy = snapshot_download(
                repository, allow_patterns=patterns, local_files_only=not fetch
            )
            folder = Path(copy) / (inside or "")
            if any(folder.glob(weights)):
                return folder
    except Exception as error:  # huggingface_hub and its HTTP client raise many kinds
        if not fetch:
            raise refusal(
                argument, repository,
                "it is no folder here, there is no copy in the cache of the hub, and nothing is "
                f"fetched that a checkpoint alone names; name its encoders by `{argument}`, as hub "
                "ids to have them fetched, or as folders",
            ) from None  # fmt: skip
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if offline := why_offline(error):
            reason = f"{offline}, and there is no copy in the cache {cache_of_the_hub()}"
        raise refusal(
            argument, repository,
            f"it is no folder here, and cannot be fetched from the hub ({reason}); give a path, or "
            "fetch it where there is a network (hf download) and set HF_HOME to that cache",
        ) from None  # fmt: skip
    raise refusal(argument, repository, f"it has no weights ({' or '.join(WEIGHTS)})")


def _beside(folder: str) -> str:
    """What a pipeline calls the folder of the tokenizer of a text encoder in a folder."""
    return folder.replace("text_encoder", "tokenizer")


def words_folder(folder: Path, argument: str) -> Path:
    """Where the tokenizer of a network in a folder lies: there, or beside it as pipelines have it.

    Raises ValueError if there is none.
    """
    for place in (folder, folder.with_name(_beside(folder.name))):
        if any((place / name).is_file() for name in WORDS):
            return place
    raise refusal(
        argument, folder,
        "it has no tokenizer; save that into the same folder, by its save_pretrained",
    )  # fmt: skip


def read_config(folder: Path, argument: str) -> dict[str, Any]:
    """What config.json says. Raises ValueError if it cannot be read."""
    try:
        return read_json(folder / CONFIG)
    except ValueError as error:
        raise refusal(argument, folder, str(error)) from None


def load_network(
    kind: str, folder: Path, argument: str, device: torch.device | str, dtype: torch.dtype
) -> Any:
    """A network of a class of transformers, in evaluation mode and frozen.

    Raises ValueError, with the reason, if it cannot be loaded or its weights are not complete.
    """
    with library() as transformers:
        try:
            network, found = getattr(transformers, kind).from_pretrained(
                str(folder), local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # transformers and safetensors raise many kinds
            raise refusal(argument, folder, f"it cannot be loaded ({_first(error)})") from None
    if lacking := sorted(found["missing_keys"]):
        raise refusal(
            argument, folder, f"it lacks weights, {len(lacking)} of them, such as {lacking[0]}"
        )
    return network.to(device, dtype).eval().requires_grad_(False)


def load_words(folder: Path, network: Any, argument: str) -> Any:
    """The tokenizer of a network in a folder, which pads and cuts at the end.

    Raises ValueError if there is none, or it is another network's.
    """
    place = words_folder(folder, argument)
    with library() as transformers:
        try:
            words = transformers.AutoTokenizer.from_pretrained(
                str(place), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise refusal(argument, place, f"no tokenizer can be loaded ({_first(error)})"
                           ) from None  # fmt: skip
    known = network.get_input_embeddings().num_embeddings
    if not words.is_fast or words.pad_token_id is None or len(words) > known:
        raise refusal(
            argument, place,
            f"the tokenizer has {len(words)} words, the network {known}; give it with its own",
        )  # fmt: skip
    words.padding_side = words.truncation_side = "right"
    return words


def _first(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:300]


def files_hash(folder: Path, argument: str) -> str:
    """One SHA-256, in hexadecimal, for what decides a network and its tokenizer: their files' names
    and bytes, of files above 64 MiB sizes and 64 blocks.
    """
    place, weights = words_folder(folder, argument), list[Path]()
    for pattern in WEIGHTS:
        weights = weights or sorted(folder.glob(pattern))
    paths = [folder / CONFIG, *weights, *(place / name for name in sorted(WORDS))]
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + _digest(path))
    return digest.hexdigest()


def _digest(path: Path) -> bytes:
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        if size <= BLOCKS * BLOCK:
            return hashlib.file_digest(file, "sha256").digest()
        for number in range(BLOCKS):
            file.seek(number * (size - BLOCK) // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    digest.update(str(size).encode())
    return digest.digest()


def tokens_of(words: Any, captions: Sequence[str], length: int, padding: str) -> tuple[Any, Any]:
    """(numbers of tokens (N, L), int64; which are a caption's, bool) by a tokenizer. `padding` is
    transformers' word: "longest" for an L as small as may be, "max_length" for `length`.
    """
    made = words(
        list(captions), padding=padding, truncation=True, max_length=length, return_tensors="pt"
    )
    return made["input_ids"], made["attention_mask"].bool()
