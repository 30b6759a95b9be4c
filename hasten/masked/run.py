"""One call of the masked engine: the text with its open places, and the loop that fills them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from hasten.errors import HastenError, PlanError
from hasten.masked.blocks import BlockStore, Tree
from hasten.masked.denoiser import Denoiser
from hasten.masked.host import Bools, Ints, fetched, sent
from hasten.masked.projections import Projections
from hasten.masked.runners import Said
from hasten.masked.sampling import Sampler, chance
from hasten.masked.slots import (
    Candidates,
    Committer,
    Embedding,
    Guess,
    MaskedTechnique,
    Remasker,
    Window,
)


@dataclass
class Slots:
    """The techniques of a call with what `bind` made of them, one for each slot."""

    committer: tuple[Committer, Any] | None = None
    remasker: tuple[Remasker, Any] | None = None
    candidates: tuple[Candidates, Any] | None = None
    window: tuple[Window, Any] | None = None
    embedding: tuple[Embedding, Any] | None = None

    @classmethod
    def fill(cls, bound: Iterable[tuple[Any, Any]]) -> Self:
        """Put each technique into the slots that its contract names."""
        slots = cls()
        for technique, made in bound:
            for slot in technique.terms().slots:
                if slot.engine != "masked":
                    raise PlanError(
                        f"{technique.name} is of the {slot.engine} engine, and this model is a masked "
                        f"one; `hasten list` shows what fits."
                    )
                setattr(slots, slot.label, (technique, made))
        return slots

    def entries(self) -> list[tuple[MaskedTechnique, Any]]:
        """Each technique once, in the order of the slots."""
        found = [getattr(self, field.name) for field in fields(self)]
        return list({id(e[0]): e for e in found if e is not None}.values())


class Run:
    """A call in progress.

    Attributes:
        tokens: (batch, length) ids; the mask where a place is not fixed.
        given: (batch, length) bool, places that came with the call and never change.
        pads: (batch,) positions on the left that are only padding.
        start: the first place of any row that was not given.
        block: the places (first, end) that are filled at present.
        activity: counters; "passes", "positions" and "emitted" are the loop's own.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        tokens: Tensor,
        given: Tensor,
        slots: Slots,
        *,
        pads: Tensor,
        block_length: int,
        eos: tuple[int, ...] = (),
        pad: int = 0,
    ) -> None:
        self.denoiser = denoiser
        self.sampler = sampler
        self.tokens = tokens
        self.given = given
        self._free: Bools = ~fetched(given)
        # (length,) the places' numbers.
        self.columns = torch.arange(tokens.shape[1], device=tokens.device)
        self.slots = slots
        self.pads = pads
        self.eos = eos
        self.pad = pad
        self.start = int((~given).any(dim=0).float().argmax())
        self.block_length = block_length
        ends = range(self.start + block_length, tokens.shape[1], block_length)
        edges = [self.start, *ends, tokens.shape[1]]
        self.blocks = list(itertools.pairwise(edges))
        self.block = self.blocks[0]
        self.cache: Projections | None = None
        self.store: BlockStore | None = None
        size = denoiser.form.block_length
        if size is not None and self._keeps_blocks():
            self.store = BlockStore(tokens, size, pads)
        self.carried: Guess | None = None
        self.activity: Counter[str] = Counter()
        self.states: dict[int, Any] = {}
        self.peak_cache_bytes = 0
        self._cancelled = False
        self.ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        self.on_tokens: Callable[[Run], None] | None = None
        self.trace: list[Tensor] | None = None  # the text after each pass, where someone asks

    def _keeps_blocks(self) -> bool:
        """Whether what a model that sees blocks computed is kept.

        A technique that chooses what is computed does so itself, and what is read instead of tokens
        changes with each pass. A first place behind padding is spoken for in a way of its own.
        """
        if self.slots.window is not None or self.slots.embedding is not None:
            return False
        alone = self.denoiser.alone(self.columns, self.pads)
        return alone is None or not bool((alone & ~self.given).any())

    # -- what techniques read ----------------------------------------------------------------------
    @property
    def mask_id(self) -> int:
        return self.denoiser.form.mask_id

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def masked(self) -> Tensor:
        """(batch, length) bool, places that are not fixed."""
        return (self.tokens == self.mask_id) & ~self.given

    def masks_of(self, tokens: Ints) -> Bools:
        """(batch, ..., length) bool, places that are not fixed in texts or drafts of the rows."""
        free = self._free if tokens.ndim == 2 else self._free[:, None]
        masks: Bools = (tokens == self.mask_id) & free
        return masks

    @property
    def open(self) -> Tensor:
        """(batch, length) bool, places up to the end of the block in hand that are not fixed.

        Those before the block are fixed, unless a remasker opened one of them again.
        """
        return self.masked & (self.columns < self.block[1])

    def next_open(self, tokens: Ints) -> Bools:
        """(batch, ..., length) bool, the open places of each row's first block that has any.

        That is where the next place of a text is filled; rows may be in different blocks. Blocks
        before the one in hand are full.

        Args:
            tokens: (batch, ..., length) ids, the text or drafts that go on from it.
        """
        masked = self.masks_of(tokens)
        ends = self._block_ends(np.maximum(masked.argmax(axis=-1), self.block[0]))
        found: Bools = masked & (np.arange(self.length) < ends[..., None])
        return found

    def _block_ends(self, places: Ints) -> Ints:
        """Where the blocks of places end, but for the last of the text."""
        return ((places - self.start) // self.block_length + 1) * self.block_length + self.start

    def block_numbers(self) -> Ints:
        """(length,) which block each place belongs to; below 0 before the first new one."""
        return (np.arange(self.length) - self.start) // self.block_length

    def needed(self, tokens: Tensor | None = None) -> Tensor:
        """(wanted,) places that a guess is wanted of: the block's, or all from the first new one on.

        Drafts may go beyond the block. Then whole further blocks are wanted, so many that neither
        the drafts of this pass nor those made of it reach the end.

        Args:
            tokens: (batch, length) a text for which blocks that it fills are not wanted.
        """
        looks_back = self.slots.remasker is not None and self.slots.remasker[0].looks_back
        first, end = self.start if looks_back else self.block[0], self.block[1]
        beyond = 0
        if self._reach:
            beyond = 2 * self._reach - int(self._left()[:, : self.block[1]].sum(axis=1).min())
        if beyond > 0:
            last = min(end + beyond, self.length)
            end = next(stop for _, stop in self.blocks if stop >= last)
        if tokens is not None and not looks_back:
            left = self.masks_of(fetched(tokens))[:, first:].any(axis=0)
            first += int(left.argmax()) // self.block_length * self.block_length
        return torch.arange(first, end, device=self.tokens.device)

    @property
    def _reach(self) -> int:
        """Places that drafts fill at most beyond the block; 0 where they stay inside.

        With a window they stay: what it keeps of a block depends on when the block was left.
        """
        if self.slots.candidates is None or self.slots.window is not None:
            return 0
        return self.slots.candidates[0].reach

    def state(self, entry: tuple[MaskedTechnique, Any]) -> Any:
        """What a technique remembers of this call."""
        return self.states[id(entry[0])]

    def best(self, guess: Guess, places: Tensor, count: int = 1) -> Tensor:
        """(batch, ..., length) bool, the most confident `count` of places; of equal ones the first."""
        confidence = guess.confidence.masked_fill(~places, -1.0)
        if count == 1:
            order = confidence.argmax(dim=-1, keepdim=True)
        else:
            order = confidence.argsort(dim=-1, descending=True, stable=True)[..., :count]
        return torch.zeros_like(places).scatter_(-1, order, True) & places

    # -- passes ------------------------------------------------------------------------------------
    def look(self) -> Guess:
        """A pass over the text as it is."""
        rows = None
        if self.store is not None:
            return self._guess(self.tokens, self.pads, self.store, None)
        if self.slots.window is not None:
            if self.cache is None:
                self.cache = Projections(self.length)
            rows = self.slots.window[0].rows(self.state(self.slots.window), self)
            rows = None if self.cache.is_empty else rows
        return self._guess(self.tokens, self.pads, self.cache, rows)

    def evaluate(self, drafts: Tensor) -> Guess:
        """What a pass says of each of the drafts (batch, drafts, length)."""
        batch, count, length = drafts.shape
        if self.store is not None and count > 1:
            return self._evaluate_tree(drafts)
        entries = torch.arange(batch, device=drafts.device).repeat_interleave(count)
        cache: Projections | BlockStore | None = self.store
        rows = None
        if self.slots.window is not None and self.cache is not None and not self.cache.is_empty:
            rows = self.slots.window[0].rows(self.state(self.slots.window), self)
            cache = self.cache.take(entries)
        flat = drafts.reshape(batch * count, length)
        guess = self._guess(flat, self.pads[entries], cache, rows, entries=entries)
        self._written = cache if isinstance(cache, Projections) else None
        return guess.unflatten(batch)

    def _evaluate_tree(self, drafts: Tensor) -> Guess:
        """As `evaluate`, with what the drafts have in common computed once."""
        assert self.store is not None
        first, ends = self._asked(drafts)
        before = self.denoiser.positions
        said, self._tree, row = self.denoiser.drafts(drafts, first, ends, self.store)
        self._count(self.denoiser.positions - before, self.store)
        wanted = torch.arange(first, max(ends), device=drafts.device)
        return self._read_tree(drafts, said, row, wanted)

    def _asked(self, drafts: Tensor) -> tuple[int, list[int]]:
        """The first place that is asked for of any draft, and for each where the places end.

        Of each its open block is wanted, where the next place is filled. What the drafts made of this
        pass can fill behind that is only guessed: one draft of each block says it for all of them, the
        fullest. It is no more than one block, since guesses further ahead seldom hold.
        """
        masked = self.masks_of(fetched(drafts))
        column = masked.argmax(axis=2)
        first = int(np.where(masked.any(axis=2), column, self.length).min())
        if not self._reach:
            return first, [self.block[1]] * drafts.shape[1]
        last = np.minimum(masked.cumsum(axis=2), self._reach).argmax(axis=2)
        last = np.minimum(last, column + self.block_length)
        own, ahead = (
            np.minimum(self._block_ends(places.max(axis=0)), self.length).tolist()
            for places in (column, last)
        )
        fullest = [this < after for this, after in itertools.pairwise([*own, self.length + 1])]
        ends = [a if full else o for o, a, full in zip(own, ahead, fullest, strict=True)]
        return first, list(itertools.accumulate(ends, max))

    def adopt(self, drafts: Tensor, guess: Guess | None, best: Tensor) -> None:
        """Go on from one draft of each row; `guess` may lack those of drafts that fill everything."""
        every = torch.arange(self.batch, device=self.tokens.device)
        self.tokens = drafts[every, best]
        count = 0 if guess is None else guess.tokens.shape[1]
        if guess is None or bool((best >= count).all()):
            self.carried = None
            return
        chosen = best.clamp(max=count - 1)  # a row beyond it is full
        self.carried = guess.of(every, chosen)
        if self.store is not None and self._tree is not None:
            self.store.adopt(self._tree, drafts, chosen)
            self._tree = None
        if self._written is not None:
            self.cache = self._written.take(every * count + chosen)

    _written: Projections | None = None
    _tree: Tree | None = None

    def _guess(
        self,
        tokens: Tensor,
        pads: Tensor,
        cache: Projections | BlockStore | None,
        rows: Tensor | None,
        *,
        entries: Tensor | None = None,
    ) -> Guess:
        wanted = self.needed(tokens if self.store is not None else None)
        embeddings = None
        if self.slots.embedding is not None:
            technique = self.slots.embedding[0]
            seen = tokens if rows is None else tokens[:, rows]
            embeddings = technique.embed(self.state(self.slots.embedding), self, seen, rows)
        before = self.denoiser.positions
        said = self.denoiser.read(
            tokens, wanted, pads=pads, cache=cache, rows=rows, embeddings=embeddings
        )
        if self.slots.embedding is not None:
            technique.heed(self.state(self.slots.embedding), self, said.logits, wanted)
        self._count(self.denoiser.positions - before, cache)
        return self._read(tokens, said, wanted, pads, entries)

    def _count(self, positions: int, cache: Projections | BlockStore | None) -> None:
        self.activity["passes"] += 1
        self.activity["positions"] += positions
        if cache is not None:
            self.peak_cache_bytes = max(self.peak_cache_bytes, cache.num_bytes())

    def _read(
        self,
        tokens: Tensor,
        said: Said,
        wanted: Tensor,
        pads: Tensor,
        entries: Tensor | None,
    ) -> Guess:
        """What is said of places (batch, wanted) of texts (batch, length), as the call's settings take it."""
        logits = said.logits
        if self.slots.committer is not None:
            technique, state = self.slots.committer[0], self.state(self.slots.committer)
            logits = technique.revise(state, self, logits, wanted)
        if logits is said.logits and self.sampler.takes_the_likeliest:
            return self._place(tokens, said, wanted)
        # Padding is no text, and counts for no penalty.
        text = tokens.masked_fill(self.columns < pads[:, None], self.mask_id)
        best = self.sampler.best(logits, text, wanted, self.mask_id, entries)
        return self._place(tokens, Said(logits, best, chance(logits, best)), wanted)

    def _place(self, tokens: Tensor, said: Said, wanted: Tensor) -> Guess:
        """What is said of places (batch, wanted), beside the texts (batch, length)."""
        best, confidence = tokens.clone(), torch.zeros_like(tokens, dtype=said.chance.dtype)
        best[:, wanted] = said.best
        confidence[:, wanted] = said.chance
        return Guess(best, confidence, said.logits, wanted)

    def _read_tree(self, drafts: Tensor, said: Said, row: Ints, wanted: Tensor) -> Guess:
        """What is said of drafts (batch, drafts, length) in a tree.

        Args:
            said: of the rows that were asked, (batch, rows).
            row: (drafts, wanted) which of the rows speaks of a draft's place; -1 for none.
        """
        batch, count = drafts.shape[:2]
        told, known = (sent(part, drafts.device) for part in (np.maximum(row, 0), row >= 0))
        if not self._reads_rows_alone:
            entries = torch.arange(batch, device=drafts.device).repeat_interleave(count)
            of_each = said[entries[:, None], told.repeat(batch, 1)]
            flat = drafts.flatten(0, 1)
            guess = self._read(flat, of_each, wanted, self.pads[entries], entries).unflatten(batch)
            guess.confidence[:, :, wanted] *= known
            return guess
        tokens, confidence = drafts.clone(), torch.zeros_like(drafts, dtype=said.chance.dtype)
        tokens[:, :, wanted] = said.best[:, told]
        confidence[:, :, wanted] = said.chance[:, told] * known
        return Guess(tokens, confidence, said.logits, wanted, told)

    @property
    def _reads_rows_alone(self) -> bool:
        """Whether what is read of a place depends on its logits alone, so that drafts may share it."""
        committer = self.slots.committer
        revises = committer is not None and type(committer[0]).revise is not Committer.revise
        return self.sampler.takes_the_likeliest and not revises

    # -- the loop ----------------------------------------------------------------------------------
    def cancel(self) -> None:
        """Let the loop end after the pass that is running; may come from another thread."""
        self._cancelled = True

    def execute(self) -> None:
        """Fill the text, block after block."""
        for technique, bound in self.slots.entries():
            self.states[id(technique)] = technique.begin(self, bound)
        try:
            for block in self.blocks:
                self.block = block
                if not self._reach:
                    self.carried = None
                while self._left()[:, : block[1]].any() and not self._cancelled:
                    self.step()
                if self._cancelled or bool(self.ended.all()):
                    break
        finally:
            for technique, _ in self.slots.entries():
                if id(technique) in self.states:
                    technique.finish(self.states[id(technique)], self)

    def step(self) -> None:
        """One pass: guess, fix, open again."""
        before = int(self._left().sum())
        guess = self.carried if self.carried is not None else self.look()
        self.carried = None
        if self.slots.candidates is not None:
            self._leap(guess)
        else:
            self._fix(guess)
        self.activity["emitted"] += before - int(self._left().sum())
        self._end_rows()
        if self.trace is not None:
            self.trace.append(self.tokens.clone())
        if self.on_tokens is not None:
            self.on_tokens(self)

    def _left(self) -> Bools:
        """(batch, length) bool, as `masked`, on the host."""
        return self.masks_of(fetched(self.tokens))

    def _leap(self, guess: Guess) -> None:
        assert self.slots.candidates is not None
        technique, state = self.slots.candidates[0], self.state(self.slots.candidates)
        drafts = technique.propose(state, self, guess)
        # A draft that fills all that there is to fill, in every row, has no successor to be judged by.
        end = self.length if self._reach else self.block[1]
        left = self.masks_of(fetched(drafts))[..., :end]
        count = int(left.any(axis=(0, 2)).sum())
        said = self.evaluate(drafts[:, :count]) if count else None
        best = technique.verify(state, self, drafts, said)
        self.adopt(drafts, said, best)

    def _fix(self, guess: Guess) -> None:
        places = self.open
        if self.slots.committer is None:
            chosen = self.best(guess, places)  # static decoding: one place a pass
        else:
            technique, state = self.slots.committer[0], self.state(self.slots.committer)
            chosen = technique.choose(state, self, guess) & places
        stuck = places.any(dim=1) & ~chosen.any(dim=1)
        assert not bool(stuck.any()), "a committer must fix one place of each open row at least"
        self.tokens = torch.where(chosen, guess.tokens, self.tokens)
        if self.slots.remasker is not None and bool(self.open.any()):
            remasker = self.slots.remasker
            opened = remasker[0].reopen(self.state(remasker), self, guess, chosen) & ~self.given
            opened &= self.open.any(dim=1, keepdim=True)  # a row that is full stays so
            self.tokens = self.tokens.masked_fill(opened, self.mask_id)

    def _end_rows(self) -> None:
        """Fill rows up whose text has ended: everything before an end-of-text id is fixed."""
        found = (fetched(self.tokens)[..., None] == np.array(self.eos)).any(axis=2) & self._free
        if not found.any():
            return
        ends = sent(found, self.tokens.device)
        settled = (~self.masked).long().cumprod(dim=1).bool()  # no open place up to here
        ends &= settled
        over = ends.any(dim=1) & ~self.ended
        if bool(over.any()):
            first = ends.long().argmax(dim=1)
            behind = self.columns > first[:, None]
            # Places that were given behind the end stay: an infilling keeps its text.
            fill = behind & ~self.given & over[:, None]
            self.tokens = self.tokens.masked_fill(fill, self.pad)
            self.ended |= over

    def sequences(self) -> Tensor:
        """(batch, length) ids, all places fixed."""
        if bool(self.masked.any()):
            raise HastenError("the call was stopped before every place was filled")
        return self.tokens
