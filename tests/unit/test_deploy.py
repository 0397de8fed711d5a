"""What starts clusters: valid by Ray's own schema and KubeRay's documented fields, pinned, and closed to strangers."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

import fedsim
from fedsim import cli
from fedsim.config import load_config

ROOT = Path(__file__).parents[2]
LAUNCHER = [ROOT / "cluster.yaml", ROOT / "deploy" / "on_premise.yaml"]
KUBERAY = [ROOT / "deploy" / "kuberay" / name for name in ("raycluster.yaml", "rayjob.yaml")]
POLICY = ROOT / "deploy" / "kuberay" / "network_policy.yaml"
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
ALL = [*LAUNCHER, *KUBERAY, POLICY, DOCKERFILE]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")
)
PYTHON = "3.11"  # what the tests run with, see constraints.txt

# The fields of ray.io/v1 as the "KubeRay CRD API reference" of Ray's documentation lists them for KubeRay 1.6
# (https://docs.ray.io/en/master/cluster/kubernetes/references/api.html); of pods, those of Kubernetes that we use.
CLUSTER_SPEC = {
    "suspend",
    "managedBy",
    "authOptions",
    "autoscalerOptions",
    "headServiceAnnotations",
    "enableInTreeAutoscaling",
    "gcsFaultToleranceOptions",
    "headGroupSpec",
    "rayVersion",
    "workerGroupSpecs",
}
JOB_SPEC = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "rayClusterSpec",
    "submitterPodTemplate",
    "metadata",
    "clusterSelector",
    "submitterConfig",
    "managedBy",
    "deletionStrategy",
    "entrypoint",
    "runtimeEnvYAML",
    "jobId",
    "submissionMode",
    "entrypointResources",
    "entrypointNumCpus",
    "entrypointNumGpus",
    "ttlSecondsAfterFinished",
    "shutdownAfterJobFinishes",
    "suspend",
}
FIELDS: dict[str, set[str]] = {
    "rayClusterSpec": CLUSTER_SPEC,
    "authOptions": {"mode", "secretName", "enableK8sTokenAuth"},
    "autoscalerOptions": {
        "resources",
        "image",
        "imagePullPolicy",
        "securityContext",
        "idleTimeoutSeconds",
        "upscalingMode",
        "version",
        "env",
        "envFrom",
        "volumeMounts",
    },
    "headGroupSpec": {"template", "headService", "enableIngress", "rayStartParams", "serviceType"},
    "workerGroupSpecs": {
        "suspend",
        "groupName",
        "replicas",
        "minReplicas",
        "maxReplicas",
        "idleTimeoutSeconds",
        "rayStartParams",
        "template",
        "scaleStrategy",
        "numOfHosts",
    },
    "submitterConfig": {"backoffLimit"},
    "template": {"metadata", "spec"},
    "template.spec": {"serviceAccountName", "containers", "volumes", "tolerations", "nodeSelector"},
    "containers": {"name", "image", "resources", "volumeMounts", "env"},
}
ENUMS = {
    "mode": {"disabled", "token"},
    "upscalingMode": {"Default", "Aggressive", "Conservative"},
    "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
    "serviceType": {"ClusterIP", "NodePort", "LoadBalancer"},
}


def _load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    return loaded


def _undocumented(tree: Mapping[str, Any], known: set[str], place: str) -> Iterator[str]:
    """Yield the fields of a tree that the documentation does not have, and values that an enumeration lacks."""
    yield from (f"{place}.{name}" for name in tree.keys() - known)
    for name, value in tree.items():
        if name in ENUMS and value not in ENUMS[name]:
            yield f"{place}.{name}: {value}"
        below = "template.spec" if (place.endswith("template") and name == "spec") else name
        for part in value if isinstance(value, list) else [value]:
            if below in FIELDS and isinstance(part, dict):
                yield from _undocumented(part, FIELDS[below], f"{place}.{name}")


def _cluster_spec(path: Path) -> dict[str, Any]:
    spec: dict[str, Any] = _load(path)["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return found


def _commands(path: Path) -> list[str]:
    config = _load(path)
    return [command for name, value in config.items() if name.endswith("_commands") for command in value]


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_launcher_files_are_valid_by_rays_own_schema(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    validate_config(prepare_config(_load(path)))
    for wrong in ({"max_worker": 1}, {"cluster_name": 5}):
        with pytest.raises(jsonschema.ValidationError):
            validate_config(prepare_config(_load(path) | wrong))


def test_workers_of_the_cloud_come_and_go() -> None:
    config = prepare_config(_load(LAUNCHER[0]))
    worker = config["available_node_types"]["gpu_worker"]
    assert worker["min_workers"] == 0 < worker["max_workers"] <= config["max_workers"]
    assert config["idle_timeout_minutes"] > 0


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_kubernetes_files_have_documented_fields_alone(path: Path) -> None:
    resource = _load(path)
    assert resource["apiVersion"] == "ray.io/v1"
    known = {"RayCluster": CLUSTER_SPEC, "RayJob": JOB_SPEC}[resource["kind"]]
    assert list(_undocumented(resource["spec"], known, "spec")) == []
    wrong = resource["spec"] | {"authOptions": {"mode": "tokens"}, "rayversion": "2"}
    assert set(_undocumented(wrong, known, "spec")) >= {"spec.authOptions.mode: tokens", "spec.rayversion"}


def test_job_and_cluster_of_kubernetes_are_alike() -> None:
    cluster, job = map(_cluster_spec, KUBERAY)
    assert cluster == job


def test_the_job_of_kubernetes_is_a_command_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "examples")
    _, _, config, *options = _load(KUBERAY[1])["spec"]["entrypoint"].split()
    pairs = dict(zip(options[::2], options[1::2], strict=True))
    given = {name for parameter in cli.commands.commands["run"].params for name in parameter.opts}
    assert isinstance(cli.commands.commands["run"], click.Command)
    assert pairs.keys() <= given
    load_config(Path(config).name, {name.removeprefix("--"): yaml.safe_load(value) for name, value in pairs.items()})


def test_versions_are_those_of_the_constraints() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'python_version = "{PYTHON}"' in project
    text = "\n".join(path.read_text("utf-8") for path in ALL)
    images = re.findall(r"rayproject/ray:(\S+)", text)
    assert images
    assert set(images) == {f"{PINS['ray']}-py{PYTHON.replace('.', '')}-gpu"}
    assert {_cluster_spec(path)["rayVersion"] for path in KUBERAY} == {PINS["ray"]}
    ours = re.findall(r"registry\.example\.com/fedsim:(\S+)", text) + re.findall(r"fedsim-([\d.]+)-py3", text)
    assert set(ours) == {_version()}
    assert f"python{PYTHON} -m venv" in LAUNCHER[1].read_text("utf-8")


@pytest.mark.parametrize("path", [*LAUNCHER, DOCKERFILE], ids=lambda path: path.name)
def test_whatever_is_installed_is_installed_with_the_constraints(path: Path) -> None:
    """So torch is the pinned one, too: the wheel asks for it, and no file names another version."""
    lines = _commands(path) if path.suffix == ".yaml" else path.read_text("utf-8").splitlines()
    installs = [line for line in lines if "pip install" in line]
    assert any("fedsim-" in line for line in installs)
    for line in installs:
        assert re.search(r"-c \S*constraints\.txt", line), line
        for word in line.partition("install")[2].split():
            assert "==" not in word or str(Requirement(word).specifier) == f"=={PINS[Requirement(word).name]}"
    assert "torch" in PINS


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.name)
def test_launchers_start_ray_with_tokens_and_its_dashboard_on_loopback(path: Path) -> None:
    starts = [command for command in _commands(path) if "ray start" in command]
    assert len(starts) == 2
    assert all(re.search(r"RAY_AUTH_MODE=token \S*ray start ", command) for command in starts)
    (head,) = [command for command in starts if "--head" in command]
    assert "--dashboard-host=127.0.0.1" in head.split()
    assert any(remote.endswith("/.ray/auth_token") for remote in _load(path)["file_mounts"])


def test_clusters_of_kubernetes_have_tokens_and_no_address_outside() -> None:
    for path in KUBERAY:
        spec = _cluster_spec(path)
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert not spec["headGroupSpec"].get("enableIngress")
    policy = _load(POLICY)["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    assert {key for rule in policy["ingress"] for peer in rule["from"] for key in peer} <= {
        "podSelector",
        "namespaceSelector",
    }


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_no_secret_is_inside(path: Path) -> None:
    text = path.read_text("utf-8")
    assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{32,}\b", text)
    assert not re.search(r"(?i)(password|secret|token)\w*\s*[:=]\s*[\"']?[\w/+-]{16,}", text)
    assert "RAY_AUTH_TOKEN=" not in text


@pytest.mark.parametrize("path", [*LAUNCHER, *KUBERAY, POLICY], ids=lambda path: path.name)
def test_what_a_user_must_change_is_marked(path: Path) -> None:
    """Places, machines, images of one's own and amounts of money."""
    ours = r"region:|availability_zone:|ImageId:|InstanceType:|head_ip:|worker_ips:|ssh_user: fedsim|"
    ours += r"registry\.example|axReplicas:|kubernetes\.io/metadata\.name|^max_workers:"
    lines = [line for line in path.read_text("utf-8").splitlines() if re.search(ours, line) and line.strip()[0] != "#"]
    assert lines
    assert [line for line in lines if "CHANGE" not in line] == []


def _version() -> str:
    (found,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text("utf-8"), flags=re.MULTILINE)
    assert fedsim.__file__
    return found
