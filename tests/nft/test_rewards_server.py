"""Rewards beside sampling and over HTTP: real processes on loopback, killed half-way."""

import asyncio
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("httpx", reason='pip install "diffusion-nft[server]"')
pytest.importorskip("fastapi", reason='pip install "diffusion-nft[server]"')
pytest.importorskip("uvicorn", reason='pip install "diffusion-nft[server]"')

import httpx
from distributed_worker import wait_for
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from nft.cli import app
from nft.rewards import wire
from nft.rewards.base import Reward, RewardError, score
from nft.rewards.client import RemoteReward
from nft.rewards.pool import RewardSpec, Scorer
from nft.rewards.server import Batcher, build_app

ROOT = Path(__file__).parents[2]
TOKEN = "a secret of the tests"
PROBES = '''
import os
import time
from pathlib import Path
from nft.rewards.base import Reward, Scored


class Number(Reward):
    """The number that a picture spells in its first pixels."""

    needs = ("n",)
    batch = 4

    def __init__(self, seconds=0.0, log=""):
        self.seconds, self.log = seconds, log

    def __call__(self, pictures, prompts, metadata):
        time.sleep(metadata[0].get("seconds", self.seconds))
        first = pictures[:, 0, 0].long()
        numbers = first[:, 0] * 65536 + first[:, 1] * 256 + first[:, 2]
        if any(entry["n"] != number for entry, number in zip(metadata, numbers.tolist())):
            raise RuntimeError("a picture has another's entry")
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{len(pictures)}\\n")
        return Scored(numbers.float(), {"half": numbers / 2})


class Deadly(Number):
    """Kills its process on picture 5, ``times`` times."""

    def __init__(self, folder, times):
        super().__init__()
        self.folder, self.times = Path(folder), times

    def __call__(self, pictures, prompts, metadata):
        died = len(list(self.folder.glob("died*")))
        if any(entry["n"] == 5 for entry in metadata) and died < self.times:
            (self.folder / f"died{died}").touch()
            os._exit(1)
        return super().__call__(pictures, prompts, metadata)


class Gated(Number):
    """Says which picture it has begun, and waits until it may end."""

    batch = 1

    def __init__(self, folder):
        super().__init__()
        self.folder = Path(folder)

    def __call__(self, pictures, prompts, metadata):
        n, end = metadata[0]["n"], time.monotonic() + 60
        (self.folder / f"began{n}").touch()
        while not (self.folder / f"go{n}").exists():
            if time.monotonic() > end:
                raise RuntimeError("nobody let it go")
            time.sleep(0.01)
        return super().__call__(pictures, prompts, metadata)


class Bad(Number):
    """Cannot be made."""

    def __init__(self):
        raise RuntimeError("no good")


class Hollow(Number):
    """Has no number for picture 5."""

    def __call__(self, pictures, prompts, metadata):
        scored = super().__call__(pictures, prompts, metadata)
        scored.score[scored.score == 5] = float("nan")
        return scored


class Picky(Number):
    """Fails on picture 7."""

    def __call__(self, pictures, prompts, metadata):
        if any(entry["n"] == 7 for entry in metadata):
            raise RuntimeError("seven")
        return super().__call__(pictures, prompts, metadata)
'''


@pytest.fixture(scope="module", autouse=True)
def probes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    (folder / "probes.py").write_text(PROBES)
    sys.path.insert(0, str(folder))
    old = os.environ.get("NFT_REWARD_TOKEN")
    os.environ["NFT_REWARD_TOKEN"] = TOKEN
    yield folder
    sys.path.remove(str(folder))
    os.environ.pop("NFT_REWARD_TOKEN")
    if old is not None:
        os.environ["NFT_REWARD_TOKEN"] = old


