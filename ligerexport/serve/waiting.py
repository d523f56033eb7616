"""Who waits for a place: a bounded queue in which clients take turns."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator

from ligerexport.serve.job import Job


class Waiting:
    """Jobs in the order of their arrival, one queue for each client.

    Args:
        limit: Largest number of jobs.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._queues: dict[str, deque[Job]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Job]:
        return (job for queue in self._queues.values() for job in queue)

    def put(self, job: Job) -> bool:
        """Append a job; return whether there was room for it."""
        if len(self) >= self.limit:
            return False
        self._queues.setdefault(job.client, deque()).append(job)
        return True

    def take(self, running: Iterable[Job]) -> Job:
        """Remove the oldest job of the client that has the fewest jobs running, and of these, was served longest ago.

        Raises:
            IndexError: No job waits.
        """
        if not self._queues:
            raise IndexError("no job waits")
        held = Counter(job.client for job in running)
        client = min(self._queues, key=lambda name: held[name])
        queue = self._queues.pop(client)
        job = queue.popleft()
        if queue:
            self._queues[client] = queue  # behind all others
        return job

    def sweep(self) -> list[Job]:
        """Remove and return the jobs that have ended while they waited."""
        ended = [job for job in self if job.overdue()]
        if ended:
            queues = {name: deque(job for job in queue if job not in ended) for name, queue in self._queues.items()}
            self._queues = {name: queue for name, queue in queues.items() if queue}
        return ended

    def clear(self) -> list[Job]:
        """Remove and return all jobs."""
        jobs, self._queues = list(self), {}
        return jobs
