"""Which worker is killed, and when, if a group of workers makes no progress; without Ray."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from ray.exceptions import ActorUnavailableError
from ray.train import WorkerGroupError

from savant_ray.cluster import bridge, session
from savant_ray.cluster.bridge import EventReorderer, HeartbeatTable, LatestHeartbeat, WorkerProgress
from savant_ray.cluster.stuck_process import KilledProcess, kill_local_process, training_thread
from savant_ray.config import Config
from savant_ray.driver.failures import explain_failure
from savant_ray.driver.hang_watch import HangWatch, collective_timeout
from savant_ray.driver.phases import AttemptPhase, Phase, Trigger
from savant_ray.driver.worker_watch import SECONDS_UNTIL_REPORT, WorkerWatch
from savant_ray.errors import TrainingError
from savant_ray.events import (
    CheckpointSaved,
    Event,
    Notice,
    RunFailed,
    WorkerHung,
    WorkersLost,
    WorkersStarted,
)
from savant_ray.training.progress import SLOW, STORAGE, Progress
from savant_ray.worker import host
from tests.cluster.conftest import wait_for
from tests.reporting.events import step_done
from tests.worker.without_ray import fakes_of_ray

STACK = """Process 7: ray::RayTrainWorker
Python v3.11

Thread 7 (idle): "MainThread"
    main_loop (ray/worker.py:1)
