"""Recipes for the zoo's code models: every shipped file can be made again with one call."""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from hasten.errors import HastenError
from hasten.plan import Plan
from hasten.training.blocks import BlockLoss
from hasten.training.loop import LossFunction, Outcome, Settings, Stage, fit
from hasten.training.masked import MaskedLoss, masked_quality
from hasten.training.memory import keep_freed_memory
from hasten.training.slots import LossTerm
from hasten.zoo.catalogue import SHIPPED, path
from hasten.zoo.continuations import Continuations, write_continuations
from hasten.zoo.corpus import (
    Corpus,
    FileWindows,
    PackedTokens,
    SourceFile,
    default_corpus,
    tokenize,
)
from hasten.zoo.denoisers import recipes as pictures
from hasten.zoo.denoisers.recipes import AnyRecipe as PictureModel
from hasten.zoo.output import (
    Card,
    beside_output,
    checked_output,
    describe_run,
    new_folder,
    torch_state,
    weights_hash,
)
from hasten.zoo.parallel import quality_by_tokens_a_pass
from hasten.zoo.score import bits_per_byte, xz_bits_per_byte
from hasten.zoo.tokenizer import VOCABULARY_SIZE, train_tokenizer

CONTEXT = 2048
MASK = "<|mask|>"
HELD_OUT_ROWS = 64  # windows on which a masked model is judged
NUM_PASSAGES = 16  # of them that it continues


def growing(long_share: float) -> tuple[Stage, ...]:
    """Sequences of 256, then 512, then the whole context for the last `long_share` of tokens.

    Short ones are up to twice as fast; the last part must be long enough to learn to look far back.
    """
    return (
        Stage(length=256, share=0.3),
        Stage(length=512, share=round(0.7 - long_share, 6)),
        Stage(length=CONTEXT, share=long_share),
    )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A Llama-shaped code model with tied embeddings, and the run that trains it."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int  # queries share keys and values in groups of heads / kv_heads
    intermediate: int
    training: Settings
    vocabulary: int = VOCABULARY_SIZE
    context: int = CONTEXT

    def __post_init__(self) -> None:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise HastenError(
                f"recipe {self.name}: hidden={self.hidden} over heads={self.heads} must give "
                "a whole and even head dimension; change either"
            )
        if self.heads % self.kv_heads:
            raise HastenError(
                f"recipe {self.name}: kv_heads={self.kv_heads} does not divide "
                f"heads={self.heads}; give one that does"
            )
        longest = max(stage.length for stage in self.training.stages)
        if longest > self.context:
            raise HastenError(
                f"recipe {self.name}: a stage of length {longest} is longer than "
                f"context={self.context}; shorten it"
            )

    def config(self, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )


@dataclass(frozen=True, kw_only=True)
class Echo:
    """Training on what the base writes after passages of the corpus (`zoo.continuations`)."""

    texts: int
    prompt: int  # tokens of each passage
    training: Settings  # of one stage; its length is that of a text
    skip: int = 0  # passages that an earlier part has used
    ahead: int = 1  # of block diffusion: blocks of masks behind the one that is written


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A masked-diffusion model made from an autoregressive one of the zoo."""

    name: str
    base: str
    training: Settings
    plan: str = "repr_align"  # techniques of the slot loss
    echoes: tuple[Echo, ...] = ()  # later parts, in which it learns what the base itself writes
    block_length: int | None = None  # it sees its own block and those before; None: everything

    def __post_init__(self) -> None:
        for technique in Plan.parse(self.plan):
            if not isinstance(technique, LossTerm):
                raise HastenError(
                    f"recipe {self.name}: {technique.name} is no loss term; training takes "
                    "techniques of the slot loss, such as repr_align"
                )


def _echo(
    *, texts: int, tokens: int, batch_tokens: int = 8_192, skip: int = 0, compile: bool = False
) -> Echo:
    """A part on the base's own texts, of 128 tokens after as many of the corpus."""
    training = Settings(
        tokens=tokens,
        batch_tokens=batch_tokens,
        stages=(Stage(length=256, share=1.0),),
        matrix_lr=0.005,
        other_lr=1e-3,
        compile=compile,
    )
    return Echo(texts=texts, prompt=128, training=training, skip=skip)


