#!/usr/bin/env bash
# Checks the files that no compiler reads: the syntax of shell scripts, JSON and YAML, the files that they name, and the
# compose file where Docker is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for script in scripts/*.sh .ci/run; do
  bash -n "$script"
  [ -x "$script" ] || { echo "$script is not executable" >&2; exit 1; }
done

python=python3
"$python" -c 'import yaml' 2>/dev/null || python=/usr/bin/python3
"$python" - <<'PYTHON'
import glob, json, os, sys, yaml

failed = False

def must_exist(path, named_in):
    global failed
    if not os.path.exists(path):
        print(f"{named_in} names {path}, which is not there", file=sys.stderr)
        failed = True

for path in glob.glob("grafana/*.json") + glob.glob("schemas/*.json") + glob.glob("*.yml") + glob.glob("grafana/*.yml"):
    try:
        with open(path, encoding="utf-8") as file:
            json.load(file) if path.endswith(".json") else yaml.safe_load(file)
    except (ValueError, yaml.YAMLError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        failed = True
if failed:
    sys.exit(1)

with open("docker-compose.yml", encoding="utf-8") as file:
    services = yaml.safe_load(file)["services"].values()
for mount in (mount for service in services for mount in service.get("volumes", [])):
    if mount.startswith("./"):
        must_exist(mount.split(":")[0], "docker-compose.yml")
with open("grafana/prometheus.yml", encoding="utf-8") as file:
    for rules in yaml.safe_load(file).get("rule_files", []):
        must_exist(os.path.join("grafana", rules), "grafana/prometheus.yml")
with open(".dockerignore", encoding="utf-8") as file:
    for line in file:
        if line.startswith("!"):
            must_exist(line[1:].strip(), ".dockerignore")
sys.exit(failed)
PYTHON

if docker compose version >/dev/null 2>&1; then
  WEFT_JWT_SECRET=checked-for-syntax-only docker compose --profile metrics config --quiet
fi