def numbered(numbers, side=8, **more):
    """Pictures that spell their numbers, and their entries."""
    pictures = torch.zeros(len(numbers), side, side, 3, dtype=torch.uint8)
    for picture, n in zip(pictures, numbers, strict=True):
        picture[0, 0] = torch.tensor([n // 65536, n // 256 % 256, n % 256])
    return pictures, [{"prompt": f"picture {n}", "n": n, **more} for n in numbers]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Server:
    """``nft reward-server`` in a process of its own."""

    def __init__(self, folder, port, *arguments):
        self.url = f"http://127.0.0.1:{port}"
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "nft.cli", "reward-server", *arguments, "--port", str(port)]
        self.process = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL)

    def wait(self):
        for _ in range(600):
            try:
                assert httpx.get(f"{self.url}/health").json()["status"] == "ok"
                return self
            except httpx.TransportError:
                assert self.process.poll() is None, "the server ended"
                time.sleep(0.1)
        raise TimeoutError(self.url)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def peak_bytes(self):
        (line,) = [x for x in Path(f"/proc/{self.process.pid}/status").read_text().splitlines() if "VmHWM" in x]
        return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def server(probes):
    limits = ["--max-mib", "1", "--max-waiting", "4", "--max-pictures", "64"]
    served = ["probes:Number", "probes:Picky", "probes:Hollow", "--set", "probes:Number.seconds=0.05"]
    running = Server(probes, free_port(), *served, *limits).wait()
    yield running
    running.kill()


def post(server, body, *, token=TOKEN, name="Number", **headers):
    shown = {} if token is None else {"Authorization": f"Bearer {token}"}
    return httpx.post(f"{server.url}/score/{name}", content=body, headers=shown | headers, timeout=30)


def batch(numbers, side=8):
    pictures, entries = numbered(numbers, side)
    return wire.pack(pictures, [entry["prompt"] for entry in entries], entries)


# --- what the server accepts ---


def test_scores_and_details_come_back(server):
    pictures, entries = numbered([3, 70000, 11])
    remote = RemoteReward(f"{server.url}/Number")
    assert remote.needs == ("n",) and remote.batch == 4 and remote.range == (-float("inf"), float("inf"))
    scored = score(remote, pictures, [e["prompt"] for e in entries], entries)
    assert scored.score.tolist() == [3, 70000, 11] and scored.details["half"].tolist() == [1.5, 35000, 5.5]


def test_a_score_that_is_not_finite_comes_back_as_none(server):
    """As JSON has no word for it; whether it may be is the caller's to say."""
    answer = post(server, batch([4, 5, 6]), name="Hollow")
    assert answer.status_code == 200 and answer.json()["score"] == [4.0, None, 6.0]
    pictures, entries = numbered([4, 5, 6])
    with Scorer({"far": RewardSpec(f"{server.url}/Hollow"), "near": RewardSpec("probes:Hollow")}) as scorer:
        scorer.submit(pictures, entries)
        found = scorer.gather()
    for scored in found.values():
        assert scored.score.isnan().tolist() == [False, True, False] and scored.details["half"].tolist() == [2, 2.5, 3]
    with pytest.raises(RewardError, match="score holds NaN"):
        score(RemoteReward(f"{server.url}/Hollow"), pictures, ["p"] * 3, entries)


@pytest.mark.parametrize("token", [None, "another", TOKEN[:-1], TOKEN + "x", "gepäck"])
def test_unauthorised_requests_are_refused(server, token):
    headers = {} if token is None else {"Authorization": f"Bearer {token}".encode("latin-1")}
    for method, path in (("GET", "/rewards"), ("POST", "/score/Number"), ("POST", "/score/other")):
        assert httpx.request(method, server.url + path, headers=headers, content=b"").status_code == 401
    assert httpx.get(f"{server.url}/docs").status_code == 404


@pytest.mark.parametrize("declared", [True, False])
def test_oversized_requests_are_refused(server, declared):
    body = bytes(1024 * 1024 + 1)
    chunks = body if declared else (body[i : i + 65536] for i in range(0, len(body), 65536))
    assert post(server, chunks).status_code == 413
    assert post(server, batch(range(65), side=4)).status_code == 413
    assert post(server, batch([1], side=512)).status_code == 200


