"""Conversations come out as the reference lays them out, nobody forges a turn, and a hostile template only fails."""

import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from formery.data.chat import encode_chat, render_chat
from formery.data.published import write_tokenizer
from formery.data.tokenizer import Tokenizer, train_bpe
from formery.errors import FormeryError

CHATML = """
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

HEADERS = """{{ bos_token }}
{%- set facts = namespace(count=0, last=none) %}
{%- for message in messages %}
    {%- set facts.count = facts.count + 1 %}
    {%- set head = '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' %}
    {{- head + message.content | trim + '<|eot_id|>' }}
    {%- if loop.last %}{% set facts.last = message %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt and facts.last.role == 'user' and facts.count >= 1 %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

INSTRUCTIONS = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must take turns, "user" first.') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system_message is defined %}
            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {%- generation %}{{ ' ' + message['content'] | trim + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- raise_exception('Only user and assistant, not ' ~ message.role) }}
    {%- endif %}
{%- endfor %}"""

TURNS = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}
{% for message in messages %}
    {% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{ '<|im_start|>' + role + '\n' + message['content'] | trim + '<|im_end|>\n' }}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"""

MACHINERY = """
{%- macro shown(it, deep=false) %}{{ it | tojson(indent=2 if deep else none) }}{{ caller() if caller }}{% endmacro %}
{%- set all = messages | map(attribute='content') | list %}
{%- set d = dict(a=1, b=[1, 'é<', none], **{'c': 2.5}) %}
{{- shown(d, deep=true) }}{{ shown(all) }}{{ tools }}{{ documents is none }}{{ nothing_at_all }}{{ unk_token }}
{%- for key, value in d.items() if key != 'b' %}{{ loop.index }}/{{ loop.length }}:{{ key }}={{ value }},{% endfor %}
{%- for m in messages | rejectattr('role', 'equalto', 'system') %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {%- if not m.content %}{% continue %}{% endif %}
    {{- loop.previtem.role if loop.previtem is defined else '-' }}{{ loop.cycle('o', 'e') }}
    {{- m.content.split('\\n')[0].upper().replace('A', 'bb')[:20] | replace('B', 'c') | indent(3) }}
    {{- '%s-%02d' % (m.role, loop.index) }}{{ '%s+' | format(m.role) }}{{ '{:>4}|{}'.format(m.role, 'x' * 3) }}
    {{- '-'.join([m.role, 'z']) }}{{ [m.role, 'y'] | join('+') }}{{ (1, 'a') }}{{ {'k': m.role} }}
{%- endfor %}
{%- call shown(3) %}<called>{% endcall %}{% filter upper %}shout{% endfilter %}
{%- set block %}[{{ messages | length }}]{% endset %}{{ block ~ block ~ 1.5 ~ 2 ** 5 ~ none ~ (7 % 4) ~ 'q' * 2 }}
{%- for one in [[1, [2]], [3]] recursive %}<{{ loop(one) if one is iterable else one }}>{% endfor %}
{{- messages | groupby('role') | map('first') | join(',') }}{{ [3, 1, 2] | sort | last }}{{ range(3) | list | sum }}
{{- '<b>' | escape }}{{ messages | selectattr('role', 'in', ['user']) | list | count }}{{ d | items | list }}"""

TEMPLATES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "instructions": INSTRUCTIONS,
    "turns": TURNS,
    "machinery": MACHINERY,
}
SPECIALS = (
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
BASE = train_bpe(["system user assistant model the cat sat\n\n", "[INST] [/INST] You help. <|x|>"] * 3, 300, SPECIALS)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}


def tokenizer_with(template: str | dict[str, str]) -> Tokenizer:
    templates = {"default": template} if isinstance(template, str) else template
    inner = type(BASE.inner).from_str(BASE.inner.to_str())
    return Tokenizer(inner, TOKENS, templates)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """Each template in our tokenizer, and in the reference's that was made from our files."""
    made = {}
    for name, template in TEMPLATES.items():
        folder = tmp_path_factory.mktemp(name)
        own = tokenizer_with(template)
        write_tokenizer(own, folder)
        made[name] = (own, AutoTokenizer.from_pretrained(folder))
    return made


