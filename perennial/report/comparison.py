"""Runs side by side: what each gained, forgot and cost, against its parent, plain training and retraining.

Terms, for a run that continues a parent checkpoint:
  old corpora       those that the parent or its ancestors trained on, or what stands in for them; of these the ones
                    that every run with a parent was evaluated on which calls them old, so that all count the same
  new corpora       those that the run trained on and no ancestor did
  forgetting        mean over old corpora of (loss after - loss before); positive is worse
  adaptation        mean over new corpora of (loss before - loss after); positive is better
  backward transfer minus the mean forgetting (Lopez-Paz and Ranzato 2017, arXiv 1706.08840, with loss for accuracy)
  forgetting removed 1 - forgetting / forgetting of the reference: same parent, same new corpora, as many tokens,
                    nothing old in its mixture; of several the one that forgot most
  compute saved     1 - FLOPs of the run / FLOPs of the baseline: trained from random weights on the old and the new
                    corpora; of several the one with the lowest average loss
Averages are macro averages: every corpus counts the same.
Source: Ibrahim, Therien, Gupta et al. 2024, Simple and Scalable Strategies to Continually Pre-train Large Language
Models, arXiv 2403.08763, sections 3 and 6 (old, new and average loss against the union baseline).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from perennial.core.amounts import human
from perennial.core.errors import UserError
from perennial.report.rows import ALL, COUNTED, NEW, OLD, OTHER, ROLES, UNCOUNTED, Comparison, Row, value
from perennial.report.runs import Loss, Run, Stage, mean, progress_text, read_run

__all__ = ["Comparison", "Row", "compare"]


def compare(run_folders: Sequence[str | Path], *, labels: Sequence[str] | None = None) -> Comparison:
    """Reads the run folders and works out the comparison. Raises UserError for what is no run folder."""
    folders = [Path(f) for f in run_folders]
    if not folders:
        raise UserError("report: at least one run folder is needed")
    if labels is not None and len(labels) != len(folders):
        raise UserError(f"report: {len(labels)} labels for {len(folders)} run folders; give one label for each")
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise UserError(f"{folder}: this run folder is given twice")
        seen.add(folder.resolve())
    runs = [read_run(folder) for folder in folders]
    return _Comparer(runs, _labels(runs, labels)).comparison()


def _labels(runs: list[Run], given: Sequence[str] | None) -> list[str]:
    """The labels given, else the runs' names, else (when names repeat) the shortest telling part of their paths."""
    if given is not None:
        names = [str(label) for label in given]
        if len(set(names)) != len(names) or not all(names):
            raise UserError(f"report: labels must differ and not be empty, got {', '.join(map(repr, names))}")
        return names
    names = [run.name for run in runs]
    for parts in range(1, 1 + max(len(run.folder.resolve().parts) for run in runs)):
        if len(set(names)) == len(names):
            break
        names = ["/".join(run.folder.resolve().parts[-parts:]) for run in runs]
    return names


class _Names:
    """One name per corpus: evaluation names and source names that share a fingerprint are the same corpus."""

    def __init__(self, runs: list[Run]) -> None:
        self._by_fingerprint: dict[str, str] = {}
        for run in runs:
            for name, facts in run.corpora.items():
                if facts.get("fingerprint"):
                    self._by_fingerprint.setdefault(facts["fingerprint"], name)

    def of(self, run: Run, name: str) -> str:
        """The corpus that a run evaluates under this name."""
        return self._by_fingerprint.get(run.corpora.get(name, {}).get("fingerprint", ""), name)

    def of_source(self, name: str, fingerprint: str) -> str:
        """The corpus that a source drew from."""
        return self._by_fingerprint.get(fingerprint, name.removeprefix("replay/"))

    def consumed(self, stages: Iterable[Stage], role: str | None = None) -> list[str]:
        """The corpora that stages drew from, in order, without repeats."""
        sources = [s for stage in stages for s in stage.sources if role in (None, s.role)]
        return list(dict.fromkeys(self.of_source(s.name, s.fingerprint) for s in sources))

    def shared(self, run: Run) -> Run:
        """The run with its losses under the names that all runs share."""

        def renamed(losses: dict[str, Loss]) -> dict[str, Loss]:
            return {self.of(run, name): loss for name, loss in losses.items()}

        return replace(
            run,
            before=renamed(run.before),
            after=renamed(run.after),
            evaluations=tuple(replace(e, corpora=renamed(e.corpora)) for e in run.evaluations),
        )


