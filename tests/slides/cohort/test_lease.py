"""Claims of slides: one owner at a time, whatever happens to owners, clocks and file systems."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from exaonepath.errors import LeaseLostError, OutputError
from exaonepath.files import atomic
from exaonepath.slides.cohort import lease as module
from exaonepath.slides.cohort.claim_file import read_claim, remove_claim
from exaonepath.slides.cohort.lease import Leases

PATIENCE = 60


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def claims(tmp_path):
    return tmp_path / "claims"


@pytest.fixture
def make(claims, clock):
    """Leases on the folder, as if in a process on another machine: its end cannot be looked up."""
    made = []

    def make(space="elsewhere", **options):
        leases = Leases(claims, **{"clock": clock, "renew_every": 1e6, "stale_after": 120.0, **options})
        leases.claim_here = leases.claim

        def claim(*arguments):
            with pytest.MonkeyPatch.context() as patch:
                if space:
                    patch.setattr(module, "process_space", lambda: space)
                return leases.claim_here(*arguments)

        leases.claim = claim
        made.append(leases)
        return leases

    yield make
    for leases in made:
        leases.close()


@pytest.fixture
def patient(monkeypatch):
    """Renewals of an hour, which observers would wait for, do not count: stale after `stale_after` alone."""
    monkeypatch.setattr(module, "_RENEWALS", 0)


@pytest.mark.usefixtures("patient")
class TestOneOwner:
    def test_a_slide_has_one_owner_until_it_is_released(self, make):
        a, b = make("a"), make("b")
        mine = a.claim("s")
        assert b.claim("s") is None
        assert b.claim("other") is not None
        mine.check()
        mine.release()
        mine.release()
        theirs = b.claim("s")
        assert theirs.token != mine.token
        assert a.claim("s") is None

    def test_nothing_is_left_when_all_is_released(self, make, claims):
        a = make()
        for name in ("x", "y.z", "über", "n" * 180):
            assert a.claim(name)
        assert len(list(claims.iterdir())) == 4
        a.close()
        assert list(claims.iterdir()) == []

    def test_a_lease_is_stale_when_an_observer_saw_no_renewal_for_long_enough(self, make, clock):
        a, b = make("a"), make("b")
        mine = a.claim("s")
        clock.now += 1e6  # nobody looked: nothing is known
        assert b.claim("s") is None
        clock.now += 119
        assert b.claim("s") is None
        mine.renew()
        clock.now += 119
        assert b.claim("s") is None
        clock.now += 119
        assert b.claim("s") is None
        clock.now += 1
        assert b.claim("s") is not None
        with pytest.raises(LeaseLostError, match="taken over slide s"):
            mine.check()
        mine.release()
        assert b.look("s")[0] == "held"

    def test_an_observer_waits_for_as_long_as_the_owner_promised(self, make, clock, monkeypatch):
        monkeypatch.setattr(module, "_RENEWALS", 3)
        a, b = make("a", renew_every=1000), make("b", stale_after=5)
        assert a.claim("s")
        assert b.claim("s") is None
        clock.now += 2999
        assert b.claim("s") is None
        clock.now += 1
        assert b.claim("s")

    def test_the_wall_clock_does_not_matter(self, make, monkeypatch, claims, clock):
        """Neither the time of day nor the times of files are looked at: an owner in 1980, one in 2100."""
        a, b = make("a"), make("b")
        a.claim("s")
        for when in (315532800, 4102444800):
            os.utime(claims / "s.json", (when, when))
            monkeypatch.setattr(time, "time", lambda when=when: when)
            assert b.claim("s") is None
            clock.now += 30
        content = json.loads((claims / "s.json").read_text())
        content["since"] = "1980-01-01T00:00:00+00:00"
        (claims / "s.json").write_text(json.dumps(content))
        assert b.claim("s") is None

    def test_a_clock_that_goes_back_delays_and_does_not_hurt(self, make, clock):
        a, b = make("a"), make("b")
        a.claim("s")
        assert b.claim("s") is None
        clock.now -= 500
        assert b.claim("s") is None
        clock.now += 500 + 120
        assert b.claim("s")

    def test_what_another_observer_of_the_run_found_stale_is_taken_over_at_once(self, make, clock):
        a, watcher, worker = make("a"), make("b"), make("c")
        a.claim("s")
        watcher.look("s")
        clock.now += 121
        state, claim = watcher.look("s")
        assert state == "stale"
        assert worker.claim("s", b"something else") is None
        assert worker.claim("s", claim.content)

    def test_many_threads_one_winner(self, make):
        everyone = [make(str(i)) for i in range(6)]
        with ThreadPoolExecutor(6) as pool:
            for name in map(str, range(40)):
                won = list(pool.map(lambda leases, name=name: Leases.claim(leases, name), everyone))
                assert sum(lease is not None for lease in won) == 1


def test_an_owner_that_ended_is_recognised_at_once(claims):
    code = (
        f"from exaonepath.slides.cohort.lease import Leases; Leases({str(claims)!r}).claim('s'); import os; os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
    leases = Leases(claims)
    assert leases.look("s")[0] == "stale"
    assert leases.claim("s")
    leases.close()


def test_a_process_that_got_the_id_of_the_owner_is_not_the_owner(claims, monkeypatch):
    owner = Leases(claims)
    monkeypatch.setattr(module, "start_time", lambda pid: "12345")
    owner.claim("s")
    assert Leases(claims).look("s")[0] == "stale"
    owner.close()


@pytest.mark.usefixtures("patient")
class TestRaces:
    def test_the_owner_renews_between_the_look_and_the_takeover(self, make, clock, monkeypatch):
        a, b = make("a"), make("b")
        mine = a.claim("s")
        b.claim("s")
        clock.now += 121
        take = module.remove_claim

        def renew_first(path, expected):
            monkeypatch.setattr(module, "remove_claim", take)
            mine.renew()
            return take(path, expected)

        monkeypatch.setattr(module, "remove_claim", renew_first)
        assert b.claim("s") is None
        mine.check()
        assert read_claim(a.path("s")).holder.token == mine.token

    def test_the_owner_wakes_up_after_the_takeover_and_renews(self, make, clock):
        a, b = make("a"), make("b")
        mine = a.claim("s")
        b.claim("s")
        clock.now += 121
        theirs = b.claim("s")
        mine.renew()
        mine.release()
        theirs.check()
        assert read_claim(a.path("s")).holder.token == theirs.token
        with pytest.raises(LeaseLostError):
            mine.check(thorough=False)

    def test_a_third_process_takes_the_new_lease_for_the_stale_one(self, make, clock, monkeypatch):
        """Two find the lease stale; one takes it over completely before the other acts on what it saw."""
        a, b, c = make("a"), make("b"), make("c")
        a.claim("s")
        b.claim("s"), c.claim("s")
        clock.now += 121
        take, won = module.remove_claim, []

        def overtaken(path, expected):
            monkeypatch.setattr(module, "remove_claim", take)
            won.append(c.claim("s"))
            return take(path, expected)

        monkeypatch.setattr(module, "remove_claim", overtaken)
        assert b.claim("s") is None
        won[0].check()
        won[0].renew()
        won[0].check()


_RACE = """
import os, sys, time
from exaonepath.slides.cohort.lease import Leases
folder, mode = sys.argv[1], sys.argv[2]
leases = Leases(folder + "/claims")
print("ready", flush=True)
sys.stdin.readline()
won = 0
for i in range(400):
    name = "s" if mode == "turns" else f"s{i}"
    lease = leases.claim(name)
    if lease is None:
        continue
    won += 1
    os.close(os.open(f"{folder}/{name}.won", os.O_CREAT | os.O_EXCL))  # fails if another process is in here
    if mode == "turns":
        os.unlink(f"{folder}/{name}.won")
        lease.release()
