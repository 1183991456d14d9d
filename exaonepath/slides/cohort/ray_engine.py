"""The Ray engine: a cohort on many machines. Tasks read slides, actors encode them; files are as with one process.

This process, the driver, hands out the slides (see `Dispatcher`) and watches over the encoder actors. Each of them
claims its slides, has them read by tasks on any node, encodes the patches and writes the files: the output folder and
the slides lie on a file system that all nodes share. No node is needed to go on: what is finished, or stored of a
slide, is what lies in the output folder.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from exaonepath.errors import ClusterError, DeviceError, ExaonePathError, OutputError, SettingsError
from exaonepath.slides.cohort.claim_file import read_claim
from exaonepath.slides.cohort.dispatch import CohortWork, Dispatcher, Worker
from exaonepath.slides.cohort.local import SlideProgress
from exaonepath.slides.cohort.outcome import SlideOutcome
from exaonepath.slides.cohort.ray_cluster import RayOptions, check_nodes, connected, nodes, table, what_lacks
from exaonepath.slides.cohort.ray_encoder import EncoderActor
from exaonepath.slides.cohort.ray_reading import ReaderOptions
from exaonepath.slides.cohort.ray_tasks import Place
from exaonepath.slides.cohort.run_log import RunLog
from exaonepath.slides.cohort.schedule import Task
from exaonepath.version import __version__

logger = logging.getLogger(__name__)

_LOOK_EVERY = 1.0  # seconds between two looks at the cluster
_GRACE = 60.0  # seconds that encoders have to end in an orderly way


@dataclass(eq=False)
class _Encoder(Worker):
    """An encoder actor, with references to its next messages and to the end of its work.

    `place`, `space` and `started` identify its process, once it runs.
    """

    actor: Any = field(kw_only=True)
    messages: Any = field(kw_only=True)
    work: Any = field(kw_only=True)
    place: Place | None = None
    space: str = ""
    started: str = ""


def encode_on_ray(
    work: CohortWork, cluster: RayOptions, progress: SlideProgress | None = None
) -> Iterator[SlideOutcome]:
    """Work on the slides of a cohort on a Ray cluster, the largest slides first.

    Args:
        work: what is to be done. All paths, and weights that are a folder, mean the same on all nodes, which must be
            able to import `load` and `initialize`. `settings.num_workers` is the number of threads, and of processors,
            of each task that reads.
        cluster: see `RayOptions`.
        progress: called with (slide, patches done, total patches).

    Yields:
        What became of each slide; exactly one outcome a slide (see `encode_cohort`).

    Raises:
        MissingDependencyError: Ray is not installed.
        ClusterError: nobody answers at the address; other versions on the nodes; a node does not see the paths; no node
            has the processors or GPUs; all of them are gone.
        DeviceError, SettingsError: options that this engine does not have.
        OutputError, WorkerError, ExaonePathError: see `encode_with_workers`.
    """
    if work.options.stage is not None:
        raise SettingsError("local copies of slides (--stage) are not made on a Ray cluster")
    if cluster.device not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"on a Ray cluster the device is auto, cpu or cuda, not {cluster.device!r}")
    work = _with_full_paths(work)
    with connected(cluster):
        threads = max(1, work.settings.num_workers or 1)
        device, encoders = _wait_for_nodes(cluster, threads)
        check_nodes(work.out, [slide.path for slide in work.slides], cluster)
        outcomes = _RayRun(work, device, encoders, cluster, threads).run(progress)
        try:
            yield from outcomes
        finally:
            outcomes.close()


class _RayRun(Dispatcher[_Encoder]):
    engine = "ray"

    def __init__(self, work: CohortWork, device: str, encoders: int, cluster: RayOptions, threads: int) -> None:
        super().__init__(work, ["cuda:0" if device == "cuda" else "cpu"] * encoders, cluster.encoder_cpus)
        self._device, self._cluster, self._threads = device, cluster, threads
        readers = cluster.readers
        if readers is None:
            cpus = sum(node.cpus for node in nodes()) - encoders * cluster.encoder_cpus
            readers = max(1, int(cpus // threads))
        # Of the readers of an encoder, one half reads the slide that it encodes, the other half the next one.
        tasks = max(1, readers // (2 * encoders))
        self._reading = ReaderOptions(threads, tasks, work.options.read_ahead_bytes)
        self._looked = self._complete_at = time.monotonic()

    def _begin(self) -> None:
        for device in self._devices[: max(1, len(self._slides))]:
            self._start(device)

    def _start(self, device: str) -> None:
        import ray

        kind = ray.remote(
            num_cpus=self._cluster.encoder_cpus,
            num_gpus=1 if self._device == "cuda" else 0,
            max_restarts=0,
            max_task_retries=0,
            concurrency_groups={"messages": 4},
            scheduling_strategy="SPREAD",
        )(EncoderActor)
        actor = kind.remote(__version__)
        work = actor.work.remote(replace(self._config, device=device), self._reading, str(Path.cwd()))
        self._workers.append(_Encoder(device, actor=actor, messages=_ask(actor), work=work))

    def _send(self, worker: _Encoder, message: Task | None) -> None:
        worker.actor.give.options(concurrency_group="messages").remote(message)  # its death is noticed elsewhere

    def _receive(self, delay: float, progress: SlideProgress | None, log: RunLog) -> None:
        import ray

        waiting = {worker.messages: worker for worker in self._workers}
        # One that is ready ends the wait; then all that are ready: none is left out because others have more to say.
        ray.wait(list(waiting), timeout=max(0.01, min(delay, _LOOK_EVERY)))
        for ref in ray.wait(list(waiting), num_returns=len(waiting), timeout=0)[0]:
            worker = waiting[ref]
            try:
                messages = ray.get(ref)
            except ray.exceptions.RayTaskError as exc:
                raise _not_begun(exc) from None
            except ray.exceptions.RayError as exc:
                self._dead(worker, exc, log)
                continue
            for message in messages:
                self._handle_here(worker, message, progress, log)
            if worker.ended:
                _kill(worker)
                self._remove(worker, "ended", True, log)
            else:
                worker.messages = _ask(worker.actor)
        if time.monotonic() - self._looked >= _LOOK_EVERY:
            self._look_at_the_work()
            self._look_at_the_cluster()
            self._looked = time.monotonic()

    def _handle_here(
        self, worker: _Encoder, message: tuple[Any, ...], progress: SlideProgress | None, log: RunLog
    ) -> None:
        kind, *values = message
        if kind == "hello":
            worker.place, worker.space, worker.started = values
            log.write("encoder", node=values[0].node, host=values[0].host, pid=values[0].pid, device=worker.device)
        elif kind == "reading":
            name, stage, place = values
            log.write("reading", slide=name, stage=stage, node=place.node, host=place.host, pid=place.pid)
        elif kind == "log":
            logger.log(values[0], "%s: %s", worker.place.host if worker.place else "?", values[1])
        elif kind == "stopped":  # by somebody else than this process
            worker.ended = True
        else:
            self._handle(worker, message, progress)

    def _dead(self, worker: _Encoder, exc: Exception, log: RunLog) -> None:
        _kill(worker)  # it may only be out of reach; then it must not go on working
        where = f" on {worker.place.host} (node {worker.place.node[:8]})" if worker.place is not None else ""
        reason = f"was lost{where}: {type(exc).__name__}"
        logger.debug("%s: %s", reason, exc)
        self._remove(worker, reason, False, log)

    def _stale(self, worker: _Encoder, task: Task) -> bytes | None:
        """The claim of an actor that Ray knows to be dead: nobody has to wait until it is not renewed."""
        if self._leases is None or worker.place is None:
            return None
        with suppress(OutputError):
            claim = read_claim(self._leases.path(task.slide.id))
            holder = None if claim is None else claim.holder
            if claim is not None and holder is not None:
                owner = (holder.pid, holder.space, holder.started)
                return claim.content if owner == (worker.place.pid, worker.space, worker.started) else None
        return None

    def _look_at_the_work(self) -> None:
        """Raise an error if an encoder could not even begin; it sends no message then."""
        import ray

        for worker in self._workers:
            if worker.place is None and ray.wait([worker.work], timeout=0)[0]:
                try:
                    ray.get(worker.work)
                except ray.exceptions.RayTaskError as exc:
                    raise _not_begun(exc) from None
                except ray.exceptions.RayError:
                    pass  # it died, which its messages show

    def _look_at_the_cluster(self) -> None:
        """Raise an error if the cluster cannot do the work any more; leave encoders alone for which nothing is left."""
        waiting = [worker for worker in self._workers if worker.place is None]
        if waiting and self._schedule.empty:
            for worker in waiting:
                _kill(worker)
                self._workers.remove(worker)
            return
        placed = Counter(worker.place.node for worker in self._workers if worker.place is not None)
        lack = what_lacks(self._cluster, self._device, self._threads, placed, 1)
        now = time.monotonic()
        if not lack:
            self._complete_at = now
        elif now - self._complete_at > self._cluster.wait:
            raise ClusterError(f"{lack}, and the Ray cluster has no such node any more; it has", table(nodes()))

    def _stop(self) -> None:
        import ray

        try:
            for worker in list(self._workers):
                if worker.place is None:
                    _kill(worker)
                    self._workers.remove(worker)
                else:
                    worker.actor.stop.options(concurrency_group="messages").remote()
            deadline = time.monotonic() + _GRACE
            while self._workers and time.monotonic() < deadline:
                waiting = {worker.messages: worker for worker in self._workers}
                for ref in ray.wait(list(waiting), timeout=_LOOK_EVERY)[0]:
                    worker = waiting[ref]
                    try:
                        kinds = {message[0] for message in ray.get(ref)}
                    except ray.exceptions.RayError:
                        kinds = {"end"}
                    if kinds & {"end", "stopped", "fatal"}:
                        _kill(worker)
                        self._workers.remove(worker)
                    else:
                        worker.messages = _ask(worker.actor)
        finally:
            for worker in self._workers:
                _kill(worker)
            self._workers.clear()


def _wait_for_nodes(cluster: RayOptions, threads: int) -> tuple[str, int]:
    """The kind of device and the number of encoders, as soon as the cluster has what is asked for."""
    until, asked = time.monotonic() + cluster.wait, False
    try:
        while True:
            found = nodes()
            gpus = int(sum(node.gpus for node in found))
            device = ("cuda" if gpus else "cpu") if cluster.device == "auto" else cluster.device
            needed = cluster.encoder_cpus + threads
            each = gpus if device == "cuda" else sum(node.cpus >= needed for node in found)
            wanted = cluster.encoders or each or 1
            lack = what_lacks(cluster, device, threads, {}, wanted)
            if not lack:
                return device, wanted
            if time.monotonic() >= until:
                raise ClusterError(f"{lack}; the Ray cluster at {cluster.address} has", table(found))
            if not asked:  # an autoscaler starts nodes for what is asked for
                encoder = {"CPU": cluster.encoder_cpus, **({"GPU": 1} if device == "cuda" else {})}
                _ask_autoscaler([encoder] * wanted + [{"CPU": threads}])
                asked = True
            time.sleep(min(_LOOK_EVERY, cluster.wait))
    finally:
        if asked:
            _ask_autoscaler([])  # from now on, it is what waits for nodes that counts


def _ask_autoscaler(bundles: list[dict[str, int]]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)


def _not_begun(exc: Any) -> Exception:
    """The error for an actor that cannot be made, or that does not understand what is sent to it."""
    if isinstance(exc.cause, ExaonePathError):
        return exc.cause
    lines = [line.strip() for line in str(exc.cause or exc).splitlines() if line.strip()]
    return ClusterError(f"an encoder cannot begin on the Ray cluster: {lines[0] if lines else type(exc).__name__}")


def _ask(actor: Any) -> Any:
    return actor.messages.options(concurrency_group="messages").remote()


def _kill(worker: _Encoder) -> None:
    import ray

    with suppress(ray.exceptions.RayError, ValueError):
        ray.kill(worker.actor, no_restart=True)


def _with_full_paths(work: CohortWork) -> CohortWork:
    """The same with absolute paths: other processes have other current folders."""
    slides = [
        replace(slide, path=slide.path.absolute(), mask=None if slide.mask is None else slide.mask.absolute())
        for slide in work.slides
    ]
    patching = {
        name: value.absolute() if isinstance(value, Path) else value for name, value in work.settings.patching.items()
    }
    settings = replace(work.settings, patching=patching)
    return replace(work, slides=slides, out=work.out.absolute(), settings=settings)