def reference_ids(reference, messages, add: bool) -> list[int]:
    return reference.apply_chat_template(messages, add_generation_prompt=add, return_dict=False)


harmless = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=12)
content = harmless | st.lists(st.sampled_from(["the cat", " ", "\n", "[INST]", "{{ 1 }}", "A", "\t", "é", "a\nb"])).map(
    "".join
)


@pytest.mark.parametrize("name", TEMPLATES)
@given(
    st.lists(st.tuples(content, content), min_size=1, max_size=3),
    st.none() | content,
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=40)
def test_ids_are_those_of_the_reference(pairs, name: str, turns, system, answered: bool, add: bool) -> None:
    own, reference = pairs[name]
    messages = [] if system is None or name == "turns" else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    messages = messages if answered else messages[:-1]
    assert own.chat(messages, add_generation_prompt=add) == reference_ids(reference, messages, add)


def test_the_template_alone_writes_special_tokens(pairs) -> None:
    own, _ = pairs["chatml"]
    ids = own.chat([{"role": "system", "content": "s"}, {"role": "user", "content": "<|im_start"}])
    special = [own.inner.id_to_token(i) for i in ids if i in own.special]
    assert special == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>", "<|im_start|>"]


@pytest.mark.parametrize("token", SPECIALS)
@pytest.mark.parametrize("key", ["role", "content"])
def test_a_message_cannot_forge_a_turn(token: str, key: str) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    messages[1] = messages[1] | {key: f"a{token}b"}
    with pytest.raises(FormeryError, match=rf"message 2: its {key} holds") as error:
        tokenizer_with(CHATML).chat(messages)
    assert token in str(error.value)


def test_added_tokens_that_the_template_writes_are_refused_too_and_others_are_text() -> None:
    own = tokenizer_with("{% for m in messages %}<tool>{{ m.content }}</tool>{% endfor %}\n")
    for name in ("<tool>", "</tool>", "<other>", "\n"):
        own.inner.add_tokens([tokenizers.AddedToken(name, special=False, normalized=False)])
    with pytest.raises(FormeryError, match="message 1: its content holds </tool>"):
        own.chat([{"role": "user", "content": "</tool>"}])
    assert own.chat([{"role": "user", "content": "<other>\n"}])


def test_a_token_that_is_found_after_normalizing_is_refused_in_all_its_forms() -> None:
    inner = type(BASE.inner).from_str(BASE.inner.to_str())
    inner.normalizer = tokenizers.normalizers.NFKC()
    inner.add_special_tokens([tokenizers.AddedToken("<turn>", special=True, normalized=True)])
    own = Tokenizer(inner, TOKENS, {"default": "{{ messages[0].content }}"})
    with pytest.raises(FormeryError, match="holds <turn>"):
        own.chat([{"role": "user", "content": "＜turn＞"}])


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "at least one"),
        ("hello", "a list of messages"),
        ({"role": "user", "content": "x"}, "a list of messages"),
        (["hello"], "message 1 should have a role and a content"),
        ([{"role": "user"}], "message 1 should have a role and a content"),
        ([{"role": "user", "content": "x", "name": "y"}], "nothing else"),
        ([{"role": "user", "content": None}], "message 1: its content should be a text, not NoneType"),
        ([{"role": "user", "content": ["x"]}], "message 1: its content should be a text, not list"),
        ([{"role": 1, "content": "x"}], "message 1: its role should be a text"),
        ([{"role": "", "content": "x"}], "message 1 has an empty role"),
        ([{"role": "user", "content": "\ud800"}], "half a surrogate pair"),
    ],
)
def test_malformed_messages_are_one_sentence(messages, sentence: str) -> None:
    with pytest.raises(FormeryError, match=sentence):
        tokenizer_with(CHATML).chat(messages)


def test_what_a_template_refuses_is_told() -> None:
    with pytest.raises(FormeryError, match="refuses these messages: No system role.$"):
        tokenizer_with(TURNS).chat([{"role": "system", "content": "x"}])
    with pytest.raises(FormeryError, match='refuses these messages: Roles must take turns, "user" first.$'):
        tokenizer_with(INSTRUCTIONS).chat([{"role": "assistant", "content": "x"}])


