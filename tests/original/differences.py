"""Deliberate differences of savant_ray from the original, applied one by one, and their effect on the loss.

`python -m tests.original.differences [SEEDS]` prints the figures of docs/from_the_original.md. It trains the same small
model, from the same weights, on the quickstart's text, with SEEDS seeds (default 3) in one process each; a process takes
about five minutes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import orjson

from savant_ray.data.order import GlobalOrder, weights_by_documents
from savant_ray.data.packing import pack
from savant_ray.data.quickstart import GENIUS_FILE, TRAIN_FILE, VALIDATION_FILE, write_quickstart
from savant_ray.data.token_cache import Sequences
from savant_ray.data.tokenizer import train_tokenizer
from savant_ray.evaluation.held_out_loss import loss_sums
from savant_ray.optim.schedule import learning_rate
from savant_ray.training.state import TrainingState, new_state
from savant_ray.training.step import MicroBatch, micro_batches, take_step
from tests.original.program import OriginalProgram, Shape
from tests.original.side_by_side import settings
from tests.training.tiny import CPU, never

SHAPE = Shape(dim=64, n_heads=4, n_loops=4, window_size=32, max_seq_len=128, vocab_size=1024)
BATCH, ACCUMULATION, UPDATES, WARMUP, PEAK = 12, 2, 200, 10, 3e-3
EFFECTIVE_BATCH = BATCH * ACCUMULATION
WEIGHTS = (0.8, 0.2)  # of the bulk and of the logic file
RESTARTED_EVERY = 40  # updates
ORIGINALS_LENGTH, ORIGINALS_ACCUMULATION = 1024, 16
Documents = list[np.ndarray]  # token IDs of each document, including its end-of-document token
Steps = Iterator[list[MicroBatch]]
TRAINING = settings(SHAPE, max_steps=UPDATES, batch_size=BATCH, accumulation=ACCUMULATION)


@dataclass(frozen=True)
class Text:
    """Tokenized documents of the quickstart."""

    bulk: Documents
    logic: Documents
    prose: Documents  # held out
    problems: Documents  # held out


@cache
def quickstart_text() -> Text:
    """Write the quickstart's text and tokenize it with a tokenizer that is trained on its training text."""
    with tempfile.TemporaryDirectory() as folder:
        write_quickstart(Path(folder), log=lambda _: None)
        read = [
            [orjson.loads(line) for line in (Path(folder) / name).read_bytes().splitlines()]
            for name in (TRAIN_FILE, GENIUS_FILE, VALIDATION_FILE)
        ]
    bulk, logic, held_out = read
    tokenizer = train_tokenizer((line["text"] for line in bulk + logic), SHAPE.vocab_size)

    def encoded(lines: list[dict[str, str]]) -> Documents:
        ids = tokenizer.encode_batch([line["text"] for line in lines])
        return [np.array([*each, tokenizer.end_of_document], dtype=np.int32) for each in ids]

    problems = [line for line in held_out if line["source"].startswith("problem:")]
    return Text(
        encoded(bulk), encoded(logic), encoded([line for line in held_out if line not in problems]), encoded(problems)
    )


# --- batches of both programs


def drawn(text: Text, seed: int) -> Documents:
    """Draw the original's documents: from the bulk with probability 0.8, until one source is exhausted."""
    random = Random(seed)
    sources = [random.sample(documents, len(documents)) for documents in (text.bulk, text.logic)]
    documents: Documents = []
    while sources[source := random.choices((0, 1), WEIGHTS)[0]]:
        documents.append(sources[source].pop())
    return documents


def padded(documents: Sequence[np.ndarray], length: int = SHAPE.max_seq_len) -> Sequences:
    """Return a row for each document, truncated to `length` and padded."""
    rows = Sequences.empty(len(documents), length)
    for row, document in enumerate(documents):
        n = min(len(document), length)
        rows.tokens[row, :n], rows.document_ids[row, :n] = document[:n], 0
    return rows


def packed(documents: Documents) -> Sequences:
    """Return packed rows, as in the token cache."""
    lengths = [len(document) for document in documents]
    packing = pack(lengths, SHAPE.max_seq_len)
    rows = Sequences.empty(len(packing), SHAPE.max_seq_len)
    rows.tokens[:] = packing.fill(np.concatenate(documents), np.cumsum(lengths) - lengths)
    for row, (first, last) in enumerate(itertools.pairwise([0, *packing.row_ends])):
        pieces = packing.lengths[first:last]
        rows.document_ids[row, : pieces.sum()] = np.repeat(np.arange(len(pieces)), pieces)
    return rows


