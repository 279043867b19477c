"""Who reads the prompts of a network that takes text, and what prompts there can be."""

from collections.abc import Iterable, Sequence
from typing import Any

from conditions.text import PieceReader, Reader
from runtime.command_line import one_line

MOST_NOTES = 4  # prompts that are cut, in notes; the rest is counted
BEGINNING = 40  # characters of a prompt by which a message names it


def reader_for(network: Any, names: Sequence[str] | None = None) -> Reader | None:
    """The Reader of a network's prompts: of its own encoder, or of the outside encoders that its
    checkpoint names; `names` say where these lie now. None for a network that takes labels.

    Raises ValueError if nobody says which encoders these are, if they cannot be loaded, and for
    names that a network has no use for.
    """
    length = getattr(network, "text_length", None)
    inside = length is None or network.text_encoder is not None
    if inside and names is not None:
        reads = "labels" if length is None else "text with an encoder of its own"
        raise ValueError(
            f"`text_encoder` is given, and the network reads {reads}; leave the argument out"
        )
    if length is None:
        return None
    if inside:
        return PieceReader(length)
    if not network.text:
        raise ValueError(
            "the network reads what outside text encoders give, and its checkpoint does not say "
            "which; give one that names them, as train.py writes it, or a whole pipeline of "
            "diffusers in a local folder, with all of its text encoders"
        )
    from conditions.encoders import reader_of  # which few networks need

    return reader_of(network.text, names, device=next(network.parameters()).device)


def checked_prompts(prompts: object, name: str = "prompts") -> list[str]:
    """Prompts as a list. Raises ValueError, naming the argument, if they are not a list of texts
    that UTF-8 can hold.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise ValueError(f"`{name}` is {prompts!r:.60}; give a list of texts")
    found = list(prompts)
    for prompt in found:
        if not isinstance(prompt, str):
            raise ValueError(f"`{name}` has {prompt!r:.60}, which is no text; give texts alone")
        check_text(prompt, name)
    return found


def check_text(text: str, name: str) -> None:
    """Raise ValueError, naming the argument, for a text that UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"`{name}` {beginning(text)} has bytes that are no text in UTF-8; write them anew"
        ) from None


def cut_notes(reader: Reader, prompts: Iterable[str]) -> list[str]:
    """Sentences on prompts that are too long to be read whole, with what is read of each; of many
    the first few, and how many others there are.
    """
    cut = {
        prompt: part
        for prompt in dict.fromkeys(prompts)
        if (part := reader.cut_at(prompt)) is not None
    }
    notes = [
        f'the prompt {beginning(prompt)} is too long for the network, which reads "'
        f'{one_line(part)}" of it'
        for prompt, part in list(cut.items())[:MOST_NOTES]
    ]
    if len(cut) > MOST_NOTES:
        notes.append(f"{len(cut) - MOST_NOTES} more prompts are too long, and are cut likewise")
    return notes


def beginning(prompt: str) -> str:
    """A prompt as messages name it: in quotes and on one line, its end left out if it is long."""
    text = one_line(prompt[:BEGINNING])
    return f'"{text}…"' if len(prompt) > BEGINNING else f'"{text}"'
