"""Files of users, good and bad; the mask; truncation; order; the collator."""

import json
import pickle

import pytest

from fastft.errors import DataError
from fastft.train.config import TrainConfig
from fastft.train.data import IGNORE_INDEX, collator, load_data, prompt_ids, tokenize_example
from fastft.train.files import Example, read_examples
from tests.train.tiny import CHAT_TEMPLATE, make_tokenizer

CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "uno"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "dos"},
]


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def learnt(tokenizer, input_ids, labels):
    """The text the loss is on; every label is the id it stands at, or -100."""
    assert len(input_ids) == len(labels)
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(input_ids, labels))
    return tokenizer.decode([label for label in labels if label != IGNORE_INDEX])


class TestFiles:
    def test_the_three_kinds_in_jsonl(self, tmp_path):
        rows = [{"messages": CHAT}, {"prompt": "p", "completion": "c", "id": 3}, {"text": "t"}]
        text = "\n".join(map(json.dumps, rows)) + "\n\n"
        assert read_examples(write(tmp_path, "a.jsonl", text)) == [
            Example(messages=CHAT),
            Example(prompt="p", completion="c"),
            Example(text="t"),
        ]

    def test_json_list_and_csv(self, tmp_path):
        rows = [{"prompt": "p, q", "completion": 'c "d"\ne'}]
        expected = [Example(prompt="p, q", completion='c "d"\ne')]
        assert read_examples(write(tmp_path, "a.json", json.dumps(rows))) == expected
        text = 'prompt,completion\n"p, q","c ""d""\ne"\n'
        assert read_examples(write(tmp_path, "a.csv", text)) == expected

    def test_csv_with_messages_as_json_and_a_byte_order_mark(self, tmp_path):
        cell = json.dumps(CHAT).replace('"', '""')
        path = write(tmp_path, "a.csv", f'\ufeffmessages\n"{cell}"\n')
        assert read_examples(path) == [Example(messages=CHAT)]

    def test_a_long_field_in_a_csv(self, tmp_path):
        path = write(tmp_path, "a.csv", "text\n" + "word " * 40_000 + "\n")
        assert len(read_examples(path)[0].text) == 200_000

    def test_line_separators_inside_json(self, tmp_path):
        path = write(tmp_path, "a.jsonl", json.dumps({"text": "a\u2028b"}, ensure_ascii=False))
        assert read_examples(path) == [Example(text="a\u2028b")]

    @pytest.mark.parametrize(
        ("name", "text", "parts"),
        [
            ("a.txt", "x", ["a file ending in .jsonl", "'.txt'"]),
            ("a.jsonl", "", ["at least one example", "an empty file"]),
            ("a.jsonl", '{"text": "a"}\n{"text": \n', ["a.jsonl:2", "valid JSON"]),
            ("a.jsonl", '{"text": "a"}\n["b"]\n', ["a.jsonl:2", "a list"]),
            ("a.jsonl", '{"promt": "a", "completion": "b"}', [":1", "'promt'", "'prompt'"]),
            ("a.jsonl", '{"prompt": "a"}', ["'prompt' and 'completion'", "got 'prompt'"]),
            ("a.jsonl", '{"text": 3}', ["text", "a int"]),
            ("a.jsonl", '{"text": " "}', ["not empty"]),
            ("a.jsonl", '{"prompt": "a", "completion": ""}', ["completion", "not empty"]),
            ("a.jsonl", '{"messages": []}', ["a list of messages", "an empty list"]),
            ("a.jsonl", '{"prompt": null, "completion": "a"}', [":1", "prompt", "got nothing"]),
            ("a.csv", "prompt,completion\na\n", ["a.csv:2", "completion", "got nothing"]),
            ("a.jsonl", '{"text": "a \\ud800 b"}', [":1", "Unicode text", "surrogates"]),
            ("a.jsonl", "[" * 100_000, [":1", "valid JSON", "recursion"]),
            ("a.jsonl", '{"messages": [{"role": "user"}]}', ["messages[1]", "'content'"]),
            (
                "a.jsonl",
                '{"messages": [{"role": "asistant", "content": "x"}]}',
                ["messages[1]", "did you mean 'assistant'"],
            ),
            (
                "a.jsonl",
                '{"messages": [{"role": "user", "content": "x"}]}',
                ["at least one assistant turn", "got user"],
            ),
            ("a.json", '{"text": "a"}', ["a list of examples", "a dict"]),
            ("a.csv", "question,answer\na,b\n", ["a.csv:2", "'question', 'answer'"]),
            ("a.csv", "prompt,completion\na,b,c\n", ["a.csv:2", "as many fields"]),
            ("a.csv", "prompt,completion\n", ["at least one example"]),
            ("a.csv", 'text\na\n"b\nc\nd\n', ["a.csv:3", "a quote not closed"]),
            ("a.csv", 'text,n\n"a,1\nb,"2"\nc,3\n', ["a.csv:2", "a quote not closed"]),
            ("a.json", '{"text": "a"}\n{"text": "b"}\n', ["valid JSON", "Name it .jsonl"]),
            ("a.jsonl", '{"text": null, "n": 1}', [":1: text", "got nothing"]),
        ],
    )
    def test_bad_files(self, tmp_path, name, text, parts):
        with pytest.raises(DataError) as caught:
            read_examples(write(tmp_path, name, text))
        for part in parts:
            assert part in str(caught.value)

    def test_not_utf8_and_missing(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"text": "\xff"}')
        with pytest.raises(DataError, match="UTF-8"):
            read_examples(path)
        with pytest.raises(DataError, match="a readable file"):
            read_examples(tmp_path / "none.jsonl")


