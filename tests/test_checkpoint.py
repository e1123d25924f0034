"""Checkpoints: whole or not there, and nothing torn is ever used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from decotrain import checkpoint
from decotrain.errors import FileError

MODEL = {"w": torch.arange(6.0).view(2, 3), "b": torch.zeros(0)}
STATE = {"m": torch.ones(4, dtype=torch.bfloat16), "n": torch.tensor(3, dtype=torch.int64)}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = checkpoint.write(tmp_path, 7, MODEL, STATE, {"facts": [1, "two"]})
    saved = checkpoint.read(path)
    assert saved.round_number == 7
    assert saved.meta == {"facts": [1, "two"]}
    assert saved.model.keys() == MODEL.keys()
    assert torch.equal(saved.model["w"], MODEL["w"])
    assert torch.equal(saved.state["m"], STATE["m"])
    assert saved.state["m"].dtype == torch.bfloat16


def test_the_newest_are_kept_and_nothing_else_lies_around(tmp_path: Path) -> None:
    for number in (1, 2, 3, 10):
        checkpoint.write(tmp_path, number, MODEL, STATE, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000003", "round-000010"]
    checkpoint.write(tmp_path, 10, {"w": torch.ones(1)}, STATE, {}, keep=2)
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    assert newest.model["w"].tolist() == [1.0]


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_a_torn_checkpoint_is_refused_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: str
) -> None:
    checkpoint.write(tmp_path, 1, MODEL, STATE, {})
    path = checkpoint.write(tmp_path, 2, MODEL, STATE, {})
    file = path / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 0x40
    if damage == "truncate":
        del data[-3:]
    file.unlink() if damage == "remove" else file.write_bytes(b"" if damage == "empty" else data)
    if name != "meta.json" or damage != "flip":  # a flip in its free text may go unseen
        with pytest.raises(FileError, match="round-000002"):
            checkpoint.read(path)
        newest = checkpoint.newest(tmp_path)
        assert newest is not None
        assert newest.round_number == 1


@pytest.mark.parametrize(
    "facts", [[], {}, {"format": 99}, {"format": 1}, {"format": 1, "round": "x", "sha256": {}}]
)
def test_foreign_facts_are_refused(tmp_path: Path, facts: object) -> None:
    path = checkpoint.write(tmp_path, 1, MODEL, STATE, {})
    (path / "meta.json").write_text(json.dumps(facts))
    with pytest.raises(FileError):
        checkpoint.read(path)


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "nowhere") is None
    with pytest.raises(FileError, match="cannot be read"):
        checkpoint.read(tmp_path / "round-000001")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        checkpoint.write(tmp_path / "file" / "x", 1, MODEL, STATE, {})


def make(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_an_optimizer_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    model, optimizer = make(0)
    train(model, optimizer, 5)
    tensors, facts = checkpoint.pack_optimizer(optimizer)
    path = checkpoint.write(tmp_path, 1, model.state_dict(), tensors, {"inner": facts})
    train(model, optimizer, 5)

    saved = checkpoint.read(path)
    other, twin = make(1)
    other.load_state_dict(saved.model)
    checkpoint.unpack_optimizer(twin, saved.state, saved.meta["inner"])
    train(other, twin, 5)
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


def test_an_optimizer_of_another_shape_is_refused() -> None:
    _, optimizer = make(0)
    tensors, facts = checkpoint.pack_optimizer(optimizer)
    other = torch.optim.AdamW(nn.Linear(3, 2).parameters(), lr=0.1)
    with pytest.raises(FileError, match="parameter groups"):
        checkpoint.unpack_optimizer(other, tensors, facts)
