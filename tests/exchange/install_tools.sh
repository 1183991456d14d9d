#!/bin/sh
# Installs the tools that read exports into a folder of their own: sh install_tools.sh PYTHON FOLDER
# What the environment has already is not installed again, and is not shadowed: the folder is appended to sys.path.
set -eu
python=$1 folder=$2
list=$(mktemp)
trap 'rm -f "$list"' EXIT
# With all that they need, as pip resolves it against the environment.
"$python" -m pip install --quiet --disable-pip-version-check --dry-run --report "$list" -c constraints.txt scanpy squidpy spatialdata geopandas
"$python" - "$list" <<'PY' > "$list.txt"
import json, sys
for item in json.load(open(sys.argv[1]))["install"]:
    name = item["metadata"]["name"]
    if name.lower() not in ("imagecodecs", "torch", "numpy", "pandas", "anndata", "zarr"):
        print(f"{name}=={item['metadata']['version']}")
PY
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" -r "$list.txt"
# Of hs2p and slide2vec, only the code that reads and writes their files: their encoders need several GB more.
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" hs2p slide2vec omegaconf "antlr4-python3-runtime==4.9.3"
rm -f "$list.txt"
