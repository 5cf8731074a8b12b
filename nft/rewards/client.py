"""A reward on a server, used like any other."""

from __future__ import annotations

import math
import os
import time
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from . import wire
from .base import Metadata, Reward, RewardError, Scored

TOKEN = "NFT_REWARD_TOKEN"
_LONGEST_PAUSE = 5.0
_CONNECT = 5.0


def check_connection(url: str, timeout: Any = 300.0, patience: Any = 60.0) -> None:
    """Check what a ``RemoteReward`` is made with, without asking the server.

    Raises:
        ValueError: an address without host or name, or seconds that are not positive and finite.
    """
    try:
        parts = urlsplit(url)
        whole = bool(parts.hostname and parts.path.strip("/") and parts.port != 0)
    except ValueError:
        whole = False
    if not whole:
        raise ValueError(f"reward: got {url!r}, accepted is http://host:port/name")
    for key, seconds in (("timeout", timeout), ("patience", patience)):
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < math.inf:
            raise ValueError(f"options.{key}: got {seconds!r}, accepted is a positive number of seconds")


class RemoteReward(Reward):
    """Sends pictures to ``nft reward-server`` and brings back the scores it was asked for, once each.

    A request that gets no answer is sent again: the server keeps nothing between requests, so no picture counts twice.
    """

    packages = ("httpx",)
    extra = "server"
    threaded = True

    def __init__(self, url: str, *, timeout: float = 300.0, patience: float = 60.0):
        """Ask the server what the reward is. The token is read from NFT_REWARD_TOKEN.

        Args:
            url: http://host:port/NAME.
            timeout: seconds for one answer, with the time that a full server lets its sender wait.
            patience: seconds of failed tries, since the first of them, after which the server is given up.

        Raises:
            RewardError: a server that cannot be reached, refuses, does not serve NAME or is another's, or a token that
                no header can carry.
        """
        import httpx

        self.server, _, self.name = url.rstrip("/").rpartition("/")
        self.timeout, self.patience = timeout, patience
        token = os.environ.get(TOKEN, "").strip()
        if not (token.isascii() and token.isprintable()):
            raise RewardError(f"reward server {self.server}: {TOKEN} is not text in printable ASCII characters")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.client = httpx.Client(timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT)), headers=headers)
        served = self._request("GET", "/rewards")
        if self.name not in served:
            raise RewardError(f"reward server {self.server}: serves {', '.join(served)}, not {self.name!r}")
        try:
            low, high = map(float, served[self.name]["range"])
            self.range = (low, high)
            self.needs = tuple(served[self.name]["needs"])
            self.batch = int(served[self.name]["batch"])
        except (KeyError, TypeError, ValueError):
            raise self._foreign(served) from None

    def _foreign(self, answer: Any) -> RewardError:
        return RewardError(f"reward server {self.server}: got {str(answer)[:100]!r}, accepted is `nft reward-server`'s")

    def _request(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        import httpx

        pause, begin, give_up = 0.1, time.monotonic(), math.inf
        while True:
            full = False
            try:
                response = self.client.request(method, self.server + path, content=body)
            except (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError) as error:
                problem = f"{type(error).__name__}: {error}"
            except httpx.HTTPError as error:
                raise RewardError(f"reward server {self.server}: {type(error).__name__}: {error}") from None
            else:
                if response.status_code == 200:
                    try:
                        answer = response.json()
                    except ValueError:
                        raise self._foreign(response.text) from None
                    if not isinstance(answer, dict):
                        raise self._foreign(answer)
                    return answer
                problem = f"{response.status_code}: {response.text[:300]}"
                # It is reachable and says no: only a full or failing server may say otherwise later.
                if response.status_code not in (502, 503, 504):
                    raise RewardError(f"reward server {self.server}: {problem}")
                # It lives, and says when to come back.
                full = response.status_code == 503 and "retry-after" in response.headers
            now = time.monotonic()
            give_up = math.inf if full else min(give_up, now + self.patience)
            if now + pause > (begin + self.timeout if full else give_up):
                limit = self.timeout if full else self.patience
                raise RewardError(f"reward server {self.server}: no answer in {limit:g} s ({problem})")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def __call__(self, pictures: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        answer = self._request("POST", f"/score/{self.name}", wire.pack(pictures, prompts, metadata))
        try:
            return wire.from_json(answer)
        except ValueError:
            raise self._foreign(answer) from None
