"""Image, manifests and unit: valid by their own validators, and of one mind on ports, paths, users, times."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar import __version__
from sidecar.core.roles import ROLES
from sidecar.files import keyfiles
from sidecar.files.signing import SigningKey
from sidecar.policies import files as policyfiles
from sidecar.settings import reading as settings
from sidecar.settings.reading import Settings
from tests.dockerfile import DoesNotHold, Instruction, context, instructions, pairs
from tests.tools import tool

kubernetes_validate = importlib.import_module("kubernetes_validate.utils")  # it has no types

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "config/deploy"
KUBERNETES = DEPLOY / "kubernetes"
UNIT = DEPLOY / "systemd/scopegate.service"
IN_THE_IMAGE = "/etc/scopegate/config/container.yaml"
STORE = "/var/lib/scopegate"
USER = 65532
EVERYTHING_ELSE = 128 << 20  # of memory: the program itself, policies, the store's pages

STEPS = instructions((ROOT / "Dockerfile").read_text(encoding="utf-8"))
BASE_KUSTOMIZATION = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text(encoding="utf-8"))
MANIFESTS = {
    document["kind"]: document
    for name in BASE_KUSTOMIZATION["resources"]
    for document in yaml.safe_load_all((KUBERNETES / name).read_text(encoding="utf-8"))
}
# The policies of the image: those that ship, and the roles.
DEPLOYED = [*ROOT.glob("policies/*.yaml"), DEPLOY / "roles.yaml"]
POD = MANIFESTS["StatefulSet"]["spec"]["template"]["spec"]
METADATA = MANIFESTS["StatefulSet"]["spec"]["template"]["metadata"]
(SIDECAR,) = POD["initContainers"]
(BACKEND,) = POD["containers"]
RESTORE = yaml.safe_load((DEPLOY / "restore.yaml").read_text(encoding="utf-8"))
PAGE = (DEPLOY / "README.md").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
GATE = COMPOSE["services"]["scopegate"]


@pytest.fixture
def container() -> Settings:
    """config/container.yaml as `run` reads it."""
    loaded = settings.load(ROOT / "config/container.yaml", environment={}, read_keys=False)
    assert loaded.warnings == ()
    return loaded.settings


def port(listen: object) -> int:
    return int(str(listen).rpartition(":")[2])


def only(keyword: str) -> Instruction:
    (step,) = (step for step in STEPS if step.keyword == keyword)
    return step


# The configuration ----------------------------------------------------------------------------------------


def test_in_a_container_clients_and_probes_come_from_outside_and_operators_do_not(
    container: Settings,
) -> None:
    assert str(container.data.listen) == "0.0.0.0:8000"
    assert str(container.ops.listen) == "0.0.0.0:9902"
    assert str(container.admin.listen) == "127.0.0.1:9901"


def test_in_a_container_callers_need_a_token_and_only_the_sidecar_holds_the_backends_credential(
    container: Settings,
) -> None:
    assert container.auth.required
    assert container.auth.tokens.file is not None
    (credential,) = container.upstream.credentials
    assert credential.header == "Authorization"
    # Both are in the folder that every deployment mounts.
    secrets = Path("/etc/scopegate/secrets")
    placed = [
        os.path.relpath(file, ROOT / "config") for file in (container.auth.tokens.file, credential.value_file)
    ]
    assert [Path(os.path.normpath(Path(IN_THE_IMAGE).parent / each)) for each in placed] == [
        secrets / "tokens.yaml",
        secrets / "backend-authorization",
    ]
    (mounted,) = (each for each in SIDECAR["volumeMounts"] if each["name"] == "secrets")
    assert (mounted["mountPath"], mounted["readOnly"]) == (str(secrets), True)
    assert "secrets" not in {each["name"] for each in BACKEND.get("volumeMounts", ())}
    assert f"./secrets:{secrets}:ro" in GATE["volumes"]


def test_in_a_container_the_roles_are_among_the_policies_and_every_call_has_a_holder() -> None:
    found = policyfiles.load(KUBERNETES / "policies").roles.holders
    assert set(found) == set(ROLES) - {"approver"}
    copied = [step.text for step in STEPS if step.keyword == "COPY"]
    assert any("config/deploy/roles.yaml" in text for text in copied)


def test_in_a_container_the_store_is_on_the_volume_and_the_backend_is_a_neighbour(
    container: Settings,
) -> None:
    assert container.store.file == Path(STORE) / "scopegate.db"
    assert container.upstream.url == "http://127.0.0.1:9000"
    loaded = settings.load(
        ROOT / "config/container.yaml",
        environment={
            "SCOPEGATE_UPSTREAM__URL": "http://backend:9000",
            "SCOPEGATE_UPSTREAM__CREDENTIALS": "[]",
        },
    )
    assert loaded.settings.upstream.url == "http://backend:9000"


def test_what_is_held_in_memory_at_once_fits_into_the_containers_limit(container: Settings) -> None:
    gate = container.gate
    # A body as JSON values: [[],[],[]] takes the most. An answer in the pieces that arrive, and put together.
    held = gate.max_in_flight * (30 * gate.max_body_bytes + 2 * gate.max_answer_bytes)
    limit = re.fullmatch(r"(\d+)Mi", SIDECAR["resources"]["limits"]["memory"])
    assert limit is not None
    assert held + EVERYTHING_ELSE <= int(limit[1]) << 20


def test_the_policies_are_found_in_the_repository_and_in_the_image_alike(container: Settings) -> None:
    assert container.policies.resolve() == ROOT / "policies"
    copied = [step.text for step in STEPS if step.keyword == "COPY"]
    assert "config/container.yaml /etc/scopegate/config/" in copied
    assert "policies/*.yaml config/deploy/roles.yaml /etc/scopegate/policies/" in copied  # and no tests


# The image ------------------------------------------------------------------------------------------------


def test_hadolint_has_nothing_to_say_about_the_dockerfile() -> None:
    assert "hadolint ignore" not in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    linted = run(tool("hadolint"), "--no-color", "--failure-threshold", "style", ROOT / "Dockerfile")
    assert (linted.returncode, linted.stdout + linted.stderr) == (0, "")


def test_the_image_is_built_in_two_stages_on_one_base() -> None:
    assert [step.text for step in STEPS if step.keyword == "FROM"] == ["${BASE} AS builder", "${BASE}"]
    assert STEPS[0] == Instruction(STEPS[0].line, "ARG", "BASE=python:3.13-slim")


def test_the_image_runs_as_a_number_that_is_not_root_and_owns_the_store_only() -> None:
    assert only("USER").text == f"{USER}:{USER}"  # a number: a kubelet does not look names up
    assert only("VOLUME").text == STORE
    assert f"install -d -m 0700 -o {USER} -g {USER} {STORE}" in STEPS[-1 - after("RUN")].text
    assert pairs(only("ENV").text, {"PATH": "/bin"}) == {
        "PATH": "/opt/scopegate/bin:/bin",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TMPDIR": STORE,
    }


def after(keyword: str) -> int:
    """How many instructions follow the last one of this name."""
    return next(number for number, step in enumerate(reversed(STEPS)) if step.keyword == keyword)


def test_the_process_of_the_image_is_scopegate_itself_and_gets_the_signal() -> None:
    assert only("ENTRYPOINT").listed() == ["scopegate"]
    assert only("CMD").listed() == ["run", "--config", IN_THE_IMAGE]
    assert only("STOPSIGNAL").text == "SIGTERM"


def test_the_image_exposes_what_listens_on_all_addresses(container: Settings) -> None:
    ports = [port(container.data.listen), port(container.ops.listen)]
    assert [int(one) for one in only("EXPOSE").text.split()] == ports


def test_the_image_asks_scopegate_how_it_is() -> None:
    check = only("HEALTHCHECK").text.partition(" CMD ")[2].strip()
    assert Instruction(0, "CMD", check).listed() == ["scopegate", "health", "--config", IN_THE_IMAGE]


def test_the_labels_of_the_image_say_what_the_package_says() -> None:
    variables = pairs(" ".join(step.text for step in STEPS if step.keyword == "ARG"), {})
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (description,) = re.findall(r'^description = "(.+)"$', project, re.MULTILINE)
    assert pairs(only("LABEL").text, variables) == {
        "org.opencontainers.image.title": "Scopegate",
        "org.opencontainers.image.description": description,
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.version": __version__,
    }


def test_whoever_runs_the_image_by_hand_waits_for_the_drain_and_finds_the_backend(
    container: Settings,
) -> None:
    header = "\n".join(
        line.removeprefix("#").strip()
        for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
        if line.startswith("#")
    )
    commands = []
    for text in (header, PAGE):
        (shown,) = re.findall(r"^docker run (.+)$", text.replace("\\\n", ""), re.MULTILINE)
        commands.append(shlex.split(shown, comments=True))
    assert commands[0] == commands[1]
    options = commands[0]
    assert int(options[options.index("--stop-timeout") + 1]) >= container.shutdown.drain_seconds + 5
    assert "--network" in options
    assert {"--read-only", "no-new-privileges", "ALL"} <= set(options)


@pytest.mark.slow
def test_nothing_but_what_the_image_is_made_of_is_sent_to_the_engine() -> None:
    wanted = {"pyproject.toml", "requirements.lock", "README.md", "LICENSE", "config/container.yaml"}
    wanted |= {f"policies/{file.name}" for file in ROOT.glob("policies/*.yaml")}
    sent = set(context(ROOT))
    package = {name for name in sent if name.startswith("sidecar/")}
    assert sent - package == wanted
    assert {"sidecar/__init__.py", "sidecar/store/sql/sqlite/0001_initial.sql"} <= package
    assert [name for name in package if "__pycache__" in name or "/." in name] == []


def test_the_last_pattern_that_matches_a_file_or_a_folder_above_it_decides(tmp_path: Path) -> None:
    for name in (
        "a.yaml",
        "kept/b.py",
        "kept/deep/c.py",
        "kept/deep/d.pyc",
        "kept/.cache/e.py",
        "other/f.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".dockerignore").write_text("# all\n*\n!kept\n**/*.pyc\n**/.*\n")
    assert context(tmp_path) == ["kept/b.py", "kept/deep/c.py"]


def test_an_instruction_that_the_dry_run_does_not_know_is_refused_with_its_line() -> None:
    with pytest.raises(DoesNotHold, match=r"Dockerfile:4: ADD a \.: is an instruction"):
        instructions("# a\nRUN a \\\n  b\nADD a .\n")
    assert instructions("# a\nRUN a \\\n    && b\n") == [Instruction(2, "RUN", "a && b")]


# Kubernetes -----------------------------------------------------------------------------------------------

# The oldest that knows all that is used here (sleep in preStop), and each one after it.
VERSIONS = [
    version
    for version in kubernetes_validate.all_versions()
    if tuple(map(int, version.split(".")[:2])) >= (1, 30)
]


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
@pytest.mark.parametrize("kind", MANIFESTS)
def test_every_manifest_is_valid_in_the_oldest_and_the_newest_kubernetes(kind: str, version: str) -> None:
    assert kubernetes_validate.validate(MANIFESTS[kind], version, strict=True) == version.rpartition(".")[0]


def test_a_wrong_manifest_would_be_found() -> None:
    wrong = {**MANIFESTS["Service"], "spec": {"selektor": {}}}
    with pytest.raises(kubernetes_validate.ValidationError, match="selektor"):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_every_manifest_of_the_folder_is_part_of_the_base() -> None:
    files = {file.name for file in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(BASE_KUSTOMIZATION["resources"]) == files
    assert MANIFESTS.keys() == {"StatefulSet", "Service", "NetworkPolicy"}


def test_kustomize_builds_the_base_with_configuration_and_policies_as_they_ship() -> None:
    built = subprocess.run(
        [tool("kubectl"), "kustomize", KUBERNETES],
        env={"PATH": os.environ["PATH"], "KUBECONFIG": os.devnull},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (built.returncode, built.stderr) == (0, "")
    documents = {document["metadata"]["name"]: document for document in yaml.safe_load_all(built.stdout)}
    for document in documents.values():
        kubernetes_validate.validate(document, VERSIONS[0], strict=True)
    assert documents["scopegate-config"]["data"].keys() == {"container.yaml"}
    assert documents["scopegate-policies"]["data"] == {
        file.name: file.read_text(encoding="utf-8") for file in DEPLOYED
    }


def test_the_base_has_the_configuration_and_the_policies_that_ship() -> None:
    """Kustomize reads nothing outside its folder, so `tests.reference` writes copies there."""
    copies = {str(file.relative_to(KUBERNETES)): file for file in KUBERNETES.glob("*/*")}
    shipped = {f"policies/{file.name}": file for file in DEPLOYED}
    shipped["config/container.yaml"] = ROOT / "config/container.yaml"
    assert copies.keys() == shipped.keys()
    assert [name for name in copies if copies[name].read_bytes() != shipped[name].read_bytes()] == []
    generated = {map_["name"]: map_["files"] for map_ in BASE_KUSTOMIZATION["configMapGenerator"]}
    assert sorted([*generated["scopegate-config"], *generated["scopegate-policies"]]) == sorted(shipped)


def test_the_sidecar_is_a_native_one_before_exactly_one_pod() -> None:
    assert (SIDECAR["name"], SIDECAR["restartPolicy"]) == ("scopegate", "Always")
    assert MANIFESTS["StatefulSet"]["spec"]["replicas"] == 1


def test_probes_ask_the_ops_listener(container: Settings) -> None:
    probes = {name: SIDECAR[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    ops = port(container.ops.listen)
    assert probes == {
        "startup": {"path": "/health/live", "port": ops},
        "liveness": {"path": "/health/live", "port": ops},
        "readiness": {"path": "/health/ready", "port": ops},
    }


def test_the_grace_is_longer_than_what_has_to_end_within_it(container: Settings) -> None:
    serving_on = BACKEND["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = container.shutdown.drain_seconds
    assert serving_on >= container.upstream.response_timeout_seconds
    assert POD["terminationGracePeriodSeconds"] >= serving_on + 10 + drain + 5


@pytest.mark.parametrize("container_of_the_pod", [SIDECAR, BACKEND], ids=["sidecar", "backend"])
def test_the_pod_is_restricted(container_of_the_pod: dict[str, Any]) -> None:
    assert POD["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container_of_the_pod["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert POD["automountServiceAccountToken"] is False


def test_whole_folders_are_mounted_where_the_image_has_them() -> None:
    mounts = {mount["name"]: mount for mount in SIDECAR["volumeMounts"]}
    assert mounts == {
        "store": {"name": "store", "mountPath": STORE},
        "config": {"name": "config", "mountPath": str(Path(IN_THE_IMAGE).parent), "readOnly": True},
        "policies": {"name": "policies", "mountPath": "/etc/scopegate/policies", "readOnly": True},
        "secrets": {"name": "secrets", "mountPath": "/etc/scopegate/secrets", "readOnly": True},
    }
    (claim,) = MANIFESTS["StatefulSet"]["spec"]["volumeClaimTemplates"]
    maps = {each["name"]: each["configMap"]["name"] for each in POD["volumes"] if "configMap" in each}
    (secret,) = (each for each in POD["volumes"] if "secret" in each)
    # Root owns its files, and fsGroup lets the group read them. A file of tokens may be as open as that.
    assert secret["secret"] == {"secretName": "scopegate-secrets", "defaultMode": 0o400}
    assert POD["securityContext"]["fsGroup"] == USER
    assert {claim["metadata"]["name"], secret["name"], *maps} == mounts.keys()
    assert list(maps.values()) == [map_["name"] for map_ in BASE_KUSTOMIZATION["configMapGenerator"]]


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
def test_a_backup_is_put_in_place_by_a_pod_that_has_the_gates_volume_and_rights(version: str) -> None:
    kubernetes_validate.validate(RESTORE, version, strict=True)
    spec = RESTORE["spec"]
    (container_,) = spec["containers"]
    (volume,) = spec["volumes"]
    (claim,) = MANIFESTS["StatefulSet"]["spec"]["volumeClaimTemplates"]
    name = MANIFESTS["StatefulSet"]["metadata"]["name"]
    assert volume["persistentVolumeClaim"]["claimName"] == f"{claim['metadata']['name']}-{name}-0"
    assert container_["volumeMounts"] == [{"name": volume["name"], "mountPath": STORE}]
    assert container_["image"] == SIDECAR["image"]
    assert spec["securityContext"] == POD["securityContext"]
    assert container_["securityContext"] == SIDECAR["securityContext"]
    # No client of the Service and no rule for the gate's pod means this one.
    assert RESTORE["metadata"]["labels"] != MANIFESTS["Service"]["spec"]["selector"]


def test_the_commands_that_start_it_where_no_client_reaches_it_change_the_gate_and_nothing_else(
    container: Settings,
) -> None:
    (setting,) = re.findall(r"^kubectl (set env) (\S+) (-c \S+) (\w+=\S+)$", PAGE, re.MULTILINE)
    verb, target, selected, variable = setting
    assert target == f"statefulset/{MANIFESTS['StatefulSet']['metadata']['name']}"
    manifest = ("--local", "-f", KUBERNETES / "statefulset.yaml", "-o", "yaml")
    set_ = run(tool("kubectl"), *verb.split(), *manifest, *selected.split(), variable)
    assert (set_.returncode, set_.stderr) == (0, "")
    pod = yaml.safe_load(set_.stdout)["spec"]["template"]["spec"]
    (sidecar,) = pod["initContainers"]
    name, _, value = variable.partition("=")
    assert sidecar["env"] == [{"name": name, "value": value}]
    assert pod["containers"][0]["env"] == BACKEND["env"]
    loaded = settings.load(
        ROOT / "config/container.yaml", environment={name: value}, read_keys=False
    ).settings
    assert str(loaded.data.listen).startswith("127.0.0.1:")
    assert loaded.ops == container.ops  # the probes still find it, and so it lives
    assert f"kubectl {verb} {target} {selected} {name}-\n" in PAGE


def test_the_key_comes_as_a_secret_that_only_the_sidecar_may_read(tmp_path: Path) -> None:
    (text,) = re.findall(r"^  ```yaml\n(.+?)^  ```$", PAGE, re.MULTILINE | re.DOTALL)
    patch = yaml.safe_load(text)["spec"]["template"]["spec"]
    (added,) = patch["initContainers"]
    (volume,) = patch["volumes"]
    assert volume["secret"]["defaultMode"] == 0o400
    assert added["name"] == SIDECAR["name"]
    (mount,) = added["volumeMounts"]
    assert (mount["name"], mount["readOnly"]) == (volume["name"], True)
    sidecar = {**SIDECAR, "env": added["env"], "volumeMounts": [*SIDECAR["volumeMounts"], mount]}
    pod = {**POD, "initContainers": [sidecar], "volumes": [*POD["volumes"], volume]}
    whole = {**MANIFESTS["StatefulSet"]["spec"], "template": {"metadata": METADATA, "spec": pod}}
    kubernetes_validate.validate({**MANIFESTS["StatefulSet"], "spec": whole}, VERSIONS[0], strict=True)
    variables = {one["name"]: one["value"] for one in added["env"]}
    key = Path(variables["SCOPEGATE_LOG__SIGNING_KEY_FILE"])
    assert key.parent == Path(mount["mountPath"])
    assert f"--from-file={key.name}" in text
    # It is read at once, so here is one.
    keyfiles.create(tmp_path / key.name, SigningKey.generate().pem(), 0o600)
    variables["SCOPEGATE_LOG__SIGNING_KEY_FILE"] = str(tmp_path / key.name)
    variables["SCOPEGATE_UPSTREAM__CREDENTIALS"] = "[]"
    loaded = settings.load(ROOT / "config/container.yaml", environment=variables)
    assert loaded.warnings == ()
    checkpoints = loaded.settings.log.checkpoint_file
    assert checkpoints is not None
    assert checkpoints.parent == Path(STORE)


def test_the_network_lets_nobody_to_the_backend_but_through_the_gate(container: Settings) -> None:
    data, ops = port(container.data.listen), port(container.ops.listen)
    policy = MANIFESTS["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    ways = {one["port"]: rule["from"] for rule in policy["ingress"] for one in rule["ports"]}
    assert ways.keys() == {data, ops}
    assert ways[ops] == [
        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    ]
    assert all("ports" in rule and "from" in rule for rule in policy["ingress"])
    service = MANIFESTS["Service"]["spec"]
    assert [one["targetPort"] for one in service["ports"]] == [data]
    labels = METADATA["labels"]
    assert service["selector"] == policy["podSelector"]["matchLabels"] == labels
    assert "ports" not in BACKEND
    assert BACKEND["env"] == [{"name": "LISTEN", "value": str(container.upstream.address)}]


# Compose --------------------------------------------------------------------------------------------------


def test_compose_knows_every_key_that_is_used() -> None:
    """No validator of Compose is at hand in a test, so these are the names that its specification has."""
    assert COMPOSE.keys() == {"name", "services", "networks", "volumes"}
    known = {
        *("image", "build", "depends_on", "environment", "ports", "expose", "networks", "user", "read_only"),
        *("cap_drop", "security_opt", "volumes", "healthcheck", "stop_grace_period", "restart"),
    }
    assert [key for service in COMPOSE["services"].values() for key in service if key not in known] == []
    used = {network for service in COMPOSE["services"].values() for network in service["networks"]}
    assert used == COMPOSE["networks"].keys()
    assert (DEPLOY / GATE["build"]).resolve() == ROOT


def test_compose_confines_the_gate_as_kubernetes_does() -> None:
    assert GATE["user"] == f"{USER}:{USER}"
    assert GATE["read_only"] is True
    assert "tmpfs" not in GATE
    for service in COMPOSE["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_compose_publishes_the_gate_and_not_the_backend(container: Settings) -> None:
    published = {int(one.rpartition(":")[2]) for one in GATE["ports"]}
    assert published == {port(container.data.listen), port(container.ops.listen)}
    assert all(one.startswith("127.0.0.1:") for one in GATE["ports"])
    backend = COMPOSE["services"]["backend"]
    assert "ports" not in backend
    (inside,) = backend["networks"]
    assert COMPOSE["networks"][inside] == {"internal": True}
    assert inside in GATE["networks"]
    assert GATE["environment"] == {"SCOPEGATE_UPSTREAM__URL": f"http://backend:{backend['expose'][0]}"}


def test_compose_waits_for_the_drain_and_ends_the_gate_before_the_backend(container: Settings) -> None:
    assert int(GATE["stop_grace_period"].removesuffix("s")) >= container.shutdown.drain_seconds + 5
    assert GATE["depends_on"] == ["backend"]


def test_compose_keeps_the_store_and_takes_secrets_as_a_folder() -> None:
    kept, secrets = (volume.split(":") for volume in GATE["volumes"])
    assert kept == ["store", STORE]
    assert list(COMPOSE["volumes"]) == ["store"]
    assert secrets == ["./secrets", "/etc/scopegate/secrets", "ro"]


def test_compose_checks_health_as_the_image_does() -> None:
    command = Instruction(0, "CMD", only("HEALTHCHECK").text.partition(" CMD ")[2].strip()).listed()
    assert GATE["healthcheck"]["test"] == ["CMD", *command]
    times = dict(re.findall(r"--([a-z-]+)=(\S+)", only("HEALTHCHECK").text))
    checked = {
        key.replace("_", "-"): str(value) for key, value in GATE["healthcheck"].items() if key != "test"
    }
    assert checked == times


def test_every_place_that_names_the_image_names_this_version() -> None:
    image = f"scopegate:{__version__}"
    assert GATE["image"] == SIDECAR["image"] == image
    tags = {one["name"]: one["newTag"] for one in BASE_KUSTOMIZATION["images"]}
    assert tags == {"scopegate": __version__, "your-backend": "1"}
    assert COMPOSE["services"]["backend"]["image"] == BACKEND["image"] == "your-backend:1"
    for told in ("Dockerfile", "README.md", "config/deploy/README.md"):
        named = re.findall(r"scopegate:(\d[\w.]*)", (ROOT / told).read_text(encoding="utf-8"))
        assert set(named) == {__version__}, told


# systemd --------------------------------------------------------------------------------------------------


def unit() -> dict[str, list[str]]:
    """The settings of the unit's sections together; a key may stand more than once."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit with a program that is there."""
    text = UNIT.read_text(encoding="utf-8")
    program = "/opt/scopegate/bin/scopegate"
    assert f"ExecStart={program} run" in text
    copy = tmp_path / UNIT.name
    copy.write_text(text.replace(f"ExecStart={program}", f"ExecStart={tool('true')}"))
    return copy