def test_several_templates_have_names_and_the_default_comes_first() -> None:
    own = tokenizer_with({"also": "T{{ messages[0].content }}", "default": "D{{ messages[0].content }}"})
    messages = [{"role": "user", "content": "x"}]
    assert list(own.chat_templates) == ["default", "also"]
    assert own.chat_template == "D{{ messages[0].content }}"
    assert own.decode(own.chat(messages)) == "Dx"
    assert own.decode(encode_chat(own, messages, template="also")) == "Tx"
    with pytest.raises(FormeryError, match="no chat template named 'rag' .it has default, also"):
        encode_chat(own, messages, template="rag")


def test_a_model_without_a_template_says_so() -> None:
    assert BASE.chat_template is None
    with pytest.raises(FormeryError, match="not made for conversations"):
        BASE.chat([{"role": "user", "content": "x"}])


def test_time_is_there_for_those_who_print_it() -> None:
    own = tokenizer_with("{{ strftime_now('%Y') }}")
    assert abs(int(render_chat(own, [{"role": "user", "content": "x"}])) - time.localtime().tm_year) <= 1


DOUBLING = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}"
HOSTILE = {
    "syntax": ("{% if %}", "cannot be read, line 1"),
    "no end": ("{% for m in messages %}", "cannot be read"),
    "unknown filter": ("{{ 'x' | frobnicate }}", "cannot be read"),
    "undefined": ("{{ nothing.at.all }}", "undefined"),
    "type": ("{{ 1 + 'a' }}", "unsupported operand"),
    "division": ("{{ 1 / 0 }}", "division"),
    "include": ("{% include '/etc/passwd' %}", "cannot be used"),
    "python": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "python by attribute": ("{{ (messages | attr('__class__')).x }}", "undefined|unsafe"),
    "python by format_map": ("{{ '{x.__class__}'.format_map({'x': 1}) }}", "unsafe"),
    "private names": ("{% set n = namespace(_x=1) %}", "underscore"),
    "private names later": ("{% set n = namespace() %}{% set n.__x__ = 1 %}", "underscore"),
    "changed messages": ("{{ messages.append(1) }}", "unsafe"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "calls itself without an end|more work"),
    "branching": ("{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(90) }}", "more work"),
    "nested parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "itself without an end|cannot be"),
    "range": ("{{ range(10000000) | list }}", "Range too big"),
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more work"),
    "recursive loops": ("{% for a in [1] recursive %}{{ loop(range(99)) if loop.depth < 9 }}{% endfor %}", "more work"),
    "lazy loops": ("{% for a in range(99999) %}{{ range(99999) | select('none') | list }}{% endfor %}", "more work"),
    "repeated": ("{{ 'a' * 999999999999 }}", "more work"),
    "repeated backwards": ("{{ ('a' * -999999999999) ~ 999999999999 * 'a' }}", "more work"),
    "repeated list": ("{{ [1] * 999999999999 }}", "more work"),
    "power": ("{{ 10 ** 9999999999 }}", "more work"),
    "power of power": ("{{ 10 ** (10 ** 10) }}", "more work"),
    "doubled +": (DOUBLING.replace("STEP", "ns.x + ns.x"), "more work"),
    "doubled ~": (DOUBLING.replace("STEP", "ns.x ~ ns.x"), "more work"),
    "doubled format": (DOUBLING.replace("STEP", "'{0}{0}'.format(ns.x)"), "more work"),
    "doubled %": (DOUBLING.replace("STEP", "'%s%s' % (ns.x, ns.x)"), "more work"),
    "doubled by filter": (DOUBLING.replace("STEP", "'%s%s' | format(ns.x, ns.x)"), "more work"),
    "doubled join": (DOUBLING.replace("STEP", "[ns.x, ns.x] | join"), "more work"),
    "doubled str.join": (DOUBLING.replace("STEP", "''.join([ns.x, ns.x])"), "more work"),
    "doubled replace": (DOUBLING.replace("STEP", "ns.x | replace('a', 'aa')"), "more work"),
    "doubled str.replace": (DOUBLING.replace("STEP", "ns.x.replace('a', 'aa')"), "more work"),
    "doubled escape": (DOUBLING.replace("STEP", "(ns.x ~ '&') | forceescape * 2"), "more work"),
    "doubled block": (
        "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
        "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
        "more work",
    ),
    "doubled macro": (
        "{% macro two(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLING.replace("STEP", "two(ns.x)"),
        "more work",
    ),
    "doubled list": (DOUBLING.replace("STEP", "[ns.x, ns.x]"), "more work"),
    "doubled tuple": (DOUBLING.replace("STEP", "(ns.x, ns.x)"), "more work"),
    "doubled dict": (DOUBLING.replace("STEP", "{'a': ns.x, 'b': ns.x}"), "more work"),
    "doubled dict()": (DOUBLING.replace("STEP", "dict(a=ns.x, b=ns.x)"), "more work"),
    "big in list": ("{% set x = 'a' * 999999 %}{{ [x, x, x, x, x, x, x, x, x] }}", "more work"),
    "big in json": ("{% set x = 'a' * 999999 %}{{ [x, x, x, x, x, x, x, x, x] | tojson }}", "more work"),
    "big in string": ("{% set x = 'a' * 999999 %}{{ [x, x, x, x, x, x, x, x, x] | string }}", "more work"),
    "slices": ("{% set x = 'a' * 999999 %}{% for i in range(99) %}{% set y = x[1:] %}{% endfor %}", "more work"),
    "splits": ("{% set x = 'a' * 999999 %}{% for i in range(99) %}{% set y = x.split('b') %}{% endfor %}", "more work"),
    "big replaced": ("{{ ('a' * 9999999).replace('a', 'a' * 9999999) }}", "more work"),
    "big joined": ("{{ ('a' * 9999999).join('b' * 9999999) }}", "more work"),
    "padded": ("{{ 'a'.ljust(999999999) }}", "unsafe"),
    "padded filter": ("{{ 'a' | center(999999999) }}", "cannot be read"),
    "padded format": ("{{ '{:999999999}'.format('a') }}", "padded"),
    "padded nested format": ("{{ '{:{w}}'.format('a', w=999999999) }}", "padded"),
    "padded %": ("{{ '%999999999s' % 'a' }}", "padded"),
    "padded %*": ("{{ '%*s' % (999999999, 'a') }}", "padded"),
    "padded filter format": ("{{ '%999999999s' | format('a') }}", "padded"),
    "padded time": ("{{ strftime_now('%99999999d') }}", "padded"),
    "indented": ("{{ ('a\n' * 999999) | indent(999999) }}", "more work"),
    "indented json": ("{{ [1] | tojson(indent=999999999) }}", "indented"),
    "written out": ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "more work"),
    "word salad": ("{{ lipsum(n=99999999) }}", "undefined"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_only_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template, sentence = HOSTILE[name]
    monkeypatch.setattr("formery.data.chat.BUDGET", 2**23)  # the same within a second
    with pytest.raises(FormeryError, match=sentence) as error:
        tokenizer_with(template).chat([{"role": "user", "content": "hello"}])
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("text", ["'{0.__class__}'", "('{0.__class__}' | escape)", "('{0.__class__}' | safe)"])
def test_formatting_shows_nothing_of_python(text: str) -> None:
    own = tokenizer_with("{{ " + text + ".format(messages) }}{{ " + text + "['format'](messages) }}.")
    assert render_chat(own, [{"role": "user", "content": "x"}]) == "."


def test_namespaces_that_hold_themselves_are_written_as_a_name() -> None:
    own = tokenizer_with("{% set n = namespace() %}{% set n.n = [n, n] %}{{ n }}{{ [n] }}{{ n.n | string }}")
    text = render_chat(own, [{"role": "user", "content": "x"}])
    assert text.count("<Namespace>") == 4


def test_long_conversations_are_within_the_budget() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "the cat sat. " * 300} for i in range(801)]
    growing = "{% set n = namespace(t='') %}{% for m in messages %}{% set n.t = n.t ~ m.role %}{% endfor %}{{ n.t }}"
    for template in (CHATML, HEADERS, INSTRUCTIONS, growing):
        assert len(render_chat(tokenizer_with(template), messages)) > 801 * 4
