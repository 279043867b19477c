"""What encoders outside of a network made of captions, cached beside latents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conditions.text import Share
from layers.text import Text

TEXT_MANIFEST = "text.json"  # what a folder of latents has where captions were encoded


class CachedText:
    """The output of encoders for each caption of a folder's images, one row a caption.

    `hash` tells it from others, `notes` say what a user should know. Raises ValueError if the
    folder has none, or it is damaged.
    """

    null: Text
    shares: tuple[Share, ...]
    says: list[dict[str, Any]]
    hash: str
    notes: tuple[str, ...] = ()

    def __init__(self, folder: Path | str) -> None:
        raise ValueError(f"{folder} holds no text that encoders have read")

    def rows(self, index: int) -> Sequence[int]:
        """The rows of an image's captions."""
        raise NotImplementedError

    def text(self, row: int) -> Text:
        """The Text of one caption."""
        raise NotImplementedError
