"""What became of the records of a data set: counted while they are encoded, shown before training."""

import collections
from typing import NamedTuple

from mechanisms.console import table
from mechanisms.data.encoder import IGNORED, Excerpt, Sample
from mechanisms.data.records import Notices, Problems
from mechanisms.data.shapes import Conversation

_SHOWN = 20  # files in the table; the others are counted together
MUCH_GROWTH = 3  # times the tokens of the conversations, from which a note names it


class Source(NamedTuple):
    """What is taken of a file: of the records that are kept, each counted as often as it is taken."""

    path: str
    share: float
    records: int
    samples: int
    tokens: int | None = None  # not known with --lazy_preprocess
    trained: int | None = None


class DataReport:
    """Counts over one data set; `to_json` and `from_json` carry it in the token cache: a cached run says the same."""

    def __init__(self):
        self.problems = Problems()
        self.notices = Notices()  # what was left out or changed in usable records, and how often
        self.left_out = collections.Counter()  # records that are not trained on, by reason
        self.samples_left_out = collections.Counter()  # samples of records that are, by reason
        self.modes = collections.Counter()  # answers trained after a "thinking" prompt and after a "plain" one
        self.kept = self.samples = self.truncated = self.tokens = self.trained = self.longest = 0
        self.apart = 0  # answers trained in a sample that is not the one of the conversation's last answer
        self.once = 0  # tokens that one sample of each kept conversation has, the longest
        self.sources: list[Source] = []  # what the shares of the files make of all that is counted here
        self.seen: set[int] = set()  # digests of conversations
        self.duplicates = 0
        self.counts_tokens = True

    def count(self, conversation: Conversation, excerpts: list[Excerpt], samples: list[Sample | None]) -> list[int]:
        """Count the samples of a conversation; the numbers of those that are kept.

        A sample that is None is kept, but not tokenized yet (lazy).
        """
        kept = [number for number, sample in enumerate(samples) if sample is None or sample.input_ids]
        left_out = [sample.outcome for sample in samples if sample is not None and not sample.input_ids]
        if not kept:
            self.left_out[left_out[-1] if left_out else "nothing to learn"] += 1
            return kept
        self.samples_left_out.update(left_out)
        for number in kept:
            self.modes.update("thinking" if mode else "plain" for _, _, mode in excerpts[number].answers)
            self.apart += len(excerpts[number].answers) if number < len(excerpts) - 1 else 0
        tokenized = [samples[number] for number in kept if samples[number] is not None]
        for sample in tokenized:
            self.truncated += sample.outcome == "truncated"
            self.trained += len(sample.labels) - 1 - sample.labels[1:].count(IGNORED)
        lengths = [len(sample.input_ids) for sample in tokenized]
        self.counts_tokens &= len(tokenized) == len(kept)
        self.tokens += sum(lengths)
        self.once += max(lengths, default=0)
        self.longest = max(self.longest, *lengths, 0)
        self.kept += 1
        self.samples += len(kept)
        self.duplicates += conversation.digest in self.seen
        self.seen.add(conversation.digest)
        return kept

    def add(self, other: "DataReport") -> None:
        """Count what another report has counted, of other records of the same data set."""
        self.problems.extend(other.problems)
        self.notices.take_over(other.notices)
        for name in ("left_out", "samples_left_out", "modes"):
            getattr(self, name).update(getattr(other, name))
        for name in ("kept", "samples", "truncated", "tokens", "trained", "apart", "once"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.duplicates += other.duplicates + len(self.seen & other.seen)
        self.seen |= other.seen

    def records(self) -> int:
        return self.kept + self.left_out.total() + len(self.problems.rejected)

    def to_json(self) -> dict:
        fields = {name: value for name, value in vars(self).items() if name not in ("problems", "seen", "sources")}
        return {**fields, "rejected": self.problems.rejected, "fatal": self.problems.fatal,
                "examples": self.notices.examples}

    @classmethod
    def from_json(cls, fields: dict) -> "DataReport":
        report = cls()
        report.problems.rejected, report.problems.fatal = fields.pop("rejected"), fields.pop("fatal")
        fields["notices"] = Notices(fields["notices"], fields.pop("examples"))
        for name in ("left_out", "samples_left_out", "modes"):
            fields[name] = collections.Counter(fields[name])
        vars(report).update(fields)
        return report

    def rows(self) -> list[tuple[str, int | str]]:
        """(name, number): what became of the records, without a word of them."""
        rejected = len(self.problems.rejected)
        rows = [("records", self.records()), ("kept", self.kept)]
        if rejected:
            rows.append(("left out: unusable (rejected.jsonl)", rejected))
        rows += [(f"left out: {reason}", count) for reason, count in sorted(self.left_out.items())]
        rows.append(("answers trained", self.modes.total()))
        if len(self.modes) > 1 or "thinking" in self.modes:
            rows += [(f"  after the {name} prompt", count) for name, count in sorted(self.modes.items())]
        if self.samples > self.kept:
            rows += [("  in samples of their own", self.apart), ("samples", self.samples)]
        rows += [(f"samples left out: {reason}", count) for reason, count in sorted(self.samples_left_out.items())]
        if self.counts_tokens:
            rows.append(("truncated", self.truncated))
        rows.append(("duplicates among the kept", self.duplicates))
        if self.counts_tokens and self.kept:
            rows += [("tokens", f"{self.tokens:,}" + (f" ({self.growth():.2f} times those of the conversations)"
                                                      if self.samples > self.kept else "")),
                     ("trained tokens", f"{self.trained:,} ({self.trained / self.tokens:.1%})"),
                     ("longest sample", self.longest), ("mean sample", f"{self.tokens / self.samples:.1f}")]
        return rows

    def growth(self) -> float:
        return self.tokens / self.once if self.once else 1

    def lines(self, title: str) -> list[str]:
        lines, growth = [title, table(self.rows())], self.growth()
        if not self.counts_tokens:
            lines.append("  (token counts are not known with --lazy_preprocess)")
        elif growth > MUCH_GROWTH:
            lines.append(f"  note: the tokens grew {growth:.1f}-fold, because the chat template shows earlier answers "
                         "otherwise than they were said: each is trained after the whole conversation before it. "
                         "--earlier_answers skip trains the last ones only")
        for notice, count in sorted(self.notices.items()):
            example = self.notices.examples.get(notice)
            lines.append(f"  note: {count:,} x {notice}" + (f", such as {example!r}" if example else ""))
        return lines + self._source_lines()

    def _source_lines(self):
        """What is taken of each file, if there are several or a share is taken."""
        if len(self.sources) < 2 and all(source.share == 1 for source in self.sources):
            return []
        rows = [(source.path if source.share == 1 else f"{source.path} x {source.share:g}", *source[2:])
                for source in self.sources[:_SHOWN]]
        if more := self.sources[_SHOWN:]:
            rows.append((f"... and {len(more)} more", *_sums(more)))
        rows.append(("together", *_sums(self.sources)))
        return ["  Taken of each file:", table([(f"  {name}", ", ".join(
            f"{number:,} {what}" for number, what in zip(numbers, ("records", "samples", "tokens", "trained"))
            if number is not None)) for name, *numbers in rows])]


def _sums(sources):
    return [None if None in column else sum(column) for column in list(zip(*sources))[2:]]
