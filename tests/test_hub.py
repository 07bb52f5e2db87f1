"""Deltas to a Hub and back, against a stand-in on loopback that speaks as much of its protocol as huggingface-hub asks
for."""
import base64
import hashlib
import json
import re
import sys
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import mistune
import pytest
import torch
from bnonly import hub
from bnonly.delta import load_delta, metadata_of, save_delta
from bnonly.hub import FILE, model_card, plain, pull_delta, push_delta
from bnonly.policies import freeze
from test_delta import BASE, Net, X, trained

pytest.importorskip("huggingface_hub", reason="huggingface-hub is not installed (pip install 'bnonly[hub]')")
SAID = dict(base=BASE, data="digits, 8x8", accuracy=91.25, n=360)


class Hub(BaseHTTPRequestHandler):
    "Repositories in a dictionary; nothing leaves this process."
    def log_message(self, *_): pass

    def answer(self, status, content=b"", **headers):
        if not isinstance(content, bytes): content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(content)}).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(content)

    def do_POST(self):
        body, path = self.rfile.read(int(self.headers.get("Content-Length") or 0)), unquote(self.path)
        self.server.asked.append(path)
        repos, address = self.server.repos, f"http://127.0.0.1:{self.server.server_port}"
        if path == "/api/repos/create":
            asked = json.loads(body)
            repos.setdefault(name := f"{asked['organization']}/{asked['name']}", {})
            return self.answer(200, dict(url=f"{address}/{name}"))
        if path == "/api/validate-yaml": return self.answer(200, {})
        name, what = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path).groups()
        if what == "preupload":
            return self.answer(
                200,
                dict(
                    files=[
                        dict(path=f["path"], uploadMode="regular", shouldIgnore=False)
                        for f in json.loads(body)["files"]
                    ]
                ),
            )
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file": repos[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.answer(200, dict(commitUrl=f"{address}/{name}/commit/{'1' * 40}", commitOid="1" * 40))

    def do_GET(self):
        self.server.asked.append(self.path)
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", unquote(self.path))
        repo = self.server.repos.get(found[1]) if found else None
        if repo is None: return self.answer(404, X_Error_Code="RepoNotFound")
        if found[2] not in ("main", "1" * 40): return self.answer(404, X_Error_Code="RevisionNotFound")
        if found[3] not in repo: return self.answer(404, X_Error_Code="EntryNotFound")
        content = repo[found[3]]
        self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit="1" * 40)

    do_HEAD = do_GET


@pytest.fixture
def server(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.asked = {}, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("policy", ["norm+output", "random2+output"])
def test_there_and_back(server, policy, tmp_path):
    model = trained(Net(), policy)
    assert push_delta(model, "you/birds", **SAID).endswith(f"/you/birds/commit/{'1' * 40}")
    assert {*server.repos["you/birds"]} == {FILE, "README.md"}
    path = pull_delta("you/birds", cache_dir=tmp_path)
    assert tmp_path in path.parents and torch.equal(load_delta(path, Net())(X), model(X))
    assert metadata_of(path)["base"] == BASE
    assert not [a for a in server.asked if "README" in a]   # a card is not read
    assert pull_delta("you/birds", revision="1" * 40, cache_dir=tmp_path) == path


class Seen(HTMLParser):
    "The tags and the text of a page."
    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, text): self.text += text


def test_the_card_says_what_one_must_know(server):
    push_delta(trained(Net(), "norm+output"), "you/birds", **SAID)
    card = server.repos["you/birds"]["README.md"].decode()
    front, text = card.removeprefix("---\n").split("\n---\n", 1)
    assert front.splitlines() == [f"base_model: {BASE}", "library_name: bnonly", "tags:", "- bnonly"]
    seen = Seen(mistune.html(text)).text
    for said in (
        f"of {BASE}",
        "77 of 885 parameters",
        "bn 16, norm 16, output 45",
        "digits, 8x8",
        "91.25% (n = 360)",
        "norm+output",
        "load_delta(pull_delta('you/birds'), model)",
    ):
        assert said in seen, (said, seen)
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    assert compile(code, "card", "exec")


