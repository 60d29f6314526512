"""The history of a run -> report.html: one page without scripts or a network, light and dark, for any width."""

import html
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

MOST_POINTS = 400  # of a curve, and of what can be pointed at: the page stays small however long the run is
MOST_ANSWERS = 5  # to one question, side by side
RELOAD = 20  # seconds between two looks at the file while the run goes on


class About(NamedTuple):
    """What the page says of a run beside its numbers.

    name: of the output folder; subtitle: method and model; command: as it is given again; tables: {title: text}.
    """

    name: str
    subtitle: str
    command: str
    tables: dict[str, str]


class Status(NamedTuple):
    """How far a run is. state: "training", "finished", or why it ended; left: text; written: text; steps: of it all."""

    state: str
    steps: int
    left: str = ""
    written: str = ""


class Curve(NamedTuple):
    points: list[tuple[float, float]]
    style: str  # a class of the style sheet
    name: str


def page(history: list[dict], about: About, status: Status) -> str:
    """history: the entries of Trainer's log; see mechanisms/report.py for what is in them beside."""
    step = max((entry["step"] for entry in history), default=0)
    going_on = status.state == "training"
    refresh = f'<meta http-equiv="refresh" content="{RELOAD}">' if going_on else ""
    state = status.state if going_on or status.state == "finished" else f"ended: {status.state}"
    if status.state == "finished" and step < status.steps:
        state = "finished early"
    kind = status.state if status.state in ("training", "finished") else "ended"
    share = min(1, step / max(1, status.steps))
    about_time = [f"step {step:,} of {status.steps:,}", *_epoch(history),
                  *([f"{status.left} left"] if status.left and going_on else []), f"written {status.written}"]
    body = [
        f'<header><div><p class="kicker">Fine-tuning</p><h1>{_text(about.name)}</h1>'
        f'<p class="soft">{_text(about.subtitle)}</p></div><p class="state {kind}">{_text(state)}</p></header>',
        f'<div class="bar"><i style="width:{share:.1%}"></i></div><p class="soft small">{" · ".join(about_time)}</p>',
        _tiles(history), _charts(history), _answers(history), _by_file(history), _hardest(history),
        f'<section><h2>The run</h2><div class="card"><h3>Command</h3><pre class="wrap">{_text(about.command)}</pre>'
        + "".join(f"<h3>{_text(title)}</h3><pre>{_text(text)}</pre>" for title, text in about.tables.items())
        + "</div></section>"]
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{refresh}'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><title>{_text(about.name)}: {_text(state)}</title>'
            f'<style>{STYLE}</style></head>\n<body><main>\n{chr(10).join(filter(None, body))}\n</main></body></html>\n')


def _text(value):
    return html.escape(str(value).replace("\0", "\N{REPLACEMENT CHARACTER}"))


def _points(history, key):
    """[(step, value)]; an evaluation of the result stands at the step that its weights are of."""
    return sorted({entry.get("result", entry["step"]): entry[key] for entry in history
                   if key in entry and math.isfinite(entry[key])}.items())


def _epoch(history):
    epochs = [entry["epoch"] for entry in history if entry.get("epoch") is not None]
    return [f"epoch {epochs[-1]:.2f}"] if epochs else []


def _best(history):
    """(step, loss) of the best evaluation, the first of equal ones, or None."""
    return min(_points(history, "eval_loss"), key=lambda point: point[1], default=None)


def smooth(points):
    """The mean of a twentieth of the points around each, fewer at the ends. [(step, value)] -> the same."""
    sums = list(itertools.accumulate((value for _, value in points), initial=0.0))
    reach, smoothed = math.ceil(len(points) / 40), []
    for number, (step, _) in enumerate(points):
        around = min(reach, number, len(points) - 1 - number)
        start, end = number - around, number + around + 1
        smoothed.append((step, (sums[end] - sums[start]) / (end - start)))
    return smoothed


