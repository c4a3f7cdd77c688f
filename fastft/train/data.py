"""From a file or the default set to token ids and labels: reading, the chat template, the mask
that keeps the loss on the response, truncation, and the batch collator."""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastft.errors import ConfigError, DataError
from fastft.train.config import DEFAULT_DATA, TrainConfig
from fastft.train.files import Example, read_examples

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "IGNORE_INDEX",
    "DataSplits",
    "check_sizes",
    "collator",
    "load_data",
    "positions",
    "prompt_ids",
    "tokenize_example",
]

# The label torch's cross entropy leaves out.
IGNORE_INDEX = -100


@dataclass
class DataSplits:
    """Tokenised data. ``notes`` say in words what was cut or left out."""

    train: Dataset
    eval: Dataset | None
    eval_examples: list[Example]
    notes: list[str] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Tokens of the longest training example."""
        return max(self.train["length"])

    @functools.cached_property
    def digest(self) -> str:
        """Of the training examples in their order."""
        found = hashlib.sha256()
        for column in ("length", "input_ids", "labels"):
            found.update(_flat(self.train, column).tobytes())
        return found.hexdigest()


def _flat(rows: Dataset, column: str) -> Any:
    """A column's numbers, one example after another: no Python object for each."""
    found = rows.data.column(column).combine_chunks()
    return (found if column == "length" else found.flatten()).to_numpy(zero_copy_only=False)


def load_data(cfg: TrainConfig, tokenizer: Any) -> DataSplits:
    """Reads, splits, tokenises and orders the data of ``cfg``.

    The training examples are shuffled once by ``cfg.seed``; the evaluation examples too, so that
    ``max_eval_samples`` takes a fair sample. The same seed gives the same order.
    """
    train, held_out = _read_splits(cfg)
    order = random.Random(cfg.seed)
    order.shuffle(train)
    order.shuffle(held_out)
    notes: list[str] = []
    train_rows, _ = _tokenize(train, cfg, tokenizer, "train", cfg.max_train_samples, notes)
    if not train_rows:
        raise DataError(
            cfg.data,
            "data",
            expected=f"at least one example that fits max_length={cfg.max_length}",
            got=f"{len(train)} examples, none of which fits",
            remedy=_room_remedy(cfg),
        )
    eval_rows, kept = _tokenize(held_out, cfg, tokenizer, "eval", cfg.max_eval_samples, notes)
    return DataSplits(_dataset(train_rows), _dataset(eval_rows) if eval_rows else None, kept, notes)


def _read_splits(cfg: TrainConfig) -> tuple[list[Example], list[Example]]:
    if cfg.data == DEFAULT_DATA:
        from fastft.train.stdlib_data import messages_of, split_items, stdlib_items

        splits = split_items(stdlib_items())
        train = [Example(messages=messages_of(item)) for item in splits["train"]]
        held_out = [Example(messages=messages_of(item)) for item in splits["validation"]]
    else:
        train, held_out = read_examples(cfg.data), []
    if cfg.eval_data:
        return train, read_examples(cfg.eval_data)
    if cfg.data == DEFAULT_DATA or cfg.eval_fraction == 0:
        return train, held_out
    # Held out by the seed; at least one example stays on each side.
    indices = list(range(len(train)))
    random.Random(cfg.seed).shuffle(indices)
    size = min(max(1, round(cfg.eval_fraction * len(train))), len(train) - 1)
    out = set(indices[:size])
    return (
        [example for i, example in enumerate(train) if i not in out],
        [train[i] for i in sorted(out)],
    )


def _tokenize(
    examples: list[Example],
    cfg: TrainConfig,
    tokenizer: Any,
    split: str,
    limit: int | None,
    notes: list[str],
) -> tuple[list[dict[str, list[int]]], list[Example]]:
    rows: list[dict[str, list[int]]] = []
    kept: list[Example] = []
    cut = dropped = 0
    for example in examples:
        if limit is not None and len(rows) >= limit:
            break
        input_ids, labels = tokenize_example(example, tokenizer, cfg.completion_only_loss)
        if len(input_ids) > cfg.max_length:
            if cfg.overlong == "drop":
                dropped += 1
                continue
            cut += 1
            input_ids, labels = input_ids[: cfg.max_length], labels[: cfg.max_length]
        # The first label is never predicted (the loss shifts by one), so it does not count.
        if all(label == IGNORE_INDEX for label in labels[1:]):
            dropped += 1
            continue
        rows.append({"input_ids": input_ids, "labels": labels})
        kept.append(example)
    if dropped:
        notes.append(
            f"{split}: {dropped} of {dropped + len(rows)} examples left out, "
            f"no room for the response in {cfg.max_length} tokens"
        )
    if cut:
        notes.append(f"{split}: {cut} of {len(rows)} examples cut at {cfg.max_length} tokens")
    return rows, kept