class TestMask:
    def test_every_assistant_turn_and_nothing_else(self, tokenizer):
        input_ids, labels = tokenize_example(Example(messages=CHAT), tokenizer)
        assert tokenizer.decode(input_ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
        assert learnt(tokenizer, input_ids, labels) == "uno<|im_end|>dos<|im_end|>"

    def test_prompt_and_completion_are_two_turns(self, tokenizer):
        pair = Example(prompt="one", completion="uno")
        assert tokenize_example(pair, tokenizer) == tokenize_example(
            Example(messages=CHAT[:2]), tokenizer
        )

    def test_without_a_template(self):
        tokenizer = make_tokenizer(chat_template=None)
        input_ids, labels = tokenize_example(Example(prompt="a: ", completion="b"), tokenizer)
        assert tokenizer.decode(input_ids) == "a: b<|im_end|>"
        assert learnt(tokenizer, input_ids, labels) == "b<|im_end|>"
        input_ids, labels = tokenize_example(Example(messages=CHAT[:2]), tokenizer)
        assert learnt(tokenizer, input_ids, labels) == "uno<|im_end|>\n"

    def test_text_is_learnt_whole(self, tokenizer):
        input_ids, labels = tokenize_example(Example(text="abc"), tokenizer)
        assert labels == input_ids
        assert tokenizer.decode(input_ids) == "abc<|im_end|>"

    def test_loss_on_the_prompt_when_asked(self, tokenizer):
        input_ids, labels = tokenize_example(
            Example(messages=CHAT), tokenizer, completion_only_loss=False
        )
        assert labels == input_ids

    def test_template_that_rewrites_earlier_turns(self):
        # As reasoning models do: only the last answer is shown whole.
        template = CHAT_TEMPLATE.replace(
            "{{ m['content'] }}",
            "{{ m['content'] if loop.last or m['role'] == 'user' else 'short' }}",
        )
        tokenizer = make_tokenizer(template)
        input_ids, labels = tokenize_example(Example(messages=CHAT), tokenizer)
        assert learnt(tokenizer, input_ids, labels) == "dos<|im_end|>"
        assert "short" in tokenizer.decode(input_ids)

    def test_template_from_which_no_answer_can_be_cut(self):
        tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}"
                                   "{% if add_generation_prompt %}GO{% endif %}")  # fmt: skip
        with pytest.raises(DataError, match="its own generation prompt"):
            tokenize_example(Example(messages=CHAT), tokenizer)

    @pytest.mark.parametrize(
        ("template", "messages", "text"),
        [
            ("{{ raise_exception('no system role') }}", CHAT, "no system role"),
            ("{% for %}", CHAT, "Expected an expression"),
            (CHAT_TEMPLATE, [CHAT[1]], "a turn before the answer"),
        ],
    )
    def test_a_conversation_that_the_template_refuses(self, tmp_path, template, messages, text):
        path = write(tmp_path, "a.jsonl", json.dumps({"messages": messages}))
        with pytest.raises(DataError, match=rf"a\.jsonl:1: messages: .*{text}"):
            load_data(TrainConfig(data=str(path)), make_tokenizer(template))

    def test_a_turn_that_opens_the_conversation_is_not_learnt(self, tokenizer):
        input_ids, labels = tokenize_example(Example(messages=[CHAT[1], *CHAT[2:]]), tokenizer)
        assert learnt(tokenizer, input_ids, labels) == "dos<|im_end|>"
        assert "uno" in tokenizer.decode(input_ids)

    def test_prompt_ids_are_the_ids_before_the_last_answer(self, tokenizer):
        input_ids, _ = tokenize_example(Example(messages=CHAT), tokenizer)
        asked = prompt_ids(Example(messages=CHAT), tokenizer)
        assert input_ids[: len(asked)] == asked
        assert tokenizer.decode(asked).endswith("<|im_start|>assistant\n")
        assert "dos" not in tokenizer.decode(asked)


