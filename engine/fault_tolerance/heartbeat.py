"""Heartbeats name a lost rank: a killed, stopped or unreachable rank sends none, the ranks that wait for it do.

`Heartbeat` sends them; `PeerWatch` watches those of the other ranks, and ends a process whose training cannot end, as
it waits for a GPU that waits for another rank.
"""

import platform
import threading
import time

from torch import distributed

from engine.fault_tolerance.watchdog import end_process
from engine.parallel.rendezvous import rank, store, world
from pipeline.system.errors import RunFailed

_BEAT_SECONDS = 0.25
_ANSWER_SECONDS = 5.0  # longest time that the store may take
_GRACE_SECONDS = 5.0  # time for the training to notice without help
RUNNING, FINISHED, FAILED, LOST = "running", "finished", "failed", "lost"
"""States of a rank. LOST: it waited for another rank that did not answer."""
_STORE = -1  # stands for the store among ranks


class LostRank(RunFailed):
    """A rank ended or did not answer in time; the message names it, if it is known."""


class Heartbeat:
    """Sends this rank's step and state from a thread, so that evaluating or compiling does not stop the beats.

    limit: seconds of silence after which another rank is lost.
    """

    def __init__(self, limit: float) -> None:
        self.step, self.state, self.limit = 0, RUNNING, limit
        self.peers = PeerWatch(self)
        self._end = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        if world() > 1:
            self._store = store().clone()  # type: ignore[attr-defined]
            self.thread.start()
            self.peers.thread.start()

    def close(self) -> None:
        """Send a last beat, and stop."""
        self.peers.stop()
        if self.state == RUNNING:
            self.state = FINISHED
        self._end.set()
        if self.thread.is_alive():
            self.thread.join(_ANSWER_SECONDS if self.peers.store_answers else 0)

    def _beat(self) -> None:
        keys, count, last = [f"millrace/beat/{peer}" for peer in range(world())], 0, False
        try:
            while not last:
                last, count = self._end.is_set(), count + 1
                self._store.set(keys[rank()], f"{count} {self.step} {self.state}")
                if self._store.check(keys):
                    self.peers.note([beat.decode() for beat in self._store.multi_get(keys)])
                self._end.wait(_BEAT_SECONDS)
        except (distributed.DistError, RuntimeError):
            pass  # the store is gone, and the run with it: the training fails, or the watch ends the process


class PeerWatch:
    """Ends this process where another rank is silent or has failed, and the training does not notice.

    Its thread never waits for the store: the heartbeat's thread brings it the beats.
    """

    def __init__(self, heartbeat: Heartbeat) -> None:
        peers = [peer for peer in range(world()) if peer != rank()]
        self._heartbeat, self._reads, self.store_answers = heartbeat, 0, True
        self._beats = dict.fromkeys(peers, "0 0 " + RUNNING)  # count, step, state; never grows: threads share it
        self._silent_seconds = dict.fromkeys([_STORE, *peers], 0.0)
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="peer watch", daemon=True)

    def stop(self) -> None:
        """Stop watching: the training has ended, or has noticed."""
        self._stop.set()

    def note(self, beats: list[str]) -> None:
        """Note the newest beat of each rank."""
        for peer, beat in enumerate(beats):
            if peer != rank() and beat != self._beats[peer]:
                self._beats[peer], self._silent_seconds[peer] = beat, 0.0
        self._silent_seconds[_STORE] = 0.0
        self._reads += 1

    def find_silent_ranks(self) -> set[int]:
        """Return the ranks that send no beats, or `_STORE` where that does not answer. Takes a second, at most five."""
        before, first, deadline = dict(self._beats), self._reads, time.monotonic() + _ANSWER_SECONDS
        while self._reads < first + 4:
            if time.monotonic() > deadline or not self._heartbeat.thread.is_alive():
                self.store_answers = False
                return {_STORE}
            if self._reads == first + 1:  # now the last beat of a killed rank has been read
                before = dict(self._beats)
            time.sleep(_BEAT_SECONDS / 5)
        return {peer for peer, beat in self._beats.items() if beat == before[peer]}

    def describe(self, ranks: set[int], why: str) -> LostRank:
        """Return the error that names lost ranks and the steps of their last beats."""
        beats = {peer: self._beats[peer] for peer in sorted(ranks - {_STORE})}
        names = ", ".join(f"{peer} (last at step {beat.split()[1]})" for peer, beat in beats.items())
        lost = f"rank{'s' * (len(beats) > 1)} {names}" if beats else "another rank"
        lost = "rank 0" if _STORE in ranks else lost
        return LostRank(
            f"rank {rank()} on {platform.node()}, step {self._heartbeat.step}: {lost} did not answer within "
            f"{self._heartbeat.limit:g} s, or ended ({why}): see its own output, then give the same command again with "
            "--resume auto"
        )

    def _watch(self) -> None:
        before, lost_seconds, limit = time.monotonic(), 0.0, self._heartbeat.limit
        while not self._stop.wait(_BEAT_SECONDS):
            now = time.monotonic()
            passed = min(now - before, 2 * _BEAT_SECONDS)  # excludes the time in which this process itself was stopped
            before = now
            for peer in self._silent_seconds:
                self._silent_seconds[peer] += passed
            trouble = self._silent(limit) | self._in_state(FAILED) | self._in_state(LOST)
            lost_seconds = lost_seconds + passed if trouble else 0.0
            if lost_seconds > _GRACE_SECONDS:
                silent, failed = self._silent(min(limit, _GRACE_SECONDS)), self._in_state(FAILED)
                why = "it has failed" if failed and failed >= silent else "the training waited for it"
                end_process(self.describe(silent | failed, why))

    def _silent(self, limit: float) -> set[int]:
        """Return the unfinished ranks, and `_STORE`, that have been silent for more than `limit` seconds."""
        return {peer for peer, seconds in self._silent_seconds.items() if seconds > limit} - self._in_state(FINISHED)

    def _in_state(self, state: str) -> set[int]:
        return {peer for peer, beat in self._beats.items() if beat.endswith(state)}
