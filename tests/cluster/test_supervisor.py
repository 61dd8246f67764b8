"""What a job decides after its ranks have ended; no processes here."""

import os

import pytest

from cluster import jobs, preflight
from cluster.supervisor import Failure, decide
from dico_t2i.command import REQUEUE_EXIT_CODE, USER_ERROR
from dico_t2i.config import ClusterConfig, ConfigError

NODE = {"host": "n1", "python": "3.12.1", **dict.fromkeys(preflight.PACKAGES, "1.0"), "code": "abc", "gpus": 8}


def failure(start, step, code=1, error="boom"):
    return Failure(0.0, "7", start, step, code, 3, "n1", error)


def test_the_requeue_code_means_try_again_later():
    assert REQUEUE_EXIT_CODE == os.EX_TEMPFAIL


def test_done_ends_and_a_stop_goes_on():
    assert decide(0, 0, 100, []).act == "end"
    assert decide(REQUEUE_EXIT_CODE, 5, 100, []).act == "again"


def test_a_failure_is_tried_again_but_not_twice_at_the_same_step():
    assert decide(1, 0, 100, [failure(0, 120)]).act == "again"
    assert decide(1, 1, 100, [failure(0, 120), failure(1, 480)]).act == "again"
    twice = decide(1, 2, 100, [failure(0, 120, error="first"), failure(1, 480), failure(2, 120)])
    assert twice.act == "give up"
    assert "failed twice at step 120" in twice.why
    assert "first" in twice.why


def test_failures_of_earlier_starts_do_not_count_against_a_stop():
    assert decide(REQUEUE_EXIT_CODE, 1, 100, [failure(0, 120)]).act == "again"
    assert decide(0, 1, 100, [failure(0, 120)]).act == "end"


def test_what_only_the_user_can_mend_is_not_tried_again():
    assert decide(USER_ERROR, 0, 100, [failure(0, 0, USER_ERROR)]).act == "give up"


def test_the_number_of_requeues_has_a_limit():
    assert decide(REQUEUE_EXIT_CODE, 2, 3, []).act == "again"
    assert decide(REQUEUE_EXIT_CODE, 3, 3, []).act == "give up"
    assert decide(1, 3, 3, [failure(3, 10)]).act == "give up"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": None}, "n2: torch not installed"),
        ({"torch": "2.0"}, "torch differs between nodes: n1 has 1.0, n2 has 2.0"),
        ({"code": "abd"}, "code differs"),
        ({"gpus": 7}, "n2: 7 GPUs visible, 8 needed"),
        ({"sees_run": False}, "n2: does not see the run folder"),
    ],
)
def test_unfit_nodes_are_named(change, message):
    good = {**NODE, "sees_run": True}
    assert preflight.problems([good, {**good, "host": "n2"}], 8) == []
    assert any(message in line for line in preflight.problems([good, {**good, "host": "n2", **change}], 8))


@pytest.mark.parametrize(("ranks", "gpus"), [(True, 8), (False, 1)])
def test_a_script_gets_one_gpu_and_a_run_all(tmp_path, ranks, gpus):
    made = jobs.executor(ClusterConfig(), "job", tmp_path, local=False, lead_s=60, ranks=ranks)
    assert f"#SBATCH --gpus-per-node={gpus}\n" in jobs.script(made, tmp_path / "job.sh").read_text()


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30", 2), ("24:00:00", 1440), ("2-0", 2880), ("1-12:30", 2190), ("1-00:00:01", 1441)],
)
def test_time_limits(text, minutes):
    assert jobs.minutes(text) == minutes


@pytest.mark.parametrize("text", ["soon", "0", "1:2:3:4", "-5", ""])
def test_impossible_time_limits(text):
    with pytest.raises(ConfigError, match=r"cluster\.time"):
        jobs.minutes(text)