class TestPrefix:
    """A base model's tokenizer that puts a token before every text."""

    @pytest.fixture
    def beginning(self):
        from tokenizers.processors import TemplateProcessing

        tokenizer = make_tokenizer(chat_template=None)
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
        return tokenizer

    @pytest.mark.parametrize(
        "example",
        [
            Example(prompt="Hi ", completion="yo"),
            Example(text="Hi yo"),
            Example(messages=CHAT),
        ],
    )
    def test_is_that_of_generation(self, beginning, example):
        first = beginning("Hi ")["input_ids"]
        input_ids, labels = tokenize_example(example, beginning)
        assert input_ids[0] == first[0] == beginning.bos_token_id
        assert labels[0] == IGNORE_INDEX
        assert input_ids.count(beginning.bos_token_id) == 1
        prompt = prompt_ids(example, beginning)
        assert prompt == input_ids[: len(prompt)]
        if example.prompt:
            assert prompt == first

    def test_is_not_put_before_a_text_that_has_it(self, beginning):
        bos = beginning.bos_token
        for example in (Example(text=f"{bos}Hi yo"), Example(prompt=f"{bos}Hi ", completion="yo")):
            assert tokenize_example(example, beginning)[0].count(beginning.bos_token_id) == 1
            assert prompt_ids(example, beginning).count(beginning.bos_token_id) == 1

    def test_a_chat_template_brings_its_own(self, beginning):
        beginning.chat_template = CHAT_TEMPLATE
        input_ids, _ = tokenize_example(Example(messages=CHAT), beginning)
        assert input_ids[:2] == beginning.encode("<|im_start|>u", add_special_tokens=False)
        assert tokenize_example(Example(text="a"), beginning)[0][:2] == beginning("a")["input_ids"]


class TestSpaceInFront:
    """A tokenizer that puts a space in front of a text, as those of Llama 2, Mistral and Phi-3."""

    @pytest.fixture
    def spaced(self):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        special = ["<|im_start|>", "<|im_end|>"]
        pieces = [*special, *map(chr, range(33, 127)), "\n", "\u2581", "\u2581d"]
        tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [("\u2581", "d")]))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|im_end|>",
            additional_special_tokens=special,
            chat_template=CHAT_TEMPLATE,
        )

    def test_a_turn_has_the_tokens_of_the_whole(self, spaced):
        input_ids, labels = tokenize_example(Example(messages=CHAT), spaced)
        text = spaced.apply_chat_template(CHAT, tokenize=False)
        assert input_ids == spaced(text, add_special_tokens=False)["input_ids"]
        assert learnt(spaced, input_ids, labels) == "uno<|im_end|>dos<|im_end|>"
        asked = prompt_ids(Example(messages=CHAT), spaced)
        assert asked == input_ids[: len(asked)]

    def test_a_token_over_the_border_is_two(self, spaced):
        """The prompt's tokens are those of generation, and no second space comes behind them."""
        spaced.chat_template = None
        example = Example(prompt="a ", completion="dos")
        input_ids, _ = tokenize_example(example, spaced)
        prompt = spaced("a ", add_special_tokens=False)["input_ids"]
        assert prompt_ids(example, spaced) == prompt == input_ids[: len(prompt)]
        assert spaced.convert_ids_to_tokens(input_ids[len(prompt) :]) == [*"dos", "<|im_end|>"]


