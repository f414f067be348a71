"""Image, compose file and Slurm script: what they copy, run and name exists, nothing runs as root, no secret is in them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.house.source import ROOT

IMAGE = ROOT / "configs" / "cluster" / "image"
SLURM = ROOT / "configs" / "cluster" / "slurm" / "cellplane.sbatch"
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line and not line.startswith("#"))
OF_THE_SYSTEM = {"groupadd", "useradd", "apt-get", "rm"}  # Debian's, in the image


def instructions() -> list[tuple[str, str, str]]:
    """(stage, instruction, the rest) of the Dockerfile, continued lines joined."""
    lines = [line for line in (IMAGE / "Dockerfile").read_text().splitlines() if line.strip() and not line.startswith("#")]
    found, stage = [], ""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        word, _, rest = line.partition(" ")
        stage = rest.rpartition(" AS ")[2] if word == "FROM" else stage
        found.append((stage, word, rest))
    return found


def steps(stage: str) -> list[str]:
    """Commands of a stage's RUN instructions."""
    return [part.strip() for place, word, rest in instructions() if (place, word) == (stage, "RUN") for part in rest.split("&&")]


STAGES = [stage for stage, word, _ in instructions() if word == "FROM"]


def test_the_stages_are_those_the_manifests_take() -> None:
    assert STAGES == ["base", "packages", "cpu", "cuda", "mlflow"]


@pytest.mark.parametrize("rest", [rest for _, word, rest in instructions() if word == "COPY"])
def test_what_is_copied_exists_and_is_not_kept_out_of_the_build(rest: str) -> None:
    *sources, _ = rest.split()
    let_in = (IMAGE / "Dockerfile.dockerignore").read_text().splitlines()
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source.split('/')[0]}" in let_in, source


@pytest.mark.parametrize("command", [command for stage in STAGES for command in steps(stage)])
def test_a_step_runs_a_command_that_exists(command: str) -> None:
    words = shlex.split(command.replace('${TORCH_INDEX:+--index-url "$TORCH_INDEX"}', ""))
    bin_folder = Path(sys.executable).parent
    assert words[0] in OF_THE_SYSTEM or (bin_folder / words[0]).exists() or shutil.which(words[0])
    if words[:3] == ["python", "-m", "pip"]:
        known = subprocess.run([sys.executable, "-m", "pip", words[3], "--help"], capture_output=True, text=True, check=True).stdout
        options = [word for word in words if word.startswith("--")]
        assert not [option for option in options if option.split("=")[0] not in known]


def test_the_step_that_reads_what_is_wanted_gives_the_packages_of_the_project() -> None:
    (reads,) = [command for command in steps("packages") if "tomllib" in command]
    words = shlex.split(reads.partition(" > ")[0])
    said = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert said.splitlines() == project["dependencies"]


