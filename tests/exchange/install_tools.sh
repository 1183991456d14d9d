#!/bin/sh
# Installs the tools that read exports into a folder of their own: sh install_tools.sh PYTHON FOLDER
# What the environment has already is not installed again, whatever version a tool asks for, and is not shadowed: the
# folder is appended to sys.path.
set -eu
python=$1 folder=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip="$python -m pip --disable-pip-version-check"
# All that the tools need, as pip resolves it. Of the environment's versions, only those of the shared libraries count.
grep -E '^(numpy|pandas|anndata|zarr|pyarrow|torch|h5py|scipy|scikit-learn)==' constraints.txt > "$work/constraints.txt"
$pip install --quiet --dry-run --report "$work/report.json" -c "$work/constraints.txt" scanpy "squidpy>=1.6" "spatialdata>=0.5" geopandas
"$python" - "$work/report.json" > "$work/list.txt" <<'PY'
import importlib.metadata, json, re, sys

plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()
installed = {plain(found.metadata["Name"]) for found in importlib.metadata.distributions()}
for item in json.load(open(sys.argv[1]))["install"]:
    if plain(item["metadata"]["name"]) not in installed:
        print(f"{item['metadata']['name']}=={item['metadata']['version']}")
PY
$pip install --quiet --no-deps --target "$folder" -r "$work/list.txt"
# Of hs2p and slide2vec, only the code that reads and writes their files: their encoders need several GB more.
$pip install --quiet --no-deps --target "$folder" hs2p slide2vec omegaconf "antlr4-python3-runtime==4.9.3"
