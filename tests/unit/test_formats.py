"""Files as people have them: the same records out of every kind of file, and the right advice for the others."""

import bz2
import csv
import gzip
import io
import json
import os
import random
import subprocess
import sys
import zipfile

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from finetune import ConversationEncoder, load_tokenizer
from mechanisms.data.datasets import read_files, tokenize
from mechanisms.data.files import _values
from mechanisms.data.records import Problems, find_files, read_records
from mechanisms.data.report import DataReport

RECORDS = [{"instruction": f"Question {number}, \"quoted\"\nand more 你好", "input": "x" * (number % 3),
            "output": f"安녕 {number}" if number % 10 else " "} for number in range(1000)]


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def arrow(records, make):
    table, sink = pyarrow.Table.from_pylist(records), io.BytesIO()
    with make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    return sink.getvalue()


def parquet(records):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), sink, row_group_size=300)
    return sink.getvalue()


def separated(records, delimiter):
    sink = io.StringIO(newline="")
    writer = csv.DictWriter(sink, records[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return sink.getvalue().encode()


def lines(records):
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records).encode()


KINDS = {"lines": lines, "array": lambda records: json.dumps(records).encode(),
         "pretty array": lambda records: json.dumps(records, indent=1, ensure_ascii=False).encode(),
         "gzip": lambda records: gzip.compress(lines(records)), "bzip2": lambda records: bz2.compress(lines(records)),
         "zstd": lambda records: zstd(lines(records)), "parquet": parquet,
         "arrow stream": lambda records: arrow(records, pyarrow.ipc.new_stream),
         "arrow file": lambda records: arrow(records, pyarrow.ipc.new_file),
         "csv": lambda records: separated(records, ","), "csv with ;": lambda records: separated(records, ";"),
         "tsv": lambda records: separated(records, "\t"),
         "csv with BOM, gzip": lambda records: gzip.compress(b"\xef\xbb\xbf" + separated(records, ","))}


def read(path):
    problems = Problems()
    return list(read_records(str(path), problems)), problems


@pytest.fixture(scope="module")
def outcome(make_model):
    """outcome(files) -> everything that training sees of them, places aside."""
    encoder = ConversationEncoder(load_tokenizer(str(make_model())), max_length=64)

    def found(files):
        report = DataReport()
        samples = [[array.tolist() for array in part[:4]] for part in tokenize(files, encoder, report)]
        fields = report.to_json()
        rejected = [(row["record"], row["reasons"], row["data"]) for row in fields.pop("rejected")]
        return samples, rejected, fields

    return found


@pytest.fixture(scope="module")
def expected(outcome, tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "data.jsonl"
    path.write_bytes(lines(RECORDS))
    return outcome([str(path)])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lines"])
def test_every_kind_of_file_gives_the_same_samples_and_report(kind, outcome, expected, tmp_path):
    path = tmp_path / "data.txt"  # the name says nothing
    path.write_bytes(KINDS[kind](RECORDS))
    assert [record for _, record in read(path)[0]] == RECORDS
    assert len(expected[1]) == 100 and outcome([str(path)]) == expected


def test_a_folder_of_save_to_disk_gives_the_same(outcome, expected, tmp_path):
    Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "saved"), num_shards=1)
    problems = Problems()
    assert outcome(find_files([str(tmp_path / "saved")], problems)) == expected and not problems.fatal
    Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "shards"), num_shards=12)
    files = find_files([str(tmp_path / "shards")], problems)
    assert [record for _, record in read_files(files, problems)] == RECORDS and not problems.fatal


def test_of_a_saved_folder_with_splits_one_is_named(tmp_path):
    train = Dataset.from_list(RECORDS[:3])
    DatasetDict({"train": train, "test": train}).save_to_disk(str(tmp_path / "both"))
    problems = Problems()
    find_files([str(tmp_path / "both")], problems)
    assert problems.fatal == [f"{tmp_path}/both holds the splits test, train. Name one: {tmp_path}/both/train"]
    DatasetDict({"train": train}).save_to_disk(str(tmp_path / "one"))
    [file] = find_files([str(tmp_path / "one")], problems := Problems())
    assert len(read(file)[0]) == 3 and not problems.fatal


def test_what_a_record_lacks_is_absent_in_a_table_too(tmp_path):
    records = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": True}]},
               {"instruction": "q", "output": "a"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records, pyarrow.unify_schemas(
        [pyarrow.Table.from_pylist([record]).schema for record in records])), tmp_path / "x")
    assert [record for _, record in read(tmp_path / "x")[0]] == records


@pytest.mark.parametrize("values", [
    [[{"a": 1, "b": [{"c": "x"}, None, {}]}, None], None, [], [{"b": []}]], [["x", None], [], None], [[[1], None]],
    [{"a": {"b": None}}, None, {"a": {"b": 1.5}}], [b"x", None], [True, None], ["x", None, ""], [{}, None]])
def test_columns_become_the_values_that_pyarrow_makes_of_them(values):
    def without_nulls(value):
        if isinstance(value, dict):
            return {key: without_nulls(child) for key, child in value.items() if child is not None}
        return [*map(without_nulls, value)] if isinstance(value, list) else value

    small = pyarrow.array(values * 3)
    large = small.cast(pyarrow.large_list(small.type.value_type)) if pyarrow.types.is_list(small.type) else small
    for array in (small, large, small.dictionary_encode() if small.type == pyarrow.string() else small):
        for part in (array, array.slice(1), array.slice(2, 3), array[:0]):
            assert _values(part) == without_nulls(part.to_pylist())


