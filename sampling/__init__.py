"""From labels to images."""

from runtime.handing_on import handed_on

# Names that other projects import from here, by the room that has them.
__getattr__ = handed_on(
    __name__,
    {
        "checkpoints.loading": "find_checkpoint choose_vae build_network class_names",
        "conditions.labels": "imagenet_names readable random_labels label_indices label_names",
        "runtime.disk": "check_writable",
        "sampling.loading": "load_sampler",
        "processes.process": "Solver",
        "sampling.sampler": "Sampler check_steps ImageNoise",
        "sampling.speed": "prepare frozen",
    },
)