def test_a_declared_size_is_refused_before_the_body(server):
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10) as sock:
        lines = ("POST /score/Number HTTP/1.1", "Host: a", f"Authorization: Bearer {TOKEN}", "Content-Length: 9999999")
        sock.sendall("\r\n".join([*lines, "", ""]).encode())
        assert sock.recv(64).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"\xff" * 100, 422),
        (pickle.dumps({"pictures": []}), 422),
        (batch([1])[:-5], 422),
        (wire.pack(torch.zeros(1, 8, 8, 3), ["p"], [{"n": 0}]), 422),  # not uint8
        (wire.pack(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ["p", "q"], [{"n": 0}]), 422),
        (wire.pack(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ["p"], [{}]), 422),  # lacks n
        (wire.pack(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), [1], [{"n": 0}]), 422),
        (wire.pack(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ["p"], [{"n": 9}]), 500),  # the reward raises
    ],
)
def test_bad_batches_are_refused_and_the_server_lives(server, body, status):
    assert post(server, body).status_code == status
    assert post(server, batch([5])).json()["score"] == [5]


def test_unknown_rewards_are_named(server):
    assert post(server, batch([1]), name="Nuber").status_code == 404
    with pytest.raises(RewardError, match=r"serves Number, Picky, Hollow, not 'Nuber'"):
        RemoteReward(f"{server.url}/Nuber")


def test_a_full_server_says_so_and_everyone_is_served_in_the_end(server):
    """32 senders at once against 4 places: raw requests are turned away, patient ones all get their own scores."""
    with ThreadPoolExecutor(32) as threads:
        statuses = list(threads.map(lambda n: post(server, batch([n])).status_code, range(32)))
        assert set(statuses) == {200, 503} and httpx.get(f"{server.url}/health").json()["waiting"] == 0
        remote = RemoteReward(f"{server.url}/Number")

        def ask(n):
            pictures, entries = numbered([n, n + 1000])
            return score(remote, pictures, ["", ""], entries).score.tolist()

        assert list(threads.map(ask, range(32))) == [[n, n + 1000] for n in range(32)]


def test_one_senders_bad_batch_is_not_the_others_fault(server):
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            statuses = list(threads.map(lambda n: post(server, batch([n]), name="Picky").status_code, [6, 7, 8, 9]))
            assert statuses == [200, 500, 200, 200]


def test_what_waits_together_is_scored_together_by_size_and_in_order():
    calls = []

    class Sizes(Reward):
        batch = 4

        def __call__(self, pictures, prompts, metadata):
            calls.append((pictures.shape[1], prompts))
            return pictures[:, 0, 0, 0].float()

    async def gone():
        return False

    async def serve():
        batcher = Batcher(Sizes())
        sent = [(8, "ab"), (8, "c"), (8, "de"), (4, "f"), (4, "g"), (8, "hijkl")]
        asked = [
            asyncio.ensure_future(
                batcher.score(*(torch.tensor([ord(p) for p in prompts], dtype=torch.uint8)[:, None, None, None]
                                .expand(-1, side, side, 3), list(prompts), [{}] * len(prompts)), gone)
            )
            for side, prompts in sent
        ]  # fmt: skip
        await asyncio.sleep(0)
        work = asyncio.ensure_future(batcher.run())
        answers = await asyncio.gather(*asked)
        work.cancel()
        return ["".join(chr(int(score)) for score in answer.score) for answer in answers]

    assert asyncio.run(serve()) == ["ab", "c", "de", "f", "g", "hijkl"]
    # The reward itself is given four pictures at a time.
    joined = [(8, "abc"), (8, "de"), (4, "fg"), (8, "hijk"), (8, "l")]
    assert [(side, "".join(prompts)) for side, prompts in calls] == joined


def raw(server, body):
    """A connection that has sent everything but the body, and the body."""
    sock = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60)
    head = ("POST /score/Number HTTP/1.1", "Host: a", f"Authorization: Bearer {TOKEN}", f"Content-Length: {len(body)}")
    return sock, "\r\n".join([*head, "", ""]).encode() + body


