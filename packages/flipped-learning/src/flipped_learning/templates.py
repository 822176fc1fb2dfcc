"""Prompt templates in promptsource's form, and the instances that they make: instruction text and instance text apart.

A template is Jinja, "prompt ||| target". The rendered prompt is cut where a value of the example stands in it; what is
left is the instruction. Nothing in a template file is executed but sandboxed Jinja.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, zip_longest
from numbers import Integral
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2 import Template as Compiled
from jinja2.sandbox import SandboxedEnvironment
from metazoo.errors import UserError

SEPARATOR = "|||"
# Private-use characters: around a value of the example, and in place of "|||" in one.
OPEN, CLOSE, PIPE = "\ue000", "\ue001", "\ue002"
RANDOM = ("choice", "random")
STATEMENTS = (nodes.Output, nodes.If, nodes.For, nodes.Assign, nodes.With, nodes.Scope)
NOT_INSTRUCTION = {"answer_choices", "label"}

# (negative, positive) words that label sentiment: in meta-training, and only in the test of label generalisation.
SEEN_PAIRS = (
    ("bad", "good"), ("terrible", "great"), ("worst", "best"), ("awful", "wonderful"), ("boring", "entertaining"),
    ("dull", "fascinating"),
)  # fmt: skip
NOVEL_PAIRS = (
    ("poor", "excellent"), ("stupid", "smart"), ("weak", "strong"), ("fails", "succeeds"), ("mediocre", "brilliant"),
    ("tedious", "engaging"), ("lame", "hilarious"),
)  # fmt: skip


class NoInstance(UserError):
    """An example that a template has no prompt for."""


def _field(value: object) -> str:
    return f"{OPEN}{value}{CLOSE}"


_ENVIRONMENT = SandboxedEnvironment(undefined=StrictUndefined)
_ENVIRONMENT.filters["flipped_learning_field"] = _field
_ENVIRONMENT.globals["zip"] = zip  # as in promptsource
del _ENVIRONMENT.globals["lipsum"]  # draws at random


@dataclass(frozen=True)
class Instance:
    """A prompted example.

    Attributes:
        pieces: instruction text before, between and after the fields; one more than fields, may be empty.
        fields: texts of the instance x, in order.
        options: label words.
        label: index of the right one; None: not known.
    """

    pieces: tuple[str, ...]
    fields: tuple[str, ...]
    options: tuple[str, ...]
    label: int | None

    @property
    def prompt(self) -> str:
        """The rendered prompt, byte for byte."""
        return "".join(chain.from_iterable(zip_longest(self.pieces, self.fields, fillvalue="")))


@dataclass(frozen=True)
class Template:
    """One template.

    Attributes:
        name: its name in the set.
        jinja: "prompt ||| target"; without a target the column `label` is the index or the text of the right option.
        choices: Jinja of the options, "one ||| two"; None: `apply` must be given options.
    """

    name: str
    jinja: str
    choices: str | None

    def apply(self, example: Mapping[str, object], options: Sequence[str] | None = None) -> Instance:
        """The instance of an example; `options` stand in for the template's own choices.

        Raises:
            NoInstance: nothing is rendered, a text is empty, there are not two different options, or the answer is none
                of them.
            UserError: a column is missing, or the template is not usable.
        """
        values = {key: _clean(value, "|||") for key, value in example.items() if key != "answer_choices"}
        label = values.get("label")
        if isinstance(label, Integral) and label < 0:  # as hub sets mark examples without a label
            raise NoInstance(f"template {self.name!r}: the label is {label}, no option: leave the example out")
        words = self._options(example, options)
        whole = "label" in values or not self._target_is_label
        source = self.jinja if whole else self._prompt_source
        rendered = self._render(_marked(source, self.name), {**values, "answer_choices": list(words)}, values)
        prompt, *targets = _parts(re.split(f"{OPEN}(.*?){CLOSE}", rendered, flags=re.DOTALL))
        if not any(prompt):
            raise NoInstance(f"template {self.name!r} renders to nothing for this example: leave the example out")
        pieces, fields = tuple(prompt[::2]), tuple(prompt[1::2])
        if not fields or not all(field.strip() for field in fields):
            raise NoInstance(f"template {self.name!r}: a text of the example is empty: leave the example out")
        if SEPARATOR in self.jinja and whole:
            if len(targets) != 1:
                raise NoInstance(f"template {self.name!r} gives {len(targets)} targets: one answer is needed")
            framed, right = self.answer("".join(targets[0]), words)
            return Instance(pieces, fields, framed, right)
        return Instance(pieces, fields, words, _label(label, words, self.name))

    @property
    def lists_options(self) -> bool:
        """Whether the prompt shows the options, or a word of them."""
        used = self._prompt_names
        if "answer_choices" in used:
            return True
        options = self.fixed_options
        if options is None:
            return self.choices is not None and bool(used & _undeclared(self.choices, self.name))
        tree = _parse(self._prompt_source, self.name)
        texts = [node.data for node in tree.find_all(nodes.TemplateData)]
        texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        instruction = "\n".join(texts)
        return any(_occurrences(option, instruction, re.IGNORECASE) for option in options)

    @property
    def is_open(self) -> bool:
        """Whether the prompt leaves open what the options are."""
        return not self.lists_options

    @property
    def takes_pairs(self) -> bool:
        """Whether any pair of label words can answer: open, the answer is the word alone, and it is no yes or no."""
        target = self.jinja.partition(SEPARATOR)[2].strip()
        if target and not re.fullmatch(r"\{\{\s*answer_choices\s*\[\s*label\s*\]\s*\}\}", target):
            return False
        return self.is_open and not {"yes", "no"} & {option.lower() for option in self.fixed_options or ()}

    @property
    def variables(self) -> frozenset[str]:
        """Columns that the prompt needs."""
        return frozenset(self._prompt_names - NOT_INSTRUCTION)

    @property
    def fixed_options(self) -> tuple[str, ...] | None:
        """The options, where they are the same for all examples."""
        if self.choices is None or _undeclared(self.choices, self.name):
            return None
        return tuple(
            option.strip() for option in self._render(_plain(self.choices, self.name), {}, {}).split(SEPARATOR)
        )

    @property
    def wants_label(self) -> bool:
        """Whether the column `label` says what the right option is."""
        return SEPARATOR not in self.jinja or "label" in _undeclared(self.jinja, self.name)

    def answer(self, target: str, options: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
        """Options and the index of the right one; a target with words around an option frames all options alike, and
        one that is a number (as of "||| {{label}}") is an index.

        Raises:
            NoInstance: the target is no option, nor has it exactly one in it.
        """
        if target in options:
            return options, options.index(target)
        if target.isdecimal() and int(target) < len(options):
            return options, int(target)
        found = [(at, spans) for at, option in enumerate(options) if (spans := _occurrences(option, target))]
        if len(found) != 1 or len(found[0][1]) != 1:
            shown = ", ".join(map(repr, options))
            raise NoInstance(f"template {self.name!r}: the answer {target!r} is not one of {shown}")
        label, ((start, end),) = found[0]
        return tuple(target[:start] + option + target[end:] for option in options), label

    def match(self, prompt: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """Pieces and fields of a prompt that this template rendered; the shortest fields that fit.

        None: the prompt is not of this template, or it cannot be told (control flow, adjacent fields, options that
        differ by example).
        """
        try:
            literals = self._literals()
        except UserError:
            return None
        if literals is None or not prompt.startswith(literals[0]):
            return None
        fields, at = [], len(literals[0])
        for number, literal in enumerate(literals[1:], 1):
            if number == len(literals) - 1:
                end = len(prompt) - len(literal) if prompt.endswith(literal) else -1
            else:
                end = prompt.find(literal, at + 1)
            if end <= at:
                return None
            fields.append(prompt[at:end])
            at = end + len(literal)
        return tuple(literals), tuple(fields)

    def _literals(self) -> list[str] | None:
        """The instruction around the fields, with the template's own options; None if it depends on the example."""
        tree = _parse(self._prompt_source, self.name)
        options = self.fixed_options
        shows = "answer_choices" in self._prompt_names
        if any(not isinstance(node, nodes.Output) for node in tree.body) or (shows and options is None):
            return None
        compiled = _marked(self._prompt_source, self.name, constant_fields=True)
        rendered = self._render(compiled, {"answer_choices": list(options or ())}, {})
        (texts,) = _parts(re.split(f"{OPEN}(.*?){CLOSE}", rendered, flags=re.DOTALL))
        literals = texts[::2]
        return literals if len(literals) > 1 and all(literals[1:-1]) else None

    def _options(self, example: Mapping[str, object], options: Sequence[str] | None) -> tuple[str, ...]:
        if options is None:
            if self.choices is None:
                raise UserError(f"template {self.name!r} has no answer_choices: give options")
            values = {key: _clean(value, PIPE) for key, value in example.items()}
            rendered = self._render(_plain(self.choices, self.name), values, values)
            options = [part.replace(PIPE, SEPARATOR) for part in rendered.split(SEPARATOR)]
        words = tuple(option.strip() for option in options)
        if len(words) < 2 or not all(words) or len(set(words)) < len(words):
            shown = ", ".join(map(repr, words))
            raise NoInstance(f"template {self.name!r}: the options are {shown}: give two or more different ones")
        return words

    def _render(self, compiled: Compiled, values: Mapping[str, object], columns: Mapping[str, object]) -> str:
        try:
            return compiled.render(values)
        except UndefinedError as error:
            missing = re.fullmatch(r"'(.*)' is undefined", error.message or "")
            if missing is None:  # an index that is not there, such as that of an option
                raise NoInstance(f"template {self.name!r}: {_line(error)}: leave the example out") from error
            raise UserError(
                f"template {self.name!r}: the data have no column {missing[1]!r}; they have "
                f"{', '.join(columns) or 'none'}: rename a column, or choose other templates with --template-names"
            ) from error
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise UserError(
                f"template {self.name!r} cannot be rendered ({_line(error)}): mend or leave it out"
            ) from error

    @property
    def _prompt_source(self) -> str:
        return _prompt_of(self.jinja, self.name)

    @property
    def _prompt_names(self) -> frozenset[str]:
        return _undeclared(self._prompt_source, self.name)

    @property
    def _target_is_label(self) -> bool:
        """Whether `label` is wanted by the target alone, so that examples without one can be prompted."""
        apart = self._prompt_source != self.jinja
        return apart and "label" in _undeclared(self.jinja, self.name) - self._prompt_names


