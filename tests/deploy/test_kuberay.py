"""Tests deploy/kuberay without Kubernetes: against the fields of KubeRay, and its rules."""

import copy
import re
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from orchestrator.config.places import Compute

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / "deploy" / "kuberay"
FILES = sorted(FOLDER.glob("*.yaml"))
FIELDS = yaml.safe_load((Path(__file__).parent / "kubernetes.yaml").read_text("utf-8"))
KUBERAY = {"RayJob": "rayjob", "RayCluster": "raycluster"}
VERSIONS = {
    "RayJob": "ray.io/v1",
    "RayCluster": "ray.io/v1",
    "Deployment": "apps/v1",
    "StatefulSet": "apps/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
}


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((FOLDER / name).read_text("utf-8")))


def cluster_of(name: str) -> dict:
    spec = documents(name)[0]["spec"]
    return spec.get("rayClusterSpec", spec)


CLUSTERS = ["cluster.yaml", "sweep.yaml", "train.yaml"]


def groups(name: str) -> list[dict]:
    cluster = cluster_of(name)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


# ---- fields ----


def schema(fields) -> dict:
    """Return the JSON schema of an entry of kubernetes.yaml: no key is permitted that it lacks."""
    if isinstance(fields, list):
        return {"type": "array", "items": schema(fields[0])}
    if isinstance(fields, str):
        if fields.startswith("$"):
            return {"$ref": f"#/$defs/{fields[1:]}"}
        return {"type": fields.split("|")}
    if "enum" in fields:
        return {"enum": fields["enum"]}
    if "*" in fields:
        return {"type": "object", "additionalProperties": schema(fields["*"])}
    return {
        "type": "object",
        "properties": {name.rstrip("!"): schema(part) for name, part in fields.items()},
        "required": [name.rstrip("!") for name in fields if name.endswith("!")],
        "additionalProperties": False,
    }


def validate(document: dict) -> None:
    kind = document["kind"]
    known = {"apiVersion": "string", "kind": "string", "metadata!": "$metadata"}
    if kind == "ConfigMap":
        known["data!"] = {"*": "string"}
    else:
        known["spec!"] = f"${KUBERAY.get(kind, kind)}"
    defs = {name: schema(fields) for name, fields in FIELDS.items()}
    jsonschema.validate(document, {**schema(known), "$defs": defs})
    assert document["apiVersion"] == VERSIONS.get(kind, "v1")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_kubernetes_knows_every_field(file):
    for document in documents(file.name):
        validate(document)


@pytest.mark.parametrize(
    "path",
    [
        (),
        ("spec",),
        ("spec", "rayClusterSpec"),
        ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec"),
        ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0),
    ],
)
def test_misspelled_field_is_refused_at_every_level(path):
    wrong = copy.deepcopy(documents("train.yaml")[0])
    section = wrong
    for key in path:
        section = section[key]
    section["backOffLimit"] = 1
    with pytest.raises(jsonschema.ValidationError, match="backOffLimit"):
        validate(wrong)