RECIPES: dict[str, Recipe | Conversion] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="code-lm",
            hidden=256,
            layers=8,
            heads=8,
            kv_heads=4,
            intermediate=704,
            training=Settings(tokens=10_000_000, stages=growing(0.4)),
        ),
        Recipe(
            name="code-lm-small",
            hidden=128,
            layers=4,
            heads=4,
            kv_heads=2,
            intermediate=352,
            training=Settings(tokens=11_000_000, stages=growing(0.4)),
        ),
        Recipe(
            name="code-lm-tiny",
            hidden=64,
            layers=2,
            heads=4,
            kv_heads=2,
            intermediate=176,
            training=Settings(
                tokens=750_000,
                batch_tokens=2048,  # many small steps and high rates: there is under a minute
                stages=growing(0.4),
                matrix_lr=0.03,
                other_lr=0.03,
                compile=False,  # would take as long as it saves
            ),
        ),
        Conversion(
            name="code-dlm",
            base="code-lm",
            training=Settings(
                tokens=5_000_000,
                stages=(Stage(length=256, share=0.75), Stage(length=512, share=0.25)),
                matrix_lr=0.007,
                other_lr=1e-3,
                compile=False,  # the states of all layers are caught by hooks
            ),
            echoes=(_echo(texts=8_192, tokens=10_000_000),),
        ),
        Conversion(
            name="code-dlm-block",
            base="code-lm",
            block_length=4,
            training=Settings(
                tokens=1_500_000,
                stages=(Stage(length=256, share=1.0),),
                matrix_lr=0.007,
                other_lr=1e-3,
                compile=False,
            ),
            echoes=(
                _echo(texts=4_096, tokens=850 * 4_096, batch_tokens=4_096),
                # It learns these by heart in a second round, so there are many.
                _echo(
                    texts=16_384,
                    tokens=1_650 * 4_096,
                    batch_tokens=4_096,
                    skip=4_096,
                    compile=True,
                ),
            ),
        ),
    )
}


def recipe(name: str) -> Recipe | Conversion | PictureModel:
    """The recipe of that name, of a language model or of a picture model and its parts.

    Raises:
        HastenError: where there is none.
    """
    found = RECIPES.get(name) or pictures.RECIPES.get(name)
    if found is None:
        names = ", ".join((*RECIPES, *pictures.RECIPES))
        raise HastenError(f"no recipe named {name!r}; there are {names}")
    return found


