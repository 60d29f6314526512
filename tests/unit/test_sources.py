"""What --data_path names: shares of files, datasets of a hub, and what is here before them."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from mechanisms import hubs
from mechanisms.data.datasets import load_dataset, split
from mechanisms.data.encoder import ConversationEncoder
from mechanisms.errors import UserError
from mechanisms.sources import data_files
from mechanisms.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]


def write(path, numbers, name=""):
    path.write_text("".join(json.dumps({"instruction": f"{name}{number}?", "output": f"It is {number}."}) + "\n"
                            for number in numbers))
    return str(path)


@pytest.fixture
def load(make_model, tmp_path):
    """load({file: share}, lazy=False) -> (dataset, report)"""
    encoder = ConversationEncoder(load_tokenizer(str(make_model())), 100)
    return lambda files, lazy=False: load_dataset(files, encoder, str(tmp_path / "cache"), lazy)


def digests(dataset, path):
    return [int(dataset.digests[index]) for index in range(len(dataset)) if dataset.places(index)[0].startswith(path)]


@pytest.mark.parametrize("lazy", [False, True])
def test_a_share_is_chosen_by_content_and_said(load, tmp_path, lazy):
    a, b = write(tmp_path / "a", range(50), "a"), write(tmp_path / "b", [*range(100), *range(10)])
    other = write(tmp_path / "other", range(99, -1, -1))
    whole, report = load({a: 1.0, b: 1.0}, lazy)
    part, shared = load({a: 1.0, b: 0.3}, lazy)
    assert digests(part, a) == digests(whole, a) and len(whole) == 160
    chosen = set(digests(part, b))
    assert len(chosen) == 30 and digests(part, b) == [digest for digest in digests(whole, b) if digest in chosen]
    assert set(load({other: 0.3}, lazy)[0].digests.tolist()) == chosen
    assert chosen < set(load({other: 0.6}, lazy)[0].digests.tolist())
    assert shared.sources[0] == report.sources[0] and sum(source.samples for source in shared.sources) == len(part)
    lines = shared.lines("Data:")
    assert f"{b} x 0.3  {len(digests(part, b))} records, " in lines[-1] and "together" in lines[-1]
    if not lazy:
        counted = [sum(len(part[index]["input_ids"]) for index in range(len(part))),
                   sum((part[index]["labels"][1:] != -100).sum() for index in range(len(part)))]
        assert [sum(numbers) for numbers in list(zip(*shared.sources))[4:]] == counted
        assert sum(source.tokens for source in report.sources) == report.tokens
        assert sum(source.trained for source in report.sources) == report.trained
    assert not load({a: 1.0}, lazy)[1].lines("Data:")[-1].startswith("  Taken")


def test_a_share_above_one_repeats_and_never_mixes_with_what_is_held_out(load, tmp_path):
    a, b = write(tmp_path / "a", range(200), "a"), write(tmp_path / "b", range(100))
    dataset, report = load({a: 1.0, b: 2.5})
    taken = digests(dataset, b)
    assert len(taken) == 250 and sorted(map(taken.count, set(taken))) == [2] * 50 + [3] * 50
    assert report.sources[1][1:4] == (2.5, 250, 250)
    for whole in (dataset, load({a: 1.0, b: 0.3})[0]):
        trained, held_out = split(whole, 0.2)
        assert not set(trained.digests) & set(held_out.digests)
        part = len(set(digests(held_out, b))) / len(set(digests(whole, b)))
        assert 0.1 < part < 0.35  # what is held out comes out of both files


def test_a_share_of_nothing_is_refused(load, tmp_path):
    with pytest.raises(UserError, match=r"few:0.01 takes none of its records: it has too few"):
        load({write(tmp_path / "few", range(9)): 0.01, write(tmp_path / "more", range(9)): 1.0})


def test_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.parquet", "b.parquet:0.3", "dir/c.json", "user/name/d.csv"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    looked_up = []

    def of_hub(name, split):
        looked_up.append((name, split))
        return [f"{name}-{split}"]

    def found(*words):
        return data_files(words, of_hub)

    assert found("a.jsonl", "b.parquet:0.3", "dir:2.5") == ({"a.jsonl": 1, "b.parquet:0.3": 1, "dir/c.json": 2.5}, [])
    assert found("b.parquet:.5", "*.jsonl:2") == ({"b.parquet": 0.5, "a.jsonl": 2}, [])
    assert found("user/name", "user/name:0.5")[0] == {"user/name/d.csv": 1} and not looked_up  # what is here wins
    assert found("a.jsonl:0.5", "*.jsonl")[1] == ["a.jsonl is named twice, with the shares 0.5 and 1"]
    assert "a share is more than 0" in found("a.jsonl:0")[1][0]
    for word in ("gone.jsonl", "dir/gone.jsonl", "dir/gone", "no/gone.parquet", "gone", "a.jsonl:x", "x/y/z"):
        assert found(word) == ({}, [f"no such file, folder or match: {word}"])
    assert found("gone.jsonl:0.3")[1] == ["no such file, folder or match: gone.jsonl"] and not looked_up
    assert found("me/chats", "me/chats:test", "me/chats:0.5", "me/chats:a:2")[0] == {
        "me/chats-None": 1, "me/chats-test": 1, "me/chats-a": 2} and len(looked_up) == 4
    assert data_files(["me/chats:train:0.3"]) == ({}, [])


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the Hub for one dataset, me/chats."""

    FILES = {"data/train-00000.jsonl": b'{"instruction": "q", "output": "a"}\n' * 2,
             "data/test-00000.jsonl": b'{"instruction": "t", "output": "a"}\n', "README.md": b"Chats.\n"}

    def do_GET(self):
        if self.path.startswith("/api/datasets/me/chats"):
            body = json.dumps({"id": "me/chats", "sha": "a" * 40, "siblings": [
                {"rfilename": name} for name in self.FILES]}).encode()
            if "/tree/" in self.path:
                body = json.dumps([{"type": "file", "path": name, "size": len(data), "oid": "b" * 40}
                                   for name, data in self.FILES.items()]).encode()
        else:
            body = self.FILES.get(self.path.removeprefix(f"/datasets/me/chats/resolve/{'a' * 40}/"))
        self.send_response(404 if body is None else 200)
        if body is None:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{hash(body)}"')
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_dataset_of_the_hub_and_what_is_said_without_it(tmp_path):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = ("import sys, time\nfrom mechanisms.data.records import Problems, find_files, read_records\n"
              "import datasets\nbegan, problems = time.time(), Problems()\n"
              "files = find_files(sys.argv[1:], problems)\n"
              "print([record['instruction'] for path in files for _, record in read_records(path, problems)],"
              "list(files.values()), problems.fatal, time.time() - began < 15, sep='\\n')")

    def run(*words, **environment):
        done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, env={
            **os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0", "NO_PROXY": "*", **environment})
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines(), done.stderr

    gone, advice = "as a dataset of the Hugging Face Hub it cannot be had: ", "hf download you/other --repo-type"
    (records, shares, fatal, quick), said = run("me/chats", "you/other")
    assert records == "[]" and "me/chats holds the splits test, train. Name one: me/chats:train" in fatal
    assert "you/other is no file or folder here, and no dataset of the Hugging Face Hub that you may read" in fatal
    assert quick == "True"
    assert run("me/chats:train:0.5", "me/chats:test")[0] == ["['q', 'q', 't']", "[0.5, 1.0]", "[]", "True"]
    server.shutdown()
    server.server_close()
    assert run("me/chats:test", HF_HUB_OFFLINE="1")[0][0] == "['t']"  # it has been downloaded
    for environment, reason in (({"HF_HUB_OFFLINE": "1"}, "offline mode is enabled"), ({}, "Connection refused")):
        (_, _, fatal, quick), said = run("you/other", **environment)
        assert gone in fatal and reason in fatal and advice in fatal and quick == "True" and "Retrying" not in said
        assert len(eval(fatal)) == 1 and "\n" not in eval(fatal)[0]


FAKE = """
import pathlib
def snapshot_download(name, repo_type, cache_dir=None):
    if name == "me/gone":
        raise RuntimeError("no such thing\\nmore")
    return str(pathlib.Path(__file__).parent / repo_type)
"""


@pytest.fixture
def modelscope(tmp_path, monkeypatch):
    (tmp_path / "modelscope.py").write_text(FAKE)
    (tmp_path / "dataset").mkdir()
    write(tmp_path / "dataset" / "train.jsonl", range(3))
    monkeypatch.setenv("MODELSCOPE", "1")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("modelscope", None)


def test_names_go_to_modelscope_where_that_is_asked_for(modelscope, monkeypatch):
    assert hubs.model_here("me/model") == str(modelscope / "model")
    assert hubs.model_here(str(modelscope)) == str(modelscope)
    assert hubs.dataset_files("me/chats", None) == [str(modelscope / "dataset" / "train.jsonl")]
    with pytest.raises(UserError, match="me/gone is no folder here, and as a model of ModelScope .*: no such thing$"):
        hubs.model_here("me/gone")
    for value in ("0", "", "false"):
        monkeypatch.setenv("MODELSCOPE", value)
        assert hubs.model_here("me/model") == "me/model"


def test_modelscope_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setenv("MODELSCOPE", "1")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    for look in (hubs.model_here, lambda name: hubs.dataset_files(name, None)):
        with pytest.raises(UserError, match="MODELSCOPE is set, .* pip install modelscope. Or unset MODELSCOPE"):
            look("me/model")


def test_shares_and_columns_by_the_flags(make_model, tmp_path, capsys):
    import finetune

    (tmp_path / "a.jsonl").write_text("".join(f'{{"q": "{number}", "a": "yes"}}\n' for number in range(10)))
    (tmp_path / "b.csv").write_text("a,q\n" + "".join(f"no,{number}?\n" for number in range(10)))
    words = ["--model_name_or_path", str(make_model()), "--output_dir", str(tmp_path / "out"), "--cache_dir",
             str(tmp_path / "cache"), "--data_path", str(tmp_path / "a.jsonl"), f"{tmp_path}/b.csv:0.5", "--columns"]
    tokenizer, train, _, reports = finetune.prepare([*words, "prompt=q,response=a"])
    assert [tokenizer.decode(train[index]["input_ids"]).count("yes<|im_end|>") for index in range(len(train))] \
        == [1] * 10 + [0] * 5
    assert [source.records for source in reports["train"].sources] == [10, 5]
    assert f"{tmp_path}/b.csv x 0.5  5 records, 5 samples, " in capsys.readouterr().out
    with pytest.raises(UserError, match="--columns promt=q: there is no 'promt' to fill"):
        finetune.prepare([*words, "promt=q", "response=a"])
    with pytest.raises(UserError, match="a column that --columns names is missing: 'x' for prompt; there are 'q', 'a'"):
        finetune.prepare([*words, "prompt=x", "response=a"])
