"""Seeded malicious chat templates: bombs, random pieces, and damaged valid ones."""

from __future__ import annotations

import random

from hostile_mutate import MARK, damage

_BOMBS = (
    "{{ 'a' * 10**10 }}",
    "{{ [0] * 10**10 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ 'a' | center(10**10) }}",
    "{{ lipsum(10**9) }}",
    "{% for i in range(10**12) %}a{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}a{% endfor %}{% endfor %}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=[]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | tojson }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x | replace('a', 'aaaaaaaa') %}{% endfor %}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch " + MARK + "') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as o %}{{ o.system('id') }}",
    "{% extends 'x' %}",
    "{{ strftime_now('%9999999d') }}",
    "{{ strftime_now(1) }}",
    "{{ messages[0]['content'].encode('idna') }}",
    "{{ messages | batch(10**10) | list }}",
    "{{ range(10**5) | list | join('x' * 10**5) }}",
    "{{ 1 / 0 }}",
    "{{ x.y.z }}",
    "{{ 'a' | indent(10**10) }}",
    "{{ tojson }}",
    "{{ messages | tojson(indent=10**10) }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception(messages) }}",
    "{{ 'x'.join(messages) }}",
    "{{ '\\ud800' }}",
    "{{ ('a' * 9999) * 9999 }}",
    "{% set x = 'a' * 99999 %}{% for i in range(9999) %}{{ x }}{% endfor %}",
    "{{ messages | map('nope') | list }}",
    "{{ [1, 2] | sort(attribute='x') }}",
    "{{ 'a' | int(base=99) }}",
    "{% filter upper %}{{ messages }}{% endfilter %}",
    "{{ namespace(**{'a': 1}).a.b.c }}",
    "{{ dict(a=1) | dictsort(by='x') }}",
    "{{ 'a'.format_map({}) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '%s' | format(messages) }}",
    "{{ () }}" * 999,
    "{{ (" * 3000 + "1" + ") }}" * 3000,
    "{% if 1 %}" * 900 + "{% endif %}" * 900,
    "{{ '" + "a" * 10**6 + "' }}",
)
_PIECES = (
    "messages",
    "message['content']",
    "message.role",
    "'a'",
    "1",
    "10**6",
    "loop.index",
    "bos_token",
    "x",
    "none",
    "[1, 2]",
    "messages[-1]",
    "messages[:1]",
    "{'a': 1}",
    "'%s'",
    "range(9)",
    "namespace(a=1)",
    "cycler('a')",
    "self",
    "undefined",
)
_METHODS = ("split()", "strip", "items()", "__class__", "format(1)", "x")
_FILTERS = (
    "trim",
    "tojson",
    "length",
    "upper",
    "join(',')",
    "list",
    "first",
    "items",
    "map(attribute='role')",
    "int",
    "sum",
    "replace('a', 'b')",
    "default(1)",
    "string",
    "safe",
    "batch(2)",
    "groupby('role')",
    "sort",
    "xmlattr",
    "pprint",
)
_STEPS = (
    "{{{{ {e} }}}}",
    "{{% if {e} %}}a{{% endif %}}",
    "{{% for message in {e} %}}{{{{ {f} }}}}{{% endfor %}}",
    "{{% set x = {e} %}}{{{{ x }}}}",
    "{{{{ {e} {o} {f} }}}}",
    "{{% set n = namespace(x={e}) %}}{{% set n.x = {f} %}}{{{{ n.x }}}}",
    "{{% macro m(a) %}}{{{{ a }}}}{{{{ {e} }}}}{{% endmacro %}}{{{{ m({f}) }}}}",
    "{{% generation %}}{{{{ {e} }}}}{{% endgeneration %}}",
)


def template(source: str, rng: random.Random) -> bytes:
    """Return a chat template: a bomb, one of random pieces, or a damaged valid one."""

    def expression(depth: int = 0) -> str:
        match rng.randrange(5):
            case 0 if depth < 3:
                return f"({expression(depth + 1)} | {rng.choice(_FILTERS)})"
            case 1 if depth < 3:
                return f"({expression(depth + 1)} {rng.choice('+*~-/%')} {expression(depth + 1)})"
            case 2 if depth < 3:
                return f"{rng.choice(_PIECES)}.{rng.choice(_METHODS)}"
            case _:
                return rng.choice(_PIECES)

    match rng.randrange(4):
        case 0:
            return rng.choice(_BOMBS).encode("utf-8", "surrogatepass")
        case 1:
            return damage(source.encode(), rng)
        case _:
            parts = (
                rng.choice(_STEPS).format(e=expression(), f=expression(), o=rng.choice("+*~-"))
                for _ in range(rng.randrange(1, 4))
            )
            return "".join(parts).encode()
