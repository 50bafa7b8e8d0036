"""Initialization of the embedding and the head from the counts of token pairs (bigrams).

The first thing a language model learns is the table of bigrams, and a run of an hour spends a good part of its steps
on it. The table can be counted in a second from far more text than those steps see; here embedding and head are fitted
to it before the first step, as a model without blocks: logits = head · norm(embedding of the last token). The blocks,
which add nothing at first, start from there. Counts are smoothed, or a small text would be memorized: a token with n
different followers counts as if it had been followed n times more, by each token in proportion to its share of the
text (Witten & Bell 1991, method C).

Shapes: R rows (tokens that others follow), V vocabulary, C channels.
"""

import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from gptkit.data.token_shards import TokenStream
from gptkit.distributed.process_group import main_process

MAX_TOKENS = 1 << 24  # that are counted; more hardly change the frequent pairs
MAX_PER_ROW = 1 << 16  # followers of one token that are counted
MIN_TOKENS_PER_ID = 100  # of text for each id of the vocabulary; with less, pairs would be memorized
DEFAULT_STEPS = 50
LR = 0.02
BATCH = 1024  # tokens drawn per step, by frequency; each with the distribution of all its followers


@main_process
def initialize_from_bigrams(model: Any, tokens: TokenStream, n_steps: int | None, seed: int) -> None:
    """Fit embedding and head of a new model to the bigrams of `tokens`, where the head has weights of its own.

    n_steps None: DEFAULT_STEPS, or none where there is too little text.
    """
    vocab_size = model.config.vocab_size
    if n_steps is None:
        n_steps = DEFAULT_STEPS if len(tokens) >= MIN_TOKENS_PER_ID * vocab_size else 0
    if model.config.is_tied or not n_steps:
        return
    start = time.monotonic()
    loss = fit_to_bigrams(tokens, model.tok_emb.weight, model.head_weight, vocab_size, n_steps, seed)
    quality = f"{loss:.3f} nats per token, {time.monotonic() - start:.1f} s"
    print(f"start: embedding and head are fitted to token pairs, {quality}", flush=True)


def fit_to_bigrams(
    tokens: TokenStream, embedding: torch.Tensor, head: torch.Tensor, vocab_size: int, n_steps: int, seed: int
) -> float:
    """Fit embedding and head, each (V, C) parameters, by n_steps of Adam, and return the last loss in nats per token.

    Rows from vocab_size on are left alone. It draws only from its own random stream.
    """
    device = head.device
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32  # NumPy sorts 16 bits by radix, far faster
    row_ids = tokens.read(0, min(len(tokens), MAX_TOKENS), dtype)
    followers, row_ids = row_ids[1:], row_ids[:-1]
    followers = followers[np.argsort(row_ids, kind="stable")]
    counts = np.bincount(row_ids, minlength=vocab_size)
    starts = np.concatenate([[0], np.cumsum(counts)])
    random = np.random.default_rng([seed, 2])
    shares = counts / counts.sum()  # the share of each token in the text
    optimizer = torch.optim.AdamW([embedding, head], lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    loss = torch.zeros(())
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 5) * (1 - step / n_steps)
        rows, n_drawn = np.unique(random.choice(vocab_size, size=BATCH, p=shares), return_counts=True)
        target_rows = np.zeros((len(rows), vocab_size), np.float32)  # (R, V)
        for i, row in enumerate(rows):
            known = followers[starts[row] : starts[row + 1]]
            if len(known) > MAX_PER_ROW:
                known = random.choice(known, MAX_PER_ROW)
            counted = np.bincount(known, minlength=vocab_size)
            n_kinds = np.count_nonzero(counted)
            smoothed = (counted + n_kinds * shares) / (len(known) + n_kinds)
            target_rows[i] = smoothed * n_drawn[i] / BATCH
        target = torch.from_numpy(target_rows).to(device)
        hidden = F.rms_norm(embedding[torch.from_numpy(rows).to(device)], (embedding.shape[1],))  # (R, C)
        loss = -(target * F.log_softmax(hidden @ head[:vocab_size].T, dim=-1)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()
