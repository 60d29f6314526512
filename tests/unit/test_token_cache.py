"""The token cache: whatever happens to its files, it is what was written or made again, and said."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from examples.make_tiny_model import EXAMPLES
from mechanisms.data import datasets, token_cache
from mechanisms.data.datasets import PackedRows, load_dataset, split
from mechanisms.data.encoder import ConversationEncoder
from mechanisms.data.token_cache import DamagedCache, TextCache, TokenCache
from mechanisms.errors import UserError
from mechanisms.tokenizer import load_tokenizer

FILES = sorted(map(str, (EXAMPLES / "data").iterdir()))
ALL = [*token_cache.ARRAYS, token_cache.REPORT]
OF_TEXTS = [*TextCache.CONTENT, *token_cache.OF_SAMPLES, token_cache.REPORT]
UNKNOWN_LAZILY = {"counts_tokens", "truncated", "tokens", "trained", "longest", "once"}  # in a report
DAMAGE = {"truncated": lambda path: path.write_bytes(path.read_bytes()[:-8]),
          "emptied": lambda path: path.write_bytes(b""),
          "halved": lambda path: path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 16 * 8]),
          "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
          "one bit flipped": lambda path: path.write_bytes(
              (content := path.read_bytes())[:40] + bytes([content[40] ^ 1]) + content[41:]),
          "longer": lambda path: path.write_bytes(path.read_bytes() + bytes(8)), "missing": lambda path: path.unlink(),
          "a folder": lambda path: (path.unlink(), path.mkdir())}


@pytest.fixture
def load(make_model, tmp_path):
    """load(files) -> dataset, by the cache in tmp_path."""
    encoder = ConversationEncoder(load_tokenizer(str(make_model())), 100)

    def run(files=FILES, lazy=False, reports=None):
        dataset, report = load_dataset(files, encoder, str(tmp_path), lazy)
        if reports is not None:
            reports.append(report)
        return dataset

    return run


def content(dataset):
    return [(dataset[index]["input_ids"].tolist(), dataset[index]["labels"].tolist()) for index in range(len(dataset))]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_again_and_said(load, tmp_path, capsys, damage, lazy):
    whole = content(load(lazy=lazy))
    for name in OF_TEXTS if lazy else ALL:
        [folder] = tmp_path.glob("texts-*" if lazy else "tokens-*")
        DAMAGE[damage](folder / name)
        capsys.readouterr()
        assert content(load(lazy=lazy)) == whole
        [line] = [line for line in capsys.readouterr().out.split("\n") if "is made again" in line]
        assert name in line
        assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    load(lazy=lazy)
    assert "is made again" not in capsys.readouterr().out


def test_lazy_data_are_on_disk_and_the_same_samples_and_report(load, tmp_path, capsys):
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"instruction": f"{number} is?", "output": "so " * (number % 90)}) + "\n"
                            for number in range(600)))
    reports, datasets_ = [], []
    for lazy in (False, True, True):  # the second time from the cache
        datasets_.append(load([*FILES, str(long)], lazy, reports))
    eager, *lazies = datasets_
    for dataset, report in zip(lazies, reports[1:]):
        assert content(dataset) == content(eager) and len(eager) > 600
        assert all(isinstance(array, np.memmap) for array in dataset.content) and dataset.lengths is None
        assert (dataset.digests == eager.digests).all()
        assert [dataset.places(index) for index in range(len(eager))] == [eager.places(index)
                                                                          for index in range(len(eager))]
        fields, expected = report.to_json(), reports[0].to_json()
        assert {key for key in fields if fields[key] != expected[key]} <= UNKNOWN_LAZILY and not report.counts_tokens
        assert report.problems.rejected and report.left_out == reports[0].left_out


@pytest.mark.parametrize("report", [b"[]", b"null", b"{}", b'{"digest": 1}', b"[" * 99999, b'"\xff"', b"1" * 5000,
                                    b'{"report": {}, "files": {}, "digest": "x"}'])
def test_no_report_is_a_traceback(load, tmp_path, report):
    whole = content(load())
    [folder] = tmp_path.glob("tokens-*")
    (folder / token_cache.REPORT).write_bytes(report)
    assert content(load()) == whole


def test_everything_is_on_the_disk_before_the_cache_gets_its_name(load, monkeypatch):
    flushed, fsync, replace = [], os.fsync, os.replace

    def note(descriptor):
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def rename(source, target):
        assert {*ALL} <= set(flushed) and flushed[-1] == os.path.basename(source)
        flushed.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", rename)
    load()
    assert flushed.count("renamed") == 1 and flushed[-1] != "renamed"


def test_what_killed_runs_left_is_removed_and_never_in_the_way(load, tmp_path):
    [name] = [folder.name for folder in (load(), tmp_path)[1].glob("tokens-*")]
    DAMAGE["missing"](tmp_path / name / token_cache.REPORT)
    left = tmp_path / f"{name}.1.unfinished"  # as process 1 of a container left it
    left.mkdir()
    (left / token_cache.IDS).write_bytes(b"1234")
    empty, young = tmp_path / f"{name}.2.unfinished", tmp_path / f"{name}.3.unfinished"
    empty.mkdir()
    young.mkdir()
    os.utime(empty, (time.time() - 90,) * 2)
    written = tmp_path / f"{name}.4.unfinished"  # by a run that is still there
    written.mkdir()
    with open(written / token_cache.IDS, "wb") as file:
        assert token_cache._try_lock(file)
        load()
    assert {path.name for path in tmp_path.iterdir()} == {name, young.name, written.name}
    texts = tmp_path / "texts-x.1.unfinished"
    texts.mkdir()
    (texts / next(iter(TextCache.CONTENT))).write_bytes(b"{}")
    load(lazy=True)
    assert not texts.exists()


SLOW = """
import sys, time
import numpy as np
from mechanisms.data.token_cache import TokenCache, TokenizedSamples
def samples():
    for number in range(5):
        time.sleep(0.1)
        yield TokenizedSamples(np.full(3, number, np.int32), np.ones(3, bool), np.array([3]),
                               np.array([number], np.uint64), np.array([[0, number, 1]], np.int32))