def test_a_table_with_a_column_twice_is_refused(tmp_path):
    table = pyarrow.table([["q"], ["a"], ["b"]], names=["instruction", "output", "output"])
    pyarrow.parquet.write_table(table, tmp_path / "x")
    [fatal] = read(tmp_path / "x")[1].fatal
    assert fatal == f"{tmp_path}/x: two columns have the same name: instruction, output, output"


def test_places_in_csv_are_lines(tmp_path):
    (tmp_path / "x").write_bytes(b'instruction,output\n"a\nb",c\n\nd,e,f\ng,h\n')
    found, problems = read(tmp_path / "x")
    assert [(place.line, place.number) for place, _ in found] == [(2, 1), (6, 3)]
    [row] = problems.rejected
    assert (row["line"], row["record"]) == (5, 2)
    assert row["reasons"] == ["a row has one cell for each column: 3 cells, 2 columns (instruction, output)"]


def xlsx():
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
    return sink.getvalue()


@pytest.mark.parametrize("data, message", [
    (xlsx(), "an Excel workbook (XLSX). Save it as CSV UTF-8"),
    (b"PK\x03\x04abc", "a zip archive. Unpack it: unzip FILE"),
    (b"\xfd7zXZ\0abc", "an xz file. Unpack it: xz -dk FILE"),
    (lines(RECORDS[:2]).decode().encode("utf-16-le"), "UTF-16, not UTF-8. Convert it: iconv -f UTF-16LE -t UTF-8 FILE"),
    (lines(RECORDS[:2]).decode().encode("utf-16"), "UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 FILE"),
    (b"<!DOCTYPE html>\n<html>", "HTML or XML. Was a web page saved instead of the data?"),
    (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the data. Fetch the data: git lfs pull"),
    (b"SQLite format 3\0", "an SQLite database. Export the table"),
    (gzip.compress(parquet(RECORDS[:2]), mtime=0), "a packed parquet file. Unpack it first"),
    (gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "a file packed twice. Unpack it first"),
    (b"just words\nand more\n", "neither JSON nor CSV with a line of column names: it starts with 'just words'"),
    (b'{"a": 1},\n{"a": 2},\n', "JSON Lines with a comma at the end of each line. Remove them: sed"),
    (b"a,a\n1,2\n", "two columns have the same name: a, a"),
    ("instruction,output\n你好,a\n".encode("gb18030"), ":2: not UTF-8 (byte 0xc4), perhaps gb18030. Convert it: iconv"),
    (b'instruction,output\na,"b\n', "not valid CSV in the row that starts on line 2: unexpected end of data"),
    (parquet(RECORDS)[:-9], "a damaged parquet, or one cut off"),
    (gzip.compress(lines(RECORDS), mtime=0)[:-20], "a damaged archive, or one cut off"),
    (bz2.compress(lines(RECORDS))[:-20], "a damaged archive, or one cut off"),
    (zstd(lines(RECORDS))[:-20], "a damaged archive, or one cut off"),
])
def test_a_file_of_another_kind_is_named_with_what_to_do(data, message, tmp_path):
    (tmp_path / "data.jsonl").write_bytes(data)
    _, problems = read(tmp_path / "data.jsonl")
    [fatal] = problems.fatal
    assert fatal.startswith(f"{tmp_path}/data.jsonl:") and message in fatal and not problems.rejected


def test_pyarrow_is_imported_only_for_files_that_need_it(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(RECORDS)))
    (tmp_path / "b.csv").write_bytes(separated(RECORDS, ","))
    script = ("import sys\nfrom mechanisms.data.records import Problems, read_records\n"
              "assert all(len(list(read_records(path, Problems()))) == 1000 for path in sys.argv[1:])\n"
              "assert not {'pyarrow', 'datasets', 'torch'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", script, tmp_path / "a.jsonl.gz", tmp_path / "b.csv"], check=True)


def test_what_a_terminal_cannot_show_is_escaped():
    script = "from mechanisms.console import say\nsay('\u4f60', 5)"
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"}).stdout
    assert said == "\\u4f60\n5\n"


@pytest.mark.parametrize("kind", ["array", "pretty array"])
def test_an_array_is_read_in_pieces_with_the_places_and_faults_of_the_whole(kind, tmp_path, monkeypatch):
    records = RECORDS[:40] + [1234567, "\U0001f600", None, [], 1.5e10]
    data = KINDS[kind](records)
    broken = data[:len(data) // 2] + b"\0" + data[len(data) // 2:]
    (tmp_path / "x").write_bytes(data)
    (tmp_path / "y").write_bytes(broken)
    whole, wrong = read(tmp_path / "x")[0], read(tmp_path / "y")[1].fatal
    with pytest.raises(json.JSONDecodeError) as error:
        json.loads(broken)
    assert f"{error.value.msg} at line {error.value.lineno} column {error.value.colno}" in wrong[0]
    for size in (1, 2, 3, 7, 100):
        monkeypatch.setattr("mechanisms.data.records._CHUNK", size)
        assert read(tmp_path / "x")[0] == whole and read(tmp_path / "y")[1].fatal == wrong


def test_mutated_files_never_end_in_a_traceback(tmp_path):
    from tests.fuzz_files import fuzz_files

    counts = fuzz_files(130, random.Random(0), tmp_path)
    assert counts.total() == 130
