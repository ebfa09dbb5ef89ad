"""The image's steps by hand, for where no container engine runs. Needs Linux and root; leaves nothing behind.

    python -m tests.long.image [--python PREFIX]

Reads the Dockerfile and does what it says, instruction by instruction, in a clean folder and in namespaces
of its own: mounts, processes and network end with it. In the place of python:3.13-slim the base is this
machine's /usr, with the Python below PREFIX as /usr/local (less its bytecode, as in the official image). Then
entrypoint and command run as the image's user with the root read-only, before a backend on the same loopback.
Exit code 1 if anything does not hold. What an engine does and this does not: layers, seccomp, cgroups, names.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import glob
import json
import os
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sidecar import __version__
from tests.acceptance.conftest import EXECUTE, PROJECT, Backend, ask_json, execution, issue_scope
from tests.dockerfile import DoesNotHold, Instruction, context, expanded, instructions, pairs

# What pip may need to reach its index, from outside.
PIP_VARIABLES = re.compile(r"PIP_|SSL_CERT_|REQUESTS_CA_BUNDLE$|(https?|no|all)_proxy$", re.IGNORECASE)
PIP_FILES = ("etc/pip.conf", "root/.config/pip/pip.conf", "etc/ssl/certs", "etc/resolv.conf", "etc/hosts")
BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
READY_SECONDS = 30.0
STOP_SECONDS = 30.0
DATA, ADMIN, BACKEND = ("127.0.0.1", 8000), ("127.0.0.1", 9901), ("127.0.0.1", 9000)


# Building -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Stage:
    """One stage as far as it is built; the last one is the image."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": BASE_PATH})
    folder: str = "/"
    user: str = "0:0"
    labels: dict[str, str] = field(default_factory=dict)
    volumes: list[str] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    stop: str = "SIGTERM"
    health: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


