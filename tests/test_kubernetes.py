"""The manifests fit KubeRay's own schemas, run nothing as root, keep to themselves, and start commands that exist."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from cellplane.config import load_config, validate
from cellplane.errors import ConfigError
from cellplane.kubernetes import KubernetesConfig, manifests, render
from cellplane.serve.deployment import ServeConfig
from cellplane.train.config import PretrainConfig
from tests.house.source import ROOT

KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
RENDERED = render(KubernetesConfig())
OBJECTS = [object_ for text in RENDERED.values() for object_ in yaml.safe_load_all(text)]
Json = dict[str, Any]


def of_kind(*kinds: str) -> list[Json]:
    return [object_ for object_ in OBJECTS if object_["kind"] in kinds]


def named(object_: Json) -> str:
    return f"{object_['kind']}/{object_['metadata']['name']}"


def pod_templates(node: object, place: str = "") -> Iterator[tuple[str, Json]]:
    """Every pod template below a node, with where it stands."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("template", "submitterPodTemplate"):
                yield f"{place}.{key}", value
            else:
                yield from pod_templates(value, f"{place}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from pod_templates(value, f"{place}[{index}]")


PODS = [pytest.param(pod, id=place) for object_ in OBJECTS for place, pod in pod_templates(object_.get("spec"), named(object_))]
each_pod = pytest.mark.parametrize("pod", PODS)


def strict(schema: Any) -> Any:
    """A CRD's schema that refuses unknown keys, which Kubernetes drops in silence, and takes its numbers that may be text."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    properties = schema.get("properties")
    if schema.get("type") == "object" and isinstance(properties, dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found["additionalProperties"] = False
    return found


@pytest.fixture(scope="module")
def crds() -> dict[str, Json]:
    """Strict schemas of KubeRay's kinds, v1."""
    folder = ROOT.parent / "shared" / "schemas" / "kuberay"
    if not folder.is_dir():
        pytest.skip("needs KubeRay's CRDs in ../shared/schemas/kuberay, which are not here")
    return {kind: v1_of(folder / f"ray.io_{plural}.yaml") for kind, plural in KINDS.items()}


def v1_of(path: Path) -> Json:
    crd = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (v1,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    schema: Json = strict(v1["schema"]["openAPIV3Schema"])
    del schema["properties"]["metadata"]  # Kubernetes' own
    return schema | {"additionalProperties": True}


def findings(schema: Json, value: object) -> list[str]:
    return [f"{error.json_path}: {error.message[:200]}" for error in jsonschema.Draft202012Validator(schema).iter_errors(value)]


@pytest.mark.parametrize("object_", of_kind(*KINDS), ids=named)
def test_what_is_kuberays_fits_its_schema(object_: Json, crds: dict[str, Json]) -> None:
    assert findings(crds[object_["kind"]], object_) == []


def test_the_schema_refuses_what_kubernetes_would_drop(crds: dict[str, Json]) -> None:
    (cluster,) = of_kind("RayCluster")
    spoilt = json.loads(json.dumps(cluster))
    spoilt["spec"]["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsNonRot"] = True
    spoilt["spec"]["authOptions"]["mode"] = "tokens"
    assert len(findings(crds["RayCluster"], spoilt)) == 2


@each_pod
def test_a_pod_fits_the_schema_of_pods(pod: Json, crds: dict[str, Json]) -> None:
    template = crds["RayCluster"]["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]["template"]
    assert findings(template, pod) == []


@each_pod
def test_a_pod_keeps_the_restricted_rules(pod: Json) -> None:
    spec = pod["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["serviceAccountName"].startswith("cellplane")
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] >= 100
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    assert not [volume for volume in spec["volumes"] if "hostPath" in volume]


@each_pod
def test_a_container_has_no_rights_and_limits(pod: Json) -> None:
    for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
        assert unprivileged(container["securityContext"])
        for resource in ("cpu", "memory"):
            assert container["resources"]["requests"][resource]
            assert container["resources"]["limits"][resource]
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        assert not container["image"].endswith(":latest")
        assert ":" in container["image"]


def unprivileged(context: Json) -> bool:
    kept = (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"], context["capabilities"])
    return kept == (False, True, {"drop": ["ALL"]}) and not context.get("privileged")


@each_pod
def test_what_a_container_writes_to_is_a_volume(pod: Json) -> None:
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    claimed = {claim["metadata"]["name"] for object_ in of_kind("StatefulSet") for claim in object_["spec"]["volumeClaimTemplates"]}
    for container in pod["spec"]["containers"]:
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert "/tmp" in mounted
        assert set(mounted.values()) <= volumes | claimed


def test_what_the_operator_adds_has_no_rights_either() -> None:
    (cluster,) = of_kind("RayCluster")
    autoscaler = cluster["spec"]["autoscalerOptions"]
    assert unprivileged(autoscaler["securityContext"])
    (token,) = autoscaler["volumeMounts"]
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    assert token["name"] in {volume["name"] for volume in head["volumes"]}
    mounted = {mount["name"] for container in head["containers"] for mount in container["volumeMounts"]}
    assert token["name"] not in mounted, "only the autoscaler may speak with Kubernetes"


def test_secrets_are_files_and_never_in_the_environment() -> None:
    for object_ in OBJECTS:
        assert object_["kind"] != "Secret"
        for _, pod in pod_templates(object_.get("spec")):
            for container in pod["spec"]["containers"]:
                assert "envFrom" not in container
                assert not [entry["name"] for entry in container.get("env", []) if "valueFrom" in entry]
                secret = [
                    entry["name"] for entry in container.get("env", []) if entry["name"].endswith(("PASSWORD", "TOKEN", "SECRET", "KEY"))
                ]
                assert not secret


def clusters() -> list[tuple[str, Json]]:
    """Every Ray cluster: its kind and name, its spec."""
    where = {"RayCluster": "spec", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    found = [(named(o), o["spec"] if o["kind"] == "RayCluster" else o["spec"].get(where[o["kind"]])) for o in of_kind(*KINDS)]
    return [(name, spec) for name, spec in found if spec]


@pytest.mark.parametrize(("name", "spec"), clusters())
def test_every_ray_cluster_asks_for_a_token_and_has_the_locked_version(name: str, spec: Json) -> None:
    assert spec["authOptions"]["mode"] == "token"
    assert f"ray=={spec['rayVersion']}" in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("name", "spec"), clusters())
def test_every_ray_pod_is_probed(name: str, spec: Json) -> None:
    for place, pod in pod_templates(spec):
        (container,) = pod["spec"]["containers"]
        ports = {port["name"] for port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["port"] in ports, f"{place} {probe}"


def test_every_pod_is_in_a_policy_and_every_cluster_in_its_own() -> None:
    policies = of_kind("NetworkPolicy")
    assert all(set(policy["spec"]["policyTypes"]) <= {"Ingress", "Egress"} for policy in policies)
    (nobody,) = [policy for policy in policies if policy["spec"]["podSelector"] == {} and "Ingress" in policy["spec"]["policyTypes"]]
    assert "ingress" not in nobody["spec"]
    assert "egress" not in nobody["spec"]
    labels = {pod["metadata"]["labels"].get("cellplane.io/cluster") for _, spec in clusters() for _, pod in pod_templates(spec)}
    own = {policy["spec"]["podSelector"].get("matchLabels", {}).get("cellplane.io/cluster") for policy in policies}
    assert labels <= own


def test_nothing_is_let_in_from_everywhere() -> None:
    for policy in of_kind("NetworkPolicy"):
        for rule in policy["spec"].get("ingress", []):
            assert rule["from"], policy["metadata"]["name"]
            assert all(peer.get("podSelector") or peer.get("namespaceSelector") for peer in rule["from"]), policy["metadata"]["name"]


@pytest.mark.parametrize("budget", of_kind("PodDisruptionBudget"), ids=named)
def test_a_disruption_budget_names_pods_that_exist(budget: Json) -> None:
    wanted = budget["spec"]["selector"]["matchLabels"]["cellplane.io/cluster"]
    assert wanted in {pod["metadata"]["labels"].get("cellplane.io/cluster") for _, spec in clusters() for _, pod in pod_templates(spec)}
    assert len({"minAvailable", "maxUnavailable"} & budget["spec"].keys()) == 1


def test_services_and_claims_that_are_named_exist() -> None:
    claims = {o["metadata"]["name"] for o in of_kind("PersistentVolumeClaim")}
    accounts = {o["metadata"]["name"] for o in of_kind("ServiceAccount")}
    for object_ in OBJECTS:
        for _, pod in pod_templates(object_.get("spec")):
            assert pod["spec"]["serviceAccountName"] in accounts
            used = {volume["persistentVolumeClaim"]["claimName"] for volume in pod["spec"]["volumes"] if "persistentVolumeClaim" in volume}
            assert used <= claims
    services = {o["metadata"]["name"]: o["spec"]["ports"][0]["port"] for o in of_kind("Service")}
    assert services == {"mlflow": 5000, "postgres": 5432}


@pytest.mark.parametrize("job", of_kind("RayJob"), ids=named)
def test_a_job_starts_a_command_that_exists_with_its_options(job: Json) -> None:
    from cellplane.cli.main import app

    first, *words = shlex.split(job["spec"]["entrypoint"])
    assert first == "cellplane"
    node: Any = typer.main.get_command(app)
    while hasattr(node, "commands"):
        node = node.commands[words.pop(0)]
    known = {option for parameter in node.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= known


def test_the_keys_that_pre_training_changes_exist() -> None:
    (job,) = [o for o in of_kind("RayJob") if "pretrain" in o["metadata"]["name"]]
    words = shlex.split(job["spec"]["entrypoint"])
    changes = [after for before, after in itertools.pairwise(words) if before == "-o"]
    config = load_config(PretrainConfig, words[words.index("--config") + 1], "pretrain", changes)
    assert config.workers.count == KubernetesConfig().workers
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    gpus = group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus >= config.workers.count
    assert int(container["resources"]["limits"]["cpu"]) >= config.workers.cpus * KubernetesConfig().gpus_per_pod


def test_the_endpoints_configuration_is_one_of_ours() -> None:
    (service,) = of_kind("RayService")
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    for model in application["args"]["models"]:
        config = validate(ServeConfig, model, "rayservice.yaml")
        assert config.api_keys_file is not None, "an open address needs keys"
    module, _, function = application["import_path"].partition(":")
    assert (ROOT / "serve" / f"{module.rpartition('.')[2]}.py").read_text(encoding="utf-8").count(f"def {function}(") == 1


def test_values_reach_the_places_they_are_meant_for() -> None:
    config = KubernetesConfig(namespace="cells", image="registry.internal:5000/team/cellplane:2", workers=16, gpus_per_pod=8)
    objects = [o for text in render(config).values() for o in yaml.safe_load_all(text)]
    assert {o["metadata"].get("namespace", "cells") for o in objects} == {"cells"}
    (job,) = [o for o in objects if o["kind"] == "RayJob" and "rayClusterSpec" in o["spec"]]
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2
    assert "workers.count=16" in job["spec"]["entrypoint"]
    images = {c["image"] for o in objects for _, pod in pod_templates(o.get("spec")) for c in pod["spec"]["containers"]}
    assert config.image in images
    assert "cellplane:0.1.0" not in images


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("namespase=cells", "did you mean 'namespace'"),
        ("workers=0", "workers"),
        ("namespace=Cells And More", "namespace"),
        ('image="a:1\\n  privileged: true"', "image"),
        ("run=mine; rm -rf /", "run"),
    ],
)
def test_a_value_that_is_wrong_is_refused(change: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(KubernetesConfig, "default", "k8s", [change])


def test_the_shipped_values_are_the_defaults() -> None:
    assert load_config(KubernetesConfig, "default", "k8s") == KubernetesConfig()


def test_an_unknown_manifest_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'rayservice'"):
        render(KubernetesConfig(), ["raysrvice"])


def test_manifests_come_in_the_order_to_apply_them() -> None:
    assert list(manifests())[:3] == ["base", "mlflow", "network"]
    assert list(RENDERED) == list(manifests())
