"""Flipped learning under transformers' Trainer, for whoever trains with its TrainingArguments: DDP, FSDP, DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from metazoo.errors import UserError
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from flipped_learning import flipping, metrics
from flipped_learning.flipping import Batch, FlippedCollator, Method
from flipped_learning.templates import Instance

Drawn = tuple[Instance, int | None]  # an instance to train on and a wrong option of it; None: none is wanted
LOGGED = ("likelihood", "unlikelihood", "log_p_right", "log_p_wrong")


class FlippedTrainer(transformers.Trainer):
    """Trains any seq2seq model on prompted instances by L_LM + λ L_UL, or as direct or channel.

    A step's loss is divided by the token counts of its whole batch, over all accumulated parts and processes, so that
    neither changes the gradient. The wrong option of an instance depends on ``args.seed``, the epoch and the instance's
    place in ``train_dataset`` alone. Beside the loss its likelihood, unlikelihood, log_p_right and log_p_wrong are
    logged, as by ``flipped-learning train``. ``evaluate`` gives eval_accuracy and eval_macro_f1 (percent) of the option
    that scores best, as ``flipping.score`` and ``choose`` find it, and eval_loss, the likelihood's part of the loss;
    ``predict`` the index of that option. An evaluation batch holds all options of its instances at once.

    Args:
        model: the seq2seq model; None with ``model_init``. args: with ``remove_unused_columns=False``.
        train_dataset, eval_dataset: lists, or datasets with a length, of labelled instances; the latter also a dict of
            such. processing_class: the tokenizer.
        method: flipped, direct or channel. unlikelihood: its weight λ (flipped). sentinels, max_source, max_target,
            unlikelihood_on_sentinels: as of ``FlippedCollator``.
        kwargs: of ``transformers.Trainer``.

    Raises:
        UserError: fp16, in which T5 overflows; no tokenizer; or a setting that does not fit.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the counts of all accumulated batches

    def __init__(
        self,
        model: nn.Module | None,
        args: TrainingArguments,
        train_dataset: Sequence[Instance] | Dataset[Instance] | None = None,
        eval_dataset: Sequence[Instance] | Dataset[Instance] | dict[str, Any] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        method: Method = "flipped",
        unlikelihood: float = 1.0,
        sentinels: bool = True,
        max_source: int = 512,
        max_target: int = 128,
        unlikelihood_on_sentinels: bool = False,
        **kwargs: Any,
    ) -> None:
        _check(args, processing_class, kwargs)
        if not 0 <= unlikelihood < float("inf"):
            raise UserError(f"unlikelihood is {unlikelihood}: give 0 or a number above it")
        self.weight = unlikelihood if method == "flipped" else 0.0
        collator = FlippedCollator(
            processing_class, method, sentinels=sentinels, max_source=max_source, max_target=max_target,
            unlikelihood_on_sentinels=unlikelihood_on_sentinels,
        )  # fmt: skip
        drawn = None
        if train_dataset is not None:
            drawn = _WithWrongOptions(train_dataset, args.seed, wanted=self.weight > 0)
            kwargs["callbacks"] = [*(kwargs.get("callbacks") or ()), _EpochCallback(drawn)]
        kwargs.setdefault("compute_metrics", _accuracy_and_f1)
        super().__init__(model, args, _Collate(collator), drawn, eval_dataset, processing_class, **kwargs)
        self._sums = torch.zeros(len(LOGGED))  # of the steps since the last log
        self._steps = 0

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Tokens of all accumulated batches of all processes, as ``flipping.token_counts`` [3]."""
        counts = torch.zeros(3, dtype=torch.long, device=device)
        for sample in batch_samples:
            counts += torch.tensor(flipping.token_counts(Batch(**sample)), device=device)
        return self.accelerator.reduce(counts, reduction="sum")  # type: ignore[no-any-return]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """This batch's part of the loss, times the number of processes, as they average gradients.

        Args:
            model: maybe wrapped. inputs: the tensors of a ``Batch``. return_outputs: also give the token
                log-probabilities {"log_probs": [N, T]}. num_items_in_batch: counts of the whole step [3]; None: of
                this batch alone.
        """
        batch = Batch(**inputs)
        log_probs = self._log_probs(model, batch)
        terms = flipping.loss_terms(log_probs, batch)
        alone = num_items_in_batch is None
        counts = flipping.token_counts(batch) if alone else torch.as_tensor(num_items_in_batch).tolist()
        right, wrong, right_counted = (max(1, count) for count in counts)
        loss = terms.loss(right, wrong, self.weight)
        if not alone:
            loss = loss * self.accelerator.num_processes
            values = torch.stack([terms.likelihood, terms.unlikelihood, terms.log_p_right, terms.log_p_wrong]).detach()
            self._sums = self._sums.to(values) + values / values.new_tensor([right, wrong, right_counted, wrong])
            self._steps += self.accelerator.sync_gradients  # true in the last of the accumulated batches
        return (loss, {"log_probs": log_probs}) if return_outputs else loss

    def _log_probs(self, model: nn.Module, batch: Batch) -> Tensor:
        """``flipping.batch_log_probs`` of a model that may be wrapped."""
        bare = self.accelerator.unwrap_model(model)
        output = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=bare.prepare_decoder_input_ids_from_labels(batch.labels),
            use_cache=False,
        )
        return flipping.token_log_probs(output.logits, batch.labels)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms of the loss to a row of training, as means over its steps."""
        if "loss" in logs and self._steps:
            sums = self.accelerator.reduce(self._sums, reduction="sum") / self._steps
            wanted = LOGGED if self.weight else ("likelihood", "log_p_right")
            logs |= {name: value for name, value in zip(LOGGED, sums.tolist(), strict=True) if name in wanted}
            self._sums, self._steps = torch.zeros_like(self._sums), 0
        super().log(logs, start_time)

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss of the right options per token, index of the best option [B], and of the right one [B]."""
        inputs = self._prepare_inputs(inputs)
        right, counts = inputs.pop("right"), inputs.pop("options")
        batch = Batch(**inputs)
        with self.compute_loss_context_manager():
            log_probs = self._log_probs(model, batch)
        first = counts.cumsum(0) - counts
        tokens = (batch.labels[first + right] != flipping.IGNORED).sum()
        loss = -log_probs[first + right].sum() / tokens
        if prediction_loss_only:
            return loss, None, None
        best = torch.stack([scores.argmax() for scores in torch.split(log_probs.sum(1), counts.tolist())])
        return loss, best, right


class _WithWrongOptions(Dataset[Drawn]):
    """Instances, each with a wrong option drawn by seed, epoch and index, whatever the batches and processes."""

    def __init__(self, instances: Any, seed: int, *, wanted: bool) -> None:
        if not (hasattr(instances, "__len__") and hasattr(instances, "__getitem__")):
            raise UserError(
                "train_dataset has no length: give a list of instances, or a dataset that is no iterable one"
            )
        self.instances, self.seed, self.wanted = instances, seed, wanted
        self.epoch = torch.zeros((), dtype=torch.long)
        self.epoch.share_memory_()  # type: ignore[no-untyped-call]  # so that lasting workers see it change

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, index: int) -> Drawn:
        instance = self.instances[index]
        where = f"train_dataset[{index}]"
        if not isinstance(instance, Instance):
            raise UserError(f"{where} is {type(instance).__name__}: give instances, as Template.apply makes them")
        if instance.label is None:
            raise UserError(f"{where} has no label: give one to each instance")
        if not self.wanted:
            return instance, None
        others = len(instance.options) - 1
        if others < 1:
            raise UserError(f"{where} has {others + 1} option(s): a wrong one is needed, leave it out")
        drawn = int(np.random.default_rng([self.seed, int(self.epoch), index]).integers(others))
        return instance, drawn + (drawn >= instance.label)


class _EpochCallback(TrainerCallback):
    """Tells the training data which epoch begins."""

    def __init__(self, drawn: _WithWrongOptions) -> None:
        self.drawn = drawn

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.drawn.epoch.fill_(int(state.epoch or 0))


class _Collate:
    """The tensors of a ``Batch`` by name: right and wrong rows to train on; to evaluate, all options of each instance
    in a row, with ``right`` [B] and ``options`` [B], index of the right one and number of options."""

    def __init__(self, collator: FlippedCollator) -> None:
        self.collator = collator

    def __call__(self, items: Sequence[Drawn] | Sequence[Instance]) -> dict[str, Tensor]:
        instances = [item if isinstance(item, Instance) else item[0] for item in items]
        if isinstance(items[0], Instance):
            return self._evaluation(instances)
        wrong = [item[1] for item in items if not isinstance(item, Instance) and item[1] is not None]
        return dict(vars(self.collator(instances, wrong or None)))

    def _evaluation(self, instances: Sequence[Instance]) -> dict[str, Tensor]:
        for instance in instances:
            if instance.label is None or len(instance.options) < 2:
                raise UserError("an instance of eval_dataset has no label or fewer than two options: leave it out")
        pairs = [self.collator.encode(instance, option) for instance in instances for option in instance.options]
        return {
            "right": torch.tensor([instance.label for instance in instances]),  # first: it tells the batch size
            "options": torch.tensor([len(instance.options) for instance in instances]),
            **vars(self.collator.pad(pairs)),
        }


def _accuracy_and_f1(found: EvalPrediction) -> dict[str, float]:
    return metrics.compute(np.asarray(found.predictions), np.asarray(found.label_ids))


def _check(args: TrainingArguments, tokenizer: PreTrainedTokenizerBase | None, kwargs: dict[str, Any]) -> None:
    if args.fp16 or args.fp16_full_eval:
        raise UserError("args has fp16, in which T5 overflows: use bf16=True, or neither")
    if args.remove_unused_columns:
        raise UserError(
            "args has remove_unused_columns, but instances have no columns: set remove_unused_columns=False"
        )
    if args.label_smoothing_factor:
        raise UserError("args has label_smoothing_factor, which has no place in this loss: leave it out")
    if tokenizer is None:
        raise UserError("processing_class is None: give the model's tokenizer")
    for name in ("data_collator", "compute_loss_func"):
        if kwargs.get(name) is not None:
            raise UserError(f"FlippedTrainer has its own {name}: leave it out")
        kwargs.pop(name, None)
