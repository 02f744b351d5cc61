"""infra/: the manifest is YAML that says what it must, and agrees with the image and with the package."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import load

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "infra/Dockerfile").read_text()


@pytest.fixture(scope="module")
def documents() -> dict[str, dict[str, Any]]:
    return {d["kind"]: d for d in yaml.safe_load_all((ROOT / "infra/kuberay/rayjob.yaml").read_text())}


@pytest.fixture(scope="module")
def job(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    assert documents["RayJob"]["apiVersion"] == "ray.io/v1"
    return documents["RayJob"]["spec"]


@pytest.fixture(scope="module")
def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["rayClusterSpec"]
    return [g["template"]["spec"] for g in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_the_cluster_asks_for_a_token_and_the_manifest_holds_none(job: dict[str, Any]) -> None:
    assert job["rayClusterSpec"]["authOptions"]["mode"] == "token"
    major, minor = map(int, job["rayClusterSpec"]["rayVersion"].split(".")[:2])
    assert (major, minor) >= (2, 52)  # older ones know no token
    assert "auth_token:" not in (ROOT / "infra/kuberay/rayjob.yaml").read_text()


def test_manifest_and_image_name_the_same_ray_and_the_package_allows_it(job: dict[str, Any]) -> None:
    version = re.search(r"^ARG RAY_VERSION=(\S+)$", DOCKERFILE, re.M).group(1)  # type: ignore[union-attr]  # fails if absent
    assert job["rayClusterSpec"]["rayVersion"] == version
    lowest = re.search(r'"ray>=([\d.]+)', (ROOT / "pyproject.toml").read_text()).group(1)  # type: ignore[union-attr]  # as above
    assert [int(x) for x in version.split(".")] >= [int(x) for x in lowest.split(".")]


def test_a_failed_job_is_tried_again_and_the_cluster_goes_when_it_is_done(job: dict[str, Any]) -> None:
    assert job["shutdownAfterJobFinishes"] is True
    assert job["backoffLimit"] >= 1


def test_every_pod_is_unprivileged_and_bounded(pods: list[dict[str, Any]]) -> None:
    assert len(pods) == 2
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["limits"] == container["resources"]["requests"]
        mounted = {m["name"] for m in container["volumeMounts"]}
        assert mounted == {v["name"] for v in pod["volumes"]}
    assert len({p["containers"][0]["image"] for p in pods}) == 1


def test_the_head_does_no_work(job: dict[str, Any]) -> None:
    assert job["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_entrypoint_finds_script_and_configuration(
    job: dict[str, Any], pods: list[dict[str, Any]], documents: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    _, script, config = job["entrypoint"].split()
    assert script.startswith("/opt/tamis/jobs/")
    assert "COPY jobs /opt/tamis/jobs" in DOCKERFILE
    assert (ROOT / "jobs" / Path(script).name).is_file()
    mount = next(m for m in pods[0]["containers"][0]["volumeMounts"] if m["name"] == "config")
    assert mount["mountPath"] == str(Path(config).parent)
    volume = next(v for v in pods[0]["volumes"] if v["name"] == "config")
    assert volume["configMap"]["name"] == documents["ConfigMap"]["metadata"]["name"]
    (tmp_path / "curate.yaml").write_text(documents["ConfigMap"]["data"][Path(config).name])
    checked = load(str(tmp_path / "curate.yaml"))
    assert [p for p in [*checked.corpus.paths, checked.run] if not p.startswith("s3://")] == []


def test_the_image_runs_as_a_user_and_holds_what_kuberay_calls() -> None:
    stages = DOCKERFILE.split("\nFROM ")
    assert len(stages) == 3
    assert all(s.startswith("python:${PYTHON}-slim") for s in stages[1:])
    assert "USER 1000:1000" in stages[2]
    assert "wget" in stages[2]  # probes
    assert '"ray[default]==${RAY_VERSION}"' in stages[1]  # job submission


def test_everything_the_image_copies_is_there_and_not_ignored() -> None:
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if re.match(r"COPY (?!--from)", line)]
    allowed = {p[1:] for p in (ROOT / "infra/Dockerfile.dockerignore").read_text().split() if p.startswith("!")}
    for name in (n for names in copied for n in names):
        assert (ROOT / name).exists(), name
        assert name in allowed
