"""`ensemble submit-launch`: which words are ours, and which are the scheduler's."""

from __future__ import annotations

import click
import pytest
from hypothesis import example, given, strategies as st

from ensemble.cli import submit
from ensemble.cli.submit import split, submit_launch
from ensemble.errors import UsageError

OURS = ["-n", "5", "-t", "15"]


def parse(*words):
    """Return the values of our options, and what is handed on."""
    context = submit_launch.make_context("submit-launch", list(words))
    return context.params, context.meta[submit._OTHERS]


# ---------------------------------------------------------------------------- ours


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["-n", "5"], "nodes", 5),
        (["-n5"], "nodes", 5),
        (["-n=5"], "nodes", 5),
        (["--nodes", "5"], "nodes", 5),
        (["--nodes=5"], "nodes", 5),
        (["-t", "15"], "minutes", 15),
        (["-t15"], "minutes", 15),
        (["--time", "15"], "minutes", 15),
        (["--time=0:15:00"], "minutes", 15),
        (["--time-minutes=15"], "minutes", 15),
        (["-q", "debug"], "queue", "debug"),
        (["-qdebug"], "queue", "debug"),
        (["--queue", "debug"], "queue", "debug"),
        (["-p", "debug"], "queue", "debug"),
        (["-pdebug"], "queue", "debug"),
        (["-p=debug"], "queue", "debug"),
        (["--partition=debug"], "queue", "debug"),
        (["-A", "Proj"], "project", "Proj"),
        (["-AProj"], "project", "Proj"),
        (["-A=Proj"], "project", "Proj"),
        (["--account=Proj"], "project", "Proj"),
        (["--project", "Proj"], "project", "Proj"),
        (["--job-mode=serial"], "job_mode", "serial"),
        (["--wf-filter", "-x"], "wf_filter", "-x"),
        (["--wf-filter="], "wf_filter", ""),
        (["--wf-filter=a=b"], "wf_filter", "a=b"),
        (["--template", "big.sh"], "template", "big.sh"),
        (["--slots-per-node=4"], "slots_per_node", 4),
        (["--dry-run"], "dry_run", True),
        (["--json"], "as_json", True),
    ],
)
def test_every_spelling_of_our_own_options(words, name, value):
    params, others = parse(*OURS, *words)
    assert (params[name], others) == (value, [])


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90), ("1:30:00", 90), ("01:30:00", 90), ("0:00:01", 1), ("1:30:01", 91), ("2-00:00:00", 2880),
        ("100:00:00", 6000), ("1000000", 1_000_000),
    ],
)  # fmt: skip
def test_walltimes(text, minutes):
    assert parse("-n1", "-t", text)[0]["minutes"] == minutes


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "0:00:00",
        "-5",
        "1:30",
        "1.5",
        "1:61:00",
        "1:00:61",
        "1h",
        "",
        " ",
        "9" * 30,
        "1000001",
        "٣",
        "1\n",
        "²",
    ],
)
def test_what_is_no_walltime_is_refused(text):
    with pytest.raises(click.UsageError) as caught:
        parse("-n1", "-t", text)
    assert "expected" in caught.value.format_message()
    assert "-t" in caught.value.format_message()


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "9" * 30, "", "x", "1e3"])
def test_what_is_no_number_of_nodes_is_refused(text):
    with pytest.raises(click.UsageError) as caught:
        parse("-n", text, "-t1")
    assert "--nodes" in caught.value.format_message()


@pytest.mark.parametrize(
    "words", [["-n"], ["-n", "1", "-t"], ["--nodes=1"], ["-t1"], ["-n", "1", "-q"], []]
)
def test_what_is_missing_is_named(words):
    with pytest.raises(click.UsageError):
        parse(*words)


def test_the_last_of_two_wins():
    assert parse("-n1", "-t1", "--nodes", "2")[0]["nodes"] == 2


# ---------------------------------------------------------------------------- the scheduler's


@pytest.mark.parametrize(
    "words",
    [
        ["-lselect=2:ncpus=4"],
        ["-l", "select=2:ncpus=4", "-l", "filesystems=home:eagle"],
        ["-Cgpu&hbm"],
        ["-C", "gpu"],
        ["-N", "2"],
        ["-pe", "mpi", "16"],
        ["-R", "select[type==any] rusage[mem=4]"],
        ["-W", "depend=afterok:12"],
        ["-x"],
        ["-notify"],
        ["-terse"],
        ["-j", "oe"],
        ["--requeue"],
        ["--no-requeue"],
        ["--reservation=tests", "--qos", "high"],
        ["--signal=B:USR1@300"],
        ["--gpus-per-node=4", "--time-min=10", "--nodelist=n1", "--mem=0", "--mode=script"],
        ["--job-name=mine"],
        ["--setattr=system.x=1"],
        ["", " ", "a b", "$(id)", "-", "---"],
    ],
)
def test_all_else_is_handed_on_in_its_order_and_as_it_is(words):
    for where in ([*words, *OURS], [*OURS, *words]):
        params, others = parse(*where)
        assert others == words
        assert (params["nodes"], params["minutes"], params["queue"]) == (5, 15, None)


def test_what_stands_between_ours_keeps_its_order():
    _, others = parse(
        "-lx=1", "-n", "5", "--foo", "bar", "-t", "15", "-ly=2", "-q", "debug", "-lz=3"
    )
    assert others == ["-lx=1", "--foo", "bar", "-ly=2", "-lz=3"]


def test_after_two_dashes_everything_is_the_schedulers():
    params, others = parse(*OURS, "--", "-n", "7", "--node=3", "--", "-q", "x", "--help")
    assert others == ["-n", "7", "--node=3", "--", "-q", "x", "--help"]
    assert (params["nodes"], params["queue"]) == (5, None)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--node=3", "--nodes"), ("--job_mode=serial", "--job-mode"), ("--wf_filter=x", "--wf-filter"),
        ("--wffilter=x", "--wf-filter"), ("--slot-per-node=2", "--slots-per-node"),
        ("--acount=x", "--account"), ("--partitions=x", "--partition"), ("--dryrun", "--dry-run"),
        ("--templates=x", "--template"), ("--time-minute=3", "--time-minutes"),
    ],
)  # fmt: skip
def test_a_typo_of_ours_is_not_handed_on(word, meant):
    with pytest.raises(UsageError, match=f"did you mean {meant}?") as caught:
        parse(*OURS, word)
    assert "after --" in str(caught.value)


@given(
    st.lists(
        st.sampled_from(
            ["-n", "5", "-t", "--", "-q", "-x", "--foo", "a", "-n3", "--json", "-A=", ""]
        )
    )
)
@example(["-n"])
def test_no_word_is_lost_or_made_up(words):
    own, others = split(words)
    rest = list(words)
    if "--" in rest and rest.count("--") > (own + others).count("--"):
        rest.remove("--")
    assert sorted(own + others) == sorted(rest)
