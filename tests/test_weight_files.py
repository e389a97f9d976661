"""Protects the reading of weights as trainers write them: no set of them is chosen silently, and no code in a file runs."""

import argparse
import collections
import datetime
import os
import pathlib
import pickle
import re
import shlex
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdcache.errors import IncompatibleError, IntegrityError, KdcacheError, NotFoundError, UsageError
from kdcache.models.creation import checkpoint_classes, create_model, has_new_head, load_weights
from kdcache.models.names import resolve

State = dict[str, Tensor]
NAME = "test_resnet"


def made(classes: int = 10, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(NAME, classes, input_size=32)[0]


@pytest.fixture(scope="module")
def state() -> State:
    return {key: value.clone() for key, value in made().state_dict().items()}


@pytest.fixture(scope="module")
def other(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


def is_read(file: Path, state: State) -> bool:
    model = made(seed=1)
    assert load_weights(model, file) == []
    assert checkpoint_classes(model, file) == 10
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def below(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def refused(file: Path, kind: type[KdcacheError]) -> KdcacheError:
    with pytest.raises(kind) as caught:
        load_weights(made(), file)
    text = str(caught.value)
    assert len(text.splitlines()) == 3
    assert not re.search(r"\x1b|\[\d+m|weights_only=False|add_safe_globals|allow_pickle", text), "advice to load pickles"
    return caught.value


ARGUMENTS = argparse.Namespace(
    model=NAME, lr=np.float64(0.1), decay=(np.float32(1), np.int64(3), np.bool_(True)), output=pathlib.Path("out"), opt_betas=None
)
BESIDE: dict[str, Any] = {
    "args": ARGUMENTS,
    "metric": np.float64(76.1),
    "curve": np.arange(3.0),
    "begun": datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC),
    "took": datetime.timedelta(seconds=3),
    "counts": collections.defaultdict(int, a=1),
    "settings": types.SimpleNamespace(a=1),
    "rng_state": torch.get_rng_state(),
    "numpy_rng": np.random.RandomState(0).get_state(),
    "epoch": 3,
    "accuracy": torch.tensor(70.0),
}


def optimizer_state(momentum: float = 0.9) -> dict[str, Any]:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=momentum)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("key", ["state_dict", "model", "net", "model_state_dict", "network", "params", "student", "weights"])
def test_weights_one_level_down_are_found_beside_all_else(key: str, state: State, tmp_path: Path) -> None:
    torch.save({**BESIDE, key: state, "optimizer": optimizer_state()}, tmp_path / "c.pth")
    assert is_read(tmp_path / "c.pth", state)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "net.", "backbone.", "module._orig_mod.", "_orig_mod.module.", "model._orig_mod."],
)
@pytest.mark.parametrize("bare", [True, False])
def test_what_wrapped_the_model_is_left_off(prefix: str, bare: bool, state: State, tmp_path: Path) -> None:
    wrapped = below(prefix, state)
    torch.save(wrapped if bare else {"state_dict": wrapped, "epoch": 1}, tmp_path / "c.ckpt")
    assert is_read(tmp_path / "c.ckpt", state)
    save_file(wrapped, tmp_path / "c.safetensors")
    assert is_read(tmp_path / "c.safetensors", state)


def test_compiled_parts_and_averaged_models_are_found(state: State, tmp_path: Path) -> None:
    parts = {re.sub(r"^(layer\d)\.", r"\1._orig_mod.", key): value for key, value in state.items()}
    assert parts.keys() != state.keys()
    torch.save(parts, tmp_path / "parts.pth")
    assert is_read(tmp_path / "parts.pth", state)
    torch.save(torch.optim.swa_utils.AveragedModel(made(seed=0)).state_dict(), tmp_path / "swa.pth")
    assert is_read(tmp_path / "swa.pth", state)


