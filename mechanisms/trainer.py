"""Trainer whose checkpoints are complete or recognisable as not, and which stops at numbers that are not finite."""

import contextlib
import errno
import functools
import glob
import itertools
import math
import os
import re
import shutil

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from mechanisms import checkpoints
from mechanisms.card import loss_picture
from mechanisms.compatibility import add_former_names
from mechanisms.console import say
from mechanisms.errors import UserError, first_line
from mechanisms.finite import CollateNumbered, NotFinite, Numbered, SpikeWatch, all_finite, lost_where_not_finite
from mechanisms.head_loss import HeadLoss, output_linear, smoothed
from mechanisms.held_out import RecordLosses, short_names
from mechanisms.loading import load_weights
from mechanisms.lock import check_still_mine
from mechanisms.paths import checkpoints_in, flush, size_of
from mechanisms.progress import Pace, ProgressBar, ProgressLines
from mechanisms.stopping import EarlyStopping, SaveOnRequest
from mechanisms.strategies import by_first_rank
from mechanisms.summary import parameter_count


class FullBatches(torch.utils.data.Dataset):
    """A dataset with as many empty samples behind it as its last batch lacks.

    Every rank then has as many batches; accelerate would repeat the first samples, which would count twice in a mean.
    """

    def __init__(self, dataset, batch):
        self.dataset, self.length = dataset, math.ceil(len(dataset) / batch) * batch

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index < len(self.dataset):
            return self.dataset[index]
        return {"input_ids": self.dataset[0]["input_ids"][:1], "labels": np.array([-100])}


def joined(batches):
    """Batches of `finetune.PaddingFreeCollator`, with their numbers -> one of all their samples."""
    starts = [0, *itertools.accumulate(batch["input_ids"].shape[1] for batch in batches)]
    row = {name: torch.cat([batch[name] for batch in batches], 1)
           for name in ("input_ids", "labels", "shift_labels", "position_ids")}
    bounds = torch.cat([batches[0]["cu_seq_lens_q"][:1], *(
        batch["cu_seq_lens_q"][1:] + start for batch, start in zip(batches, starts))])
    longest = max(batch["max_length_q"] for batch in batches)
    return {**row, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest,
            "logits_to_keep": torch.cat([batch["logits_to_keep"] + start for batch, start in zip(batches, starts)]),
            "numbers": list(itertools.chain.from_iterable(batch["numbers"] for batch in batches))}