def test_systemd_finds_nothing_wrong_with_the_unit(installed: Path) -> None:
    analyze = tool("systemd-analyze")
    verified = run(analyze, "verify", installed)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")
    # It exits 0 for a key that it does not know, too: what it says is what counts.
    installed.write_text(installed.read_text().replace("ProtectSystem=", "ProtectSytsem="))
    assert "Unknown key" in run(analyze, "verify", installed).stderr


def test_systemd_rates_the_exposure_of_the_unit_as_low(installed: Path) -> None:
    rated = run(tool("systemd-analyze"), "security", "--offline=true", "--threshold=15", installed)
    assert rated.returncode == 0, rated.stdout


def test_the_unit_runs_what_the_readme_runs_and_reloads_by_the_signal() -> None:
    settings_ = unit()
    (start,) = settings_["ExecStart"]
    assert shlex.split(start)[1:] == ["run", "--config", "/etc/scopegate/scopegate.yaml"]
    assert settings_["ExecReload"] == ["/bin/kill -HUP $MAINPID"]


def test_the_unit_waits_for_the_drain_and_does_not_repeat_a_wrong_configuration() -> None:
    settings_ = unit()
    default = settings.default("http://127.0.0.1:9000")
    assert int(settings_["TimeoutStopSec"][0]) >= default.shutdown.drain_seconds + 5
    assert settings_["Restart"] == ["on-failure"]
    assert settings_["RestartPreventExitStatus"] == ["2"]
    assert settings_["StartLimitIntervalSec"] == ["0"]  # however long the trouble lasts


