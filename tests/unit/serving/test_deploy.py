"""The deployment files fit each other and the repository. Their metrics: tests/serving."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "serving" / "deploy"


def load(name):
    return yaml.safe_load((DEPLOY / name).read_text())


def merged(base, over):
    """As Compose merges two files: mappings by key, anything else replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {k: merged(base.get(k), over.get(k)) for k in {**base, **over}}
    return base if over is None else over


COMPOSE = {
    "cpu": load("compose.yaml"),
    "gpu": merged(load("compose.yaml"), load("compose.gpu.yaml")),
}


@pytest.fixture(params=COMPOSE, name="compose")
def _compose(request):
    return COMPOSE[request.param]


def host_path(volume):
    """The path on the host of a volume that is bound, variables at their defaults."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]


def test_services_are_well_formed_pinned_and_closed(compose):
    assert set(compose["services"]) == {"server", "prometheus", "grafana"}
    for service in compose["services"].values():
        assert set(service.get("depends_on", [])) <= set(compose["services"])
        assert re.fullmatch(r"[a-z./-]+(:v?\d+\.\d+\.\d+)?", service["image"])
        assert "build" in service or ":" in service["image"]
        (port,) = service["ports"]
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)
    password = compose["services"]["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"]
    assert password.startswith("${GRAFANA_PASSWORD:?")  # there is no default


RUNNING = ("Dockerfile", "Dockerfile.cpu", "docs/howto/docker.md")  # files that must show it


@pytest.mark.parametrize("name", ["README.md", "serving/deploy", "docs", "docs/howto", *RUNNING])
def test_no_command_publishes_a_server_to_the_network(name):
    path = ROOT / name
    files = [*path.glob("*.yaml"), *path.glob("*.md")] if path.is_dir() else [path]
    runs = [line for f in files for line in f.read_text().splitlines() if "docker run" in line]
    assert runs or name not in RUNNING
    for line in runs:
        assert re.search(r"-p 127\.0\.0\.1:\d+:\d+ ", line), line
        assert "--shm-size" in line or "--ipc=host" in line, line


@pytest.mark.parametrize(
    "path",
    [".env", "serving/deploy/.env", ".env.local", "compose.override.yaml",
     "serving/deploy/compose.override.yaml", "docker-compose.override.yml", ".git", "models"],
)  # fmt: skip
def test_secrets_and_bulk_stay_out_of_images(path):
    patterns = (ROOT / ".dockerignore").read_text().split()
    regexes = [re.escape(p).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*") for p in patterns]
    assert any(re.fullmatch(regex, path) for regex in regexes)


def test_what_is_built_and_mounted_is_there(compose):
    build = compose["services"]["server"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    for service in compose["services"].values():
        for volume in service["volumes"]:
            host = host_path(volume)
            if host.startswith("."):
                assert (DEPLOY / host).exists(), volume
            elif not host.startswith("/"):
                assert host in compose["volumes"], volume


def test_states_are_in_a_volume_that_only_the_server_reads(compose):
    server = compose["services"]["server"]
    (directory,) = [
        part.partition("=")[2] for part in server["command"] if part.startswith("--lola-state-dir=")
    ]
    assert f"states:{directory}" in server["volumes"] and "states" in compose["volumes"]
    assert not any("states" in volume for name, service in compose["services"].items()
                   for volume in service["volumes"] if name != "server")  # fmt: skip
    # A new volume has the owner and the mode of the image's directory.
    lines = (ROOT / server["build"]["dockerfile"]).read_text().splitlines()
    (made,) = [
        i for i, line in enumerate(lines) if f"install -d -m 700 -o lola {directory}" in line
    ]
    assert made < lines.index("USER lola")
