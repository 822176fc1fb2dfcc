"""Instances re-assemble to the prompt; promptsource's files are read, and refused where they cannot be used."""

import re

import pytest
from flipped_learning.templates import BUILTIN, NOVEL_PAIRS, SEEN_PAIRS, Instance, NoInstance, Template, read_templates
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Environment
from metazoo.errors import UserError

ALL = [(name, template) for name, templates in BUILTIN.items() for template in templates]
ODD = st.text(st.sampled_from("ab {}|%#\n'\"\ue000\ue001\ue002é"), min_size=1, max_size=20)
COLUMNS = ("text", "premise", "hypothesis", "sentence1", "sentence2")
LISTED = Template("listed", '{{text}} Is it {{"good or bad"}}? ||| {{ answer_choices [label] }}', "bad ||| good")
ASKED = Template("asked", "{{text}} What is it? ||| {{answer_choices[label]}}", "bad ||| good")
NEGATED = Template("negated", "{{text}} Not a ||| {{ answer_choices [1-label]}} review.", "negative ||| positive")
YAML = """dataset: films
templates:
  aaaa: !Template
    answer_choices: bad ||| good
    id: aaaa
    jinja: '{{text}}

      Is it {{"good"}} or {{"bad"}}? ||| {{ answer_choices [label] }}'
    metadata: !TemplateMetadata
      choices_in_prompt: true
      metrics: [Accuracy]
    name: 'with choices '
    reference: ''
  bbbb: !Template
    answer_choices: null
    jinja: 'Write a review. ||| {{text}}'
    name: generation
"""


def naive(template: Template, example: dict[str, object]) -> list[str]:
    """Prompt and target as promptsource renders them."""
    protected = {key: v.replace("|||", "<pipe>") if isinstance(v, str) else v for key, v in example.items()}
    options = [part.strip() for part in str(template.choices).split("|||")]
    rendered = Environment().from_string(template.jinja).render(**protected, answer_choices=options)
    return [part.replace("<pipe>", "|||").strip() for part in rendered.split("|||")]


@pytest.mark.parametrize(("name", "template"), ALL, ids=[f"{name}-{template.name}" for name, template in ALL])
def test_pieces_and_fields_give_the_prompt_byte_for_byte(name, template):
    for label in (0, 1):
        example = {column: f"{column} ||| {{{{x}}}} {{%\n é." for column in COLUMNS} | {"label": label}
        instance = template.apply(example)
        prompt, target = naive(template, example)
        assert instance.prompt == prompt
        assert instance.options[instance.label] == target
        assert len(instance.pieces) == len(instance.fields) + 1
        assert not any("||| {{x}}" in piece for piece in instance.pieces)
        assert any(piece.strip() for piece in instance.pieces)
        assert template.match(prompt) == (instance.pieces, instance.fields)


@settings(max_examples=60, deadline=None)
@given(ODD, ODD)
def test_odd_texts_stay_whole(first, second):
    template = Template("two", "A {{a}}{{b}} B {{a}} ||| {{answer_choices[label]}}", "x ||| y")
    clean = [re.sub("[\ue000-\ue002]", "", text) for text in (first, second)]
    example = {"a": first, "b": second, "label": 1}
    if not all(text.strip() for text in clean):
        with pytest.raises(NoInstance, match="empty"):
            template.apply(example)
        return
    instance = template.apply(example)
    a, b = clean
    assert instance.prompt == f"A {a}{b} B {a}".strip()
    assert instance.pieces == ("A ", "", " B ", "")
    assert instance.fields == (a, b, a.rstrip())


def test_options_replace_the_templates_own():
    assert ASKED.apply({"text": "x", "label": 1}, ("dull", "lively")) == Instance(
        ("", " What is it?"), ("x",), ("dull", "lively"), 1
    )
    shown = Template(
        "shown", "{{answer_choices[1]}} or {{answer_choices[0]}}? {{text}} ||| {{answer_choices[label]}}", "a|||b"
    )
    assert shown.apply({"text": "x", "label": 0}, ("dull", "lively")).pieces == ("lively or dull? ", "")
    assert NEGATED.apply({"text": "x", "label": 0}).options == ("negative review.", "positive review.")
    assert NEGATED.apply({"text": "x", "label": 0}).label == 1
    assert NEGATED.apply({"text": "x", "label": 1}, ("dull", "lively")).options == ("dull review.", "lively review.")


def test_label_column_without_a_target():
    bare = Template("bare", "{{text}} What is it?", "bad ||| good")
    assert [bare.apply({"text": "x", "label": label}).label for label in (1, "bad")] == [1, 0]
    assert bare.apply({"text": "x"}).label is None
    assert ASKED.apply({"text": "x"}).label is None  # nothing to learn from, but something to predict
    assert Template("none", "{{text}} What?", None).apply({"text": "x"}, ("a", "b")).options == ("a", "b")


def test_options_of_the_example():
    template = Template("qa", "{{q}} ||| {{answer_choices[key]}}", '{{options | join("|||")}}')
    instance = template.apply({"q": "why?", "options": ["so ||| so", "no"], "key": 1})
    assert instance.options == ("so ||| so", "no")
    assert instance.label == 1
    assert template.fixed_options is None
    assert not template.lists_options


def test_instruction_of_loops_over_options():
    template = Template(
        "loop", "{{text}}{% for o in answer_choices %} {{o}}{% endfor %} ||| {{answer_choices[label]}}", "a ||| b"
    )
    assert template.apply({"text": "x", "label": 0}).pieces == ("", " a b")
    assert template.match("x a b") is None  # control flow
    words = Template("loop", "{% for w in words %}{{w}},{% endfor %} which? ||| {{answer_choices[label]}}", "a ||| b")
    assert words.apply({"words": ["x", "y"], "label": 0}).fields == ("x", "y")


