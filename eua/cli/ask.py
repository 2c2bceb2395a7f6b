"""``eua ask``: asks a model questions in plain text."""

from __future__ import annotations

from collections.abc import Sequence

from eua.cli.options import Parser, add_guard, add_model, positive


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        "ask",
        "Prints the model's answer to each question and the energy of the question.",
        ('eua ask --model unlearned "Where was Ann born?"', 'eua ask --model unlearned --no-guard "Where was Ann born?"'),
    )
    add_model(parser)
    parser.add_argument("question", nargs="+", help="one or more questions, each in quotes")
    add_guard(parser)
    parser.add_argument("--no-guard", action="store_true", help="answer without the guard")
    parser.add_argument("--max-new-tokens", type=positive(int), default=64, help="longest answer")
    arguments = parser.parse_args(argv)

    from eua.guard.guard import EnergyGuard
    from eua.model.asking import answer
    from eua.model.loading import load_model

    guard = None if arguments.no_guard else EnergyGuard.from_pretrained(arguments.guard or arguments.model)
    model, tokenizer = load_model(arguments.model)
    if guard is None:
        print("\n".join(answer(model, tokenizer, arguments.question, arguments.max_new_tokens)))
        return
    with guard.attach(model, tokenizer) as handle:
        answers = answer(model, tokenizer, arguments.question, arguments.max_new_tokens)
        found = ([] if values is None else values.tolist() for values in (handle.scores, handle.refused, handle.stopped))
    for text, score, was_refused, was_stopped in zip(answers, *found, strict=True):
        verdict = "refused" if was_refused else "stopped midway" if was_stopped else "answered"
        print(f"{text}\n  ({verdict}: energy {score:.2f}, threshold {guard.threshold:.2f} nats)")
