from __future__ import annotations

import dataclasses
import os
import ssl
import stat

import pytest

from ensemble.core.model import Node
from ensemble.drivers import linkfile, pilotline, world
from ensemble.drivers.mpi import Flavor, MpiLauncher
from ensemble.errors import LaunchError

REAL = [Node(name="nid00011", cores=8), Node(name="nid00012", cores=8)]
VIRTUAL = [Node(name=f"pc:{number}", cores=1, is_virtual=True) for number in range(2)]
MANY = [Node(name=f"n{number}", cores=8) for number in range(41)]


def launcher(flavor: str, *flags: str) -> MpiLauncher:
    return MpiLauncher(flavor=Flavor(flavor), command=("/opt/mpi/bin/RUN",), flags=flags)


def line(flavor: str, nodes=REAL, **options) -> str:
    argv = pilotline.pilot_launch_argv(launcher(flavor), nodes, ["pilot", "a b"], **options)
    assert argv[0] == "/opt/mpi/bin/RUN"
    assert argv[-2:] == ["pilot", "a b"]
    return " ".join(argv[1:-2])


# Command lines

RECOVERY4 = "--enable-recovery --mca orte_abort_on_non_zero_status 0"
RECOVERY5 = "--runtime-options recoverable,error-nonzero-status=0"
SRUN = "-n 2 --cpu-bind=none --mem=0 --overlap -K0 --no-kill -W0 --input=none --export=ALL -J ens-pilots"


@pytest.mark.parametrize(
    ("flavor", "expected"),
    [
        (
            "openmpi4",
            f"{RECOVERY4} --oversubscribe --bind-to none -x V --host nid00011:1,nid00012:1 "
            "--map-by ppr:1:node -np 2",
        ),
        (
            "openmpi5",
            f"{RECOVERY5} --map-by ppr:1:node:OVERSUBSCRIBE --bind-to none -x V "
            "--host nid00011:1,nid00012:1 -np 2",
        ),
        ("mpich", "-hosts nid00011,nid00012 -ppn 1 -n 2"),
        ("intel", "-genv I_MPI_PIN off -hosts nid00011,nid00012 -ppn 1 -n 2"),
        ("srun", f"{SRUN} -N 2 --ntasks-per-node=1 -w nid00011,nid00012"),
        ("pals", "-n 2 --cpu-bind none --ppn 1 --hosts nid00011,nid00012"),
        ("aprun", "-n 2 -cc none -N 1 -L 11,12"),
        ("jsrun", "-n 2 -r 1 -a 1 -c ALL_CPUS -g ALL_GPUS -b none"),
        (
            "flux",
            "-n 2 -o cpu-affinity=off -o gpu-affinity=off -o exit-timeout=none "
            "-N 2 --exclusive --requires=hosts:nid00011,nid00012",
        ),
    ],
)
def test_real_nodes(flavor, expected):
    assert line(flavor, exports=["V"]) == expected


@pytest.mark.parametrize(
    ("flavor", "expected"),
    [
        ("openmpi4", f"{RECOVERY4} --oversubscribe --bind-to none -np 2"),
        ("openmpi5", f"{RECOVERY5} --map-by slot:OVERSUBSCRIBE --bind-to none -np 2"),
        ("mpich", "-launcher fork -rmk user -n 2"),
        ("intel", "-genv I_MPI_PIN off -launcher fork -n 2"),
        ("srun", SRUN),
        ("pals", "-n 2 --cpu-bind none"),
        ("aprun", "-n 2 -cc none"),
        ("flux", "-n 2 -o cpu-affinity=off -o gpu-affinity=off -o exit-timeout=none"),
    ],
)
def test_virtual_nodes(flavor, expected):
    assert line(flavor, VIRTUAL) == expected


