"""``transformers.Trainer`` with a loss of the catalogue."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader

import rankloss
from rankloss.losses import TEACHER
from rankloss.options import check_count
from rankloss_features.binding import COLUMN, bind
from rankloss_trainers.cached import Split
from rankloss_trainers.declared import Choice
from rankloss_trainers.entries import Entries
from rankloss_trainers.extras import extra
from rankloss_trainers.host import read_losses
from rankloss_trainers.pair_ids import CAPTIONS, hash_tokens
from rankloss_trainers.run_options import RunOptions, takes_run_options
from rankloss_trainers.runtime import Runtime
from rankloss_trainers.transformers import embeddings, pair_columns
from rankloss_trainers.transformers.host import HOST

with extra("transformers"):
    import accelerate as accelerate  # type: ignore[import-untyped]
    import transformers

    from rankloss_trainers.transformers import graded_lists
    from rankloss_trainers.transformers.progress import Progress, keeping_last_batch
    from rankloss_trainers.transformers.retrieval import Retrieval

__all__ = ["ContrastiveTrainer", "ContrastiveTrainerMixin"]

_STATE = "rankloss"  # the key in a checkpoint's trainer_state.json, among the states of callbacks


class ContrastiveTrainer(transformers.Trainer):
    """``transformers.Trainer`` with a loss of rankloss's catalogue.

    For a Trainer of one's own, put it before that: ``class Mine(ContrastiveTrainerMixin, MyTrainer)``. A
    ``compute_loss`` of one's own belongs in ``Mine`` and calls ``super().compute_loss``. A training that
    never does so ends before its first step.

    - λ follows the optimizer steps, ``global_step`` of ``max_steps``, in a run of fewer than ten epochs or of
      unknown length, else the epochs, and is right after a resume. The state of a loss is in the checkpoints.
    - Each process's pairs are contrasted with those of all processes, exactly under DDP's averaging.
    - The loss is a mean over the pairs of a forward pass. With gradient accumulation the means are averaged,
      and pairs are contrasted within a micro-batch only.
    - A model with a ``logit_bias`` (SigLIP) is trained with the sigmoid loss, others with CLIP's: ALIGN too,
      whose own loss smooths its labels.
    - ``loss="ranked-lists"``, or a module that takes a list of graded candidates of each query, trains on a
      table of lists: columns ``query``, ``candidates``, and ``grades`` or ``ranks``, pictures and texts that
      ``processing_class`` encodes. With a column ``own``, the query's own text or picture, CLIP's loss of
      these pairs is trained beside the lists. It is evaluated by the lists' loss and metrics. See
      ``RankedListsCollator`` of :mod:`rankloss_trainers.transformers.graded_lists`.
    - Evaluation, or any call without gradients, gives the base loss without the rank terms, which does not
      grow with λ; so ``load_best_model_at_end`` compares like with like. A last batch of one pair counts 0.
    - Evaluation of pairs also gives recall, ``eval_image_to_text_R@1`` to ``eval_text_to_image_R@10`` and the
      median ranks, of all pairs of all processes at once (:func:`rankloss.metrics.recall`), and
      ``eval_mean_R@1``, the mean of both directions, by which to choose a checkpoint. Rows of one picture
      are its captions, each a partner. With ``loss="clip-ids"`` pairs of one id are partners, and there are
      ``eval_image_to_image_R@1`` and so on.
      ``dataloader_drop_last`` is for training: an evaluation has every row.
    - The log shows each term, λ, and the other entries of the loss, averaged since the last line.

    Args:
        *args: Arguments of the Trainer.
        loss: A loss as the catalogue names it, or a module with the forward convention of open_clip's losses,
            whose innermost ``base``, if it has one, is evaluated; or the choice of a command line, which has
            the options below with it (:meth:`rankloss_trainers.command_line.LossArguments.chosen`).
        loss_options: Options of the named loss, by their names without prefix; those of joined ones by loss.
        teacher: A folder of ``rankloss features`` that the data are bound to
            (:func:`rankloss_features.bind`); or a teacher whose features are computed before the first step,
            ``"ViT-L-14-quickgelu:openai"`` or ``"image=…,text=…"``, with ``,align`` in one space. None: the
            columns ``reference_image_features`` and ``reference_text_features``, or one of them, where the
            data have them; ``"given"`` needs them. The loss gets a teacher's features, the model does not,
            and evaluation does not need them.
        mini_batch_size: Embed each batch in mini-batches of so many pairs at most, in the memory of one, for
            a second forward pass's time (GradCache). Loss and gradients are those of the whole batch, which
            ``per_device_train_batch_size`` sets. Batch norm, as in ALIGN, is of a mini-batch, and counts each
            twice in its running averages. In evaluation the batch is split, too, and ``compute_metrics`` gets
            the embeddings and the scale. By default the batch is embedded at once.
        **kwargs: The other options of a run, see :class:`RunOptions
            <rankloss_trainers.run_options.RunOptions>`; and keywords of the Trainer.

    Raises:
        TypeError: for an option that the loss does not have, for ``loss_options`` beside a module or any
            option beside a choice of a command line, and for a ``compute_loss`` of a class behind this one,
            which would never be called.
        ValueError: for options that cannot work, and for a set-up that would train something else:
            DataParallel, ZeRO stage 3, FSDP with flat parameters, tensor, context and sequence parallelism, a
            ``compute_loss_func`` or another attribute by which the Trainer does not divide the loss by the
            accumulated batches, a model without a scale, a loss with parameters, which the Trainer's
            optimizer does not know, or one that needs pairs beside lists. In ``train``, for a wrong list,
            with its row, for a last batch of one pair of data with a length (in a stream it counts 0), for a
            loss that goes by epochs on data without a length, for a teacher's features that are missing,
            damaged, come from two sources, or come with a loss that does not use them, and for mini-batches
            of a model that is compiled as a whole, or of columns that cannot be split.

    References:
        Cached gradients: "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", RepL4NLP
        2021.
    """

    @takes_run_options
    def __init__(
        self,
        *args: Any,
        loss: str | nn.Module | Choice = "rankclip",
        loss_options: Mapping[str, Any] | None = None,
        mini_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self._refuse_lost_losses()
        options = RunOptions.taken_from(kwargs)
        if isinstance(loss, (Runtime, Choice)):
            _refuse_options_beside_a_choice(loss_options, options)
        super().__init__(*args, **kwargs)
        self.mini_batch_size = mini_batch_size
        if mini_batch_size is not None:
            check_count("mini_batch_size", mini_batch_size)
        self._refuse_other_trainings()
        embeddings.logit_scale(self.model)  # raises a ValueError where the model has none
        # Only where these are false does the Trainer divide the loss by the accumulated batches, see
        # check_scaling. A Trainer behind this class may have set them for its own loss.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = False
        if self.args.label_names is None:
            self.label_names = []  # the pairs are the labels; else evaluation would give no loss
        self.can_return_loss = True  # without labels, and whether the batch asks for it or not
        base = rankloss.SigLipLoss if embeddings.has_bias(self.model) else rankloss.ClipLoss
        if isinstance(loss, Runtime):  # of `python -m rankloss_trainers.transformers`, which has checked it
            run = loss.on(base)
        elif isinstance(loss, Choice):
            run = Runtime(HOST, *loss, base=base)
        else:
            run = Runtime(HOST, read_losses(loss, loss_options), options, base=base)
        self.loss_runtime: Runtime = run.to(self.args.device)
        self._compute_teacher()
        # For the next line of the log: of each entry the sum of its values, and their number.
        self._sums: dict[str, tuple[Any, int]] = {}
        self._measured: list[torch.Tensor] = []  # metrics of the lists of an evaluation
        self._retrieval: Retrieval | None = None  # within an evaluation
        self._has_trained_loss = False
        self.add_callback(_Progress(self))
        if self.loss_runtime.takes_lists:
            graded_lists.check_run(self.loss_runtime)
            if self.data_collator is transformers.default_data_collator:
                self.data_collator = self._collator_of_lists()

    def _collator_of_lists(self) -> graded_lists.RankedListsCollator:
        """The collator of lists that fits the model and the loss."""
        parts = self.loss_runtime.criterion.modules()
        unique = any(getattr(part, "in_batch_negatives", False) for part in parts)
        padding = "max_length" if embeddings.has_bias(self.model) else True  # SigLIP's own
        return graded_lists.RankedListsCollator(self.processing_class, padding, unique)

    def _compute_teacher(self) -> None:
        """Compute the teacher's features of the training data, unless a cache has them, and bind the data."""
        spec = self.loss_runtime.teaching.spec
        if spec is None or self.train_dataset is None:
            return
        from rankloss_features import caching

        data = caching.of_dataset(self.train_dataset, spec)
        # Beside the output, which push_to_hub uploads.
        place = Path(self.args.output_dir or ".").absolute().parent / "teachers"
        folder = caching.cached(spec, data, place, self.args.device)
        self.loss_runtime.teaching.open_folder(folder)
        self.train_dataset = bind(self.train_dataset, folder)

    @property
    def _pair_column(self) -> str | None:
        """The column of the pairs' ids; None where the captions are the ids, or without."""
        key = self.loss_runtime.id_key
        return None if key == CAPTIONS else key

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches with their data for the loss, in which a teacher's features have been checked.

        Raises:
            ValueError: As transformers' Trainer says it, there is no ``train_dataset``.
        """
        if self.train_dataset is None:
            return super().get_train_dataloader()
        run, key = self.loss_runtime, self._pair_column
        run.teaching.name_columns(pair_columns.list_columns(self.train_dataset))
        if key is not None:
            pair_columns.check_ids(self.train_dataset, key)
        own_collator, folder = self.data_collator, run.teaching.features
        self.data_collator = functools.partial(pair_columns.collate_pairs, own_collator, folder, key)
        try:
            loader: DataLoader[Any] = super().get_train_dataloader()
        finally:
            self.data_collator = own_collator
        if run.takes_lists:
            graded_lists.check_loader(loader)
            graded_lists.check_table(run, self.train_dataset)
        return loader

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch on its device; DeepSpeed rounds its numbers, but not a teacher's features."""
        of_teacher = {name: inputs[name].to(self.args.device) for name in TEACHER if name in inputs}
        return {**super()._prepare_inputs(inputs), **of_teacher}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *_: Any, **__: Any
    ) -> Any:
        """The loss of a batch; without gradients, as in evaluation, the base loss, or that of its lists."""
        trains = torch.is_grad_enabled()  # a model may keep itself in evaluation mode
        self._has_trained_loss |= trains
        if self.loss_runtime.takes_lists:
            outputs, entries = self._of_lists(model, inputs)
        else:
            outputs, entries = self._of_pairs(model, inputs)
        if trains:
            for name, value in {**entries.terms, **entries.metrics}.items():
                total, calls = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + value.detach().float(), calls + 1
        return (entries.total, outputs) if return_outputs else entries.total

    def _of_lists(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, Entries]:
        """The model's output for a batch of lists, and the entries of its loss."""
        run = self.loss_runtime
        unwrapped = self.accelerator.unwrap_model(model)
        outputs, features = graded_lists.embed(run, model, unwrapped, inputs, self.mini_batch_size)
        if torch.is_grad_enabled():
            return outputs, run(**features)
        of_lists = graded_lists.measure(features)
        self._measured.append(self.accelerator.gather_for_metrics(of_lists))
        return outputs, run.evaluate(**features)

    def _of_pairs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, Entries]:
        """The model's output for a batch of pairs, and the entries of its loss."""
        of_loss = {name: inputs[name] for name in (*TEACHER, "pair_ids") if name in inputs}
        if self.loss_runtime.id_key == CAPTIONS:
            of_loss["pair_ids"] = hash_tokens(inputs, self.processing_class)
        # By return_loss the model would compute its own loss, of this process alone, for nothing.
        others = ("return_loss", COLUMN, *of_loss)
        of_model = {name: value for name, value in inputs.items() if name not in others}
        unwrapped = self.accelerator.unwrap_model(model)
        split = Split.of_pairs(of_model, self.mini_batch_size)
        outputs, features = embeddings.embedded(model, unwrapped, of_model, split)
        if torch.is_grad_enabled():
            return outputs, self.loss_runtime(**features, **of_loss)
        if self._retrieval is not None:
            self._retrieval.add(
                self.accelerator,
                inputs=of_model,
                processor=self.processing_class,
                pair_ids=of_loss.get("pair_ids"),
                **features,
            )
        return outputs, self.loss_runtime.evaluate(**features)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        """Batches of all rows, with the pairs' ids where the data have them."""
        return self._of_every_row(super().get_eval_dataloader, *args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader[Any]:
        """As :meth:`get_eval_dataloader`."""
        return self._of_every_row(super().get_test_dataloader, *args, **kwargs)

    def _of_every_row(
        self, make: Callable[..., DataLoader[Any]], *args: Any, **kwargs: Any
    ) -> DataLoader[Any]:
        """The loader that a method of the Trainer makes, of all rows and with the pairs' ids."""
        own_collator, key = self.data_collator, self._pair_column
        if key is not None:
            self.data_collator = functools.partial(pair_columns.collate_ids, own_collator, key)
        try:
            with keeping_last_batch(self.args):
                return make(*args, **kwargs)
        finally:
            self.data_collator = own_collator

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        """Add recall, or the metrics of lists, to those of an evaluation."""
        self._measured.clear()
        self._retrieval = Retrieval(dataloader, self.accelerator.num_processes)
        try:
            output = super().evaluation_loop(dataloader, *args, **kwargs)
            retrieved = self._retrieval.measure()
        finally:
            self._retrieval = None
        if output.metrics is None:
            return output
        values = dict(retrieved)
        if self._measured:
            values.update(graded_lists.mean_metrics(torch.cat(self._measured)))
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in values.items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add to the lines of training each entry of the loss, as the mean over the calls that gave it."""
        if "loss" in logs and self._sums:
            means = torch.stack([total / calls for total, calls in self._sums.values()])
            of_all_processes = self.accelerator.reduce(means, reduction="mean").tolist()
            logs.update(zip(self._sums, of_all_processes, strict=True))
            self._sums.clear()
        super().log(logs, *args, **kwargs)

    # A callback's on_save would miss the checkpoint at SIGTERM.
    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Put the state of the loss into the checkpoint's JSON, its tensors as lists."""
        saved = self.loss_runtime.saved()
        saved["state_dict"] = {key: tensor.tolist() for key, tensor in saved["state_dict"].items()}
        states = cast("dict[str, Any]", self.state.stateful_callbacks)
        states[_STATE] = saved
        super()._save_checkpoint(*args, **kwargs)

    def _refuse_lost_losses(self) -> None:
        """Raise a TypeError if a Trainer behind this class computes a loss that would never be called."""
        # Not transformers.Trainer: a script's runner puts a class of rankloss under that name.
        hugging_faces = ContrastiveTrainer.__base__
        classes = type(self).__mro__
        behind_this_one = classes[classes.index(ContrastiveTrainer) + 1 :]
        for other in behind_this_one:
            if other is hugging_faces:
                break
            if "compute_loss" in vars(other):
                raise TypeError(
                    f"{other.__name__}.compute_loss would be replaced by ContrastiveTrainer's: leave it out "
                    f"of {other.__name__}, or move it to {type(self).__name__} and call super().compute_loss"
                )

    def check_loss_is_trained(self) -> None:
        """Raise a RuntimeError before an optimizer step whose gradients are of another loss."""
        if not self._has_trained_loss:
            raise RuntimeError(
                f"loss {self.loss_runtime.name} was not used: {type(self).__name__} trains without calling "
                "ContrastiveTrainer.compute_loss"
            )

    def check_scaling(self) -> None:
        """Raise a ValueError if the Trainer would not divide the loss by the accumulated batches.

        The loss is a mean over a micro-batch. Each of these attributes, set after this class has been, tells
        the Trainer that it is divided already.
        """
        for name in ("loss_is_scaled_for_ga", "model_accepts_loss_kwargs", "compute_loss_func"):
            value = getattr(self, name, None)
            if value:
                raise ValueError(
                    f"{name} must not be set: the loss is a mean over a micro-batch, which the Trainer has "
                    f"to divide by gradient_accumulation_steps; got {value!r}"
                )

    def _refuse_other_trainings(self) -> None:
        """Raise a ValueError for a set-up that would train another loss, or a loss of fewer pairs."""
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)
        devices = self.args.n_gpu
        reason = ""
        if self.compute_loss_func is not None:
            reason = "compute_loss_func is ignored by this trainer; give the loss as `loss`"
        elif self.args.label_smoothing_factor:
            reason = "label_smoothing_factor is for labels, which pairs do not have; give loss='clip-smooth'"
        elif devices > 1:
            reason = f"DataParallel over {devices} GPUs contrasts each GPU's pairs alone; start with torchrun"
        elif fsdp is not None and fsdp.fsdp_version == 1:
            reason = 'FSDP version 1 hides the logit_scale; give fsdp_config={"version": 2}'
        elif sharded := self._processes_of_a_batch():
            reason = (
                f"{sharded} gives one batch to several processes, which would contrast a pair with itself"
            )
        if reason:
            raise ValueError(reason)

    def _processes_of_a_batch(self) -> str:
        """The parallelism by which several processes have the pairs of one batch; empty without one."""
        for kind, name in (("tp", "tensor"), ("cp", "context"), ("sp", "sequence")):
            get_size: Any = getattr(self, f"get_{kind}_size", None)  # of releases that have such a mode
            size = getattr(self.args, f"{kind}_size", 1) if get_size is None else get_size()
            if size > 1:
                return f"{name} parallelism over {size} processes"
        return ""

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the loss takes and the model does not, which would be dropped as unused."""
        super()._set_signature_columns_if_needed()
        of_model = cast("list[str]", self._signature_columns)
        of_lists = graded_lists.COLUMNS if self.loss_runtime.takes_lists else ()
        of_ids = [] if self._pair_column is None else [self._pair_column]
        each_once = dict.fromkeys([*of_model, *of_lists, *of_ids, *TEACHER, COLUMN])
        self._signature_columns: Any = list(each_once)


class _Progress(Progress):
    """Gives the loss, beside its progress, the state of a checkpoint."""

    def __init__(self, trainer: ContrastiveTrainer) -> None:
        super().__init__(trainer.loss_runtime)
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Resume, or begin anew: a search trains several times, with a new model."""
        self.trainer.check_scaling()
        is_resumed = state.global_step > 0
        saved = state.stateful_callbacks.get(_STATE) if is_resumed else None
        self.trainer.loss_runtime.restore(saved, warn=is_resumed and state.is_world_process_zero)
        self.trainer._sums.clear()
        self.trainer._has_trained_loss = False
        super().on_train_begin(args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Stop a training of another loss before its first step."""
        self.trainer.check_loss_is_trained()


def _refuse_options_beside_a_choice(loss_options: Mapping[str, Any] | None, options: RunOptions) -> None:
    """Raise a TypeError for an option that would be dropped, since a command line's choice has its own."""
    given = {"loss_options": loss_options, **vars(options)}
    defaults = {"loss_options": None, **vars(RunOptions())}
    for name, value in given.items():
        if value != defaults[name]:
            raise TypeError(
                f"loss is a command line's choice, which has its own {name}; got {name}={value!r}"
            )


ContrastiveTrainerMixin = ContrastiveTrainer
"""The same class, before a Trainer of one's own: ``class Mine(ContrastiveTrainerMixin, MyTrainer)``."""
