"""Which network a user chooses, and what holds where neither the user nor the checkpoint says."""

from dataclasses import dataclass
from pathlib import Path

from checkpoints.weights import weights_choice
from conditions.labels import CLASSES
from models import DiT_models
from runtime.limits import check_numbers

MODEL, IMAGE_SIZE, NUM_CLASSES = "DiT-XL/2", 256, 1000


@dataclass(frozen=True)
class NetworkChoice:
    """A network, and the autoencoder that it works behind; None stands for what is not given.

    ckpt: a checkpoint file, a run folder, a folder with config.json, a pipeline of diffusers, or
        OWNER/NAME on the Hugging Face hub; None: the released weights, fetched on first use.
    weights: which of the checkpoint's weights: "ema", "raw" or "ema@DECAY".
    vae: "ema", "mse", a hub id, a local folder, or "none" for pixels.
    model, image_size (pixels), num_classes: needed for a checkpoint that does not say them; they
        must not contradict one that does.

    Raises ValueError for values that no checkpoint can have.
    """

    ckpt: Path | str | None = None
    weights: str = "ema"
    vae: Path | str | None = None
    model: str | None = None
    image_size: int | None = None
    num_classes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", weights_choice(self.weights))
        if self.model is not None and self.model not in DiT_models:
            raise ValueError(f"`model` is {self.model}; give one of {', '.join(DiT_models)}")
        check_numbers(self, num_classes=CLASSES)

    def sizes(self) -> tuple[str, int, int]:
        """(model, image size in pixels, number of classes), by default those of the constants.

        The constants are MODEL, IMAGE_SIZE and NUM_CLASSES.
        """
        return (
            MODEL if self.model is None else self.model,
            IMAGE_SIZE if self.image_size is None else self.image_size,
            NUM_CLASSES if self.num_classes is None else self.num_classes,
        )