@pytest.mark.parametrize(
    ("template", "example", "message"),
    [
        (
            Template("t", "{% if label == 5 %}{{text}}?{% endif %} ||| a", "a ||| b"),
            {"text": "x", "label": 0},
            "nothing",
        ),
        (Template("t", "{{text}}? ||| c", "a ||| b"), {"text": "x"}, "not one of"),
        (Template("t", "{{text}}? ||| a or b", "a ||| b"), {"text": "x"}, "not one of"),
        (Template("t", "{{text}}? ||| a", "a"), {"text": "x"}, "two or more"),
        (Template("t", "{{text}}? ||| a", "a ||| a"), {"text": "x"}, "two or more"),
        (Template("t", "{{text}}? ||| a", "a ||| "), {"text": "x"}, "two or more"),
        (Template("t", "{{text}}? ||| a ||| b", "a ||| b"), {"text": "x"}, "2 targets"),
        (Template("t", "What?", "a ||| b"), {"text": "x"}, "empty"),
        (ASKED, {"text": " \n", "label": 0}, "empty"),
        (ASKED, {"text": "x", "label": -1}, "is -1"),
        (ASKED, {"text": "x", "label": 2}, "leave the example out"),
        (Template("t", "{{text}}?", "a ||| b"), {"text": "x", "label": 2}, "not one of"),
    ],
)
def test_examples_without_a_prompt(template, example, message):
    with pytest.raises(NoInstance, match=message) as caught:
        template.apply(example)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        ("{{body}}? ||| a", "no column 'body'; they have text, label"),
        ("{{text | choice}} ||| a", "at random"),
        ("{{[1, 2] | random}} ||| a", "at random"),
        ("{{text | nofilter}} ||| a", "nofilter"),
        ("{{text ||| a", "no Jinja"),
        ("{% set x %}{{text}}{% endset %}{{x}} ||| a", "AssignBlock"),
        ("{% include 'x' %}{{text}} ||| a", "Include"),
        ("{{text + 1}} ||| a", "cannot be rendered"),
        ("{{text.__class__.__mro__}} ||| a", "cannot be rendered|no column|leave the example out"),
    ],
)
def test_unusable_templates(jinja, message):
    with pytest.raises(UserError, match=message) as caught:
        Template("t", jinja, "a ||| b").apply({"text": "x", "label": 0})
    assert "\n" not in str(caught.value)


def test_no_options_at_all():
    with pytest.raises(UserError, match="give options"):
        Template("t", "{{text}}?", None).apply({"text": "x"})


def test_open_and_listing_templates():
    assert LISTED.lists_options
    assert not LISTED.is_open
    assert ASKED.is_open
    assert ASKED.takes_pairs
    assert not NEGATED.takes_pairs
    assert not Template("t", "{{text}} Is it? ||| {{answer_choices[label]}}", "No ||| Yes").takes_pairs
    assert Template("t", "{{text}} GOOD? ||| {{answer_choices[label]}}", "bad ||| good").lists_options
    assert not Template("t", "{{text}} goodness? ||| {{answer_choices[label]}}", "bad ||| good").lists_options
    for name in ("generated", "mr", "sst2", "cr", "mpqa"):
        assert any(template.takes_pairs for template in BUILTIN[name])
    assert ASKED.variables == {"text"}
    assert BUILTIN["rte"][0].variables == {"premise", "hypothesis"}


def test_match_refuses_what_is_not_of_the_template():
    assert ASKED.match("x What is it?") == (("", " What is it?"), ("x",))
    assert ASKED.match("x What was it?") is None
    assert ASKED.match(" What is it?") is None
    assert Template("t", "{{a}}{{b}}?", "a ||| b").match("xy?") is None
    assert Template("t", "{{a}} or {{answer_choices[0]}}?", "{{b}} ||| c").match("x or y?") is None


def test_pairs():
    words = [word for pair in (*SEEN_PAIRS, *NOVEL_PAIRS) for word in pair]
    assert (len(SEEN_PAIRS), len(NOVEL_PAIRS), len(set(words))) == (6, 7, 26)


def test_yaml_of_promptsource(tmp_path):
    path = tmp_path / "templates.yaml"
    path.write_text(YAML)
    (template,) = read_templates(path)
    assert (template.name, template.choices) == ("with choices", "bad ||| good")
    instance = template.apply({"text": "a film", "label": 1})
    assert instance.prompt == "a film\nIs it good or bad?"
    assert instance.pieces == ("", "\nIs it good or bad?")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "no YAML"),
        ("x: !!python/object/apply:os.getcwd []", "no YAML"),
        ("x: !Template [1]", "no YAML"),
        ("- 1", "no `templates:`"),
        ("templates: {}", "no `templates:`"),
        ("templates: {a: {jinja: b}}", "give `name`"),
        ("templates: {a: {jinja: b, name: c, answer_choices: true}}", "quotes"),
        ("templates: {a: {jinja: b, name: c}}", "no template has answer_choices"),
    ],
)
def test_refused_yaml(tmp_path, content, message):
    path = tmp_path / "templates.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_templates(path)
    assert "\n" not in str(caught.value)


def test_missing_yaml(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_templates(tmp_path / "none.yaml")


def test_a_target_that_is_an_index() -> None:
    """A column of label texts becomes an index on the way in: "||| {{label}}" then renders a number."""
    template = Template("t", "{{text}} Good or bad? ||| {{label}}", "bad ||| good")
    assert template.apply({"text": "fine", "label": 1}).label == 1
    with pytest.raises(NoInstance, match="not one of"):
        template.apply({"text": "fine", "label": 2})
