"""The folder of a job of many images: its name, its manifest.json, and its files, written whole.

The folder's name ends in a hash of all that decides the images, so that the same options go on in
the same folder.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
import hashlib
import json
import os
from pathlib import Path
import platform
import socket
from typing import Any, BinaryIO

import torch
from torch import Tensor

from checkpoints.choice import NetworkChoice
from checkpoints.loading import NetworkFiles
from checkpoints.network_config import LATER
from checkpoints.networks import Network
from runtime.disk import file_hash
from runtime.json_files import read_json
from runtime.presence import lock
from runtime.surroundings import Place
from sampling.options import OWN, ManyOptions, SamplingOptions
from sampling.sampler import Sampler
from vae import vae_hashes

MANIFEST = "manifest.json"
CAPTIONS = "captions.txt"  # a line for each image, in order: its prompt
Wishes = Tensor | list[str]  # what every image is to be: labels, int64 (N,), or N prompts
# Options that change no image
INCIDENTAL = ("device", "sample_dir", "ckpt", "text_encoder", "ckpt_high")
# Options that earlier versions lacked, at what these did: folders keep the names that they had
NEWER = {
    "cfg_interval": (0.0, 1.0), "compile": False, "image_size": None, "extrapolation": None,
    "prompts": None, "negative_prompt": None, "frames": None, "high_from": None, "cache": None,
}  # fmt: skip
POLICIES = ("random", "balanced")  # of labels; anything else is a file


def recorded_options(
    files: NetworkFiles, choice: NetworkChoice, options: SamplingOptions, sampler: Sampler,
    many: ManyOptions, device: str | None, tf32: bool,
) -> dict[str, Any]:  # fmt: skip
    """What manifest.json has under "options": every option of the job, by the name and in the order
    of sample_ddp.py's flags; of those that some solvers have, the solver's. The device is the one
    that is asked for. Image size and frames are None where the network was trained on them.
    """
    sampling = options.settled(
        sampler.process, text=sampler.reads_text, clips=sampler.makes_clips
    )
    own = {name: sampling.pop(name) for name in OWN if name in sampling}
    later = ("compile", "extrapolation", "frames", "high_from", "cache")
    last = {name: sampling.pop(name) for name in later}
    trained = sampler.network.latent_shape
    other_size = sampler.latent[-2:] != trained[-2:]
    if sampler.latent[:-2] == trained[:-2]:
        last["frames"] = None
    network = {
        "ckpt": str(files.checkpoint), "weights": choice.weights, "vae": files.vae,
        "image_size": sampler.image_size if other_size else None, "device": device,
        "text_encoder": choice.text_encoder,
        "ckpt_high": None if files.high is None else str(files.high),
    }  # fmt: skip
    return asdict(many) | network | sampling | {"tf32": tf32} | last | own


def deciding(
    recorded: dict[str, Any], files: NetworkFiles, network: Network, labels: Wishes,
    device_type: str,
) -> dict[str, Any]:  # fmt: skip
    """What manifest.json has under "decides", from recorded_options and what the job has loaded:
    all that changes an image, and nothing else.
    """
    decides = {
        name: value
        for name, value in sorted(recorded.items())
        if name not in INCIDENTAL and (name not in NEWER or NEWER[name] != value)
    }
    if Path(files.vae).is_dir():
        decides["vae"] = "see vae_sha256"
    if isinstance(labels, list):
        del decides["labels"]
        decides["prompts"] = hashlib.sha256(caption_lines(labels)).hexdigest()
    elif decides["labels"] not in POLICIES:
        decides["labels"] = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
    design = {key: value for key, value in network.config.items() if LATER.get(key) != value}
    if files.high is not None:
        decides["high_sha256"] = file_hash(files.high)
    return decides | {
        "device_type": device_type, "network": design,
        "checkpoint_sha256": file_hash(files.checkpoint), "vae_sha256": vae_hashes(files.vae),
    }  # fmt: skip


def caption_lines(prompts: list[str]) -> bytes:
    """What CAPTIONS holds: a line for each image."""
    return "".join(f"{prompt}\n" for prompt in prompts).encode()


def folder_of(recorded: dict[str, Any], decides: dict[str, Any]) -> Path:
    """The folder of the images that these options make, from recorded_options and deciding."""
    told = {
        "cfg": recorded["cfg_scale"],
        "steps": f"{recorded['num_sampling_steps']}-{recorded['sampler']}",
        "seed": recorded["global_seed"],
        "n": recorded["num_fid_samples"],
    }
    words = [Path(recorded["ckpt"]).stem[:80], *(f"{key}-{value}" for key, value in told.items())]
    digest = hashlib.sha256(json.dumps(decides, indent=1).encode()).hexdigest()
    return Path(recorded["sample_dir"]) / "-".join([*words, digest[:8]])


def make_folder(folder: Path) -> None:
    """Make the folder, if need be. Raises ValueError if files cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_locked(folder / ".probe", lambda file: None)
        (folder / ".probe").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder} ({error.strerror}); choose another `sample_dir`"
        ) from None


def circumstances(device: torch.device, place: Place) -> dict[str, Any]:
    """What manifest.json tells of a start: when, where and with what; its "seconds" are open."""
    kind = platform.processor() or device.type
    return {
        "started": datetime.now(UTC).isoformat(), "processes": place.world_size,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else kind,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "seconds": None,
    }  # fmt: skip


def write_manifest(folder: Path, manifest: dict[str, Any], run: dict[str, Any]) -> None:
    """Write manifest.json, with this start, `run`, after those before it; print a note if those
    were made under other circumstances.
    """
    earlier: list[dict[str, Any]] = []
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = read_json(folder / MANIFEST)["runs"]
        earlier = [one for one in found if one["started"] != run["started"]]
    if run["seconds"] is None:
        _note_differences(earlier, run)
    text = json.dumps({**manifest, "runs": [*earlier, run]}, indent=1)
    write_locked(folder / MANIFEST, lambda file: file.write(text.encode()))


def _note_differences(earlier, run):
    for name in ("threads", "device", "versions"):
        others = {json.dumps(one.get(name)) for one in earlier} - {json.dumps(run[name])}
        if others:
            print(
                f"note: a start before had other {name} ({', '.join(sorted(others))}): images may "
                "round otherwise"
            )


def image_path(folder: Path, i: int) -> Path:
    """The file of image i, or of clip i: its frames, side by side."""
    return folder / f"{i:06d}.png"


def images_there(folder: Path, count: int) -> set[int]:
    """The indices, of `count`, whose images are in the folder."""
    names = set(os.listdir(folder))
    return {i for i in range(count) if image_path(folder, i).name in names}


def write_locked(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Call write(file), and give the file its name when it is complete. Until then it is locked:
    other processes neither disturb it nor remove it as a leftover.

    Raises OSError, with the path, if the disk refuses.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()[:20]}-{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            with suppress(OSError):  # file systems without locks
                lock(file)
            write(file)
            file.flush()
            temporary.replace(path)  # still locked
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left half-written of this name.

    What is being written is locked by its process.
    """
    for path in folder.glob(f".{name}.*.partial"):
        with suppress(OSError), open(path, "r+b") as file:
            if lock(file):
                path.unlink()