class _Comparer:
    """The steps from runs to rows; holds what they share."""

    def __init__(self, runs: list[Run], labels: list[str]) -> None:
        self.names, self.labels = _Names(runs), labels
        self.runs = [self.names.shared(run) for run in runs]
        self.notes: list[str] = []
        self.evaluated = {name for run in self.runs for name in run.after}
        self.own_roles, self.not_evaluated, self.old_is_shared = self._counted_roles()
        self.shared_roles = self._shared_roles()
        self.unit = "bits_per_byte" if self._tokenizers_differ() else "nats_per_token"

    def comparison(self) -> Comparison:
        rows = [*self._unseen_bases(), *(self._row(i) for i in range(len(self.runs)))]
        rows = [*(r for r in rows if r.is_base and not r.continued), *(r for r in rows if not r.is_base or r.continued)]
        rows = [self._with_reference(row, rows) for row in rows]
        rows = [self._with_baseline(row, rows) for row in rows]
        references = {r.forgetting_reference for r in rows}
        baselines = {r.baseline for r in rows}
        rows = [
            replace(r, is_reference=r.label in references, is_baseline=r.label in baselines, **_against_itself(r))
            for r in rows
        ]
        counted = [{n: role for n, role in r.roles.items() if role in COUNTED} for r in rows]
        same_roles = all(c == counted[0] for c in counted)
        self._notes(rows, same_roles)
        corpora = dict.fromkeys(name for row in rows for name in (*row.roles, *row.after))
        order = sorted(corpora, key=lambda n: ROLES.index(self.shared_roles.get(n, OTHER)))
        return Comparison(tuple(rows), tuple(order), self.unit, same_roles, tuple(self.notes))

    # Roles

    def _own_roles(self, run: Run) -> dict[str, str]:
        """Roles for a run with a parent: by what its ancestors consumed and what it consumes itself.

        What stands in for unknown data of a parent counts as consumed by it. What no run was evaluated on plays no
        part; `_notes` says so.
        """
        old = self.names.consumed(run.ancestors)
        old += [self.names.of(run, name) for name, facts in run.corpora.items() if facts.get("stands_in")]
        replayed = self.names.consumed(run.stages, "replay")
        fresh = self.names.consumed(run.stages, "fresh")
        planned = [s for stage in run.resolved.get("stages", []) for s in stage.get("sources", [])]
        fresh += [
            self.names.of_source(s["name"], s.get("fingerprint", "")) for s in planned if s.get("role") == "fresh"
        ]
        roles = dict.fromkeys([*old, *replayed], OLD)
        for name in fresh:
            roles.setdefault(name, NEW)
        return {name: role for name, role in roles.items() if name in self.evaluated}

    def _counted_roles(self) -> tuple[dict[Path, dict[str, str]], dict[Path, list[str]], bool]:
        """Run folder -> roles, and -> old corpora that the run was not evaluated on, of runs with a parent.

        What one of them was not evaluated on counts for none, so that their old losses are of one text (True); where
        that leaves a run without any, each counts what it was evaluated on itself (False).
        """
        runs = [run for run in self.runs if run.parent]
        roles = {run.folder: self._own_roles(run) for run in runs}
        old = {folder: set(_with_role(own, OLD)) for folder, own in roles.items()}
        measured = {run.folder: {*run.before, *run.after} for run in runs}
        # A run that measured nothing old keeps its roles: another note says that its averages are not known.
        missing = {folder: old[folder] - found for folder, found in measured.items() if old[folder] & found}
        unmeasured = {name for names in missing.values() for name in names}
        shared = all(old[folder] - unmeasured for folder in missing)
        without = dict.fromkeys(missing, unmeasured) if shared else missing
        counted = {
            folder: {n: UNCOUNTED if role == OLD and n in without.get(folder, ()) else role for n, role in own.items()}
            for folder, own in roles.items()
        }
        return counted, {folder: sorted(names) for folder, names in missing.items() if names}, shared

    def _base_roles(self, run: Run, children: Sequence[Run]) -> dict[str, str]:
        """Roles for a parent without one of its own: its children's, which are compared with it.

        Where these count different text as old, what the parent itself trained on.
        """
        theirs = [self.own_roles[child.folder] for child in children]
        roles = {name: role for own in theirs for name, role in own.items()}
        old = [set(_with_role(own, OLD)) for own in theirs]
        if all(names == old[0] for names in old):
            return roles
        trained = set(self.names.consumed(run.stages))
        return {n: OLD if n in trained else role for n, role in roles.items() if n in trained or role == NEW}

    def _shared_roles(self) -> dict[str, str]:
        """Roles for rows without a parent: those of the runs that continue, the longest lineage deciding."""
        roles: dict[str, str] = {}
        for run in sorted((r for r in self.runs if r.parent), key=lambda r: len(r.ancestors)):
            roles.update(self.own_roles[run.folder])
        if not roles:
            roles = dict.fromkeys((name for run in self.runs for name in run.after), ALL)
        return roles

    def _roles(self, run: Run, evaluated: Iterable[str], children: Sequence[Run] = ()) -> dict[str, str]:
        if run.parent:
            roles = self.own_roles[run.folder]
        else:
            roles = self._base_roles(run, children) if children else self.shared_roles
        return {**roles, **{name: OTHER for name in evaluated if name not in roles}}

    # Rows

    def _row(self, index: int) -> Row:
        run = self.runs[index]
        after, before = dict(run.after), run.before
        children = [other for other in self.runs if self._continues(other, run)]
        for child in children:  # what the parent's own run did not measure, its child did at its start
            for name, loss in child.before.items():
                after.setdefault(name, loss)
        roles = self._roles(run, after, children)
        own_flops = run.flops if run.flops or run.tokens == 0 else None
        return self._filled(
            Row(
                label=self.labels[index],
                run=run,
                state=progress_text(run),
                finished=run.finished,
                continued=run.parent is not None,
                is_base=bool(children),
                is_reference=False,
                is_baseline=False,
                checkpoint=run.checkpoint,
                parent=run.parent,
                parent_label=self._parent_label(run),
                roles=roles,
                before=before,
                after=after,
                old=None,
                new=None,
                average=None,
                tokens=run.tokens,
                flops=own_flops,
                seconds=run.seconds,
                parent_tokens=sum(s.tokens for s in run.ancestors),
                parent_flops=_total(s.flops for s in run.ancestors),
                replay_share=_replay_share(run.stages),
                forgetting=None,
                adaptation=None,
                backward_transfer=None,
                forgetting_by_corpus={},
                adaptation_by_corpus={},
            )
        )

    def _filled(self, row: Row) -> Row:
        """The row with its averages and its differences to the parent."""
        forgetting = {
            n: row.after[n].minus(row.before[n]) for n in row.names(OLD) if n in row.after and n in row.before
        }
        adaptation = {
            n: row.before[n].minus(row.after[n]) for n in row.names(NEW) if n in row.after and n in row.before
        }
        if not row.continued:
            forgetting, adaptation = {}, {}
        forgotten = mean(forgetting.values())
        return replace(
            row,
            old=_over(row, (OLD,)),
            new=_over(row, (NEW,)),
            average=_over(row, COUNTED),
            forgetting=forgotten,
            adaptation=mean(adaptation.values()),
            backward_transfer=forgotten.negated() if forgotten else None,
            forgetting_by_corpus=forgetting,
            adaptation_by_corpus=adaptation,
        )

    def _unseen_bases(self) -> list[Row]:
        """A row for every parent whose run folder was not given, from its children's lineage."""
        rows: dict[str, Row] = {}
        for run in self.runs:
            known = run.parent is None or run.parent in rows or any(self._continues(run, other) for other in self.runs)
            if known or not run.ancestors:
                continue
            last = run.ancestors[-1]
            own = [s for s in run.ancestors if (s.run, s.recipe_hash) == (last.run, last.recipe_hash)]
            earlier = run.ancestors[: len(run.ancestors) - len(own)]
            seconds = _total(s.seconds for s in own)
            rows[str(run.parent)] = self._filled(
                Row(
                    label=self._base_label(run),
                    run=None,
                    state="finished",
                    finished=True,
                    continued=bool(earlier),
                    is_base=True,
                    is_reference=False,
                    is_baseline=False,
                    checkpoint=run.parent,
                    parent=last.parent,
                    parent_label=earlier[-1].run if earlier else None,
                    roles=self._roles(run, run.before),
                    before={},
                    after=run.before,
                    old=None,
                    new=None,
                    average=None,
                    tokens=sum(s.tokens for s in own),
                    flops=_total(s.flops for s in own),
                    seconds={} if seconds is None else {"train": seconds},
                    parent_tokens=sum(s.tokens for s in earlier),
                    parent_flops=_total(s.flops for s in earlier),
                    replay_share=_replay_share(own),
                    forgetting=None,
                    adaptation=None,
                    backward_transfer=None,
                    forgetting_by_corpus={},
                    adaptation_by_corpus={},
                )
            )
        return list(rows.values())

    def _continues(self, child: Run, parent: Run) -> bool:
        """True when `child` started from the newest checkpoint of `parent`."""
        if child.parent is None or child is parent:
            return False
        if child.parent == parent.checkpoint:
            return True
        if parent.checkpoint is not None or not child.ancestors:
            return False
        last = child.ancestors[-1]  # checkpoints were deleted: the recipe and the tokens still tell
        tokens = sum(s.tokens for s in child.ancestors if s.recipe_hash == last.recipe_hash)
        return last.recipe_hash == parent.recipe_hash and tokens == parent.tokens

    def _parent_label(self, run: Run) -> str | None:
        if run.parent is None:
            return None
        for label, other in zip(self.labels, self.runs, strict=True):
            if self._continues(run, other):
                return label
        return self._base_label(run)

    def _base_label(self, run: Run) -> str:
        """A name for a parent that is not among the runs: its run's name, told apart when that is taken."""
        name = run.ancestors[-1].run if run.ancestors else str(run.parent)
        others = {str(r.parent) for r in self.runs if r.ancestors and r.ancestors[-1].run == name}
        return f"{name} ({str(run.parent)[:8]})" if name in self.labels or len(others) > 1 else name

    # Against others

    def _with_reference(self, row: Row, rows: list[Row]) -> Row:
        own = value(row.forgetting, self.unit)
        if own is None or not row.finished:
            return row
        plain = [
            r
            for r in rows
            if self._is_plain(r)
            and r.parent == row.parent
            and set(r.names(NEW)) == set(row.names(NEW))
            and abs(r.tokens - row.tokens) <= 0.05 * row.tokens  # more tokens forget more
        ]
        forgotten = {r.label: value(r.forgetting, self.unit) or 0.0 for r in plain}
        reference = max(forgotten, key=lambda label: forgotten[label], default=None)
        if reference is None or forgotten[reference] <= 0:
            return row
        return replace(row, forgetting_reference=reference, forgetting_removed=1 - own / forgotten[reference])

    def _is_plain(self, row: Row) -> bool:
        """A finished continuation without anything old in its mixture."""
        if row.run is None or not row.finished or not row.continued or row.forgetting is None:
            return False
        return not set(self.names.consumed(row.run.stages)) & {*row.names(OLD), *row.names(UNCOUNTED)}

    def _with_baseline(self, row: Row, rows: list[Row]) -> Row:
        needed = {*row.names(OLD), *row.names(NEW), *row.names(UNCOUNTED)}
        if not row.continued or not row.finished or row.run is None or not needed:
            return row
        candidates = [r for r in rows if self._is_retrained(r, needed) and r.flops]
        if not candidates:
            return row
        counted = [n for n in row.after if row.roles[n] in COUNTED]

        def average(other: Row) -> float:
            known = value(_mean_of(other.after, counted), self.unit)
            return math.inf if known is None else known

        best = min(candidates, key=lambda r: (average(r), r.flops))
        assert best.flops is not None
        total = row.total_flops
        own, theirs = _mean_of(row.after, counted), _mean_of(best.after, counted)
        return replace(
            row,
            baseline=best.label,
            compute_saved=None if row.flops is None else 1 - row.flops / best.flops,
            compute_saved_with_parent=None if total is None else 1 - total / best.flops,
            average_above_baseline=own.minus(theirs) if own and theirs else None,
        )

    def _is_retrained(self, row: Row, needed: set[str]) -> bool:
        """A finished run from random weights that trained on all of the needed corpora."""
        if row.run is None or row.continued or not row.finished or row.is_base:
            return False
        return needed <= set(self.names.consumed(row.run.stages))

    # What to be careful about

    def _tokenizers_differ(self) -> bool:
        """Whether any two runs count the tokens of the same text differently, or name different tokenizers."""
        counted: dict[tuple[str, int], set[int]] = {}
        for losses in (losses for run in self.runs for losses in (run.before, run.after)):
            for name, loss in losses.items():
                if loss.bytes:
                    counted.setdefault((name, loss.bytes), set()).add(loss.tokens)
        if any(len(counts) > 1 for counts in counted.values()):
            return True
        return len({f["tokenizer"] for run in self.runs for f in run.corpora.values() if f.get("tokenizer")}) > 1

    def _notes(self, rows: list[Row], same_roles: bool) -> None:
        if self.unit == "bits_per_byte":
            self.notes.append(
                "The runs use different tokenizers: their losses in nats per token count different tokens and must not "
                "be compared with each other. Bits per byte can be, and all differences are judged in it."
            )
        if not same_roles:
            self.notes.append(
                "The runs do not share the same old and new corpora, so the columns of old, new and average loss mean "
                "different text from row to row; compare them corpus by corpus."
            )
        self.notes += [f"{r.label} has {r.state}: its numbers are those so far." for r in rows if not r.finished]
        self.notes += _different_text(rows)
        self.notes += _different_base(rows, self.labels)
        self.notes += _not_evaluated(rows)
        whose = "all rows" if self.old_is_shared else "this row"
        for run, label in zip(self.runs, self.labels, strict=True):
            if names := self.not_evaluated.get(run.folder):
                told = f"so the old and average losses of {whose} leave that out"
                self.notes.append(f"{label} was not evaluated on {_listed(names)}, which is old to it, {told}.")
        consumed = self.names.consumed(s for run in self.runs for s in (*run.ancestors, *run.stages))
        unknown = [name for name in consumed if name not in self.evaluated]
        if unknown:
            self.notes.append(
                f"No run was evaluated on {_listed(unknown)}, though it was trained on: forgetting there is unknown."
            )
        self._note_missing_references(rows)
        sizes: dict[int, list[str]] = {}
        for row in rows:
            if row.run is not None and row.run.parameters:
                sizes.setdefault(row.run.parameters, []).append(row.label)
        if len(sizes) > 1:
            told = "; ".join(f"{human(size)} parameters: {_listed(labels)}" for size, labels in sizes.items())
            self.notes.append(f"The models differ in size ({told}).")

    def _note_missing_references(self, rows: list[Row]) -> None:
        replaying = [r for r in rows if r.finished and r.replay_share and r.forgetting is not None]
        alone = [r.label for r in replaying if r.forgetting_reference is None]
        if alone:
            self.notes.append(
                f"No finished run continues the same parent on the same new corpora without replay and forgets, so the "
                f"share of forgetting removed is not known for {_listed(alone)}."
            )
        alone = [r.label for r in rows if r.run and r.continued and r.finished and r.baseline is None]
        if alone:
            self.notes.append(
                f"No finished run was trained from random weights on the old and the new corpora, so the compute saved "
                f"is not known for {_listed(alone)}."
            )