def original_batches(documents: Documents, restart_every: int = UPDATES) -> Steps:
    """Yield the original's batches: documents in order, restarting with the first one every `restart_every` updates."""
    for update in range(UPDATES):
        first = update % restart_every * EFFECTIVE_BATCH
        chosen = [documents[i % len(documents)] for i in range(first, first + EFFECTIVE_BATCH)]
        yield micro_batches(padded(chosen), np.arange(EFFECTIVE_BATCH), TRAINING)


@cache
def packed_sources() -> list[Sequences]:
    """Return the packed bulk and logic files."""
    text = quickstart_text()
    return [packed(text.bulk), packed(text.logic)]


def sequence_weights(mix_by: str) -> Sequence[float]:
    """Return the weights of the sources in sequences, for a value of `data.mix_by`."""
    text, sizes = quickstart_text(), [len(source) for source in packed_sources()]
    if mix_by == "sequences":
        return WEIGHTS
    return [float(part) for part in weights_by_documents(WEIGHTS, [len(text.bulk), len(text.logic)], sizes)]


def packed_batches(seed: int, mix_by: str) -> Steps:
    """Yield our batches: packed sequences in the global order."""
    sources = packed_sources()
    order = GlobalOrder([len(source) for source in sources], sequence_weights(mix_by), seed)
    for update in range(UPDATES):
        positions = np.arange(update * EFFECTIVE_BATCH, (update + 1) * EFFECTIVE_BATCH)
        chosen, rows = order.locate(positions)
        taken = Sequences.empty(EFFECTIVE_BATCH, SHAPE.max_seq_len)
        for source, sequences in enumerate(sources):
            mine = chosen == source
            taken.tokens[mine] = sequences.tokens[rows[mine]]
            taken.document_ids[mine] = sequences.document_ids[rows[mine]]
        yield micro_batches(taken, positions, TRAINING)


# --- training and figures


@dataclass(frozen=True)
class Outcome:
    """Losses on the held-out text, truncated and padded, in nats per token; target tokens; seconds of processor time."""

    prose: float
    problems: float
    tokens: int
    seconds: float


def train_original(steps: Steps, seed: int) -> Outcome:
    """Train the stand-in of the original."""
    program = OriginalProgram(PEAK, lambda done: learning_rate(done, 1.0, WARMUP, UPDATES), shape=SHAPE, seed=seed)
    tokens, started = 0, time.process_time()
    for step in steps:
        program.train(*(micro_batch.tokens_BT.long() for micro_batch in step))
        tokens += sum(int((micro_batch.tokens_BT[:, 1:] != 0).sum()) for micro_batch in step)
    seconds = time.process_time() - started
    return outcome(state_with_weights_of(program), tokens, seconds)


def train_ours(steps: Steps, seed: int, updates_ahead: int = 1) -> Outcome:
    """Train from the stand-in's initial weights; update k has the rate of k − 1 + `updates_ahead`."""
    state, tokens = state_with_weights_of(OriginalProgram(shape=SHAPE, seed=seed)), 0
    started = time.process_time()
    for update, step in enumerate(steps):
        rate = learning_rate(update + updates_ahead, PEAK, WARMUP, UPDATES)
        tokens += take_step(state, step, rate, 1.0, never).tokens
    return outcome(state, tokens, time.process_time() - started)


def state_with_weights_of(program: OriginalProgram) -> TrainingState:
    state = new_state(TRAINING, CPU)
    state.load_weights({name: p.detach().clone() for name, p in program.model.named_parameters()})
    return state


def outcome(state: TrainingState, tokens: int, seconds: float) -> Outcome:
    def loss(documents: Documents) -> float:
        parts = micro_batches(padded(documents), np.arange(len(documents)), TRAINING)
        total, targets = loss_sums(state.model, parts).tolist()
        return total / targets

    text = quickstart_text()
    return Outcome(loss(text.prose), loss(text.problems), tokens, seconds)


