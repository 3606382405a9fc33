"""The deployment files fit each other and the repository. Their metrics: tests/serving."""

import json
import os
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "serving" / "deploy"
# Of the Compose specification, as far as the files use it.
SERVICE_KEYS = {
    "image", "build", "command", "environment", "volumes", "ports", "shm_size", "restart",
    "depends_on", "ipc", "deploy",
}  # fmt: skip


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


@pytest.fixture(scope="module")
def dashboard():
    return json.loads((DEPLOY / "grafana" / "dashboards" / "lola.json").read_text())


def host_path(volume):
    """The path on the host of a volume that is bound, variables at their defaults."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]


def test_services_are_well_formed_pinned_and_closed(compose):
    assert set(compose["services"]) == {"server", "prometheus", "grafana"}
    for service in compose["services"].values():
        assert set(service) <= SERVICE_KEYS
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


def test_the_images_listen_where_the_files_say(compose):
    server = compose["services"]["server"]
    dockerfile = (ROOT / server["build"]["dockerfile"]).read_text()
    (job,) = load("prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    assert job["metrics_path"] == "/metrics"
    assert "EXPOSE 8000" in dockerfile
    # The front that switches the routes and metrics on; vLLM's own would leave them off.
    assert 'ENTRYPOINT ["lola-vllm", "serve"]' in dockerfile
    # Its own default is the container alone, where no published port leads.
    assert "LOLA_VLLM_HOST=0.0.0.0" in dockerfile
    assert "--served-model-name=lola" in server["command"]


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


def test_grafana_finds_prometheus_and_the_dashboard(compose, dashboard):
    grafana = compose["services"]["grafana"]
    (source,) = load("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090" and source["type"] == "prometheus"
    (provider,) = load("grafana/provisioning/dashboards/lola.yaml")["providers"]
    mounted = dict(reversed(v.split(":")[:2]) for v in grafana["volumes"])
    assert mounted[provider["options"]["path"]] == "./grafana/dashboards"
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert (DEPLOY / "grafana" / "dashboards" / home.name).is_file()
    assert dashboard["title"] == "LoLA"


def test_panels_have_queries_names_and_places_of_their_own(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 10
    assert len({panel["title"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}"
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0
        for target in panel["targets"]:
            used = set(re.findall(r"\$\{?(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables
            assert target["expr"].count("(") == target["expr"].count(")")
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        apart = (
            one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        )  # fmt: skip
        assert apart and one["x"] + one["w"] <= 24


# Series of a healthy server, by minutes for 26 hours, and of servers of which one alert tells.
MINUTES = 26 * 60
SERVER = 'instance="server:8000", model_name="lola"'
HEALTHY = {
    'up{job="lola", instance="server:8000"}': f"1x{MINUTES}",
    f"lola:states_total{{{SERVER}}}": f"192x{MINUTES}",
    f"lola:states_used{{{SERVER}}}": f"20x{MINUTES}",
    f"vllm:num_requests_waiting{{{SERVER}}}": f"0x{MINUTES}",
    f"vllm:num_preemptions_total{{{SERVER}}}": f"0x{MINUTES}",
    f'vllm:time_to_first_token_seconds_bucket{{{SERVER}, le="1"}}': f"0+9x{MINUTES}",
    f'vllm:time_to_first_token_seconds_bucket{{{SERVER}, le="40"}}': f"0+10x{MINUTES}",
    f'vllm:time_to_first_token_seconds_bucket{{{SERVER}, le="+Inf"}}': f"0+10x{MINUTES}",
    f'lola:session_failures_total{{{SERVER}, reason="foreign"}}': f"0+1x{MINUTES}",
    f'lola:session_failures_total{{{SERVER}, reason="io"}}': f"0x{MINUTES}",
}
LATE = MINUTES - 60
TROUBLES = {
    "none": ({}, []),
    "down": ({"up": f"1x{LATE} 0x59"}, ["LolaServerDown"]),
    "without the plugin": ({"lola:states_total": "_"}, ["LolaMetricsMissing"]),
    "full": (
        {"lola:states_used": f"190x{MINUTES}", "vllm:num_requests_waiting": f"3x{MINUTES}"},
        ["LolaStatesFull"],
    ),
    "full, but nobody waits": ({"lola:states_used": f"190x{MINUTES}"}, []),
    "preempting": ({"vllm:num_preemptions_total": f"0+2x{MINUTES}"}, ["LolaPreemptions"]),
    "slow": ({'_bucket{instance="server:8000", model_name="lola", le="1"': f"0+5x{MINUTES}"},
             ["LolaFirstTokenSlow"]),
    "full disk": ({'reason="io"': f"0x{LATE} 0+1x59"}, ["LolaStatesNotStored"]),
}  # fmt: skip


def promtool(*arguments):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)


def test_prometheus_accepts_its_configuration_and_finds_the_alerts(compose):
    (mounted,) = (
        {host_path(v): v.split(":")[1] for v in service["volumes"]}
        for name, service in compose["services"].items()
        if name == "prometheus"
    )
    assert load("prometheus.yml")["rule_files"] == ["alerts.yml"]  # beside the configuration
    assert mounted["./prometheus.yml"] == "/etc/prometheus/prometheus.yml"
    assert mounted["./alerts.yml"] == "/etc/prometheus/alerts.yml"
    checked = promtool("check", "config", DEPLOY / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_alert_has_its_trouble():
    (group,) = load("alerts.yml")["groups"]
    names = [rule["alert"] for rule in group["rules"]]
    assert sorted(names) == sorted(name for _, fired in TROUBLES.values() for name in fired)
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]


@pytest.mark.parametrize(("trouble", "fired"), TROUBLES.values(), ids=TROUBLES)
def test_alerts_tell_of_their_trouble_and_of_nothing_else(tmp_path, trouble, fired):
    assert all(any(part in series for series in HEALTHY) for part in trouble)
    series = [
        {"series": name, "values": next((v for part, v in trouble.items() if part in name), usual)}
        for name, usual in HEALTHY.items()
    ]
    asked = {
        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": f"{MINUTES - 5}m",
        "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in fired],
    }
    test = {"interval": "1m", "input_series": series, "promql_expr_test": [asked]}
    file = tmp_path / "test.yml"
    rules = [str(DEPLOY / "alerts.yml")]
    file.write_text(json.dumps({"rule_files": rules, "tests": [test]}))
    ran = promtool("test", "rules", file)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]])
def test_compose_itself_accepts_the_files(files):
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker with its compose plugin is not installed")
    options = [part for name in files for part in ("-f", str(DEPLOY / name))]
    env = {**os.environ, "GRAFANA_PASSWORD": "x"}
    subprocess.run(["docker", "compose", *options, "config", "--quiet"], check=True, env=env)
