"""What all doors share: the parser of their command lines, and how they end when they are
interrupted or something is refused.

It needs the standard library alone, so that a door can import it before PyTorch, which takes
seconds.
"""

import argparse
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
import os
from pathlib import Path
import re
import select
import signal
import sys
from typing import Any, NoReturn, TextIO

from runtime.image_size import ImageSize, size_in

# Exit codes, as shells have them for SIGINT and SIGPIPE
INTERRUPTED, PIPE_CLOSED = 128 + 2, 128 + 13
LONGEST_MESSAGE = 1000  # characters; a number with thousands of digits is cut in its middle
OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator|out of memory|integer multiplication overflow|size calculation overflow"
)
LOST_WORKER = (
    "the system ends one where memory is short (dmesg tells); "
    "pass fewer --num-workers, or give the job more memory"
)
# What torch says when another process of the job is no more.
PEER = re.compile(
    r"gloo|NCCL|Connection (?:reset|closed) by peer|TCPStore|Broken pipe", re.IGNORECASE
)
PEER_GONE = "another process of this job has ended, or cannot be reached; look at what it said"
AMOUNT = re.compile(r"(?:tried|unable) to allocate ([\d.]+ \w+)", re.IGNORECASE)

ARGUMENT = re.compile(r"`(\w+)(?:=([^`]*))?`")  # as a library's message has it
FOREIGN = re.compile(r"[a-z]+(?:_[a-z]+)+")  # the name of an argument that another door has
QUOTES = "\"'"  # of a text, which a command line does without
LEAVE_OUT = "leave the argument out"  # as a library's message has it