def test_number_in_a_start_parameter_is_refused():
    wrong = documents("train.yaml")[0]
    wrong["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    with pytest.raises(jsonschema.ValidationError, match="0 is not of type 'string'"):
        validate(wrong)


# ---- rules ----


@pytest.mark.parametrize("name", ["train.yaml", "sweep.yaml"])
def test_job_waits_for_kueue_and_is_tried_again(name):
    """Kueue needs a cluster of fixed size; KubeRay suspends only jobs that end their cluster."""
    (job,) = documents(name)
    assert "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]
    assert job["spec"]["suspend"] is True
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["backoffLimit"] > 0
    # If the submitter ends first, the head is never ready, and KubeRay 1.7 sees no end of the job.
    assert job["spec"]["preRunningDeadlineSeconds"] == Compute().wait_for_nodes_s
    # KubeRay then tries again when the pod of the head is gone; else it waits for its job server.
    assert job["spec"]["submissionMode"] == "SidecarMode"
    # In this mode the command starts when the head is there. It waits for the workers.
    [head] = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "ESPALIER_AUTOSCALING", "value": "1"} in head["env"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{,46}", job["metadata"]["name"])
    cluster = job["spec"]["rayClusterSpec"]
    assert "enableInTreeAutoscaling" not in cluster
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


@pytest.mark.parametrize("name", ["train.yaml", "sweep.yaml"])
def test_command_of_a_job_names_files_of_the_image_and_fields_that_exist(name):
    from orchestrator.config.experiment import load_experiment
    from orchestrator.sweep.space.expand import load_sweep

    commit, script, experiment, *overrides = documents(name)[0]["spec"]["entrypoint"].split()
    assert commit == "ESPALIER_GIT_COMMIT=$ESPALIER_IMAGE_COMMIT"
    assert script == f"/opt/espalier/pipelines/{Path(name).stem}.py"
    file = REPO / Path(experiment).relative_to("/opt/espalier")
    load = {"train.yaml": load_experiment, "sweep.yaml": load_sweep}[name]
    assert load(str(file), overrides) is not None


def test_the_two_jobs_differ_in_name_and_command_only():
    train, sweep = documents("train.yaml")[0], documents("sweep.yaml")[0]
    for job in (train, sweep):
        del job["metadata"]["name"], job["spec"]["entrypoint"]
    assert train == sweep


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster_needs_a_token_and_has_the_tested_version_of_ray(name):
    cluster = cluster_of(name)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_pod_has_storage_shared_memory_and_time_to_stop(name):
    settings = next(d for d in documents("services.yaml") if d["kind"] == "ConfigMap")
    claim = next(d for d in documents("services.yaml") if d["kind"] == "PersistentVolumeClaim")
    for group in groups(name):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["envFrom"][0] == {"configMapRef": {"name": settings["metadata"]["name"]}}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        places = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        storage = places[settings["data"]["ESPALIER_STORAGE"]]
        assert storage["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        shared = places["/dev/shm"]["emptyDir"]
        assert shared["medium"] == "Memory"
        size = int(shared["sizeLimit"].removesuffix("Gi")) * 2**30
        assert int(group["rayStartParams"]["object-store-memory"]) < size
        notice = int(settings["data"]["RAY_JOB_STOP_WAIT_TIME_S"])
        assert pod["terminationGracePeriodSeconds"] > notice
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"
        # No autoscaler may evict it. The taint of GPU machines does not keep it off.
        assert group["template"]["metadata"]["annotations"] == {
            "karpenter.sh/do-not-disrupt": "true",
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        }
        has_gpus = "nvidia.com/gpu" in container["resources"]["limits"]
        assert [taint["key"] for taint in pod.get("tolerations", [])] == [
            "nvidia.com/gpu"
        ] * has_gpus
        if "groupName" in group:
            assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_every_claim_names_its_class_because_a_cluster_may_have_no_default():
    claims = [d["spec"] for d in documents("services.yaml") if d["kind"] == "PersistentVolumeClaim"]
    for document in documents("services.yaml"):
        claims += [
            part["spec"] for part in document.get("spec", {}).get("volumeClaimTemplates", [])
        ]
    assert [claim["storageClassName"] for claim in claims] == ["CHANGE-ME"] * 2


def test_settings_are_those_of_the_cluster_launcher():
    """But for the addresses; cluster.yaml is tested against the programs that read them."""
    text = (REPO / "cluster.yaml").read_text("utf-8")
    launcher = dict(re.findall(r"export (\w+)=(\S+)", text))
    (settings,) = (d["data"] for d in documents("services.yaml") if d["kind"] == "ConfigMap")
    places = {"MLFLOW_TRACKING_URI"}
    assert settings.keys() == launcher.keys() - {"PATH", "RAY_AUTH_MODE", "ESPALIER_AUTOSCALING"}
    assert {k: v for k, v in settings.items() if k not in places} == {
        k: launcher[k] for k in settings.keys() - places
    }


def test_mlflow_understands_its_command_and_is_reached_by_its_service():
    from mlflow.cli import server

    services = {(d["kind"], d["metadata"]["name"]): d for d in documents("services.yaml")}
    (container,) = services["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    assert container["command"][:2] == ["mlflow", "server"]
    given = server.make_context("server", container["command"][2:]).params
    address = services["ConfigMap", "espalier"]["data"]["MLFLOW_TRACKING_URI"]
    assert address == f"http://mlflow:{given['port']}"
    assert f"mlflow:{given['port']}" in given["allowed_hosts"].split(",")
    # The driver of PostgreSQL takes the password from its variable.
    assert given["backend_store_uri"] == "postgresql://mlflow@mlflow-db/mlflow"
    for kind, name in [("Deployment", "mlflow"), ("StatefulSet", "mlflow-db")]:
        labels = services[kind, name]["spec"]["template"]["metadata"]["labels"]
        assert services["Service", name]["spec"]["selector"] == labels
        assert services["NetworkPolicy", name]["spec"]["podSelector"]["matchLabels"] == labels
    (rule,) = services["NetworkPolicy", "mlflow"]["spec"]["ingress"]
    for name in CLUSTERS:
        labels = cluster_of(name)["headGroupSpec"]["template"]["metadata"]["labels"]
        assert rule["from"] == [{"podSelector": {"matchLabels": labels}}]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_file_contains_no_secret_but_its_name(file):
    text = file.read_text("utf-8")
    assert not re.search(
        r"kind: Secret|(?i:password|token|key): *[\"']?\w{12}|://[^/\s]+:[^/\s]+@", text
    )
    for variable in re.findall(r"name: (PGPASSWORD|POSTGRES_PASSWORD).*\n(.*)", text):
        assert "secretKeyRef" in variable[1]