def train(
    name_or_recipe: str | Recipe | Conversion | PictureModel,
    output: Path,
    *,
    threads: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    resume: bool = False,
    quiet: bool = False,
    plan: str | None = None,
    corpus: Corpus | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Card:
    """Run a recipe and write the model to the folder `output`, whole or not at all.

    Args:
        threads: processor threads (default: as torch is set); other numbers round otherwise.
        max_tokens: cuts the run short; its schedule shrinks with it.
        resume: go on where an interrupted run of the same recipe into `output` stopped.
        plan: techniques of the slot loss, in the place of the recipe's own; for conversions.
        corpus: text to learn from (default: this Python's standard library).
        tokenizer: default: the one that ships with hasten, else one trained on the corpus.

    Raises:
        HastenError: where the name is unknown, a number is out of range or `output` is taken.
        KeyboardInterrupt: on Ctrl-C; what was learnt is kept for `resume`.
    """
    chosen = recipe(name_or_recipe) if isinstance(name_or_recipe, str) else name_or_recipe
    if plan is not None and not isinstance(chosen, Conversion):
        raise HastenError(
            f"recipe {chosen.name} takes no techniques; those that do convert a model, such as code-dlm"
        )
    if not isinstance(chosen, Recipe | Conversion):
        return pictures.train(
            chosen,
            output,
            threads=threads,
            max_tokens=max_tokens,
            seed=seed,
            resume=resume,
            quiet=quiet,
        )
    chosen = replace(chosen, training=_adjusted(chosen.training, seed, max_tokens))
    if isinstance(chosen, Conversion):
        echoes = tuple(
            replace(echo, training=_adjusted(echo.training, seed, max_tokens))
            for echo in chosen.echoes
        )
        chosen = replace(chosen, echoes=echoes)
    if plan is not None and isinstance(chosen, Conversion):
        chosen = replace(chosen, plan=str(Plan.parse(plan)))
    output = checked_output(Path(output))
    corpus = default_corpus() if corpus is None else corpus
    if isinstance(chosen, Conversion):
        return _convert(chosen, output, corpus, threads=threads, resume=resume, quiet=quiet)
    if tokenizer is None:
        tokenizer = _shipped_tokenizer() or train_tokenizer(
            (file.text for file in corpus.train),
            vocabulary_size=chosen.vocabulary,
            context=chosen.context,
        )
    packed = PackedTokens(tokenize(corpus.train, tokenizer), seed=seed)
    held_out = [file.text for file in corpus.held_out]
    checkpoint = beside_output(output, "checkpoint")
    with torch_state(threads, seed), keep_freed_memory():
        model = LlamaForCausalLM(chosen.config(tokenizer))
        outcome = fit(
            model,
            packed,
            chosen.training,
            checkpoint=checkpoint,
            resume=resume,
            of=chosen.name,
            evaluate=lambda current: {
                "held_out_bits_per_byte": bits_per_byte(
                    current, tokenizer, held_out, context=512, stride=512, max_bytes=50_000
                )
            },
            num_evaluations=10,
            quiet=quiet,
            label=chosen.name,
        )
        model.bfloat16()
        model.eval()
        quality = {
            "loss": outcome.final_loss,
            "bits_per_byte": bits_per_byte(model, tokenizer, held_out, context=chosen.context),
            "xz_bits_per_byte": xz_bits_per_byte(held_out),
        }
        card = export(model, tokenizer, chosen, output, [outcome], corpus, packed, quality)
    checkpoint.unlink(missing_ok=True)
    return card


def _adjusted(settings: Settings, seed: int, max_tokens: int | None) -> Settings:
    settings = replace(settings, seed=seed)
    if max_tokens is None:
        return settings
    return replace(settings, tokens=min(max_tokens, settings.tokens))


def _convert(
    chosen: Conversion,
    output: Path,
    corpus: Corpus,
    *,
    threads: int | None,
    resume: bool,
    quiet: bool,
) -> Card:
    """Train the base further until it fills masks.

    The embeddings learn too (in the paper they stay as they are): in a model this small they are
    a good part of what it knows, and the mask's own row is among them.
    """
    folder = path(chosen.base)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"mask_token": MASK})
    files = FileWindows(tokenize(corpus.train, tokenizer), seed=chosen.training.seed)
    held_out = FileWindows(tokenize(corpus.held_out, tokenizer)).batch(0, HELD_OUT_ROWS, 256)
    checkpoint = beside_output(output, "checkpoint")
    kept = [checkpoint]  # files of the run, until it is over
    with torch_state(threads, chosen.training.seed), keep_freed_memory():
        base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = copy.deepcopy(base)
        model.resize_token_embeddings(len(tokenizer))  # the new row is the mean of the others
        mask_id = tokenizer.mask_token_id
        terms = [term for term in Plan.parse(chosen.plan) if isinstance(term, LossTerm)]
        outcomes = [
            fit(
                model,
                files,
                chosen.training,
                MaskedLoss(model, mask_id, terms, block_length=chosen.block_length),
                checkpoint=checkpoint,
                resume=resume,
                of=_identity(chosen),
                evaluate=lambda current: masked_quality(
                    current, held_out, mask_id, ratios=(0.5,), block_length=chosen.block_length
                ),
                num_evaluations=10,
                quiet=quiet,
                label=chosen.name,
            )
        ]
        for number, echo in enumerate(chosen.echoes, start=1):
            texts, its_checkpoint = (
                beside_output(output, f"{kind}{number}") for kind in ("texts", "echo")
            )
            kept += [texts, its_checkpoint]
            outcomes.append(
                _learn_the_echo(
                    echo,
                    base,
                    model,
                    files,
                    mask_id,
                    chosen.block_length,
                    texts=texts,
                    checkpoint=its_checkpoint,
                    resume=resume,
                    of=f"{_identity(chosen)}, part {number + 1}",
                    quiet=quiet,
                )
            )
        model.bfloat16().eval()
        model.config.is_causal = False
        model.config.mask_token_id = mask_id
        model.config.shifted_logits = True
        if chosen.block_length is not None:
            model.config.block_length = chosen.block_length
        quality = {"loss": outcomes[-1].final_loss}
        quality |= masked_quality(model, held_out, mask_id, block_length=chosen.block_length)
        quality |= quality_by_tokens_a_pass(model, tokenizer, base, held_out[:NUM_PASSAGES, :96])
        card = export(model, tokenizer, chosen, output, outcomes, corpus, files, quality)
    for file in kept:
        file.unlink(missing_ok=True)
    return card


