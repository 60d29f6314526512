"""Chat templates for tests, one of each kind: how the prompt treats thinking, and what earlier answers become."""

TURN = """{{- '<|im_start|>' + m.role + '\\n' }}"""
CALLS = """
{%- for call in m.tool_calls or [] -%}
{{- '\\n' if not loop.first or words }}<tool_call>
{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
</tool_call>
{%- endfor -%}"""
BODY = """
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- if tools -%}{{- '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif -%}
{%- for m in messages -%}
{%- set words, thought = WORDS, m.reasoning_content or '' -%}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and SHOWN -%}{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif -%}
{{- words }}CALLS{{- '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' }}PROMPT{%- endif -%}"""


def template(shown, prompt, words="m.content"):
    return BODY.replace("WORDS", words).replace("SHOWN", shown).replace("CALLS", CALLS).replace("PROMPT", prompt)


CLOSED, OPENED = "{{- '<think>\\n\\n</think>\\n\\n' }}", "{{- '<think>\\n' }}"
EITHER = ("{%- if enable_thinking is defined and enable_thinking is false -%}" + CLOSED + "{%- else -%}" + OPENED
          + "{%- endif -%}")
LAST = "loop.index0 > ns.last"
TEMPLATES = {
    "plain": template("false", ""),
    # the prompt without thinking holds an empty block, the other one holds nothing (Qwen3)
    "hybrid": template(f"{LAST} and (loop.last or thought)",
                       "{%- if enable_thinking is defined and enable_thinking is false -%}" + CLOSED + "{%- endif -%}"),
    # the prompt always opens a block (Thinking-2507)
    "thinking": template(f"{LAST} and (loop.last or thought)", OPENED),
    # one or the other, thinking unless told (Qwen3.5) or not (its small ones); contents are trimmed
    "either": template(LAST, EITHER, "m.content | trim"),
    "either, off": template(LAST, EITHER.replace("defined and enable_thinking is false",
                                                 "undefined or enable_thinking is false"), "m.content | trim"),
    # earlier answers keep their thinking (Qwen3.8), and the mode stands in the first turn
    "kept": "{{- '<|im_start|>system\\nthink: ' ~ (enable_thinking | default(true)) ~ '<|im_end|>\\n' }}"
            + template("true", EITHER),
    # no answer shows its thinking (QwQ)
    "cut": template("false", OPENED, "m.content.split('</think>')[-1].lstrip('\\n')"),
}
