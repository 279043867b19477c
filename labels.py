"""A class as a user writes it, by number or by name → its index."""

import unicodedata

INDEX, NAME = "index:", "name:"  # before a label that is both a number and a name, to say which of the two is meant


def label_index(text: str, num_classes: int, names: dict[str, set[int]]) -> int:
    """The class index for a label that a user wrote: a number from 0 on, or one of `names`, {name: its indices}.

    "index:3" and "name:3" say which of the two 3 is. A name may be in another Unicode form. Raises ValueError for a label that
    does not exist, or that may mean several classes.
    """
    named = indices_of(text, names)
    if not named and text.startswith((INDEX, NAME)):
        kind, text = text[: text.index(":") + 1], text[text.index(":") + 1 :]
        numbered, named = (_number(text, num_classes), set()) if kind == INDEX else (set(), indices_of(text, names))
    else:
        numbered = _number(text, num_classes)
    found = numbered | named
    if numbered and len(found) > 1:
        of_name, (number,) = " and ".join(map(str, sorted(named))), numbered
        raise ValueError(
            f"{text} may be the class with the number {number} or the class that is called {text} (number {of_name}); give "
            f"{INDEX}{text} or {NAME}{text}"
        )
    if len(found) > 1:
        raise ValueError(f"{text}: several classes have that name; give the number, {' or '.join(map(str, sorted(found)))}")
    if not found:
        some = f"{', '.join(list(names)[:10])}{' …' if len(names) > 10 else ''}"
        known = f" or one of the names {some}" if names else ""
        raise ValueError(f"{text}: give a number from 0 to {num_classes - 1}{known}")
    return found.pop()


def indices_of(text: str, names: dict[str, set[int]]) -> set[int]:
    """The indices of a name; if it is not there as it is written, of those that are it in another Unicode form."""
    if text in names or text.isascii():
        return set(names.get(text, ()))
    wanted = unicodedata.normalize("NFC", text)
    return {i for name, indices in names.items() if unicodedata.normalize("NFC", name) == wanted for i in indices}


def _number(text, num_classes):
    """{the number that a text is} if there is such a class, else nothing."""
    short = text.isdecimal() and len(text) <= len(str(num_classes)) + 20
    return {int(text)} if short and int(text) < num_classes else set()
