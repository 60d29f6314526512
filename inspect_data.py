"""See what finetune.py would train on, token by token: give it the same flags. No weights are read, nothing is trained.

  python inspect_data.py -m Qwen/Qwen2.5-7B-Instruct -d chats.jsonl                       # what the data are made of
  python inspect_data.py -m Qwen/Qwen2.5-7B-Instruct -d chats.jsonl --html samples.html   # 200 samples, as a page
  python inspect_data.py -m Qwen/Qwen2.5-7B-Instruct -d chats.jsonl --record chats.jsonl:17
  python inspect_data.py config.yaml --model_max_length 4096

-m and -d are --model_name_or_path and --data_path. All flags of finetune.py are taken and checked: those below,
--model_max_length and --cache_dir have the effect that they have there, the others none. Training finds the data
tokenized.
"""

import os
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

from mechanisms.errors import UserError, user_errors_end_the_program
from mechanisms.flags import prepare_command_line, read_values
from mechanisms.quiet import silence

TRAINING = os.path.join(os.path.dirname(os.path.abspath(__file__)), "finetune.py")
SHORT = {"-m": "--model_name_or_path", "-d": "--data_path"}  # as the launchers have them


@dataclass
class InspectArguments:
    html: str = field(default=None, metadata={
        "help": "Write a page with up to 200 samples, for any browser: one file that needs no network.",
        "metavar": "FILE"})
    record: str = field(default=None, metadata={
        "help": "Show one record and the id and label of each of its tokens.", "metavar": "FILE:LINE"})
    search: str = field(default=None, metadata={
        "help": "Show the first records with this text, and count them all."})


def parse_arguments(argv):
    """argv -> (inspect arguments, data arguments and others of finetune.py). Raises UserError with all problems."""
    words = prepare_command_line(__file__, [SHORT.get(word, word) for word in argv], TRAINING,
                                 shown=("ModelArguments", "DataArguments"))
    groups, _ = read_values(__file__, words, TRAINING)
    args = groups.pop("InspectArguments")
    training = SimpleNamespace(**{name: value for values in groups.values() for name, value in vars(values).items()})
    given = [f"--{name}" for name, value in vars(args).items() if value is not None]
    problems = [f"{' and '.join(given)} exclude each other: give one"] if len(given) > 1 else []
    if args.record and not args.record.rpartition(":")[2].isdigit():
        problems.append(f"--record {args.record}: write FILE:LINE")
    if args.html and not os.path.isdir(os.path.dirname(args.html) or "."):
        problems.append(f"--html {args.html}: no such folder")
    if problems:
        raise UserError("\n       ".join(problems))
    return args, training


if __name__ == "__main__":
    with user_errors_end_the_program():
        silence()
        COMMAND_LINE = sys.argv[1:]
        parse_arguments(COMMAND_LINE)
    # transformers imports torch wherever it is installed, which takes seconds; tokenizers do without.
    sys.modules["torch"] = None
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # it would say that torch is missing

import itertools
import shutil

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from mechanisms.console import visible
from mechanisms.data.datasets import check_arguments, load_datasets, read_files, split
from mechanisms.data.encoder import ConversationEncoder
from mechanisms.data.records import Place, Problems, find_files
from mechanisms.data.template import strings
from mechanisms.inspection import Shown, Viewer, bins, runs, short_names, survey
from mechanisms.inspection_page import write_page
from mechanisms.qwen1_tokenizer import load_any_tokenizer

WIDEST = 100  # columns
SHOWN_TEXT = 300  # characters of each piece of a sample among others
SHOWN_MATCHES = 5  # records of --search
ON_TERMINAL = ("first", "longest", "shortest answer", "cut", "left out", "unusable", "with tools", "with thinking",
               "with control tokens")
RANDOM = 3


