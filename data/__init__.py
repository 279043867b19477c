"""Folders of images, or of cached latents, to batches."""

from runtime.handing_on import handed_on

# Names that other projects import from here, by the room that has them.
__getattr__ = handed_on(
    __name__,
    {
        "data.batches": "collate stack StepBatches steps_per_epoch",
        "data.cache": "CachedLatents open_cache check_manifest check_labels",
        "data.images": "center_crop_arr open_image to_rgb BadImage ImageDataset unreadable",
        "data.listing": "Listing sample_hash list_images check_outside",
        "data.loader": "heed_the_trainer make_loader LoaderFailed say_waiting read explained",
    },
)