TokenCache.write(sys.argv[1], samples(), dict)
"""


def test_two_that_write_the_same_cache_at_once(tmp_path):
    """Each may be the only process of its container: no name is made of a process id."""
    command = [sys.executable, "-c", SLOW, str(tmp_path / "tokens-x")]
    unshare = ["unshare", "--pid", "--fork", "--user"]
    fresh = subprocess.run([*unshare, "true"], capture_output=True).returncode == 0
    runs = [subprocess.Popen([*(unshare if fresh else []), *command], cwd=EXAMPLES.parent) for _ in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["tokens-x"]
    cache = TokenCache(str(tmp_path / "tokens-x"), ["data"])
    assert [cache.places(index) for index in range(5)] == [[f"data:{index}"] for index in range(5)]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("kind", ["a file", "a link to nowhere", "read-only", "full", "unreadable"])
def test_a_cache_folder_that_cannot_be_used_is_one_line(load, make_model, tmp_path, monkeypatch, kind, lazy):
    encoder = ConversationEncoder(load_tokenizer(str(make_model())), 100)
    cache = tmp_path / "cache"
    if kind == "a file":
        cache.write_text("")
    elif kind == "a link to nowhere":
        cache.symlink_to("/proc/nowhere")
    elif kind == "read-only":
        cache = "/proc/cache"
    elif kind == "full":
        cache = tmp_path
        monkeypatch.setattr(token_cache, "_append", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    elif kind == "unreadable":
        load_dataset(FILES, encoder, str(cache), lazy)
        monkeypatch.setattr(token_cache, "_read_manifest",
                            lambda folder: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    words = "texts" if lazy else "tokens"
    with pytest.raises(UserError, match=f"{words} .* cannot be used: .* another folder with --cache_dir") as error:
        load_dataset(FILES, encoder, str(cache), lazy)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.unfinished"))


def test_every_kind_of_dataset_knows_where_its_records_stand(load, tmp_path):
    files = []
    for number, name in enumerate("ba"):
        files.append(str(tmp_path / f"{name}.jsonl"))
        with open(files[-1], "w") as file:
            for line in range(30):
                answer = "" if line % 7 == 3 else f"answer {line}"
                record = {"instruction": f"question {number}.{line}?", "output": answer}
                file.write(json.dumps(record) + "\n" + "\n" * (line == 11))
    expected = [f"{path}:{1 + line + (line > 11)}" for path in files for line in range(30) if line % 7 != 3]
    kept = None
    for lazy in (False, True):
        dataset = load(files, lazy)
        places = [place for index in range(len(dataset)) for place in dataset.places(index)]
        assert len(places) == len(dataset) and set(places) <= {f"{path}:{line}" for path in files for line in range(32)}
        assert kept in (None, places) and set(expected) <= set(places)
        kept = places
        for part in split(dataset, 0.3):
            assert [part.places(index) for index in range(len(part))] == [[places[number]] for number in part.indices]
    rows = PackedRows(load(files), 100, 0)
    assert sorted(place for row in range(len(rows)) for place in rows.places(row)) == sorted(places)
    assert all(len(rows.places(row)) == len(rows[row]) for row in range(len(rows)))


def test_damage_is_told_from_absence(tmp_path):
    assert datasets.open_cache(str(tmp_path / "none"), []) is None
    with pytest.raises(DamagedCache, match="damaged or missing"):
        TokenCache(str(tmp_path))
    assert np.int32 is token_cache.ARRAYS[token_cache.IDS]