def test_memory_stays_bounded(server):
    """100 requests of almost 1 MiB at once: the peak grows by what 4 places may hold, not by 100 MiB and more."""
    pictures, entries = numbered([1], side=590, seconds=0.3)
    body = wire.pack(pictures, ["p"], entries)
    assert 1_000_000 < len(body) < 2**20
    post(server, body)
    before = server.peak_bytes()

    def send(_):
        sock, request = raw(server, body)
        with sock:
            sock.sendall(request)
            return sock.recv(12)[-3:]

    with ThreadPoolExecutor(100) as threads:
        statuses = list(threads.map(send, range(100)))
    assert server.peak_bytes() - before < 40 * 2**20
    assert set(statuses) == {b"200", b"503"}


def test_texts_that_outgrow_their_pictures_are_not_read(server):
    """64 pictures may come with 64 KiB + 64 x 4 KiB of texts."""
    pictures = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    for length, status in ((300_000, 200), (330_000, 422)):
        answer = post(server, wire.pack(pictures, ["p" * length], [{"n": 0}]))
        assert answer.status_code == status
    assert "header: got" in answer.text and "accepted are at most 327680" in answer.text


def test_what_nobody_waits_for_is_not_scored(probes, tmp_path):
    log = tmp_path / "log"
    running = Server(probes, free_port(), "probes:Number", "--set", f"probes:Number.log={log}").wait()

    def until(count):
        for _ in range(200):
            if httpx.get(f"{running.url}/health").json()["waiting"] == count:
                return
            time.sleep(0.01)
        raise TimeoutError(count)

    try:
        with ThreadPoolExecutor(2) as threads:
            pictures, entries = numbered([1], seconds=1.5)
            first = threads.submit(post, running, wire.pack(pictures, ["p"], entries))
            until(1)
            sock, request = raw(running, batch([2, 3]))
            sock.sendall(request)
            until(2)
            sock.close()
            third = threads.submit(post, running, batch([4, 5, 6]))
            assert first.result().json()["score"] == [1] and third.result().json()["score"] == [4, 5, 6]
        assert log.read_text().split() == ["1", "3"]
    finally:
        running.kill()


def test_a_reward_that_runs_into_a_timeout_of_its_own_failed():
    class Late(Reward):
        def __call__(self, pictures, prompts, metadata):
            raise TimeoutError("the judge is asleep")

    with TestClient(build_app({"Late": Late()}, TOKEN)) as client:
        shown = {"Authorization": f"Bearer {TOKEN}"}
        answer = client.post("/score/Late", content=batch([1]), headers=shown)
    assert answer.status_code == 500 and "Late: TimeoutError: the judge is asleep" in answer.text


def test_a_reward_that_exits_does_not_end_the_server():
    class Leaving(Reward):
        def __call__(self, pictures, prompts, metadata):
            sys.exit("enough")

    with TestClient(build_app({"Leaving": Leaving()}, TOKEN)) as client:
        for _ in range(2):
            answer = client.post("/score/Leaving", content=batch([1]), headers={"Authorization": f"Bearer {TOKEN}"})
            assert answer.status_code == 500 and "Leaving: SystemExit: enough" in answer.text


def test_a_token_is_stripped_and_must_fit_a_header(server, monkeypatch):
    monkeypatch.setenv("NFT_REWARD_TOKEN", f" {TOKEN}\n")
    assert RemoteReward(f"{server.url}/Number").batch == 4
    monkeypatch.setattr("uvicorn.run", lambda served, **options: served)
    built = []
    monkeypatch.setattr("nft.rewards.server.build_app", lambda rewards, token, **limits: built.append(token))
    command = ["reward-server", "jpeg", "--port", str(free_port())]
    assert CliRunner().invoke(app, command).exit_code == 0 and built == [TOKEN]
    monkeypatch.undo()
    for token in ("gepäck", "a\nb"):
        monkeypatch.setenv("NFT_REWARD_TOKEN", token)
        with pytest.raises(RewardError, match=f"{server.url}: NFT_REWARD_TOKEN is not text in printable ASCII"):
            RemoteReward(f"{server.url}/Number")
        served = CliRunner().invoke(app, command)
        assert served.exit_code == 2 and "token: got other characters" in served.output


# --- how long a server is waited for ---


