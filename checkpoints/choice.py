"""Which network a user chooses, and what holds where neither the user nor the checkpoint says."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoints import networks
from checkpoints.names import FAMILIES, FLOWS, MODELS
from checkpoints.weights import weights_choice
from conditions.labels import CLASSES
from processes.flow import FlowProcess
from processes.gaussian import GaussianProcess
from processes.table import WORDS
from runtime.disk import check_path
from runtime.image_size import ImageSize, settled
from runtime.limits import check_numbers

MODEL, IMAGE_SIZE, NUM_CLASSES = "DiT-XL/2", 256, 1000


@dataclass(frozen=True)
class NetworkChoice:
    """A network, and the autoencoder that it works behind; None stands for what is not given.

    ckpt: a checkpoint file, a run folder, a folder with config.json, a pipeline of diffusers, or
        OWNER/NAME on the Hugging Face hub; None: the released weights, fetched on first use.
    weights: which of the checkpoint's weights: "ema", "raw" or "ema@DECAY".
    vae: "ema", "mse", a hub id, a local folder, or "none" for pixels.
    model, num_classes: needed for a checkpoint that does not say them; they must not contradict one
        that does. model: one of MODELS.
    image_size: of the pictures to sample, in pixels or (height, width); None: as the network was
        trained. Of the released weights those are taken whose own size is nearest.
    process: a key of processes.table.WORDS, what the network has learned, for a checkpoint that
        does not say it; None: what the checkpoint says, or the model's name, else "diffusion".
    text_encoder: where the text encoders lie that the checkpoint names, each a local folder or a
        hub id, in their order; None: where the checkpoint says, if they are on this machine.
    ckpt_high: a second checkpoint, which says how its network is built, for the noisy steps of
        sampling; None for none.

    Raises ValueError for values that no checkpoint can have.
    """

    ckpt: Path | str | None = None
    weights: str = "ema"
    vae: Path | str | None = None
    model: str | None = None
    image_size: ImageSize | None = None
    num_classes: int | None = None
    process: str | None = None
    text_encoder: Sequence[str] | None = None
    ckpt_high: Path | str | None = None

    def __post_init__(self) -> None:
        for name in ("ckpt", "vae", "ckpt_high"):
            if (path := getattr(self, name)) is not None:
                check_path(path, name)
        object.__setattr__(self, "weights", weights_choice(self.weights))
        if self.model is not None and self.model not in [*MODELS]:
            raise ValueError(
                f"`model` is {self.model}; give one of {', '.join(networks.MODELS)}, "
                "or of the same with SiT for DiT, which is a flow"
            )
        if self.process is not None and self.process not in [*WORDS]:
            raise ValueError(f"`process` is {self.process}; give one of {', '.join(WORDS)}")
        if self.model in FLOWS and self.process not in (None, FlowProcess.word):
            raise ValueError(
                f"`model` is {self.model}, which is a flow, and `process` is {self.process}; "
                f"leave `process` out, or pass `model={FLOWS[self.model]}`"
            )
        if isinstance(self.text_encoder, str):
            raise ValueError(
                f"`text_encoder` is {self.text_encoder!r:.60}; give a list, a name for each encoder"
            )
        if self.image_size is not None:
            object.__setattr__(self, "image_size", settled(self.image_size))
        check_numbers(self, num_classes=CLASSES)

    def sizes(self) -> tuple[str, ImageSize, int]:
        """(key in networks.MODELS, image size, number of classes), by default those of the
        constants.

        The constants are MODEL, IMAGE_SIZE and NUM_CLASSES.
        """
        return (
            MODELS[self.model or MODEL],
            IMAGE_SIZE if self.image_size is None else self.image_size,
            NUM_CLASSES if self.num_classes is None else self.num_classes,
        )

    @property
    def learned(self) -> str | None:
        """The process that is given, by `process` or by the model's name; None for none."""
        return FlowProcess.word if self.model in FLOWS else self.process

    @property
    def published(self) -> str:
        """The name under which a network of this size and process would be published."""
        model, family = self.sizes()[0], FAMILIES[self.learned or GaussianProcess.word]
        return family + model.removeprefix("DiT") if model.startswith("DiT") else model
