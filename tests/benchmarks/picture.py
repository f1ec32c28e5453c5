"""The README's picture: the value of every token of a good and a bad answer to one prompt of the embedded task.

    python sft.py && python train_gvm.py && python tests/benchmarks/picture.py

The pair is the first held-out one whose preferred answer is perfect and whose other has several faults, among prompts
for five things or more that exclude two: long enough to show where the value falls. It is one pair of many; how often
the GVM is right, `evaluate.py` tells. Writes tests/benchmarks/results/token_values.svg.
"""

import html
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import evaluate  # noqa: E402

LETTER, LIMIT = 8.4, 1.0  # width of a monospaced letter of 14 pixels; the value of full colour


@dataclass
class Args:
    gvm_path: str = "runs/gvm"
    """global value model: local folder or hub id"""
    dataset: str = "tests/tasks/lists.py"
    """a task's file"""
    output: str = "tests/benchmarks/results/token_values.svg"
    """file to write"""


def box(x: float, y: float, width: float, value: float, text: str, below: str) -> str:
    """A token on the colour of its value, and its value below."""
    fill = "rgb" + str(evaluate.colour(value, LIMIT))
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="26" rx="3" fill="{fill}" stroke="#bbb"/>'
        f'<text x="{x + width / 2:.1f}" y="{y + 18}">{html.escape(text)}</text>'
        f'<text x="{x + width / 2:.1f}" y="{y + 42}" font-size="11" fill="#555">{below}</text>'
    )


def main(args: Args) -> None:
    tokenizer = common.load_tokenizer(args.gvm_path)
    gvm = common.load_value_model(args.gvm_path, tokenizer, torch.float32, fresh_head=False).eval()
    gvm.config.num_context_trajectories = 0
    evaluate.add_methods(gvm, evaluate.token_values)
    _, heldout = common.load_examples(args.dataset, needs="pairs")
    score = common.load_task(args.dataset).score
    for example in heldout:
        question = example.prompt[-1]["content"]
        long = question.startswith(("list five", "list six")) and " or " in question
        if long and score(example.prompt, example.chosen) == 1 and score(example.prompt, example.rejected) <= 0:
            break
    answers, _ = evaluate.tokenize(tokenizer, [example], "preference", evaluate.Args(response_length=20))

    parts, right = [], 0.0
    for row, (answer, text) in enumerate(zip(answers, (example.chosen, example.rejected))):
        name = f"{('good', 'bad')[row]} answer, exact score {score(example.prompt, text):g}"
        _, tokens, values = evaluate.shown_answer(gvm, tokenizer, name, answer, answers)
        x, y = 20.0, 96 + 84 * row
        parts.append(f'<text x="20" y="{y - 10}" text-anchor="start" font-weight="bold">{name}</text>')
        for token, value in zip(["prompt", *tokens], values):
            width = max(LETTER * len(token.strip()) + 10, 40)  # room for the value
            parts.append(box(x, y, width, value, token.strip(), f"{value:+.2f}"))
            x += width + 3
        right = max(right, x)
    for i, value in enumerate((-1, -0.5, 0, 0.5, 1)):
        parts.append(box(20 + 43 * i, 258, 40, value, f"{value:g}", ""))
    title = f'<text x="20" y="38" text-anchor="start" font-size="16">{html.escape(question)}</text>'
    legend = "the GVM's value once a token is read: −1 would be rejected, +1 preferred"
    parts.append(f'<text x="245" y="276" text-anchor="start" font-size="12" fill="#555">{legend}</text>')
    width = max(right + 17, 800)
    Path(ROOT / args.output).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} 300" width="{width:.0f}" height="300" '
        f'font-family="ui-monospace, Menlo, Consolas, \'DejaVu Sans Mono\', monospace" font-size="14" '
        f'text-anchor="middle"><rect width="100%" height="100%" rx="8" fill="#fff"/>'
        f"{title}{''.join(parts)}</svg>\n",
        encoding="utf-8",
    )
    print(f"wrote {args.output}: {question!r}")


if __name__ == "__main__":
    main(tyro.cli(Args))