LISTING = {"r": {"range": ["0", "9"], "needs": [], "batch": 4}}


@pytest.fixture
def stand_in(monkeypatch):
    """A server by a list of seconds and answers, the last of which stays, on a clock of its own."""
    state = {"now": 1000.0, "replies": [], "asked": 0}
    clock = SimpleNamespace(
        monotonic=lambda: state["now"], sleep=lambda seconds: state.update(now=state["now"] + seconds)
    )
    monkeypatch.setattr("nft.rewards.client.time", clock)
    scores = httpx.Response(200, json={"score": [1.0], "details": {}})

    def answer(request):
        if request.method == "GET":
            return state.get("listing", httpx.Response(200, json=LISTING))
        state["asked"] += 1
        seconds, reply = state["replies"].pop(0) if state["replies"] else (0.01, scores)
        clock.sleep(seconds)
        if isinstance(reply, Exception):
            raise reply
        return httpx.Response(200, **reply) if isinstance(reply, dict) else reply

    client = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **options: client(transport=httpx.MockTransport(answer), **options))
    state["remote"] = RemoteReward("http://server:1/r", timeout=300, patience=60)

    def ask():
        pictures, entries = numbered([1])
        return score(state["remote"], pictures, ["p"], entries).score.tolist()

    state["ask"] = ask
    return state


def test_a_server_that_dies_late_is_asked_again(stand_in):
    """Patience begins with the first failure, not with the request."""
    stand_in["replies"] = [(100, httpx.ReadError("reset")), (1, httpx.ConnectError("refused"))]
    assert stand_in["ask"]() == [1] and stand_in["asked"] == 3
    begin = stand_in["now"]
    stand_in["replies"] = [(100, httpx.ReadError("reset")), *[(0, httpx.ConnectError("refused"))] * 100]
    with pytest.raises(RewardError, match="no answer in 60 s"):
        stand_in["ask"]()
    assert 100 + 50 < stand_in["now"] - begin <= 100 + 60
    # A machine that is not there is found out sooner than one that takes long to score.
    assert stand_in["remote"].client.timeout.connect <= 10 and stand_in["remote"].client.timeout.read == 300


@pytest.mark.parametrize(
    "answer",
    [
        {"text": "<html>"},
        {"content": b"broken", "headers": {"content-encoding": "gzip"}},
        *({"json": value} for value in ([], {}, {"score": ["x", 1], "details": {}}, {"score": [1.0]},
                                        {"score": [1.0], "details": []}, {"score": [1.0], "details": {"a": ["b"]}})),
    ],
)  # fmt: skip
def test_answers_of_another_server_are_named(stand_in, answer):
    message = r"reward server http://server:1: (got .*accepted is `nft reward-server`'s|DecodingError)"
    stand_in["replies"] = [(0, answer)]
    with pytest.raises(RewardError, match=message):
        stand_in["ask"]()


@pytest.mark.parametrize(
    "answer",
    [
        {"text": "<html>"},
        *({"json": value} for value in (["r"], {"r": 1}, {"r": {}}, {"r": LISTING["r"] | {"range": ["low", "high"]}})),
    ],
)
def test_a_listing_of_another_server_is_named(stand_in, answer):
    stand_in["listing"] = httpx.Response(200, **answer)
    with pytest.raises(RewardError, match=r"reward server http://server:1: got .*accepted is `nft reward-server`'s"):
        RemoteReward("http://server:1/r")


def test_a_full_server_is_waited_for_longer_than_a_failing_one(stand_in):
    full = httpx.Response(503, headers={"Retry-After": "1"}, text="come back")
    stand_in["replies"] = [(1, full)] * 40
    begin = stand_in["now"]
    assert stand_in["ask"]() == [1] and stand_in["now"] - begin > 120
    # A failure before does not count once the server has answered.
    stand_in["replies"] = [(1, httpx.ReadError("reset")), *[(1, full)] * 30, (1, httpx.ReadError("reset"))]
    assert stand_in["ask"]() == [1]
    begin, stand_in["replies"] = stand_in["now"], [(1, full)] * 1000
    with pytest.raises(RewardError, match=r"no answer in 300 s .*come back"):
        stand_in["ask"]()
    assert 290 < stand_in["now"] - begin <= 301
    begin, stand_in["replies"] = stand_in["now"], [(1, httpx.Response(503, text="down"))] * 1000
    with pytest.raises(RewardError, match=r"no answer in 60 s .*down"):
        stand_in["ask"]()
    assert stand_in["now"] - begin <= 62


