from __future__ import annotations

from ensemble.core.backoff import Backoff


def test_delays_double_up_to_the_cap():
    backoff = Backoff(base_s=0.5, cap_s=3.0)
    assert [backoff.fail() for _ in range(4)] == [0.5, 1.0, 2.0, 3.0]


def test_success_starts_afresh():
    backoff = Backoff(base_s=0.5, cap_s=3.0)
    backoff.fail()
    backoff.fail()
    backoff.succeed()
    assert backoff.fail() == 0.5


def test_thousands_of_failures_do_not_overflow():
    backoff = Backoff(base_s=0.5, cap_s=3.0)
    for _ in range(5000):
        delay_s = backoff.fail()
    assert delay_s == 3.0
