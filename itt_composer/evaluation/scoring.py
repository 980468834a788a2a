"""Log-likelihoods of answers, each context run once for all of its answers.

The answers to one question share their context, which holds most of the tokens. So a batch of questions is scored in
two passes: the contexts fill a cache, and the answers continue from a copy of it.

G questions of a batch, R answers of them, P context tokens, C answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Question:
    """A context and the answers that continue it."""

    context: list[int]
    answers: dict[tuple[int, ...], None] = field(default_factory=dict)
    """Inputs after the context, in order, each once: answers without their last token."""
    requests: list[tuple[int, list[int]]] = field(default_factory=list)
    """Number of the request, and its answer."""
    longest: int = 0
    """C of the longest answer."""

    def add(self, number: int, answer: list[int]) -> None:
        """Add one request."""
        self.answers[tuple(answer[:-1])] = None
        self.requests.append((number, answer))
        self.longest = max(self.longest, len(answer))

    @property
    def shape(self) -> tuple[int, int, int]:
        """R, and the longest P and C."""
        return len(self.answers), len(self.context) - 1, self.longest


def log_likelihoods(
    model: nn.Module,
    requests: list[tuple[list[int], list[int]]],
    batch_tokens: int,
    max_length: int,
    on_done: Callable[[int, float, bool], None] | None = None,
) -> list[tuple[float, bool]]:
    """Return the log-likelihood of each answer after its context, and whether greedy decoding would give it.

    Args:
        model: a causal language model of transformers, with causal routing.
        requests: context and answer of each, at least one token both, and together at most ``max_length + 1``.
        batch_tokens: tokens of one batch, padding included.
        max_length: the model's longest context.
        on_done: called with the number of each request as it is done, and its result.
    """
    results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    for batch in _batches(_questions(requests, batch_tokens), batch_tokens, max_length):
        logits = _logits(model, batch)
        row = 0
        for question in batch:
            rows = {answer: row + i for i, answer in enumerate(question.answers)}
            row += len(rows)
            for number, answer in question.requests:
                log_p_CV = logits[rows[tuple(answer[:-1])], : len(answer)].float().log_softmax(-1)
                answer_C = torch.tensor(answer, device=log_p_CV.device)
                likelihood = log_p_CV.gather(1, answer_C[:, None]).sum().item()
                results[number] = likelihood, bool((log_p_CV.argmax(-1) == answer_C).all())
                if on_done is not None:
                    on_done(number, *results[number])
    return results


def _questions(requests: list[tuple[list[int], list[int]]], batch_tokens: int) -> list[Question]:
    """Group requests by context, the longest first: what does not fit into memory fails immediately.

    A context with more answers than a batch holds makes several questions.
    """
    questions, open_questions = [], dict[tuple[int, ...], Question]()
    for number, (context, answer) in enumerate(requests):
        question, inputs = open_questions.get(tuple(context)), tuple(answer[:-1])
        if question is not None and inputs not in question.answers:
            rows, P, C = question.shape
            if (rows + 1) * (P + max(C, len(answer))) > batch_tokens:
                question = None
        if question is None:
            question = open_questions[tuple(context)] = Question(context)
            questions.append(question)
        question.add(number, answer)
    return sorted(questions, key=lambda question: -sum(question.shape[1:]))


def _batches(questions: list[Question], batch_tokens: int, max_length: int) -> Iterator[list[Question]]:
    batch: list[Question] = []
    R = P = C = 0
    for question in questions:
        rows, context, answer = question.shape
        length = max(P, context) + max(C, answer)
        if batch and ((R + rows) * length > batch_tokens or length > max_length):
            yield batch
            batch, R, P, C = [], 0, 0, 0
        batch.append(question)
        R, P, C = R + rows, max(P, context), max(C, answer)
    if batch:
        yield batch


@torch.inference_mode()
def _logits(model: nn.Module, batch: list[Question]) -> Tensor:
    """Return [R, C, V]: logits after the context's last token, and after each token of the answer but the last."""
    device = next(model.parameters()).device
    rows = [(g, answer) for g, question in enumerate(batch) for answer in question.answers]
    P, C = max(q.shape[1] for q in batch), max(q.shape[2] for q in batch)
    # The last token of the context is run with the answers, so that its logits are there for each.
    contexts = [question.context[:-1] for question in batch]
    length_G = torch.tensor([len(context) for context in contexts], device=device)
    ids_RC = torch.tensor([_right(batch[g].context[-1:] + list(answer), C) for g, answer in rows], device=device)
    if P == 0:
        return model(input_ids=ids_RC, use_cache=False).logits
    index_R = torch.tensor([g for g, _ in rows], device=device)
    mask_GP = torch.arange(P, device=device) >= P - length_G[:, None]
    cache = model(
        input_ids=torch.tensor([_left(context, P) for context in contexts], device=device),
        attention_mask=mask_GP.long(),
        position_ids=(mask_GP.cumsum(-1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    cache.batch_select_indices(index_R)
    return model(
        input_ids=ids_RC,
        attention_mask=torch.cat((mask_GP[index_R].long(), torch.ones_like(ids_RC)), dim=1),
        position_ids=length_G[index_R][:, None] + torch.arange(C, device=device),
        past_key_values=cache,
        use_cache=True,
    ).logits


def _left(tokens: list[int], length: int) -> list[int]:
    return [0] * (length - len(tokens)) + tokens


def _right(tokens: list[int], length: int) -> list[int]:
    return tokens + [0] * (length - len(tokens))
