from __future__ import annotations

from pathlib import Path

import pytest

from ensemble.config import QueueSettings, Settings, find_site, load
from ensemble.errors import ConfigError, NotFoundError


def write(folder, text=""):
    (folder / "ensemble.toml").write_text(text)
    return folder


def refusal(folder, text, environ=None):
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text), environ=environ or {})
    return str(caught.value)


def test_an_empty_file_is_all_defaults(tmp_path):
    assert load(write(tmp_path), environ={}) == Settings()


def test_the_file_is_read(tmp_path):
    settings = load(write(tmp_path, 'name = "s"\n[launcher]\npoll_s = 3\n'), environ={})
    assert (settings.name, settings.launcher.poll_s) == ("s", 3.0)


def test_the_environment_is_over_the_file(tmp_path):
    environ = {
        "ENSEMBLE_LAUNCHER_POLL_S": "0.5",
        "ENSEMBLE_STORE_DSN": "postgresql://u@h/db",
        "ENSEMBLE_STORE_LISTEN": '["ib0"]',
        "ENSEMBLE_MPI_WRAP_SINGLE_RANK": "true",
        "ENSEMBLE_MPI_COMMAND": "true",  # a string, though TOML would read it as a boolean
        "ENSEMBLE_STORE_BIN_DIR": "12",
        "ENSEMBLE_TASK_ID": "41",
    }
    settings = load(write(tmp_path, "[launcher]\npoll_s = 3\n"), environ=environ)
    assert settings.launcher.poll_s == 0.5
    assert settings.store.dsn == "postgresql://u@h/db"
    assert (settings.store.listen, settings.store.bin_dir) == (["ib0"], "12")
    assert (settings.mpi.wrap_single_rank, settings.mpi.command) == (True, "true")


def test_a_wrong_value_in_the_environment_names_the_variable(tmp_path):
    message = refusal(tmp_path, "", {"ENSEMBLE_LAUNCHER_POLL_S": "soon"})
    assert "$ENSEMBLE_LAUNCHER_POLL_S is 'soon'" in message
    assert "float" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[launcher]\npol_s = 3", "unknown setting [launcher] pol_s; did you mean poll_s?"),
        ("[launcher]\npoll-s = 3", "did you mean poll_s?"),
        ("[lancher]\n", "unknown setting lancher; did you mean launcher?"),
        ("[mpi]\nqqq = 3", "unknown setting [mpi] qqq; known: launcher, command"),
        ('[launcher]\npoll_s = "x"', "Expected `float`, got `str` - at `launcher.poll_s`"),
        ("[launcher]\npoll_s = 0", "`launcher.poll_s`"),
        ("[launcher]\nheartbeat_s = nan", "`launcher.heartbeat_s`"),
        ("[launcher]\nmax_launches = 0", "`launcher.max_launches`"),
        ("[store]\nlisten = [1]", "store.listen"),
        ('[mpi]\nlauncher = "lam"', "known: auto, openmpi4"),
        ("store = 3", "`store`"),
        ("name = ", "cannot read"),
    ],
)
def test_a_refusal_names_the_file_and_the_key(tmp_path, text, words):
    message = refusal(tmp_path, text)
    assert str(tmp_path / "ensemble.toml") in message
    assert words in message


def test_a_section_that_is_none_is_refused_even_with_an_environment(tmp_path):
    assert "`store`" in refusal(tmp_path, "store = 3", {"ENSEMBLE_STORE_DSN": "x"})