# Takes argv, the words of the command line; None for those of this process
Main = Callable[..., None]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that keeps a description's lines, takes whole names of options only,
    refuses empty values, and says which value counts when an option is given twice. Messages begin
    with the name of the door, whose __file__ it is given.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        own: dict[str, Any] = {
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            "allow_abbrev": False,
        }
        super().__init__(Path(prog).name, **own | options)

    # Argparse has overloads here
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse has it; a subcommand's parser is asked for its own part of the command line.
        """
        words = list(sys.argv[1:] if args is None else args)
        self._check_words(words)
        parsed = super().parse_known_args(words, namespace)
        if is_first_process():
            for note in self._repetitions(words):
                print(f"note: {note}", file=sys.stderr)
        return parsed

    def _check_words(self, words):
        """Leave the program if a value is empty, or cannot be a name of a file.

        An unset variable's value is empty.
        """
        option = "an argument"
        for word in words:
            name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
            option = name or option
            if not value and (equals or not name):
                self.error(f"{option} is empty; give a value, or leave it out")
            if "\0" in word:
                self.error(
                    f"{option} has a zero byte, which no name of a file has; give another value"
                )

    def _repetitions(self, words):
        """Yields a sentence for each option that is given several times with different values."""
        given: dict[argparse.Action, list[tuple[str, list[str]]]] = {}
        for name, values in self._occurrences(words, self._option_string_actions):
            action = self._option_string_actions[name]
            count = 1 if action.nargs is None else action.nargs  # "+" takes whatever follows
            given.setdefault(action, []).append(
                (name, values[:count] if isinstance(count, int) else values)
            )
        for times in given.values():
            names, last = dict.fromkeys(name for name, _ in times), times[-1]
            if any(values != last[1] or not values and name != last[0] for name, values in times):
                one = f"{last[0]} is given {'twice' if len(times) == 2 else f'{len(times)} times'}"
                several = f"{' and '.join(names)} decide the same"
                counts = one_line(" ".join(last[1]) or last[0])
                yield f"{one if len(names) == 1 else several}; the last one, {counts}, counts"

    def _occurrences(self, words, options):
        """[(option, the words after it)] for these options, in the order of the command line."""
        found: list[tuple[str, list[str]]] = []
        for word in words[: words.index("--")] if "--" in words else words:
            name, equals, value = word.partition("=")
            if name in options:
                found.append((name, [value] if equals else []))
            elif found:
                found[-1][1].append(word)
        return found

    def given(self, words: list[str] | None) -> frozenset[str]:
        """The names of the arguments that a command line (None: this process's) gives, also those
        it gives at their default. Options of subcommands count.
        """
        actions = self._all_actions()
        names = {option: action.dest for action in actions for option in action.option_strings}
        occurrences = self._occurrences(list(sys.argv[1:] if words is None else words), names)
        return frozenset(names[option] for option, _ in occurrences)

    def _all_actions(self):
        """The actions of this parser and of its subcommands' parsers."""
        commands = [
            parser
            for action in self._actions
            if isinstance(action, argparse._SubParsersAction)
            for parser in action.choices.values()
        ]
        return [action for parser in (self, *commands) for action in parser._actions]

    def worded(self, message: str) -> str:
        """A library's message with its arguments as this parser's flags: `cfg_scale=1` becomes
        --cfg-scale 1, `weights="raw"` becomes --weights raw, and an argument to leave out a flag.

        An argument of another door, told by the underscore in its name, becomes that door's flag.
        Whatever else stands in backticks stays as it is.
        """
        return ARGUMENT.sub(self._worded, message).replace(LEAVE_OUT, "leave the flag out")

    def _worded(self, found):
        """The flag, and its value if there is one, for an argument in backticks."""
        name, value = found.groups()
        options = [
            option
            for action in self._all_actions()
            if action.dest == name
            for option in action.option_strings
        ]
        if not options and FOREIGN.fullmatch(name):
            options = [f"--{name.replace('_', '-')}"]
        if not options:
            return found.group()
        if value in ("True", "False"):
            return options[0 if value == "True" else -1]
        return options[0] if value is None else f"{options[0]} {value.strip(QUOTES)}"

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, worded and in one line.

        The program ends with code 2.
        """
        super().error(one_line(self.worded(message)))

    def fail(self, message: str) -> NoReturn:
        """Print the message, worded and in one line, and leave the program with code 1.

        This is for what fails once the work has begun.
        """
        self.exit(1, f"{self.prog}: error: {one_line(self.worded(message))}\n")

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Within it, a ValueError or an OSError ends the program as error() does.

        A name that is too long raises such an OSError.
        """
        try:
            yield
        except (ValueError, OSError) as error:
            self.error(reason(error))


def check_alone(name: str, given: Collection[str], why: str) -> None:
    """Raise ValueError if a command line gives other arguments beside the one of this name, with
    what it does, which leaves them without a use.
    """
    if others := sorted({*given} - {name}):
        raise ValueError(f"`{name}` {why}; leave out `{others[0]}`, or `{name}`")


def read_size(text: str) -> ImageSize:
    """The size in pixels that a flag's value is. Raises ArgumentTypeError if it is none."""
    try:
        return size_in(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def reason(error: Exception) -> str:
    """What an error says; an OSError names its file first, and not its number."""
    if isinstance(error, OSError) and error.strerror:
        return (
            f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
        )
    return str(error) or type(error).__name__


def one_line(text: str) -> str:
    """The text in bounded length, what would break a line or a terminal written as an escape."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if len(text) <= LONGEST_MESSAGE:
        return text
    half = LONGEST_MESSAGE // 2
    return f"{text[:half]} … {text[-half:]}"


def is_first_process() -> bool:
    """Whether this is the first of the processes that a launcher started, or the only one.

    The first speaks for all.
    """
    return os.environ.get("RANK", "").strip() in ("", "0")


def door(lower: str = "", resumes: bool = False) -> Callable[[Main], Main]:
    """A decorator for a door's main, with which what stops a program ends it with a line.

    That is Ctrl-C, a closed pipe, a refusing disk, or too little memory. `lower` are the flags that
    memory depends on; `resumes`: the same command goes on where it was interrupted. Within main
    every text can be printed, whatever the locale.
    """

    def decorate(main: Main) -> Main:
        prog = Path(main.__code__.co_filename).name

        @wraps(main)
        def guarded(argv: list[str] | None = None) -> None:
            as_script = signal.getsignal(signal.SIGINT) is _leave
            if as_script:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            with open_streams(), printable(), ending(prog, lower, resumes, as_script):
                main(argv)

        return guarded

    return decorate


@contextmanager
def ending(prog: str, lower: str, resumes: bool, as_script: bool) -> Iterator[None]:
    """Within it, what `door` names ends the program with a line and SystemExit."""
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()
    except KeyboardInterrupt:
        if as_script:
            # A second one must not disturb the clearing up
            signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        again = "; the same command goes on" if resumes else ""
        raise ended(INTERRUPTED, f"{prog}: interrupted{again}", is_first_process()) from None
    except OSError as error:
        # Whoever read it has seen enough
        if isinstance(error, BrokenPipeError) and is_unread(sys.stdout):
            raise ended(PIPE_CLOSED, f"{prog}: nobody reads the output", said=False) from None
        again = "; mend that, and the same command goes on" if resumes else ""
        raise ended(1, f"{prog}: error: {reason(error)}{again}") from None
    except (MemoryError, RuntimeError) as error:
        if lost := why_lost(error):
            again = "; the same command goes on" if resumes else ""
            raise ended(1, f"{prog}: error: {lost}{again}") from None
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        amount = AMOUNT.search(str(error))
        wanted = f" (it wanted {amount[1]} more)" if amount else ""
        advice = f"; lower {lower}" if lower else ""
        raise ended(1, f"{prog}: error: the memory is too small for this{wanted}{advice}") from None
    finally:
        leave_nothing(sys.stdout)


def why_lost(error: Exception) -> str | None:
    """That a loader's worker or another process of the job is no more, if torch's error says so.

    Other errors give None.
    """
    text = str(error)
    first = text.splitlines()[0].rstrip(" .")[:200] if text else ""
    if "DataLoader worker" in text:
        return f"{first}: {LOST_WORKER}"
    return f"{PEER_GONE} ({first})" if PEER.search(text) else None


@contextmanager
def open_streams() -> Iterator[None]:
    """Within it, standard streams that were closed lead nowhere.

    What is opened next must not take their numbers.
    """
    fill_descriptors()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout, sys.stderr = (stream or nowhere for stream in before)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def fill_descriptors() -> None:
    """Open the null device for each of the three standard streams that is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


@contextmanager
def printable() -> Iterator[None]:
    """Within it, what the terminal's encoding lacks is printed as an escape.

    Nothing raises UnicodeEncodeError.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before):
            stream.reconfigure(errors=errors)


def is_unread(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe that nobody reads any more."""
    with suppress(OSError, ValueError, AttributeError):  # no descriptor, or a system without poll
        poll = select.poll()
        poll.register(stream, 0)  # type: ignore[arg-type]
        return any(events & select.POLLERR for _, events in poll.poll(0))
    return False


def leave_nothing(stream: TextIO | None) -> None:
    """Write what a stream holds back, or, if it cannot be written, throw it away.

    The interpreter would complain at its end.
    """
    try:
        if stream:
            stream.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[union-attr]


def ended(code: int, line: str, said: bool = True) -> SystemExit:
    """The SystemExit with this code, its text a line that has been printed, if it is to be said,
    where that can be.
    """
    line = one_line(line)
    if said:
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)
    stop = SystemExit(line)
    stop.code = code
    return stop


def end_at_interrupt() -> None:
    """From here on Ctrl-C ends the program at once with a line.

    main, made by `door`, answers it from its beginning on. For scripts, before they import what
    takes seconds.
    """
    fill_descriptors()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(*_):
    ended(INTERRUPTED, f"{Path(sys.argv[0]).name}: interrupted", is_first_process())
    os._exit(INTERRUPTED)