def test_every_package_of_the_image_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[\[<>=; ]", requirement)[0] for requirement in project["dependencies"]]
    pinned = {name.lower().replace("_", "-") for name in LOCK}
    assert not [name for name in (*names, "setuptools", "wheel") if name.lower().replace("_", "-") not in pinned]
    extra = [line for line in (IMAGE / "mlflow.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9.]*", line) for line in extra)


def test_images_name_no_index_and_end_without_rights() -> None:
    text = (IMAGE / "Dockerfile").read_text()
    assert not re.findall(r"https?://", text)
    for stage in ("cpu", "cuda", "mlflow"):
        users = [rest for place, word, rest in instructions() if (place, word) == (stage, "USER")]
        assert users[-1] == "1000:1000"
        assert not [rest for place, word, rest in instructions() if place == stage and word == "COPY" and "secret" in rest]


COMPOSE: dict[str, Any] = yaml.safe_load((IMAGE / "compose.yaml").read_text())
each_service = pytest.mark.parametrize("name", COMPOSE["services"])


@each_service
def test_a_service_names_only_what_is_declared(name: str) -> None:
    service = COMPOSE["services"][name]
    secrets = [secret if isinstance(secret, str) else secret["source"] for secret in service.get("secrets", [])]
    assert set(secrets) <= set(COMPOSE["secrets"])
    assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= set(COMPOSE["volumes"])
    assert set(service["networks"]) <= set(COMPOSE["networks"])
    for other, condition in service.get("depends_on", {}).items():
        assert condition["condition"] == "service_healthy"
        assert "healthcheck" in COMPOSE["services"][other]
    if build := service.get("build"):
        assert build["target"] in STAGES
        assert (IMAGE / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()


@each_service
def test_a_service_is_reached_from_this_machine_only_and_has_no_rights(name: str) -> None:
    service = COMPOSE["services"][name]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    if service["image"].startswith("cellplane"):
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_secrets_of_compose_are_files_that_git_never_sees() -> None:
    for name, secret in COMPOSE["secrets"].items():
        assert secret["file"].startswith("./secrets/"), name
    ignored = subprocess.run(["git", "check-ignore", "configs/cluster/image/secrets/ray_token"], cwd=ROOT, capture_output=True, text=True)
    if ignored.returncode == 128:
        pytest.skip("this is no git checkout")
    assert ignored.returncode == 0


# Slurm: the script itself runs, on one machine, with Slurm's commands and Ray's replaced by ones that write down what they were asked

BOTH_CAME = 'cat > /dev/null\nuntil [ "$(grep -c "^ray start" "$SEEN")" -ge 2 ]; do sleep 0.05; done'

STUBS = {
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"',
    "scontrol": "printf 'node1\\nnode2\\n'",
    "ray": '[ "$1" != start ] || trap "echo ended >> $SEEN; exit 0" TERM\n'
    'echo "ray $* mode=$RAY_AUTH_MODE token=$RAY_AUTH_TOKEN_PATH" >> "$SEEN"\n'
    '[ "$1" != start ] || while :; do sleep 0.05; done',
    "python": BOTH_CAME,
    # one line: every one of them writes into the same file, at the same time
    "cellplane": 'echo "cellplane $* at $RAY_ADDRESS token $(stat -c "%a %s" "$RAY_AUTH_TOKEN_PATH")" >> "$SEEN"\neval "$VERB"',
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes."""
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "RAY", "CELLPLANE"))},
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SEEN": str(tmp_path / "seen"),
        "CELLPLANE_HOME": str(tmp_path / "home"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "VERB": "exit 0",
    }


def test_the_slurm_script_is_one_that_bash_reads() -> None:
    subprocess.run(["bash", "-n", str(SLURM)], check=True)


def test_a_slurm_job_starts_ray_with_a_token_of_its_own_and_takes_both_down(slurm: dict[str, str]) -> None:
    done = subprocess.run(["bash", str(SLURM), "pretrain", "-o", "run=mine"], env=slurm, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    seen = Path(slurm["SEEN"]).read_text().splitlines()
    starts = [line for line in seen if line.startswith("ray start")]
    assert len(starts) == 2
    starts.sort(key=lambda line: "--head" not in line)  # written down by two processes
    assert "--head" in starts[0]
    assert f"--port={20000 + 4711 % 4000 * 8}" in starts[0]
    address = re.search(r"--address=(\S+)", starts[1])
    assert address is not None
    assert f"cellplane pretrain -o run=mine at {address[1]} token 600 64" in seen
    token = f"{slurm['CELLPLANE_HOME']}/slurm/4711.token"
    assert all(f"mode=token token={token}" in line for line in starts)
    assert not Path(token).exists()
    assert seen.count("ended") == 2, "what the job started is still there"


def test_a_slurm_job_ends_with_the_code_of_its_verb(slurm: dict[str, str]) -> None:
    slurm["VERB"] = "exit 3"
    assert subprocess.run(["bash", str(SLURM), "finetune"], env=slurm, capture_output=True, timeout=60).returncode == 3


def test_a_head_that_ends_while_it_starts_ends_the_job_as_unreachable(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "ray").write_text('#!/bin/bash\necho "ray $*" >> "$SEEN"\nexit 1\n')
    done = subprocess.run(["bash", str(SLURM), "pretrain"], env=slurm, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert "Ray's head ended while it started" in done.stderr
    assert not list((Path(slurm["CELLPLANE_HOME"]) / "slurm").iterdir())
    assert "cellplane" not in Path(slurm["SEEN"]).read_text()


def test_nodes_that_do_not_come_end_the_job_as_unreachable(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "python").write_text(f"#!/bin/bash\n{BOTH_CAME}\nexit 1\n")
    done = subprocess.run(["bash", str(SLURM), "pretrain"], env=slurm, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert "not all nodes came" in done.stderr
    assert Path(slurm["SEEN"]).read_text().count("ended") == 2


def test_a_warning_before_the_verb_runs_ends_the_job_at_once(slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "python").write_text('#!/bin/bash\necho waits >> "$SEEN"\nwhile :; do sleep 0.05; done\n')
    with subprocess.Popen(["bash", str(SLURM), "pretrain"], env=slurm, stderr=subprocess.DEVNULL) as job:
        until = time.monotonic() + 30
        while not (Path(slurm["SEEN"]).exists() and "waits" in Path(slurm["SEEN"]).read_text().split()):
            assert time.monotonic() < until
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=30) == 143
    assert not list((Path(slurm["CELLPLANE_HOME"]) / "slurm").iterdir())


def test_a_slurm_job_without_a_verb_says_so(slurm: dict[str, str]) -> None:
    done = subprocess.run(["bash", str(SLURM)], env=slurm, capture_output=True, text=True, timeout=60)
    assert (done.returncode, Path(slurm["SEEN"]).exists()) == (2, False)
    assert "say what to run" in done.stderr


def test_slurms_warning_before_the_end_reaches_the_verb(slurm: dict[str, str]) -> None:
    slurm["VERB"] = 'trap "echo saved >> $SEEN; exit 130" TERM; echo ready >> $SEEN; while :; do sleep 0.05; done'
    with subprocess.Popen(["bash", str(SLURM), "pretrain"], env=slurm, stderr=subprocess.DEVNULL) as job:
        until = time.monotonic() + 30
        while not (Path(slurm["SEEN"]).exists() and "ready" in Path(slurm["SEEN"]).read_text().split()):
            assert time.monotonic() < until
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=30) == 130
    assert "saved" in Path(slurm["SEEN"]).read_text().split()