def test_the_configuration_that_the_unit_shows_keeps_the_store_in_the_one_folder_that_it_may_write_to(
    tmp_path: Path,
) -> None:
    settings_ = unit()
    assert settings_["ProtectSystem"] == ["strict"]
    assert "ReadWritePaths" not in settings_
    # In the file and nowhere else, or the other commands would look for another store.
    assert "Environment" not in settings_
    text = UNIT.read_text(encoding="utf-8")
    (shown,) = re.findall(
        r"^# Then write /etc/scopegate/scopegate\.yaml.*\n#\n((?:#   .+\n)+)#$", text, re.MULTILINE
    )
    config = tmp_path / "scopegate.yaml"
    config.write_text(re.sub(r"^#   ", "", shown, flags=re.MULTILINE))
    loaded = settings.load(config, environment={}, read_keys=False)
    assert loaded.warnings == ()
    (state,) = settings_["StateDirectory"]
    assert loaded.settings.store.file == Path(f"/var/lib/{state}/scopegate.db")


def test_a_folder_for_checkpoints_can_be_opened_as_the_unit_says(installed: Path) -> None:
    text = installed.read_text()
    assert text.count("\n#ReadWritePaths=/") == 1
    installed.write_text(text.replace("\n#ReadWritePaths=", "\nReadWritePaths="))
    verified = run(tool("systemd-analyze"), "verify", installed)
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


def test_cron_backs_up_by_the_program_the_user_and_the_configuration_of_the_unit() -> None:
    page = (ROOT / "config/reference/backup.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^\d+ \* \* \* \* (.+)$", page, re.MULTILINE)
    (start,) = unit()["ExecStart"]
    program, _, option, config = shlex.split(start)
    assert line.startswith(f"{unit()['User'][0]} {program} store backup ")
    assert f" {option} {config} " in line
    assert re.search(r"(?<!\\)%", line) is None  # to cron a bare % is the end of the line
