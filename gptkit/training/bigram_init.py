"""A start for the embedding and the head from counts of which token follows which.

The first thing a language model learns is the table of bigrams, and a run of an hour spends a good part of its steps
on it. The table can be counted in a second from far more text than those steps see; here embedding and head are fitted
to it before the first step, as the model without its blocks: logits = head · norm(embedding of the last token). Its
blocks, which begin by adding nothing, then start where it ends. Counts are smoothed, or a small text would be learnt by
heart: a token with n kinds of followers is taken to have been followed n times more, by any token as often as that
token stands in the text (Witten & Bell 1991, method C).

Shapes: R rows (tokens that others follow), V vocabulary, C channels.
"""

import numpy as np
import torch
from torch.nn import functional as F

from gptkit.data.token_shards import TokenStream

MAX_TOKENS = 1 << 24  # counted; more of them change frequent pairs little
MAX_PER_ROW = 1 << 16  # followers looked at for one token
MIN_TOKENS_PER_WORD = 100  # of text for each token of the vocabulary; of less, pairs would be learnt by heart
LR = 0.02
BATCH = 1024  # tokens drawn a step, by frequency; each stands for all that is known to follow it


def fit_to_bigrams(
    tokens: TokenStream, embedding: torch.Tensor, head: torch.Tensor, vocab_size: int, n_steps: int, seed: int
) -> float:
    """Fit embedding and head, each (V, C) parameters, by n_steps of Adam; the last loss in nats a token.

    Rows from vocab_size on are left alone. Draws from no random stream but its own.
    """
    device = head.device
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32  # sorted by radix, in no time
    row_ids = tokens.read(0, min(len(tokens), MAX_TOKENS), dtype)
    followers, row_ids = row_ids[1:], row_ids[:-1]
    followers = followers[np.argsort(row_ids, kind="stable")]
    counts = np.bincount(row_ids, minlength=vocab_size)
    starts = np.concatenate([[0], np.cumsum(counts)])
    random = np.random.default_rng([seed, 2])
    alone = counts / counts.sum()  # the share of each token in the text
    optimizer = torch.optim.AdamW([embedding, head], lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    loss = torch.zeros(())
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / 5) * (1 - step / n_steps)
        rows, n_drawn = np.unique(random.choice(vocab_size, size=BATCH, p=alone), return_counts=True)
        following = np.zeros((len(rows), vocab_size), np.float32)  # (R, V)
        for i, row in enumerate(rows):
            known = followers[starts[row] : starts[row + 1]]
            if len(known) > MAX_PER_ROW:
                known = random.choice(known, MAX_PER_ROW)
            times = np.bincount(known, minlength=vocab_size)
            n_kinds = np.count_nonzero(times)
            smoothed = (times + n_kinds * alone) / (len(known) + n_kinds)
            following[i] = smoothed * n_drawn[i] / BATCH
        target = torch.from_numpy(following).to(device)
        features = F.rms_norm(embedding[torch.from_numpy(rows).to(device)], (embedding.shape[1],))  # (R, C)
        loss = -(target * F.log_softmax(features @ head[:vocab_size].T, dim=-1)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()
