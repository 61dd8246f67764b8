import os
import re
import signal
import socket
from dataclasses import asdict

import pytest

from dico_t2i.command import HANG_EXIT_CODE
from dico_t2i.training.ranks.watchdog import Progress, Seat, _Judge, _Link, judge

from . import watchdog_ranks as faults
from .watchdog_ranks import AT, Ranks

HOST = re.escape(socket.gethostname())


def check_verdict(ranks, witnesses, pattern):
    """The same verdict on every witness, printed once with the stack of the main thread."""
    verdicts = {ranks.verdict(rank) for rank in witnesses}
    assert len(verdicts) == 1, verdicts
    text = verdicts.pop().removeprefix(f"{AT} ")
    assert re.fullmatch(pattern, text), text
    for rank in witnesses:
        output = ranks.output(rank)
        assert output.count(f"[hang] rank {rank}: {text}") == 1, output
        assert output.count("watchdog_ranks.py") >= 1, output
        assert "done" not in output


def test_a_rank_that_sleeps_is_named_by_all_and_itself(tmp_path):
    ranks = Ranks(tmp_path, 3, (1,), faults.sleep_in_data)
    assert ranks.codes() == [HANG_EXIT_CODE] * 3
    pattern = rf"rank 1 on {HOST} \(pid \d+\) has been in 'data' at step 20 for 2 s; ranks 0, 2 wait for it"
    check_verdict(ranks, range(3), pattern)
    assert "in sleep_in_data" in ranks.output(1)


def test_a_stopped_data_worker_is_named(tmp_path):
    ranks = Ranks(tmp_path, 2, (1,), faults.wait_for_a_stopped_child)
    assert ranks.codes() == [HANG_EXIT_CODE] * 2
    child = (tmp_path / "child.txt").read_text()
    os.kill(int(child), signal.SIGKILL)
    pattern = (
        rf"rank 1 on {HOST} .* 'data' at step 20 for 2 s, its child process {child} is stopped; rank 0 waits for it"
    )
    check_verdict(ranks, range(2), pattern)


def test_rank_0_asleep_is_named(tmp_path):
    ranks = Ranks(tmp_path, 2, (0,), faults.sleep_in_data)
    assert ranks.codes() == [HANG_EXIT_CODE] * 2
    check_verdict(ranks, range(2), rf"rank 0 on {HOST} .* has been in 'data' at step 20 for 2 s; rank 1 waits for it")


def test_a_lone_rank_watches_itself(tmp_path):
    ranks = Ranks(tmp_path, 1, (0,), faults.sleep_in_step)
    assert ranks.codes() == [HANG_EXIT_CODE]
    check_verdict(ranks, [0], rf"rank 0 on {HOST} .* has been in 'step' at step 20 for 2 s")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_named_by_the_others(tmp_path, victim):
    ranks = Ranks(tmp_path, 3, (victim,), faults.stop)
    witnesses = [rank for rank in range(3) if rank != victim]
    codes = ranks.codes(expected_stopped=(victim,))
    assert codes[victim] is None
    assert [codes[rank] for rank in witnesses] == [HANG_EXIT_CODE] * 2
    check_verdict(
        ranks, witnesses, rf"rank {victim} on {HOST} .* has sent no message for [12] s: .* 'data' at step 20.*"
    )


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("fault", [faults.kill, faults.kill_leaving_a_child])
def test_a_killed_process_is_named_although_the_others_fail_in_their_collective(tmp_path, victim, fault):
    ranks = Ranks(tmp_path, 3, (victim,), fault)
    witnesses = [rank for rank in range(3) if rank != victim]
    codes = ranks.codes()
    assert codes[victim] == -9
    assert [codes[rank] for rank in witnesses] == [HANG_EXIT_CODE] * 2
    check_verdict(ranks, witnesses, rf"rank {victim} on {HOST} \(pid \d+\) died in 'data' at step 20")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_raises_tells_why_and_keeps_its_own_error(tmp_path, victim):
    ranks = Ranks(tmp_path, 2, (victim,), faults.fail)
    codes = ranks.codes()
    assert codes[victim] == 1
    assert codes[1 - victim] == HANG_EXIT_CODE
    check_verdict(ranks, [1 - victim], rf"rank {victim} .* failed in 'data' at step 20: ValueError: shard 7 is gone")
    output = ranks.output(victim)
    assert output.rstrip().endswith("ValueError: shard 7 is gone")
    assert "[hang]" not in output


