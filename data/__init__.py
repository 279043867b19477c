"""Folders of images or clips, or of cached latents, to batches."""

from runtime.handing_on import handed_on

# Names that other projects import from here, by the room that has them.
__getattr__ = handed_on(
    __name__,
    {
        "data.batches": "collate stack StepBatches steps_per_epoch",
        "data.buckets": "BucketBatches",
        "data.cache": "CachedLatents open_cache check_labels find_damage",
        "data.cache_format": "check_manifest",
        "data.cache_writer": "cache_latents",
        "data.captioned": "Captioned",
        "data.captions": "Captions read_captions",
        "data.images": "center_crop_arr open_image read_pixels to_rgb ImageDataset unreadable",
        "data.listing": "Listing sample_hash list_images list_clips check_outside",
        "data.loader": "heed_the_trainer make_loader LoaderFailed say_waiting read explained",
        "data.opening": "open_source",
        "data.options": "CacheOptions DataOptions TextCacheOptions",
        "data.source": "BadImage Source TrainingItem",
        "data.text_cache": "CachedText find_text_damage",
        "data.text_writer": "cache_text prepare_text",
    },
)
