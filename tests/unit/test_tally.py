from __future__ import annotations

from ensemble.core.model import End, Outcome
from ensemble.service.tally import Tally


def end(outcome):
    return End(id=1, attempt=1, outcome=outcome)


def test_a_full_machine_is_fully_used():
    tally = Tally(nodes=2, now=100.0)
    tally.pass_time(110.0, 0)  # waited for work
    tally.pass_time(120.0, 2)
    tally.count(end(Outcome.DONE))
    assert tally.summary() == {"tasks": 1, "done": 1, "wall_s": 10.0, "utilisation": "100.0%"}


def test_half_a_machine_is_half_used():
    tally = Tally(nodes=2, now=0.0)
    tally.pass_time(10.0, 1)
    tally.count(end(Outcome.ERROR))
    tally.pass_time(500.0, 0)  # idle before it leaves
    assert tally.summary() == {
        "tasks": 1,
        "done": 0,
        "error": 1,
        "wall_s": 10.0,
        "utilisation": "50.0%",
    }


def test_what_was_given_back_did_not_run():
    tally = Tally(nodes=1, now=0.0)
    tally.pass_time(10.0, 1)
    tally.count(end(Outcome.DONE))
    tally.pass_time(50.0, 0)
    tally.count(end(Outcome.GIVEN_BACK))
    assert (tally.ended, tally.done, tally.summary()["wall_s"]) == (1, 1, 10.0)


def test_nothing_happened():
    assert Tally(nodes=0, now=5.0).summary()["utilisation"] == "0.0%"
