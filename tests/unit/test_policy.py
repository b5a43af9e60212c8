"""What batch jobs are submitted, and what is said when none is: by example."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, strategies as st

from ensemble.core.batchjob import BatchJob, JobState
from ensemble.core.model import JobMode
from ensemble.core.policy import permit
from ensemble.core.queues import Backlog, Capacity, QueuePolicy, QueueState, Rules, unfit

EPOCH = datetime(2030, 1, 1, tzinfo=UTC)
#: An allocation of 60 minutes has 57 useful ones: one for its start, two before its end.
RULES = Rules()
TAKEN = "launchers and queued batch jobs will take all that could run here"
NEARLY = "launchers and queued batch jobs will take nearly all that could run here"


def queue(name="q", **more):
    return QueuePolicy(**{"name": name, "max_nodes": 10, "max_queued": 5, **more})


def tasks(count, minutes=30, *, nodes=1, workflow="w", **more):
    values = {"ranks_per_node": 1, "packing": 1, "gpus": 0, "memory_mb": None, **more}
    return Backlog(
        workflow=workflow, num_nodes=nodes, wall_time_minutes=minutes, tasks=count, **values
    )


def launcher(nodes=1, minutes=57.0, **more):
    values = {"job_mode": JobMode.MPI, "wf_filter": None, "node_gpus": 0, "busy": 0.0, **more}
    return Capacity(**{"batch_job_id": None, **values}, nodes=nodes, left_minutes=minutes)


def job(id=1, nodes=1, minutes=60, *, state=JobState.QUEUED, policy="q", **more):
    values = {
        "scheduler": "slurm",
        "scheduler_id": str(id),
        "job_mode": JobMode.MPI,
        "wf_filter": None,
        "project": None,
        "queue": None,
        "why": "",
        "reason": None,
        "exit_code": None,
        "error": None,
        "record": None,
        "missing": 0,
        "created_at": EPOCH,
        "submitted_at": EPOCH,
        "started_at": None,
        "ended_at": None,
        "ends_at": None,
        **more,
    }
    return BatchJob(
        id=id,
        name=f"ens-{id}",
        num_nodes=nodes,
        wall_time_minutes=minutes,
        state=state,
        policy=policy,
        **values,
    )


def paused(name="q", **more):
    return {name: QueueState(name=name, **more)}


def decide(policies, backlog, *, jobs=(), capacity=(), states=None, rules=RULES):
    """Return the sizes that are submitted by policy, and what is said in the end."""
    policies = [policies] if isinstance(policies, QueuePolicy) else policies
    decisions = permit(policies, states or {}, jobs, capacity, backlog, rules)
    made = {
        policy.name: [
            (d.submission.nodes, d.submission.minutes)
            for d in decisions
            if d.policy == policy.name and d.submission
        ]
        for policy in policies
    }
    return made, {d.policy: d.reason for d in decisions if d.submission is None}


def sizes(policy, backlog, **more):
    return decide(policy, backlog, **more)[0][policy.name]


def reason(policy, backlog, **more):
    made, reasons = decide(policy, backlog, **more)
    assert made[policy.name] == []
    return reasons[policy.name]


# ------------------------------------------------------------------ sizes


def test_a_batch_job_is_as_long_as_its_longest_task_and_as_wide_as_there_is_work():
    assert sizes(queue(), [tasks(4, 30)]) == [(4, 33)]


def test_it_is_narrower_when_short_tasks_fit_beside_the_longest_one_after_another():
    assert sizes(queue(), [tasks(1, 50), tasks(50, 1)]) == [(2, 53)]


def test_it_is_longer_where_it_may_not_be_wider():
    assert sizes(queue(max_nodes=2, max_minutes=240), [tasks(8, 30)]) == [(2, 123)]


def test_it_is_at_least_as_wide_as_its_widest_task():
    assert sizes(queue(), [tasks(1, 30, nodes=8)]) == [(8, 33)]
    assert sizes(queue(max_nodes=8), [tasks(1, 30, nodes=8), tasks(1, 8)]) == [(8, 34)]


def test_what_is_too_much_for_one_becomes_several_the_last_as_small_as_the_rest():
    assert sizes(queue(max_nodes=4), [tasks(10, 57)]) == [(4, 60), (4, 60), (2, 60)]


def test_the_least_that_a_queue_takes_is_asked_for():
    assert sizes(queue(min_nodes=8, min_minutes=30), [tasks(1, 5)]) == [(8, 30)]


def test_of_short_allocations_start_and_margin_take_a_tenth_each():
    assert sizes(queue(min_minutes=1), [tasks(1, 5)]) == [(1, 7)]
    assert RULES.useful_minutes(10) == 8
    assert RULES.useful_minutes(60) == 57


def test_tasks_share_nodes_in_serial_mode():
    serial = queue(job_mode=JobMode.SERIAL)
    assert sizes(serial, [tasks(64, 30, packing=16)]) == [(4, 33)]
    assert sizes(queue(job_mode=JobMode.SERIAL, slots_per_node=32), [tasks(64, 30)]) == [(2, 33)]
    assert sizes(queue(slots_per_node=32), [tasks(8, 30, packing=16)]) == [(8, 33)]  # mpi mode


def test_a_third_of_a_node_and_two_thirds_are_one_node():
    serial = queue(job_mode=JobMode.SERIAL)
    kinds = [tasks(1, 30, packing=10, gpus=gpus) for gpus in range(10)]
    assert sizes(serial, kinds) == [(1, 33)]


def test_tasks_of_unknown_length_take_as_long_as_others_of_their_workflow():
    rules = Rules(typical_minutes={"w": 20.0}, assumed_minutes=5.0)
    assert sizes(queue(), [tasks(2, 0)], rules=rules) == [(2, 23)]
    assert sizes(queue(), [tasks(2, 0, workflow="new")], rules=rules) == [(2, 10)]


def test_tasks_of_unknown_length_are_tried_even_if_they_usually_take_too_long():
    rules = Rules(typical_minutes={"w": 10_000.0})
    assert sizes(queue(), [tasks(3, 0)], rules=rules) == [(3, 60)]


def test_tasks_that_come_soon_widen_a_batch_job_but_do_not_ask_for_one():
    soon = tasks(4, 30, is_soon=True)
    assert sizes(queue(), [soon, tasks(1, 30)]) == [(5, 33)]
    assert reason(queue(), [soon]) == "nothing is runnable"
    assert sizes(queue(min_minutes=1), [tasks(1, 5), tasks(1, 6, nodes=9, is_soon=True)])[0][1] < 60


def test_the_reason_for_a_batch_job_names_what_it_is_for():
    soon = tasks(3, 10, is_soon=True)
    decision = permit([queue()], {}, [], [], [tasks(1, 30, nodes=2), soon], RULES)[0]
    assert decision.reason == (
        "1 task and 3 soon, 90 node-minutes, widest 2, longest 30 min: 3 nodes for 33 min"
    )


@given(st.integers(1, 3000), st.sampled_from([0.0, 1 / 3, 0.7, 1.0, 2.0, 15.0]))
def test_what_is_needed_for_so_many_useful_minutes_gives_them_and_no_less_would_do(useful, margin):
    rules = Rules(margin_minutes=margin)
    minutes = rules.needed_minutes(useful)
    assert rules.useful_minutes(minutes) >= useful > rules.useful_minutes(minutes - 1)


# ------------------------------------------------------------------ limits


def test_no_more_than_max_queued_are_queued_or_running():
    jobs = [job(1), job(2, state=JobState.RUNNING), job(3, state=JobState.NEW)]
    ended = [job(4, state=JobState.FINISHED), job(5, state=JobState.LOST), job(6, policy=None)]
    made, reasons = decide(queue(max_nodes=1), [tasks(100, 57)], jobs=jobs + ended)
    assert len(made["q"]) == 2
    assert reasons["q"] == "at its limit: 5 of max_queued = 5 batch jobs queued or running"


def test_a_lowered_limit_submits_nothing_until_enough_have_ended():
    text = reason(queue(max_queued=1), [tasks(100)], jobs=[job(1), job(2)])
    assert text == "at its limit: 2 of max_queued = 1 batch jobs queued or running"


def test_a_batch_job_that_is_stuck_counts_but_takes_nothing():
    stuck = job(7, 10, reason="stuck: PartitionDown")
    text = reason(queue(max_queued=1), [tasks(5)], jobs=[stuck])
    assert text == ("at its limit: 1 of max_queued = 1 batch jobs queued or running (stuck: 7)")
    made, _ = decide([queue(max_queued=1), queue("other")], [tasks(5)], jobs=[stuck])
    assert made == {"q": [], "other": [(5, 33)]}


def test_the_rate_holds_for_all_queues_together():
    policies = [queue("a", max_nodes=1), queue("b", max_nodes=1)]
    made, reasons = decide(policies, [tasks(100, 57)], rules=Rules(max_now=7))
    assert [len(made["a"]), len(made["b"])] == [5, 2]
    assert reasons["b"] == "enough for this minute (submissions_per_minute)"


# ------------------------------------------------------------------ what others take


@pytest.mark.parametrize("state", [JobState.NEW, JobState.SUBMITTED, JobState.QUEUED])
def test_what_a_waiting_batch_job_will_take_is_not_asked_for_again(state):
    assert reason(queue(), [tasks(5)], jobs=[job(1, 5, state=state)]) == TAKEN


def test_it_does_not_matter_in_which_order_batch_jobs_are_listed():
    jobs = [job(2, 5), job(1, 5, wf_filter="x")]
    assert reason(queue(), [tasks(5, workflow="x"), tasks(5, workflow="y")], jobs=jobs) == TAKEN


def test_what_a_running_launcher_has_room_for_is_not_asked_for():
    assert reason(queue(), [tasks(5)], capacity=[launcher(5)]) == TAKEN


def test_what_a_launcher_holds_is_room_it_does_not_have():
    assert sizes(queue(), [tasks(5)], capacity=[launcher(5, busy=5 * 57.0)]) == [(5, 33)]


@pytest.mark.parametrize(
    ("room", "wanted"),
    [
        ({"wf_filter": "other"}, {}),
        ({"job_mode": JobMode.SERIAL}, {"nodes": 2}),
        ({"job_mode": JobMode.SERIAL}, {"ranks_per_node": 2}),
        ({"job_mode": JobMode.SERIAL}, {"gpus": 1}),
        ({"nodes": 2}, {"nodes": 3}),
        ({"minutes": 29.9}, {}),
        ({"minutes": -1.0}, {}),
    ],
)
def test_a_launcher_takes_only_what_it_would_claim(room, wanted):
    left = [tasks(1, **wanted)]
    assert len(sizes(queue(), left, capacity=[launcher(**{"nodes": 50, **room})])) == 1


def test_in_mpi_mode_a_launcher_takes_tasks_whatever_gpus_it_has():
    assert reason(queue(), [tasks(1, gpus=4)], capacity=[launcher(node_gpus=0)]) == TAKEN


def test_a_waiting_batch_job_is_not_taken_to_have_what_its_policy_says_it_has_not():
    cpu = queue("cpu", node_gpus=0, node_memory_mb=1000, max_queued=1)
    big = queue("big", node_gpus=4, node_memory_mb=9000)
    backlog = [tasks(1, gpus=1), tasks(1, memory_mb=5000)]
    made, _ = decide([cpu, big], backlog, jobs=[job(1, 9, policy="cpu")])
    assert made == {"cpu": [], "big": [(2, 33)]}
    made, _ = decide([cpu, big], [*backlog, tasks(1)])
    assert made == {"cpu": [(1, 33)], "big": [(2, 33)]}


def test_a_batch_job_whose_launcher_has_registered_is_counted_once():
    running = job(1, 5, state=JobState.RUNNING, launcher_id=9, has_live_launcher=True)
    for listed in (running, job(1, 5)):  # also one that was listed just before it registered
        full = launcher(5, busy=5 * 57.0, batch_job_id=1)
        assert sizes(queue(), [tasks(5)], jobs=[listed], capacity=[full]) == [(5, 33)]


def test_a_batch_job_whose_launcher_is_gone_takes_nothing():
    dead = job(1, 5, state=JobState.RUNNING, launcher_id=9)
    assert sizes(queue(), [tasks(5)], jobs=[dead]) == [(5, 33)]


def test_a_requeued_batch_job_will_take_tasks_again():
    assert reason(queue(), [tasks(5)], jobs=[job(1, 5, launcher_id=9)]) == TAKEN


def test_a_batch_job_that_runs_without_a_launcher_takes_less_and_less():
    values = {"state": JobState.RUNNING, "created_at": EPOCH}
    values["started_at"] = EPOCH + timedelta(hours=5)
    young = job(1, 5, age_s=5 * 3600 + 60, **values)
    assert reason(queue(), [tasks(5)], jobs=[young]) == TAKEN
    old = job(1, 5, age_s=5 * 3600 + 40 * 60, **values)
    assert sizes(queue(), [tasks(5)], jobs=[old]) == [(5, 33)]


def test_a_launcher_without_an_end_takes_tasks_of_any_length_but_not_all_of_them():
    laptop = launcher(1, None)
    week = queue(max_minutes=10_080)
    assert reason(week, [tasks(1, 5000)], capacity=[laptop]) == TAKEN
    assert sizes(week, [tasks(104, 30)], capacity=[laptop]) == [(10, 303)]


def test_a_remainder_is_left_to_those_who_take_ten_times_as_much_of_it():
    jobs = [job(number, 10) for number in range(1, 5)]
    assert reason(queue(), [tasks(43, 57)], jobs=jobs) == NEARLY
    assert sizes(queue(), [tasks(44, 57)], jobs=jobs) == [(4, 60)]


def test_a_remainder_that_nobody_else_could_take_is_asked_for_however_small():
    jobs = [job(number, 10) for number in range(1, 5)]
    assert sizes(queue(max_nodes=20), [tasks(40, 57), tasks(1, 1, nodes=11)], jobs=jobs) == [
        (11, 10)
    ]


def test_a_remainder_is_not_held_up_by_what_others_take_of_another_kind():
    """A launcher that is full of other workflows for days is no reason to leave a small one alone."""
    full = launcher(100)
    backlog = [tasks(100, 57, workflow="large", nodes=1), tasks(2, 50, workflow="small")]
    assert sizes(queue(wf_filter="small"), backlog, capacity=[full]) == [(2, 53)]


# ------------------------------------------------------------------ what no batch job could run


@pytest.mark.parametrize(
    ("limits", "wanted", "words"),
    [
        ({}, {"nodes": 11}, "wider than max_nodes = 10"),
        ({}, {"minutes": 58}, "longer than the 57 useful minutes of max_minutes = 60"),
        (
            {"job_mode": JobMode.SERIAL},
            {"ranks_per_node": 2},
            "of several ranks or nodes (job_mode = serial)",
        ),
        (
            {"job_mode": JobMode.SERIAL},
            {"nodes": 2},
            "of several ranks or nodes (job_mode = serial)",
        ),
        ({"node_gpus": 4}, {"gpus": 5}, "with more GPUs than node_gpus = 4"),
        ({"node_memory_mb": 99}, {"memory_mb": 100}, "with more memory than node_memory_mb = 99"),
    ],
)
def test_nothing_is_submitted_for_what_no_launcher_could_run(limits, wanted, words):
    policy, left = queue(**limits), tasks(3, **wanted)
    assert unfit(policy, left, RULES) == words
    assert reason(policy, [left]) == f"3 tasks {words}"


def test_each_reason_is_told_with_its_number_the_commonest_first():
    backlog = [
        tasks(1, nodes=11),
        tasks(2, 58),
        tasks(3, 59),
        tasks(4, 90, is_soon=True),
        tasks(1, 30),
    ]
    assert reason(queue(), backlog, jobs=[job(1)]) == (
        f"{TAKEN}; 5 tasks longer than the 57 useful minutes of max_minutes = 60; "
        "1 task wider than max_nodes = 10"
    )


def test_what_a_launcher_takes_that_no_batch_job_could_run_is_not_complained_of():
    assert reason(queue(), [tasks(1, nodes=11)], capacity=[launcher(11)]) == "nothing is runnable"


def test_nothing_is_submitted_for_other_workflows():
    assert (
        reason(queue(wf_filter="climate"), [tasks(5)])
        == "nothing of wf_filter = climate is runnable"
    )
    assert sizes(queue(wf_filter="climate"), [tasks(5, workflow="2030-climate-b")]) == [(5, 33)]
    assert reason(queue(), []) == "nothing is runnable"


# ------------------------------------------------------------------ what keeps a policy from submitting


def test_a_policy_that_is_switched_off_submits_nothing():
    assert reason(queue(enabled=False), [tasks(5)]) == "switched off (enabled = false)"


def test_a_paused_policy_says_who_paused_it_why_and_how_to_go_on():
    states = paused(
        paused_by="service", reason="sbatch: error: Invalid account\nBatch job submission failed"
    )
    assert reason(queue(), [tasks(5)], states=states) == (
        "paused by service: sbatch: error: Invalid account Batch job submission failed "
        "(ensemble queue resume q)"
    )
    states = paused(paused_by="user")
    assert "paused by user: no reason given" in reason(queue(), [tasks(5)], states=states)


def test_after_a_failure_a_policy_waits_for_its_time():
    states = paused(retry_s=12.0, reason="slurmctld does not answer", failures=1)
    assert reason(queue(), [tasks(5)], states=states) == (
        "waits after a failure: slurmctld does not answer"
    )
    assert sizes(queue(), [tasks(5)], states=paused(retry_s=-1.0, reason="x")) == [(5, 33)]
    assert sizes(queue(), [tasks(5)], states=paused("other", paused_by="user")) == [(5, 33)]


# ------------------------------------------------------------------ several policies


def test_policies_are_served_in_their_order_and_share_the_backlog():
    policies = [queue("a", max_queued=1, max_nodes=4), queue("b"), queue("c")]
    made, reasons = decide(policies, [tasks(10, 57)])
    assert made == {"a": [(4, 60)], "b": [(6, 60)], "c": []}
    assert reasons["a"].startswith("at its limit")
    assert reasons["b"] == reasons["c"] == TAKEN


def test_policies_with_overlapping_filters_do_not_ask_for_the_same_tasks_twice():
    policies = [queue("x", wf_filter="x"), queue("xy", wf_filter="xy"), queue("all")]
    backlog = [tasks(2, workflow="xy"), tasks(3, workflow="x"), tasks(4, workflow="y")]
    made, _ = decide(policies, backlog)
    assert made == {"x": [(5, 33)], "xy": [], "all": [(4, 33)]}


def test_bins_of_a_queue_get_the_tasks_of_their_size():
    small = queue("small", max_nodes=4)
    large = queue("large", min_nodes=5, max_nodes=100, max_minutes=180)
    made, _ = decide([small, large], [tasks(2, 57, nodes=2), tasks(1, 120, nodes=64)])
    assert made == {"small": [(4, 60)], "large": [(64, 123)]}


def test_mpi_and_serial_policies_each_take_what_is_theirs():
    backlog = [tasks(64, 30, packing=64), tasks(1, 30, nodes=8)]
    made, _ = decide([queue("packed", job_mode=JobMode.SERIAL), queue("wide")], backlog)
    assert made == {"packed": [(1, 33)], "wide": [(8, 33)]}


def test_a_policy_that_is_paused_leaves_its_tasks_to_the_next():
    policies = [queue("a"), queue("b")]
    made, _ = decide(policies, [tasks(5)], states=paused("a", paused_by="user"))
    assert made == {"a": [], "b": [(5, 33)]}