Thread 9 (idle): "TrainingThread(train_worker)"
    read (data/stream.py:12)
    train (loop.py:99)"""


class Group:
    """Workers with a `Progress` each, and a watch that looks at them once a second."""

    def __init__(self, size: int, hang_seconds: Any = 10.0, killed: KilledProcess | None = None) -> None:
        self.workers = [Progress() for _ in range(size)]
        self.beats = [1] * size
        self.stopped: set[int] = set()  # ranks whose process is stopped, so that it sends no heartbeats
        self.gone: set[int] = set()  # ranks whose process does not exist
        self.absent: set[int] = set()  # ranks that have not sent a heartbeat yet
        self.attempt, self.now, self.phase = 0, 0.0, Phase.TRAINING
        self.killed: list[int] = []
        self.events: list[Event] = []
        self._process = killed or KilledProcess("sleeping", STACK, "")
        self.watch = HangWatch(hang_seconds, self.events.append, self._kill, lambda: self.now)
        for worker in self.workers:
            worker.begin("computing")
            worker.end_step()

    def _kill(self, pid: int, started: float, node_id: str) -> KilledProcess | None:
        if pid in self.gone:
            raise ProcessLookupError
        self.killed.append(pid)
        return self._process if self._process.state else None

    def pass_time(self, seconds: int, *busy: int) -> list[int]:
        """Let time pass, in which the `busy` ranks make progress; return the ranks that were killed."""
        before = len(self.killed)
        for _ in range(seconds):
            self.now += 1
            for rank in busy:
                self.workers[rank].mark()
            for rank in range(len(self.workers)):
                self.beats[rank] += rank not in self.stopped
            present = [rank for rank in range(len(self.workers)) if rank not in self.absent]
            self.watch.check(self.phase, [self.heartbeats(rank) for rank in present])
        return self.killed[before:]

    def heartbeats(self, rank: int) -> LatestHeartbeat:
        mark = self.workers[rank].newest
        progress = WorkerProgress(
            rank=rank,
            world_size=len(self.workers),
            actor_id=f"{self.attempt}-{rank}",
            node_id="node",
            host="host-1",
            pid=rank,
            process_started=0.0,
            marks=mark.number,
            activity=mark.activity,
            limit_factor=mark.limit_factor,
            collectives=mark.collectives,
            waits=mark.waits,
            finished=mark.finished,
        )
        return LatestHeartbeat(progress, self.beats[rank])


def hung(group: Group) -> list[WorkerHung]:
    return [event for event in group.events if isinstance(event, WorkerHung)]


def test_a_worker_without_progress_is_killed_after_the_limit_and_named_with_its_stack() -> None:
    group = Group(1)
    group.workers[0].begin("waiting for the sequences of a step")
    assert group.pass_time(10) == [] and group.pass_time(2) == [0]
    (event,) = hung(group)
    assert event.rank == 0 and event.activity == "waiting for the sequences of a step" and event.stack == STACK
    for part in (
        "worker 0 made no progress for",
        "was killed",
        "process 0 on host-1",
        "data/stream.py:12",
        "loop.py:99",
    ):
        assert part in event.text
    assert "ray/worker.py" not in event.text, "of the training thread only"
    assert "no progress" in group.watch.observe(WorkersLost(text="it died")).text  # type: ignore[attr-defined]


def test_workers_that_die_again_before_their_first_heartbeat_are_reported_with_their_own_error() -> None:
    group = Group(1)
    assert group.pass_time(12) == [0]
    assert "no progress" in group.watch.observe(WorkersLost(text="it died")).text  # type: ignore[attr-defined]
    assert group.watch.observe(WorkersLost(text="cannot import torch")) == WorkersLost(text="cannot import torch")


def test_workers_that_die_before_their_first_heartbeat_are_reported() -> None:
    async def take() -> list[Event]:
        actor = bridge.Bridge.__ray_metadata__.modified_class()  # type: ignore[attr-defined]  # the class without Ray
        for sender, text in enumerate(("cannot import torch", "the same again")):
            await actor.send(WorkersLost(text=text), str(sender), 0)
        events, _ = await actor.take(0)
        return list(events)

    assert asyncio.run(take()) == [WorkersLost(text="cannot import torch"), WorkersLost(text="the same again")]


def test_the_driver_has_recorded_a_checkpoint_when_it_asks_for_further_events() -> None:
    def saved(step: int) -> CheckpointSaved:
        return CheckpointSaved(step=step, path=f"step_{step}", reason="periodic", seconds=1.0)

    async def counts() -> list[int]:
        actor = bridge.Bridge.__ray_metadata__.modified_class()  # type: ignore[attr-defined]  # the class without Ray
        results = [await actor.send(saved(1), "worker", 0), await actor.send(saved(2), "worker", 1)]
        await actor.take(0)  # the driver may die before it has recorded them
        results.append(await actor.send(saved(3), "worker", 2))
        await actor.take(0)
        results.append(await actor.send(saved(4), "worker", 3))
        return results

    assert asyncio.run(counts()) == [1, 2, 3, 2]


def test_the_error_that_several_workers_report_is_one_event() -> None:
    async def take() -> list[Event]:
        actor = bridge.Bridge.__ray_metadata__.modified_class()  # type: ignore[attr-defined]  # the class without Ray
        for rank, text in enumerate(("diverged", "diverged", "another one as its consequence")):
            await actor.send(RunFailed(error="TrainingError", text=text, exit_code=1), str(rank), 0)
        events, _ = await actor.take(0)
        return list(events)

    assert asyncio.run(take()) == [RunFailed(error="TrainingError", text="diverged", exit_code=1)]


def test_a_worker_that_makes_progress_is_never_killed() -> None:
    group = Group(2)
    assert group.pass_time(1000, 0, 1) == []


def test_of_workers_in_a_collective_the_one_that_has_not_entered_it_is_killed() -> None:
    for behind in range(3):
        group = Group(3)
        for rank, worker in enumerate(group.workers):
            if rank != behind:
                worker.enter_collective()
        assert group.pass_time(12) == [behind]


def test_a_worker_that_hangs_after_a_collective_is_killed_and_not_those_that_wait_in_the_next_one() -> None:
    group = Group(2)
    for worker in group.workers:
        worker.enter_collective()
    group.workers[1].mark()
    group.workers[1].enter_collective()
    assert group.pass_time(12) == [0]


def test_if_all_workers_wait_in_the_same_collective_all_are_killed() -> None:
    group = Group(2)
    for worker in group.workers:
        worker.enter_collective()
    assert group.pass_time(12) == [0, 1]
    assert all(event.activity == "waiting for the other workers" for event in hung(group))


def test_a_stopped_process_is_killed_and_not_the_workers_that_wait_for_it() -> None:
    group = Group(2, killed=KilledProcess("stopped", "", "py-spy: not permitted"))
    for worker in group.workers:
        worker.enter_collective()
    group.stopped = {1}
    assert group.pass_time(12) == [1]
    assert "its process was stopped" in hung(group)[0].text and "not permitted" in hung(group)[0].text


def test_workers_that_wait_for_one_that_does_not_start_are_killed_so_that_all_are_restarted() -> None:
    group = Group(3)
    group.absent = {1}
    for worker in group.workers:
        worker.begin("loading the state", STORAGE)
        worker.enter_collective()
    assert group.pass_time(int(10 * SLOW)) == [] and group.pass_time(2) == [0, 2]
    assert hung(group)[0].activity == "waiting for worker 1 (no heartbeat yet)"


@pytest.mark.parametrize("limit_factor", [SLOW, STORAGE])
def test_slow_activities_have_more_time_but_not_a_process_that_sends_no_heartbeats(limit_factor: float) -> None:
    group = Group(1)
    group.workers[0].begin("saving a checkpoint", limit_factor)
    assert group.pass_time(int(10 * limit_factor)) == [] and group.pass_time(2) == [0]
    group = Group(1)
    group.workers[0].begin("saving a checkpoint", limit_factor)
    group.stopped = {0}
    assert group.pass_time(12) == [0]


def test_the_first_step_and_one_after_a_change_of_micro_batches_may_take_long_because_they_compile() -> None:
    progress = Progress()
    progress.begin("computing")
    assert progress.newest.limit_factor == SLOW
    progress.end_step()
    progress.begin("computing")
    assert progress.newest.limit_factor == 1
    progress.expect_compilation()
    progress.mark()
    assert progress.newest.limit_factor == SLOW


def test_the_automatic_limit_is_20_median_steps_and_at_least_a_minute() -> None:
    watch = Group(1, "auto").watch
    assert watch.limit == 60
    for step in range(1, 100):
        watch.observe(step_done(step, step_seconds=1.0 if step % 9 else 500.0))
    assert watch.limit == 60
    for step in range(100, 200):
        watch.observe(step_done(step, step_seconds=30.0))
    assert watch.limit == 600


def test_without_a_limit_nothing_is_killed() -> None:
    assert Group(1, None).pass_time(100_000) == []


def test_the_time_in_which_the_driver_itself_was_suspended_does_not_count() -> None:
    group = Group(1, 60.0)
    group.pass_time(30)
    group.now += 10_000
    assert group.pass_time(20) == []


def test_workers_that_have_finished_or_are_being_restarted_are_not_watched() -> None:
    group = Group(2)
    group.workers[0].finish()
    assert group.pass_time(100, 1) == []
    group.phase = Phase.WAITING_FOR_WORKERS
    assert group.pass_time(1000) == []


def test_restarted_workers_are_watched_from_their_start() -> None:
    group = Group(1)
    assert group.pass_time(12) == [0]
    group.watch.observe(WorkersLost(text="it died"))
    group.attempt += 1
    group.watch.observe(WorkersStarted())
    assert group.pass_time(10) == [] and group.pass_time(2) == [0]


def test_a_worker_that_has_just_exited_is_not_reported() -> None:
    group = Group(1)
    group.gone = {0}
    assert group.pass_time(300) == [] and hung(group) == []


@pytest.mark.parametrize("process", [KilledProcess("sleeping", "", ""), KilledProcess("", "", "")])
def test_if_ray_does_not_notice_that_a_worker_was_killed_the_run_ends_with_an_error(process: KilledProcess) -> None:
    group = Group(1, killed=process)
    with pytest.raises(TrainingError, match=r"worker 0 made no progress .*\n.*Run the same command again"):
        group.pass_time(200)


def test_if_workers_hang_too_often_the_error_says_so() -> None:
    error = WorkerGroupError("…", {0: RuntimeError("The actor died")})
    message = str(explain_failure(error, None, "step_8", 3, "worker 0 made no progress for 1 min and was killed"))
    assert "worker 0 made no progress for 1 min and was killed" in message and "step_8" in message


def test_gloo_and_nccl_wait_longer_than_the_watch() -> None:
    assert collective_timeout("auto") == collective_timeout(None) == 3600
    assert collective_timeout(600.0) > 600 * SLOW


def test_the_stack_of_a_stopped_process_is_read_before_it_is_killed() -> None:
    program = "import threading, time\ndef blocked():\n print(flush=True)\n time.sleep(1000)\n"
    start = "thread = threading.Thread(target=blocked, name='TrainingThread(train)')\nthread.start()\nthread.join()"
    process = subprocess.Popen([sys.executable, "-c", program + start], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    started = psutil.Process(process.pid).create_time()
    wait_for(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    with pytest.raises(ProcessLookupError):
        kill_local_process(process.pid, started - 1000)
    killed = kill_local_process(process.pid, started)
    assert not psutil.pid_exists(process.pid) and killed.state == "stopped"
    assert killed.note or any(frame.startswith("blocked (") for frame in training_thread(killed.stack)), killed


def test_a_process_that_may_not_be_killed_is_reported_and_ends_the_run_with_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(process: psutil.Process) -> None:
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "kill", refuse)
    process = subprocess.Popen(["sleep", "100"])
    group = Group(1, killed=kill_local_process(process.pid, psutil.Process(process.pid).create_time()))
    assert group.pass_time(12) == [0]
    (event,) = hung(group)
    assert "could not be killed (not permitted)" in event.text and "was killed" not in event.text
    with pytest.raises(TrainingError, match="could not be killed"):
        group.pass_time(200)
    monkeypatch.undo()
    process.kill()
    process.wait()


def test_a_bridge_that_does_not_answer_for_a_minute_ends_the_run_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    def wait(calls: list[object], timeout: float) -> tuple[list[object], list[object]]:
        waited.append(timeout)
        return [], calls

    monkeypatch.setattr(bridge.ray, "wait", wait)
    with pytest.raises(TrainingError, match=r"ray::Bridge on this machine, has not answered .*\n.*same command again"):
        bridge.answer_of(object(), 0.5)
    assert 60 <= sum(waited) <= 65


def test_a_stopped_process_of_ray_is_named_unless_it_continues_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    raylet = subprocess.Popen(["sleep", "100"])
    head = SimpleNamespace(
        all_processes={"raylet": [SimpleNamespace(process=raylet)]}, dead_processes=lambda: []
    )  # what `check_ray_processes` uses of Ray's head
    monkeypatch.setattr(session, "started_head", lambda: head)
    raylet.send_signal(signal.SIGSTOP)
    wait_for(lambda: psutil.Process(raylet.pid).status() == psutil.STATUS_STOPPED)
    threading.Timer(0.3, raylet.send_signal, [signal.SIGCONT]).start()
    session.check_ray_processes()
    monkeypatch.setattr(session, "STOPPED_SECONDS", 0.2)
    raylet.send_signal(signal.SIGSTOP)
    wait_for(lambda: psutil.Process(raylet.pid).status() == psutil.STATUS_STOPPED)
    with pytest.raises(TrainingError, match=rf"raylet \(pid {raylet.pid}\) on this machine is stopped"):
        session.check_ray_processes()
    raylet.kill()
    raylet.wait()


def test_events_of_a_sender_are_delivered_in_the_order_of_their_numbers() -> None:
    delivered: list[Event] = []
    events = [Notice(text=str(number)) for number in range(20)]
    arrival = random.Random(0).sample(range(20), 20)

    async def send() -> None:
        reorderer = EventReorderer(delivered.append)
        calls = {}
        for number in arrival:
            calls[number] = asyncio.create_task(reorderer.add(events[number], number))
            for _ in range(10):
                await asyncio.sleep(0)
            for earlier, call in calls.items():
                assert call.done() == (earlier < len(delivered)), "a call returns once its event is delivered"

    asyncio.run(send())
    assert delivered == events


def test_the_first_heartbeat_of_any_rank_begins_a_group_and_late_ones_of_earlier_groups_do_not_count() -> None:
    newest, chance = HeartbeatTable(), random.Random(0)
    earlier: list[WorkerProgress] = []
    for attempt, (size, is_loss) in enumerate([(1, False), (3, False), (2, True), (2, True), (4, False), (1, True)]):
        group = Group(size)
        group.attempt = attempt
        started = [newest.add(group.heartbeats(rank).progress) for rank in chance.sample(range(size), size)]
        assert started == [True] + [False] * (size - 1)
        for progress in earlier:
            assert not newest.add(progress)
        assert sorted(beats.progress.rank for beats in newest.all) == list(range(size))
        assert all(beats.progress.actor_id.startswith(f"{attempt}-") for beats in newest.all)
        earlier += [beats.progress for beats in newest.all]
        if is_loss:
            newest.clear()
            assert newest.all == []


def test_a_group_of_the_same_size_is_new_even_if_the_loss_of_the_earlier_one_was_never_reported() -> None:
    table, earlier, later = HeartbeatTable(), Group(2), Group(2)
    later.attempt = earlier.attempt + 1
    assert [table.add(earlier.heartbeats(rank).progress) for rank in (0, 1)] == [True, False]
    assert table.add(later.heartbeats(1).progress) and not table.add(earlier.heartbeats(1).progress)
    assert table.add(later.heartbeats(0).progress) and not table.add(later.heartbeats(0).progress)


@pytest.mark.parametrize("absent", range(3))
def test_whichever_worker_hangs_before_its_first_heartbeat_all_are_restarted(absent: int) -> None:
    group, newest, phase = Group(3), HeartbeatTable(), AttemptPhase()
    group.absent = {absent}
    phase.advance(Trigger.FIT_STARTED)
    for rank in {0, 1, 2} - group.absent:
        group.workers[rank].begin("loading the state", STORAGE)
        if newest.add(group.heartbeats(rank).progress):
            phase.observe(WorkersStarted())
            group.watch.observe(WorkersStarted())
    group.phase = phase.current
    assert group.pass_time(int(10 * SLOW)) == [] and group.pass_time(2) == sorted({0, 1, 2} - group.absent)
    assert hung(group)[0].activity == f"waiting for worker {absent} (no heartbeat yet)"


def test_while_workers_start_any_stopped_process_of_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = subprocess.Popen(["bash", "-c", "exec -a ray::DatasetManager sleep 100"])
    infos = [SimpleNamespace(process=SimpleNamespace(pid=actor.pid))]
    monkeypatch.setattr(session, "started_head", lambda: SimpleNamespace(all_processes={"raylet": infos}))
    monkeypatch.setattr(session, "STOPPED_SECONDS", 0.2)
    wait_for(lambda: psutil.Process(actor.pid).cmdline()[:1] == ["ray::DatasetManager"])
    session.check_ray_actors(all_of_them=True)
    actor.send_signal(signal.SIGSTOP)
    wait_for(lambda: psutil.Process(actor.pid).status() == psutil.STATUS_STOPPED)
    session.check_ray_actors()
    now = 0.0
    watch = WorkerWatch(1, {"CPU": 1.0}, pytest.fail, lambda: now)
    watch.check(Phase.WAITING_FOR_WORKERS)
    now = SECONDS_UNTIL_REPORT
    with pytest.raises(TrainingError, match=rf"ray::DatasetManager \(pid {actor.pid}\) on this machine is stopped"):
        watch.check(Phase.WAITING_FOR_WORKERS)
    actor.kill()
    actor.wait()


def test_events_after_a_lost_one_are_delivered_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge, "LOST_SECONDS", 0.05)
    delivered: list[Event] = []
    events = [Notice(text=str(number)) for number in range(9)]

    async def send() -> None:
        reorderer = EventReorderer(delivered.append)
        await asyncio.gather(*(reorderer.add(events[number], number) for number in (0, 4, 3, 6, 7)))
        assert delivered == [events[number] for number in (0, 3, 4, 6, 7)]
        await asyncio.gather(*(reorderer.add(events[number], number) for number in (8, 2)))

    asyncio.run(asyncio.wait_for(send(), 10))
    assert delivered[-2:] == [events[8], events[2]], "one that was only late is not dropped"


def test_a_worker_sends_heartbeats_again_after_its_connection_to_the_driver_has_failed() -> None:
    lost = ActorUnavailableError("connection lost", None)
    answers: list[float | Exception] = [lost, lost, 30.0]
    no_more_answers = threading.Event()

    def get(_: object) -> float:
        if not answers:
            no_more_answers.set()
            threading.Event().wait()  # the thread ends with this process
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    handle = SimpleNamespace(wait_for_stop_request=SimpleNamespace(remote=lambda *_: None))
    with fakes_of_ray(None, rank=0, world_size=1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(bridge.ray, "get", get)
        patch.setattr(host, "HEARTBEAT_SECONDS", 0.01)
        connection = host.DriverConnection(handle, Config())
        assert no_more_answers.wait(60)
    grace_left = connection.grace_left()
    assert grace_left is not None and 0 < grace_left <= 30
