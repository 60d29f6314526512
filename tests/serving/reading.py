"""What the readers share: they run under other environments, so nothing of this project is imported here."""

import json
import sys
import traceback
from pathlib import Path

MARK = "READ "  # in front of the lines that tests.serving.readers looks for


def read_all(version, check):
    """Call check(folder, result, expected) for every result of the folder in argv, and print what it found.

    result: what `tests.serving.results.describe` wrote of it; expected: the whole expected.json. Returns of check are
    {column: True, or a str that says what is wrong}; a column that this program does not read is left out, and None
    is a kind of result that it does not read.
    """
    root = Path(sys.argv[1])
    expected = json.loads((root / "expected.json").read_text(encoding="utf-8"))
    for kind, result in expected["results"].items():
        try:
            found = check(root / result["folder"], result, expected)
            if found is None:
                continue
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
        print(MARK + json.dumps({"kind": kind, "version": version, **found}), flush=True)


def same(found, wanted):
    """True, or the first difference of two lists."""
    if found == wanted:
        return True
    place = next((n for n, pair in enumerate(zip(found, wanted)) if pair[0] != pair[1]), min(len(found), len(wanted)))
    return f"{found[place:][:1]!r:.300} instead of {wanted[place:][:1]!r:.300}"
