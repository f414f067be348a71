"""The Kubernetes manifests of configs/cluster/kuberay, filled with a few values.

A manifest is plain YAML with ${names} in it, kept as text so that its comments reach the platform team that will own it.
Nothing here speaks with Kubernetes: what comes out is for `kubectl apply`, or for whatever else rolls things out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from string import Template
from typing import Annotated, Literal

from pydantic import Field

from cellplane.config import Config, configs_root
from cellplane.errors import ConfigError

# What may stand in a manifest without quotes: nothing that YAML or a shell would read as something else
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
Image = Annotated[str, Field(pattern=r"^[a-z0-9][A-Za-z0-9._/:@-]*$")]
FilePath = Annotated[str, Field(pattern=r"^/[A-Za-z0-9._/-]+$")]
ModelName = Annotated[str, Field(pattern=r"^models:/[A-Za-z0-9._-]+(@[A-Za-z0-9_-]+|/[0-9]+)$")]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(Mi|Gi|Ti)$")]
Host = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]+)?$")]
CPUS_PER_GPU = 4  # workers.cpus of configs/pretrain/cellplm_85m.yaml
MEMORY_PER_GPU_GIB = 64  # prefetched steps and offloaded state; the 85M network itself needs 2


class KubernetesConfig(Config):
    """What the manifests are filled with."""

    kind: Literal["k8s"] = "k8s"
    """Which kind of configuration this is."""
    namespace: Label = "cellplane"
    """Everything lies in it."""
    operator_namespace: Label = "kuberay"
    """Where KubeRay's operator runs: it may reach the clusters."""
    monitoring_namespace: Label = "monitoring"
    """Where Prometheus runs: it may read metrics."""
    image: Image = "cellplane:0.1.0"
    """Image of CPU pods, heads and submitters."""
    gpu_image: Image = "cellplane:0.1.0-cuda"
    """Image of GPU pods."""
    mlflow_image: Image = "cellplane:0.1.0-mlflow"
    """Image of the tracker."""
    postgres_image: Image = "postgres:17"
    """Image of the tracker's database."""
    storage_class: Label = "shared"
    """A storage class that gives ReadWriteMany."""
    storage: Quantity = "500Gi"
    """Size of the shared volume."""
    artifacts: Annotated[str, Field(pattern=r"^s3://[a-z0-9][A-Za-z0-9._/-]*$")] = "s3://cellplane/mlflow"
    """Where MLflow keeps files."""
    s3_endpoint: Annotated[str, Field(pattern=r"^https?://[A-Za-z0-9.:/-]+$")] = "https://s3.internal"
    """Address of the object store."""
    mlflow_host: Host = "mlflow.internal"
    """The name (and port) people open MLflow under; requests for any other are refused."""
    workers: Annotated[int, Field(ge=1, le=4096)] = 8
    """Workers of pre-training, one GPU each."""
    gpus_per_pod: Annotated[int, Field(ge=1, le=16)] = 1
    """GPUs of a GPU pod."""
    cpu_pods: Annotated[int, Field(ge=0, le=1000)] = 4
    """Most CPU pods of the shared cluster."""
    gpu_pods: Annotated[int, Field(ge=0, le=1000)] = 2
    """Most GPU pods of the shared cluster."""
    serve_pods: Annotated[int, Field(ge=1, le=1000)] = 2
    """Pods of the endpoints."""
    run: Label = "mine"
    """Name of the jobs' runs."""
    pretrain_config: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "cellplm_85m"
    """A shipped configuration of pre-training."""
    shards: FilePath = "/data/shards"
    """Folder of shards, as pods see it."""
    train_cells: FilePath = "/data/train.h5ad"
    """Labelled cells to fine-tune on."""
    test_cells: FilePath = "/data/heldout.h5ad"
    """Labelled cells held out."""
    new_cells: FilePath = "/data/new.h5ad"
    """Cells of batch inference."""
    base_model: ModelName = "models:/mine@champion"
    """What fine-tuning starts from."""
    model: ModelName = "models:/mine-annotate@champion"
    """What answers, in batch inference and at the endpoints."""

    @property
    def train_pods(self) -> int:
        """Pods that hold the workers of pre-training."""
        return -(-self.workers // self.gpus_per_pod)

    @property
    def model_name(self) -> str:
        """What the model is called in the endpoints' paths."""
        return self.model.removeprefix("models:/").partition("@")[0].partition("/")[0].lower()

    def values(self) -> dict[str, str]:
        """Everything a manifest may ask for, as text."""
        derived = {
            "train_pods": self.train_pods,
            "train_cpus": CPUS_PER_GPU * self.gpus_per_pod + 1,
            "train_memory": f"{MEMORY_PER_GPU_GIB * self.gpus_per_pod}Gi",
            "model_name": self.model_name,
            "ray_version": metadata.version("ray"),
        }
        return {name: str(value) for name, value in {**self.model_dump(), **derived}.items()}


def manifests() -> dict[str, Path]:
    """The shipped manifests by name, in the order to apply them."""
    folder = configs_root() / "cluster" / "kuberay"
    first = ("base", "network", "mlflow")
    return dict(sorted(((path.stem, path) for path in folder.glob("*.yaml")), key=lambda item: (item[0] not in first, item[0])))


def render(config: KubernetesConfig, names: Sequence[str] = ()) -> dict[str, str]:
    """Manifests as text, by name; all of them where none is named. ConfigError names the nearest for one that is not there."""
    known = manifests()
    for name in names:
        if name not in known:
            nearest = get_close_matches(name, known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are: {', '.join(known)}"
            raise ConfigError(f"no manifest {name!r}; {hint}")
    values = config.values()
    return {name: _filled(path, values) for name, path in known.items() if not names or name in names}


def _filled(path: Path, values: Mapping[str, str]) -> str:
    try:
        return Template(path.read_text(encoding="utf-8")).substitute(values)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{path}: {error} is none of the values: {', '.join(sorted(values))}") from error
