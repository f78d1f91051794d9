"""What the logger notices of its machine: load, memory, GPUs, file systems."""

import os
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lab_logger
from lab_logger import log, start_run

ROOT = Path(lab_logger.__file__).parent
HAS_PROC = os.path.exists("/proc/self/statm")
SMI = """#!{python}
import sys
asked = [word for word in sys.argv if word.startswith("--query-gpu=")][0]
visible = sys.argv[sys.argv.index("-i") + 1] if "-i" in sys.argv else "0,1"
rows = {{"0": "0, 87, 20480, 81920, 61, 312.50", "1": "1, 3, 0, 81920, 30, [N/A]"}}
heads = {{"0": "H100, 81920, 550.54", "1": "H100, 81920, 550.54"}}
for gpu in visible.split(","):
    print((heads if "driver" in asked else rows)[gpu])
"""


@pytest.fixture()
def nvidia_smi(tmp_path, monkeypatch):
    """Put a program that answers as nvidia-smi does first on the path."""
    if os.name == "nt":
        pytest.skip("a script is no program there")
    path = tmp_path / "bin" / "nvidia-smi"
    path.parent.mkdir()
    path.write_text(SMI.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return path


def measured():
    """Give what is measured over a while of work, and the share of a core that it really had."""
    last = {}
    lab_logger.system_metrics(last)
    used_s, began = time.process_time(), time.monotonic()
    while time.monotonic() < began + 0.2:
        sum(range(1000))
    used_s, took_s = time.process_time() - used_s, time.monotonic() - began
    return lab_logger.system_metrics(last), 100 * used_s / took_s


@pytest.mark.skipif(not HAS_PROC, reason="no /proc")
def test_machine_and_process_are_measured_in_their_units():
    found, busy = measured()
    assert abs(found["system/process_cpu_percent"] - busy) < 40
    assert 0 < found["system/cpu_percent"] <= 100
    assert 0 < found["system/memory_percent"] <= 100
    assert 0.005 < found["system/process_memory_gib"] < found["system/memory_gib"]
    assert 0 <= found["system/disk_percent"] <= 100 and found["system/disk_free_gib"] > 0


def test_gpus_are_measured_and_one_that_has_no_power_reading_has_fewer(nvidia_smi):
    found = {name: value for name, value in measured()[0].items() if "gpu" in name}
    assert found == {
        "system/gpu.0.utilization_percent": 87.0, "system/gpu.0.temperature_c": 61.0,
        "system/gpu.0.power_w": 312.5, "system/gpu.0.memory_gib": 20.0,
        "system/gpu.0.memory_percent": 25.0,
        "system/gpu.1.utilization_percent": 3.0, "system/gpu.1.temperature_c": 30.0,
        "system/gpu.1.memory_gib": 0.0, "system/gpu.1.memory_percent": 0.0}


@pytest.mark.parametrize(("visible", "gpus"), [("1", {"1"}), ("0,1", {"0", "1"}), ("", set()),
                                               ("-1", set())])
def test_only_gpus_that_the_process_may_see_are_measured(nvidia_smi, monkeypatch, visible, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert {name.split(".")[1] for name in measured()[0] if "gpu" in name} == gpus


def test_machine_without_gpus_is_asked_three_times_and_no_more(nvidia_smi):
    nvidia_smi.write_text(f"#!{sys.executable}\nimport sys\n"
                          f"open({str(nvidia_smi) + '.asked'!r}, 'a').write('x')\nsys.exit(9)\n")
    last = {}
    for _ in range(5):
        assert not any("gpu" in name for name in lab_logger.system_metrics(last))
    assert Path(str(nvidia_smi) + ".asked").read_text() == "xxx"   # one slow answer is forgiven


def test_memory_is_that_of_the_tightest_control_group(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 12582912 kB\n",
        "/proc/self/cgroup": "0::/slurm/job_7/task\n",
        "/sys/fs/cgroup//slurm/job_7/task/memory.max": "max\n",
        "/sys/fs/cgroup//slurm/job_7/task/memory.current": "999\n",
        "/sys/fs/cgroup//slurm/job_7/memory.max": str(4 << 30),
        "/sys/fs/cgroup//slurm/job_7/memory.current": str(4 << 30),
        "/sys/fs/cgroup//slurm/job_7/memory.stat": f"anon 1\ninactive_file {1 << 30}\n",
    }

    def read(path):
        if path not in files:
            raise FileNotFoundError(path)
        return files[path]

    monkeypatch.setattr(lab_logger, "_read", read)
    found = lab_logger.system_metrics({"has_gpu": False})
    assert (found["system/memory_gib"], found["system/memory_percent"]) == (3.0, 75.0)


def run_child(body, db_path, **more):
    return subprocess.run(
        [sys.executable, "-c", "import lab_logger, time, os\n" + body], capture_output=True,
        text=True, timeout=30, cwd=os.path.dirname(db_path),
        env={**os.environ, "PYTHONPATH": str(ROOT), "DB_PATH": db_path, **more})


def names_in(db_path):
    with sqlite3.connect(db_path) as conn:
        found = [row[0] for row in conn.execute("SELECT metric_name FROM run_metrics")]
    conn.close()
    return found


def test_live_runs_are_sampled_as_points_without_epoch(db_path):
    body = "with lab_logger.start_run() as run:\n time.sleep(2)"
    done = run_child(body, db_path, AILAB_SAMPLE_EVERY_S="0.2")
    assert (done.returncode, done.stderr) == (0, "")
    names = names_in(db_path)
    assert names.count("system/disk_percent") >= 2
    assert all(name.startswith("system/") for name in names)


def test_sampler_is_off_with_one_setting(db_path):
    body = "lab_logger.SAMPLE_EVERY_S = 0.1\nwith lab_logger.start_run():\n time.sleep(0.5)"
    assert run_child(body, db_path, AILAB_SAMPLE_EVERY_S="0").stderr == ""
    assert names_in(db_path) == []


def test_setting_that_is_no_number_is_told_and_the_default_holds(db_path):
    done = run_child("with lab_logger.start_run():\n time.sleep(0.3)", db_path,
                     AILAB_SAMPLE_EVERY_S="often")
    assert done.stderr.count("lab_logger:") == 1
    assert "AILAB_SAMPLE_EVERY_S is 'often' in the environment; give seconds" in done.stderr


def test_gpu_that_hangs_delays_neither_training_nor_exit(nvidia_smi, db_path):
    nvidia_smi.write_text(f"#!{sys.executable}\nimport sys, time\n"
                          "time.sleep(0 if 'driver' in ' '.join(sys.argv) else 60)\n")
    body = (
        "with lab_logger.start_run():\n lab_logger.log(a=1.0); time.sleep(0.5)\n"
        "import atexit; began = time.monotonic()\n"
        "atexit._run_exitfuncs(); print(time.monotonic() - began < 30)")
    began = time.monotonic()
    done = run_child(body, db_path, AILAB_SAMPLE_EVERY_S="0.1")
    assert (done.stdout, done.stderr) == ("True\n", "")
    assert time.monotonic() - began < 50  # the program alone sleeps for 60


# --- File systems ------------------------------------------------------------------

MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/export /home nfs4 rw 0 0
/dev/sdb1 /home/local ext4 rw 0 0
//box/share /mnt/my\\040share cifs rw 0 0
me@host:/x /mnt/ssh fuse.sshfs rw 0 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells it so")
@pytest.mark.parametrize(
    ("path", "kind"),
    [("/home/me/lab.db", "nfs4"), ("/home/local/lab.db", None), ("/homes/lab.db", None),
     ("/mnt/my share/lab.db", "cifs"), ("/mnt/ssh/lab.db", "fuse.sshfs"), ("/data/lab.db", None)],
)
def test_network_file_system_is_told_from_a_local_one(tmp_path, path, kind):
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)
    assert lab_logger.network_filesystem(path, str(mounts)) == kind


def test_file_system_that_cannot_be_asked_is_taken_for_a_local_one(tmp_path):
    assert lab_logger.network_filesystem("/x", str(tmp_path / "none")) is None


def test_lab_on_a_network_file_system_uses_a_rollback_journal_and_says_so_once(
    db_path, monkeypatch, capfd
):
    lab_logger._warned.clear()
    lab_logger.connect(db_path).close()  # made on a local disk, and moved there with its WAL
    with sqlite3.connect(db_path) as conn:
        assert conn.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    conn.close()
    monkeypatch.setattr(lab_logger, "network_filesystem", lambda path: "nfs4")
    for _ in range(2):
        with start_run() as run:
            log(loss=0.5)
        assert run.is_over
    with sqlite3.connect(db_path) as conn:
        assert conn.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert conn.execute("SELECT count(*) FROM run_metrics").fetchone() == (2,)
    conn.close()
    told = capfd.readouterr().err
    assert told.count("lab_logger:") == 1
    assert "lies on a network file system (nfs4): it uses a rollback journal" in told