def test_a_file_that_is_missing_or_not_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path, environ={})
    (tmp_path / "ensemble.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path, environ={})


def test_a_site_is_the_named_one_then_the_environments_then_the_nearest(tmp_path):
    named, other, outer = tmp_path / "named", tmp_path / "other", tmp_path / "outer"
    inner = outer / "a" / "b"
    for folder in (named, other, inner):
        folder.mkdir(parents=True)
    for folder in (named, other, outer):
        write(folder)
    environ = {"ENSEMBLE_SITE": str(other)}
    assert find_site(inner, named=str(named), environ=environ) == named
    assert find_site(inner, environ=environ) == other
    assert find_site(inner, environ={}) == outer
    assert find_site(inner, environ={"ENSEMBLE_SITE": ""}) == outer
    write(outer / "a")
    assert find_site(inner, environ={}) == outer / "a"


def test_a_relative_start_looks_above_the_current_directory(tmp_path, monkeypatch):
    (write(tmp_path) / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    assert find_site(Path("b"), environ={}) == tmp_path


def test_no_site_says_how_to_make_or_name_one(tmp_path):
    with pytest.raises(NotFoundError, match="ensemble init"):
        find_site(tmp_path, named=str(tmp_path), environ={})
    with pytest.raises(NotFoundError, match="--site"):
        find_site(tmp_path, environ={})


# ---------------------------------------------------------------------------- schedulers, the service, queues


def test_queue_policies_keep_their_order_and_have_defaults(tmp_path):
    text = '[queue.screen]\nqueue = "prod"\nflags = ["-l", "x=1"]\n[queue.debug]\n["queue".a.b]\n'
    with pytest.raises(ConfigError):
        load(write(tmp_path, text), environ={})
    found = load(
        write(tmp_path, text.replace('["queue".a.b]', '[queue."a.b+c-1"]')), environ={}
    ).queue
    assert list(found) == ["screen", "debug", "a.b+c-1"]
    assert (found["screen"].queue, found["screen"].flags) == ("prod", ["-l", "x=1"])
    assert found["debug"] == QueueSettings()


def test_sections_of_the_service_and_the_scheduler_have_variables_too(tmp_path):
    environ = {
        "ENSEMBLE_SCHEDULER_KIND": "local",
        "ENSEMBLE_SERVICE_PERIOD_S": "5",
        "ENSEMBLE_SCHEDULER_MAX_RUNNING": "3",
    }
    found = load(write(tmp_path, '[scheduler]\nkind = "pbs"\n'), environ=environ)
    assert (found.scheduler.kind, found.scheduler.max_running, found.service.period_s) == (
        "local",
        3,
        5.0,
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[scheduler]\nkind = "slrum"', "known: auto, slurm, pbs"),
        (
            "[scheduler]\ntimeout = 3",
            "unknown setting [scheduler] timeout; did you mean timeout_s?",
        ),
        ("[scheduler]\ntimeout_s = 0", "`scheduler.timeout_s`"),
        ("[scheduler]\nmax_running = 0", "`scheduler.max_running`"),
        ("[service]\nperiod_s = 0", "`service.period_s`"),
        ("[service]\nperiod_s = nan", "`service.period_s`"),
        ("[service]\nretry_s = -1", "`service.retry_s`"),
        ("[service]\nlost_looks = 0", "`service.lost_looks`"),
        ("[service]\nlost_looks = 1.5", "`service.lost_looks`"),
        (
            "[service]\nlost_lookz = 1",
            "unknown setting [service] lost_lookz; did you mean lost_looks?",
        ),
        (
            "[queue.debug]\nmax_quued = 1",
            "[queue.debug] unknown setting max_quued; did you mean max_queued?",
        ),
        ("[queue.debug]\nmax_queued = -1", "[queue.debug]"),
        ("[queue.debug]\nmax_nodes = 0", "max_nodes"),
        ("[queue.debug]\nmin_nodes = 5", "min_nodes = 5 is more than max_nodes = 1"),
        (
            "[queue.debug]\nmax_minutes = 5",
            "min_minutes = 10 is more than max_minutes = 5 (min_minutes is 10 unless",
        ),
        (
            "[queue.debug]\nmin_minutes = 9\nmax_minutes = 5",
            "min_minutes = 9 is more than max_minutes = 5",
        ),
        ('[queue.debug]\njob_mode = "seriell"', "known: mpi, serial"),
        ("[queue.debug]\nslots_per_node = 2", 'slots_per_node is for job_mode = "serial"'),
        ('[queue.debug]\nflags = "-x"', "[queue.debug]"),
        ("[queue.debug]\nflags = [1]", "[queue.debug]"),
        ("[queue]\nmax_nodes = 3", "write [queue.NAME] above their keys"),
        ("queue = 3", "write [queue.NAME] above their keys"),
        ("[[queue.debug]]\nmax_nodes = 3", "write [queue.NAME] above their keys"),
        ("[[queue]]\nmax_nodes = 3", "write [queue.NAME] above their keys"),
        ('[queue."a b"]\n', "is made of letters, digits"),
        ('[queue.""]\n', "is made of letters, digits"),
        ('[queue."\\u001b[31m"]\n', "is made of letters, digits"),
        (f"[queue.{'x' * 65}]\n", "is made of letters, digits"),
    ],
)
def test_a_refusal_names_the_queue_and_the_key(tmp_path, text, words):
    message = refusal(tmp_path, text)
    assert str(tmp_path / "ensemble.toml") in message
    assert words in message
    assert "\n" not in message