def read_templates(path: Path) -> tuple[Template, ...]:
    """Templates of one templates.yaml in promptsource's format; those without answer_choices (generation) are skipped.

    Raises:
        UserError: no such file, not YAML, or no template with answer_choices in it.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({_line(error)}): check --templates") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: no YAML of templates ({_line(error)}): check --templates") from error
    entries = content.get("templates") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{path}: no `templates:` in it: give a templates.yaml of promptsource")
    templates = []
    for key, entry in entries.items():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("name", "jinja")):
            raise UserError(f"{path}: template {key}: give `name` and `jinja` as text")
        choices = entry.get("answer_choices")
        if choices is None:
            continue
        if not isinstance(choices, str):
            raise UserError(f"{path}: template {entry['name']!r}: answer_choices is no text: put it in quotes")
        templates.append(Template(entry["name"].strip(), entry["jinja"], choices))
    if not templates:
        raise UserError(f"{path}: no template has answer_choices: flipped learning needs options to choose from")
    return tuple(templates)


class _Loader(yaml.SafeLoader):
    """Plain YAML, with promptsource's two tags read as mappings."""


def _mapping(loader: yaml.SafeLoader, node: yaml.Node) -> dict[Any, Any]:
    assert isinstance(loader, _Loader)
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, "a template that is no mapping", node.start_mark)
    mapping: dict[Any, Any] = loader.construct_mapping(node, deep=True)
    return mapping


