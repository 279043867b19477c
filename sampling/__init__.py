"""From labels to images."""

from runtime.handing_on import handed_on

# Names that other projects import from here, by the room that has them.
__getattr__ = handed_on(
    __name__,
    {
        "checkpoints.choice": "NetworkChoice",
        "checkpoints.loading": "find_files find_checkpoint choose_vae build_network class_names",
        "conditions.labels": "imagenet_names readable random_labels label_indices label_names",
        "processes.noise": "ImageNoise",
        "processes.process": "Solver",
        "runtime.disk": "check_writable",
        "sampling.loading": "load_sampler build_sampler",
        "sampling.many": "sample_many",
        "sampling.options": "SamplingOptions ManyOptions",
        "sampling.sampler": "Sampler check_steps",
        "sampling.speed": "prepare frozen",
    },
)
