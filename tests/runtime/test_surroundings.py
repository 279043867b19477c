"""A process's place among others, launchers that tell of it or not, and packages that are none."""

import pytest

import evaluate
from runtime import surroundings
import extract_latents
import sample_ddp
from runtime.surroundings import Place, check_accelerate, is_installed, lone_task_note, own_place
import train

VARIABLES = [
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", *surroundings.ACCELERATE_SWITCHES,
    *surroundings.ACCELERATE_VALUES,
]  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def put(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("variables, place", [
    ({}, Place(0, 1)),
    (dict(RANK="", WORLD_SIZE=" "), Place(0, 1)),
    (dict(RANK="0", WORLD_SIZE="1"), Place(0, 1)),
    (dict(RANK="3", WORLD_SIZE="8"), Place(3, 8)),
    (dict(RANK="1", WORLD_SIZE="2", SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1"), Place(1, 2)),
    (dict(SLURM_NTASKS="8", SLURM_PROCID="0"), Place(0, 1)),  # a batch script's own process
])  # fmt: skip
def test_place(monkeypatch, variables, place):
    put(monkeypatch, **variables)
    assert own_place() == place


@pytest.mark.parametrize("variables", [
    dict(RANK="1"), dict(WORLD_SIZE="2"), dict(RANK="", WORLD_SIZE="2"),
    dict(RANK="x", WORLD_SIZE="2"), dict(RANK="-1", WORLD_SIZE="2"), dict(RANK="2", WORLD_SIZE="2"),
    dict(RANK="1.0", WORLD_SIZE="2"), dict(LOCAL_RANK="1"),
    dict(SLURM_STEP_NUM_TASKS="8", SLURM_PROCID="0"), dict(SLURM_PROCID="1", SLURM_NTASKS="2"),
    dict(OMPI_COMM_WORLD_SIZE="2"), dict(PMI_SIZE="2"),
])  # fmt: skip
def test_place_that_makes_no_sense(monkeypatch, variables):
    put(monkeypatch, **variables)
    with pytest.raises(ValueError, match="torchrun"):
        own_place()


def test_a_job_of_several_tasks_in_one_process_is_told(monkeypatch):
    assert lone_task_note() is None
    put(monkeypatch, SLURM_NTASKS="8")
    assert "8 tasks, and this is one process" in lone_task_note()
    put(monkeypatch, RANK="0", WORLD_SIZE="8")
    assert lone_task_note() is None


@pytest.mark.parametrize("name, value", [
    *((name, value) for name in surroundings.ACCELERATE_SWITCHES for value in ("true", "1")),
    ("ACCELERATE_MIXED_PRECISION", "fp16"), ("ACCELERATE_MIXED_PRECISION", "bf16"),
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"), ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
])  # fmt: skip
def test_what_accelerate_is_asked_for_is_not_passed_over(monkeypatch, name, value):
    check_accelerate(mixed_precision="no")
    put(monkeypatch, **{name: value})
    with pytest.raises(ValueError, match=f"(?i){name}={value}"):
        check_accelerate(mixed_precision="no", grad_accum=1)


def test_what_accelerate_and_the_script_are_both_asked_for_is_fine(monkeypatch):
    put(
        monkeypatch, ACCELERATE_MIXED_PRECISION="bf16", ACCELERATE_DYNAMO_BACKEND="NO",
        ACCELERATE_USE_FSDP="false",
    )  # fmt: skip
    put(monkeypatch, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    check_accelerate(mixed_precision="bf16", grad_accum=4)


def test_a_folder_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "wandb_like").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert (
        is_installed("torch")
        and not is_installed("wandb_like")
        and not is_installed("no_such_package")
    )


@pytest.mark.parametrize("door, flags", [
    (train, ["--data-path", "x", "--vae", "none"]),
    (sample_ddp, ["--ckpt", "x.pt", "--vae", "none"]),
    (extract_latents, ["--data-path", "x", "--output", "y", "--vae", "x"]),
    (evaluate, ["--samples", "x", "--reference", "y", "--features", "pixels"]),
])  # fmt: skip
@pytest.mark.parametrize("variables, message", [
    (dict(RANK="1"), "RANK"), (dict(SLURM_STEP_NUM_TASKS="2", SLURM_PROCID="1"), "srun"),
    (dict(ACCELERATE_USE_DEEPSPEED="true"), "DeepSpeed"),
    (dict(ACCELERATE_MIXED_PRECISION="fp16"), "MIXED_PRECISION"),
])  # fmt: skip
def test_doors_look_at_their_surroundings_first(
    monkeypatch, tmp_path, capsys, door, flags, variables, message
):
    monkeypatch.chdir(tmp_path)
    put(monkeypatch, **variables)
    with pytest.raises(SystemExit) as stopped:
        door.main(flags)
    assert (
        stopped.value.code == 2
        and message in capsys.readouterr().err
        and not list(tmp_path.iterdir())
    )
