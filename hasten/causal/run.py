"""One call in progress: its tokens, its lanes, and the decode loop.

The loop is `Run.decode`; the path of one token through it is described in docs/architecture.md.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.causal.cache import KVCache
from hasten.causal.generation import Sampler, Settings
from hasten.causal.runners import Block, Output, Runner
from hasten.causal.slots import (
    KV,
    Acceptor,
    CausalTechnique,
    Controller,
    Draft,
    Drafter,
    Emission,
    Prefill,
    Verdict,
)
from hasten.technique import Resource

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DRAFT_ROOM = 64  # cache entries kept free for draft nodes


@dataclass
class Lane:
    """One model with its own cache inside a call.

    Attributes:
        runner: what executes its passes.
        cache: its keys and values.
        filled: tokens of `Run.tokens` per row that are in the cache; those beyond are pending and
            enter with the next pass.
    """

    name: str
    runner: Runner
    cache: KVCache
    filled: Tensor  # (batch,)


@dataclass
class Slots:
    """The techniques of one call, by slot, each with what `bind` made for the model."""

    prefill: tuple[Prefill, Any] | None = None
    drafter: tuple[Drafter, Any] | None = None
    acceptor: tuple[Acceptor, Any] | None = None
    kv: tuple[KV, Any] | None = None
    controller: tuple[Controller, Any] | None = None

    @classmethod
    def fill(cls, techniques: list[tuple[CausalTechnique, Any]]) -> Slots:
        """Put each technique where its kind belongs; one technique may fill two slots."""
        slots = cls()
        for entry in techniques:
            technique = entry[0]
            if isinstance(technique, Prefill):
                slots.prefill = entry  # type: ignore[assignment]
            if isinstance(technique, (Drafter, Emission)):
                slots.drafter = entry  # type: ignore[assignment]
            if isinstance(technique, (Acceptor, Emission)):
                slots.acceptor = entry  # type: ignore[assignment]
            if isinstance(technique, KV):
                slots.kv = entry  # type: ignore[assignment]
            if isinstance(technique, Controller):
                slots.controller = entry  # type: ignore[assignment]
        return slots

    def entries(self) -> list[tuple[CausalTechnique, Any]]:
        """The distinct techniques with what they are bound to."""
        found: dict[int, tuple[CausalTechnique, Any]] = {}
        for entry in (self.prefill, self.drafter, self.acceptor, self.kv, self.controller):
            if entry is not None:
                found[id(entry[0])] = entry
        return list(found.values())


class Run:
    """One `generate` or `score` call.

    Attributes:
        tokens: (batch, capacity) prompt (left padding included) and what was emitted.
        lengths: (batch,) tokens in use per row.
        pads: (batch,) left padding per row.
        finished: (batch,) rows that met a stop.
        lane: the lane that runs the next pass; `lanes` has all of them.
        last: output at the newest position that was run, num_logits 1; None before the prompt.
        activity: counters; every technique counts under its own name ("medusa.accepted").
        forced: (batch, length) tokens to emit instead of chosen ones (scoring), or None.
        trace: logits (batch, vocabulary) from which each pass's first token came, or None.
        gained: tokens emitted by passes with a draft beyond one per pass and unfinished row.
        tokenizer: the subject's tokenizer where it has one, for techniques that look at text.
    """

    def __init__(
        self,
        runner: Runner,
        settings: Settings,
        prompt: Tensor,
        attention_mask: Tensor | None,
        slots: Slots,
    ) -> None:
        batch, length = prompt.shape
        device = runner.device
        self.settings = settings
        self.slots = slots
        self.model: PreTrainedModel = runner.model
        self.activity: Counter[str] = Counter()
        self.sampler = Sampler(settings, device)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        capacity = length + min(settings.max_new_tokens, 4096) + DRAFT_ROOM
        self.tokens = prompt.new_full((batch, capacity), settings.pad_token_id)
        self.tokens[:, :length] = prompt
        self.prompt_length = length
        self.lengths = torch.full((batch,), length, dtype=torch.long, device=device)
        self.pads = torch.zeros(batch, dtype=torch.long, device=device)
        if attention_mask is not None:
            self.pads = length - attention_mask.sum(dim=1)
        self.has_pads = bool(self.pads.any())
        self.finished = torch.zeros(batch, dtype=torch.bool, device=device)
        self.uniform = True  # all rows have the same length (always so for a batch of one)
        self.lane = self.new_lane("base", runner)
        self.lanes = {"base": self.lane}
        self.last: Output | None = None
        self.forced: Tensor | None = None
        self.trace: list[Tensor] | None = None  # logits that decided each token, if asked for
        self.on_tokens: Any = None  # called with (run, first new column) after tokens were emitted
        self.states: dict[int, Any] = {}
        self.peak_cache_bytes = 0
        self.gained = 0
        self.first_token_at = 0.0  # time.perf_counter() when the prompt was through

    # -- set-up and end ------------------------------------------------------------------------
    @property
    def batch(self) -> int:
        """Rows of this call."""
        return self.tokens.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of tokens and caches."""
        return self.tokens.device

    def new_lane(self, name: str, runner: Runner) -> Lane:
        """A lane with an empty cache for this call's prompt and budget."""
        cache = runner.new_cache(self.batch, self.tokens.shape[1])
        return Lane(name, runner, cache, torch.zeros_like(self.lengths))

    def state(self, entry: tuple[CausalTechnique, Any]) -> Any:
        """State of a technique in this call."""
        return self.states[id(entry[0])]

    def execute(self) -> None:
        """Run the call from prompt to end, with every technique begun and finished."""
        entries = self.slots.entries()
        try:
            for technique, bound in entries:
                self.states[id(technique)] = technique.begin(self, bound)
            if self.slots.controller is not None:
                controller = self.slots.controller[0]
                self.lanes |= controller.lanes(self.state(self.slots.controller), self)
                controller.drive(self.state(self.slots.controller), self)
            else:
                self.decode()
        finally:
            for technique, _ in entries:
                if id(technique) in self.states:
                    technique.finish(self.states[id(technique)], self)

    def fork(self, rows: Tensor) -> Run:
        """An independent copy of this call's tokens and caches, of the given rows (repeats allowed).

        Techniques' own states are shared, so this is for techniques whose contract allows forks.
        """
        twin = Run.__new__(Run)
        twin.__dict__.update(self.__dict__)
        twin.tokens = self.tokens.index_select(0, rows)
        for name in ("lengths", "pads", "finished"):
            setattr(twin, name, getattr(self, name).index_select(0, rows))
        twin.lanes = {
            name: Lane(name, lane.runner, lane.cache.fork(rows), lane.filled.index_select(0, rows))
            for name, lane in self.lanes.items()
        }
        twin.lane = twin.lanes[self.lane.name]
        if self.last is not None:
            twin.last = Output(
                self.last.logits.index_select(0, rows),
                None if self.last.hidden is None else self.last.hidden.index_select(0, rows),
            )
        return twin

    # -- the loop --------------------------------------------------------------------------------
    def decode(self) -> None:
        """Prefill, then pass after pass until every row has stopped."""
        if self.last is None:
            self.prefill()
        while not self.done():
            self.step()

    def prefill(self) -> None:
        """Run the prompt and emit the first token."""
        if self.slots.controller is not None:
            self.slots.controller[0].before_pass(self.state(self.slots.controller), self)
        self.decide(None, self.read_prompt())
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.first_token_at = time.perf_counter()

    def read_prompt(self) -> Output:
        """Build the prompt's cache and return the output at its last token; nothing is emitted."""
        if self.slots.prefill is not None:
            technique = self.slots.prefill[0]
            return technique.fill(self.state(self.slots.prefill), self)
        output = self.forward(self.compose(None, is_prompt=True))
        self.commit(None)
        return output

    def step(self) -> None:
        """One pass: draft, run, accept, commit, compress."""
        if self.slots.controller is not None:
            self.slots.controller[0].before_pass(self.state(self.slots.controller), self)
        draft = None
        if self.slots.drafter is not None and self.forced is None and self.room() > 1:
            drafter = self.slots.drafter[0]
            draft = drafter.propose(self.state(self.slots.drafter), self)
        output = self.forward(self.compose(draft))
        self.decide(draft, output)

    def decide(self, draft: Draft | None, output: Output) -> None:
        """Accept, commit what was accepted, emit, compress."""
        verdict = self.verdict(draft, output)
        if self.lane.cache.block:
            self.commit(verdict.nodes)
        rows = torch.zeros_like(self.lengths) if verdict.at is None else verdict.at
        self.last = output if output.logits.shape[1] == 1 else output.at(rows)
        if self.trace is not None:
            self.trace.append(self.last.logits[:, 0])
        if self.slots.controller is not None:
            self.slots.controller[0].after_pass(self.state(self.slots.controller), self, self.last)
        if draft is None:
            self.emit(verdict)
        else:
            before = self.activity["emitted"] + int((~self.finished).sum())
            self.emit(verdict)
            self.gained += self.activity["emitted"] - before
        held = sum(lane.cache.num_bytes() for lane in self.lanes.values())
        self.peak_cache_bytes = max(self.peak_cache_bytes, held)
        if self.slots.kv is not None:
            self.slots.kv[0].compress(self.state(self.slots.kv), self, self.lane.cache)

    # -- the parts of a pass -----------------------------------------------------------------------
    def compose(self, draft: Draft | None, *, is_prompt: bool = False) -> Block:
        """The next block: every token that the lane's cache lacks, then the draft's nodes."""
        tokens, positions, holes = self.pending(self.lane)
        if draft is None:
            return Block(tokens, positions, None, 1, holes, is_prompt)
        root = positions[:, -1:]
        depths = torch.tensor(draft.depths(), device=self.device)
        absent = draft.tokens < 0
        node_holes = bool(absent.any())
        # Nodes beyond the last token that may come are of no use, and models without rotary
        # positions have no place for them.
        node_positions = (root + depths).clamp(max=self.last_position)
        if node_holes:
            node_positions = node_positions.masked_fill(absent, -1)
        tree = draft.mask(tokens.shape[1])
        return Block(
            torch.cat((tokens, draft.tokens.clamp(min=0)), dim=1),
            torch.cat((positions, node_positions), dim=1),
            None if tree is None else tree.to(self.device),
            1 + draft.num_nodes,
            holes or node_holes,
        )

    def pending(self, lane: Lane) -> tuple[Tensor, Tensor, bool]:
        """Tokens that a lane has not seen: ids and positions (batch, pending), and whether some are holes."""
        if self.uniform:
            start, stop = int(lane.filled[0]), int(self.lengths[0])
            tokens = self.tokens[:, start:stop]
            columns = torch.arange(start, stop, device=self.device)
            positions = columns - self.pads[:, None]
            holes = self.has_pads and start < int(self.pads.max())
            return tokens, positions.clamp(min=-1) if holes else positions, holes
        counts = self.lengths - lane.filled
        width = int(counts.max())
        columns = self.lengths[:, None] - width + torch.arange(width, device=self.device)
        absent = columns < torch.maximum(lane.filled, self.pads)[:, None]
        tokens = self.tokens.gather(1, columns.clamp(min=0))
        positions = (columns - self.pads[:, None]).masked_fill(absent, -1)
        return tokens, positions, bool(absent.any())

    def forward(self, block: Block) -> Output:
        """Run one block on the current lane; the block stays open in its cache."""
        lane = self.lane
        hidden = any(Resource.HIDDEN in t.contract.reads for t, _ in self.slots.entries())
        kv, kv_state = (None, None)
        if self.slots.kv is not None:
            kv, kv_state = self.slots.kv[0], self.state(self.slots.kv)
        self.activity["passes"] += 1
        self.activity["positions"] += block.tokens.shape[1]
        return lane.runner.forward(block, lane.cache, hidden=hidden, kv=kv, kv_state=kv_state)

    def verdict(self, draft: Draft | None, output: Output) -> Verdict:
        """What this pass emits."""
        if self.forced is not None:
            column = int(self.lengths[0]) - self.prompt_length
            return Verdict(self.forced[:, column : column + 1])
        if self.slots.acceptor is not None:
            acceptor = self.slots.acceptor[0]
            return acceptor.accept(self.state(self.slots.acceptor), self, draft, output)
        if draft is None:
            return Verdict(self.sampler.pick(self.scores(output.logits[:, -1]))[:, None])
        return longest_exact(self, draft, output)

    def scores(self, logits: Tensor) -> Tensor:
        """Processed scores (batch, vocabulary) of the token after `tokens`."""
        if not self.sampler.needs_prefix:
            return self.sampler.scores(logits, None)
        return self.sampler.scores(logits, self.sequence(), self.pads if self.has_pads else None)

    def node_scores(self, draft: Draft, logits: Tensor) -> Tensor:
        """Processed scores (batch, 1 + nodes, vocabulary), each row with its own path as prefix."""
        batch, rows, vocabulary = logits.shape
        if not self.sampler.needs_prefix:
            return self.sampler.scores(logits.reshape(-1, vocabulary), None).view(batch, rows, -1)
        # Rows may be of different lengths here: a row's own root fills up behind its end and
        # behind its path, since repeating a token changes no penalty.
        roots = self.tokens.gather(1, self.lengths[:, None] - 1)
        prefix = self.sequence()
        behind = torch.arange(prefix.shape[1], device=self.device)[None] >= self.lengths[:, None]
        prefix = torch.where(behind, roots, prefix)
        extended = torch.cat((roots, torch.where(draft.tokens < 0, roots, draft.tokens)), dim=1)
        deepest = max(draft.depths(), default=0)
        columns = torch.zeros((rows, deepest), dtype=torch.long, device=self.device)
        for node in range(draft.num_nodes):
            path = torch.tensor(draft.path(node), device=self.device) + 1
            columns[node + 1, : len(path)] = path
        paths = extended[:, columns]  # (batch, rows, deepest)
        full = torch.cat((prefix[:, None].expand(-1, rows, -1), paths), dim=2)
        pads = self.pads.repeat_interleave(rows) if self.has_pads else None
        flat = self.sampler.scores(
            logits.reshape(-1, vocabulary), full.reshape(batch * rows, -1), pads
        )
        return flat.view(batch, rows, vocabulary)

    def commit(self, nodes: Tensor | None) -> None:
        """Keep the pending tokens and the accepted nodes (batch, kept; -1 pads) in the lane's cache."""
        lane = self.lane
        num_pending = int((self.lengths - lane.filled).max())
        if nodes is None or nodes.shape[1] == 0:
            lane.cache.commit(num_kept=num_pending)
            lane.filled = self.lengths.clone()
            return
        counts = (nodes >= 0).sum(dim=1)
        in_order = torch.arange(nodes.shape[1], device=self.device)
        if bool((nodes == in_order).all()):
            lane.cache.commit(num_kept=num_pending + nodes.shape[1])
        else:
            pending = torch.arange(num_pending, device=self.device).expand(self.batch, -1)
            shifted = torch.where(nodes >= 0, nodes + num_pending, -1)
            lane.cache.commit(torch.cat((pending, shifted), dim=1))
        lane.filled = self.lengths + counts

    def emit(self, verdict: Verdict) -> None:
        """Append a verdict's tokens, row by row up to a stop."""
        new = verdict.tokens
        first = self.lengths.clone()
        self._make_room(int(self.lengths.max()) + new.shape[1])
        for column in range(new.shape[1]):
            if not self._append(new[:, column], pad_finished=new.shape[1] == 1):
                break
        if self.batch > 1:
            lanes = [lane.filled for lane in self.lanes.values()]
            self.uniform = all(bool((x == x[0]).all()) for x in (self.lengths, *lanes))
        for lane in self.lanes.values():  # what was cut off at a stop is not needed any more
            lane.filled = torch.minimum(lane.filled, self.lengths - 1)
        if self.on_tokens is not None:
            self.on_tokens(self, first)

    def _append(self, new: Tensor, *, pad_finished: bool) -> bool:
        """Append one column (batch,) of tokens, -1 for none; False once no row takes any."""
        alive = ~self.finished & (new >= 0)
        num_alive = int(alive.sum())
        if num_alive == 0:
            return False
        if num_alive == self.batch:
            moves, token = alive, new
        else:  # a finished row takes padding, so that rows of equal length stay so
            moves = alive | self.finished if pad_finished and self.uniform else alive
            token = torch.where(alive, new, self.settings.pad_token_id)
        at = self.lengths[:, None]
        if num_alive < self.batch:
            token = torch.where(moves, token, self.tokens.gather(1, at)[:, 0])
        self.tokens.scatter_(1, at, token[:, None])
        self.lengths = self.lengths + moves
        self.finished = self.finished | (alive & self._stops(token))
        self.activity["emitted"] += num_alive
        return True

    def _make_room(self, needed: int) -> None:
        if needed + DRAFT_ROOM > self.tokens.shape[1]:
            shape = (self.batch, int(needed * 1.5) + DRAFT_ROOM)
            wider = self.tokens.new_full(shape, self.settings.pad_token_id)
            wider[:, : self.tokens.shape[1]] = self.tokens
            self.tokens = wider

    def _stops(self, token: Tensor) -> Tensor:
        """(batch,) bool: this token ended its row."""
        stop = self.lengths - self.prompt_length >= self.settings.max_new_tokens
        if self.forced is not None:
            return stop
        for eos in self.settings.eos_token_ids:
            stop = stop | (token == eos)
        if self.settings.stopping is not None:
            for row in range(self.batch):
                ids = self.tokens[row : row + 1, : int(self.lengths[row])]
                stop[row] |= bool(self.settings.stopping(ids, None)[0])  # type: ignore[arg-type]
        return stop

    # -- reading ---------------------------------------------------------------------------------
    def done(self) -> bool:
        """True once every row has stopped."""
        return bool(self.finished.all())

    def cancel(self) -> None:
        """Let the loop end after the pass that is running."""
        self.finished = torch.ones_like(self.finished)

    def room(self) -> int:
        """Tokens that may still be emitted in the row that is furthest back."""
        emitted = int(self.lengths.min()) - self.prompt_length
        return self.settings.max_new_tokens - emitted

    @property
    def last_position(self) -> int:
        """The position that the last token of the longest row will have at most."""
        return self.prompt_length + self.settings.max_new_tokens - 1

    def sequence(self) -> Tensor:
        """(batch, longest) ids so far; a row that is shorter has padding behind its end."""
        return self.tokens[:, : int(self.lengths.max())]

    def sequences(self) -> Tensor:
        """(batch, longest) prompt and continuation, padded behind a row's end."""
        longest = int(self.lengths.max())
        columns = torch.arange(longest, device=self.device)
        behind = columns[None] >= self.lengths[:, None]
        return self.tokens[:, :longest].masked_fill(behind, self.settings.pad_token_id)


