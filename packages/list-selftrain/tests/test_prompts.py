"""Templates: pieces, rendering, tokens, cutting and label words (the card's exact check 8)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from list_selftrain.config import Config
from list_selftrain.model import train_tokenizer
from list_selftrain.prompts import TEMPLATES, PromptTemplate, template_for
from metazoo.errors import UserError
from transformers import BertTokenizerFast

SST2 = TEMPLATES["sst2"]
MNLI = TEMPLATES["mnli"]
CORPUS = [
    "a b it was great",
    "he left. she left? no, it was terrible",
    "this is a film so great that it was so great",
] * 5


@pytest.fixture(scope="module")
def roberta() -> Any:
    return train_tokenizer(CORPUS, 300, ("great", "terrible", "No", "Yes", "Maybe"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", ",", "##s"]
    words = [*marks, "a", "b", "it", "was", "great", "terrible", "he", "left", "she", "yes", "no", "maybe"]
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(words))
    return BertTokenizerFast(str(path), do_lower_case=True)


# ---- rendering


def test_rendering_of_the_card() -> None:
    """Check 8."""
    assert SST2.render(("a b",)) == "<s>a b It was<mask>.</s>"
    assert MNLI.render(("He left.", "She Left")) == "<s>He left?<mask>, she Left</s>"
    assert PromptTemplate("*mask**sent-_0*", ("a", "b")).render(("He left.",)) == "<mask>He left"
    assert PromptTemplate("*mask**sent_0**+sentl_1*", ("a", "b")).render(("x", "She Left")) == "<mask>x she Left"


@pytest.mark.parametrize(
    ("name", "texts", "wanted"),
    [
        ("subj", ("so it is",), "<s>so it is This is<mask>.</s>"),
        ("cola", ("so it is",), "<s>so it is This is<mask>.</s>"),
        ("trec", ("Who left ?",), "<s><mask>: Who left ?</s>"),
        ("rte", ("A b.", "C d."), "<s>A b?<mask>, c d.</s>"),
        ("qqp", ("A b?", "C d?"), "<s>A b?<mask>, c d?</s>"),
        ("mrpc", ("A b.", "C d."), "<s>A b.<mask>, c d.</s>"),
        ("generated", ("A b",), "<s>A b It was<mask>.</s>"),
    ],
)
def test_rendering_of_the_tasks(name: str, texts: tuple[str, ...], wanted: str) -> None:
    assert TEMPLATES[name].render(texts) == wanted
    assert TEMPLATES[name].sentences == len(texts)


def test_rendering_with_a_tokenizers_marks(bert: Any) -> None:
    assert SST2.render(("a b",), bert) == "[CLS]a b It was[MASK].[SEP]"


def test_variants_of_a_sentence() -> None:
    pieces = {
        "sent_0": "He left.", "+sent_0": " He left.", "sent-_0": "He left", "sentl_0": "he left.",
        "+sentl_0": " he left.", "+sent-l_0": " he left", "sent-l_0": "he left",
    }  # fmt: skip
    for piece, wanted in pieces.items():
        template = PromptTemplate(f"*{piece}**mask*", ("a", "b"))
        assert template.render(("He left.",)) == f"{wanted}<mask>"
        assert template.render(("",)) == ("<mask>" if "+" not in piece else " <mask>")


def test_words_of_the_tasks_in_the_order_of_their_classes() -> None:
    assert SST2.words == ("terrible", "great")
    assert TEMPLATES["sst5"].words == ("terrible", "bad", "okay", "good", "great")
    assert MNLI.words == ("No", "Yes", "Maybe")
    assert TEMPLATES["trec"].words[2] == "Expression"
    assert set(TEMPLATES) == {
        "generated", "sst2", "mr", "cr", "mpqa", "sst5", "subj", "trec", "cola", "mnli", "snli", "rte", "qnli", "qqp",
        "mrpc",
    }  # fmt: skip


# ---- from LM-BFF


def test_mapping_of_lmbff() -> None:
    text = PromptTemplate.from_lmbff(SST2.template, "{'0':'terrible','1':'great'}")
    assert text == SST2 == PromptTemplate.from_lmbff(SST2.template, {0: "terrible", 1: "great"})
    nli = "{'contradiction':'No','entailment':'Yes','neutral':'Maybe'}"
    assert PromptTemplate.from_lmbff(MNLI.template, nli) == MNLI
    for mapping in ("{'0'", "['a', 'b']", "__import__('os')", {0: 1, 1: "a"}):
        with pytest.raises(UserError, match="give a dictionary"):
            PromptTemplate.from_lmbff(SST2.template, mapping)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "words", "message"),
    [
        ("*cls**sent_0**sep+*", ("a", "b"), "0 masks"),
        ("*sent_0**mask**mask*", ("a", "b"), "2 masks"),
        ("*sent_0**mask**label_0*", ("a", "b"), r"unknown piece \*label_0\*"),
        ("*sent_0**mask**sent_2*", ("a", "b"), "unknown piece"),
        ("*mask**sent_1*", ("a", "b"), "no first sentence"),
        ("*sent_0**mask*", ("a",), "two or more"),
        ("*sent_0**mask*", ("a", "a"), "the same"),
        ("*sent_0**mask*5*", ("a", "b"), "has no partner"),
    ],
)
def test_refused_templates(template: str, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PromptTemplate(template, words)


# ---- tokens


def test_tokens_of_roberta(roberta: Any) -> None:
    ids, mask = SST2.encode(("a b",), roberta, 128)
    tokens = roberta.convert_ids_to_tokens(ids)
    assert tokens[:3] == ["<s>", "a", "Ġb"]
    assert tokens[mask] == "<mask>"
    assert tokens[mask:] == ["<mask>", ".", "</s>"]
    assert tokens.count("<mask>") == 1
    assert roberta.decode(ids) == SST2.render(("a b",))


def test_tokens_of_bert(bert: Any) -> None:
    ids, mask = SST2.encode(("a b",), bert, 128)
    assert bert.convert_ids_to_tokens(ids) == ["[CLS]", "a", "b", "it", "was", "[MASK]", ".", "[SEP]"]
    assert mask == 5
    ids, mask = MNLI.encode(("He left.", "She Left"), bert, 128)
    assert bert.convert_ids_to_tokens(ids) == ["[CLS]", "he", "left", "?", "[MASK]", ",", "she", "left", "[SEP]"]
    assert mask == 4


def test_pieces_are_tokenized_alone(roberta: Any) -> None:
    """No merge across the end of a sentence: "a" + "b" are not the token "ab", were there one."""
    template = PromptTemplate("*sent_0*reat*mask*", ("a", "b"))
    ids, _ = template.encode(("g",), roberta, 128)
    assert ids[0] == roberta.convert_tokens_to_ids("g")
    assert ids[1:-1] == roberta("reat", add_special_tokens=False)["input_ids"]


@given(st.integers(0, 30), st.integers(0, 30), st.integers(9, 70))
def test_cutting_by_hand(bert: Any, first: int, second: int, limit: int) -> None:
    """The template stays, the longer sentence loses its end until both are alike, and no token is cut in vain."""
    template = PromptTemplate("*cls**sent_0*?*mask*,*+sent_1**sep+*", ("yes", "no"))
    texts = (" ".join(["a"] * first), " ".join(["b"] * second))
    room = limit - 5
    ids, mask = template.encode(texts, bert, limit)
    tokens = bert.convert_ids_to_tokens(ids)
    a, b = tokens.count("a"), tokens.count("b")
    assert tokens == ["[CLS]", *["a"] * a, "?", "[MASK]", ",", *["b"] * b, "[SEP]"]
    assert tokens[mask] == "[MASK]"
    assert len(ids) == min(limit, 5 + first + second)
    if first + second > room:
        assert abs(a - b) <= 1 or (a == first and b > a) or (b == second and a > b)


def test_template_that_does_not_fit(bert: Any) -> None:
    assert len(SST2.encode(("a b a b",), bert, 7)[0]) == 7  # one token of the sentence is left
    for limit in (2, 6):
        with pytest.raises(UserError, match=f"no place for a sentence in {limit} tokens"):
            SST2.encode(("a b a b",), bert, limit)
    with pytest.raises(UserError, match="no place"):
        SST2.encode(("",), bert, 5)
    assert len(SST2.encode(("",), bert, 6)[0]) == 6


def test_too_few_sentences(bert: Any) -> None:
    for call in (lambda: MNLI.render(("a",)), lambda: MNLI.encode(("a",), bert, 50)):
        with pytest.raises(UserError, match="wants 2 sentences, an example has 1"):
            call()


def test_tokenizer_without_a_mark(bert: Any) -> None:
    class Without:
        cls_token_id, sep_token_id, mask_token_id = None, 1, 2

    with pytest.raises(UserError, match=r"no token for \*cls\*"):
        SST2.encode(("a",), Without(), 50)


# ---- label words


def test_label_words_are_one_token(roberta: Any, bert: Any) -> None:
    ids = SST2.label_ids(roberta)
    assert roberta.convert_ids_to_tokens(ids) == ["Ġterrible", "Ġgreat"]
    assert bert.convert_ids_to_tokens(SST2.label_ids(bert)) == ["terrible", "great"]
    assert bert.convert_ids_to_tokens(MNLI.label_ids(bert)) == ["no", "yes", "maybe"]


def test_label_words_that_are_not(roberta: Any, bert: Any) -> None:
    with pytest.raises(UserError, match=r"'magnificent' is not one token of this model but \d+: .*t"):
        PromptTemplate(SST2.template, ("great", "magnificent")).label_ids(roberta)
    with pytest.raises(UserError, match=r"'magnificent' is not one token of this model but 1: \[UNK\]"):
        PromptTemplate(SST2.template, ("great", "magnificent")).label_ids(bert)
    with pytest.raises(UserError, match=r"'so great' is not one token of this model but 2: Ġso Ġgreat"):
        PromptTemplate(SST2.template, ("so great", "terrible")).label_ids(roberta)
    with pytest.raises(UserError, match="the same token"):  # uncased
        PromptTemplate(SST2.template, ("Great", "great")).label_ids(bert)


# ---- settings


def test_template_of_the_settings() -> None:
    two = ("0", "1")
    assert template_for(Config(dataset="subj"), two) == TEMPLATES["subj"]
    words = Config(dataset="subj", words=("good", "bad"))
    assert template_for(words, two) == PromptTemplate(TEMPLATES["subj"].template, ("good", "bad"))
    own = Config(dataset="a.csv", template="*sent_0**mask*", words=("x", "y"))
    assert template_for(own, two) == PromptTemplate("*sent_0**mask*", ("x", "y"))
    for config in (Config(dataset="a.csv"), replace(own, template=None), replace(own, words=())):
        with pytest.raises(UserError, match=r"a\.csv has no template of its own: give --template"):
            template_for(config, two)
    with pytest.raises(UserError, match="2 label words for the 3 classes a, b, c"):
        template_for(Config(dataset="subj"), ("a", "b", "c"))