@pytest.mark.parametrize("status", [400, 401, 422, 500])
def test_a_server_that_says_no_is_not_asked_again(stand_in, status):
    stand_in["replies"] = [(0, httpx.Response(status, text="Number: RuntimeError: no good"))]
    with pytest.raises(RewardError, match=f"{status}: Number: RuntimeError: no good"):
        stand_in["ask"]()
    assert stand_in["asked"] == 1


# --- killed half-way ---


def scores_of(scorer, name="r"):
    found = scorer.gather()[name]
    assert (found.details["half"] * 2).tolist() == found.score.tolist()
    return found.score.tolist()


def test_no_picture_is_lost_or_doubled_when_the_server_is_killed(probes, tmp_path):
    port = free_port()
    served = ["probes:Number", "--set", "probes:Number.seconds=0.1"]
    first = Server(probes, port, *served).wait()
    spec = RewardSpec(f"{first.url}/Number", workers=3, options={"patience": 60})
    revived = []
    with Scorer({"r": spec}, max_pending=6) as scorer:
        for i in range(16):
            if i == 6:
                first.kill()
                revived.append(Server(probes, port, *served))
            scorer.submit(*numbered(range(10 * i, 10 * i + 1 + i % 4)))
        found = scores_of(scorer)
    revived[0].kill()
    assert found == [n for i in range(16) for n in range(10 * i, 10 * i + 1 + i % 4)]


def test_a_dead_server_is_named_and_the_epoch_is_kept(probes, tmp_path):
    port, log = free_port(), tmp_path / "log"
    served = ["probes:Number", "--set", f"probes:Number.log={log}"]
    first = Server(probes, port, *served).wait()
    with Scorer({"r": RewardSpec(f"{first.url}/Number", options={"patience": 0.5})}, max_pending=2) as scorer:
        for i in range(3):
            scorer.submit(*numbered([i]))
        for _ in range(100):
            if log.exists() and len(log.read_text().split()) == 3:
                break
            time.sleep(0.05)
        first.kill()
        for i in range(3, 8):
            scorer.submit(*numbered([i]))
        message = rf"reward r: reward server {first.url}: no answer in 0.5 s .*3 of 8 batches are scored"
        with pytest.raises(RewardError, match=message):
            scorer.gather()
        with pytest.raises(RewardError, match="3 of 8"):
            scorer.gather()
        second = Server(probes, port, *served).wait()
        assert scores_of(scorer) == list(range(8))
        second.kill()
    # Three before the death, five after it: what was scored is not asked for again.
    assert sum(map(int, log.read_text().split())) == 8


def test_a_process_that_dies_is_started_again(tmp_path):
    spec = RewardSpec("probes:Deadly", workers=2, options={"folder": str(tmp_path), "times": 1})
    with Scorer({"r": spec}) as scorer:
        for i in range(8):
            scorer.submit(*numbered([i, 100 + i]))
        assert scores_of(scorer) == [n for i in range(8) for n in (i, 100 + i)]
    assert (tmp_path / "died0").exists()


def test_a_process_that_keeps_dying_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("nft.rewards.pool._TRIES", 1)
    with Scorer({"r": RewardSpec("probes:Deadly", options={"folder": str(tmp_path), "times": 9})}) as scorer:
        scorer.submit(*numbered([5]))
        with pytest.raises(RewardError, match=r"reward r: reward probes:Deadly: its process died"):
            scorer.gather()