class TestLoad:
    def config(self, data_file, **changes):
        return TrainConfig(data=str(data_file), max_length=128, **changes)

    def test_holds_out_a_tenth_and_no_example_twice(self, data_file, tokenizer):
        data = load_data(self.config(data_file), tokenizer)
        assert (len(data.train), len(data.eval)) == (43, 5)
        texts = [tokenizer.decode(row["input_ids"]) for part in (data.train, data.eval)
                 for row in part]  # fmt: skip
        assert len(set(texts)) == 48

    def test_order_is_the_seeds(self, data_file, tokenizer):
        rows = [load_data(self.config(data_file, seed=seed), tokenizer).train["input_ids"]
                for seed in (1, 1, 2)]  # fmt: skip
        assert list(rows[0]) == list(rows[1])
        assert list(rows[0]) != list(rows[2])

    def test_a_file_of_its_own_to_evaluate_on(self, data_file, tokenizer):
        data = load_data(self.config(data_file, eval_data=str(data_file)), tokenizer)
        assert (len(data.train), len(data.eval)) == (48, 48)

    def test_no_evaluation(self, data_file, tokenizer):
        assert load_data(self.config(data_file, eval_fraction=0), tokenizer).eval is None

    def test_limits(self, data_file, tokenizer):
        cfg = self.config(data_file, max_train_samples=7, max_eval_samples=2)
        data = load_data(cfg, tokenizer)
        assert (len(data.train), len(data.eval), len(data.eval_examples)) == (7, 2, 2)

    def test_truncates_and_says_so(self, tmp_path, tokenizer):
        rows = [{"text": "a" * n} for n in (10, 300)]
        path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
        data = load_data(self.config(path, eval_fraction=0), tokenizer)
        assert sorted(data.train["length"]) == [11, 128]
        assert data.notes == ["train: 1 of 2 examples cut at 128 tokens"]

    def test_drops_when_asked(self, tmp_path, tokenizer):
        rows = [{"text": "a" * n} for n in (10, 300)]
        path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
        data = load_data(self.config(path, eval_fraction=0, overlong="drop"), tokenizer)
        assert list(data.train["length"]) == [11]
        assert data.notes[0].startswith("train: 1 of 2 examples left out")

    def test_an_answer_that_was_cut_away_is_not_trained_on(self, tmp_path, tokenizer):
        path = write(tmp_path, "a.jsonl", json.dumps({"prompt": "a" * 300, "completion": "b"}))
        with pytest.raises(DataError, match="none of which fits"):
            load_data(self.config(path, eval_fraction=0), tokenizer)

    @pytest.mark.parametrize("padding", ["longest", "max_length"])
    def test_collator(self, data_file, padding):
        tokenizer = make_tokenizer()
        tokenizer.padding_side = "left"  # as for generation
        cfg = self.config(data_file, padding=padding)
        data = load_data(cfg, tokenizer)
        rows = [{k: data.train[i][k] for k in ("input_ids", "labels")} for i in range(4)]
        batch = collator(cfg, tokenizer)(rows)
        assert tokenizer.padding_side == "left"
        width = batch["input_ids"].shape[1]
        assert width == 128 if padding == "max_length" else width % 8 == 0
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (width - n)
            assert batch["labels"][i].tolist() == row["labels"] + [IGNORE_INDEX] * (width - n)
            assert batch["input_ids"][i, n:].eq(tokenizer.pad_token_id).all()
        whole = [{"input_ids": [5] * width, "labels": [5] * width}] * 2
        batch = pickle.loads(pickle.dumps(collator(cfg, tokenizer)))(whole)  # as workers get it
        assert sorted(batch) == ["input_ids", "labels"], "what has no padding has no mask"