def test_all_ranks_may_raise_the_same_error(tmp_path):
    ranks = Ranks(tmp_path, 2, (0, 1), faults.fail)
    assert ranks.codes() == [1, 1]
    for rank in range(2):
        assert ranks.output(rank).rstrip().endswith("ValueError: shard 7 is gone")


@pytest.mark.parametrize(
    "fault", [faults.allow_more, faults.go_on_slowly, faults.sleep_in_first_step, faults.leave_late]
)
def test_what_is_slow_but_goes_on_or_was_allowed_is_left_alone(tmp_path, fault):
    ranks = Ranks(tmp_path, 2, (1,), fault)
    assert ranks.codes() == [0, 0], ranks.output(0) + ranks.output(1)
    assert [ranks.output(rank) for rank in range(2)] == ["done\n"] * 2


def seat(rank, beats=10, idle=0.0, silent=0.0, end=None, limit=60.0):
    return Seat(Progress(rank, f"node{rank}", 1, beats, 120, "step", idle, limit, end=end), silent_s=silent)


def find(*seats, settled=True):
    return judge(seats, 1.0, settled)


def test_only_the_rank_furthest_behind_is_judged():
    assert find(seat(0, 10, 100), seat(1, 9, 50), seat(2, 10, 100)) is None
    assert find(seat(0, 10, 100), seat(1, 9, 61), seat(2, 10, 100)).ranks == [1]
    assert find(seat(0, 10, 100), seat(1, 9, 61), seat(2, 10, 100)).text.endswith("; ranks 0, 2 wait for it")
    assert find(seat(0, 10, 100), seat(1, 9, 61, limit=120)) is None
    assert find(seat(0, 10, 100), seat(1, 9, 61, end=""), seat(2, 10, 20)).ranks == [0]


def test_a_rank_that_arrives_late_leaves_the_blame_to_nobody():
    here, there = socket.socketpair()
    judge_of_two, rank_1 = _Judge(2, None, 0), _Link(there)
    judge_of_two.seats[1] = Seat(Progress(1), _Link(here))

    def look(beats, idle, own_beats, own_idle):
        rank_1.send(asdict(Progress(1, beats=beats, step=120, phase="save", idle_s=idle, limit_s=300)))
        own = Progress(0, beats=own_beats, step=120, phase="step", idle_s=own_idle, limit_s=60)
        return judge_of_two.exchange(own, elapsed=30, interval_s=1)

    assert look(9, 0, 10, 0) is None
    assert [look(9, idle, 10, idle) for idle in (30, 60, 90, 120)] == [None] * 4
    assert look(10, 0, 10, 150) is None  # rank 1 has arrived; rank 0's main thread has not run yet
    assert look(11, 0, 11, 0) is None
    assert look(12, 0, 11, 30) is None
    assert look(12, 30, 11, 60) is None
    assert look(12, 60, 11, 90).ranks == [0]


def test_silence_counts_as_standing_still_and_explains_more():
    assert find(seat(0, 10, 61), seat(1, 10, 1, silent=60.5)).ranks == [1]
    assert find(seat(0, 10, 5), seat(1, 10, 1, silent=50)) is None
    assert find(seat(0, end="RuntimeError"), seat(1, silent=4)).ranks == [1]


def test_a_collective_that_hangs_everywhere_names_all():
    verdict = find(*(seat(rank, 10, 61 + rank) for rank in range(6)))
    assert verdict.ranks == list(range(6))
    assert verdict.text.endswith("; and 2 more; no rank makes progress")


def test_exceptions_wait_for_what_explains_them():
    assert find(seat(0, end="RuntimeError"), seat(1), settled=False) is None
    assert find(seat(0, end="RuntimeError"), seat(1), settled=True).ranks == [0]
    assert find(seat(0, end=""), seat(1, end="")) is None
