"""Downloads from a server that does all that servers do: nothing but the whole, undamaged file ever
gets its name.
"""
import errno
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import io
import os
import re
import sys
import threading
from types import SimpleNamespace
from typing import NamedTuple
import zipfile

import pytest
import torch

from checkpoints.choice import NetworkChoice
from checkpoints.loading import find_files
from checkpoints.weights import load_weights
from checkpoints import released as checkpoints_released
from checkpoints.released import find_model
from checkpoints.released import download_model, fetch, released_name
from conftest import fill_randomly
from download import main
from models import DiT_models
from processes.flow import FlowProcess
from sampling import load_sampler

NAME, OTHER, FLOW = "DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt", "SiT-XL-2-256x256.pt"
STATE = {"weight": torch.arange(4000) / 7, "bias": torch.ones(3)}


def checkpoint(contents):
    """The bytes that torch.save makes of the contents."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    return buffer.getvalue()


FILE = checkpoint(STATE)  # about 17 kB
SILENCE = 5  # seconds; a test that waits for the end of it has failed


class Answer(NamedTuple):
    """How the server answers one request; by default as it should."""

    cut: int = None  # close the connection after so many bytes
    stall: int = None  # fall silent after so many; -1: do not even send a status
    ranges: bool = True  # False: send the file from its start, whatever was asked for
    at_most: int = None  # send no more of the range than this, and say so
    longer: int = 0  # announce so many bytes more than there are
    length: bool = True  # False: do not announce any length
    status: int = None  # send an error


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers["Range"]
        self.server.asked.append((self.path, asked))
        answer = self.server.plan.pop(0) if self.server.plan else self.server.always
        if len(self.server.asked) > 2000:  # no test needs so many: somebody tries without end
            answer = Answer(status=508)
        if answer.stall == -1:
            return self.server.over.wait(SILENCE)
        if answer.status or self.path.removeprefix("/") not in self.server.files:
            return self.send_error(answer.status or 404)
        whole = self.server.files[self.path.removeprefix("/")]
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and answer.ranges else 0
        if start and start >= len(whole):
            return self.send_error(416)
        body = whole[start:][: answer.at_most]
        self.send_response(206 if asked and answer.ranges else 200)
        if asked and answer.ranges:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(whole)}")
        if answer.length:
            self.send_header("Content-Length", str(len(body) + answer.longer))
        self.end_headers()
        self.wfile.write(body[: answer.cut if answer.stall is None else answer.stall])
        if answer.stall is not None:
            self.server.over.wait(SILENCE)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    """Serves `files`; answers by `plan`, one entry per request, and by `always` after that; notes
    what was `asked`.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.plan, self.always, self.asked = {}, [], Answer(), []
        self.files = dict.fromkeys((NAME, OTHER, FLOW), FILE)
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    @property
    def ranges(self):
        return [asked for _, asked in self.asked]

    def handle_error(self, *args):
        """A client that hangs up is none of the server's business."""