@pytest.mark.parametrize(
    ("flavor", "expected", "first"),
    [
        ("openmpi4", "--hostfile /d/hosts", "n0 slots=1"),
        ("openmpi5", "--hostfile /d/hosts", "n0 slots=1"),
        ("mpich", "-f /d/hosts", "n0:1"),
        ("intel", "-f /d/hosts", "n0:1"),
        ("srun", "-w /d/hosts", "n0"),
        ("pals", "--hostfile /d/hosts", "n0"),
    ],
)
def test_many_hosts_are_read_from_a_file(flavor, expected, first, tmp_path):
    assert pilotline.needs_hostfile(launcher(flavor), MANY)
    assert not pilotline.needs_hostfile(launcher(flavor), MANY[:40])
    lines = pilotline.hostfile_text(launcher(flavor), MANY).splitlines()
    assert (lines[0], len(lines)) == (first, 41)
    words = line(flavor, MANY, hostfile="/d/hosts")
    assert expected in words
    assert "n40" not in words


@pytest.mark.parametrize("flavor", ["aprun", "jsrun", "flux"])
def test_other_launchers_take_no_host_file(flavor):
    assert not pilotline.needs_hostfile(launcher(flavor), MANY)


def test_the_sites_flags_come_before_the_program():
    argv = pilotline.pilot_launch_argv(launcher("mpich", "-iface", "hsn0"), VIRTUAL, ["pilot"])
    assert argv[-3:] == ["-iface", "hsn0", "pilot"]


def test_a_colon_would_start_another_program():
    with pytest.raises(LaunchError, match="':'"):
        pilotline.pilot_launch_argv(launcher("mpich"), VIRTUAL, ["pilot", ":"])


# The environment


@pytest.mark.parametrize(
    ("flavor", "library"),
    [
        (
            "openmpi4",
            "/opt/mpi/lib/libmpi.so.40:/opt/mpi/lib64/libmpi.so.40:libmpi.so.40",
        ),
        ("mpich", "/opt/mpi/lib/libmpi.so.12:/opt/mpi/lib64/libmpi.so.12:libmpi.so.12"),
        ("srun", None),
        ("flux", None),
    ],
)
def test_mpi4py_is_told_the_library_of_the_launcher(flavor, library):
    found = pilotline.pilot_environ(launcher(flavor), {"PATH": "/bin", "PMI_RANK": "1"})
    assert found.get("MPI4PY_LIBMPI") == library
    assert found["PATH"] == "/bin"
    assert "PMI_RANK" not in found


@pytest.mark.parametrize("name", ["MPI4PY_LIBMPI", "MPI4PY_MPIABI"])
def test_what_the_user_tells_mpi4py_stays(name):
    found = pilotline.pilot_environ(launcher("openmpi5"), {name: "mine"})
    assert {key: value for key, value in found.items() if "MPI4PY" in key} == {name: "mine"}


def test_what_remote_ranks_need_is_exported_by_name():
    environ = dict.fromkeys(
        ["HOME", "MPI4PY_LIBMPI", "PYTHONPATH", "LD_LIBRARY_PATH", "OMPI_MCA_btl"], ""
    )
    assert pilotline.exported(environ) == [
        "LD_LIBRARY_PATH", "MPI4PY_LIBMPI", "OMPI_MCA_btl", "PYTHONPATH",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (
            {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            (3, 4, 1),
        ),
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, (0, 2, 0)),
        ({"PALS_RANKID": "5", "PMI_RANK": "5", "PMI_SIZE": "8", "PALS_LOCAL_RANKID": "2"}, (5, 8, 2)),
        ({"PMIX_RANK": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}, (1, 2, 1)),
        ({"PMIX_RANK": "1"}, (1, None, 0)),
        ({"ALPS_APP_PE": "7"}, (7, None, 0)),
        ({"FLUX_TASK_RANK": "2", "FLUX_JOB_SIZE": "3", "FLUX_TASK_LOCAL_ID": "0"}, (2, 3, 0)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (2, 4, 0)),
        # A step within a job that asked for more tasks.
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "64", "SLURM_STEP_NUM_TASKS": "4"}, (2, 4, 0)),
        # Open MPI inside of a Slurm job: the batch script's numbers are everybody's.
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "9"},
            (1, 2, 0),
        ),
        ({"SLURM_JOB_ID": "1", "PMI_RANK": "", "HOME": "/"}, None),
        ({"PMI_RANK": "-1", "PMI_SIZE": "x"}, None),
    ],
)  # fmt: skip
def test_the_rank_by_the_environment(environ, expected):
    assert world.rank_from_environ(environ) == expected


