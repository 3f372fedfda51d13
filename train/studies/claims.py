"""Claims of the papers, each with the comparison of ours that bears on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from studies.evidence import POINTS, Claim, Difference, Direction, Information
from studies.measures import AVERAGE, EXCEPT_EN

_EXPERTS = "experts chosen by the language of the prompt give better answers in languages with little data"
_CHOICE = "it is the choice, not the number of parameters"
_ROUTES = "it is the choice, not that there are experts"
_WITHOUT = "(without a choice) more parameters give better answers"
_OTHERS = "(other routers) they give better answers than the default's"
_FROZEN = tuple(f"frozen decoder, 6 languages, {mix}" for mix in ("imbalanced", "balanced"))
_TUNED = "tuned decoder, 6 languages, balanced"


def _information(says: str, model: str, place: str) -> Claim:
    return Claim(
        says=says,
        of="I(expert; language) less chance",
        figure=Information(file="languages.json", variant=f"{model}, {place}", part="style"),
        direction="more",
        study="languages",
        least=0.1,
    )


def _grid(says: str, comparison: str, direction: Direction, key: str = EXCEPT_EN) -> Claim:
    return Claim(
        says=says,
        of="languages but English" if key == EXCEPT_EN else "all languages",
        figure=Difference(file="languages.json", comparison=comparison, part="style", key=key),
        direction=direction,
        study="languages",
    )


PARROT = (
    _information("experts follow the language of the prompt, by the rule of the released code", "dense", _TUNED),
    _information("(with a loss that rewards it) experts follow the language of the prompt", "default", _TUNED),
    _grid(
        "experts by language cost no accuracy where data is balanced",
        f"default - projector, {_TUNED}",
        "not less",
        AVERAGE,
    ),
    *(
        _grid(
            "with little data of a language, answers in it are worse",
            f"balanced - imbalanced, {model}, {place}, 6 languages",
            "more",
        )
        for place in ("tuned decoder", "frozen decoder")
        for model in ("projector", "default")
    ),
    *(
        _grid(_EXPERTS, f"default - projector, {place}", "more")
        for place in (
            *_FROZEN,
            *(f"{decoder} decoder, 6 languages, imbalanced" for decoder in ("LoRA", "slow", "tuned")),
            *(f"frozen decoder, {count} languages, imbalanced" for count in (24, 48)),
        )
    ),
    *(_grid(_CHOICE, f"default - wide, {place}", "more") for place in _FROZEN),
    *(_grid(_ROUTES, f"default - dense, {place}", "more") for place in _FROZEN),
    *(_grid(_WITHOUT, f"{model} - projector, {place}", "more") for model in ("wide", "dense") for place in _FROZEN),
    *(_grid(_OTHERS, f"{model} - default, {_FROZEN[0]}", "more") for model in ("bias", "sharpening", "entropy")),
)


def _curve(says: str, comparison: str, part: str, direction: Direction) -> Claim:
    return Claim(
        says=says,
        of=f"dialogues {part}",
        figure=Difference(file="wings_curve.json", comparison=comparison, part=part),
        direction=direction,
        study="wings_curve",
    )


_BOTH_SIDES: Sequence[tuple[str, str, Direction]] = (
    ("learners keep the text of a decoder that learns at the same rate", "TTT", "more"),
    ("and pictures are learned as well", "V", "not less"),
)
_RATES = ("2e-3", "5e-4", "2e-4", "5e-5", "0")
WINGS = (
    _curve("visual tuning makes a model forget text", "plain, 2e-3 - text decoder", "TTT", "less"),
    _curve("Wings, as it is trained, forgets no text", "Wings, 5e-5 - text decoder", "TTT", "not less"),
    _curve("it forgets less than a plain model, as that is trained", "Wings, 5e-5 - plain, 2e-3", "TTT", "more"),
    *(
        _curve(says, f"Wings - {other}, {rate}", part, direction)
        for says, part, direction in _BOTH_SIDES
        for other in ("plain", "plain + LoRA")
        for rate in _RATES
    ),
    *(
        _curve("every part of Wings keeps text", f"Wings - {name}", "TTT", "more")
        for name in ("visual learners only", "textual learners only", "router off")
    ),
    *(
        _curve("every part of Wings helps to see", f"Wings - {name}", "V", "more")
        for name in ("visual learners only", "textual learners only", "router off")
    ),
)


def _joint(says: str, comparison: str, part: str, direction: Direction) -> Claim:
    return Claim(
        says=says,
        of=f"dialogues {part}",
        figure=Difference(file="joint.json", comparison=comparison, part=part),
        direction=direction,
        study="joint",
    )


_BOTH = "joint training makes better dialogues than pictures or text alone"
_HABITS = {"words": "words in an answer (Chinese: characters)", "answers that repeat themselves (%)": "share of them"}


def _answers(says: str, comparison: str, part: str, direction: Direction) -> Claim:
    unit = "words" if part == "words" else POINTS
    return Claim(
        says=says,
        of=_HABITS[part],
        figure=Difference(file="answers.json", comparison=comparison, part=part, unit=unit),
        direction=direction,
        study="answers",
    )


MULTIMODAL_GPT = (
    *(_joint("joint training teaches pictures", "joint - before", part, "more") for part in ("V", "TV")),
    *(_joint("and keeps the text", "joint - before", part, "not less") for part in ("T", "TTT")),
    *(
        _joint(_BOTH, f"joint - {other}", part, "more")
        for other, parts in (("vision only", ("T", "TTT", "TTV")), ("text only", ("V", "TV", "TTV")))
        for part in parts
    ),
    *(
        _answers("joint training leaves answers long", f"joint - {other}", "words", "more")
        for other in ("vision only", "text only")
    ),
    *(
        _answers(
            "joint training makes answers repeat themselves less",
            f"joint - {other}",
            "answers that repeat themselves (%)",
            "less",
        )
        for other in ("vision only", "text only")
    ),
)
CLAIMS: Mapping[str, Sequence[Claim]] = {
    "Parrot (arXiv 2406.02539)": PARROT,
    "Wings (arXiv 2406.03496)": WINGS,
    "MultiModal-GPT (arXiv 2305.04790)": MULTIMODAL_GPT,
}