_Loader.add_constructor("!Template", _mapping)
_Loader.add_constructor("!TemplateMetadata", _mapping)


@lru_cache(maxsize=4096)
def _plain(source: str, name: str) -> Compiled:
    return _compiled(_parse(source, name), name)


@lru_cache(maxsize=4096)
def _marked(source: str, name: str, constant_fields: bool = False) -> Compiled:
    """The template, with a mark on each side of what it takes from the example; or of "x", to see what is literal."""
    tree = _parse(source, name)
    fixed = _instruction_names(tree)
    for output in tree.find_all(nodes.Output):
        for at, node in enumerate(output.nodes):
            if not isinstance(node, nodes.TemplateData) and _names(node) - fixed:
                inner = nodes.Const("x", lineno=node.lineno) if constant_fields else node
                output.nodes[at] = nodes.Filter(
                    inner, "flipped_learning_field", [], [], None, None, lineno=node.lineno, environment=_ENVIRONMENT
                )
    return _compiled(tree, name)


def _compiled(tree: nodes.Template, name: str) -> Compiled:
    try:
        return _ENVIRONMENT.from_string(tree)
    except TemplateError as error:
        raise UserError(f"template {name!r} is not usable ({_line(error)}): mend or leave it out") from error


def _parse(source: str, name: str) -> nodes.Template:
    try:
        tree = _ENVIRONMENT.parse(source)
    except TemplateSyntaxError as error:
        raise UserError(f"template {name!r} is no Jinja (line {error.lineno}: {_line(error)}): mend it") from error
    for used in tree.find_all(nodes.Filter):
        if used.name in RANDOM:
            raise UserError(
                f"template {name!r} draws at random (filter {used.name}): its prompt is not fixed, leave it"
            )
    for statement in tree.find_all(nodes.Stmt):
        if not isinstance(statement, STATEMENTS):
            kind = type(statement).__name__
            raise UserError(f"template {name!r} has a {kind} in it: only if, for, set and with are known, rewrite it")
    return tree


