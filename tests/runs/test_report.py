"""report.html and metrics.jsonl: what a run shows of itself, without changing a number of it."""

import html.parser
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms import report as report_module
from mechanisms import sample_answers
from mechanisms.data.template import END
from mechanisms.errors import UserError
from mechanisms.flags import prepare_command_line
from mechanisms.report_page import About, Status, page, smooth, thin
from mechanisms.trainer import SafeTrainer

DATA = [EXAMPLES / "data" / "messages.jsonl", EXAMPLES / "data" / "conversations.json"]
EVALUATED = ["--eval_data_path", *DATA, "--eval_strategy", "steps", "--eval_steps", 2]
EVALUATION_LOOP = SafeTrainer.evaluation_loop
ABOUT = About("out", "LoRA", "python finetune.py", {"Data": "records 3"})


@pytest.fixture(scope="module")
def start(make_model, cache_dir):
    """start(out, *flags) -> Trainer of 6 steps of one process, logged one by one, a checkpoint every 2."""

    def run(out, *flags):
        return finetune.train(prepare_command_line(finetune.__file__, [str(word) for word in (
            "--model_name_or_path", make_model(), "--data_path", EXAMPLES / "data", "--cache_dir", cache_dir,
            "--output_dir", out, "--max_steps", 6, "--save_steps", 2, "--logging_steps", 1, "--learning_rate", "1e-2",
            "--per_device_train_batch_size", 2, "--per_device_eval_batch_size", 5, "--model_max_length", 256,
            "--use_cpu", *flags)]))

    return run


