"""A checkpoint is whole or it is not used, and a restored training goes on as if nothing had happened."""

import json
import multiprocessing

import pytest
import torch
from torch import nn

from llavakd.errors import UserError
from llavakd.train.checkpoint import load_checkpoint, newest_whole, prune, save_checkpoint, write_folder, write_text


def fresh(seed: int):
    """A module with a frozen part, and its optimiser."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    module[0].requires_grad_(False)
    return module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)


def train(module, optimizer, steps: int):
    """Steps on noise, so that the random state matters as much as weights and moments."""
    for _ in range(steps):
        module(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 9 and 10 (numbers that sort wrongly as text)."""
    module, optimizer = fresh(0)
    for step in (9, 10):
        train(module, optimizer, 1)
        save_checkpoint(tmp_path, module=module, optimizer=optimizer, state={"step": step})
    return tmp_path


def test_a_restored_training_equals_an_uninterrupted_one_bit_for_bit(tmp_path):
    module, optimizer = fresh(0)
    train(module, optimizer, 3)
    save_checkpoint(tmp_path, module=module, optimizer=optimizer, state={"step": 3, "seconds": 1.5})
    train(module, optimizer, 4)
    other, other_optimizer = fresh(1)
    other[0].load_state_dict(module[0].state_dict())  # frozen weights come from the stage's start
    train(other, other_optimizer, 1)
    state = load_checkpoint(tmp_path / "step-3", module=other, optimizer=other_optimizer)
    assert state == {"step": 3, "seconds": 1.5}
    train(other, other_optimizer, 4)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_only_what_learns_is_written(folder):
    from safetensors import safe_open

    with safe_open(str(folder / "step-9" / "learning.safetensors"), framework="pt") as file:
        assert sorted(file.keys()) == ["1.bias", "1.weight"]


def test_the_newest_is_the_highest_number(folder):
    assert newest_whole(folder) == folder / "step-10"


def test_an_empty_or_absent_folder_has_no_checkpoint(tmp_path):
    assert newest_whole(tmp_path) is None
    assert newest_whole(tmp_path / "absent") is None


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


TEARS = {
    "weights one byte short": lambda folder: _cut(folder / "learning.safetensors"),
    "optimiser one byte short": lambda folder: _cut(folder / "optimizer.pt"),
    "one bit of the weights flipped": lambda folder: _flip(folder / "learning.safetensors"),
    "state changed": lambda folder: (folder / "state.json").write_text('{"step": 11}'),
    "optimiser missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "state missing": lambda folder: (folder / "state.json").unlink(),
    "manifest missing": lambda folder: (folder / "manifest.json").unlink(),
    "manifest cut": lambda folder: _cut(folder / "manifest.json"),
    "manifest empty": lambda folder: (folder / "manifest.json").write_text("{}"),
    "manifest of zero bytes": lambda folder: (folder / "manifest.json").write_bytes(b""),
    "manifest of zeros": lambda folder: (folder / "manifest.json").write_bytes(bytes(200)),
    "manifest wrong": lambda folder: (folder / "manifest.json").write_text(json.dumps({"state.json": "0" * 64})),
}


@pytest.mark.parametrize("tear", TEARS.values(), ids=TEARS)
def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(folder, capsys, tear):
    tear(folder / "step-10")
    assert newest_whole(folder) == folder / "step-9"
    assert "step-10 is torn" in capsys.readouterr().err.replace("\n", "")


def test_when_all_are_torn_training_starts_anew(folder):
    for path in folder.glob("step-*"):
        _cut(path / "optimizer.pt")
    assert newest_whole(folder) is None


def test_half_written_folders_are_ignored_and_removed(folder):
    (folder / "step-10").rename(folder / ".partial-step-10")
    assert newest_whole(folder) == folder / "step-9"
    prune(folder, keep=2)
    assert [path.name for path in folder.iterdir()] == ["step-9"]


def test_pruning_keeps_the_newest(folder):
    module, optimizer = fresh(0)
    train(module, optimizer, 1)
    save_checkpoint(folder, module=module, optimizer=optimizer, state={"step": 100})
    prune(folder, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-10", "step-100"]


def test_a_write_that_fails_leaves_what_stood_there(folder):
    before = (folder / "step-10" / "state.json").read_bytes()

    def fill(partial):
        (partial / "state.json").write_text("half")
        raise OSError("disk full")

    with pytest.raises(UserError, match=r"cannot write .*step-10: disk full; make room"):
        write_folder(folder / "step-10", fill)
    assert (folder / "step-10" / "state.json").read_bytes() == before
    write_folder(folder / "step-10", lambda partial: (partial / "new").write_text("whole"))
    assert [path.name for path in (folder / "step-10").iterdir()] == ["new"]


def test_the_loss_of_a_reading_process_meanwhile_is_not_told_as_a_full_disk(tmp_path):
    lost = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    def fill(partial):
        raise lost

    with pytest.raises(RuntimeError) as told:
        write_folder(tmp_path / "step-10", fill)
    assert told.value is lost
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_other_tensors_is_refused_by_name(folder):
    module, optimizer = fresh(0)
    module[0].requires_grad_(True)
    with pytest.raises(UserError, match=r"2 tensors differ, first '0\.bias'"):
        load_checkpoint(folder / "step-10", module=module, optimizer=optimizer)


def _write_often(path):
    for number in range(60):
        write_text(path, f"{number}")


def test_processes_of_one_run_may_write_the_same_small_file_at_once(tmp_path):
    """Every process of a distributed run writes recipe.yaml and pipeline.json."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(tmp_path / "file",)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert (tmp_path / "file").read_text() == "59"


def test_a_folder_that_could_not_be_filled_leaves_what_stood_there_and_nothing_else(tmp_path):
    assert write_folder(tmp_path / "kept", lambda partial: (partial / "old").write_text("old")) == 3
    with pytest.raises(UserError, match=r"cannot write .*kept: no more room; make room"):
        write_folder(tmp_path / "kept", fail_midway)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "old").read_text() == "old"


def fail_midway(partial):
    (partial / "new").write_text("new")
    raise OSError("no more room")
