"""Work on all cores: the results and problems of one core, in the same order; whoever is killed, nothing hangs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import finetune
from mechanisms.data import datasets
from mechanisms.data.cores import on_all_cores
from mechanisms.data.datasets import read_files, to_conversations, tokenize
from mechanisms.data.records import Notices, Problems
from mechanisms.data.report import DataReport
from mechanisms.data.token_cache import TokenCache
from mechanisms.errors import UserError

ROOT = Path(finetune.__file__).parent
HALF = r'{"instruction": "?", "output": "\ud83d"}'  # of an emoji


def test_results_come_in_order_from_other_processes():
    def work(item):
        time.sleep(0.02 * (item % 3))
        return item, os.getpid()

    results = list(on_all_cores(work, iter(range(20))))
    assert [item for item, _ in results] == list(range(20))
    assert os.getpid() not in {pid for _, pid in results}
    assert list(on_all_cores(work, [1])) == [(1, os.getpid())] and list(on_all_cores(work, [])) == []


def test_items_are_taken_only_a_little_ahead():
    taken = []
    results = on_all_cores(lambda item: item, (taken.append(item) or item for item in range(1000)))
    assert next(results) == 0 and len(taken) <= 2 * len(os.sched_getaffinity(0)) + 1
    results.close()


def test_errors_come_through():
    with pytest.raises(ZeroDivisionError):
        list(on_all_cores(lambda item: 1 / item, [2, 1, 0, 1]))
    with pytest.raises(UserError, match="was killed"):
        list(on_all_cores(lambda item: os.kill(os.getpid(), signal.SIGKILL), [1, 2, 3]))


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stop_leaves_no_process_behind(stop):
    code = ("import time\nfrom mechanisms.data.cores import on_all_cores\nfrom mechanisms.errors import *\n"
            "with user_errors_end_the_program():\n"
            "    for item in on_all_cores(lambda item: time.sleep(0.1), range(10000)): print(item, flush=True)")
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True, start_new_session=True)
    run.stdout.readline()
    children = psutil.Process(run.pid).children()
    assert children
    (os.killpg if stop == signal.SIGINT else os.kill)(run.pid, stop)  # Ctrl-C goes to all of them
    errors = run.communicate(timeout=30)[1]
    assert not psutil.wait_procs(children, timeout=10)[1]
    if stop == signal.SIGINT:
        assert (run.returncode, errors) == (130, "\ninterrupted\n")


@pytest.mark.parametrize("much_text", [0, 1 << 40])
def test_samples_and_problems_of_many_records(make_model, tmp_path, monkeypatch, much_text):
    monkeypatch.setattr(datasets, "MUCH_TEXT", much_text)
    encoder = finetune.ConversationEncoder(finetune.load_tokenizer(str(make_model())), 64)
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    for path in files:
        with open(path, "w", encoding="utf-8") as file:
            for number in range(1200):
                record = {"instruction": f"{number} is?", "output": f"{number} <|im_end|> 好" + " so" * (number % 90)}
                line = json.dumps(record | {"extra": 1} if number % 7 == 0 else record)
                file.write({100: "{", 701: '{"instruction": ""}', 1100: "[1]", 1101: HALF}.get(number, line) + "\n")
    report = DataReport()
    TokenCache.write(str(tmp_path / "cache"), tokenize(files, encoder, report), report.to_json)
    cache = TokenCache(str(tmp_path / "cache"))
    found = [(cache[index]["input_ids"].tolist(), cache[index]["labels"].tolist(), digest)
             for index, digest in enumerate(cache.digests)]

    assert (encoder.ids_of.tiktoken is None) == (much_text > 0)

    encoder = finetune.ConversationEncoder(finetune.load_tokenizer(str(make_model())), 64)
    problems, notices, expected = Problems(), Notices(), []
    for _, conversation in to_conversations(read_files(files, problems), problems, notices):
        [sample] = encoder(conversation, notices)
        expected.append((sample.input_ids, sample.labels, conversation.digest))
    assert found == expected and len(found) == 2392
    assert report.problems.rejected == problems.rejected and len(problems.rejected) == 8
    assert cache.report["rejected"] == problems.rejected
    problems.write(tmp_path / "rejected.jsonl")
    written = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["data"] for row in written] == [row["data"] for row in problems.rejected]
    assert report.notices == notices and report.notices["<|im_end|> written in the data, read as text"] == 2392
    assert report.truncated and report.tokens == sum(len(ids) for ids, _, _ in expected)
    assert report.trained == sum(label != -100 for _, labels, _ in expected for label in labels[1:])
