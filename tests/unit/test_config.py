from __future__ import annotations

from pathlib import Path

import pytest

from ensemble.config import Settings, find_site, load
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