def lightning(state: State) -> dict[str, Any]:
    return {
        "epoch": 1,
        "global_step": 2,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": below("model.", state),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best_model_score": torch.tensor(0.5), "best_model_path": "x.ckpt"}},
        "optimizer_states": [optimizer_state()],
        "lr_schedulers": [{"_last_lr": [0.1]}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "args": ARGUMENTS},
    }


def test_lightnings_checkpoints_are_read(state: State, tmp_path: Path) -> None:
    torch.save(lightning(state), tmp_path / "last.ckpt")
    assert is_read(tmp_path / "last.ckpt", state)


def test_old_pickles_and_numpy_archives_are_read(state: State, tmp_path: Path) -> None:
    torch.save({"state_dict": state, **BESIDE}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert is_read(tmp_path / "old.pth", state)
    np.savez(tmp_path / "weights.npz", **{key: value.numpy() for key, value in state.items()})
    assert is_read(tmp_path / "weights.npz", state)
    half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in state.items()}
    torch.save(half, tmp_path / "half.bin")
    assert is_read(tmp_path / "half.bin", {key: value.to(state[key].dtype) for key, value in half.items()})


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (lambda a, b: {"state_dict": a, "state_dict_ema": b, "args": ARGUMENTS}, ("state_dict", "state_dict_ema")),
        (lambda a, b: {"model": a, "model_ema": below("module.", b)}, ("model", "model_ema")),
        (lambda a, b: {"model": a, "ema": {"decay": 0.9, "shadow": b}}, ("model", "ema.shadow")),
        (
            lambda a, b: {"state_dict": {**below("student.", a), **below("teacher.", b)}},
            ("state_dict.student", "state_dict.teacher"),
        ),
        (lambda a, b: {**below("net.", a), **below("ema_net.", b)}, ("net", "ema_net")),
        (lambda a, b: lightning(a) | {"callbacks": {"EMA": {"weights": b}}}, ("state_dict", "callbacks.EMA.weights")),
        (lambda a, b: {"model": a, "hooks": {"EMA": {"of": {"the": {"state": b}}}}}, ("model", "hooks.EMA.of.the.state")),
        (lambda a, b: {"models": [a, b]}, ("models.0", "models.1")),
        (lambda a, b: {**a, "ema": b}, (".", "ema")),
        (lambda a, b: {**a, **below("ema.", b)}, (".", "ema")),
        (
            lambda a, b: {"model": a, "ema": {"initted": torch.tensor(True), "step": torch.ones(1), **below("ema_model.", b)}},
            ("model", "ema.ema_model"),
        ),
        (
            lambda a, b: {"state_dict": {**below("module.student.net.", a), **below("module.teacher.net.", b)}},
            ("state_dict.module.student", "state_dict.module.teacher"),
        ),
    ],
    ids=[
        "timm",
        "deit",
        "shadow",
        "self-distilled",
        "modules",
        "callback",
        "deep",
        "list",
        "flat",
        "dotted",
        "counted",
        "wrapped",
    ],
)
def test_several_sets_are_offered_by_name(
    content: Callable[[State, State], Any], names: tuple[str, str], state: State, other: State, tmp_path: Path
) -> None:
    file = tmp_path / "both.pth"
    torch.save(content(state, other), file)
    error = refused(file, UsageError)
    assert error.fix == f"name the ones to use: {file}#{names[0]} or {file}#{names[1]}"
    for name, expected in zip(names, (state, other), strict=True):
        assert is_read(Path(f"{file}#{name}"), expected)
        assert not has_new_head(NAME, 10, Path(f"{file}#{name}"))
    unknown = refused(Path(f"{file}#nothing"), NotFoundError)
    assert names[0] in unknown.why
    assert names[1] in unknown.why


def test_weights_of_a_loss_beside_the_models_are_not_dropped_silently(state: State, tmp_path: Path) -> None:
    file = tmp_path / "c.ckpt"
    torch.save({"state_dict": below("model.", state) | {"criterion.weight": torch.ones(10)}}, file)
    assert refused(file, UsageError).fix.endswith(f"{file}#state_dict.model")
    assert is_read(Path(f"{file}#state_dict.model"), state)