class LogLastStep(TrainerCallback):
    """The last step is logged whatever --logging_steps is: its loss is what one looks for."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step >= state.max_steps


class SafeTrainer(Trainer):
    """transformers' Trainer, with what it leaves to luck done here.

    Args (besides Trainer's):
        run: facts a resumed run must share with its checkpoint (see `mechanisms.checkpoints.check_same_run`).
        together: batches of a step that are computed in one pass (see `fitting.Plan`).
        card: text of the model card that goes into every checkpoint and the result.
        wrapper: the `mechanisms.wrapper.Wrapper` that the result gets around it, or None. Checkpoints hold the text
            part alone, which is what a run resumes from.
        report: the `mechanisms.report.Report` that shows the run, or None.
    """

    def __init__(self, *args, run, card, wrapper=None, together=1, report=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.run, self.card, self.wrapper, self.together, self.report = run, card, wrapper, together, report
        self.data_collator = CollateNumbered(self.data_collator)
        self.tokens_here = 0  # of this rank, not yet in the Trainer's state
        self.step_batches = []  # of the step being made: (numbers of the items, loss) of each batch
        self.skipped_steps = 0  # by the loss scaler of fp16
        self.result_files = []  # names in output_dir, once the result is there
        self.failure = self.saved_step = None  # why this rank could not write; the step of the newest checkpoint
        # Trainer would delete by number and age alone, and before the new one is complete.
        self.save_total_limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._check_room()
        self.spikes = SpikeWatch(self.args.loss_spike_factor) if self.args.loss_spike_factor else None
        self.head_loss = self.label_smoother = None  # Trainer's smoother wants the logits of all positions
        if output_linear(self.model):
            self.head_loss = HeadLoss(self.model, self.args.label_smoothing_factor)
        else:
            if self.args.label_smoothing_factor:
                network = self.model.get_base_model() if self.args.use_lora else self.model
                network.loss_function = functools.partial(smoothed, self.args.label_smoothing_factor)
            say("note: the output layer has an adapter or is quantized: the loss is computed from its full logits, "
                "which takes more memory")
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(LogLastStep)
        if self.args.early_stopping:
            self.add_callback(EarlyStopping)
        if report:
            report.trainer = self
            self.add_callback(report)
        self.pace = Pace()  # after the report, whose sample answers are not training
        self.add_callback(self.pace)
        self.add_callback(SaveOnRequest)  # the last to know of a checkpoint, as it may end the program
        self.add_callback(ProgressLines if self.args.disable_tqdm else ProgressBar)

    def _build_accelerator_args(self, **kwargs):
        arguments = super()._build_accelerator_args(**kwargs)
        [ddp] = arguments["kwargs_handlers"]
        ddp.gradient_as_bucket_view = True  # else DDP holds all gradients twice
        return arguments

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return self._evaluation_loss(model, inputs, return_outputs)
        with self.head_loss.computing(inputs["shift_labels"]) if self.head_loss else contextlib.nullcontext():
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        lost_where_not_finite(loss)
        return loss

    def _evaluation_loss(self, model, inputs, return_outputs):
        """The mean of this row (in evaluation too Trainer counts the items of all ranks). Sets `token_losses`."""
        targets = inputs["shift_labels"]
        self.token_losses = torch.empty(targets.numel(), device=targets.device)
        with self.head_loss.computing(targets, self.token_losses) if self.head_loss else contextlib.nullcontext():
            loss, outputs = super().compute_loss(model, inputs, True)
        if not self.head_loss:
            self.token_losses = torch.nn.functional.cross_entropy(outputs["logits"].flatten(0, 1).float(),
                                                                  targets.flatten(), reduction="none")
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self):
        return self._get_dataloader(
            Numbered(self.train_dataset), "Training", self._train_batch_size, lambda _: self._get_train_sampler(),
            is_training=True)

    def get_batch_samples(self, *args):
        """Trainer's, but the last of each `together` batches has the samples of all of them, and the others are None.

        So Trainer counts batches as ever, a resumed run finds its place with another number, and all ranks have as many
        passes.
        """
        batches, tokens = super().get_batch_samples(*args)
        if self.together > 1:
            groups = [batches[start:start + self.together] for start in range(0, len(batches), self.together)]
            batches = [batch for group in groups for batch in (*[None] * (len(group) - 1), joined(group))]
        return batches, tokens

    def train(self, resume_from_checkpoint=None):
        with contextlib.ExitStack() as stack:
            if self.report:
                stack.enter_context(self.report.following())
            if resume_from_checkpoint:
                stack.enter_context(self._loading(resume_from_checkpoint))
            return super().train(resume_from_checkpoint)

    def _loading(self, checkpoint):
        classes = checkpoints.deepspeed_classes() if self.is_deepspeed_enabled else []
        return checkpoints.no_code_from_pickles(checkpoint, classes, self.args.trust_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(resume_from_checkpoint)

    def _issue_warnings_after_load(self, load_result):
        """Trainer's, but not for tied weights, which a checkpoint has under one of their names.

        Can go when Trainer asks the model's all_tied_weights_keys, as `from_pretrained` does.
        """
        missing = [name for name in load_result.missing_keys if name not in self.model.all_tied_weights_keys]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_renamed(self, folder):
        """Load the weights of a network whose files have other names than it has (one tensor for each expert, the
        names of a wrapper). Trainer looks for its own names, finds few or none of them and goes on.

        Can go when Trainer loads checkpoints as `from_pretrained` does.
        """
        if self.args.use_lora or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return
        saved = set()
        for file in glob.glob(os.path.join(glob.escape(folder), "*.safetensors")):
            with safe_open(file, "pt") as tensors:
                saved |= set(tensors.keys())
        if not saved <= self.model.state_dict().keys():
            self.model.load_state_dict(load_weights(folder, dtype=self.model.dtype).state_dict())

    def load_again(self, checkpoint):
        """Load a checkpoint into the model and optimizer that are there. Raises UserError."""
        with self._loading(checkpoint):
            if self.is_deepspeed_enabled:
                deepspeed_load_checkpoint(self.model_wrapped, checkpoint, load_module_strict=not self.args.use_lora)
            else:
                self._load_from_checkpoint(checkpoint)
            self._load_optimizer_and_scheduler(checkpoint)
            self._load_rng_state(checkpoint)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if inputs is None:  # is in a later batch
            return torch.zeros((), device=self.args.device)
        inputs = dict(inputs)
        numbers = inputs.pop("numbers", [])  # none from a data loader of another making
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_batches.append((numbers, loss))
        return loss

    def _track_num_input_tokens(self, inputs):
        self.tokens_here += inputs["input_ids"].numel() if inputs else 0

    def floating_point_ops(self, inputs):
        return super().floating_point_ops(inputs) if inputs else 0

    def _add_tokens(self):
        """Where the number is read: Trainer itself asks all ranks in every batch, and each waits for its GPU then."""
        here = torch.tensor(self.tokens_here, device=self.args.device)
        self.state.num_input_tokens_seen += self.accelerator.reduce(here).item()
        self.tokens_here = 0

    def log(self, logs, start_time=None):
        self._add_tokens()
        if "loss" in logs:
            logs |= self.pace.measure(self.args, self.state)
        super().log(logs, start_time)

    def _get_grad_norm(self, model, grad_norm=None):
        """Trainer calls this before it makes a step. DeepSpeed has made it by now, or not if the norm is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)
        batches, self.step_batches = self.step_batches, []
        if norm is None:  # a DeepSpeed config may do without
            value = math.inf if self.accelerator.optimizer_step_was_skipped else 0.0
        else:
            value = float(norm)
        if not 0 <= value < math.inf:
            self._stop_or_skip(value, batches)
        elif self.spikes:
            loss = self.accelerator.reduce(sum(loss for _, loss in batches), "mean").item()
            if self.spikes.is_spike(loss):
                places = [places for _, places in sorted(self._of_all_ranks(batches), key=lambda batch: -batch[0])]
                self.spikes.report(self.state.global_step + 1, loss, list(itertools.chain.from_iterable(places)))
        return norm

    def _stop_or_skip(self, norm, batches):
        """A step whose gradient is not finite: the loss scaler of fp16 skips it where it can help; else NotFinite."""
        found = self._of_all_ranks(batches)
        lost = [batch for batch in found if not math.isfinite(batch[0])]
        if not lost and self._scales_the_loss():
            self.skipped_steps += 1
            return
        what = f"the loss became NaN or infinite ({lost[0][0]})" if lost else \
            f"the gradient norm became NaN or infinite ({norm})"
        raise NotFinite(what, self.state.global_step + 1, self._get_learning_rate(),
                        [place for _, places in lost or found for place in places])

    def _of_all_ranks(self, batches):
        """(loss, places of the records) of every batch of the step on every rank; of each (numbers, loss) here."""
        mine = [(loss.item(), [place for number in numbers for place in self.train_dataset.places(number)])
                for numbers, loss in batches]
        return gather_object(mine)

    def _scales_the_loss(self):
        """Whether fp16's scaler can still come down: below 1 its scale is not what makes the gradients too large."""
        if self.is_deepspeed_enabled:
            return self.deepspeed.fp16_enabled()  # it stops by itself
        return self.accelerator.scaler is not None and self.accelerator.scaler.get_scale() >= 1

    def _check_room(self):
        """Raises UserError if the result, or one checkpoint beside it, does not fit on the disk by a rough estimate."""
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        saved = trained if self.args.use_lora else self.model.parameters()
        weights = sum(parameter_count(weight) * weight.element_size() for weight in saved)
        result = weights + (self.wrapper.size if self.wrapper else 0)
        fp32_copies = 3 if self.is_deepspeed_enabled else 2  # Adam's two, and DeepSpeed's own of the weights
        states = 0 if self.args.save_only_model else sum(map(parameter_count, trained)) * 4 * fp32_copies
        self.checkpoint_size = weights + states
        kept = self.args.save_strategy != "no"
        failure = self._failure_of_any(lambda: _need(self.args.output_dir, result + kept * self.checkpoint_size))
        if failure:
            raise UserError(f"the disk is too full to begin: {failure}; a checkpoint takes "
                            f"{self.checkpoint_size / 1e9:.2g} GB, the result {result / 1e9:.2g} GB")

    def _check_weights(self):
        """Raises NotFinite, on all ranks, if a trained weight or a number of the optimizer is not finite on any."""
        weights = [getattr(weight, "ds_tensor", weight) for weight in self.model.parameters() if weight.requires_grad]
        numbers = [getattr(value, "scale", value)  # of 8-bit moments
                   for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*weights, *filter(torch.is_tensor, numbers)]
        lost = torch.tensor(not all_finite(tensors), dtype=torch.int32, device=self.args.device)
        if self.accelerator.reduce(lost).item():
            raise NotFinite("the weights are not numbers any more", self.state.global_step, self._get_learning_rate())

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """The loss is the mean over all predicted tokens, however the samples fall into batches and onto ranks."""
        self.evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        records = self.record_losses
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, tokens = self.accelerator.reduce(self.evaluated).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = loss / tokens
        if not math.isfinite(loss):
            raise NotFinite(f"the loss in evaluation is NaN or infinite ({loss})", self.state.global_step,
                            self._get_learning_rate())
        self.hardest, files = records.end()
        names = short_names(files) if len(files) > 1 else {}
        output.metrics.update({f"{metric_key_prefix}_loss_{name}": files[file] for file, name in names.items()})
        return output

    def evaluate_result(self):
        """The metrics of the evaluation data; an evaluation after the last step is not made again."""
        last = next((entry for entry in reversed(self.state.log_history) if "eval_loss" in entry), {"step": None})
        if last["step"] == self.state.global_step and not self.args.load_best_model_at_end:
            return last
        return self.evaluate()

    def prediction_step(self, model, inputs, *args, **kwargs):
        inputs = dict(inputs)
        numbers, tokens = inputs.pop("numbers"), inputs["shift_labels"].numel()
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        self.record_losses.add(numbers, inputs, self.token_losses)
        self.evaluated += torch.stack([loss * tokens, torch.full_like(loss, tokens)])
        return loss, logits, labels

    def get_eval_dataloader(self, eval_dataset=None):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        self.record_losses = RecordLosses(dataset)
        return super().get_eval_dataloader(
            Numbered(FullBatches(dataset, self.args.eval_batch_size * self.args.world_size)))

    def _run_epoch(self, *args, **kwargs):
        # Resumed from its last checkpoint, a finished run would be trained one step too many: Trainer looks whether
        # max_steps is reached, or a callback wants to stop, after a step only. Can go when it looks before.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # What a rank cannot write must not keep it from what all ranks do together: it is remembered, and all are told.

    def _save(self, output_dir=None, state_dict=None):
        """Trainer's, but for training_args.bin, a pickle that nothing reads."""
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model)
        with self._remembering_failure():
            os.makedirs(output_dir, exist_ok=True)
            model.save_pretrained(output_dir, state_dict=state_dict)
            self.processing_class.save_pretrained(output_dir)
            # An adapter folder gets neither from transformers: chat programs look for both there.
            model.generation_config.save_pretrained(output_dir)
            add_former_names(output_dir)
            with open(os.path.join(output_dir, "README.md"), "w", encoding="utf-8") as file:
                file.write(self.card + loss_picture(self.state.log_history))

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.is_deepspeed_enabled:
            with self._remembering_failure():
                super()._save_optimizer_and_scheduler(output_dir)
            return
        # DeepSpeed's ranks wait for each other between their files.
        engine = self.model_wrapped
        plain = engine.checkpoint_engine.makedirs, engine.checkpoint_engine.save, engine._copy_recovery_script
        remembering = self._remembering_failure()
        engine.checkpoint_engine.makedirs, engine._copy_recovery_script = remembering(plain[0]), remembering(plain[2])
        engine.checkpoint_engine.save = remembering(_all_or_nothing(plain[1]))
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            engine.checkpoint_engine.makedirs, engine.checkpoint_engine.save, engine._copy_recovery_script = plain

    def _save_scaler(self, output_dir):
        with self._remembering_failure():
            super()._save_scaler(output_dir)

    def _save_rng_state(self, output_dir):
        with self._remembering_failure():
            super()._save_rng_state(output_dir)

    @contextlib.contextmanager
    def _remembering_failure(self):
        try:
            yield
        except Exception as error:
            self.failure = self.failure or why_not_written(error)  # what fails after it may fail because of it
            if not self.failure:
                raise

    def _failure_of_any(self, function=None):
        """What kept any rank from writing, or None; `function` is called first on the ranks that save. All wait."""
        with self._remembering_failure():
            if function and self.args.should_save and not self.failure:
                function()
        failures = list(filter(None, gather_object([self.failure])))
        self.failure = None
        return failures[0] if failures else None

    def _save_checkpoint(self, model, trial):
        """A checkpoint is written whole, or not at all: that is said, and training goes on."""
        step, out = self.state.global_step, self.args.output_dir
        if self.saved_step == step:  # asked for twice at one step
            return
        self._add_tokens()
        self._check_weights()
        by_first_rank(lambda: check_still_mine(out))
        folder = os.path.join(out, f"checkpoint-{step}")
        failure = self._failure_of_any(lambda: self._make_room(folder))
        if not failure:
            try:
                super()._save_checkpoint(model, trial)
            except Exception as error:
                self.failure = self.failure or why_not_written(error)
                if not self.failure:
                    raise
                if self.is_deepspeed_enabled:
                    raise UserError(self._not_saved(folder, self.failure)) from error
            failure = self._failure_of_any()
        failure = failure or self._failure_of_any(lambda: self._complete(folder))
        if failure:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            say(f"note: {self._not_saved(folder, failure)}. Training goes on")
        else:
            self.saved_step = step

    def _make_room(self, folder):
        """Before a checkpoint is written. Raises OSError if it does not fit on the disk."""
        if os.path.lexists(folder):
            checkpoints.remove(folder)
        out, keep = self.args.output_dir, self.save_total_limit
        if checkpoints.room_problem(out, self.checkpoint_size) and keep:
            checkpoints.rotate(out, keep - 1, self.state.best_model_checkpoint)  # what is to go anyhow
        _need(out, self.checkpoint_size)

    def _complete(self, folder):
        """After every rank has written. Raises OSError."""
        checkpoints.write_manifest(folder, self.run, not self.args.save_only_model, self.args.world_size)
        self.checkpoint_size = size_of(folder)
        if self.save_total_limit:
            checkpoints.rotate(self.args.output_dir, self.save_total_limit, self.state.best_model_checkpoint)

    def _not_saved(self, folder, reason):
        whole = [path for path in checkpoints_in(self.args.output_dir) if path != folder and checkpoints.is_whole(path)]
        left = f"the newest complete one is {os.path.basename(whole[0])}" if whole else "there is none before it"
        return f"{folder} is not saved: {reason}; {left}"

    def _load_best_model(self):
        problem = checkpoints.read_manifest(self.state.best_model_checkpoint, self.args.verify_checkpoint)
        if isinstance(problem, str) and problem != checkpoints.ONLY_MODEL:
            raise UserError(f"--load_best_model_at_end: {self.state.best_model_checkpoint} cannot be loaded: {problem}")
        super()._load_best_model()
        self._load_renamed(self.state.best_model_checkpoint)

    def convert(self, dtype):
        """Hold the weights in another dtype, to save them so; training is over."""
        for weight in self.model.parameters():
            weight.data = weight.data.to(dtype)

    def save_result(self):
        """Save into output_dir by way of a folder beside, so that a kill never leaves a half result there."""
        self._check_weights()
        out = self.args.output_dir
        by_first_rank(lambda: check_still_mine(out))
        unfinished = os.path.join(out, "result.unfinished")
        failure = self._failure_of_any(lambda: shutil.rmtree(unfinished, ignore_errors=True))
        self.save_model(unfinished)
        failure = failure or self._failure_of_any()
        failure = failure or self._failure_of_any(lambda: self._take_over(unfinished))
        if failure:
            if self.args.should_save:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise UserError(f"the result is not saved to {out}: {failure}. The same command resumes from the newest "
                            "checkpoint and saves it again")

    def _take_over(self, unfinished):
        """The files of the saved result get their place in output_dir, and those of an earlier one make room."""
        if self.wrapper:
            self.wrapper.complete(unfinished)
        self.state.save_to_json(os.path.join(unfinished, TRAINER_STATE_NAME))
        checkpoints.settle(unfinished)
        out = self.args.output_dir
        names = sorted(os.listdir(unfinished), key=lambda name: name in ("config.json", "adapter_config.json"))
        earlier = [name for name in os.listdir(out) if name not in names and
                   re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)]
        for name in ["config.json", *earlier] if earlier else []:  # loaders would take these, in other files, for it
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(out, name))
        for name in names:  # the config last: a folder without one does not pass for a model
            os.replace(os.path.join(unfinished, name), os.path.join(out, name))
        os.rmdir(unfinished)
        flush(out)
        self.result_files = names


def _need(folder, size):
    problem = checkpoints.room_problem(folder, size)
    if problem:
        raise OSError(errno.ENOSPC, problem)


def _all_or_nothing(save):
    """save(state_dict, path), but a file that is not written to its end is removed: it may be what fills the disk."""
    def save_all(state_dict, path):
        try:
            save(state_dict, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(path)
            raise

    return save_all


def why_not_written(error):
    """What kept a file from being written, or None if the exception is of another kind.

    torch and tokenizers have none of their own: theirs are known by their words.
    """
    if isinstance(error, OSError | SafetensorError):
        return error.strerror or str(error)
    words = str(error)
    if "PytorchStreamWriter failed writing" in words or "unexpected pos" in words or "(os error " in words:
        return first_line(words)
    return None