HOSTILE = [
    "<script>alert(1)</script>",
    "](javascript:alert(1))",
    "![x](http://127.0.0.1/x)",
    "a | b\n| c | d |\n\n# heading",
    "```\nimport os\n```",
    "`x`",
    "---\nlicense: mit\n---",
    "{{ 7*7 }} {repo}",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt;",
    "*a* _b_ ~~c~~ \\*",
    "http://127.0.0.1/ <http://127.0.0.1>",
    "\u202eabc\x00\x1b[31m",
    "1. a",
    "[^1]: x",
    "<!-- -->",
]


@pytest.mark.parametrize("data", HOSTILE)
def test_nothing_that_a_card_is_told_becomes_markup(data):
    "The same tags as of an innocent card, and the text as it was given, without what cannot be printed."
    model = freeze(Net(), "norm+output")
    card, innocent = (model_card(model, "you/birds", **SAID | dict(data=d)) for d in (data, "birds"))
    assert card.splitlines()[:7] == innocent.splitlines()[:7] and len(card.splitlines()) == len(innocent.splitlines())
    page, other = (
        Seen(
            mistune.create_markdown(escape=False, plugins=["table", "url", "strikethrough", "footnotes"])(
                c.split("\n---\n", 1)[1]
            )
        )
        for c in (card, innocent)
    )
    assert page.tags == other.tags
    shown = " ".join("".join(c if c.isprintable() else " " for c in data).split())
    assert shown in page.text and other.text.replace("birds", "") == page.text.replace(shown, "").replace("birds", "")
    assert re.fullmatch(r"(?:\w|[ ,.%()/-]|&#\d+;)*", plain(data))


def test_what_nobody_could_mean_is_refused(server, tmp_path):
    model = freeze(Net(), "norm+output")
    for wrong, why in (
        (dict(accuracy=101), "accuracy 101 is not a percentage"),
        (dict(accuracy=float("nan")), "not a percentage"),
        (dict(accuracy="<b>"), "not a percentage"),
        (dict(n=0), "n 0 is not a number of test images"),
        (dict(n=2.5), "n 2.5"),
        (dict(data=" "), "is not a description"),
        (dict(data="x" * 301), "is not a description"),
        (dict(base="<b>"), "base '<b>' is not a name"),
    ):
        with pytest.raises(ValueError, match=why): push_delta(model, "you/birds", **SAID | wrong)
    for repo in ("birds", "../birds/x", "a/../../etc", "you/<b>", "you/b'); import os; ('", "you/birds\n", "C:\\birds"):
        with pytest.raises(ValueError): push_delta(model, repo, **SAID)
        with pytest.raises(ValueError): pull_delta(repo, cache_dir=tmp_path)
    assert not server.repos and not [*tmp_path.iterdir()]


def test_what_is_not_there_or_no_delta_gets_a_sentence(server, tmp_path, monkeypatch):
    server.repos["you/empty"] = {}
    for args in (("you/none",), ("you/empty",), ("you/empty", "v2")):
        with pytest.raises(
            ValueError, match=f"{' at '.join(args)} is not a repository with a {FILE}; push_delta makes one"
        ) as e:
            pull_delta(*args, cache_dir=tmp_path)
        assert "\n" not in str(e.value)
    good = save_delta(trained(Net(), "norm+output"), tmp_path / "it.safetensors", base=BASE).read_bytes()
    for i, content in enumerate(
        (good[:300], b"\x80\x04pickle", good.replace(BASE.encode(), b"<script>alert(1)</scr>"), b"x" * 5000)
    ):
        server.repos[f"you/odd{i}"] = {FILE: content}
        with pytest.raises(ValueError, match="is no delta: ") as e: pull_delta(f"you/odd{i}", cache_dir=tmp_path)
        assert "\n" not in str(e.value)
    server.repos["you/giant"] = {FILE: good}
    monkeypatch.setattr(hub, "LARGEST", len(good) - 1)
    with pytest.raises(ValueError, match="and at most .* are fetched"): pull_delta("you/giant", cache_dir=tmp_path)
    assert not [p for p in tmp_path.rglob("*") if "giant" in str(p)]


def test_without_huggingface_hub_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ImportError, match=r"the Hub needs huggingface_hub, which is not installed; pip install 'bnonly\[hub\]'"
    ):
        pull_delta("you/birds")