def test_ctrl_c_is_not_for_a_process_of_a_reward_not_even_as_it_starts():
    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(Scorer, {"r": RewardSpec("probes:Number")})
        wait_for(multiprocessing.active_children)
        started = multiprocessing.active_children()
        for seconds in (0.1, 0.5, 1.0):
            time.sleep(seconds)
            os.kill(started[0].pid, signal.SIGINT)
        with made.result() as scorer:
            assert started[0].is_alive()
            scorer.submit(*numbered([5]))
            assert scores_of(scorer) == [5]


def test_processes_end_with_a_run_that_is_killed(tmp_path):
    script = tmp_path / "run.py"
    script.write_text("""
import multiprocessing, time
from nft.rewards.pool import RewardSpec, Scorer

if __name__ == "__main__":
    with Scorer({"r": RewardSpec("jpeg", workers=2)}):
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(100)
""")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    ) as run:
        workers = run.stdout.readline().split()
        run.kill()

    def alive(pid):
        try:
            # One that has ended and that nobody has waited for has no command.
            return Path(f"/proc/{int(pid)}/cmdline").read_bytes()
        except FileNotFoundError:
            return b""

    assert len(workers) == 2
    wait_for(lambda: not any(map(alive, workers)), 20)


# --- beside sampling ---


@pytest.fixture(scope="module")
def process():
    """One process."""
    with Scorer({"r": RewardSpec("probes:Number")}) as scorer:
        yield scorer


@pytest.fixture
def gated(tmp_path):
    """One process that ends a picture when it is let go, and two batches at most."""
    with Scorer({"r": RewardSpec("probes:Gated", options={"folder": str(tmp_path)})}, max_pending=2) as scorer:
        yield scorer


def test_scoring_overlaps_with_sampling(gated, tmp_path):
    """Scoring begins and goes on while nobody asks for scores, and nobody waits for it to end."""
    gated.submit(*numbered([0]))
    wait_for((tmp_path / "began0").exists)
    gated.submit(*numbered([1]))
    assert not (tmp_path / "began1").exists()
    (tmp_path / "go0").touch()
    wait_for((tmp_path / "began1").exists)
    (tmp_path / "go1").touch()
    assert scores_of(gated) == [0, 1]


def test_submit_waits_while_too_much_is_pending(gated, tmp_path):
    events = []

    def let_go():
        events.append("0 is let go")
        (tmp_path / "go0").touch()

    for n in range(2):
        gated.submit(*numbered([n]))
        events.append(f"{n} is submitted")
    timer = threading.Timer(0.5, let_go)
    timer.start()
    gated.submit(*numbered([2]))
    events.append("2 is submitted")
    timer.join()
    for n in range(1, 3):
        (tmp_path / f"go{n}").touch()
    assert events == ["0 is submitted", "1 is submitted", "0 is let go", "2 is submitted"]
    assert scores_of(gated) == [0, 1, 2]


def test_several_rewards_at_once_keep_their_order():
    specs = {
        "process": RewardSpec("probes:Number", workers=2, options={"seconds": 0.05}),
        "jpeg": RewardSpec("jpeg", options={"quality": 50}),
    }
    with Scorer(specs) as scorer:
        for epoch in range(2):
            numbers = [list(range(10 * i, 10 * i + 1 + i % 3)) for i in range(epoch, 6)]
            for part in numbers:
                scorer.submit(*numbered(part))
            found = scorer.gather()
            assert found["process"].score.tolist() == [n for part in numbers for n in part]
            assert len(found["jpeg"].score) == len(found["process"].score)
        with pytest.raises(ValueError, match="nothing was submitted"):
            scorer.gather()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pictures": torch.zeros(2, 8, 8, 3)}, TypeError, "pictures: got torch.float32"),
        ({"pictures": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, ValueError, "pictures: got shape"),
        ({"entries": [{"prompt": "p", "n": 0}]}, ValueError, "prompts: got 1, accepted is one per picture, 2"),
        ({"entries": [{"prompt": "p", "n": 0}, {"n": 0}]}, ValueError, "entries: entry 1 lacks prompt"),
        ({"entries": [{"prompt": "p", "n": 0}, {"prompt": "p"}]}, ValueError, "entry 1 lacks n, which Number needs"),
    ],
)
def test_a_batch_that_cannot_be_scored_is_refused_at_once(process, change, error, message):
    pictures, entries = numbered([0, 0])
    with pytest.raises(error, match=message):
        process.submit(**{"pictures": pictures, "entries": entries} | change)
    with pytest.raises(ValueError, match="nothing was submitted"):
        process.gather()


