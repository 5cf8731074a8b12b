"""UnifiedReward (Wang et al., arXiv 2503.05236) behind any OpenAI-compatible server, such as sglang's or vLLM's."""

from __future__ import annotations

import base64
import io
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .base import Metadata, Reward, RewardError, Scored

QUESTION = (
    "Rate a generated picture against the caption it was made from. Look at two things: how well objects, their "
    "attributes and relations agree with the caption, and the picture's quality in clarity, detail, colour and overall "
    "appeal. Answer with a number from 1 to 5 after 'Final Score:'.\nText Caption: [{prompt}]"
)
_SCORE = re.compile(r"Final Score:[\s*\[]*([-+]?\d+(?:\.\d+)?)", re.IGNORECASE)
_SIDE = 512
# So many answers without a number are no chance.
_SEVERAL = 8
_FIRST_PAUSE = 0.5


def _number(answer: Any) -> float | None:
    """The score in an answer; a model that refuses may give no text at all."""
    found = _SCORE.search(answer) if isinstance(answer, str) else None
    return float(found[1]) if found and 1 <= float(found[1]) <= 5 else None


class UnifiedReward(Reward):
    """The number after ``Final Score:`` in the model's answer / 5; an answer without one from 1 to 5 scores 0.

    The detail ``answered`` is 1 where there was such a number; where none of eight or more has one, that is an error.
    Pictures are sent as PNG, 512 x 512.
    """

    range = (0.0, 1.0)
    packages = ("httpx",)
    extra = "server"
    threaded = True
    batch = 64

    def __init__(
        self,
        url: str = "http://127.0.0.1:17140/v1",
        model: str = "UnifiedReward-7b-v1.5",
        *,
        question: str = QUESTION,
        timeout: float = 120.0,
        retries: int = 5,
        concurrency: int = 16,
    ):
        """Connect to a server; nothing is sent yet. The key is read from NFT_UNIFIED_REWARD_KEY.

        Args:
            url: base address of the API, with its version.
            model: name under which the server offers the model.
            question: what is asked, with ``{prompt}``; for the published figures, give the model card's own words.
            timeout: seconds for one answer.
            retries: further tries after a timeout, a lost connection, a busy server (429) or one in trouble (5xx).
            concurrency: requests under way at once.
        """
        import httpx

        if not isinstance(question, str) or "{prompt}" not in question:
            raise ValueError(f"question: got {question!r}, accepted is a text with {{prompt}}")
        if not isinstance(url, str) or not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
            raise ValueError(f"url: got {url!r}, accepted is http://host:port/v1")
        if not isinstance(model, str) or not model:
            raise ValueError(f"model: got {model!r}, accepted is the name that the server has for it")
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise ValueError(f"timeout: got {timeout!r}, accepted is a positive number of seconds")
        for key, count, least in (("retries", retries, 0), ("concurrency", concurrency, 1)):
            if isinstance(count, bool) or not isinstance(count, int) or not least <= count <= 1000:
                raise ValueError(f"{key}: got {count!r}, accepted are {least} to 1000")
        self.url, self.model, self.question, self.retries = url.rstrip("/"), model, question, retries
        key = os.environ.get("NFT_UNIFIED_REWARD_KEY", "none")
        self.client = httpx.Client(timeout=timeout, headers={"Authorization": f"Bearer {key}"})
        self.pool = ThreadPoolExecutor(concurrency)

    def check_server(self) -> None:
        """Whether anything answers at the address."""
        import httpx

        try:
            self.client.get(f"{self.url}/models", timeout=10)
        except (httpx.NetworkError, httpx.TimeoutException, httpx.ProtocolError) as error:
            raise RewardError(
                f"unifiedreward: no server answers at {self.url} ({type(error).__name__}); start one, or give another "
                "address as the option url"
            ) from None

    def _ask(self, picture: Tensor, prompt: str) -> Any:
        buffer = io.BytesIO()
        Image.fromarray(picture.numpy()).resize((_SIDE, _SIDE)).save(buffer, format="PNG")
        image = {"url": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"}
        text = self.question.replace("{prompt}", prompt)
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": text}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
        return self._post(body)["choices"][0]["message"]["content"]

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        import httpx

        problem = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(_FIRST_PAUSE * 2 ** (attempt - 1))
            try:
                response = self.client.post(f"{self.url}/chat/completions", json=body)
            except (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError) as error:
                problem = f"{type(error).__name__} {error}"
                continue
            if response.status_code == 200:
                return response.json()
            problem = f"status {response.status_code}: {response.text[:200]}"
            if response.status_code != 429 and response.status_code < 500:
                break
        raise RewardError(f"unifiedreward: {self.url} gave no answer ({problem})")

    def __call__(self, pictures: Tensor, prompts: list[str], metadata: Metadata) -> Scored:
        answers = list(self.pool.map(self._ask, pictures.cpu(), prompts))
        numbers = [_number(answer) for answer in answers]
        if len(numbers) >= _SEVERAL and not any(numbers):
            raise RewardError(
                f"unifiedreward: {self.url} answered {answers[0]!r:.200}, accepted is 'Final Score: ' with a number "
                "from 1 to 5, which no answer has; look at model and question"
            )
        scores = torch.tensor([(number or 0.0) / 5 for number in numbers])
        return Scored(scores, {"answered": torch.tensor([float(number is not None) for number in numbers])})