def longest_exact(run: Run, draft: Draft, output: Output) -> Verdict:
    """Keep the longest path whose every token is what the model itself would have taken.

    Greedy decoding compares with the argmax. Sampling draws one token at each row of the tree
    and follows it as long as it is in the draft: each emitted token is then a sample of the
    model's own distribution, whatever the draft was, so the class `distribution` holds.
    """
    scores = run.node_scores(draft, output.logits)
    batch, rows, vocabulary = scores.shape
    wanted = run.sampler.pick(scores.reshape(-1, vocabulary)).view(batch, rows)
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(draft.parents):
        children.setdefault(parent, []).append(node)
    wanted_list, draft_list = wanted.tolist(), draft.tokens.tolist()
    paths: list[list[int]] = []
    for row in range(batch):
        path: list[int] = []
        at = -1
        while True:
            token = wanted_list[row][at + 1]
            follow = [n for n in children.get(at, ()) if draft_list[row][n] == token]
            if not follow:
                break
            at = follow[0]
            path.append(at)
        paths.append(path)
    return verdict_of_paths(run, draft, paths, wanted)


def verdict_of_paths(run: Run, draft: Draft, paths: list[list[int]], bonus: Tensor) -> Verdict:
    """The verdict that keeps one path per row and adds the model's own token after it.

    Args:
        paths: accepted nodes per row, from the root's child downwards.
        bonus: (batch, 1 + nodes) the token that follows each row of the tree.
    """
    longest = max(map(len, paths))
    drafted, following = draft.tokens.tolist(), bonus.tolist()
    nodes, tokens, at = [], [], []
    for row, path in enumerate(paths):
        last = path[-1] + 1 if path else 0
        absent = [-1] * (longest - len(path))
        at.append(last)
        nodes.append(path + absent)
        tokens.append([*(drafted[row][node] for node in path), following[row][last], *absent])
    options: dict[str, Any] = {"dtype": torch.long, "device": run.device}
    return Verdict(
        torch.tensor(tokens, **options), torch.tensor(nodes, **options), torch.tensor(at, **options)
    )
