"""The default data set: deterministic, no module on two sides, no duplicates, no docstring left
in a source."""

import ast

import pytest

from fastft.errors import DataError
from fastft.train.stdlib_data import messages_of, split_items, stdlib_items


@pytest.fixture(scope="module")
def items():
    return stdlib_items()


@pytest.fixture(scope="module")
def splits(items):
    return split_items(items)


def test_size(items):
    # 5,290 in Python 3.11; other versions differ by a few hundred.
    assert 4500 < len(items) < 6500


def test_the_same_each_time(items):
    assert stdlib_items() == items


def test_no_duplicates(items):
    assert len({item.source for item in items}) == len(items)
    assert len({item.docstring for item in items}) == len(items)


def test_splits_are_disjoint_by_module_and_complete(items, splits):
    modules = {name: {item.module for item in part} for name, part in splits.items()}
    assert not modules["train"] & modules["validation"]
    assert not modules["train"] & modules["test"]
    assert not modules["validation"] & modules["test"]
    assert sum(map(len, splits.values())) == len(items)


def test_split_sizes_are_near_80_10_10(items, splits):
    share = {name: len(part) / len(items) for name, part in splits.items()}
    assert share["train"] == pytest.approx(0.8, abs=0.03)
    assert share["validation"] == pytest.approx(0.1, abs=0.03)
    assert share["test"] == pytest.approx(0.1, abs=0.03)


def test_split_does_not_depend_on_the_order_of_modules(items, splits):
    by_module = sorted(items, key=lambda item: item.module[::-1])
    again = split_items(by_module)
    assert {i.module for i in again["test"]} == {i.module for i in splits["test"]}


def test_sources_parse_and_hold_no_docstring(items):
    for item in items:
        (node,) = ast.parse(item.source).body
        assert item.name.endswith(node.name)
        assert ast.get_docstring(node) is None or ast.get_docstring(node) != item.docstring
        assert len(item.docstring) >= 20


def make_library(tmp_path, **files):
    for name, text in files.items():
        path = tmp_path / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


DOC = '"""Returns one more than the number."""'


def test_what_counts_as_an_example(tmp_path):
    root = make_library(
        tmp_path,
        a=f"def f(x):\n    {DOC}\n    # kept\n    return x + 1\n",
        b="def no_docstring(x):\n    return x\n",
        c=f"def only_docstring(x):\n    {DOC[:-3]} twice.{DOC[-3:]}\n",
        d='def short(x):\n    """Too short."""\n    return x\n',
        e="def broken(:\n",
        test__t=f"def in_tests(x):\n    {DOC}\n    return x\n",
        g='class C:\n    @property\n    def p(self):\n        """A property of the class C."""\n'
        "        return 1\n",
        h='def one_line(): "A docstring on the line of the def"; return 1\n',
    )
    found = {f"{item.module}:{item.name}": item.source for item in stdlib_items(root)}
    assert found == {
        "a:f": "def f(x):\n    # kept\n    return x + 1",
        "g:C.p": "@property\ndef p(self):\n    return 1",
        "h:one_line": "def one_line():\n    return 1",
    }


def test_text_at_column_zero(tmp_path):
    source = f'class C:\n    def f(self):\n        {DOC}\n        return """\nat zero\n"""\n'
    (item,) = stdlib_items(make_library(tmp_path, a=source))
    (node,) = ast.parse(item.source).body
    assert node.body[0].value.value == "\nat zero\n"


def test_a_library_without_sources(tmp_path):
    with pytest.raises(DataError, match="no documented function"):
        stdlib_items(tmp_path)


def test_messages(items):
    user, assistant = messages_of(items[0])
    assert items[0].source in user["content"]
    assert items[0].docstring not in user["content"]
    assert assistant == {"role": "assistant", "content": items[0].docstring}