def _identity(chosen: Conversion) -> str:
    """What a checkpoint of it says that it is of."""
    blocks = "" if chosen.block_length is None else f", blocks of {chosen.block_length}"
    return f"{chosen.name} by {chosen.plan or 'plain conversion'}{blocks}"


def _learn_the_echo(
    echo: Echo,
    base: LlamaForCausalLM,
    model: LlamaForCausalLM,
    files: FileWindows,
    mask_id: int,
    block_length: int | None,
    *,
    texts: Path,
    checkpoint: Path,
    resume: bool,
    of: str,
    quiet: bool,
) -> Outcome:
    """Train on what the base writes, which is kept in the file `texts` until the run is over."""
    if not resume:
        texts.unlink(missing_ok=True)
    written = write_continuations(
        base.bfloat16(),
        files,
        texts,
        count=echo.texts,
        prompt=echo.prompt,
        length=echo.training.stages[0].length,
        skip=echo.skip,
        quiet=quiet,
    )
    loss: LossFunction
    if block_length is None:
        loss = MaskedLoss(model, mask_id, prompt=echo.prompt)
    else:
        loss = BlockLoss(mask_id, prompt=echo.prompt, block_length=block_length, ahead=echo.ahead)
    return fit(
        model,
        Continuations(written, seed=echo.training.seed),
        echo.training,
        loss,
        checkpoint=checkpoint,
        resume=resume,
        of=of,
        quiet=quiet,
        label="its echo",
    )


def export(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    chosen: Recipe | Conversion,
    output: Path,
    outcomes: list[Outcome],
    corpus: Corpus,
    packed: PackedTokens | FileWindows,
    quality: dict[str, float],
) -> Card:
    """Write model, tokenizer and card beside `output`, then move them there in one step."""
    with new_folder(output) as folder:
        model.generation_config = GenerationConfig(
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with _no_progress_bar():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        card = Card(
            name=chosen.name,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            data=_describe(corpus, packed),
            training=_describe_runs(outcomes),
            quality=quality,
            recipe=asdict(chosen),
            sha256=weights_hash(folder),
        )
        card.save(folder / "card.json")
    return card


def _describe_runs(outcomes: list[Outcome]) -> dict[str, Any]:
    """How the run went; later parts stand under "echoes"."""
    first, *rest = (describe_run(outcome) for outcome in outcomes)
    return first | ({"echoes": rest} if rest else {})


def _describe(corpus: Corpus, packed: PackedTokens | FileWindows) -> dict[str, Any]:
    def entry(file: SourceFile) -> dict[str, Any]:
        return {"path": file.path, "bytes": file.num_bytes, "sha256": file.sha256}

    return {
        "source": "Python standard library",
        "python": platform.python_version(),
        "num_files": len(corpus.train),
        "num_bytes": sum(file.num_bytes for file in corpus.train),
        "num_tokens": packed.num_tokens,
        "held_out": [entry(file) for file in corpus.held_out],
    }


def _shipped_tokenizer() -> PreTrainedTokenizerFast | None:
    folder = SHIPPED / "code-lm"
    if not (folder / "tokenizer.json").exists():
        return None
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar for the one small file that it writes."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