@lru_cache(maxsize=4096)
def _prompt_of(source: str, name: str) -> str:
    """Jinja of the prompt alone; of the whole where the target stands inside control flow."""
    prompt = source.partition(SEPARATOR)[0]
    try:
        _parse(prompt, name)
    except UserError:
        return source
    return prompt


@lru_cache(maxsize=4096)
def _undeclared(source: str, name: str) -> frozenset[str]:
    return frozenset(meta.find_undeclared_variables(_parse(source, name))) - set(_ENVIRONMENT.globals)


def _instruction_names(tree: nodes.Template) -> set[str]:
    """Variables whose value does not depend on the example: the options, and what is made of them or of constants."""
    fixed = {"answer_choices", "loop", *_ENVIRONMENT.globals}
    for node in tree.find_all((nodes.For, nodes.Assign)):
        assert isinstance(node, nodes.For | nodes.Assign)
        source = node.iter if isinstance(node, nodes.For) else node.node
        targets = {node.target.name} if isinstance(node.target, nodes.NSRef) else _names(node.target)
        if _names(source) <= fixed:
            fixed |= targets
        else:
            fixed -= targets
    return fixed


def _names(node: nodes.Node) -> set[str]:
    own = {node.name} if isinstance(node, nodes.Name) else set()
    return own | {name.name for name in node.find_all(nodes.Name)}


def _clean(value: object, pipe: str) -> object:
    """A value without our marks, "|||" in it written as `pipe`; lists and mappings as copies."""
    if isinstance(value, str):
        return re.sub(f"[{OPEN}{CLOSE}{PIPE}]", "", value).replace(SEPARATOR, pipe)
    if isinstance(value, Mapping):
        return {key: _clean(item, pipe) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item, pipe) for item in value]
    return value


def _parts(texts: list[str]) -> list[list[str]]:
    """Literal, field, literal, …, cut into prompt and targets at each "|||" in a literal; ends stripped, as in
    promptsource."""
    parts: list[list[str]] = [[]]
    for at, text in enumerate(texts):
        first, *others = text.split(SEPARATOR) if at % 2 == 0 else [text]
        parts[-1].append(first)
        parts += [[other] for other in others]
    for part in parts:
        for order, strip in ((range(len(part)), str.lstrip), (range(len(part) - 1, -1, -1), str.rstrip)):
            for at in order:
                part[at] = strip(part[at])
                if part[at]:
                    break
    return parts


def _label(label: object, options: tuple[str, ...], name: str) -> int | None:
    if label is None:
        return None
    if isinstance(label, Integral) and label < len(options):
        return int(label)
    if isinstance(label, str) and label.strip() in options:
        return options.index(label.strip())
    raise NoInstance(f"template {name!r}: the label {label!r} is not one of {', '.join(map(repr, options))}")


def _occurrences(option: str, text: str, flags: int = 0) -> list[tuple[int, int]]:
    """Where `option` stands in `text` as whole words."""
    return [found.span() for found in re.finditer(rf"(?<!\w){re.escape(option)}(?!\w)", text, flags)]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _templates(*rows: tuple[str, str, str]) -> tuple[Template, ...]:
    return tuple(
        Template(name, f"{prompt} ||| {{{{answer_choices[label]}}}}", choices) for name, prompt, choices in rows
    )


# Wording of promptsource (Apache-2.0) where it has the data set; columns renamed to text.
_SENTIMENT = (
    "Text Expressed Sentiment",
    "{{text}} What is the sentiment expressed in this text?",
    "negative ||| positive",
)
_MOVIES = (
    *_templates(
        (
            "Reviewer Opinion bad good choices",
            '{{text}} Did the reviewer find this movie {{"good or bad"}}?',
            "bad ||| good",
        ),
        _SENTIMENT,
        ("Sentiment with choices", '{{text}} \nIs this review {{"positive or negative"}}?', "negative ||| positive"),
        ("Reviewer Enjoyment Yes No", "{{text}} Did the reviewer enjoy the movie?", "No ||| Yes"),
        (
            "Reviewer Enjoyment",
            "{{text}} How does the reviewer feel about the movie?",
            "They didn't like it ||| They loved it",
        ),
        ("Movie Expressed Sentiment", "{{text}} The sentiment expressed for the movie is", "negative ||| positive"),
        (
            "Writer Expressed Sentiment",
            "{{text}} What sentiment does the writer express for the movie?",
            "negative ||| positive",
        ),
        (
            "Movie Expressed Sentiment 2",
            "The following movie review expresses what sentiment? {{text}}",
            "negative ||| positive",
        ),
        ("Reviewer Sentiment Feeling", "{{text}} How does the viewer feel about the movie?", "negative ||| positive"),
    ),
    Template(
        "Negation template for positive and negative",
        "{{text}} This is definitely not a ||| {{answer_choices[1-label]}} review.",
        "negative ||| positive",
    ),
)
_TREC = "Abbreviation ||| Entity ||| Description ||| Person ||| Location ||| Quantity"
_NEWS = "World politics ||| Sports ||| Business ||| Science and technology"

