"""A run in memory: what the loop works with, built from a run folder, and everything it writes there."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perennial.core import lineage as lineages
from perennial.core import plugins
from perennial.core.amounts import human, human_bytes, human_seconds
from perennial.core.clock import Clock
from perennial.core.environment import environment, package_version
from perennial.core.errors import UserError
from perennial.core.patience import Patience, may_come_back, patience_limit
from perennial.core.progress import Progress as ProgressLine
from perennial.core.records import Recorder
from perennial.core.seeds import derive
from perennial.data.corpus import Corpus
from perennial.data.loader import Loader
from perennial.data.mixture import StageOrder
from perennial.data.tokenizers.folder import TokenizerFolder
from perennial.evals.loss import evaluate
from perennial.model.card import Companions, read_companions
from perennial.model.config import ModelConfig
from perennial.model.foreign import parse_config
from perennial.model.inspection import weights_id
from perennial.model.layerwise import checkpoint_layers, compile_layers
from perennial.model.memory import evaluation_tokens
from perennial.model.through_transformers import AnyModel
from perennial.model.transformer import Transformer, initialise
from perennial.objectives.next_token import NextToken
from perennial.optimizers.base import export_state, import_state, skips_on_device
from perennial.train import checkpoint, memory_advice
from perennial.train.apart import Replicas, workers_of
from perennial.train.defaults import defaults
from perennial.train.feeding import TorchBatch
from perennial.train.history import component, order_of, stage_record
from perennial.train.limits import check_memory, check_processes, layout_for, library_pages, memory_bytes
from perennial.train.new_rows import NewRows
from perennial.train.opening import Opening
from perennial.train.parallel import Spread, World, placed, sum_values, summed, wait_for_all
from perennial.train.precision import autocast, matmul_rate
from perennial.train.pulling import Pulling
from perennial.train.recovery import SetAside, sound_checkpoints
from perennial.train.resolved import Resolved, ResolvedStage, rate_is_estimate
from perennial.train.saver import Saver, could_not_write
from perennial.train.saving import Crew
from perennial.train.stalls import Lately, Stall, Stopwatch
from perennial.train.state import Progress, TrainState
from perennial.train.step import Update
from perennial.train.watchdog import Hang, watch

if TYPE_CHECKING:
    from perennial.train.loop import Made


@dataclass
class RunningStage:
    """The parts that the current stage plugs into the loop."""

    session: Session
    stage: ResolvedStage
    order: StageOrder
    loader: Loader
    schedule: Any
    objective: Any

    def close_stage(self) -> None:
        """Turns the stage that just ended into a lineage record and moves on to the next."""
        session, progress = self.session, self.session.state.progress
        progress.finished.append(stage_record(session.resolved, self.stage, progress, self.order, complete=True))
        session.carried = session.moments(session.state.optimizer)
        progress.stage += 1
        progress.row = progress.stage_tokens = 0
        progress.stage_seconds = progress.stage_flops = 0.0
        progress.skipped_rows, progress.recent_losses = [], []


class Session:
    """Model, optimizer, data, records and console of one run on this process."""

    def __init__(self, folder: Path, resolved: Resolved, world: World, *, quiet: bool = False) -> None:
        library_pages()  # from here on pages of files are text
        config = parse_config(resolved.model)
        world = placed(world, layout_for(resolved, config, world))
        check_processes(resolved.fewest_rows, world.data_size)
        self.folder, self.resolved, self.world = folder, resolved, world
        self.crew = Crew(world)
        self.communication = component("communications", resolved.communication)
        self.replicas = Replicas(world, apart=self.communication.trains_apart)
        self.checkpoints = folder / "checkpoints"
        self.stopped = False
        self.stop_requested = False
        self.new_rows: NewRows | None = None
        self.pulling: Pulling | None = None
        self._opening = Opening(self)
        self.saver = Saver(self)
        self.clock = Clock()
        self.environment = {**environment(), "defaults": defaults(world.device)}
        if resolved.through == "transformers":
            self.environment["transformers"] = package_version("transformers")
        self._quiet = quiet
        self.console = ProgressLine("train", total=resolved.tokens, unit="tokens", quiet=quiet or not world.is_main)
        self.watchdog = watch(world.rank, world.size, world.device, on_hang=self._record_hang)
        self.patience = Patience(patience_limit(), self.tell)
        self.corpora = _open_corpora(resolved, self.patience, was_there=_has_events(folder))
        self.by_fingerprint = {c.fingerprint: c for c in self.corpora.values()}
        saved, aside = self.crew.main(self._sound_checkpoints)
        self.ancestry = saved[-1] if saved else Path(resolved.parent["path"]) if resolved.parent else None
        self.parent = self._ancestors() if resolved.parent else None
        self.tokenizer = self._open_tokenizer()
        # Read now: the parent's folder may be gone when the next checkpoint is written.
        self.companions = read_companions(self.ancestry) if self.ancestry else Companions()
        if world.is_main:
            checkpoint.remove_leftovers(self.checkpoints)
        wait_for_all(world)
        check_memory(config, world)
        if text := memory_advice.warning(resolved, world, config):
            self.console.note(text)
        if self.communication.trains_apart and self.replicas.number == 1:
            name = plugins.name_of(self.communication)
            self.console.note(f"communication {name}: one worker alone, with no other to meet; its rounds still count")
        self.records = Recorder(folder / "events.jsonl" if world.is_main else None)
        self._board: Any = None
        self.settled = 0.0
        """When the last update was read."""
        self._lately = Lately()
        self.stopwatch = Stopwatch(
            rank=world.rank,
            size=1 if self.communication.trains_apart else world.size,  # else they would exchange more often for it
            device=world.device,
            gather=lambda times: summed(times, world),
            on_last_gradient=lambda: self.watchdog.enter("exchange"),
        )
        try:
            self.watchdog.start()
            self._record_set_aside(aside)
            self._peak_flops = matmul_rate(resolved.precision, world.device)
            self._board = _open_board(folder) if resolved.tensorboard and world.is_main else None
            self.state = self._restore(saved[-1]) if saved else self._begin()
        except BaseException:
            self.close()
            raise

    # Going on in spite of faults

    def _sound_checkpoints(self) -> tuple[list[Path], list[SetAside]]:
        find = functools.partial(sound_checkpoints, self.folder, self.resolved.recipe_hash)
        return self.patience.attempt(find, passes=lambda error: isinstance(error, OSError))

    def _record_set_aside(self, aside: list[SetAside]) -> None:
        for damaged in aside:
            self.records.write("set_aside", tokens=damaged.tokens, path=damaged.name, reason=damaged.reason)
            self.console.note(f"{damaged.reason}\nIt is kept as {damaged.name}; the run goes on from before it.")

    def _record_hang(self, hang: Hang) -> None:
        made = max(0, min(seen.note.update for seen in hang.everyone) - 1)
        behind = [{"rank": s.note.rank, "phase": s.note.phase, "seconds": round(s.seconds, 1)} for s in hang.behind]
        self.records.write("hang", tokens=self.resolved.tokens_after(made), behind=behind)

    def tell(self, text: str) -> None:
        """Says what this process waits for; it does not hang meanwhile."""
        self.watchdog.go_on()
        rank = "" if self.world.is_main else f"rank {self.world.rank}: "
        ProgressLine("train", quiet=self._quiet).note(f"{rank}{text}")

    # Starting

    def _begin(self) -> TrainState:
        """The state before the first update: the parent's weights, or new ones."""
        if (self.folder / "events.jsonl").exists() and (self.folder / "events.jsonl").stat().st_size:
            self.records.write("restart", tokens=0)  # killed before its first checkpoint
        self.carried: dict[str, torch.Tensor] = {}
        device = self.world.device
        if self.resolved.parent:
            path = Path(self.resolved.parent["path"])
            if self.world.is_main:
                checkpoint.verify(path)
            wait_for_all(self.world)
            model = self._loaded(path)
            self.carried = checkpoint.load_moments(path, model, self.crew)
        else:
            is_spread = self.world.layout.is_spread
            model = Transformer(ModelConfig(**self.resolved.model), device="meta" if is_spread else device)
            self._spread(model)
            initialise(model, derive(self.resolved.seed, "model"))
        self.rounds = self.communication.start(dict(model.named_parameters()), self.replicas)
        self._record_run()
        return TrainState(model, None, Progress())

    def _restore(self, path: Path) -> TrainState:
        """The state that the newest checkpoint of this run holds."""
        model = self._loaded(path)  # it was verified when the session began
        progress = checkpoint.load_progress(path, self.resolved.recipe_hash)
        layout = asdict(self.world.layout)
        self.records.write("resume", tokens=progress.tokens, processes=self.world.size, layout=layout)
        self.console.note(f"resuming {self.folder} at {human(progress.tokens, 'tokens')} from {path}")
        self._load_beside(path, model)
        return TrainState(model, None, progress)

    def _load_beside(self, path: Path, model: AnyModel) -> None:
        """Moments and rounds as a checkpoint of this run holds them; `model` has that checkpoint's weights."""
        self.rounds = self.communication.start(dict(model.named_parameters()), self.replicas)
        if not self.communication.trains_apart:
            self.carried = checkpoint.load_moments(path, model, self.crew)
            return
        own = checkpoint.load_own(path, model, self.replicas, self.crew)
        self.rounds.load(own.shared, own.weights)
        self.carried = dict(own.moments) or checkpoint.load_moments(path, model, self.crew)
        before, now = workers_of(path), self.replicas.number
        if before != now:
            self.console.note(
                f"it was trained by {before} workers, now {now}: all of them go on from the model of the last round "
                "and the mean of the moments"
            )

    def _loaded(self, path: Path) -> AnyModel:
        is_spread = self.world.layout.is_spread
        model = checkpoint.load_unverified(path, self.world.device, prepare=self._spread if is_spread else None)
        if not is_spread:
            self._spread(model)
        return model

    def _spread(self, model: AnyModel) -> None:
        """Makes the model ready for training on this process's part of the mesh, in place."""
        apart = self.communication.trains_apart
        self.spread = Spread(self._ready(model), self.world, precision=self.resolved.precision, apart=apart)
        if next(model.parameters()).is_meta:
            model.to_empty(device=self.world.device)

    def _ready(self, model: AnyModel) -> AnyModel:
        """The model in training mode, its layers checkpointed and compiled as asked; before it is spread."""
        model.train()
        checkpoint_layers(model, self.resolved.activation_checkpointing)
        if self.resolved.compile:
            compile_layers(model)
        return model

    def _ancestors(self) -> lineages.Lineage:
        """The parent's lineage: from the run's own newest checkpoint, else from the parent itself."""
        assert self.ancestry is not None
        assert self.resolved.parent is not None
        planned = self.resolved.parent["checkpoint"]
        if str(self.ancestry) == self.resolved.parent["path"]:
            if lineages.has_lineage(self.ancestry):
                found = lineages.read(self.ancestry)
            else:  # only one process reads all the weights to tell whether they are the same
                identity = weights_id(self.ancestry) if self.world.is_main else planned
                found = lineages.Lineage(checkpoint=identity, stages=[])
            if found.checkpoint != planned:
                raise UserError(f"{self.ancestry}: is no longer the checkpoint that this run was planned from")
            return found.model_copy(update={"origin": self.resolved.origin})
        found = lineages.read(self.ancestry)
        mine = self.resolved.recipe_hash
        return found.model_copy(update={"stages": [s for s in found.stages if s.recipe_hash != mine]})

    def _open_tokenizer(self) -> TokenizerFolder:
        if self.ancestry is not None:
            return TokenizerFolder.open(self.ancestry).held()  # that folder may be gone when the next one is written
        return TokenizerFolder.open(next(iter(self.corpora.values())).path / "tokenizer").held()

    def _record_run(self) -> None:
        self.records.write(
            "run",
            name=self.resolved.name,
            recipe_hash=self.resolved.recipe_hash,
            parameters=self.resolved.parameters,
            flops_per_token=self.resolved.flops_per_token,
            through=self.resolved.through,
            parent=self.resolved.parent,
            processes=self.world.size,
            layout=asdict(self.world.layout),
            precision=self.resolved.precision,
            environment=self.environment,
        )

    def reload(self) -> None:
        """Returns to the last checkpoint, in memory as on disk."""
        self.saver.finish()
        path = lineages.checkpoints_of(self.folder)[-1]
        checkpoint.put_back_weights(self.state.model, path, self.world.device)
        self.state.progress = checkpoint.load_progress(path, self.resolved.recipe_hash)
        self._load_beside(path, self.state.model)
        stage = self.resolved.stages[self.state.progress.stage]
        self.state.optimizer = self.new_optimizer(stage)

    # Stages

    @contextlib.contextmanager
    def open_stage(self) -> Iterator[RunningStage]:
        """The current stage, with its optimizer in `self.state`; states the learning rate it starts at."""
        progress = self.state.progress
        stage = self.resolved.stages[progress.stage]
        schedule = component("schedules", stage.schedule)
        if schedule.rate(0, stage.tokens) != stage.rate_start:
            raise UserError(
                f"{self.folder}/resolved.json: stage '{stage.name}' says that its learning rate starts at "
                f"{stage.rate_start!r}, its schedule gives {schedule.rate(0, stage.tokens)!r}; the file was changed"
            )
        order = order_of(self.resolved, stage, self.state.progress, self.by_fingerprint)
        objective, self.pulling = self._opening.objective(stage), self._opening.pulling(stage)
        self.state.optimizer = self.new_optimizer(stage)
        self.spread.start_training()
        self.stopwatch.watch(self.state.model)
        if progress.stage_tokens == 0:
            self._record_stage(stage)
        with self._opening.loader(stage, order, objective) as loader:
            yield RunningStage(self, stage, order, loader, schedule, objective)

    @property
    def is_quiet(self) -> bool:
        """Whether this process says nothing of what it does."""
        return self._quiet or not self.world.is_main

    def new_optimizer(self, stage: ResolvedStage) -> Any:
        """The optimizer of a stage, with the moments that are carried on into it."""
        model = self.state.model
        if self.new_rows is not None:
            model.requires_grad_(True)
        if stage.new_rows and self.world.layout.is_spread:
            raise UserError(
                f"stage '{stage.name}': train: new_rows works on whole tables; set parallel.shard=none and "
                f"parallel.tensor=1, not {self.world.layout}"
            )
        self.new_rows = NewRows(model, *stage.new_rows) if stage.new_rows else None
        trained = self.new_rows or model
        optimizer = component("optimizers", stage.optimizer).build(trained.named_parameters(), model.role_of)
        if stage.optimizer_state == "reset" and self.state.progress.stage_tokens == 0:
            self.carried = {}
            self.rounds.forget()
        carried = self.new_rows.narrowed(self.carried) if self.new_rows else self.carried
        if self.state.progress.stage_tokens > 0:
            import_state(optimizer, carried, strict=True)
        elif carried:
            kept, fresh = import_state(optimizer, carried, strict=False)
            if fresh:
                self.console.note(f"optimizer state: {len(kept)} parameters carried on, {len(fresh)} start anew")
        return optimizer

    def moments(self, optimizer: Any) -> dict[str, torch.Tensor]:
        """The optimizer's state by parameter, with that of parameters which the stage leaves as they are."""
        state = export_state(optimizer)
        return self.new_rows.widened(self.carried, state) if self.new_rows else state

    def _record_stage(self, stage: ResolvedStage) -> None:
        progress = self.state.progress
        self.records.write(
            "stage",
            tokens=progress.tokens,
            stage=stage.name,
            index=progress.stage,
            stage_tokens=stage.tokens,
            schedule=stage.schedule,
            rate_before=stage.rate_before,
            rate_start=stage.rate_start,
            optimizer=stage.optimizer,
            optimizer_state=stage.optimizer_state,
            objective=stage.objective,
            pull=stage.pull,
            new_rows=stage.new_rows,
            sources=[{k: s[k] for k in ("name", "weight", "role", "corpus")} for s in stage.sources],
        )
        guessed = "by estimate " if rate_is_estimate(self.resolved, progress.stage) else ""
        was = "" if stage.rate_before is None else f" (it was {guessed}left at {stage.rate_before:.3g})"
        self.console.note(f"stage {stage.name}: learning rate starts at {stage.rate_start:.3g}{was}")

    # After each update

    @property
    def queues_ahead(self) -> bool:
        """Whether an update can be called off on the device, so that the host need not wait for each."""
        return self.world.device.type == "cuda" and skips_on_device(self.state.optimizer)

    def record_update(self, made: Made, update: Update, seconds: float, stall: Stall | None) -> None:
        """Writes the `train` event and the progress line; checks that the rate in effect is the rate asked for."""
        progress = self.state.progress
        for group in self.state.optimizer.param_groups:
            assert group["lr"] == progress.rate * group["rate_multiplier"], (
                "the learning rate in effect is not the one asked for"
            )
        tokens, stage = self.resolved.batch_tokens_of(made.stage), made.stage
        speed = tokens / (made.data_seconds + seconds)
        mfu = tokens * stage.flops / stage.tokens / seconds / (self._peak_flops * self.world.size)
        self.records.write(
            "train",
            tokens=made.tokens,
            step=made.number,
            stage=stage.name,
            loss=update.loss,
            rate=made.rate,
            gradient_norm=update.gradient_norm,
            tokens_per_second=round(speed, 1),
            flops=made.flops,
            seconds=round(progress.seconds["train"], 4),
            data_seconds=round(progress.seconds["data"], 4),
            mfu=round(mfu, 4),
            sent_bytes=made.sent_bytes,
            memory_bytes=memory_bytes(self.world.device),
            **(_stall_fields(stall) if stall else {}),
        )
        if self._board is not None:
            for name, value in (("loss", update.loss), ("rate", made.rate), ("gradient_norm", update.gradient_norm)):
                self._board.add_scalar(f"train/{name}", value, made.tokens)
        waited = self._lately.after(made.data_seconds + seconds, made.data_seconds, stall)
        self.console.update(
            made.tokens,
            f"loss {update.loss:.3f}, rate {made.rate:.2e}, {human(speed, 'tokens/s')}, MFU {mfu:.0%}, "
            f"{human_bytes(memory_bytes(self.world.device))}{waited}",
        )

    def communicate(self, stage: ResolvedStage) -> None:
        """Exchanges between the workers what is due after the update that was just queued."""
        progress = self.state.progress
        if self.communication.trains_apart:
            self.watchdog.enter("exchange")
        number = progress.stage_tokens // self.resolved.batch_tokens_of(stage)
        progress.sent_bytes += self.rounds.after_update(number, last=progress.stage_tokens >= stage.tokens)

    def is_due(self) -> bool:
        """Whether it is time to evaluate or to save, or to see whether a save has to be tried again."""
        resolved = self.resolved
        return (
            self._due(resolved.evaluation_every_tokens)
            or self._due(resolved.checkpoint_every_tokens)
            or self.saver.may_try_again()
        )

    def after_update(self, *, stop: bool, stage_done: bool) -> None:
        """Evaluates, saves and stops when it is time."""
        progress, resolved = self.state.progress, self.resolved
        complete = progress.stage == len(resolved.stages)
        if stage_done or self._due(resolved.evaluation_every_tokens):
            self.evaluate("after" if complete else "during")
        self.saver.finish(wait=False)
        if stage_done or stop or self._due(resolved.checkpoint_every_tokens):
            self.saver.save(while_training=not (stage_done or stop))
        elif self.saver.has_to_try_again():
            self.saver.save(while_training=True)
        if stop and not complete:
            self.stopped = True
            self.records.write("stop", tokens=progress.tokens, reason="asked to stop")
            self.console.note(
                f"stopped at {human(progress.tokens, 'tokens')}, saved; resume with: perennial train {self.folder}"
            )

    def _due(self, every: int | None) -> bool:
        now = self.state.progress.tokens
        return every is not None and now // every > (now - self.update_tokens) // every

    @property
    def update_tokens(self) -> int:
        """Tokens of an update in the stage that the run stands in."""
        stages = self.resolved.stages
        return self.resolved.batch_tokens_of(stages[min(self.state.progress.stage, len(stages) - 1)])

    def evaluate(self, moment: str) -> dict[str, Any]:
        """Measures every corpus's validation loss now, records and returns it."""
        progress, resolved = self.state.progress, self.resolved
        self.watchdog.enter("evaluate")
        mode = autocast(resolved.precision, self.world.device)
        rows = resolved.batch.micro_batch or -(-resolved.batch.sequences // self.world.data_size)
        with self.clock.section("evaluate") as spent, self.rounds.common(), mode:
            corpora = evaluate(
                self.state.model,
                self.corpora,
                self._measure,
                sequence_length=resolved.batch.sequence_length,
                max_tokens=resolved.evaluation_tokens,
                document_mask=resolved.document_mask,
                device=self.world.device,
                batch_tokens=evaluation_tokens(rows * resolved.batch.sequence_length),
                rank=self.world.data_rank,
                world_size=self.world.data_size,
                combine=lambda values: sum_values(values, self.world),
            )
        progress.seconds["evaluate"] += spent.seconds
        progress.latest = {"tokens": progress.tokens, "corpora": corpora}
        stage = resolved.stages[min(progress.stage, len(resolved.stages) - 1)].name
        self.records.write(
            "evaluation", tokens=progress.tokens, flops=progress.flops, stage=stage, moment=moment, corpora=corpora
        )
        if self._board is not None:
            for name, values in corpora.items():
                self._board.add_scalar(f"validation/{name}", values["nats_per_token"], progress.tokens)
        text = ", ".join(f"{n} {v['nats_per_token']:.3f}" for n, v in corpora.items())
        self.console.note(f"{moment} at {human(progress.tokens, 'tokens')}: validation loss {text}")
        return corpora

    def _measure(self, inputs: Any, targets: Any, segments: Any) -> Any:
        self.watchdog.enter("evaluate")
        return self.spread.measure(NextToken().evaluate, TorchBatch(inputs, targets, segments))

    def close(self) -> None:
        """Ends the records and the progress line, a checkpoint being written first; harmless when all has ended."""
        self.watchdog.close()
        try:
            with contextlib.suppress(UserError, OSError):  # what ended the run is told, not what this may add
                self.saver.finish()
        finally:
            self.records.close()
            self.console.close()
            if self._board is not None:
                self._board.close()

    def finish(self, summary: dict[str, Any]) -> None:
        """Records that the run is complete."""
        self.records.write("done", **summary)
        self.patience.attempt(self.records.settle, passes=could_not_write)
        spent = ", ".join(f"{k} {human_seconds(v)}" for k, v in summary["seconds"].items() if v >= 0.5)
        sent = self.state.progress.sent_bytes
        exchanged = f", {human_bytes(sent)} sent by each process" if sent else ""
        self.console.note(
            f"done: {human(summary['tokens'], 'tokens')}, {summary['flops']:.3g} FLOPs ({spent}){exchanged}"
        )

    @contextlib.contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C ask the loop to save and stop after the current update; a second Ctrl-C stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

        def ask(number: int, frame: Any) -> None:
            if self.stop_requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stop_requested = True

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def measure_with(model: Any) -> Any:
    """A function (inputs, targets, segments) -> (sum of nats, count) of plain next-token loss."""
    objective = NextToken()
    return lambda inputs, targets, segments: objective.evaluate(model, TorchBatch(inputs, targets, segments))


def _has_events(folder: Path) -> bool:
    """Whether a run has begun before; what it read then is waited for."""
    events = folder / "events.jsonl"
    return events.exists() and events.stat().st_size > 0


def _stall_fields(stall: Stall) -> dict[str, Any]:
    return {"straggler_seconds": round(stall.seconds, 4), "straggler": stall.rank, "straggler_cause": stall.cause}


def _open_corpora(resolved: Resolved, patience: Patience, *, was_there: bool) -> dict[str, Corpus]:
    """The corpora; those that the run has read before (`was_there`) are waited for when they cannot be read now."""
    corpora = {}
    opening = patience if was_there else Patience(0.0)
    for name, facts in resolved.corpora.items():
        open_it = functools.partial(Corpus.open, Path(facts["path"]), checksums=True, patience=patience)
        corpus = opening.attempt(open_it, passes=may_come_back)
        if corpus.fingerprint != facts["fingerprint"]:
            raise UserError(
                f"corpus '{name}' ({facts['path']}) was changed since the run was planned: fingerprint "
                f"{corpus.fingerprint[:12]}, planned {facts['fingerprint'][:12]}"
            )
        corpora[name] = corpus
    return corpora


def _open_board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("tensorboard: true needs the package tensorboard: pip install 'perennial[track]'") from None
    return SummaryWriter(str(folder / "tensorboard"))
