"""What the loss of a fine-tune is: the next byte of a text, or the label of one.

A task owns the model as SPSA sees it, draws batches by (step, slot) and measures the held-out part.
It knows nothing of peers; the same seed gives the same batches everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decotrain.data import Batches, SampleOrder, open_corpus, unigram_entropy
from decotrain.errors import ConfigError
from decotrain.finetune import base as bases
from decotrain.finetune.labelled import Labelled, open_set
from decotrain.finetune.settings import Settings
from decotrain.model import Transformer, loss_of

EVALUATION_BATCH = 32
Loss = Callable[[], Tensor]


class Classifier(nn.Module):
    """A body's features, averaged over the text, and a linear head that starts at zero.

    Zeros are the same on every machine, which drawn numbers need not be.
    """

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """tokens: (batch, time), zeros behind the text. Returns scores: (batch, classes)."""
        features = self.body.features(tokens)  # type: ignore[operator]
        inside = torch.arange(tokens.shape[1]) < lengths[:, None]
        mean = (features * inside[..., None]).sum(1) / lengths[:, None]
        scores: Tensor = self.head(mean)
        return scores


class TextTask:
    """The next byte of a text; nats for each byte."""

    word = "unigram"  # what a loss is compared with

    def __init__(self, settings: Settings, model: nn.Module, context: int) -> None:
        self.model, self.context, self.settings = model, context, settings
        self.corpus = open_corpus(settings.data.path, context)
        order = SampleOrder(len(self.corpus.train), context, settings.seed)
        self._batches = Batches(self.corpus, order, context, settings.batch)
        self.tokens_of_step = settings.batch * context

    @property
    def reference_nats(self) -> float:
        return unigram_entropy(self.corpus.held_out)

    def describe(self) -> str:
        megabytes = (len(self.corpus.train) + len(self.corpus.held_out)) / 1e6
        return f"text: {self.corpus.files} files, {megabytes:.1f} MB from {self.corpus.source}"

    def loss(self, step: int, slot: int) -> Loss:
        windows = torch.from_numpy(self._batches.at(step, slot))
        return lambda: loss_of(self.model, windows)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss over the same windows on every peer."""
        windows = self.corpus.held_out_windows(self.settings.held_out_windows, self.context)
        texts, total = torch.from_numpy(windows), 0.0
        for at in range(0, len(texts), EVALUATION_BATCH):
            some = texts[at : at + EVALUATION_BATCH]
            total += float(loss_of(self.model, some)) * len(some)
        return {"held_out": total / len(texts)}


class ClassifyTask:
    """The label of a text; nats for each text, and the part of labels that are right."""

    word = "prior"

    def __init__(self, settings: Settings, body: nn.Module, context: int) -> None:
        self.context, self.settings = context, settings
        self.set = open_set(settings.data.path)
        width = _width(body, settings.factory)
        self.model = Classifier(body, width, len(self.set.names)).eval()
        self.tokens_of_step = settings.batch * context

    @property
    def reference_nats(self) -> float:
        return self.set.prior_entropy()

    def describe(self) -> str:
        train, out = len(self.set.train.texts), len(self.set.held_out.texts)
        names = len(self.set.names)
        return f"texts: {train} and {out} held out, {names} labels, from {self.set.source}"

    def loss(self, step: int, slot: int) -> Loss:
        settings = self.settings
        rows = self.set.batch(step, slot, settings.batch, settings.seed, self.context)
        tokens, lengths, labels = map(torch.from_numpy, rows)
        return lambda: F.cross_entropy(self.model(tokens, lengths), labels)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy over the first of the held-out texts."""
        held_out: Labelled = self.set.held_out
        count = min(len(held_out.texts), self.settings.held_out_windows)
        loss, right = 0.0, 0
        for numbers in np.array_split(np.arange(count), -(-count // EVALUATION_BATCH)):
            tokens, lengths, labels = map(torch.from_numpy, held_out.rows(numbers, self.context))
            scores = self.model(tokens, lengths)
            loss += float(F.cross_entropy(scores, labels, reduction="sum"))
            right += int((scores.argmax(1) == labels).sum())
        return {"held_out": loss / count, "accuracy": right / count}


def _width(body: nn.Module, factory: str | None) -> int:
    """Of the body's features."""
    if isinstance(body, Transformer):
        return body.config.width
    features = getattr(body, "features", None)
    if features is None:
        raise ConfigError(
            f"factory={factory}: a model to classify with needs features(tokens), which returns"
            " (batch, time, width)"
        )
    with torch.no_grad():
        return int(features(torch.zeros(1, 1, dtype=torch.int64)).shape[-1])


Task = TextTask | ClassifyTask


def open_task(settings: Settings) -> Task:
    """The task with its base loaded."""
    assert settings.base is not None
    model, context = bases.build(settings, bases.find(settings.base))
    kind = TextTask if settings.task == "text" else ClassifyTask
    return kind(settings, model, context)
