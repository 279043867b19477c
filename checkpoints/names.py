"""What users call networks; and what they call a checkpoint, a path or a name on the Hugging Face
hub, to a local file.
"""

from contextlib import suppress
from pathlib import Path
import re

from checkpoints import networks
from checkpoints.files import newest_checkpoint
from models import DiT_models
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from runtime.disk import check_name, check_path
from runtime.offline import cache_of_the_hub, why_offline

# Process → the family of names under which networks that learned it were published
FAMILIES = {GaussianProcess.word: "DiT", FlowProcess.word: "SiT"}
FLOWS = {name.replace("DiT", "SiT", 1): name for name in DiT_models}
# What a network may be called → its key in networks.MODELS. One called SiT has learned a flow; one
# called DiT, either.
MODELS = {name: name for name in networks.MODELS} | FLOWS

PRETRAINED = "model.safetensors"  # in a folder with config.json, as on the Hugging Face hub
PRETRAINED_FILES = (
    PRETRAINED, "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
)  # fmt: skip


def weights_file(path: Path | str) -> Path:
    """The file of weights that a path means: itself; a run folder's newest checkpoint; that of a
    folder with config.json or, written by a pipeline of diffusers, with model_index.json.

    Raises ValueError if there is none.
    """
    path = Path(path)
    check_name(path)
    if not path.is_dir():
        return path
    if (path / ".metadata").is_file():
        raise ValueError(
            f"{path} is a checkpoint of torch.distributed, split over files; make one file of it: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} FILE.pt"
        )
    if (path / "model_index.json").is_file():
        path = path / "transformer"
    if not (path / "config.json").is_file():
        return newest_checkpoint(path)
    for name in PRETRAINED_FILES:
        if (path / name).is_file():
            return path / name
    raise ValueError(
        f"{path} has config.json but none of {', '.join(PRETRAINED_FILES)}; weights in several "
        "files (shards) or with a variant in their names are not read, save them again as one"
    )


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What is needed of a repository on the hub.
HUB_FILES = [
    "config.json", PRETRAINED, "diffusion_pytorch_model.*", "model_index.json", "transformer/*",
    "vae/*", "scheduler/scheduler_config.json",
]  # fmt: skip


def local_path(name: Path | str) -> Path:
    """The path of a checkpoint file or folder. A path is returned as it is; an OWNER/NAME that does
    not exist here is downloaded from the hub.

    Raises ValueError if the download fails.
    """
    check_path(name, "ckpt")
    path = Path(name)
    with suppress(OSError, ValueError):  # of names that no file can have
        if path.exists():
            return path
    if not HUB_NAME.fullmatch(str(name)) or path.suffix in (".pt", ".safetensors"):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=HUB_FILES))
    except Exception as error:  # huggingface_hub and its HTTP client raise many kinds
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if offline := why_offline(error):
            reason = f"{offline}, and there is no copy in the cache {cache_of_the_hub()}"
        raise ValueError(
            f"{name} is no file or folder here, and cannot be fetched from the hub ({reason}); "
            "give a path, or fetch it where "
            "there is a network (hf download) and set HF_HOME to that cache"
        ) from None