def test_an_average_that_is_a_list_without_names_is_told(state: State, other: State, tmp_path: Path) -> None:
    """As of torch-ema, which keeps no names: it is not taken, and not dropped silently."""
    shadow = [value for key, value in other.items() if "running" not in key and value.ndim]
    torch.save({"model": state, "ema": {"decay": 0.9, "shadow_params": shadow, "collected_params": None}}, tmp_path / "c.pth")
    error = refused(tmp_path / "c.pth", UsageError)
    assert "ema.shadow_params" in error.why
    assert error.fix.endswith(f"{tmp_path / 'c.pth'}#model")
    assert is_read(Path(f"{tmp_path / 'c.pth'}#model"), state)


def test_what_holds_itself_or_much_else_is_read(state: State, tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": state}
    content["self"] = [content]
    within: dict[str, Any] = {}
    for _ in range(40):  # 4^40 paths to one mapping
        within = {"a": within, "b": within, "c": [within, within]}
    torch.save(content | within, tmp_path / "c.pth")
    assert is_read(tmp_path / "c.pth", state)
    moments = {key: {"exp_avg": value, "exp_avg_sq": value} for key, value in state.items()}
    torch.save({"model": below("other.", {f"{key}.x": v for key, v in state.items()}), "optimizer": moments}, tmp_path / "o.pth")
    assert f"{len(state)} missing, {len(state)} unknown" in refused(tmp_path / "o.pth", IncompatibleError).what


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda value: (100 * value).to(torch.int8), "int8"),
        (lambda value: value.bool(), "bool"),
        (lambda value: value + 0j, "complex64"),
        (lambda value: value.to_sparse() if value.ndim else value, "sparse_coo"),
        (lambda value: value.to("meta"), "on no device"),
        (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "qint8"),
        (lambda value: value * float("nan"), "not finite"),
    ],
)
def test_weights_that_are_no_plain_numbers_are_not_taken_for_some(
    change: Callable[[Tensor], Tensor], kind: str, state: State, tmp_path: Path
) -> None:
    torch.save({key: change(value) if value.is_floating_point() else value for key, value in state.items()}, tmp_path / "c.pth")
    error = refused(tmp_path / "c.pth", KdcacheError)
    assert kind in error.what
    assert "conv1.0.weight" in error.what


def test_norms_need_no_counts_of_batches(state: State, tmp_path: Path) -> None:
    """PyTorch counts them since 0.4.1, and no other program does."""
    torch.save({key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}, tmp_path / "old.pth")
    assert is_read(tmp_path / "old.pth", state)


def test_advice_on_incomplete_weights_works(state: State, tmp_path: Path) -> None:
    names = list(state)
    for number, part in enumerate((names[:20], names[20:]), start=1):
        save_file({key: state[key] for key in part}, tmp_path / f"model-{number:05}-of-00002.safetensors")
    listed = tmp_path / "model.safetensors.index.json"
    listed.write_text('{"metadata": {"total_size": 1}, "weight_map": {"a": "b"}}')
    for file in (listed, tmp_path / "model-00002-of-00002.safetensors"):
        fix = refused(file, KdcacheError).fix
        program, option, code = shlex.split(fix.partition(": ")[2])
        assert (program, option) == ("python3", "-c")
        exec(code, {})
        joined = tmp_path / "model-joined.safetensors"
        assert is_read(joined, state)
        joined.unlink()
    torch.save(dict(made().named_parameters()), tmp_path / "parameters.pth")
    assert "not its named_parameters()" in refused(tmp_path / "parameters.pth", IncompatibleError).fix


def test_a_classifier_of_another_kind_is_told_by_its_shape(state: State, tmp_path: Path) -> None:
    for weight in (state["fc.weight"][:, :, None, None], torch.tensor(1.0)):
        torch.save({**state, "fc.weight": weight}, tmp_path / "c.pth")
        assert f"fc.weight {list(weight.shape)} for" in refused(tmp_path / "c.pth", IncompatibleError).why