@pytest.fixture
def server(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with Server() as server:
        threading.Thread(
            target=server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True
        ).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """Nobody sleeps; the pauses that were meant to be made."""
    made = []
    monkeypatch.setattr(checkpoints_released, "time", SimpleNamespace(sleep=made.append))
    monkeypatch.setattr(checkpoints_released, "BLOCK", 1 << 10)  # so that the file takes several
    return made


@pytest.fixture
def get(server, tmp_path):
    """Call it to fetch NAME from the server into tmp_path."""
    return lambda: download_model(NAME, tmp_path, server.url)


def visible(folder):
    """The names in a folder but for the hidden ones."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def partial(folder):
    return folder / f"{NAME}.partial"


def altered(place, data=FILE):
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def place_of_data():
    """Where in FILE the values of the larger tensor lie."""
    with zipfile.ZipFile(io.BytesIO(FILE)) as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
        values = archive.read(entry)
    assert FILE.count(values) == 1
    return FILE.index(values) + len(values) // 2


# ---- all goes well ----

def test_file_arrives_and_is_not_asked_for_again(server, get, tmp_path):
    assert get() == tmp_path / NAME
    assert (tmp_path / NAME).read_bytes() == FILE
    assert server.asked == [(f"/{NAME}", None)]
    assert visible(tmp_path) == [NAME]
    assert get() == tmp_path / NAME and len(server.asked) == 1


def test_folder_is_made(server, tmp_path):
    path = download_model(NAME, tmp_path / "a" / "b", server.url)
    assert path == tmp_path / "a" / "b" / NAME and path.read_bytes() == FILE


def test_where_released_checkpoints_lie():
    base = "https://dl.fbaipublicfiles.com/DiT/models"
    sit = (
        "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt"
        "?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0"
    )
    assert checkpoints_released.RELEASED == {
        NAME: ("DiT-XL/2", 256, f"{base}/{NAME}"), OTHER: ("DiT-XL/2", 512, f"{base}/{OTHER}"),
        FLOW: ("SiT-XL/2", 256, sit),
    }  # fmt: skip
    assert checkpoints_released.pretrained_models == {NAME, OTHER, FLOW}
    assert download_model.__defaults__ == ("pretrained_models", None)


def test_each_file_is_fetched_from_its_own_address(server, tmp_path, monkeypatch):
    """Also where that is called otherwise there; an interruption is taken up there as well."""
    path = "/scl/fi/a/SiT-XL-2-256.pt?rlkey=b&dl=0"
    server.files = {path.removeprefix("/"): FILE, NAME: FILE}
    places = {FLOW: f"{server.url}{path}", NAME: f"{server.url}/{NAME}"}
    for name, place in places.items():
        entry = checkpoints_released.RELEASED[name]._replace(address=place)
        monkeypatch.setitem(checkpoints_released.RELEASED, name, entry)
    server.plan = [Answer(cut=5000)]
    assert download_model(FLOW, tmp_path).read_bytes() == FILE
    assert [asked for asked, _ in server.asked] == [path, path] and server.ranges[1]
    assert download_model(NAME, tmp_path).read_bytes() == FILE
    assert visible(tmp_path) == [NAME, FLOW]
    server.files[path.removeprefix("/")] = FILE[:9000] + b"x" + FILE[9001:]
    with pytest.raises(ValueError, match="SiT-XL-2-256.pt.* arrived damaged"):
        download_model(FLOW, tmp_path / "again")
    assert visible(tmp_path / "again") == []


# ---- interruptions ----

@pytest.mark.parametrize(
    "cuts", [[1000], [1, 2, 3], [1000, 0, 5000, 0, 0, 1], [len(FILE) - 1], [1024, 2048]]
)
def test_broken_connection_is_taken_up_where_it_stopped(server, get, tmp_path, cuts):
    server.plan = [Answer(cut=cut) for cut in cuts]
    assert get().read_bytes() == FILE
    have = [sum(cuts[:i]) for i in range(len(cuts) + 1)]
    assert server.ranges == [f"bytes={size}-" if size else None for size in have]
    assert visible(tmp_path) == [NAME]


def test_partial_file_is_kept_between_runs_and_taken_up(server, get, tmp_path, pauses):
    server.plan, server.always = [Answer(cut=3000)], Answer(cut=0)
    with pytest.raises(
        ValueError,
        match=f"cannot download {server.url}/{NAME} .*5 times in a row.* kept, try again",
    ):
        get()
    assert (
        visible(tmp_path) == [f"{NAME}.partial"] and partial(tmp_path).read_bytes() == FILE[:3000]
    )
    assert len(server.asked) == 1 + checkpoints_released.TRIES
    assert (
        len(pauses) == checkpoints_released.TRIES - 1
        and pauses == sorted(pauses)
        and 0 < pauses[0]
        and sum(pauses) < 60
    )

    server.asked.clear()
    server.always = Answer()
    assert get().read_bytes() == FILE
    assert server.ranges == ["bytes=3000-"] and visible(tmp_path) == [NAME]


def test_only_tries_in_a_row_count(server, get):
    empty = [Answer(cut=0)] * (checkpoints_released.TRIES - 1)
    server.plan = [*empty, Answer(cut=10), *empty, Answer(cut=10), *empty]
    assert get().read_bytes() == FILE


def test_server_that_ignores_ranges(server, get, tmp_path):
    server.plan = [Answer(cut=3000, ranges=False), Answer(cut=5000, ranges=False)]
    server.always = Answer(ranges=False)
    assert get().read_bytes() == FILE
    assert server.ranges == [None, "bytes=3000-", "bytes=5000-"]


def test_server_that_ignores_ranges_and_never_comes_to_the_end(server, get, tmp_path):
    server.always = Answer(cut=3000, ranges=False)
    with pytest.raises(ValueError, match="times in a row"):
        get()
    assert visible(tmp_path) == [f"{NAME}.partial"]


def test_server_that_sends_less_than_the_range(server, get, tmp_path):
    """RFC 9110 (15.3.7) lets it; Content-Range tells the length of the whole."""
    server.plan, server.always = [Answer(cut=1000)], Answer(at_most=5000)
    assert get().read_bytes() == FILE
    assert server.ranges == [None, *(f"bytes={have}-" for have in range(1000, len(FILE), 5000))]


@pytest.mark.parametrize("have", [FILE, FILE + b"more", FILE[:-1] + b"??"])
def test_partial_file_with_nothing_left_to_ask_for(server, get, tmp_path, have):
    """The server answers 416; whatever lies there, the whole file comes of it."""
    partial(tmp_path).write_bytes(have)
    assert get().read_bytes() == FILE
    assert visible(tmp_path) == [NAME]


def test_server_that_finds_no_range_satisfiable(server, get, tmp_path):
    partial(tmp_path).write_bytes(FILE[:1000])
    server.always = Answer(status=416)
    with pytest.raises(ValueError, match=f"cannot download {server.url}/{NAME}"):
        get()
    assert not (tmp_path / NAME).exists() and len(server.asked) < 20


@pytest.mark.parametrize("stall", [-1, 0])
def test_silent_server_is_not_waited_for_without_end(server, get, tmp_path, monkeypatch, stall):
    monkeypatch.setattr(checkpoints_released, "PATIENCE", 0.1)
    server.always = Answer(stall=stall)
    with pytest.raises(ValueError, match="timed out.* times in a row"):
        get()
    assert len(server.asked) == checkpoints_released.TRIES
    assert not (tmp_path / NAME).exists()


def test_silence_is_an_interruption(server, get, monkeypatch):
    """Also where it falls in the middle of a block: what has come is not lost."""
    monkeypatch.setattr(checkpoints_released, "PATIENCE", 0.2)
    server.plan = [Answer(stall=-1), Answer(stall=3000), Answer(stall=0)]
    assert get().read_bytes() == FILE
    assert server.ranges == [None, None, "bytes=3000-", "bytes=3000-"]


def test_nobody_there(tmp_path, server):
    server.server_close()
    said = (
        f"cannot download .*{NAME} .*refused.*has no connection.*offline.*"
        f"fetch it by other means to .*/{NAME}"
    )
    with pytest.raises(ValueError, match=said):
        download_model(NAME, tmp_path, server.url)
    assert visible(tmp_path) == []


# ---- wrong answers ----

@pytest.mark.parametrize("status", [404, 403, 500])
@pytest.mark.parametrize("have", [0, 1000])
def test_error_of_the_server(server, get, tmp_path, status, have):
    if have:
        partial(tmp_path).write_bytes(FILE[:have])
    server.always = Answer(status=status)
    with pytest.raises(
        ValueError, match=rf"cannot download {server.url}/{NAME} \(HTTP Error {status}"
    ):
        get()
    assert not (tmp_path / NAME).exists()
    assert (partial(tmp_path).read_bytes() if have else b"") == FILE[:have]


def test_length_that_is_not_announced(server, get, tmp_path):
    server.always = Answer(length=False)
    with pytest.raises(ValueError, match="cannot download .* does not say how long"):
        get()
    assert not (tmp_path / NAME).exists()


def test_length_announced_too_long(server, get, tmp_path):
    server.always = Answer(longer=100)
    with pytest.raises(ValueError, match="cannot download .* times in a row"):
        get()
    assert not (tmp_path / NAME).exists() and len(server.asked) < 20


def test_length_announced_too_short(server, get, tmp_path):
    """All that was promised has come, and yet it is not the file."""
    server.always = Answer(longer=-100)
    with pytest.raises(ValueError, match=f"{NAME} arrived damaged .*removed; download it again"):
        get()
    assert visible(tmp_path) == []


# ---- damage ----

def test_altered_values_are_found_by_the_checksum(server, get, tmp_path):
    server.files[NAME] = altered(place_of_data())
    torch.load(io.BytesIO(server.files[NAME]), weights_only=True)  # nothing else would notice
    with pytest.raises(
        ValueError, match=rf"{NAME} arrived damaged \(\S*/data/\d+; .* was removed; download it"
    ):
        get()
    assert visible(tmp_path) == []  # so that the next run does not take up the damage

    server.files[NAME] = FILE
    server.asked.clear()
    assert get().read_bytes() == FILE and server.ranges == [None]


def test_partial_file_of_something_else_is_found_by_the_checksum(server, get, tmp_path):
    partial(tmp_path).write_bytes(altered(place_of_data())[: place_of_data() + 10])
    with pytest.raises(ValueError, match="arrived damaged"):
        get()
    assert visible(tmp_path) == []
    assert get().read_bytes() == FILE


@pytest.mark.parametrize(
    "content", [b"<html>Please log in</html>", FILE[:-30], FILE[: len(FILE) // 2], b"x" * 20]
)
def test_whole_answer_that_is_no_whole_archive(server, get, tmp_path, content):
    server.files[NAME] = content
    with pytest.raises(
        ValueError, match=rf"{NAME} arrived damaged \(the archive's directory; .*download it again"
    ):
        get()
    assert visible(tmp_path) == []


def outcome(url, path):
    """What becomes of a damaged file: removed, else what shows when it is used."""
    try:
        fetch(url, path)
        tensors = load_weights(path).tensors
        return (
            "harmless"
            if all(torch.equal(tensors[name], STATE[name]) for name in STATE)
            else "taken for good"
        )
    except ValueError as error:
        if "arrived damaged" in str(error):
            return "left lying" if list(path.parent.glob(f"{path.name}*")) else "removed"
        return (
            "unreadable"
            if "is cut short, damaged or no checkpoint; download or copy it again" in str(error)
            else str(error)
        )
    except Exception as error:
        return repr(error)


def test_no_alteration_is_taken_for_good(server, tmp_path):
    """Headers and the directory of the archive as well: each byte that differs breaks zipfile in a
    way of its own.
    """
    with zipfile.ZipFile(io.BytesIO(FILE)) as archive:
        headers = [info.header_offset + i for info in archive.infolist() for i in range(30)]
        places = [*headers, *range(archive.start_dir, len(FILE))][::3]
    outcomes = {}
    for place in places:
        server.files[NAME] = altered(place)
        outcomes[place] = outcome(f"{server.url}/{NAME}", tmp_path / str(place))
    # what zipfile overlooks, such as the number of the disk, is either nothing to torch, or stops
    # it
    expected = ("removed", "harmless", "unreadable")
    assert {place: what for place, what in outcomes.items() if what not in expected} == {}
    assert list(outcomes.values()).count("removed") > len(places) / 4


# ---- several at once ----

def test_one_fetches_and_the_others_wait(server, get, monkeypatch):
    together, paths, receive = threading.Barrier(4), [], checkpoints_released._receive

    def slowly(*args):
        threading.Event().wait(0.2)  # time for the others to get as far, if nothing held them
        return receive(*args)

    def ask():
        together.wait()
        paths.append(get())

    monkeypatch.setattr(checkpoints_released, "_receive", slowly)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(paths) == 4 and {path.read_bytes() for path in paths} == {FILE}
    assert server.ranges == [None]


def test_the_next_tries_when_the_first_fails(server, get):
    server.plan = [Answer(status=500)]
    outcomes, together = [], threading.Barrier(3)

    def ask():
        together.wait()
        try:
            outcomes.append(get().read_bytes())
        except ValueError:
            outcomes.append("failed")

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes, key=str) == [FILE, FILE, "failed"] and len(server.asked) == 2


# ---- names ----

@pytest.mark.parametrize(
    "name", ["DiT-XL-2-1024x1024.pt", "DiT-XL/2", "../evil.pt", "", f"./{NAME}"]
)
def test_unknown_name_is_not_asked_for(server, tmp_path, name):
    with pytest.raises(ValueError, match=f"unknown released model .*; there are {NAME}, {OTHER}"):
        download_model(name, tmp_path / "new", server.url)
    assert server.asked == [] and not (tmp_path / "new").exists()


@pytest.fixture
def released(server, tmp_path, monkeypatch):
    """The server stands for the one of the released checkpoints; returns the folder that they go
    to.
    """
    monkeypatch.setattr(download_model, "__defaults__", (str(tmp_path / "models"), server.url))
    return tmp_path / "models"


def test_find_model_fetches_a_released_one(server, released):
    server.files[OTHER] = checkpoint(
        {"model": {}, "ema": {"module.weight": torch.ones(2)}, "args": None}
    )
    assert {k: v.tolist() for k, v in find_model(OTHER).items()} == {"weight": [1, 1]}
    assert torch.equal(find_model(NAME)["weight"], STATE["weight"])
    assert server.asked == [(f"/{OTHER}", None), (f"/{NAME}", None)] and visible(released) == [
        NAME,
        OTHER,
    ]
    find_model(NAME)
    assert len(server.asked) == 2


def test_find_model_reads_a_local_file(server, released, tmp_path):
    path = tmp_path / "mine.pt"
    path.write_bytes(
        checkpoint({"model": {"weight": torch.zeros(2)}, "ema": {"weight": torch.ones(2)}})
    )
    assert find_model(str(path))["weight"].tolist() == [1, 1]
    path.write_bytes(checkpoint({"weight": torch.full((2,), 3)}))
    assert find_model(path)["weight"].tolist() == [3, 3]
    assert server.asked == []


def test_find_model_that_is_nowhere(server, released, tmp_path):
    for name in ("nothing.pt", "DiT-XL-2-1024x1024.pt", str(tmp_path / NAME)):
        with pytest.raises(ValueError, match=f"there is no checkpoint {name}"):
            find_model(name)
    with pytest.raises(ValueError, match="holds a list"):
        path = tmp_path / "list.pt"
        path.write_bytes(checkpoint([1]))
        find_model(path)
    assert server.asked == []


@pytest.mark.parametrize(
    "flags, name",
    [
        (("DiT-XL/2", 256, 1000), NAME), (("DiT-XL/2", 512, 1000), OTHER),
        (("SiT-XL/2", 256, 1000), FLOW), (("DiT-XL/2", 128, 1000), NAME),
        (("SiT-XL/2", 512, 1000), FLOW),
    ],
)  # fmt: skip
def test_name_of_what_was_released(flags, name):
    assert released_name(*flags) == name


@pytest.mark.parametrize(
    "flags", [("DiT-XL/4", 256, 1000), ("DiT-XL/2", 256, 10), ("SiT-L/2", 512, 1000)]
)  # fmt: skip
def test_what_was_not_released(flags):
    model, size, classes = flags
    says = (
        f"no weights were released for {model} at {size} pixels with {classes} classes.*"
        "DiT-XL/2 at 512 and SiT-XL/2 at 256, 1000 classes.; pass `ckpt`"
    )
    with pytest.raises(ValueError, match=says):
        released_name(*flags)


# ---- the door ----

@pytest.mark.parametrize("models, names", [
    ([], [NAME, OTHER]), ([OTHER], [OTHER]), (["DiT-XL/2"], [NAME, OTHER]),
    ([OTHER, "DiT-XL/2", OTHER], [OTHER, NAME]), ([FLOW], [FLOW]), (["SiT-XL/2"], [FLOW]),
])  # fmt: skip
def test_door_prints_the_paths(server, released, tmp_path, capsys, models, names):
    main([*models, "--folder", str(tmp_path / "here")])
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "here" / name) for name in names]
    assert [path for path, _ in server.asked] == [f"/{name}" for name in names]


def test_door_with_an_unknown_model(server, released, capsys):
    with pytest.raises(SystemExit) as caught:
        main([NAME, "DiT-B/4"])
    assert caught.value.code == 2
    assert re.search(
        f"nothing was released as 'DiT-B/4'; there are {NAME}, {OTHER}", capsys.readouterr().err
    )
    assert server.asked == []  # nothing is fetched before all is understood


def test_door_when_the_download_fails(server, released, tmp_path):
    server.always = Answer(status=404)
    with pytest.raises(SystemExit, match="^download.py: error: cannot download .*404"):
        main(["--folder", str(tmp_path / "here")])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="^download.py: error: .*file"):
        main(["--folder", str(tmp_path / "file")])


def test_door_where_something_else_has_the_name(server, released, tmp_path):
    (tmp_path / NAME).write_bytes(b"<html>not found</html>")
    with pytest.raises(SystemExit, match=f"{NAME} is cut short or no checkpoint; remove it"):
        main([NAME, "--folder", str(tmp_path)])
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    with pytest.raises(SystemExit, match=f"{NAME} is a folder; remove it"):
        main([NAME, "--folder", str(tmp_path)])
    assert server.asked == []


# ---- disks and locks ----

def test_a_full_disk_is_named_at_once(server, get, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints_released, "_receive", full)
    with pytest.raises(
        ValueError, match=r"cannot write .*\.partial .No space left on device.; make room there"
    ) as caught:
        get()
    assert "times in a row" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_disks_without_locks_are_no_hindrance(server, get, monkeypatch, number):
    def refuse(*args):
        raise OSError(number, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert get().read_bytes() == FILE


def test_no_fcntl_is_no_hindrance(server, get, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert get().read_bytes() == FILE


# ---- who asks for them ----

def test_a_released_flow_is_sampled_as_one(server, released, monkeypatch):
    """A small one of the same layout: a bare state dict with a variance's outputs."""
    network = fill_randomly(DiT_models["DiT-Ti/8"](input_size=16, in_channels=3))
    server.files[FLOW] = checkpoint(network.state_dict())
    small = checkpoints_released.Released("SiT-Ti/8", 16, "")
    monkeypatch.setitem(checkpoints_released.RELEASED, FLOW, small)
    sampler = load_sampler(
        model="SiT-Ti/8", image_size=16, vae="none", sampler="sde", steps=3, device="cpu"
    )
    assert server.asked == [(f"/{FLOW}", None)] and sampler.process.config == FlowProcess().config
    assert sampler.classes[207] and sampler.images([207, 360]).std() > 0


@pytest.mark.parametrize("flags, name", [
    ({}, NAME), ({"image_size": 512}, OTHER), ({"model": "SiT-XL/2"}, FLOW),
    ({"process": "flow"}, FLOW), ({"model": "DiT-XL/2", "process": "flow"}, FLOW),
    ({"process": "diffusion"}, NAME),
])  # fmt: skip
def test_without_a_checkpoint_the_released_one_is_fetched(server, released, flags, name):
    found = find_files(NetworkChoice(**flags), "mse")
    assert found.checkpoint == released / name and server.asked == [(f"/{name}", None)]