class Build:
    def __init__(self, work: Path, prefix: Path) -> None:
        self._work, self._prefix = work, prefix
        self._context = work / "context"
        for name in context(PROJECT):
            (self._context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / name, self._context / name)
        self._variables: dict[str, str] = {}
        self._stages: dict[str, Stage] = {}

    def image(self) -> Stage:
        for step in instructions((PROJECT / "Dockerfile").read_text(encoding="utf-8")):
            print(f"  {step.line:>3}  {step.keyword} {re.sub(r' +', ' ', step.text)[:100]}", flush=True)
            if step.keyword == "FROM":
                self._from(step)
            elif step.keyword == "ARG":
                self._variables |= pairs(step.text, self._variables)
            else:
                stage = list(self._stages.values())[-1]
                self._do(step, stage)
        return stage

    def _from(self, step: Instruction) -> None:
        base, _, name = step.text.partition(" AS ")
        if not expanded(base, self._variables).startswith("python:"):
            raise step.refuse("is no base that this machine's Python can stand in for")
        root = self._work / f"stage-{len(self._stages)}"
        base_of(root, self._prefix)
        self._stages[name or "the last"] = Stage(root)

    def _do(self, step: Instruction, stage: Stage) -> None:
        variables = self._variables | stage.environment
        match step.keyword:
            case "WORKDIR":
                stage.folder = step.text
                (stage.root / step.text.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "COPY":
                self._copy(step, stage)
            case "RUN":
                if stage.user != "0:0":
                    raise step.refuse("comes after USER")
                outside = {key: value for key, value in os.environ.items() if PIP_VARIABLES.match(key)}
                inside = ["chroot", str(stage.root), "env", "-C", stage.folder, "/bin/sh", "-c", step.text]
                subprocess.run(
                    inside,
                    env={"HOME": "/root", "PIP_QUIET": "2", **outside, **stage.environment},
                    check=True,
                )
            case "LABEL":
                stage.labels |= pairs(step.text, variables)
            case "ENV":
                stage.environment |= pairs(step.text, variables)
            case "USER":
                stage.user = step.text
            case "VOLUME":
                stage.volumes.append(step.text)
            case "EXPOSE":
                stage.ports += map(int, step.text.split())
            case "STOPSIGNAL":
                stage.stop = step.text
            case "HEALTHCHECK":
                command = Instruction(step.line, "CMD", step.text.partition(" CMD ")[2].strip())
                stage.health = command.listed()
            case "ENTRYPOINT":
                stage.entrypoint = step.listed()
            case "CMD":
                stage.command = step.listed()

    def _copy(self, step: Instruction, stage: Stage) -> None:
        words = step.text.split()
        source = self._context
        if words[0].startswith("--from="):
            source = self._stages[words.pop(0).removeprefix("--from=")].root
        if any(word.startswith("--") for word in words):
            raise step.refuse("has an option that this script does not know")
        *names, target = words
        place = stage.root / os.path.join(stage.folder, target).lstrip("/")
        for name in names:
            found = glob.glob(name.strip("/"), root_dir=source)
            if not found:
                raise step.refuse(f"{name} is not in the build context")
            for one in found:
                if (source / one).is_dir():
                    shutil.copytree(source / one, place, symlinks=True, dirs_exist_ok=True)
                elif target.endswith("/"):
                    place.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(source / one, place)
                else:
                    raise step.refuse("copies a file to something that is no folder")


def base_of(root: Path, prefix: Path) -> None:
    """A root with what python:3.13-slim has, out of what this machine has."""
    root.mkdir()
    mount("--bind", root, root)
    for name in ("usr", "etc", "proc", "dev", "root", "run", "tmp", "var/tmp", "var/lib"):
        (root / name).mkdir(parents=True)
    for name in ("tmp", "var/tmp"):
        (root / name).chmod(0o1777)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    mount("--bind", "/usr", root / "usr")
    mount("-o", "remount,bind,ro", root / "usr")
    python = root.with_name(f"{root.name}-python")
    shutil.copytree(prefix, python, symlinks=True, ignore=_not_in_slim)
    for script in (python / "bin").iterdir():
        if script.is_file() and script.read_bytes()[:2] == b"#!":
            script.write_text(script.read_text().replace(str(prefix), "/usr/local"))
    mount("--bind", python, root / "usr/local")
    mount("-t", "proc", "proc", root / "proc")
    mount("-t", "tmpfs", "dev", root / "dev")
    for device in ("null", "zero", "random", "urandom"):
        (root / "dev" / device).touch()
        mount("--bind", f"/dev/{device}", root / "dev" / device)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    for name in ("etc/ld.so.conf", "etc/ld.so.conf.d", "etc/nsswitch.conf", *PIP_FILES):
        source, target = Path("/") / name, root / name
        if source.is_dir():
            shutil.copytree(source, target)
        elif source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    subprocess.run(["ldconfig", "-r", root], check=True)


def _not_in_slim(folder: str, names: list[str]) -> set[str]:
    unwanted = {"__pycache__", "test", "tests", "idle_test"} & set(names)
    if os.path.basename(folder) == "site-packages":
        unwanted |= {name for name in names if not name.startswith("pip")}
    return unwanted


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


# Running ------------------------------------------------------------------------------------------------


class Container:
    """The image with its root read-only, but for its volumes."""

    def __init__(self, image: Stage) -> None:
        self._image = image
        self.log = image.root.with_name("log")
        for number, name in enumerate(image.volumes):
            place = image.root / name.lstrip("/")
            volume = image.root.with_name(f"volume-{number}")
            volume.mkdir()
            status = place.stat()
            os.chown(volume, status.st_uid, status.st_gid)
            volume.chmod(stat.S_IMODE(status.st_mode))
            mount("--bind", volume, place)
        for place in (image.root, image.root / "usr/local", image.root / "dev"):
            mount("-o", "remount,bind,ro", place)

    def start(self) -> subprocess.Popen[bytes]:
        image = self._image
        with self.log.open("wb") as log:
            return subprocess.Popen(
                self._inside([*image.entrypoint, *image.command]), env=image.environment, stderr=log
            )

    def run(self, *words: str, without: str = "") -> subprocess.CompletedProcess[str]:
        """Another command in it, as `exec` of an engine; to its end."""
        environment = {name: value for name, value in self._image.environment.items() if name != without}
        return subprocess.run(
            self._inside(words), env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    def _inside(self, words: Sequence[str]) -> list[str]:
        user, group = self._image.user.split(":")
        bare = ["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all", "--no-new-privs"]
        whom = [f"--reuid={user}", f"--regid={group}", "--clear-groups"]
        return ["chroot", str(self._image.root), "setpriv", *whom, *bare, "--", *words]


class Neighbour(Backend):
    """A backend where the image's configuration expects one."""

    def server_bind(self) -> None:
        self.server_address = BACKEND
        super().server_bind()


def network_of_its_own() -> None:
    """Nothing but loopback: the image's own ports are free here, whatever else runs on this machine."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket() as some:
        up = struct.pack("16sH14x", b"lo", 0x1)  # IFF_UP
        fcntl.ioctl(some, 0x8914, up)  # SIOCSIFFLAGS


def holds(what: str, held: object, seen: object = "") -> None:
    if not held:
        raise DoesNotHold(f"{what}: {seen}")
    print(f"  ok   {what}", flush=True)


def said(ended: subprocess.CompletedProcess[str]) -> str:
    return "; ".join(ended.stdout.split("\n")).strip("; ")


WRITES = """
import os, sys
for place in sys.argv[1:]:
    try:
        open(os.path.join(place, "written"), "w").close()
        os.unlink(os.path.join(place, "written"))
        print("yes", end=" ")
    except OSError as exc:
        print(exc.strerror, end="; ")
"""
SORTS = """
import sqlite3
store = sqlite3.connect("")
store.execute("PRAGMA cache_size = 10")
store.execute("CREATE TABLE t AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n"
              " WHERE i < 50000) SELECT i, hex(randomblob(20)) AS x FROM n")
print(len(store.execute("SELECT x FROM t ORDER BY x").fetchall()))
"""


def examine(image: Stage) -> None:
    print(f"Running {image.entrypoint + image.command} as {image.user}")
    network_of_its_own()
    container = Container(image)
    told = container.run("scopegate", "--version")
    holds("the command runs in it", told.returncode == 0, told)
    version = told.stdout.split()[-1]
    holds(
        "the label names the version",
        image.labels["org.opencontainers.image.version"] == version == __version__,
    )
    with Neighbour() as backend:
        program = container.start()
        try:
            _serves(container, program, backend)
            _is_confined(container, program)
            program.send_signal(signal.Signals[image.stop])
            code = program.wait(STOP_SECONDS)
            holds(f"{image.stop} ends it with exit code 0", code == 0, code)
        except BaseException:
            print(container.log.read_text(errors="replace"), file=sys.stderr)
            raise
        finally:
            program.kill()
            program.wait()
    stopped = container.run(*image.health)
    holds("the health check says so: exit code 3", stopped.returncode == 3, stopped)
    verified = container.run("scopegate", "log", "verify", "--config", image.command[-1])
    holds("log verify finds its log whole", verified.returncode == 0, verified)
    print(f"       {said(verified)}")


def _serves(container: Container, program: subprocess.Popen[bytes], backend: Backend) -> None:
    image = container._image
    end, began = time.monotonic() + READY_SECONDS, time.monotonic()
    while (asked := container.run(*image.health)).returncode != 0:
        if program.poll() is not None or time.monotonic() > end:
            raise DoesNotHold(f"it does not become ready: {asked}")
    holds(f"ready by its own health check after {time.monotonic() - began:.1f} s", True)
    began = time.monotonic()
    container.run(*image.health)
    print(f"       one health check takes {time.monotonic() - began:.2f} s; it says: {said(asked)}")
    told = [json.loads(line) for line in container.log.read_text().splitlines()]
    listens = {one["address"] for one in told if one["message"] == "listening"}
    wanted = {f"0.0.0.0:{port}" for port in image.ports} | {"127.0.0.1:9901"}
    holds("it listens on the exposed ports, and for admin on loopback", listens == wanted, listens)

    wish = {"incident_id": "inc-1", "action": "retry_agent", "intent": "a test"}
    passed = ask_json(DATA, "POST", "/api/v1/recovery/scope", wish)
    holds("a client of the data listener is granted no scope", b"scope_id" not in passed.body, passed)
    backend.seen.clear()
    bare = ask_json(DATA, "POST", EXECUTE, {"incident_id": "inc-1", "action": "retry_agent"})
    scoped = (bare.status, bare.json()["error"]) == (400, "scoped_execution_required")
    holds("A1 no scope: 400 scoped_execution_required", scoped, bare)
    terms = ["--incident-id", "inc-1", "--action", "retry_agent", "--intent", "a test"]
    created = container.run("scopegate", "scopes", "create", "-q", "--config", image.command[-1], *terms)
    holds("A2 a scope, by `scopegate scopes create` from within", created.returncode == 0, created)
    scope = created.stdout.strip()
    first = ask_json(DATA, "POST", EXECUTE, execution(scope))
    holds("A3 with it: 200 from the backend", (first.status, len(backend.seen)) == (200, 1), first)
    again = ask_json(DATA, "POST", EXECUTE, execution(scope))
    holds(
        "A4 again: 400 scope_exhausted",
        (again.status, again.json()["error"]) == (400, "scope_exhausted"),
        again,
    )
    other = ask_json(DATA, "POST", EXECUTE, {**execution(issue_scope(ADMIN)), "action": "restart_agent"})
    outside = (other.status, other.json()["error"]) == (403, "action_outside_scope")
    holds("A5 another action: 403 action_outside_scope", outside, other)
    holds("the backend saw one execution", len(backend.seen) == 1, backend.seen)


def _is_confined(container: Container, program: subprocess.Popen[bytes]) -> None:
    image = container._image
    lines = Path(f"/proc/{program.pid}/status").read_text().splitlines()
    status = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    user, group = image.user.split(":")
    holds(f"every user id is {user}", set(status["Uid"]) == {user}, status["Uid"])
    holds(f"every group id is {group}, no others", (set(status["Gid"]), status["Groups"]) == ({group}, []))
    capabilities = {int(status[f"Cap{kind}"][0], 16) for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")}
    holds("no capabilities, no way to new privileges", (capabilities, status["NoNewPrivs"]) == ({0}, ["1"]))
    print(f"       resident memory {int(status['VmRSS'][0]) / 1024:.0f} MiB, {status['Threads'][0]} threads")

    places = ["/", "/tmp", "/var/tmp", "/run", "/dev", "/etc/scopegate", "/opt/scopegate", "/usr/local"]
    tried = container.run("python", "-c", WRITES, *places, *image.volumes)
    refusals = tried.stdout.rstrip().split("; ")
    held = refusals.pop() == "yes" and len(refusals) == len(places)
    holds(
        f"written to is {', '.join(image.volumes)} only ({', '.join(sorted(set(refusals)))} elsewhere)",
        held,
        tried,
    )
    sorted_ = container.run("python", "-c", SORTS)
    holds("SQLite has a place for what it sorts", sorted_.stdout.strip() == "50000", sorted_)
    nowhere = container.run("python", "-c", SORTS, without="TMPDIR")
    holds("and without TMPDIR it would have none", nowhere.returncode != 0, nowhere)
    print("       " + nowhere.stderr.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", type=Path, default=Path(sys.base_prefix), metavar="PREFIX")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("needs root, for namespaces and mounts")
    if not (arguments.python / "bin/pip").exists() or arguments.python == Path("/usr"):
        sys.exit(f"{arguments.python} holds no Python with pip of its own; name another one by --python")
    if arguments.work is None:
        own = [
            "unshare",
            "--mount",
            "--propagation=private",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        again = [sys.executable, "-m", "tests.long.image", "--python", arguments.python.resolve()]
        with tempfile.TemporaryDirectory(prefix="scopegate-image-") as work:
            ended = subprocess.run([*own, *again, "--work", work], cwd=PROJECT, check=False)
        sys.exit(ended.returncode)
    try:
        os.umask(0o022)
        began = time.monotonic()
        print(f"Building in the place of python:3.13-slim on {arguments.python}")
        image = Build(arguments.work, arguments.python).image()
        print(f"  built in {time.monotonic() - began:.0f} s")
        examine(image)
    except (DoesNotHold, subprocess.CalledProcessError) as exc:
        print(f"DOES NOT HOLD: {exc}", file=sys.stderr)
        sys.exit(1)
    print("The image's steps, its entrypoint and its confinement hold.")


if __name__ == "__main__":
    main()
