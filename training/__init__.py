"""From data to a network."""

from runtime.handing_on import handed_on

# Names that other projects import from here, by the room that has them.
__getattr__ = handed_on(
    __name__,
    {
        "training.cost": "training_flops",
        "training.options": "TrainOptions",
        "training.run": "run_training",
        "training.run_log": "RunEnded RunInterrupted",
        "training.sharding": "shard_network whole own_part sharded_like unsharded load_tensors",
        "training.state": "Recipe Window TrainState checked_log new_state",
        "training.step": (
            "Draws draw train_step backward warm_up no_reduction update_ema requires_grad"
        ),
    },
)
