#!/usr/bin/env bash
# Checks what no compiler reads: the syntax of shell scripts, JSON and YAML files, and the compose file where Docker is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for script in scripts/*.sh .ci/run; do
  bash -n "$script"
  [ -x "$script" ] || { echo "$script is not executable" >&2; exit 1; }
done

python=python3
"$python" -c 'import yaml' 2>/dev/null || python=/usr/bin/python3
"$python" - <<'PYTHON'
import glob, json, sys, yaml

failed = False
for path in glob.glob("grafana/*.json") + glob.glob("schemas/*.json") + glob.glob("*.yml") + glob.glob("grafana/*.yml"):
    try:
        with open(path, encoding="utf-8") as file:
            json.load(file) if path.endswith(".json") else yaml.safe_load(file)
    except (ValueError, yaml.YAMLError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        failed = True
sys.exit(failed)
PYTHON

if docker compose version >/dev/null 2>&1; then
  WEFT_JWT_SECRET=checked-for-syntax-only docker compose --profile metrics config --quiet
fi