def _room_remedy(cfg: TrainConfig) -> str:
    if cfg.overlong == "drop":
        return "Raise max_length (of the demo: --length), or cut longer ones: overlong: truncate."
    return "Raise max_length: no response begins within it."


def _prefix(example: Example, tokenizer: Any, ids: list[int]) -> list[int]:
    """What the tokenizer puts before a text (Llama's beginning-of-sequence token), unless the ids
    begin with it; a chat template brings its own."""
    if tokenizer.chat_template and example.text is None:
        return []
    found = list(_prefix_of(tokenizer))
    return [] if ids[: len(found)] == found else found


@functools.lru_cache(maxsize=8)
def _prefix_of(tokenizer: Any) -> tuple[int, ...]:
    plain = _encode(tokenizer, "a")
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()


def tokenize_example(
    example: Example, tokenizer: Any, completion_only_loss: bool = True
) -> tuple[list[int], list[int]]:
    """``(input_ids, labels)`` of one example, uncut.

    Labels are the input ids where the model shall learn and -100 elsewhere (not shifted: the
    model's loss shifts them). With a chat template every assistant turn is learnt, including the
    token that ends it; without one, the completion and the end-of-sequence token.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    parts = _segments(example, tokenizer)
    for ids, (_, learnt) in zip(_ids_of(parts, tokenizer), parts, strict=True):
        input_ids += ids
        labels += ids if learnt or not completion_only_loss else [IGNORE_INDEX] * len(ids)
    prefix = _prefix(example, tokenizer, input_ids)
    return [*prefix, *input_ids], [*([IGNORE_INDEX] * len(prefix)), *labels]


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@functools.lru_cache(maxsize=8)
def _adds_in_front(tokenizer: Any) -> bool:
    """Whether a text has other tokens by itself than behind a line break."""
    apart = _encode(tokenizer, "\n") + _encode(tokenizer, "a")
    return _encode(tokenizer, "\na") != apart


def _ids_of(parts: list[tuple[str, bool]], tokenizer: Any) -> list[list[int]]:
    """The tokens of each segment. They end where it ends, so that a prompt's tokens are those seen
    at generation, but are those it has behind the segment before it: by itself a text may get a
    space in front (Llama 2, Mistral, Phi-3)."""
    encode = functools.partial(_encode, tokenizer)

    def behind(before: str, text: str) -> list[int]:
        # Where a token would reach over the border, a line break stands for what is before.
        for context in (before, "\n") if before else ():
            known, both = encode(context), encode(context + text)
            if both[: len(known)] == known:
                return both[len(known) :]
        return encode(text)

    texts = [text for text, _ in parts]
    if not _adds_in_front(tokenizer):
        return [encode(text) for text in texts]
    return [behind(*pair) for pair in itertools.pairwise(["", *texts])]


def prompt_ids(example: Example, tokenizer: Any) -> list[int]:
    """The token ids up to the last thing the model is to write: what generation starts from. Of
    plain text, the first half."""
    parts = _segments(example, tokenizer)
    if example.text is not None:
        ids = _encode(tokenizer, example.text)
        ids = ids[: max(1, len(ids) // 2)]
    else:
        last = max(i for i, (_, learnt) in enumerate(parts) if learnt)
        ids = list(itertools.chain.from_iterable(_ids_of(parts[:last], tokenizer)))
    return [*_prefix(example, tokenizer, ids), *ids]


def _segments(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    eos = tokenizer.eos_token or ""
    if example.text is not None:
        return [(example.text + eos, True)]
    if tokenizer.chat_template:
        return _chat_segments(example, tokenizer)
    if example.messages is None:
        return [(example.prompt or "", False), ((example.completion or "") + eos, True)]
    parts: list[tuple[str, bool]] = []
    for message in example.messages:
        learnt = message["role"] == "assistant"
        parts.append((f"{message['role']}: ", False))
        parts.append((message["content"] + (eos if learnt else "") + "\n", learnt))
    return parts


def _chat_segments(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    from jinja2 import TemplateError

    messages = example.as_messages()

    def render(upto: int, generation: bool = False) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(
                    messages[:upto], tokenize=False, add_generation_prompt=generation
                )
            )
        except (TemplateError, ValueError, TypeError, LookupError) as error:
            raise DataError(
                example.where,
                "messages",
                expected="a conversation that the model's chat template takes",
                got=str(error),
            ) from error

    full = render(len(messages))
    # A turn that opens the conversation is no answer to anything.
    turns = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
    if not turns:
        raise DataError(
            example.where, "messages", expected="a turn before the answer", got="the answer alone"
        )
    # Some templates rewrite earlier turns (they strip the reasoning): then the beginning of the
    # conversation is not a prefix of the whole, and only the last answer can be told apart.
    for chosen in (turns, turns[-1:]):
        parts: list[tuple[str, bool]] = []
        done = ""
        for turn in chosen:
            before, after = render(turn, generation=True), render(turn + 1)
            if not (before.startswith(done) and after.startswith(before)):
                break
            if not full.startswith(after):
                break
            # The line break a template puts behind the end token is not the model's to write.
            answer = after[len(before) :].rstrip()
            parts += [(before[len(done) :], False), (answer, True)]
            done = before + answer
        else:
            return [*parts, (full[len(done) :], False)] if full[len(done) :] else parts
    raise DataError(
        example.where,
        "chat template",
        expected="a template that puts the answer after its own generation prompt",
        got="one in which the answer cannot be told from the prompt",
        remedy="Render the conversations yourself and give them as 'text'.",
    )


def _dataset(rows: list[dict[str, list[int]]]) -> Dataset:
    from datasets import Dataset

    # `length` is what Trainer's length grouping reads.
    return Dataset.from_dict(
        {
            "input_ids": [row["input_ids"] for row in rows],
            "labels": [row["labels"] for row in rows],
            "length": [len(row["input_ids"]) for row in rows],
        }
    )


def check_sizes(data: DataSplits, model: Any, tokenizer: Any, cfg: TrainConfig) -> None:
    """Refuses tokens the model's embedding has no row for, and examples longer than its table of
    positions: a forward would end in an index out of range."""
    splits = [data.train, *([data.eval] if data.eval else [])]
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.pad_token_id, *(int(_flat(s, "input_ids").max()) for s in splits))
    if largest >= rows:
        raise ConfigError(
            "TrainConfig",
            "model",
            expected=f"a tokenizer of at most {rows} tokens, the rows of the model's embedding",
            got=f"token {largest}, {tokenizer.convert_ids_to_tokens(largest)!r}",
            remedy="It is another model's, or tokens were added without resizing the embedding.",
        )
    most = positions(model)
    fixed = cfg.padding == "max_length"
    longest = cfg.max_length if fixed else max(max(split["length"]) for split in splits)
    if most is not None and longest > most:
        raise ConfigError(
            "TrainConfig",
            "max_length",
            expected=f"at most {most}, the positions of the model",
            got=f"{cfg.max_length}, with examples of {longest} tokens",
        )


def positions(model: Any) -> int | None:
    """Of a model with a table of them; None where they are computed."""
    from torch import nn

    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    # Some families have a few rows more, which stand for padding.
    return most if most and any(most <= t.num_embeddings <= most + 8 for t in tables) else None


class _Padded:
    """Batches of a collator that pads, without the mask where it masks nothing: where the batch is
    later, asking takes a GPU's wait."""

    def __init__(self, pad: Any) -> None:
        self._pad = pad

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self._pad(examples)
        mask = batch.get("attention_mask")
        if mask is not None and bool(mask.all()):
            del batch["attention_mask"]
        return batch


def collator(cfg: TrainConfig, tokenizer: Any, most: int | None = None) -> Any:
    """Pads a batch: ids with the pad token, the attention mask with 0, labels with -100; or, with
    ``padding: none``, puts its examples one after another, with positions that begin anew.
    ``most``: what ``positions`` says of the model."""
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening

    if cfg.padding == "none":
        return DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    # In front, padding would move the positions of a model that counts them from the left.
    tokenizer = copy.copy(tokenizer)
    tokenizer.padding_side = "right"
    fixed = cfg.padding == "max_length"
    pad = DataCollatorForSeq2Seq(
        tokenizer,
        padding="max_length" if fixed else "longest",
        max_length=cfg.max_length if fixed else None,
        # Odd lengths make slow products; 8 is what tensor cores and vector units want. No length
        # is rounded up past the last position.
        pad_to_multiple_of=None if fixed or (most or 0) % 8 else 8,
        label_pad_token_id=IGNORE_INDEX,
    )
    return _Padded(pad)