class Output:
    """The terminal, or a file: lines as wide as it is, in 80 columns where that is not known."""

    def __init__(self):
        self.width = min(shutil.get_terminal_size((80, 24)).columns, WIDEST)
        sys.stdout.reconfigure(errors="backslashreplace")
        self.console = Console(width=self.width, highlight=False, markup=False, emoji=False)
        self.block = "█" if self.console.encoding.startswith("utf") else "#"

    def line(self, text="", style="", indent=0):
        """A line, or more where it is too long, all but the first one indented."""
        text = text if isinstance(text, Text) else Text(visible(text), style)
        for part in text.split("\n", allow_blank=True):
            lines = list(part.wrap(self.console, self.width))
            if indent and len(lines) > 1:
                rest = part[len(lines[0]):]
                rest = rest[len(rest.plain) - len(rest.plain.lstrip()):]
                more = rest.wrap(self.console, self.width - indent)
                lines[1:] = [Text(" " * indent).append_text(line) for line in more]
            for line in lines or [Text()]:
                self.console.print(line)

    def heading(self, text):
        self.line()
        self.line(text, "bold")

    def report(self, lines):
        for line in "\n".join(lines).split("\n"):
            self.line(line, indent=len(line) - len(line.lstrip()) + 2)

    def bars(self, rows, cut=None, name=""):
        """[(label, count, what stands behind it)], each with a bar as long as its count.

        cut: number of the row in front of which there is a line with a name.
        """
        rows = [(visible(label), count, f"{count:,}", behind) for label, count, behind in rows]
        label_width, count_width, behind_width = (max(cell_len(row[column]) for row in rows) for column in (0, 2, 3))
        room = self.width - label_width - count_width - behind_width - 8
        most = max(count for _, count, _, _ in rows) or 1
        lines = []
        for label, count, number, behind in rows:
            bar = self.block * max(round(room * count / most), count > 0)
            label, number = set_cell_size(label, label_width), number.rjust(count_width)
            lines.append(Text(f"  {label}  {number}  {behind:<{behind_width}}  ") + Text(bar, "cyan"))
        if cut is not None:
            lines.insert(cut, Text(f"  -- {name} ".ljust(self.width, "-"), "yellow"))
        for line in lines:
            self.line(line)


# ---------------------------------------------------------------------------------------------------------------------
# All records
# ---------------------------------------------------------------------------------------------------------------------

def show_counts(output, found, max_length):
    """What a `Survey` has counted, in bars."""
    output.heading("Lengths of the samples in tokens, before any is cut")
    parts = bins(found.lengths, found.times, max_length)
    labels = [f"{least:,} - {most:,}" for least, most, _ in parts]
    width = max(map(len, labels), default=0)
    total = sum(count for _, _, count in parts) or 1
    rows = [(label.rjust(width), count, f"{count / total:.1%}") for label, (_, _, count) in zip(labels, parts)]
    if rows:
        below = sum(most <= max_length for _, most, _ in parts)
        output.bars(rows, cut=below, name=f"--model_max_length {max_length:,}")
    for title, name in (("Shapes of the records", "shapes"), ("Messages by role", "roles"),
                        ("Languages, by the script of most letters", "scripts")):
        output.heading(title)
        output.bars(shares(found.counts.get(name, {})))
    if found.turns is not None and found.turns.any():
        output.heading("Trained tokens by turn")
        output.bars(turn_rows(found.turns))


def shares(counter):
    total = sum(counter.values())
    rows = sorted(counter.items(), key=lambda row: (-row[1], row[0]))
    return [(label, count, f"{count / total:.1%}") for label, count in rows] or [("none", 0, "")]


def turn_rows(turns):
    """[(which answer of its record, trained tokens, share of all, and answers)]"""
    return [(f"answer {number}{'' if number < len(turns) else ' and later'}", int(tokens),
             f"{tokens / turns[:, 1].sum():.1%} in {answers:,} answers")
            for number, (answers, tokens) in enumerate(turns.tolist(), 1) if answers]


