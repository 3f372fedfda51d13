"""A sample conversation in each language about held-out pictures, as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from parrot_sys.data.corpora.default.phrases import phrases_in
from parrot_sys.data.decoding import load_image
from parrot_sys.data.languages import in_order
from parrot_sys.evaluation.runner import load_tables
from parrot_sys.inference.chat import ChatSession, routing_table
from parrot_sys.inference.pretrained import load_pretrained
from parrot_sys.markdown_tables import fixed


def sample_conversations(checkpoint: Path, benchmark: Path, output: Path, *, speaker: str) -> Path:
    """Asks in each language about a picture of its own, in two turns, then about one picture in every language.

    The pictures are evenly spread over the first split, so that nobody chose them by hand.

    Args:
        checkpoint: the model.
        benchmark: folder with tables in several languages.
        output: folder for `conversation.txt` and the pictures, `LANGUAGE.png`.
        speaker: what the model is called.

    Returns:
        Path of conversation.txt.
    """
    tables = {table.language: table for table in load_tables([benchmark], (), None)}
    spoken = in_order(tables)
    model, processor = load_pretrained(checkpoint, device=None)
    session = ChatSession(model=model, processor=processor, max_new_tokens=32)
    output.mkdir(parents=True, exist_ok=True)
    lines = [f"Pictures: {output}/LANGUAGE.png (held out; evenly spread in their split, not chosen by hand)"]
    for number, language in enumerate(spoken):
        part = next(iter(tables[language].parts().values()))
        question = part[(2 * number + 1) * len(part) // (2 * len(spoken))]
        picture = output / f"{language}.png"
        assert question.image_key is not None, "the benchmark's questions are about pictures"
        load_image(tables[language].image(question.image_key)).save(picture)
        session.reset()
        session.add_image(picture)
        lines += ["", f"--- {language}: the right name is {question.options[question.answer]}"]
        phrases = phrases_in(language)
        for text in (phrases["name"][0], phrases["category"]):
            answer = session.ask(text)
            lines += [f"{'user':{len(speaker)}}  {text}", f"{speaker:4}  {answer.text}"]
        if answer.experts is not None:
            lines.append(routing_table(answer.experts))
    lines += ["", *_one_picture(session, output / f"{spoken[0]}.png", spoken, speaker)]
    path = output / "conversation.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _one_picture(session: ChatSession, picture: Path, languages: Sequence[str], speaker: str) -> list[str]:
    """The same question about the same picture in each language, with the weights of the experts."""
    lines = [f"--- the same picture, {picture.name}, in every language"]
    for language in languages:
        session.reset()
        session.add_image(picture)
        text = phrases_in(language)["name"][0]
        answer = session.ask(text)
        lines.append(f"{language}: {text}")
        if answer.experts is not None:
            weights = answer.experts[0].tolist()
            shown = "  ".join(f"{expert} {fixed(weight, 2)}" for expert, weight in enumerate(weights, 1))
            lines.append(f"  most weight: expert {weights.index(max(weights)) + 1}   (all: {shown})")
        lines.append(f"  {speaker}: {answer.text}")
    return lines
