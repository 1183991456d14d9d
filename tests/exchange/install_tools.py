"""Installs the tools that read exports into a folder of their own: python install_tools.py FOLDER

What the environment has already is not installed again, whatever version a tool asks for, and is not shadowed: the
folder is appended to `sys.path`. A tool that cannot be installed is one line here, and the reason why its tests skip;
`make test-exchange` tries those again the next time.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# By the name under which the tests import it.
TOOLS = {
    "scanpy": ["scanpy"],
    "squidpy": ["squidpy>=1.6"],
    "spatialdata": ["spatialdata>=0.5"],
    "geopandas": ["geopandas"],
    "polars": ["polars"],
    "duckdb": ["duckdb"],
    "geojson": ["geojson"],
    "geojson_pydantic": ["geojson-pydantic"],
}
# Of hs2p and slide2vec, only the code that reads and writes their files: their encoders need several GB more.
BARE = {"hs2p": ["hs2p"], "slide2vec": ["slide2vec", "omegaconf", "antlr4-python3-runtime==4.9.3"]}
MISSING = "not_installed.json"  # in the folder: reasons by name; it exists when everything was tried
# All that the tools need, as pip resolves it. Of the environment's versions, only those of the shared libraries count.
_SHARED = r"(numpy|pandas|anndata|zarr|pyarrow|torch|h5py|scipy|scikit-learn)=="


class Refused(Exception):
    """pip did not install something; the text is its reason, in one line."""


def main() -> int:
    """Install what can be, and report the rest."""
    folder = Path(sys.argv[1])
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        shared = [line for line in Path("constraints.txt").read_text().splitlines() if re.match(_SHARED, line)]
        (work / "constraints.txt").write_text("\n".join(shared))
        try:
            wanted = resolved([part for parts in TOOLS.values() for part in parts], work)
        except Refused:  # of which tool, pip does not say
            wanted = []
            for tool, parts in TOOLS.items():
                try:
                    known = {part.partition("==")[0] for part in wanted}
                    wanted += [part for part in resolved(parts, work) if part.partition("==")[0] not in known]
                except Refused as exc:
                    missing[tool] = str(exc)
        new = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for tools, parts in ((list(TOOLS), wanted), *(([tool], parts) for tool, parts in BARE.items())):
            try:
                if parts:
                    pip("install", "--no-deps", "--target", str(new), *parts)
            except Refused as exc:
                missing = {**dict.fromkeys(tools, str(exc)), **missing}
        (new / MISSING).write_text(json.dumps(missing, indent=2) + "\n")
        before = folder / MISSING
        if before.is_file() and len(json.loads(before.read_text())) <= len(missing):
            shutil.rmtree(new)  # no better than what is there: no network this time, perhaps
        else:
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)
    for tool, reason in missing.items():
        print(f"{tool} cannot be installed, so its tests are skipped: {reason}", file=sys.stderr)
    return 0


def resolved(parts: list[str], work: Path) -> list[str]:
    """What pip would install for these, without what the environment has."""
    report = work / "report.json"
    pip("install", "--dry-run", "--report", str(report), "-c", str(work / "constraints.txt"), *parts)
    installed = {_plain(found.metadata["Name"]) for found in importlib.metadata.distributions()}
    items = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return [f"{item['name']}=={item['version']}" for item in items if _plain(item["name"]) not in installed]


def pip(*arguments: str) -> None:
    """Run pip; `Refused` is raised if it fails."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()
        raise Refused(" ".join((errors or ["pip failed"])[-1].split())[:300])


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