def test_numpy_archives_may_hold_more_than_weights(state: State, tmp_path: Path) -> None:
    arrays = {key: value.numpy() for key, value in state.items()}
    odd = {key: value.astype(value.dtype.newbyteorder(">")) for key, value in arrays.items()}
    np.savez(tmp_path / "c.npz", args=np.array({"lr": 1}, dtype=object), model=np.array("resnet"), **odd)
    assert is_read(tmp_path / "c.npz", state)


def test_a_file_whose_name_has_the_mark_is_that_file(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "run#3")
    assert is_read(tmp_path / "run#3", state)
    assert refused(tmp_path / "run#4", NotFoundError).what.endswith("run does not exist")


class Danger:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Settings:
    """A class of the trainer's own."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", ["mkdir", "eval", "open", "own class"])
def test_no_code_in_a_file_runs(kept: str, zipped: bool, state: State, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    objects: dict[str, tuple[Any, str]] = {
        "mkdir": (Danger(os.mkdir, str(mark)), "posix.mkdir"),
        "eval": (Danger(eval, f"__import__('os').mkdir({str(mark)!r})"), "eval"),
        "open": (Danger(open, str(mark), "w"), "open"),
        "own class": (Settings(), f"{__name__}.Settings"),
    }
    one, named = objects[kept]
    torch.save({"state_dict": state, "args": one}, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    error = refused(tmp_path / "c.pth", IntegrityError)
    assert named in error.why
    assert not mark.exists()
    for harmless in ("numpy.core.multiarray.scalar", "argparse.Namespace", "collections.defaultdict"):
        module, name = harmless.rsplit(".", 1)  # is called with what would run, were it not for stand-ins
        code = f"c{module}\n{name}\n(S'{mark}'\ntR.".encode()
        (tmp_path / "p.pth").write_bytes(b"\x80\x02" + code)
        refused(tmp_path / "p.pth", IntegrityError)
    assert not mark.exists()


def test_all_that_is_refused_is_named(state: State, tmp_path: Path) -> None:
    torch.save({"model": state, "a": Settings(), "b": Danger(os.mkdir, "x"), "c": ARGUMENTS}, tmp_path / "c.pth")
    error = refused(tmp_path / "c.pth", IntegrityError)
    assert f"{__name__}.Settings" in error.why
    assert "posix.mkdir" in error.why
    assert "Namespace" not in error.why


def test_a_whole_model_is_no_set_of_weights(tmp_path: Path) -> None:
    torch.save(made(), tmp_path / "model.pth")
    error = refused(tmp_path / "model.pth", IntegrityError)
    assert "timm" in error.why
    assert "model.state_dict()" in error.fix


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab29\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "why", "fix"),
    [
        (POINTER, "Git LFS pointer", "lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page", "weights"),
        (b"\n\n<html>404</html>", "web page", "weights"),
        (b'{"metadata": {"total_size": 1}, "weight_map": {"a": "b"}}', "lists the files", "weights"),
        (b'{"message": "not found"}', "JSON", "weights"),
        (b"", "empty", "weights"),
        (b"\x1f\x8b\x08rest of it", "gzip", "unpack"),
        (b"\x89HDF\r\n\x1a\nrest", "HDF5", "weights"),
        (b"\x93NUMPY\x01\x00", "NumPy array", "weights"),
        (pickle.dumps({"a": list(range(9))}, protocol=2), "", "weights"),
        (b"nothing of the kind" * 100, "", "weights"),
        (bytes(4096), "", "weights"),
    ],
)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_files_that_are_no_weights_are_named_as_what_they_are(
    content: bytes, why: str, fix: str, ending: str, tmp_path: Path
) -> None:
    file = tmp_path / f"weights.{ending}"
    file.write_bytes(content)
    error = refused(file, IntegrityError)
    assert why in error.why
    assert error.why.strip()
    assert fix in error.fix


@pytest.mark.parametrize("ending", ["pth", "safetensors", "npz"])
def test_files_that_were_cut_off_are_named_so(ending: str, state: State, tmp_path: Path) -> None:
    file = tmp_path / f"weights.{ending}"
    if ending == "pth":
        torch.save(state, file)
    elif ending == "npz":
        np.savez(file, **{key: value.numpy() for key, value in state.items()})
    else:
        save_file(state, file)
    data = file.read_bytes()
    for size in (1, 7, 9, 200, 1500, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        error = refused(file, IntegrityError)
        assert "cut off" in error.why, (size, error.why)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (lambda s: {"epoch": 1, "optimizer": {}}, "epoch, optimizer"),
        (lambda s: {}, "nothing"),
        (lambda s: torch.ones(3), "one tensor"),
        (lambda s: {"model": {key: value.numpy() for key, value in s.items()}}, "no weights among"),
        (lambda s: ARGUMENTS, "not a mapping"),
    ],
)
def test_files_without_weights_say_what_they_hold(
    content: Callable[[State], Any], why: str, state: State, tmp_path: Path
) -> None:
    torch.save(content(state), tmp_path / "c.pth")
    assert why in refused(tmp_path / "c.pth", IntegrityError).why


def test_what_does_not_fit_is_counted_and_named(state: State, tmp_path: Path) -> None:
    changed = dict(state)
    names = [name for name in changed if name.startswith("layer1")]
    for name in names:
        changed[f"other.{name}"] = changed.pop(name)
    changed["conv1.0.weight"] = torch.ones(1, 2, 3)
    torch.save({"net": changed}, tmp_path / "c.pth")
    error = refused(tmp_path / "c.pth", IncompatibleError)
    assert f"1 tensors of another shape, {len(names)} missing, {len(names)} unknown" in error.what
    assert "conv1.0.weight [1, 2, 3] for" in error.why
    assert f"and {len(names) - 5} more" in error.why
    assert sorted(names)[0] in error.why


def test_zip_files_of_other_things_are_named_so(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "weights.pth")
    with zipfile.ZipFile(tmp_path / "download.zip", "w") as packed:
        packed.write(tmp_path / "weights.pth", "weights.pth")
    error = refused(tmp_path / "download.zip", IntegrityError)
    assert "weights.pth" in error.why
    assert "unpack it" in error.fix


@pytest.mark.filterwarnings("ignore")
def test_programs_are_named_as_such(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(made().eval(), torch.zeros(1, 3, 32, 32)), tmp_path / "program.pt")
    assert refused(tmp_path / "program.pt", IntegrityError).why == "it is a TorchScript program, not weights"


def test_pointers_in_a_models_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet"}')
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(IntegrityError, match=r"model.safetensors cannot be read") as caught:
        resolve(f"local-dir:{tmp_path}")
    assert "Git LFS pointer" in caught.value.why


def test_folders_and_pipes_are_named_as_such(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is a pipe" in refused(tmp_path / "pipe.pth", NotFoundError).what
    assert "folder" in refused(tmp_path, NotFoundError).what
    assert "does not exist" in refused(tmp_path / "no.pth", NotFoundError).what


def test_weights_of_other_classes_are_found_in_all_forms(tmp_path: Path) -> None:
    torch.save({"state_dict": below("module.", made(7).state_dict()), "args": ARGUMENTS}, tmp_path / "seven.pth")
    assert checkpoint_classes(made(), tmp_path / "seven.pth") == 7
    assert has_new_head(NAME, 10, tmp_path / "seven.pth")
    assert load_weights(made(), tmp_path / "seven.pth", replace_head=True) == ["fc.bias", "fc.weight"]
    assert "7 classes" in refused(tmp_path / "seven.pth", IncompatibleError).what
