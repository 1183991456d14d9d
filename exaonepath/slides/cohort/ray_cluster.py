"""Connecting to a Ray cluster, and finding out before the work begins whether it can do it."""

from __future__ import annotations

import logging
import os
import platform
import secrets
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exaonepath.errors import ClusterError, MissingDependencyError, SettingsError
from exaonepath.files.atomic import ensure_folder, temporary_name
from exaonepath.processors import usable_processors
from exaonepath.version import __version__

logger = logging.getLogger(__name__)

_ANSWERS_WITHIN = 5.0  # seconds for a connection to the address
_PROBED_WITHIN = 120.0  # seconds for all nodes to look at the paths
_MOST_FOLDERS = 1000  # of slides that each node looks at
_LOCAL_STORE = 512 << 20  # bytes of the object store of a cluster that is started here


@dataclass(frozen=True)
class RayOptions:
    """A Ray cluster, and what a run uses of it.

    Attributes:
        address: "local": a cluster of this machine, which ends with the run; "auto": the cluster that this machine is a
            node of; or HOST:PORT of its head node.
        readers: tasks that read slides at the same time, about; None: as many as the processors suffice for.
        encoders: actors; None: one for each GPU, or one for each node with two processors where there are none.
        device: of the encoders, "auto", "cpu" or "cuda".
        encoder_cpus: processors of each encoder.
        wait: seconds to wait for nodes with the resources, as an autoscaler may start them.
    """

    address: str = "local"
    readers: int | None = None
    encoders: int | None = None
    device: str = "auto"
    encoder_cpus: int = 1
    wait: float = 30.0


def ray_options(
    engine: str,
    device: str = "auto",
    devices: str | None = None,
    jobs: int = 1,
    address: str | None = None,
    readers: int | None = None,
    encoders: int | None = None,
    wait: float = 30.0,
) -> RayOptions | None:
    """The options of a Ray cluster for those of a command; None for the engine "local".

    Raises:
        SettingsError: there is no such engine, or an option is given that it does not have.
    """
    if engine not in ("local", "ray"):
        raise SettingsError(f"the engine is local or ray, not {engine!r}")
    if engine == "ray":
        if devices is not None or jobs != 1:
            raise SettingsError("--devices and --jobs are of --engine local; on a Ray cluster, use --encoders")
        return RayOptions(address or "auto", readers, encoders, device, wait=wait)
    for name, value in (("--address", address), ("--readers", readers), ("--encoders", encoders)):
        if value is not None:
            raise SettingsError(f"{name} needs --engine ray")
    return None


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    id: str
    host: str
    cpus: float
    gpus: float


def import_ray() -> Any:
    """The module `ray`.

    Raises:
        MissingDependencyError: it is not installed.
    """
    # Read when the module is imported. An address at which something else than Ray listens is given up after half a
    # minute instead of ten.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    try:
        import ray
    except ImportError as exc:
        raise MissingDependencyError(
            "--engine ray needs the package ray; install it with: pip install 'exaonepath[cluster]'"
        ) from exc
    return ray


@contextmanager
def connected(options: RayOptions) -> Iterator[None]:
    """Connect to the cluster for the duration of a block; a connection that exists already is used, and kept.

    Raises:
        MissingDependencyError: Ray is not installed.
        ClusterError: nobody answers, or Ray or Python have other versions there.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    address = options.address
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _silence(ray)
        if address == "local":
            _start_local(ray, options)
        else:
            _connect(ray, address)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has installed its own
    try:
        yield
    finally:
        ray.shutdown()


def _start_local(ray: Any, options: RayOptions) -> None:
    # At least one processor for an encoder and one for a reader: they take turns where there is only one.
    cpus = max(usable_processors(), 1 + options.encoder_cpus)
    with _clear(options.address):
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=_LOCAL_STORE,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


def _connect(ray: Any, address: str) -> None:
    if "://" in address:
        raise ClusterError(
            f"{address}: Ray's client protocol is not supported; start the run on a node of the cluster, with `ray job "
            "submit`, for example, and name there --address auto, or HOST:PORT of the head node"
        )
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise ClusterError(f"the address of a Ray cluster is local, auto or HOST:PORT, not {address!r}")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWERS_WITHIN).close()
        except OSError as exc:
            raise ClusterError(
                f"nobody answers at {address} ({exc.strerror or exc}); `ray start --head` prints the address of a "
                "cluster, and its port is usually 6379"
            ) from exc
    with _clear(address):
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)


@contextmanager
def _clear(address: str) -> Iterator[None]:
    """Raise what Ray raises as one clear error."""
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError, OSError) as exc:
        text = str(exc)
        if "ersion mismatch" in text:
            parts = [line.strip() for line in text.splitlines() if ":" in line and "mismatch" not in line]
            raise ClusterError(
                f"the cluster at {address} has another version of Ray or Python than this process; use the same on all "
                "nodes",
                parts,
            ) from exc
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reason = lines[0] if lines else type(exc).__name__
        raise ClusterError(f"no Ray cluster can be used at {address}: {reason}") from exc


def _silence(ray: Any) -> None:
    """Keep Ray from writing the last words of a dead node to standard output, where results are listed."""
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda data, *_, **__: logger.debug("Ray: %s", data)


def nodes() -> list[Node]:
    """The nodes that are alive."""
    import ray

    found = []
    for each in ray.nodes():
        if each["Alive"]:
            has = each["Resources"]
            host = each.get("NodeManagerHostname") or each.get("NodeManagerAddress", "")
            found.append(Node(each["NodeID"], host, has.get("CPU", 0.0), has.get("GPU", 0.0)))
    return found


def table(found: Sequence[Node]) -> list[str]:
    """A line for each node."""
    return [f"{node.host} ({node.id[:8]}): {node.cpus:g} CPU, {node.gpus:g} GPU" for node in found]


def check_nodes(out: Path, slides: Sequence[Path], options: RayOptions) -> None:
    """Have every node that may be used look at the versions and the paths.

    Args:
        out: output folder, absolute.
        slides: slide files, absolute; one of each folder is looked at.

    Raises:
        ClusterError: a node has another version, does not see the same output folder or the slides, or does not answer;
            all problems at once.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    one_each = list({path.parent: path for path in reversed(slides)}.values())[:_MOST_FOLDERS]
    ensure_folder(out)
    marker, secret = temporary_name(out / "cluster"), secrets.token_hex(8)
    marker.write_text(secret, encoding="ascii")
    try:
        probe = ray.remote(_probe_function())
        asked: dict[Any, Node] = {}
        for node in nodes():
            if node.cpus or node.gpus:
                strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
                remote = probe.options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
                asked[remote.remote(str(marker), secret, [str(path) for path in one_each])] = node
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_PROBED_WITHIN) if asked else ([], [])
        problems: list[str] = []
        alive = {node.id for node in nodes()}
        for ref in answered:
            try:
                answer = ray.get(ref)
            except ray.exceptions.RayError as exc:
                if asked[ref].id in alive:
                    problems.append(f"{asked[ref].host}: {str(exc).strip().splitlines()[-1]}")
                continue
            problems += _problems(asked[ref].host, answer, out, len(one_each))
        problems += [f"{asked[ref].host} does not answer" for ref in silent if asked[ref].id in alive]
    finally:
        marker.unlink(missing_ok=True)
    if problems:
        raise ClusterError("nodes of the Ray cluster cannot take part:", sorted(set(problems)))


