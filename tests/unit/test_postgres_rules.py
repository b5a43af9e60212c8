from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from ensemble.drivers.pg import addresses as pgaddresses, files as pgfiles, owner as pgowner
from ensemble.drivers.pg.owner import Here, Owner
from ensemble.errors import ClusterError

MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /home rw,relatime shared:2 - nfs4 server:/home rw,vers=4.2
31 30 0:41 / /home/ada/local rw,relatime - xfs /dev/sdb rw
32 22 0:42 / /scratch rw - lustre 10.0.0.1@o2ib:/fs rw,flock
33 22 0:43 / /mnt/my\040files rw - fuse.sshfs ada@host: rw
34 22 0:44 / /stacked rw - nfs server:/x rw
35 34 0:45 / /stacked rw master:1 - tmpfs tmpfs rw
36 22 0:46 / /gpfs/fs1 rw - gpfs fs1 rw
""".strip()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/srv/site", None),
        ("/home/ada/site", "nfs4"),
        ("/home/ada/local/site", None),
        ("/homestead/site", None),
        ("/scratch", "lustre"),
        ("/mnt/my files/site", "fuse.sshfs"),
        ("/stacked/site", None),
        ("/gpfs/fs1/a/b/c", "gpfs"),
    ],
)
def test_the_innermost_mount_decides_what_a_path_is_on(path, kind):
    assert pgowner.network_filesystem(Path(path), MOUNTS) == kind


HERE = Here(host="login1", machine_id="m1", boot_id="b1", pid_namespace="pid:[1]")
OWNER = Owner(**msgspec.structs.asdict(HERE), port=5432, pid=7)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({}, "here"),
        ({"pid": None}, "nobody"),
        ({"boot_id": "b0"}, "nobody"),
        ({"pid_namespace": "pid:[2]"}, "elsewhere"),
        ({"host": "login2", "machine_id": "m2", "boot_id": "b2"}, "elsewhere"),
        ({"machine_id": "m2", "boot_id": "b2"}, "elsewhere"),
        ({"machine_id": "", "boot_id": "b2"}, "elsewhere"),
        ({"host": "login2", "machine_id": "m2", "boot_id": "b2", "pid": None}, "nobody"),
    ],
)
def test_only_a_reboot_or_an_orderly_stop_frees_a_data_directory(change, where):
    owner = msgspec.structs.replace(OWNER, **change)
    assert pgowner.whereabouts(owner, HERE) == where


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({}, True),
        ({"boot_id": "b0"}, True),
        ({"host": "login2"}, False),
        ({"machine_id": "m2"}, False),
        ({"machine_id": ""}, False),
    ],
)
def test_a_host_is_told_by_its_name_and_its_machine_id(change, is_same):
    assert pgowner.is_same_host(msgspec.structs.replace(OWNER, **change), HERE) == is_same


@pytest.mark.parametrize(
    ("change", "is_same"),
    [({}, True), ({"boot_id": "b0"}, False), ({"host": "login2"}, False), ({"boot_id": ""}, False)],
)
def test_where_there_is_no_machine_id_one_boot_is_one_host(change, is_same):
    here = msgspec.structs.replace(HERE, machine_id="")
    owner = msgspec.structs.replace(OWNER, machine_id="", **change)
    assert pgowner.is_same_host(owner, here) == is_same
    if change.get("boot_id") is not None:
        assert pgowner.whereabouts(owner, here) == "elsewhere"


def test_a_live_process_that_got_a_dead_servers_pid_is_not_the_server(tmp_path):
    (tmp_path / "postmaster.pid").write_text(f"{os.getpid()}\n{tmp_path}\n")
    assert pgowner.postmaster_pid(tmp_path) is None


def test_access_is_encrypted_and_for_our_roles_only():
    rules = pgfiles.access_rules(networks=["10.1.0.0/16"], has_tls=True).splitlines()[1:]
    roles = "ensemble_owner,ensemble_user,ensemble_task"
    assert rules == [
        f"hostssl ensemble {roles} 127.0.0.1/32 scram-sha-256",
        f"hostssl ensemble {roles} 10.1.0.0/16 scram-sha-256",
    ]


def test_no_password_is_in_the_statements_that_make_the_roles():
    passwords = {role: f"secret-of-{role}" for role in pgfiles.Role}
    text = pgfiles.setup_statements(passwords)
    assert "secret-of" not in text
    assert text.count("PASSWORD 'SCRAM-SHA-256$4096:") == 3


def test_interfaces_become_addresses():
    assert pgaddresses.resolve_addresses(["lo", "127.0.0.1", "::1"]) == ["127.0.0.1", "::1"]


@pytest.mark.parametrize("listen", ["0.0.0.0", "::", "nosuch0"])
def test_an_address_to_listen_on_must_be_one(listen):
    with pytest.raises(ClusterError, match=r"store\.listen"):
        pgaddresses.resolve_addresses([listen])


def test_a_network_must_be_one():
    assert pgaddresses.check_networks(["10.1.2.3/16"]) == ["10.1.0.0/16"]
    with pytest.raises(ClusterError, match=r"store\.allow"):
        pgaddresses.check_networks(["everybody"])


def test_an_address_of_another_host_is_not_a_taken_port():
    with pytest.raises(ClusterError, match="addresses of this host"):
        pgaddresses.free_port(["127.0.0.1", "192.0.2.1"])


def test_a_private_file_is_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        pgfiles.write_private(tmp_path / "secret", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["secret"]