def train_variant(name: str, seed: int) -> Outcome:
    """Train one row of the table."""
    documents = drawn(quickstart_text(), seed)
    match name:
        case "the original":
            return train_original(original_batches(documents), seed)
        case "the original, restarted":
            return train_original(original_batches(documents, RESTARTED_EVERY), seed)
        case "mean over tokens":
            return train_ours(original_batches(documents), seed, updates_ahead=0)
        case "… and packed, 80/20 by documents":
            return train_ours(packed_batches(seed, "documents"), seed, updates_ahead=0)
        case "… and packed, 80/20 by sequences":
            return train_ours(packed_batches(seed, "sequences"), seed, updates_ahead=0)
        case "… and update k with rate(k)":
            return train_ours(packed_batches(seed, "sequences"), seed, updates_ahead=1)
    raise ValueError(name)


VARIANTS = (
    "the original",
    "the original, restarted",
    "mean over tokens",
    "… and packed, 80/20 by documents",
    "… and packed, 80/20 by sequences",
    "… and update k with rate(k)",
)


def print_text() -> None:
    """Print padding and truncation of both programs, at the original's sequence length and at the one used here."""
    text, sources = quickstart_text(), packed_sources()
    lengths = np.array([len(document) for document in drawn(text, 0)])
    for limit in (ORIGINALS_LENGTH, SHAPE.max_seq_len):
        kept = np.minimum(lengths, limit)
        print(
            f"cut to {limit} tokens and padded: {1 - kept.sum() / (limit * len(kept)):.1%} of the positions are padding, "
            f"{1 - kept.sum() / lengths.sum():.1%} of the tokens are cut off"
        )
        low, quarter, three_quarters, high = np.quantile(token_weights(kept), (0, 0.25, 0.75, 1))
        print(
            f"  a mean of {ORIGINALS_ACCUMULATION} means of {BATCH} documents gives a token {low:.2f} to {high:.2f} times "
            f"the weight of a mean over tokens, {quarter:.2f} to {three_quarters:.2f} in half of the micro-batches"
        )
    padding = sum(int((source.document_ids < 0).sum()) for source in sources)
    print(
        f"packed to {SHAPE.max_seq_len}: {padding / sum(s.tokens.size for s in sources):.2%} padding, nothing cut off"
    )
    for mix_by in ("sequences", "documents"):
        rows = np.array([len(source) for source in sources])
        epochs = np.array(sequence_weights(mix_by)) / rows
        parts = [epochs * each for each in (rows, [len(text.bulk), len(text.logic)], _token_counts(text))]
        of_sequences, of_documents, of_tokens = (part[1] / part.sum() for part in parts)
        print(
            f"mix_by {mix_by}: the logic file has {of_sequences:.1%} of the sequences, {of_documents:.1%} of the documents, "
            f"{of_tokens:.1%} of the tokens"
        )


def token_weights(lengths: np.ndarray) -> np.ndarray:
    """Return [N, ORIGINALS_ACCUMULATION]: the weight of a token in a micro-batch over that in a mean over all tokens."""
    step = BATCH * ORIGINALS_ACCUMULATION
    tokens = lengths[: len(lengths) // step * step].reshape(-1, ORIGINALS_ACCUMULATION, BATCH).sum(2)
    return tokens.mean(1, keepdims=True) / tokens


def _token_counts(text: Text) -> list[int]:
    return [sum(map(len, documents)) for documents in (text.bulk, text.logic)]


def main() -> None:
    """Print padding and truncation, and a table of the variants: mean over the seeds, in brackets the extremes."""
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    print_text()
    print(
        "\n| variant | held-out prose | held-out problems | target tokens | processor seconds |\n|---|---|---|---|---|"
    )
    with ProcessPoolExecutor(
        len(seeds), multiprocessing.get_context("fork")
    ) as pool:  # forked processes share the text
        for name in VARIANTS:
            outcomes = list(pool.map(train_variant, [name] * len(seeds), seeds))
            losses = [[each.prose for each in outcomes], [each.problems for each in outcomes]]
            cells = [f"{np.mean(each):.3f} ({min(each):.3f}–{max(each):.3f})" for each in losses]
            tokens, seconds = (
                np.mean([getattr(each, figure) for each in outcomes]) for figure in ("tokens", "seconds")
            )
            print(f"| {name} | {' | '.join(cells)} | {tokens:,.0f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