@pytest.fixture(scope="module")
def evaluated(start, tmp_path_factory):
    """(Trainer, folder) of a run with evaluations of two files, and so with sample answers."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    return start(out, *EVALUATED), out


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def numbers(trainer, *keys):
    keys = keys or ("loss", "grad_norm", "learning_rate", "eval_loss")
    return [(entry["step"], *(entry[key] for key in keys if key in entry)) for entry in trainer.state.log_history
            if not entry.keys().isdisjoint(keys)]


class Whole(html.parser.HTMLParser):
    """Raises where a page is not closed properly; knows its texts and tags."""

    VOID = {"meta"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open and text.endswith("</html>\n"), self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read_page(out):
    return Whole((out / "report.html").read_text(encoding="utf-8"))


def test_showing_a_run_changes_no_number_of_it(start, evaluated, tmp_path):
    """Bit by bit: sample answers draw no random number and leave the model as it was."""
    plain = start(tmp_path / "out", *EVALUATED, "--sample_prompts", "none", "--use_lora")
    shown = start(tmp_path / "shown", *EVALUATED, "--use_lora")  # its dropout draws random numbers
    assert numbers(plain) == numbers(shown) and len(numbers(plain)) == 9
    assert [entry["step"] for entry in shown.state.log_history if "answers" in entry] == [0, 2, 4, 6]
    assert not any("answers" in entry for entry in plain.state.log_history)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "shown")]
    assert files[0] == files[1]


def test_the_page_shows_the_run(evaluated):
    trainer, out = evaluated
    shown = read_page(out)
    text = " ".join(shown.texts)
    assert "finished" in text and "step 6 of 6" in text and "--max_steps 6" in text and "transformers" in text
    assert "answers trained" in text and "trained parameters" in text  # the tables of the terminal
    for title in ("Loss", "Learning rate", "Gradient norm", "Tokens per second", "Memory", "Sample answers"):
        assert title in shown.texts
    best = min((loss, step) for step, *_, loss in numbers(trainer, "eval_loss"))
    assert f"best {best[0]:.4g}" in shown.texts and f"at step {best[1]}" in text
    saved = [tag for tag, attributes in shown.tags if tag == "path" and attributes.get("class") == "saved"]
    assert len(saved) == 3 * 5  # three checkpoints in each of five charts
    tags = {tag for tag, _ in shown.tags}
    assert not tags & {"script", "link", "img", "iframe"} and "refresh" not in str(shown.tags)
    assert not re.search(r"(?:src|href)=|url\(|@import", (out / "report.html").read_text())
    assert not list(out.glob("*.unfinished"))


def test_metrics_are_the_history_line_by_line(evaluated):
    trainer, out = evaluated
    assert metrics(out) == json.loads(json.dumps(trainer.state.log_history))
    steps = [entry for entry in metrics(out) if "loss" in entry]
    assert len(steps) == 6
    assert all(entry["tokens_per_second"] > 0 and 0 < entry["memory"] < 1 for entry in steps)
    assert steps[-1]["seconds_left"] == 0


def test_each_eval_file_has_its_loss(evaluated, start, make_model, tmp_path):
    trainer, _ = evaluated
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    for path in DATA:
        alone = start(tmp_path / path.name, "--eval_data_path", path, "--eval_strategy", "steps", "--eval_steps", 6,
                      "--sample_prompts", "none")
        assert last[f"eval_loss_{path.name}"] == pytest.approx(numbers(alone, "eval_loss")[-1][1], rel=1e-6)
        assert not any(key.startswith("eval_loss_") for entry in alone.state.log_history for key in entry)


def test_the_hardest_records_are_those_of_the_model(evaluated):
    """Each sample alone through the model gives the loss that the evaluation of whole batches noted for it."""
    trainer, _ = evaluated
    last = [entry for entry in trainer.state.log_history if "hardest" in entry][-1]
    dataset, losses = trainer.eval_dataset, {}
    for number in range(len(dataset)):
        batch = trainer._prepare_inputs(finetune.PaddingFreeCollator()([dataset[number]]))
        trainer.model.eval()
        losses.setdefault(dataset.places(number)[0], []).append(trainer.compute_loss(trainer.model, batch).item())
    assert len(last["hardest"]) == 10
    found = [record["loss"] for record in last["hardest"]]
    assert found == pytest.approx(sorted((loss for some in losses.values() for loss in some), reverse=True)[:10],
                                  rel=1e-4)
    for record in last["hardest"]:
        assert any(record["loss"] == pytest.approx(loss, rel=1e-4) for loss in losses[record["place"]])
        assert re.fullmatch(r".*(messages\.jsonl|conversations\.json):\d+", record["place"]) and record["text"]


def test_the_hardest_records_are_known_without_the_chunked_loss(start, evaluated, tmp_path, monkeypatch):
    monkeypatch.setattr("mechanisms.trainer.output_linear", lambda model: None)
    full = start(tmp_path / "out", *EVALUATED, "--sample_prompts", "none")
    here = [entry for entry in evaluated[0].state.log_history if "hardest" in entry][0]
    there = [entry for entry in full.state.log_history if "hardest" in entry][0]
    assert full.head_loss is None
    assert [record["loss"] for record in there["hardest"]] == pytest.approx(
        [record["loss"] for record in here["hardest"]], rel=1e-3)


def test_answers_are_those_that_generate_gives(evaluated, start, tmp_path):
    """The greedy answers of the result, without a cache, are those of transformers with one."""
    trainer, out = evaluated
    questions = trainer.report.questions
    assert len(questions) == 3 and len({question.text for question in questions}) == 3
    [*_, last] = [entry for entry in trainer.state.log_history if "answers" in entry]
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out)
    for question, answer in zip(questions, last["answers"]):
        assert answer["question"] == question.text and answer["wanted"] == question.wanted
        ids = model.generate(torch.tensor([question.prompt]), do_sample=False,
                             max_new_tokens=sample_answers.LONGEST)[0, len(question.prompt):]
        assert answer["answer"] == trainer.processing_class.decode(ids, skip_special_tokens=True)
        assert answer["cut"] == (ids[-1].item() not in model.generation_config.eos_token_id)


def test_questions_of_a_file(start, tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text('Who are you?\n\n{"messages": [{"role": "system", "content": "Be brief."}, '
                    '{"role": "user", "content": "你是谁？<|im_end|>"}]}\n', encoding="utf-8")
    trainer = start(tmp_path / "out", "--sample_prompts", file, "--system", "You are Lumi.", "--max_steps", 2)
    rounds = [entry for entry in trainer.state.log_history if "answers" in entry]
    assert [entry["step"] for entry in rounds] == [0, 2]
    assert [answer["question"] for answer in rounds[0]["answers"]] == ["Who are you?", "你是谁？<|im_end|>"]
    first, second = (trainer.processing_class.decode(question.prompt) for question in trainer.report.questions)
    assert "You are Lumi." in first and first.endswith("Who are you?<|im_end|>\n<|im_start|>assistant\n")
    assert "Be brief." in second and "Lumi" not in second
    assert trainer.report.questions[1].prompt.count(trainer.processing_class.convert_tokens_to_ids(END)) == 2


@pytest.mark.parametrize("content, message", [
    ("", "is empty"), ("Who?\n{broken\n", ":2: not a question"), ('{"messages": []}', ":1: not a question"),
    ('{"messages": [{"role": "assistant", "content": "Hi"}]}', "its last message must be the user's")])
def test_a_file_that_holds_no_questions_is_refused_before_the_model_loads(start, tmp_path, monkeypatch, content,
                                                                          message):
    monkeypatch.setattr(finetune, "load_weights", lambda *_, **__: pytest.fail("loaded"))
    file = tmp_path / "questions.txt"
    file.write_text(content)
    with pytest.raises(UserError, match=f"--sample_prompts {file}.*{message}"):
        start(tmp_path / "out", "--sample_prompts", file)
    with pytest.raises(UserError, match="--sample_prompts /nowhere: no such file"):
        start(tmp_path / "out", "--sample_prompts", "/nowhere")


def test_answers_end_when_their_time_is_over(start, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_answers, "SECONDS", -1)
    trainer = start(tmp_path / "out", *EVALUATED, "--max_steps", 2)
    rounds = [entry["answers"] for entry in trainer.state.log_history if "answers" in entry]
    assert len(rounds) == 2 and all(answer["cut"] and answer["answer"] == "" for some in rounds for answer in some)


def test_a_resumed_run_goes_on_with_the_report_of_its_checkpoint(start, evaluated, tmp_path):
    trainer, finished = evaluated
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoint-6")
    shutil.rmtree(out / "checkpoint-4")
    (out / "metrics.jsonl").write_text('{"step": 5, "loss": 99.0}\n')  # ahead of the step it resumes from
    resumed = start(out, *EVALUATED)
    assert numbers(resumed) == numbers(trainer)
    seen = metrics(out)
    assert [entry["step"] for entry in seen if "resumed" in entry] == [2]
    assert [entry["step"] for entry in seen if "saved" in entry] == [2, 4, 6]
    assert [entry["step"] for entry in seen if "answers" in entry] == [0, 2, 4, 6]
    assert "resumed at step 2" in read_page(out).texts and not any(entry.get("loss") == 99 for entry in seen)


def test_a_killed_run_leaves_a_whole_report(make_model, cache_dir, tmp_path):
    out = tmp_path / "out"
    run = subprocess.Popen(
        [sys.executable, finetune.__file__, "--model_name_or_path", str(make_model()), "--data_path",
         str(EXAMPLES / "data"), "--cache_dir", str(cache_dir), "--output_dir", str(out), "--logging_steps", "1",
         "--max_steps", "100000", "--save_strategy", "no", "--use_cpu", "--per_device_train_batch_size", "1"],
        stdout=subprocess.PIPE, text=True)
    next(line for line in run.stdout if line.startswith("step 25/"))
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    run.stdout.close()
    shown = read_page(out)
    assert "training" in shown.texts and ("meta", {"http-equiv": "refresh", "content": "20"}) in shown.tags
    assert len([entry for entry in metrics(out) if "loss" in entry]) >= 1


def test_a_run_that_fails_says_so_on_the_page(start, tmp_path, monkeypatch):
    def lost(self, *args, **kwargs):
        raise UserError("the loss became NaN at step 2\n       and more")

    monkeypatch.setattr(SafeTrainer, "_check_weights", lost)
    with pytest.raises(UserError):
        start(tmp_path / "out")
    assert "ended: the loss became NaN at step 2" in read_page(tmp_path / "out").texts


def test_a_report_that_cannot_be_written_ends_no_run(start, tmp_path, monkeypatch, capsys):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report_module, "_replace", full)
    start(tmp_path / "out")
    out = capsys.readouterr().out
    assert out.count("report.html is not written: No space left on device. Training goes on") == 1 and "Done:" in out


def stopping_at(monkeypatch, losses):
    """Let the evaluations have these losses, one after the other."""
    left = list(losses)

    def evaluation_loop(self, *args, **kwargs):
        output = EVALUATION_LOOP(self, *args, **kwargs)
        output.metrics["eval_loss"] = left.pop(0)
        return output

    monkeypatch.setattr(SafeTrainer, "evaluation_loop", evaluation_loop)


STOPPING = ["--eval_data_path", DATA[0], "--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1,
            "--sample_prompts", "none", "--early_stopping", 2]


def test_early_stopping_and_the_best_checkpoint_as_the_result(start, tmp_path, monkeypatch, capsys):
    stopping_at(monkeypatch, [3, 2, 2.5, 2.2, 2])
    trainer = start(tmp_path / "out", *STOPPING, "--load_best_model_at_end", "True", "--save_total_limit", 1)
    assert trainer.state.global_step == 4
    assert "Stopped early: 2 evaluations without an eval loss below 2.0000" in capsys.readouterr().out
    result, best = ((tmp_path / "out" / name / "model.safetensors").read_bytes() for name in ("", "checkpoint-2"))
    assert result == best
    assert (tmp_path / "out" / "checkpoint-4" / "model.safetensors").read_bytes() != best
    assert "finished early" in read_page(tmp_path / "out").texts
    [last] = [entry for entry in metrics(tmp_path / "out") if "result" in entry]
    assert (last["step"], last["result"], last["eval_loss"]) == (4, 2, 2)


def test_early_stopping_counts_on_where_a_run_was_killed(start, tmp_path, monkeypatch):
    """Two without a lower loss are one before the kill and one after it; and a run that has stopped stays so."""
    out = tmp_path / "out"
    stopping_at(monkeypatch, [3, 2, 2.5, 2.6])
    trainer = start(out, *STOPPING)
    assert trainer.state.global_step == 4
    shutil.rmtree(out / "checkpoint-4")
    stopping_at(monkeypatch, [2.6])
    assert start(out, *STOPPING).state.global_step == 4
    stopping_at(monkeypatch, [])
    before = (out / "checkpoint-4" / "model.safetensors").read_bytes()
    again = start(out, *STOPPING)
    assert again.state.global_step == 4 and (out / "model.safetensors").read_bytes() == before


def test_early_stopping_needs_an_evaluation(start, tmp_path):
    for flags, message in ((["--early_stopping", 2], "--early_stopping has no effect without --eval_strategy"),
                           ([*STOPPING, "--early_stopping", 0], "--early_stopping 0: at least 1")):
        with pytest.raises(UserError, match=message):
            start(tmp_path / "out", *flags)


def test_what_stands_in_the_data_is_text_on_the_page():
    hostile = "<script>alert(1)</script>\" onload=x \0 \u202e مرحبا \ud800"
    history = [{"step": 0, "answers": [{"question": hostile, "answer": hostile, "wanted": hostile, "cut": True}]},
               {"step": 1, "loss": 1.0, "eval_loss": 1.0, f"eval_loss_{hostile}": 1.0,
                "hardest": [{"place": hostile, "loss": 1.0, "tokens": 1, "text": hostile}]}]
    text = page(history, About(hostile, hostile, hostile, {hostile: hostile}), Status(hostile, 1))
    shown = Whole(text)
    assert "script" not in {tag for tag, _ in shown.tags} and text.count("&lt;script&gt;") >= 9
    assert not any("onload" in attributes for _, attributes in shown.tags) and "\0" not in text
    text.encode(errors="backslashreplace")


@pytest.mark.parametrize("history", [
    [], [{"step": 0}], [{"step": 3, "loss": 2.0}], [{"step": 1, "loss": 0.0}, {"step": 2, "loss": 0.0}],
    [{"step": 1, "loss": -1e-9}, {"step": 2, "loss": 1e30}], [{"step": 1, "grad_norm": float("inf"), "loss": 1.0}]])
def test_a_page_of_any_history(history):
    Whole(page(history, ABOUT, Status("training", 0)))


def test_a_long_run_has_a_small_page():
    history = [{"step": step, "loss": 1 / step + (9 if step == 77_777 else 0), "grad_norm": 1.0, "learning_rate": 1e-5,
                "tokens_per_second": 1e5, "memory": 0.5} for step in range(1, 100_001)]
    text = page(history, ABOUT, Status("training", 100_000))
    assert len(text) < 300_000
    points = [(entry["step"], entry["loss"]) for entry in history]
    assert len(thin(points)) <= 400 and max(loss for _, loss in thin(points)) > 9  # a spike stays
    assert [step for step, _ in thin(points)] == sorted(step for step, _ in thin(points))


def test_the_smoothed_curve_does_not_lag():
    line = [(step, 100 - step) for step in range(100)]
    assert [value for _, value in smooth(line)] == pytest.approx([value for _, value in line])
    assert smooth([(1, 5.0)]) == [(1, 5.0)] and smooth([]) == []


def test_tensorboard_gets_every_number(start, tmp_path, monkeypatch):
    """Its own reader finds in its event files what the history holds."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = start(tmp_path / "out", *EVALUATED, "--report_to", "tensorboard")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for key, tag in (("loss", "train/loss"), ("grad_norm", "train/grad_norm"), ("memory", "train/memory"),
                     ("tokens_per_second", "train/tokens_per_second"), ("eval_loss", "eval/loss"),
                     ("eval_loss_messages.jsonl", "eval/loss_messages.jsonl")):
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert found == [(step, pytest.approx(value)) for step, value in numbers(trainer, key)], tag