def test_a_batch_is_held_against_what_the_server_says_it_needs(server):
    with Scorer({"r": RewardSpec(f"{server.url}/Number")}) as scorer:
        with pytest.raises(ValueError, match="entry 0 lacks n, which Number needs"):
            scorer.submit(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), [{"prompt": "p"}])
        scorer.submit(*numbered([4]))
        assert scores_of(scorer) == [4]


def test_a_callers_memory_is_its_own_again(process):
    buffer, expected = torch.empty(1, 8, 8, 3, dtype=torch.uint8), [3, 4, 5]
    for n in expected:
        pictures, entries = numbered([n], seconds=0.2)
        process.submit(buffer.copy_(pictures), entries)
    buffer.zero_()
    assert scores_of(process) == expected


def test_what_cannot_be_loaded_is_named_at_once():
    with pytest.raises(RewardError, match=r"reward r: .*did you mean ocr"):
        Scorer({"r": RewardSpec("orc")})
    with pytest.raises(RewardError, match=r"reward r: rewards\.jpeg: quality: got 0"):
        Scorer({"r": RewardSpec("jpeg", options={"quality": 0})})
    before = set(multiprocessing.active_children())
    with pytest.raises(RewardError, match=r"reward bad: rewards\.probes:Bad: RuntimeError: no good"):
        Scorer({"good": RewardSpec("jpeg"), "bad": RewardSpec("probes:Bad")})
    assert set(multiprocessing.active_children()) <= before
    with pytest.raises(RewardError, match=r"reward r: .*no answer in 0\.1 s"):
        Scorer({"r": RewardSpec(f"http://127.0.0.1:{free_port()}/ocr", options={"patience": 0.1})})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["orc"], "did you mean ocr"),
        (["jpeg", "--set", "ocr.quality=1"], "accepted is NAME.KEY=VALUE with a NAME of jpeg"),
        (["jpeg", "--set", "jpeg.quality=0"], "quality: got 0"),
        (["jpeg", "jpeg"], "accepted are different ones"),
        (["jpeg", "--set", "jpeg.qualitty=3"], "rewards.jpeg.options.qualitty: unknown key"),
        (["jpeg", "--set", "jpeg.quality=1e-3"], "quality: got 0.001"),
        (["jpeg", "--device", "tpu"], "device: got 'tpu', accepted are cpu, cuda and cuda:N"),
        (["jpeg", "--device", ""], "device: got '', accepted are"),
        (["clipscore", "--device", "cuda:99"], "device: got 'cuda:99', but this machine"),
        (["jpeg", "--token-file", "latin"], "token-file: latin is not UTF-8"),
        (["jpeg", "--token-file", "/nowhere"], "/nowhere"),
        (["jpeg", "--token-file", "empty"], "token-file: empty is empty"),
        (["jpeg", "--port", "0"], "Invalid value for '--port'"),
    ],
)
def test_bad_input_to_the_command_is_named(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes(b"\xff")
    monkeypatch.setattr("uvicorn.run", lambda *arguments, **options: None)
    result = CliRunner().invoke(app, ["reward-server", *arguments], env={"COLUMNS": "300"})
    assert result.exit_code == 2 and message in result.output.replace("\n", " ")


def test_a_server_without_its_packages_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(app, ["reward-server", "jpeg"], env={"COLUMNS": "300"})
    assert result.exit_code == 2 and 'pip install "diffusion-nft[server]"' in result.output


def test_an_address_that_is_taken_or_none_is_named_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("nft.rewards.registry.load", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for more in (["--port", port], ["--host", "http://127.0.0.1"], ["--host", ""]):
            result = CliRunner().invoke(app, ["reward-server", "jpeg", *more], env={"COLUMNS": "300"})
            assert result.exit_code == 2 and more[-1] in result.output and "serving" not in result.output