print(won, flush=True)
sys.stdin.readline()
leases.close()
"""


@pytest.mark.parametrize("mode", ["new", "turns", "stale"])
def test_two_processes_race_for_hundreds_of_leases(tmp_path, mode):
    if mode == "stale":
        code = "import sys, os; from exaonepath.slides.cohort.lease import Leases; a = Leases(sys.argv[1]); "
        code += "[a.claim(f's{i}') for i in range(400)]; os._exit(0)"
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "claims")], check=True, cwd="/")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": "/"}
    racers = [subprocess.Popen([sys.executable, "-c", _RACE, str(tmp_path), mode], **pipes) for _ in range(2)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        print("go", file=racer.stdin, flush=True)
    won = [int(racer.stdout.readline() or -1) for racer in racers]
    for racer in racers:
        racer.communicate("end\n", timeout=PATIENCE)
    assert all(racer.returncode == 0 for racer in racers)
    assert sum(won) >= 400 if mode == "turns" else sum(won) == 400
    assert list((tmp_path / "claims").iterdir()) == []


def test_a_paused_owner_loses_its_lease_and_notices(claims):
    """SIGSTOP: the owner neither works nor renews; when it goes on, it must not disturb the new owner."""
    code = (
        "import sys, time; from exaonepath.slides.cohort.lease import Leases\n"
        f"leases = Leases({str(claims)!r}, stale_after=0.4)\n"
        "lease = leases.claim('s'); print('claimed', flush=True)\n"
        "sys.stdin.readline(); time.sleep(0.3)\n"
        "try: lease.check(thorough=False)\n"
        "except Exception as error: print(type(error).__name__, flush=True)\n"
        "leases.close()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": "/"}
    owner = subprocess.Popen([sys.executable, "-c", code], **pipes)
    assert owner.stdout.readline() == "claimed\n"
    with Leases(claims, stale_after=0.4) as leases:
        for _ in range(8):  # it renews every tenth of a second: it is never taken over while it runs
            assert leases.claim("s") is None
            time.sleep(0.1)
        owner.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + PATIENCE
        while (lease := leases.claim("s")) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        owner.send_signal(signal.SIGCONT)
        output, _ = owner.communicate("go\n", timeout=PATIENCE)
        assert output == "LeaseLostError\n"
        lease.check()
        assert leases.look("s")[0] == "held"


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_hard_links(make, clock, monkeypatch, code):
    def link(*_, **__):
        raise OSError(code, "no links")

    monkeypatch.setattr(os, "link", link)
    a, b, c = make("a"), make("b"), make("c")
    mine = a.claim("s")
    assert b.claim("s") is None
    c.look("s")
    clock.now += 121
    take = module.remove_claim

    def renew_first(path, expected):
        monkeypatch.setattr(module, "remove_claim", take)
        mine.renew()
        return take(path, expected)

    monkeypatch.setattr(module, "remove_claim", renew_first)
    assert b.claim("s") is None  # it was put back as a copy
    mine.renew()
    mine.check()
    assert c.claim("s") is None  # and the copy was renewed
    clock.now += 121
    assert c.claim("s") is not None
    with pytest.raises(LeaseLostError):
        mine.check()


def test_a_link_that_was_made_and_reported_as_failed(make, monkeypatch):
    """Over NFS the answer may get lost; the repeated request then finds the link."""
    link = os.link

    def answer_lost(*arguments):
        link(*arguments)
        raise FileExistsError(errno.EEXIST, "repeated")

    monkeypatch.setattr(os, "link", answer_lost)
    a = make()
    lease = a.claim("s")
    assert lease is not None
    lease.check()


def test_without_flock(make, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    a, b = make("a"), make("b")
    assert a.claim("s")
    assert b.claim("s") is None


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'{"format": 1}', b"\xff\xfe\x00", b"[" * 60_000, b'{"pid": true}']
)
def test_a_damaged_lease_is_of_somebody_until_it_is_stale(make, clock, claims, content):
    b = make("b")
    (claims / "s.json").write_bytes(content)
    assert read_claim(claims / "s.json").holder is None
    assert b.claim("s") is None
    clock.now += 121
    lease = b.claim("s")
    lease.check()


def test_an_owner_repairs_its_damaged_lease(make, claims):
    a = make()
    lease = a.claim("s")
    with (claims / "s.json").open("r+b") as file:
        file.write(b"\0" * 40)
    lease.check()
    lease.renew()
    assert read_claim(claims / "s.json").holder.token == lease.token


def test_a_lease_that_was_removed_is_lost(make, claims):
    lease = make().claim("s")
    (claims / "s.json").unlink()
    with pytest.raises(LeaseLostError):
        lease.check()
    lease.release()


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_a_lease_that_is_no_file(make, claims, tmp_path, kind):
    a = make()
    victim = tmp_path / "victim"
    if kind == "link":
        victim.write_text("precious")
    if "link" in kind:
        (claims / "s.json").symlink_to(victim)
    elif kind == "folder":
        (claims / "s.json").mkdir()
    else:
        os.mkfifo(claims / "s.json")
    with pytest.raises(OutputError, match="no regular file; remove it"):
        a.claim("s")
    assert not victim.exists() or victim.read_text() == "precious"
    assert len(list(claims.iterdir())) == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "claims").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        Leases(tmp_path / "claims")


def test_a_folder_that_vanishes(make, claims):
    a = make()
    lease = a.claim("s")
    for file in claims.iterdir():
        file.unlink()
    claims.rmdir()
    lease.renew()
    with pytest.raises(LeaseLostError):
        lease.check()
    lease.release()
    with pytest.raises(OutputError, match="does not exist"):
        a.claim("t")


def test_a_lease_states_who_holds_it(make, claims, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lease = make(space=None, run="20260101T000000-host-1-abcd").claim("s")
    lease.renew()
    holder = read_claim(claims / "s.json").holder
    assert (holder.pid, holder.job, holder.run, holder.counter) == (
        os.getpid(),
        "slurm:77",
        "20260101T000000-host-1-abcd",
        1,
    )
    assert (claims / "s.json").stat().st_size % 256 == 0


def test_temporary_files_of_killed_processes_are_removed(claims, abandoned):
    claims.mkdir()
    left = claims / abandoned("s.json")
    left.touch()
    Leases(claims).close()
    assert not left.exists()


def test_a_lease_that_is_put_back_without_links_yields_to_a_new_one(tmp_path, monkeypatch):
    """Another process claims the slide in the moment in which the lease that was taken by mistake has no name."""
    path = tmp_path / "s.json"
    path.write_bytes(b"renewed")

    def no_link(*_):
        path.write_bytes(b"new")
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_link)
    assert not remove_claim(path, b"stale")
    assert path.read_bytes() == b"new"
    assert [each.name for each in tmp_path.iterdir()] == ["s.json"]
