"""A sample conversation in each language about one held-out picture, as text."""

from __future__ import annotations

from pathlib import Path

from parrot_sys.data.constants import LANGUAGES
from parrot_sys.data.conversations import load_phrases
from parrot_sys.errors import DataError
from parrot_sys.evaluation.runner import load_tables
from parrot_sys.inference.chat import ChatSession, routing_table
from parrot_sys.inference.pretrained import load_pretrained


def sample_conversations(checkpoint: Path, benchmark: Path, output: Path) -> Path:
    """Asks about the middle picture of the first split (so it is not hand-picked), in two turns per language.

    Args:
        checkpoint: the model.
        benchmark: folder with tables in several languages that share rows.
        output: folder for `conversation.txt` and `picture.png`.

    Returns:
        Path of conversation.txt.

    Raises:
        DataError: the tables do not share the row.
    """
    tables = {table.language: table for table in load_tables([benchmark], (), None)}
    part = next(iter(next(iter(tables.values())).parts().values()))
    index = part[len(part) // 2].index
    model, processor = load_pretrained(checkpoint, device=None)
    session = ChatSession(model=model, processor=processor, max_new_tokens=32)
    output.mkdir(parents=True, exist_ok=True)
    picture = output / "picture.png"
    lines = [f"Picture: {picture} (held out; the middle one of its split, not chosen by hand)"]
    for language in LANGUAGES:
        if language not in tables:
            continue
        question = next((q for q in tables[language].questions if q.index == index), None)
        if question is None:
            raise DataError(f"{tables[language].path} lacks index {index}, which the other languages have")
        tables[language].image(question.image_key).save(picture)
        session.reset()
        session.add_image(picture)
        lines += ["", f"--- {language}: the right name is {question.options[question.answer]}"]
        phrases = load_phrases()[language]
        for text in (phrases["name"][0], phrases["category"]):
            answer = session.ask(text)
            lines += [f"user    {text}", f"parrot  {answer.text}"]
        if answer.experts is not None:
            lines.append(routing_table(answer.experts))
    path = output / "conversation.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