def thin(points, most=MOST_POINTS):
    """At most so many of the points; the highest and lowest of each part of the curve are among them."""
    if len(points) <= most:
        return points
    parts, kept = most // 2, []
    for part in range(parts):
        some = points[len(points) * part // parts:len(points) * (part + 1) // parts]
        low, high = min(some, key=lambda point: point[1]), max(some, key=lambda point: point[1])
        kept += sorted({low, high})
    return kept


# -- numbers ----------------------------------------------------------------------------------------------------------

def _tiles(history):
    best, tiles = _best(history), []

    def last(key):
        values = _points(history, key)
        return values[-1][1] if values else None

    losses = smooth(_points(history, "loss"))
    if losses:
        tiles.append(("loss, smoothed", f"{losses[-1][1]:.4g}", f"{losses[0][1]:.4g} at first"))
    if best:
        tiles.append(("best eval loss", f"{best[1]:.4g}", f"at step {best[0]:,}"))
    if last("num_input_tokens_seen"):
        tiles.append(("tokens", _short(last("num_input_tokens_seen")), "seen so far"))
    if last("tokens_per_second"):
        tiles.append(("tokens/s", _short(last("tokens_per_second")), "lately"))
    if last("memory"):
        tiles.append(("memory", f"{last('memory'):.0%}", "in use at most"))
    return '<div class="tiles">' + "".join(
        f'<div class="card tile"><p class="soft small">{name}</p><p class="number">{value}</p>'
        f'<p class="soft small">{note}</p></div>' for name, value, note in tiles) + "</div>" if tiles else ""


def _short(number):
    """1234567 -> 1.23M"""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{number:,.0f}"


# -- curves -----------------------------------------------------------------------------------------------------------

def _charts(history):
    raw, evaluated = _points(history, "loss"), _points(history, "eval_loss")
    loss = [Curve(raw, "faint", "loss"), Curve(smooth(raw), "main", "smoothed"), Curve(evaluated, "eval", "eval loss")]
    small = [("Learning rate", "learning_rate", "{:.3g}".format), ("Gradient norm", "grad_norm", "{:.3g}".format),
             ("Tokens per second", "tokens_per_second", _short), ("Memory", "memory", "{:.0%}".format)]
    charts = [_chart("Loss", loss, history, "{:.4g}".format, wide=True)]
    charts += [_chart(title, [Curve(_points(history, key), "main", title.lower())], history, form)
               for title, key, form in small]
    return f'<section class="charts">{"".join(charts)}</section>' if any(charts) else ""


def _chart(title: str, curves: list[Curve], history: list[dict], form: Callable, wide: bool = False) -> str:
    """One card. The drawing stretches to the card's width; lines keep theirs, and all text is HTML on top of it."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    values = [value for curve in curves for _, value in curve.points]
    ticks = _ticks(min(values) if wide else min(0, *values), max(values))
    low, high = min(min(values), ticks[0]), max(max(values), ticks[-1])
    last = max(1, max(entry["step"] for entry in history))

    def x(step):
        return 1000 * step / last

    def y(value):
        return 100 - 100 * (value - low) / ((high - low) or 1)

    drawn = [f'<path class="grid" d="M0 {y(tick):.2f}H1000"/>' for tick in ticks]
    drawn += [f'<path class="resumed" d="M{x(entry["step"]):.1f} 0V100"><title>resumed at step {entry["step"]:,}'
              "</title></path>" for entry in history if "resumed" in entry]
    drawn += [f'<path class="saved" d="M{x(entry["step"]):.1f} 100v-4"/>' for entry in history if "saved" in entry]
    for curve in curves:
        points = thin(curve.points)
        line = "L".join(f"{x(step):.1f} {y(value):.2f}" for step, value in points)
        drawn.append(f'<path class="{curve.style}" d="M{line}"/>')
        if curve.style == "eval" or len(points) == 1:
            dots = "".join(f"M{x(step):.1f} {y(value):.2f}h0" for step, value in points)
            drawn.append(f'<path class="{curve.style} dot" d="{dots}"/>')
    drawn += _hover(curves, x, form)
    best = _best(history) if wide else None
    if best:
        side = "right" if x(best[0]) > 700 else "left"
        place = f"{side}:{(1000 - x(best[0]) if side == 'right' else x(best[0])) / 10:.1f}%"
        drawn.append(f'<path class="ring" d="M{x(best[0]):.1f} {y(best[1]):.2f}h0"/>'
                     f'<path class="eval dot" d="M{x(best[0]):.1f} {y(best[1]):.2f}h0"/>')
    labels = [f'<span style="top:{y(tick):.1f}%">{form(tick)}</span>' for tick in ticks]
    steps = [f'<span style="left:{x(tick) / 10:.1f}%">{tick:,.0f}</span>' for tick in _ticks(0, last) if tick <= last]
    flag = (f'<b class="best" style="{place};top:{y(best[1]):.1f}%">best {form(best[1])}</b>' if best else "")
    return (f'<div class="card chart{" wide" if wide else ""}"><h3>{title}{_legend(curves, history, wide)}</h3>'
            f'<div class="plot"><div class="ylabels">{"".join(labels)}</div><div class="drawing">'
            f'<svg viewBox="0 0 1000 100" preserveAspectRatio="none" role="img" aria-label="{title} by step">'
            f'{"".join(drawn)}</svg>{flag}</div><div class="xlabels">{"".join(steps)}</div></div></div>')


def _hover(curves, x, form):
    """Strips that say what stands under the pointer, without a script."""
    steps = {}
    for curve in curves:
        for step, value in thin(curve.points, MOST_POINTS // 2):
            steps.setdefault(step, []).append(f"{curve.name} {form(value)}")
    ordered = sorted(steps)
    bounds = [ordered[0], *((a + b) / 2 for a, b in zip(ordered, ordered[1:])), ordered[-1]]
    return [f'<rect class="hit" x="{x(start):.1f}" width="{max(x(end) - x(start), 2):.1f}" height="100"><title>step '
            f'{step:,}: {", ".join(steps[step])}</title></rect>'
            for step, start, end in zip(ordered, bounds, bounds[1:])]


def _legend(curves, history, wide):
    if not wide:
        return ""
    names = [(curve.style, curve.name) for curve in curves]
    names += [("saved", "checkpoint")] * any("saved" in entry for entry in history)
    names += [("resumed", "resumed")] * any("resumed" in entry for entry in history)
    return '<span class="legend">' + "".join(f'<span><i class="{style}"></i>{name}</span>' for style, name in names) \
        + "</span>"


def _ticks(low, high):
    """Round numbers from about `low` to about `high`."""
    if high <= low:
        low, high = low - abs(low) / 10 - 1e-12, high + abs(high) / 10 + 1e-12
    rough = (high - low) / 4
    size = 10 ** math.floor(math.log10(rough))
    size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= rough)
    return [number * size for number in range(math.floor(low / size), math.ceil(high / size) + 1)]


# -- words ------------------------------------------------------------------------------------------------------------

def _answers(history):
    """The answers to each question, from before training to the end."""
    rounds = [entry for entry in history if "answers" in entry]
    if not rounds:
        return ""
    kept = sorted({round(part * (len(rounds) - 1) / (MOST_ANSWERS - 1)) for part in range(MOST_ANSWERS)}) \
        if len(rounds) > MOST_ANSWERS else range(len(rounds))
    best, cards = _best(history), []
    for question in dict.fromkeys(answer["question"] for entry in rounds for answer in entry["answers"]):
        columns, wanted = [], ""
        for entry in (rounds[number] for number in kept):
            found = [answer for answer in entry["answers"] if answer["question"] == question]
            if not found:
                continue
            wanted = found[0].get("wanted") or wanted
            step = entry.get("result", entry["step"])
            when = f"the result (step {step:,})" if "result" in entry else f"step {step:,}" if step else "before"
            mark = ' <b class="tag">best</b>' if best and step == best[0] and "eval_loss" in entry else ""
            more = '<span class="soft"> … (cut)</span>' if found[0].get("cut") else ""
            said = _text(found[0]["answer"]) or '<span class="soft">(no words)</span>'
            columns.append(f'<div class="answer"><p class="soft small">{when}{mark}</p>'
                           f'<p class="words" dir="auto">{said}{more}</p></div>')
        if wanted:
            wanted = ('<div class="answer wanted"><p class="soft small">wanted</p>'
                      f'<p class="words" dir="auto">{_text(wanted)}</p></div>')
        cards.append(f'<div class="card"><p class="words question" dir="auto">{_text(question)}</p>{wanted}'
                     f'<div class="answers">{"".join(columns)}</div></div>')
    return f'<section><h2>Sample answers</h2>{"".join(cards)}</section>'


def _by_file(history):
    evaluations = [entry for entry in history if "eval_loss" in entry]
    names = [key for key in (evaluations[-1] if evaluations else {}) if key.startswith("eval_loss_")]
    if not names:
        return ""
    rows = []
    for name in names:
        points = _points(history, name)
        best = min(points, key=lambda point: point[1])
        rows.append(f"<tr><td>{_text(name.removeprefix('eval_loss_'))}</td><td>{points[0][1]:.4f}</td>"
                    f"<td>{best[1]:.4f} at step {best[0]:,}</td><td>{points[-1][1]:.4f}</td></tr>")
    return ('<section><h2>Eval loss of each file</h2><div class="card scroll"><table><thead><tr><th>file</th>'
            f'<th>first</th><th>best</th><th>last</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div></section>')


def _hardest(history):
    found = next((entry for entry in reversed(history) if "hardest" in entry), None)
    if not found:
        return ""
    step, most = found.get("result", found["step"]), max(record["loss"] for record in found["hardest"]) or 1
    rows = "".join(
        f'<tr><td><i class="meter" style="width:{60 * record["loss"] / most:.0f}px"></i>{record["loss"]:.3f}</td>'
        f'<td>{record["tokens"]:,}<span class="unit"> tokens</span></td><td class="place">{_text(record["place"])}</td>'
        f'<td class="words" dir="auto">{_text(record["text"])}</td></tr>' for record in found["hardest"])
    return (f'<section><h2>Held-out records with the highest loss <span class="soft small">at step {step:,}'
            '</span></h2><div class="card scroll stack"><table><thead><tr><th>loss</th><th>tokens</th><th>record</th>'
            f'<th>its answers begin</th></tr></thead><tbody>{rows}</tbody></table></div></section>')


STYLE = """
:root{--bg:#f7f7f5;--card:#fff;--ink:#1d2126;--soft:#68707a;--line:#e7e7e3;--main:#2563eb;--eval:#c2570c;--good:#15803d;
--bad:#b91c1c;--tint:#2563eb14;--shadow:0 1px 2px #0000000d,0 4px 16px #00000008}
@media(prefers-color-scheme:dark){:root{--bg:#111315;--card:#191c1f;--ink:#e7e9ec;--soft:#98a0aa;--line:#2a2e33;
--main:#7aa7ff;--eval:#ffab66;--good:#4ade80;--bad:#f87171;--tint:#7aa7ff1f;--shadow:none}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
"Noto Sans CJK SC",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1160px;margin:0 auto;padding:clamp(16px,4vw,40px)}
h1,h2,h3,p{margin:0}
h1{font-size:clamp(22px,4vw,30px);line-height:1.2;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:18px;margin:36px 0 12px}
h3{font-size:14px;font-weight:600;margin:0 0 12px;display:flex;flex-wrap:wrap;justify-content:space-between;
gap:4px 16px}
pre+h3{margin-top:20px}
.soft{color:var(--soft);font-weight:400}.small{font-size:13px}
.kicker{font-size:12px;letter-spacing:.08em;text-transform:uppercase;color:var(--soft)}
header{display:flex;justify-content:space-between;align-items:flex-start;gap:16px;flex-wrap:wrap}
.state{font-size:13px;font-weight:600;padding:4px 12px;border-radius:99px;border:1px solid;overflow-wrap:anywhere}
.state.training{color:var(--main)}.state.finished{color:var(--good)}.state.ended{color:var(--bad);border-radius:12px}
.bar{height:6px;border-radius:3px;background:var(--line);margin:20px 0 8px;overflow:hidden}
.bar i{display:block;height:100%;background:var(--main);border-radius:3px}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:16px;box-shadow:var(--shadow);
min-width:0}
.card+.card{margin-top:12px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(130px,1fr));gap:12px;margin-top:24px}
.tiles .card,.charts .card{margin:0}
.number{font-size:24px;font-weight:600;letter-spacing:-.02em;font-variant-numeric:tabular-nums;line-height:1.35}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:12px;margin-top:12px}
.wide{grid-column:1/-1}
.plot{display:grid;grid-template-columns:auto 1fr;column-gap:10px}
.drawing{position:relative;height:120px}.wide .drawing{height:280px}
svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
svg path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke-linecap:round}
.grid{stroke:var(--line);stroke-width:1}
.main{stroke:var(--main);stroke-width:2}.faint{stroke:var(--main);stroke-width:1.2;opacity:.35}
.eval{stroke:var(--eval);stroke-width:2}.dot{stroke-width:7}
.ring{stroke:var(--card);stroke-width:15}.ring+.dot{stroke-width:10}
.saved{stroke:var(--soft);stroke-width:2}.resumed{stroke:var(--good);stroke-width:1.5;stroke-dasharray:4 4}
.hit{fill:transparent}.hit:hover{fill:var(--tint)}
.best{position:absolute;transform:translateY(9px);font-size:12px;color:var(--eval);padding:0 6px;pointer-events:none;
white-space:nowrap}
.ylabels,.xlabels{position:relative;font-size:11.5px;color:var(--soft);font-variant-numeric:tabular-nums}
.ylabels{width:44px}.ylabels span{position:absolute;right:0;transform:translateY(-50%);white-space:nowrap}
.xlabels{grid-column:2;height:20px}.xlabels span{position:absolute;top:4px;transform:translateX(-50%)}
.xlabels span:first-child{transform:none}.xlabels span:last-child:not(:first-child){transform:translateX(-100%)}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-weight:400;font-size:12.5px;color:var(--soft)}
.legend span{display:flex;align-items:center;gap:6px}
.legend i{width:14px;height:0;border-top:2px solid var(--main)}.legend i.faint{opacity:.4}
.legend i.eval{border-color:var(--eval)}.legend i.resumed{border-top:2px dashed var(--good)}
.legend i.saved{width:0;height:9px;border-left:2px solid var(--soft);border-top:0}
.words{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext}
.question{font-weight:600;margin-bottom:12px;max-height:12em;overflow:auto}
.answers{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(min(190px,75vw),1fr);gap:10px;overflow-x:auto;
padding-bottom:4px}
.answer{border-left:3px solid var(--line);padding:2px 12px;max-height:22em;overflow:auto}
.answer.wanted{border-color:var(--good);max-height:12em;margin-bottom:12px}
.tag{font-size:11px;color:var(--eval);border:1px solid;border-radius:99px;padding:0 7px}
.scroll{overflow-x:auto;padding:6px 16px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{font-size:12.5px;font-weight:500;color:var(--soft);text-align:left}
th,td{padding:8px 16px 8px 0;vertical-align:top;white-space:nowrap}
tr+tr td{border-top:1px solid var(--line)}
td.words{white-space:normal;min-width:260px;padding-right:0}
.place{font:12.5px/1.8 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.meter{display:inline-block;height:8px;border-radius:4px;background:var(--eval);margin-right:8px;opacity:.75}
.unit{display:none}
@media(max-width:640px){.unit{display:inline}.stack thead{display:none}.stack tr{display:block;padding:8px 0}
.stack tr+tr{border-top:1px solid var(--line)}
.stack tr td{display:inline-block;border:0;padding:0 12px 0 0;white-space:normal;overflow-wrap:anywhere}
.stack tr td.words{display:block;min-width:0}}
pre{margin:0;font:12.5px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,"Noto Sans Mono CJK SC",monospace;
overflow-x:auto;background:var(--bg);border-radius:8px;padding:12px}
pre.wrap{white-space:pre-wrap;overflow-wrap:anywhere}
""".strip()
