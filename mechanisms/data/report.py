"""What became of the records of a data set: counted while they are encoded, shown before training."""

import collections

from mechanisms.console import table
from mechanisms.data.encoder import IGNORED, Sample
from mechanisms.data.records import Problems


class DataReport:
    """Counts over one data set; `to_json` and `from_json` carry it in the token cache: a cached run says the same."""

    def __init__(self):
        self.problems = Problems()
        self.notices = collections.Counter()  # what was left out or changed in usable records, and how often
        self.left_out = collections.Counter()  # records that are not trained on, by reason
        self.kept = self.truncated = self.tokens = self.trained = self.longest = 0
        self.seen: set[int] = set()  # digests of conversations
        self.duplicates = 0
        self.counts_tokens = True

    def count(self, sample: Sample | None, digest: int) -> bool:
        """Count an encoded sample; True if it is kept. sample=None: kept, but not tokenized yet (lazy)."""
        if sample is None:
            self.counts_tokens = False
        elif not len(sample.input_ids):
            self.left_out[sample.outcome] += 1
            return False
        else:
            self.truncated += sample.outcome == "truncated"
            self.tokens += len(sample.input_ids)
            self.trained += len(sample.labels) - 1 - sample.labels[1:].count(IGNORED)
            self.longest = max(self.longest, len(sample.input_ids))
        self.kept += 1
        self.duplicates += digest in self.seen
        self.seen.add(digest)
        return True

    def add(self, other: "DataReport") -> None:
        """Count what another report has counted, of other records of the same data set."""
        self.problems.extend(other.problems)
        self.notices.update(other.notices)
        self.left_out.update(other.left_out)
        for name in ("kept", "truncated", "tokens", "trained"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.duplicates += other.duplicates + len(self.seen & other.seen)
        self.seen |= other.seen

    def to_json(self) -> dict:
        fields = {name: value for name, value in vars(self).items() if name not in ("problems", "seen")}
        return {**fields, "rejected": self.problems.rejected, "fatal": self.problems.fatal}

    @classmethod
    def from_json(cls, fields: dict) -> "DataReport":
        report = cls()
        report.problems.rejected, report.problems.fatal = fields.pop("rejected"), fields.pop("fatal")
        fields["notices"] = collections.Counter(fields["notices"])
        fields["left_out"] = collections.Counter(fields["left_out"])
        vars(report).update(fields)
        return report

    def lines(self, title: str) -> list[str]:
        rejected = len(self.problems.rejected)
        rows = [("records", self.kept + sum(self.left_out.values()) + rejected), ("kept", self.kept)]
        if rejected:
            rows.append(("left out: unusable (rejected.jsonl)", rejected))
        rows += [(f"left out: {reason}", count) for reason, count in sorted(self.left_out.items())]
        if self.counts_tokens:
            rows.append(("truncated", self.truncated))
        rows.append(("duplicates among the kept", self.duplicates))
        if self.counts_tokens and self.kept:
            rows += [("tokens", self.tokens),
                     ("trained tokens", f"{self.trained:,} ({self.trained / self.tokens:.1%})"),
                     ("longest sample", self.longest), ("mean sample", f"{self.tokens / self.kept:.1f}")]
        lines = [title, table(rows)]
        if not self.counts_tokens:
            lines.append("  (token counts are not known with --lazy_preprocess)")
        lines += [f"  note: {count:,} x {notice}" for notice, count in sorted(self.notices.items())]
        return lines
