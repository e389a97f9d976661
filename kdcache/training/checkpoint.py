"""A learner's folder: who owns it, its checkpoint and its log. Each file is written whole or not at all."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from kdcache.errors import IntegrityError, RetryError
from kdcache.system.files import set_aside, sweep_temporaries, tidying, translated_os_errors, write_atomically
from kdcache.system.locks import locked_if_possible
from kdcache.system.seals import seal_of, sealed_tensors, sealed_zip, unsealed_zip
from kdcache.system.transfer import to_host
from kdcache.training.devices import out_of_memory

__all__ = [
    "CHECKPOINT",
    "LOCK",
    "copied",
    "finite",
    "on_host",
    "own_folder",
    "read_checkpoint",
    "summary_of",
    "tidy",
    "unusable_checkpoint",
    "weights_seals",
    "write_checkpoint",
    "write_log",
    "write_weights",
]

LOCK = ".lock"
OF_A_MODEL = ("last", "best", "ema", "model")  # files of weights, a teacher's last one being called model
CHECKPOINT = "checkpoint.pt"


def own_folder(folder: Path) -> ExitStack:
    """Take the folder for this process, until the result is closed or the process ends.

    Where there are no locks, which is said once, a second process in the folder is not noticed: it would overwrite
    checkpoints, each whole.
    """
    held = ExitStack()
    with translated_os_errors(folder, elsewhere="--home"):
        folder.mkdir(parents=True, exist_ok=True)
        alone = held.enter_context(locked_if_possible(folder / LOCK, wait=False))
        if alone is False:
            raise RetryError(
                f"{folder} is being trained by another process",
                why="two processes in one folder would overwrite each other's checkpoints",
                fix="repeat the command when the other one has ended; it goes on from there",
            )
        if alone:
            sweep_temporaries(folder)
    return held


def tidy(folder: Path) -> None:
    """Delete what a process has left in a finished folder that was killed at its very end: checkpoint, lock, temporary files.

    Nothing where another process is in the folder, or where nothing may be deleted.
    """
    if not any((folder / name).exists() for name in (CHECKPOINT, LOCK)) and next(folder.glob(".*.tmp"), None) is None:
        return
    with tidying(), locked_if_possible(folder / LOCK, wait=False) as alone:
        if alone is False:
            return
        sweep_temporaries(folder)
        for name in (CHECKPOINT, LOCK):
            (folder / name).unlink(missing_ok=True)


def write_checkpoint(
    folder: Path, state: Mapping[str, Any], weights: Mapping[str, dict[str, Tensor]], rows: Sequence[Mapping[str, float]]
) -> None:
    """Write `weights` by the names of their files, the log, and at last the `state`, which says that the others are there."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    for name, tensors in weights.items():
        write_weights(folder / f"{name}.safetensors", tensors)
    write_log(folder, rows)
    write_atomically(folder / CHECKPOINT, sealed_zip(buffer.getbuffer()))


def write_weights(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write weights on the host as safetensors that a changed bit does not leave unnoticed."""
    write_atomically(file, sealed_tensors(save(tensors)))


def weights_seals(folder: Path) -> dict[str, str | None]:
    """The seals of the weights in a folder, by the names of their files: its record tells them apart from another folder's."""
    files = [folder / f"{name}.safetensors" for name in OF_A_MODEL]
    return {file.stem: seal_of(file) for file in files if file.is_file()}


def read_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The state that was written last, of tensors and numbers only; None if there is none. IntegrityError if it is damaged.

    Errors that memory does not suffice are let through: they say nothing about the file.
    """
    file = folder / CHECKPOINT
    if not file.is_file():
        return None
    try:
        content = io.BytesIO(unsealed_zip(file.read_bytes()))
        state: dict[str, Any] = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file shows in many ways
        if out_of_memory(error):
            raise
        raise unusable_checkpoint(folder, error) from error
    return state


def unusable_checkpoint(folder: Path, error: Exception) -> IntegrityError:
    """The error for a checkpoint that does not fit or is damaged. Its folder may be moved aside, and nothing is deleted."""
    return IntegrityError(
        f"checkpoint {folder / CHECKPOINT} cannot be used",
        why=(str(error).splitlines() or [type(error).__name__])[0][:200],
        fix=f"move its folder aside, and repeat the command, which trains it anew: {set_aside(folder)}",
    )


def write_log(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write the epochs' rows as `metrics.jsonl` and `summary.csv`."""
    lines = (json.dumps({key: finite(value) for key, value in row.items()}) + "\n" for row in rows)
    write_atomically(folder / "metrics.jsonl", "".join(lines).encode())
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "summary.csv", table.getvalue().encode())


def copied(model: nn.Module) -> dict[str, Tensor]:
    """The weights on the host, as files want them."""
    state: dict[str, Tensor] = model.state_dict()
    weights: dict[str, Tensor] = on_host(state)
    devices = {tensor.device for tensor in state.values() if tensor.device.type == "cuda"}
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    # Pinned memory is dear, and these may be kept for long.
    return {key: value.clone() for key, value in weights.items()} if devices else weights


def on_host(value: Any) -> Any:
    """`value`, with copies on the host in the place of its tensors, and of those in its dicts, lists and tuples.

    Copies of a GPU's tensors are in pinned memory, and complete when the GPU's current stream has got so far.
    """
    if isinstance(value, Mapping):
        return {key: on_host(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(part) for part in value)
    if not isinstance(value, Tensor):
        return value
    copy = to_host(value.detach())
    return copy.clone(memory_format=torch.contiguous_format) if value.device.type == "cpu" else copy


def summary_of(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What a training has come to, by its epochs' `rows`."""
    tests = [row for row in rows if math.isfinite(row.get("test_top1", math.nan))]
    best = max(tests, key=lambda row: row["test_top1"], default={})
    return {
        "epochs": len(rows),
        "final_top1": finite(rows[-1].get("test_top1", math.nan)),
        "final_loss": finite(rows[-1].get("test_loss", math.nan)),
        "best_top1": best.get("test_top1"),
        "best_epoch": best.get("epoch"),
        "seconds": sum(row["seconds"] for row in rows),
    }


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
