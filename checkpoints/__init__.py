"""From a checkpoint's name to a network, and from a network to files that we or others read."""

from runtime.handing_on import handed_on

# Names that other projects import from here, by the room that has them.
__getattr__ = handed_on(
    __name__,
    {
        "checkpoints.choice": "NetworkChoice",
        "checkpoints.files":
            "read_checkpoint check_whole save_checkpoint checkpoint_path list_checkpoints "
            "newest_checkpoint newest_whole_checkpoint prune_checkpoints",
        "checkpoints.fitting": "check_fits check_design adapt read_label_map",
        "checkpoints.outline": "design_of",
        "checkpoints.loading":
            "network_of load_pretrained import_diffusers find_files find_checkpoint choose_vae "
            "build_network class_names",
        "checkpoints.publish": "export_checkpoint save_pretrained export_diffusers load_exported",
        "checkpoints.names": "weights_file",
        "checkpoints.weights":
            "Weights load_weights is_state_dict check_readable check_classes names_of "
            "id2label averages weights_choice clean_names save_weights",
        "runtime.disk": "readable_name check_name file_hash hidden_name write_whole sync_folder",
        "runtime.json_files": "read_json read_bounded parse_json",
    },
)
