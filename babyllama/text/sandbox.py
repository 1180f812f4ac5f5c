"""The program that renders a chat template: a process of its own, with little to find and little to spend.

A template comes with a model, from a stranger, and is a program. It runs in the sandbox of jinja2, which keeps it from
Python; in this process, which can be killed when it does not end; and under limits of the system, where it has them:
memory, processor time, no more files, nothing written, no other process.

    python -I -S sandbox.py      JSON, a line each: paths -> "ready", template -> "ready", conversations -> texts

It stands alone: nothing of the package is imported here, and the package does not import it. chat.py starts it.
"""

import json
import re
import sys
import time
from datetime import datetime
from typing import Any, NoReturn

SECONDS = 3  # of processor time for one question; chat.py, which has a clock, waits less long than that
MEMORY = 512 * 2**20  # bytes of address space, of which Python and jinja2 take about 40 MiB
LARGEST_TEXT = 4 * 2**20  # characters of all texts of one answer


class TooLongError(Exception):
    pass


def template_from(source: str, marks: dict[str, str]) -> Any:
    """The compiled template. Names of control tokens that it writes itself are replaced by their marks.

    What a person wrote only passes through, so a mark in the result was put there by the template.

    The settings are those of transformers (utils/chat_template_utils.py), for which templates are written.
    """
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}, around what an assistant says: here, just what is inside."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 reads it so)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
               sort_keys: bool = False) -> str:  # fmt: skip
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    del environment.globals["lipsum"]  # no template has a use for it

    tree = environment.parse(source)
    names = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))) or "(?!)")
    for node in tree.find_all((nodes.TemplateData, nodes.Const)):
        field = "data" if isinstance(node, nodes.TemplateData) else "value"
        text = getattr(node, field)
        if isinstance(text, str):
            setattr(node, field, names.sub(lambda found: marks[found[0]], text))
    return environment.from_string(tree)


def render(template: Any, variables: dict[str, Any], room: int) -> str:
    """Its text, at most `room` characters of it."""
    pieces = []
    for piece in template.generate(**variables):
        room -= len(piece)
        if room < 0:
            raise TooLongError
        pieces.append(piece)
    return "".join(pieces)


def limit_this_process() -> None:
    """For good. What the system does not know (Windows) or does not hold (memory on macOS) is left out."""
    try:
        import resource
    except ImportError:
        return
    for name, most in (("AS", MEMORY), ("CORE", 0), ("FSIZE", 0), ("NOFILE", 3), ("NPROC", 0)):
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
        except (AttributeError, OSError, ValueError):
            continue


def limit_time() -> None:
    """SECONDS more of processor time from now on: for the case that whoever started this process is gone."""
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + SECONDS, hard))


def answers(question: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """What is said to a question; `problem` says what was wrong, `refused` that the template itself said so."""
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    try:
        if "template" in question:
            state.clear()
            state["template"] = template_from(question["template"], question["marks"])
            state["variables"] = question["variables"]
            return {"ready": True}
        texts: list[str] = []
        for messages, prompts in question["conversations"]:
            room = LARGEST_TEXT - sum(map(len, texts))
            variables = {**state["variables"], "messages": messages, "add_generation_prompt": prompts}
            texts.append(render(state["template"], {"tools": None, "documents": None, **variables}, room))
        return {"texts": texts}
    except TooLongError:
        return {"problem": f"writes more than {LARGEST_TEXT:,} characters"}
    except MemoryError:
        return {"problem": f"needs more than {MEMORY // 2**20} MiB of memory"}
    except RecursionError:
        return {"problem": "calls itself without end"}
    except TemplateSyntaxError as error:
        return {"problem": f"is not a jinja template: line {error.lineno}: {str(error.message)[:200]}"}
    except Exception as error:
        refused = type(error) is TemplateError  # what raise_exception raises, and nothing else
        return {"problem": f"{type(error).__name__}: {str(error)[:200]}", "refused": refused}


def main() -> None:
    state: dict[str, Any] = {}
    lines = sys.stdin.buffer
    sys.path += json.loads(lines.readline())
    # Once through everything that is loaded or opened when it is first used: later there is no opening.
    datetime.now().strftime("%d %b %Y")
    for source in ("{{ strftime_now('%Y') ~ [1]|tojson }}", "{{ raise_exception('no') }}", "{% no %}"):
        answers({"template": source, "marks": {}, "variables": {}}, state)
        answers({"conversations": [[[], True]]}, state)
    limit_this_process()
    answer: dict[str, Any] = {"ready": True}
    while True:
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()
        if not (line := lines.readline()):
            return
        limit_time()
        answer = answers(json.loads(line), state)


if __name__ == "__main__":
    main()
