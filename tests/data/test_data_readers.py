"""Processes that read rows: the loss of one is told once and by name, none is left, and none is heard of afterwards."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import synchronize

import pytest
from torch.utils.data import Dataset

from llavakd.data.readers import reading
from llavakd.errors import UserError


class Rows(Dataset):
    """Row numbers; the one `at` comes after `seconds`, or raises."""

    def __init__(self, *, error: Exception | None = None, at: int = -1, seconds: float = 0.0) -> None:
        self.error, self.at, self.seconds = error, at, seconds

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == self.at:
            time.sleep(self.seconds)
            if self.error:
                raise self.error
        return index


def in_a_process_of_its_own(function: Callable[[], None]) -> None:
    """With one thread, so that a signal which is held back reaches no other."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(timeout=60)
    process.kill()
    assert process.exitcode == 0


def kill_readers() -> None:
    for reader in multiprocessing.active_children():
        os.kill(reader.pid, signal.SIGKILL)
        os.waitid(os.P_PID, reader.pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize("error", [RuntimeError("unequal sizes"), EOFError("no more"), ConnectionError("refused")])
def test_what_a_reader_raises_is_not_told_as_its_loss(error):
    with (
        pytest.raises(type(error), match=f"Caught (.|\n)*{error}"),
        reading(Rows(error=error, at=0), num_workers=1) as batches,
    ):
        list(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_rows_come_in_order_and_no_process_stays(workers):
    with reading(Rows(), num_workers=workers, batch_size=3, collate_fn=list) as batches:
        assert len(multiprocessing.active_children()) == workers
        assert list(batches) == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert multiprocessing.active_children() == []


def test_one_that_dies_over_a_row_is_named_and_the_others_end():
    told = r"a process of this run was lost: DataLoader worker \(pid.*; the same command goes on from what is saved"
    slow = reading(Rows(at=4, seconds=60), num_workers=2, batch_size=2, collate_fn=list)
    with pytest.raises(UserError, match=told), slow as batches:  # noqa: PT012
        assert next(batches) == [0, 1]
        kill_readers()
        list(batches)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer")])
def test_one_whose_loss_shows_as_a_broken_pipe_is_not_heard_of_again(error):
    """A pipe may break before the signal comes, which would then raise where nobody looks for it."""

    def lose() -> None:
        unraisable: list[object] = []
        sys.unraisablehook = unraisable.append
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        with pytest.raises(UserError) as told, reading(Rows(), num_workers=2) as batches:  # noqa: PT012
            before = signal.getsignal(signal.SIGCHLD)
            next(batches)
            kill_readers()
            raise error
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        said = str(error) or "one that reads rows"
        assert str(told.value).startswith(f"a process of this run was lost: {said};")
        assert callable(before)
        assert signal.getsignal(signal.SIGCHLD) is before
        assert unraisable == []

    in_a_process_of_its_own(lose)


def test_one_that_dies_once_all_rows_have_come_is_not_missed():
    """Also where that is heard of only while they are being ended."""

    def lose() -> None:
        unraisable: list[object] = []
        sys.unraisablehook = unraisable.append
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        with reading(Rows(), num_workers=2, batch_size=4, collate_fn=list) as batches:
            usual = batches._shutdown_workers

            def hearing() -> None:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
                usual()

            batches._shutdown_workers = hearing
            assert [next(batches), next(batches)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
            kill_readers()
        assert multiprocessing.active_children() == []
        assert unraisable == []

    in_a_process_of_its_own(lose)


def test_one_that_dies_holding_the_lock_by_which_torch_would_end_the_others_leaves_none_waiting(monkeypatch):
    def holding(event: synchronize.Event) -> None:
        with event._cond:
            time.sleep(60)

    def lose() -> None:
        with (  # noqa: PT012
            pytest.raises(UserError, match="a process of this run was lost"),
            reading(Rows(), num_workers=1) as batches,
        ):
            lock = batches._workers_done_event._cond
            while lock.acquire(block=False):
                lock.release()
                time.sleep(0.01)
            kill_readers()
            list(batches)
        assert multiprocessing.active_children() == []

    monkeypatch.setattr(synchronize.Event, "is_set", holding)
    in_a_process_of_its_own(lose)
