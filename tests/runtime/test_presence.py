"""Processes that share work through a folder: who is at it, who is gone, who never came."""

import os
import signal

import pytest

from runtime.presence import Presence
from sampling import many
from runtime.surroundings import Place


@pytest.fixture
def other(tmp_path):
    """A function that begins process 1 of 2 in tmp_path and returns its number."""
    started = []

    def begin():
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            with Presence(tmp_path, Place(1, 2)):
                os.write(write, b"!")
                signal.pause()
        os.read(read, 1)
        started.append(child)
        return child

    yield begin
    for child in started:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except OSError:
            pass


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_process_that_is_killed_is_gone(tmp_path, other):
    with Presence(tmp_path, Place(0, 2)) as presence:
        assert (
            not presence.at_work(1)
            and not presence.is_gone(1)
            and "process 1 of 2 is not there" in presence.missed({1})
        )
        child = other()
        assert presence.at_work(1) and not presence.is_gone(1) and presence.missed({0, 1}) == ""
        kill(child)
        assert not presence.at_work(1) and presence.is_gone(1) and presence.missed({0}) == ""
        with pytest.raises(ValueError, match="process 1 of 2 has ended without doing its share"):
            presence.missed({1})
        other()
        assert presence.missed({1}) == ""
    assert sorted(os.listdir(tmp_path)) == [".process-1"]


def test_a_process_that_was_there_before_and_is_killed_is_gone(tmp_path, other):
    child = other()
    os.utime(tmp_path / ".process-1", (1, 1))
    with Presence(tmp_path, Place(0, 2)) as presence:
        assert not presence.is_gone(1)
        kill(child)
        assert presence.is_gone(1)


def test_only_one_process_of_a_rank_where_that_is_wanted(tmp_path):
    with Presence(tmp_path, Place(0, 1), only=True):
        with Presence(tmp_path, Place(0, 1)):
            pass
    with (
        Presence(tmp_path, Place(0, 1)),
        pytest.raises(ValueError, match="is being written by process"),
    ):
        with Presence(tmp_path, Place(0, 1), only=True):
            pass


def test_what_an_earlier_start_left_says_nothing(tmp_path, other):
    kill(other())
    os.utime(tmp_path / ".process-1", (1, 1))
    with Presence(tmp_path, Place(0, 2)) as presence:
        assert not presence.is_gone(1) and "is not there" in presence.missed({1})
    assert os.listdir(tmp_path) == []  # the first process clears up


def test_who_ends_well_leaves_nothing_and_who_does_not_leaves_its_file(tmp_path):
    with Presence(tmp_path, Place(0, 2)) as presence:
        with pytest.raises(KeyError), Presence(tmp_path, Place(1, 2)):
            raise KeyError
        assert presence.is_gone(1)
        with Presence(tmp_path, Place(1, 2)):
            pass
        assert not presence.is_gone(1)


def test_where_there_are_no_locks_nobody_is_gone(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with Presence(tmp_path, Place(0, 2)) as presence:
        (tmp_path / ".process-1").touch()
        assert presence.at_work(1) and not presence.is_gone(1)


def test_the_first_process_waits_for_nobody_who_is_gone(tmp_path, other, monkeypatch):
    """Images 2 and 3 of 4, in chunks of two, are those of process 1."""
    monkeypatch.setattr(many, "POLL_SECONDS", 0)
    for i in (0, 1, 2):
        (tmp_path / f"{i:06d}.png").touch()
    with (
        pytest.raises(ValueError, match="process 1 of 2 has ended"),
        Presence(tmp_path, Place(0, 2)) as presence,
    ):
        kill(other())
        many.wait_for_all(tmp_path, 4, presence, 2)