def show_kinds(output, found):
    """How many records are of each kind, and where the first of them stand."""
    total = len(found.places)
    kinds = {kind: np.flatnonzero(records) for kind, records in found.kinds.items()
             if records.any() and kind not in ("first", "longest", "shortest answer")}
    if kinds:
        output.heading("Records to look at")
        for kind, numbers in kinds.items():
            places = ", ".join(found.place(number) for number in numbers[:2])
            output.line(f"  {kind:<22}{len(numbers):>9,}  {len(numbers) / total:>6.1%}  {places}"
                        + (", ..." if len(numbers) > 2 else ""), indent=43)


def random_order(found):
    """Numbers of all records, mixed, the same way each time."""
    return np.random.default_rng(0).permutation(len(found.places)).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Single records
# ---------------------------------------------------------------------------------------------------------------------

def show_record(output, tokenizer, shown, title, where, limit=None):
    """A `Shown` record; limit: characters of each piece of it, None for all of it and its ids."""
    output.line()
    output.line(f"{title} - {where}", "bold", indent=4)
    for reason in shown.reasons:
        output.line(f"  not trained: {reason}", "red", indent=4)
    if not shown.samples:
        output.line(shortened(shown.text, limit))
    for number, sample in enumerate(shown.samples, 1):
        name = f"sample {number} of {len(shown.samples)}: " if len(shown.samples) > 1 else ""
        trained = sum(sample.trained[1:sample.kept])
        output.line(f"  {name}{sample.kept:,} tokens, {trained:,} of them trained", "dim")
        output.line(sample_text(tokenizer, sample, limit))
        if not limit:
            output.line("  token|id, and |- where nothing is trained:", "dim")
            output.line(token_text(tokenizer, sample))
        for answer in sample.answers:
            if answer.start < sample.kept:
                output.line("  " + prompt_line(tokenizer, sample, answer),
                            "green" if sample.same(answer) else "bold red", indent=4)


def sample_text(tokenizer, sample, limit):
    """A sample with what is trained between [[ and ]], on green ground, and what is cut struck through."""
    text = Text()
    for start, end, trained in runs(sample):
        piece = shortened(tokenizer.decode(sample.ids[start:end]), limit)
        if start == sample.kept:
            text.append(f"\n---- cut at {sample.kept:,} tokens, the rest is not trained ----\n", "red")
        if start >= sample.kept:
            text.append(piece, "red strike")
        elif trained:
            text.append(f"[[{piece}]]", "green")
        else:
            text.append(piece)
    return text


def token_text(tokenizer, sample):
    text = Text()
    for token, trained in zip(sample.ids[:sample.kept], sample.trained):
        text.append(visible(tokenizer.decode([token])).replace("\n", "\\n"), "green" if trained else "")
        text.append(f"|{token} " if trained else "|- ", "dim")
    return text


def prompt_line(tokenizer, sample, answer):
    """Whether the tokens before an answer are what inference gives the model for it."""
    if sample.same(answer):
        return f"prompt at inference: {answer.start:,} ids, the same"
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(sample.ids, answer.prompt)))
    trained, asked = (visible(tokenizer.decode(ids[same:same + 10])) for ids in (sample.ids, answer.prompt))
    return (f"prompt at inference: {len(answer.prompt):,} ids, not the same as the {answer.start:,} here: from token "
            f"{same + 1:,} on {asked!r} instead of {trained!r}. This is a fault of this program: please report it")


def shortened(text, limit):
    if limit and len(text) > limit:
        text = f"{text[:limit // 2]} ... {len(text) - limit:,} characters ... {text[-limit // 2:]}"
    return visible(text)


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------

