"""A few threads that wait for the host's files, so that no vCPU has to.

Jobs are taken in order, but several run at once: whoever needs an order (a flush behind writes)
submits the later job when the earlier ones are done. The threads are started when they are first
needed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], None]


class IoPool:
    """``threads`` workers, called ``name`` and a number; jobs must catch their own errors."""

    def __init__(self, threads: int = 4, name: str = "ringfence-io") -> None:
        self._limit = threads
        self._name = name
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        self._workers: list[threading.Thread] = []
        self._idle = 0
        self._lock = threading.Lock()

    def submit(self, job: Job) -> None:
        """Have a worker do ``job``; returns at once."""
        with self._lock:
            if self._idle == 0 and len(self._workers) < self._limit:
                worker = threading.Thread(
                    target=self._work, name=f"{self._name}-{len(self._workers)}", daemon=True
                )
                self._workers.append(worker)
                worker.start()
            else:
                self._idle -= 1
        self._queue.put(job)

    def close(self) -> None:
        """Do what was submitted, then end the threads."""
        with self._lock:
            workers, self._workers = self._workers, []
        for _ in workers:
            self._queue.put(None)
        for worker in workers:
            worker.join()

    def _work(self) -> None:
        while True:
            job = self._queue.get()
            if job is None:
                return
            job()
            with self._lock:
                self._idle += 1
