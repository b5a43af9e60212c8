"""The job templates that come along: what they ask of their schedulers, and that no value breaks them."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ensemble import config
from ensemble.drivers import template
from ensemble.drivers.template import Raw, builtin, render

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = builtin()
#: How a line begins that the scheduler reads.
DIRECTIVES = {
    "slurm": "#SBATCH ", "pbs": "#PBS ", "cobalt": "#COBALT ", "lsf": "#BSUB ", "sge": "#$ ", "flux": "# flux: ",
    "local": "#ENSEMBLE ", "polaris": "#PBS ", "aurora": "#PBS ", "perlmutter-cpu": "#SBATCH ",
    "perlmutter-gpu": "#SBATCH ", "frontier": "#SBATCH ", "lumi-c": "#SBATCH ", "lumi-g": "#SBATCH ",
}  # fmt: skip
PLAIN = {
    "id": 7,
    "name": "ens-site-abc-7",
    "site": "/home/me/site",
    "project": "proj",
    "queue": "debug",
    "nodes": 2,
    "minutes": 90,
    "job_mode": "serial",
    "wf_filter": None,
    "slots_per_node": 8,
    "output": "/home/me/site/qsubmit/7.out",
    "launch": Raw("/opt/venv/bin/python -P -m ensemble --site /home/me/site launch"),
    "path": "/opt/venv/bin",
}
HOSTILE = 'it\'s; $(touch hacked) `id` "two" & | > < * ~ # {{ x }} ünïcödé 🦆'


def shipped(name: str, **values) -> str:
    return render(TEMPLATES[name], PLAIN | values)


def directives(name: str, **values) -> list[str]:
    """Return what a script says to its scheduler."""
    lines = shipped(name, **values).splitlines()
    return [
        line.removeprefix(DIRECTIVES[name]) for line in lines if line.startswith(DIRECTIVES[name])
    ]


every = pytest.mark.parametrize("name", DIRECTIVES)


def test_all_of_them_are_tested():
    assert set(DIRECTIVES) == set(TEMPLATES)
    assert all(path.is_file() for path in TEMPLATES.values())


def test_a_wheel_has_them_too():
    assert (ROOT / "ensemble" / "templates").samefile(ROOT / "contrib" / "templates")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "templates/*" in project["tool"]["setuptools"]["package-data"]["ensemble"]


def test_the_readme_tells_all_variables():
    text = (ROOT / "contrib" / "templates" / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    assert {name: meaning.replace(r"\|", "|") for name, meaning in rows} == template.VARIABLES
    named = set(re.findall(r"`([a-z-]+)`", text.partition("## What a template gets")[0]))
    assert set(TEMPLATES) <= named
    assert set(PLAIN) == set(template.VARIABLES)


@every
@pytest.mark.parametrize("is_hostile", [False, True], ids=["plain", "hostile"])
def test_the_script_is_bash_and_does_what_it_says(name, is_hostile, tmp_path):
    site = tmp_path / (HOSTILE if is_hostile else "site").replace("/", "")
    site.mkdir()
    beside = site / "bin dir"
    code = "import os, sys; print(os.getcwd(), os.environ['PATH'], sys.argv[1], os.umask(0), sep='\\n')"
    values = {
        "site": site,
        "path": beside,
        "project": HOSTILE if is_hostile else "proj",
        "queue": HOSTILE if is_hostile else "debug",
        "launch": Raw(shlex.join([sys.executable, "-c", code, HOSTILE])),
    }
    script = tmp_path / "script.sh"
    script.write_text(shipped(name, **values), "utf-8")
    subprocess.run(["bash", "-n", script], check=True)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONUTF8": "1"}
    done = subprocess.run(
        ["bash", script], env=env, capture_output=True, text=True, cwd=tmp_path, check=True
    )
    cwd, path, argument, umask = done.stdout.splitlines()
    assert (cwd, argument, int(umask)) == (str(site), HOSTILE, 0o077)
    assert path == f"{env['PATH']}:{beside}"
    assert done.stderr == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([site.name, "script.sh"])


@every
def test_a_site_that_is_gone_is_told_by_the_exit_status(name, tmp_path):
    script = shipped(name, site=tmp_path / "gone", launch=Raw("echo launched"))
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    done = subprocess.run(["bash"], input=script, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (97, "")


@every
def test_the_shape_of_a_script(name):
    lines = shipped(name).splitlines()
    assert lines[0] in ("#!/bin/bash", "#!/bin/bash -l")
    assert lines[-1] == f"exec {PLAIN['launch']}"
    is_directive = [line.startswith(DIRECTIVES[name]) for line in lines]
    count = sum(is_directive)
    assert count
    assert all(is_directive[1 : 1 + count]), "directives stand together, below the first line"
    assert not [line for line in lines if "{{" in line or "{%" in line or "None" in line]


@every
def test_without_project_and_queue_nothing_is_left_empty(name):
    given, bare = directives(name), directives(name, project=None, queue=None)
    assert [
        line for line in bare if re.search(r"(=|^-\w+)\s*(''|\"\")?$", line) and line not in given
    ] == []
    assert not any("proj" in line or "debug" in line for line in bare)
    if name != "local":
        assert sum("proj" in line for line in given) == 1
        assert sum("debug" in line for line in given) == 1
    assert directives(name, project="", queue="") == bare


@pytest.mark.parametrize(
    ("name", "nodes", "time"),
    [
        ("slurm", "--nodes=2", "--time=01:30:00"),
        ("pbs", "-l select=2", "-l walltime=01:30:00"),
        ("cobalt", "-n 2", "-t 90"),
        ("lsf", "-nnodes 2", "-W 01:30"),
        ("sge", "-pe mpi 2", "-l h_rt=01:30:00"),
        ("flux", "--nodes=2", "--time-limit=90m"),
        ("local", "--nodes 2 --time 90", "--nodes 2 --time 90"),
        ("polaris", "-l select=2:system=polaris", "-l walltime=01:30:00"),
        ("aurora", "-l select=2", "-l walltime=01:30:00"),
        ("perlmutter-cpu", "--nodes=2", "--time=01:30:00"),
        ("perlmutter-gpu", "--nodes=2", "--time=01:30:00"),
        ("frontier", "--nodes=2", "--time=01:30:00"),
        ("lumi-c", "--nodes=2", "--time=01:30:00"),
        ("lumi-g", "--nodes=2", "--time=01:30:00"),
    ],
)
def test_nodes_and_time(name, nodes, time):
    assert {nodes, time} <= set(directives(name))


def test_times_beyond_a_day():
    assert "--time=48:00:00" in directives("slurm", minutes=2880)
    assert "-W 48:00" in directives("lsf", minutes=2880)


def test_grid_engine_warns_before_it_kills():
    assert "-l s_rt=01:28:00" in directives("sge")
    assert "-l s_rt=00:00:30" in directives("sge", minutes=1)
    assert "-notify" in directives("sge")
    assert not any(line.startswith("-pe") for line in directives("sge", nodes=1))


@pytest.mark.parametrize("name", [name for name in DIRECTIVES if DIRECTIVES[name] == "#SBATCH "])
def test_slurm_starts_no_job_anew_and_ends_none_for_a_lost_node(name):
    assert {"--no-requeue", "--no-kill", "--open-mode=append"} <= set(directives(name))


@pytest.mark.parametrize("name", [name for name in DIRECTIVES if DIRECTIVES[name] == "#PBS "])
def test_pbs_starts_no_job_anew_and_leaves_threads_to_the_tasks(name, tmp_path):
    assert "-r n" in directives(name)
    script = shipped(name, site=tmp_path, launch=Raw("env"))
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash"], input=script, env=env, capture_output=True, text=True)
    assert done.returncode == 0
    assert "PATH=" in done.stdout
    assert "OMP_NUM_THREADS" not in done.stdout


@every
def test_no_secret_and_no_more_than_what_is_needed_is_in_a_script(name):
    text = TEMPLATES[name].read_text("utf-8").lower()
    assert not re.search("password|secret|token|dsn|postgres", text)
    assert len(text) < 2000


# docs/sites.md


def tables() -> list[tuple[str, dict[str, object]]]:
    text = (ROOT / "docs" / "sites.md").read_text("utf-8")
    found = re.findall(r"^## (.*?)$.*?```toml\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    return [(title, tomllib.loads(toml)) for title, toml in found]


@pytest.mark.parametrize(("title", "raw"), tables(), ids=[title for title, _ in tables()])
def test_the_tables_of_known_sites_are_settings(title, raw):
    settings = config.parse(raw, source=title)
    assert settings.queue
    for name, queue in settings.queue.items():
        assert queue.project == "PROJECT", name
        assert (queue.template or "").removesuffix(".sh") in TEMPLATES, name
        assert queue.max_queued >= 1


def test_every_template_of_a_machine_is_in_the_docs():
    used = {queue["template"] for _, raw in tables() for queue in raw["queue"].values()}
    machines = set(TEMPLATES) - {"slurm", "pbs", "cobalt", "lsf", "sge", "flux", "local"}
    assert used == {f"{name}.sh" for name in machines}


def test_steps_of_one_queue_do_not_overlap():
    for title, raw in tables():
        steps: dict[str, list[tuple[int, int]]] = {}
        for name, queue in raw["queue"].items():
            if "-" in name and "queue" in queue and queue.get("enabled", True):
                key = f"{queue['queue']} {queue['template']}"
                steps.setdefault(key, []).append((queue.get("min_nodes", 1), queue["max_nodes"]))
        for key, ranges in steps.items():
            pairs = itertools.pairwise(sorted(ranges))
            assert all(a[1] < b[0] for a, b in pairs), (title, key)