def inspect(argv):
    """Print what is asked for, or write the page. Raises UserError, also where training would stop."""
    args, training = parse_arguments(argv)
    if problems := check_arguments(training):
        raise UserError("\n       ".join(problems))
    output = Output()
    tokenizer = load_any_tokenizer(training.model_name_or_path, training.cache_dir)
    encoder = ConversationEncoder.of(tokenizer, training.model_max_length, training)
    viewer = Viewer(encoder, training.columns)
    if args.record or args.search:
        find(output, viewer, training, args)
        return
    datasets, reports, problems = load_datasets(training, encoder, training.cache_dir)
    if problems.fatal:
        problems.stop_or_skip(0)
    held_out = split(datasets["train"], training.eval_ratio)[1] if training.eval_ratio else None
    surveys = {name: survey(dataset, reports[name], encoder, training.columns, held_out if name == "train" else None)
               for name, dataset in datasets.items()}
    for name, found in surveys.items():
        output.line()
        output.report(reports[name].lines(f"Data ({name}):"))
        show_counts(output, found, training.model_max_length)
        show_kinds(output, found)
    if "eval" in surveys and (both := surveys["train"].overlap(surveys["eval"])):
        output.line(f"  note: {both:,} conversations of the evaluation data are trained on too", "yellow", indent=4)
    if args.html:
        try:
            write_page(args.html, viewer, surveys, reports, training.model_name_or_path, random_order(surveys["train"]))
        except OSError as error:
            raise UserError(f"--html {args.html}: cannot be written: {error.strerror}") from error
        output.line()
        output.line(f"{args.html}: {os.path.getsize(args.html):,} bytes, for any browser")
    else:
        show_samples(output, viewer, surveys["train"], reports["train"])
    problems.stop_or_skip(training.skip_bad_rows)
    for name, report in reports.items():
        if not report.kept:
            raise UserError(f"no sample of the {name} data is left to learn from (see the table above)")


def show_samples(output, viewer, found, report):
    titles = {}  # by number of a record, in the order in which they are shown
    for kind in ON_TERMINAL:
        for number in np.flatnonzero(found.kinds[kind])[:1].tolist():
            titles.setdefault(number, []).append(kind)
    for number in [number for number in random_order(found) if number not in titles][:RANDOM]:
        titles[number] = ["random"]
    shown = viewer.records(found, report, titles)
    output.heading("Samples, what is trained between [[ and ]]")
    for number, kinds in titles.items():
        show_record(output, viewer.encoder.tokenizer, shown[number], ", ".join(kinds), found.place(number), SHOWN_TEXT)


def find(output, viewer, training, args):
    """--record and --search: the records are read, and only those that are shown are tokenized."""
    problems, matches = Problems(), 0
    words = [*training.data_path, *(training.eval_data_path or [])]
    files = find_files(words, problems, training.cache_dir)
    if problems.fatal:
        problems.stop_or_skip(0)
    tokenizer, names = viewer.encoder.tokenizer, short_names(files)
    if args.record:
        path, _, line = args.record.rpartition(":")
        path, line = next((file for file, name in names.items() if path in (file, name)), path), int(line)
        if path not in files:
            raise UserError(f"--record {args.record}: not one of the data files ({', '.join(names.values())})")
        for place, record in read_files([path], problems):
            if place.line == line:
                return show_record(output, tokenizer, viewer(place, record), "record", args.record)
        for row in problems.rejected:
            if row["line"] == line:
                shown = Shown(Place(path, line, row["record"]), [], row["reasons"], str(row["data"]))
                return show_record(output, tokenizer, shown, "record", args.record)
        raise UserError(f"--record {args.record}: no record begins on that line")
    text = args.search.casefold()
    for place, record in read_files(files, problems):  # what is wrong with others does not matter here
        if any(text in part.casefold() for part in strings(record)):
            matches += 1
            if matches <= SHOWN_MATCHES:
                show_record(output, tokenizer, viewer(place, record), "match", f"{names[place.path]}:{place.line}",
                            SHOWN_TEXT)
    output.line()
    output.line(f"{matches:,} records with {args.search!r}")


def main(argv):
    with user_errors_end_the_program():
        inspect(argv)


if __name__ == "__main__":
    main(COMMAND_LINE)
