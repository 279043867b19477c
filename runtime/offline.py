"""Whether a download failed because there is no network, which libraries report in many ways."""

from collections.abc import Iterator
import socket

# Kinds of httpx and requests, which are not imported for this.
CONNECTION = {
    "ConnectError", "ConnectTimeout", "ProxyError", "NameResolutionError", "NewConnectionError",
    "MaxRetryError",
}  # fmt: skip


def why_offline(error: BaseException) -> str | None:
    """That there is no network, in words, if an error or what caused it says so.

    Other errors give None.
    """
    kinds = list(_causes(error))
    if any(type(cause).__name__ == "OfflineModeIsEnabled" for cause in kinds):
        return "this machine is set to be offline, by HF_HUB_OFFLINE"
    known = (ConnectionError, TimeoutError, socket.gaierror)
    if any(isinstance(cause, known) or type(cause).__name__ in CONNECTION for cause in kinds):
        return "this machine has no connection to the server; is it offline?"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came from."""
    while error is not None:
        yield error
        if isinstance(reason := getattr(error, "reason", None), BaseException):  # urllib's
            yield reason
        error = error.__cause__ or error.__context__


def cache_of_the_hub() -> str:
    """Where copies of what the Hugging Face hub has lie."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE
