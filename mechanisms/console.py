"""What a run says: only rank 0 speaks; a bar on a terminal, plain lines in a log file."""

import os
import re
import shutil
import sys
import textwrap
import time

from tqdm import tqdm

# Characters that are not seen, or that move what stands around them: controls, directions, blanks without width, halves
# of characters, and the invisible letters of "tags". (Joiners are not among them: emoji and some languages need them.)
INVISIBLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
                       "\ud800-\udfff\U000e0000-\U000e007f]")


def visible(text):
    """Text from data for a terminal: what would not be seen there, or would steer it, is shown as an escape."""
    return INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(*lines):
    """Print on the first rank of all nodes only; what the terminal's encoding lacks is escaped.

    A terminal gets notes broken between words; in a file each stays one line.
    """
    if lines and int(os.environ.get("RANK", 0)) == 0:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        text = "\n".join(_fitted(str(line)) for line in lines)
        show = tqdm.write if sys.stdout.isatty() else print  # a bar that stands there makes room
        show(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()


def _fitted(line):
    if not sys.stdout.isatty() or not line.startswith("note: "):
        return line
    return textwrap.fill(line, shutil.get_terminal_size().columns, subsequent_indent=" " * len("note: "),
                         break_long_words=False, break_on_hyphens=False)


def is_colored(stream):
    """Whether colours are wanted there (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def table(rows):
    """[(name, value), ...] as aligned lines; numbers get thousands separators."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {f'{value:,}' if isinstance(value, int) else value}" for name, value in rows)


def counted(items, what, unit):
    """Pass items on, with a running count and rate on a terminal, and a line every 30 s in a log file."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, unit=f" {unit}", leave=False)
        return
    start = said = time.time()
    for number, item in enumerate(items, 1):
        yield item
        if time.time() - said > 30:
            said = time.time()
            say(f"{what}: {number:,} {unit}, {number / (said - start):,.0f} {unit}/s")


def show_trained(tokenizer, input_ids, labels, limit=2000):
    """The sample as text, trained spans between [[ and ]] (green on a terminal), cut in the middle past `limit`."""
    green, plain = ("\033[32m", "\033[0m") if is_colored(sys.stdout) else ("", "")
    pieces, start = [], 0
    trained = [label != -100 for label in labels]
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[start]:
            text = tokenizer.decode(input_ids[start:end])
            if len(text) > limit:
                text = f"{text[:limit // 2]} ... {len(text) - limit} characters ... {text[-limit // 2:]}"
            pieces.append(f"{green}[[{text}]]{plain}" if trained[start] else text)
            start = end
    return "".join(pieces)