BUILTIN: dict[str, tuple[Template, ...]] = {
    "generated": _MOVIES,
    "mr": _MOVIES,
    "sst2": _templates(
        (
            "positive negative after",
            '{{text}}\nQuestion: Was that sentence {{"positive"}} or {{"negative"}}? Answer:',
            "negative ||| positive",
        ),
        (
            "said",
            'Someone just said to me "{{text}}".\n\nDo you think they are {{"sad"}} or {{"happy"}}?',
            "sad ||| happy",
        ),
        (
            "following positive negative",
            'Does the following sentence have a {{"positive"}} or {{"negative"}} sentiment?\n{{text}}',
            "negative ||| positive",
        ),
        _SENTIMENT,  # promptsource's of rotten_tomatoes: those of sst2 all list their options
    ),
    # promptsource's of amazon_polarity without the line of the title, which customer reviews do not have.
    "cr": _templates(
        (
            "Is_this_product_review_positive",
            "Is this product review positive?\nReview: {{text}}\nAnswer:",
            "No ||| Yes",
        ),
        ("Is_this_review_negative", "Review: {{text}}\nIs this product review negative?", "Yes ||| No"),
        (
            "user_satisfied",
            "Here is a review left by a customer on a product. Would you say he was {{answer_choices[1]}} or "
            "{{answer_choices[0]}}?\nReview: {{text}}",
            "dissatisfied ||| satisfied",
        ),
        (
            "flattering_or_not",
            "Product review: {{text}}\nWould you say this review depicts the product in a {{answer_choices[1]}} or "
            "{{answer_choices[0]}} light?",
            "unflattering ||| flattering",
        ),
        _SENTIMENT,  # promptsource's of rotten_tomatoes: an open one that is no yes-no question
    ),
    # promptsource has none of subj and mpqa.
    "subj": _templates(
        ("kind", "{{text}} What kind of sentence is this?", "subjective ||| objective"),
        (
            "listed",
            'Is the following sentence {{"subjective"}} or {{"objective"}}?\n{{text}}',
            "subjective ||| objective",
        ),
        ("review or plot", "{{text}} Does this sentence tell an opinion or the story?", "opinion ||| story"),
    ),
    "mpqa": _templates(
        ("expressed", "{{text}} What sentiment does this phrase express?", "negative ||| positive"),
        ("listed", 'Is the phrase "{{text}}" {{"positive"}} or {{"negative"}}?', "negative ||| positive"),
        ("opinion", "What is the opinion of someone who says: {{text}}", "negative ||| positive"),
    ),
    "trec": _templates(
        (
            "what_category_best_describe",
            "Categories: {{', '.join(answer_choices)}}\n\nWhat category best describes: {{text}} \nAnswer:",
            _TREC,
        ),
        ("trec1", "{{text}}\n\nIs this asking about {{(', ').join(answer_choices)}}?", _TREC),
    ),
    "rte": _templates(
        ("GPT-3 style", "{{premise}}\nQuestion: {{hypothesis}} True or False?", "True ||| False"),
        ("guaranteed true", 'Given {{premise}} Is it guaranteed true that "{{hypothesis}}"? Yes or no?', "Yes ||| No"),
    ),
    "ag_news": _templates(
        ("classify_question_first", "What label best describes this news article?\n{{text}}", _NEWS),
        (
            "recommend",
            'Would you recommend the following article to a {{"politician"}}, an {{"athlete"}}, a '
            '{{"business executive"}}, or a {{"scientist"}}?\n\n{{text}}',
            "Politician ||| Athlete ||| Business executive ||| Scientist",
        ),
    ),
    "paws": _templates(
        (
            "Concatenation-no-label",
            "Sentence 1: {{sentence1}}\nSentence 2: {{sentence2}}\nQuestion: Does Sentence 1 paraphrase Sentence 2?",
            "No ||| Yes",
        ),
    ),
}  # fmt: skip