# The link file


@pytest.fixture(scope="module")
def link():
    return linkfile.make(["10.0.0.1", "login1"], 4711, 3, launcher_id=12)


def test_a_link_file_is_read_as_it_was_written(link, tmp_path):
    path = tmp_path / "link.json"
    path.write_text("older")
    old = os.umask(0o777)
    try:
        link.write(path)
    finally:
        os.umask(old)
    assert linkfile.read(path) == linkfile.parse(path.read_bytes()) == link
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["link.json"]


def test_the_key_is_not_shown(link):
    assert "PRIVATE" in link.key
    assert "PRIVATE" not in repr(link)


def test_a_link_file_that_cannot_be_written_leaves_nothing(link, tmp_path):
    (tmp_path / "link.json").mkdir()
    with pytest.raises(LaunchError, match=r"cannot write .*/link.json: Is a directory"):
        link.write(tmp_path / "link.json")
    assert [each.name for each in tmp_path.iterdir()] == ["link.json"]


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"protocol": 1}', b'{"port": 3}', b"\xff\xfe"]
)
def test_what_is_no_link_file_is_one_line(data):
    with pytest.raises(LaunchError, match=r"^x is no link file: [^\n]+$"):
        linkfile.parse(data, "x")


def test_another_version_is_told(link):
    other = dataclasses.replace(link, protocol=99)
    with pytest.raises(LaunchError, match=r"speaks version 99 .* one installation"):
        linkfile.parse(other.to_bytes())


def test_both_ends_hold_the_key(link):
    version, server_saw, client_saw = shake_hands(link.server_context(), link.client_context())
    assert version == "TLSv1.3"
    pinned = ssl.PEM_cert_to_DER_cert(link.certificate)
    assert server_saw == client_saw == pinned


def test_a_stranger_is_refused_by_either_end(link):
    other = linkfile.make(["10.0.0.1"], 4711, 3, launcher_id=12)
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname = False
    nobody.verify_mode = ssl.CERT_NONE
    for server, client in [
        (link.server_context(), other.client_context()),
        (link.server_context(), nobody),
        (impostor(), link.client_context()),
        (other.server_context(), link.client_context()),
    ]:
        with pytest.raises(ssl.SSLError):
            shake_hands(server, client)


def test_an_older_tls_is_refused(link):
    client = link.client_context()
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        shake_hands(link.server_context(), client)


def test_a_spoilt_certificate_is_told(link):
    with pytest.raises(LaunchError, match="certificate in the launcher's link file"):
        dataclasses.replace(link, key="").client_context()
    with pytest.raises(LaunchError, match="certificate in the launcher's link file"):
        dataclasses.replace(link, certificate="no").server_context()


def test_this_hosts_addresses_lead_here_from_elsewhere():
    found = linkfile.addresses_of_this_host()
    assert len(set(found)) == len(found)
    assert not {"localhost", "127.0.0.1", "::1", "0.0.0.0"} & set(found)
    assert not any(each.startswith(("127.", "169.254.", "fe80")) for each in found)


def impostor() -> ssl.SSLContext:
    """A server that takes anybody, with a certificate of its own."""
    context = linkfile.make([], 1, 1, launcher_id=1).server_context()
    context.verify_mode = ssl.CERT_NONE
    return context


def shake_hands(
    server: ssl.SSLContext, client: ssl.SSLContext
) -> tuple[str | None, bytes | None, bytes | None]:
    """Let two ends meet in memory; return the version and the certificates they saw."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(ends)
    for _ in range(10):
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
    assert waiting == []
    return ends[0].version(), ends[1].getpeercert(True), ends[0].getpeercert(True)
