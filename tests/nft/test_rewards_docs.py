"""The examples of docs/rewards.md, run from top to bottom as a reader would."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("httpx", reason='pip install "diffusion-nft[server]"')
pytest.importorskip("fastapi", reason='pip install "diffusion-nft[server]"')
pytest.importorskip("uvicorn", reason='pip install "diffusion-nft[server]"')
pytest.importorskip("typer")

import httpx

ROOT = Path(__file__).parents[2]


def test_the_documents_examples_run(tmp_path, monkeypatch):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    text = (ROOT / "docs" / "rewards.md").read_text().replace("8600", port)
    blocks = re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL)
    own = next(code for kind, code in blocks if code.startswith("# sharpness.py"))
    assert len(own.splitlines()) < 40
    (tmp_path / "sharpness.py").write_text(own)
    serve = next(code for kind, code in blocks if kind == "bash" and "reward-server" in code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # The script of the command is installed with the package; here its module stands in.
    command = serve.replace("nft reward-server", f"exec {sys.executable} -m nft.cli reward-server")
    server = subprocess.Popen(["bash", "-c", command], stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("NFT_REWARD_TOKEN", re.search(r"NFT_REWARD_TOKEN=(\S+)", serve)[1])
        for _ in range(600):
            try:
                httpx.get(f"http://127.0.0.1:{port}/health")
                break
            except httpx.TransportError:
                assert server.poll() is None
                time.sleep(0.1)
        names: dict = {}
        for kind, code in blocks:
            if kind == "python" and code != own:
                exec(code, names)
        assert names["scores"]["sharp"].score.shape == (12,)
        assert names["combined"].r.shape == (8,)
    finally:
        server.kill()
        server.wait()
        sys.modules.pop("sharpness", None)


def test_every_bundled_reward_is_documented():
    from nft.rewards.registry import BUNDLED

    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "rewards.md").read_text(), re.MULTILINE)
    methods = {"sum", "normalized_sum", "gdpo", "per_reward"}
    assert set(rows) == set(BUNDLED) | methods
