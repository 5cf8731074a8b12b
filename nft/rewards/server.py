"""A reward server: any set of rewards over HTTP, for another environment or machine.

Memory is bounded: only ``max_waiting`` requests are let in at a time, each of ``max_bytes`` at most, and a body is not
read before its sender was let in. Whoever comes on top is told to come back (503).
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from torch import Tensor

from . import wire
from .base import Metadata, Reward, RewardError, Scored, score, validate

MAX_BYTES, MAX_WAITING, MAX_PICTURES = 64 * 2**20, 16, 1024
_READ_TIMEOUT = 60.0
# Texts of a request: so much in any case, and so much more for each of the most pictures.
_HEADER, _HEADER_EACH = 2**16, 2**12


@dataclass
class _Job:
    pictures: Tensor
    prompts: list[str]
    metadata: Metadata
    answer: asyncio.Future[Scored]
    gone: Callable[[], Awaitable[bool]]


def _together(jobs: list[_Job]) -> tuple[Tensor, list[str], Metadata]:
    return (
        torch.cat([job.pictures for job in jobs]),
        [prompt for job in jobs for prompt in job.prompts],
        [entry for job in jobs for entry in job.metadata],
    )


class Batcher:
    """Scores jobs in the order they came; those of one picture size that wait together are scored together."""

    def __init__(self, reward: Reward):
        self.reward = reward
        self.waiting: list[_Job] = []
        self.arrived = asyncio.Event()

    async def score(
        self, pictures: Tensor, prompts: list[str], metadata: Metadata, gone: Callable[[], Awaitable[bool]]
    ) -> Scored:
        """Scores of one batch; raises what the reward raises on it, and ``ConnectionError`` if nobody waits for them
        any more when its turn comes."""
        job = _Job(pictures, prompts, metadata, asyncio.get_running_loop().create_future(), gone)
        self.waiting.append(job)
        self.arrived.set()
        return await job.answer

    def _next(self) -> list[_Job]:
        size = self.waiting[0].pictures.shape[1:]
        jobs: list[_Job] = []
        while self.waiting and self.waiting[0].pictures.shape[1:] == size:
            if jobs and sum(len(job.prompts) for job in (*jobs, self.waiting[0])) > self.reward.batch:
                break
            jobs.append(self.waiting.pop(0))
        return jobs

    async def run(self) -> None:
        """Work for ever."""
        while True:
            await self.arrived.wait()
            self.arrived.clear()
            while self.waiting:
                here = []
                for job in self._next():
                    if await job.gone():
                        job.answer.set_exception(ConnectionError("the sender has gone"))
                    else:
                        here.append(job)
                if here:
                    await self._answer(here)

    async def _answer(self, jobs: list[_Job]) -> None:
        try:
            scored = await asyncio.to_thread(score, self.reward, *_together(jobs), all_finite=False)
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
                return
            # One sender's bad batch is not the others' fault.
            for job in jobs:
                await self._answer([job])
            return
        start = 0
        for job in jobs:
            part = slice(start, start := start + len(job.prompts))
            details = {name: values[part] for name, values in scored.details.items()}
            job.answer.set_result(Scored(scored.score[part], details))


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = HTTPException(413, f"body: larger than {max_bytes} bytes, which is this server's limit")
    # A length that is absent or a lie is caught below.
    if int(request.headers.get("content-length", "0")) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def build_app(
    rewards: Mapping[str, Reward],
    token: str,
    *,
    max_bytes: int = MAX_BYTES,
    max_waiting: int = MAX_WAITING,
    max_pictures: int = MAX_PICTURES,
) -> FastAPI:
    """The server's application.

    ``GET /health`` is open to all; ``GET /rewards`` and ``POST /score/NAME`` want ``Authorization: Bearer TOKEN``. The
    body of a score request is made by ``nft.rewards.wire``, its answer is JSON.

    Args:
        rewards: by the name they are served under.
        token: what senders must show; not empty.
        max_bytes: largest body.
        max_waiting: requests that are let in at a time.
        max_pictures: most pictures of one request.

    Raises:
        ValueError: a token that is empty or no header can carry, no rewards, or a limit that is not positive.
    """
    if not token or not rewards:
        raise ValueError(f"{'rewards' if token else 'token'}: got none, accepted is at least one")
    if not (token.isascii() and token.isprintable()):
        raise ValueError("token: got other characters, accepted are printable ASCII characters")
    for label, limit in (("max_bytes", max_bytes), ("max_waiting", max_waiting), ("max_pictures", max_pictures)):
        if limit < 1:
            raise ValueError(f"{label}: got {limit}, accepted are positive numbers")
    batchers: dict[str, Batcher] = {}
    inside = 0

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        batchers.update({name: Batcher(reward) for name, reward in rewards.items()})
        tasks = [asyncio.create_task(batcher.run()) for batcher in batchers.values()]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(title="nft rewards", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    def authorise(request: Request) -> None:
        shown = request.headers.get("authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(shown, f"Bearer {token}".encode()):
            raise HTTPException(401, "authorization: accepted is this server's token", {"WWW-Authenticate": "Bearer"})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": inside, "max_waiting": max_waiting}

    @app.get("/rewards")
    async def listing(request: Request) -> dict[str, Any]:
        authorise(request)
        # JSON has no infinity.
        return {
            name: {"range": [str(limit) for limit in reward.range], "needs": reward.needs, "batch": reward.batch}
            for name, reward in rewards.items()
        }

    @app.post("/score/{name}")
    async def answer(name: str, request: Request) -> dict[str, Any]:
        nonlocal inside
        authorise(request)
        if name not in rewards:
            raise HTTPException(404, f"reward: got {name!r}, accepted are {', '.join(rewards)}")
        if inside >= max_waiting:
            raise HTTPException(503, f"{inside} requests are waiting; come back", {"Retry-After": "1"})
        inside += 1
        try:
            try:
                body = await asyncio.wait_for(_read(request, max_bytes), _READ_TIMEOUT)
            except asyncio.TimeoutError:
                raise HTTPException(408, f"body: not received within {_READ_TIMEOUT} seconds") from None
            batch = wire.unpack(body, _HEADER + _HEADER_EACH * max_pictures)
            if len(batch[1]) > max_pictures:
                raise HTTPException(413, f"pictures: got {len(batch[1])}, accepted are at most {max_pictures}")
            validate(rewards[name], *batch)
            del body
            return wire.to_json(await batchers[name].score(*batch, request.is_disconnected))
        except (ValueError, TypeError) as error:
            raise HTTPException(422, str(error)) from None
        except HTTPException:
            raise
        except Exception as error:
            # A reward's own error names it.
            own = isinstance(error, RewardError)
            raise HTTPException(500, str(error) if own else f"{name}: {type(error).__name__}: {error}") from error
        finally:
            inside -= 1

    return app