def _probe_function() -> Any:
    # A function inside a function is sent to the nodes itself: those may lack this module, or have another version.
    def probe(marker: str, secret: str, slides: list[str]) -> dict[str, Any]:
        import importlib
        import os
        import platform

        try:
            version = importlib.import_module("exaonepath.version").__version__
        except ImportError:
            version = None
        try:
            with open(marker, encoding="ascii") as file:  # noqa: PTH123
                same = file.read() == secret
        except (OSError, ValueError):
            same = False
        missing = [path for path in slides if not os.path.exists(path)]  # noqa: PTH110
        return {
            "version": version,
            "python": platform.python_version(),
            "same": same,
            "writable": os.access(os.path.dirname(marker), os.W_OK),  # noqa: PTH120
            "missing": missing[:3],
            "n_missing": len(missing),
        }

    return probe


def _problems(host: str, answer: dict[str, Any], out: Path, n_slides: int) -> Iterator[str]:
    if answer["version"] is None:
        yield f"{host} has no exaonepath; install version {__version__}"
    elif answer["version"] != __version__:
        yield f"{host} has exaonepath {answer['version']}, this process {__version__}; install the same version"
    own = platform.python_version_tuple()[:2]
    if tuple(answer["python"].split(".")[:2]) != own:
        yield f"{host} has Python {answer['python']}, this process {platform.python_version()}"
    if not answer["same"]:
        yield f"{host} does not see the output folder {out}, or sees another one; it must lie on a shared file system"
    elif not answer["writable"]:
        yield f"{host} cannot write to {out}"
    if answer["n_missing"]:
        names = ", ".join(answer["missing"])
        more = ", ..." if answer["n_missing"] > len(answer["missing"]) else ""
        yield f"{host} does not see {answer['n_missing']} of {n_slides} slides looked at: {names}{more}"


def what_lacks(options: RayOptions, device: str, threads: int, placed: Mapping[str, int], wanted: int) -> str:
    """Why the cluster can never do the work with the nodes that it has now; empty if it can.

    Args:
        options, device: what each encoder asks for.
        threads: processors that each reader asks for.
        placed: number of encoders that run now, by node.
        wanted: encoders that have to find a place, in all.
    """
    free: list[tuple[float, float]] = []
    room = sum(placed.values())
    for node in nodes():
        own = placed.get(node.id, 0)
        cpus, gpus = node.cpus - own * options.encoder_cpus, node.gpus - own * (device == "cuda")
        while room < wanted and cpus >= options.encoder_cpus and (device != "cuda" or gpus >= 1):
            # The first one anywhere; more where they leave a reader its processors.
            if room and cpus - options.encoder_cpus < threads:
                break
            cpus, gpus, room = cpus - options.encoder_cpus, gpus - (device == "cuda"), room + 1
        free.append((cpus, gpus))
    each = f"{options.encoder_cpus} CPU{' and 1 GPU' if device == 'cuda' else ''}"
    if not room:
        return f"an encoder asks for a node with {each}"
    if room < wanted or not any(cpus >= threads for cpus, _ in free):
        return f"{max(room, wanted)} encoders ask for {each} each, and a reader for a node with {threads} CPU besides"
    return ""