def _with_role(roles: dict[str, str], role: str) -> list[str]:
    return [name for name, its in roles.items() if its == role]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _against_itself(row: Row) -> dict[str, Any]:
    """A run is not measured against itself: its share would be 0 by definition."""
    same = row.forgetting_reference == row.label
    return {"forgetting_removed": None, "forgetting_reference": None} if same else {}


def _mean_of(losses: dict[str, Loss], names: Sequence[str]) -> Loss | None:
    return mean(losses[n] for n in names) if all(n in losses for n in names) else None


def _over(row: Row, roles: tuple[str, ...]) -> Loss | None:
    """The mean over the corpora of these roles; None when one of them was not measured."""
    return _mean_of(row.after, [n for n, role in row.roles.items() if role in roles])


def _total(values: Iterable[float | None]) -> float | None:
    listed = list(values)
    return None if None in listed else math.fsum(v for v in listed if v is not None)


def _replay_share(stages: Iterable[Stage]) -> float | None:
    drawn = [(s.role, s.tokens) for stage in stages for s in stage.sources]
    total = sum(tokens for _, tokens in drawn)
    return sum(tokens for role, tokens in drawn if role == "replay") / total if total else None


def _different_text(rows: Sequence[Row]) -> list[str]:
    """A note for every corpus that was measured on different amounts of text."""
    notes = []
    for name in dict.fromkeys(n for row in rows for n in row.after):
        sizes = {row.label: row.after[name].bytes for row in rows if name in row.after and row.after[name].bytes}
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{label} {human(size)}B" for label, size in sizes.items())
            notes.append(
                f"Corpus {name} was evaluated on different amounts of text ({told}): small differences mean little."
            )
    return notes


def _different_base(rows: Sequence[Row], labels: Sequence[str]) -> list[str]:
    """A note where a run's first evaluation does not repeat the last one of its parent's run."""
    notes = []
    bases = {row.label: row for row in rows if row.label in labels}
    for row in rows:
        base = bases.get(row.parent_label or "")
        for name, loss in row.before.items() if base else ():
            assert base is not None
            there, here = base.after.get(name), loss.nats_per_token
            if there is None or there.nats_per_token is None or here is None or there.bytes != loss.bytes:
                continue
            if abs(here - there.nats_per_token) > 0.005 * abs(there.nats_per_token):
                notes.append(
                    f"Corpus {name}: {row.label} measured {here:.3f} nats/token before its first update, {base.label} "
                    f"{there.nats_per_token:.3f} at its end. Changes are counted from the former."
                )
    return notes


def _not_evaluated(rows: Sequence[Row]) -> list[str]:
    notes = []
    for row in rows:
        missing = [n for n, role in row.roles.items() if role in COUNTED and n not in row.after]
        if missing and row.after:
            notes.append(f"{row.label} was not evaluated on {_listed(missing)}, so its average is left out.")
    return notes
