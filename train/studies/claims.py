"""Claims of the papers, each with the comparison of ours that bears on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from studies.evidence import Claim, Difference, Direction, Information
from studies.measures import EXCEPT_EN

_EXPERTS = "experts chosen by the language of the prompt give better answers in languages with little data"
_CHOICE = "it is the choice, not that there are experts"
_WIDER = "(without a choice) more parameters give better answers"
_UNIFORM = "(without a choice) experts with uniform routes give better answers"
_OLD = "make experiment at commit f7ae865"


def _grid(says: str, first: str, second: str, place: str, direction: Direction) -> Claim:
    return Claim(
        says=says,
        ours=f"{first} - {second}, {place}; languages but English",
        figure=Difference(
            file="languages.json", comparison=f"{first} - {second}, {place}", part="style", key=EXCEPT_EN
        ),
        direction=direction,
        study="languages",
    )


_PLACES = ("frozen decoder, 6 languages, imbalanced", "frozen decoder, 6 languages, balanced")
PARROT = (
    Claim(
        says="experts follow the language of the prompt",
        ours="I(expert; language) less chance, default router, decoder tuned, 500 steps",
        figure=Information(file="routers.json", variant="default", part="style"),
        direction="more",
        study="routers",
        least=0.1,
    ),
    Claim(
        says="(the same, by the rule of the released code)",
        ours="the same, dense experts without losses",
        figure=Information(file="routers.json", variant="released", part="style"),
        direction="more",
        study="routers",
        least=0.1,
    ),
    Claim(
        says="experts by language cost no accuracy where data is balanced",
        ours="default - projector only, decoder tuned, balanced, 500 steps",
        figure=Difference(file="routers.json", comparison="default - projector only", part="style"),
        direction="not less",
        study="routers",
    ),
    *(_grid(_EXPERTS, "default", "projector", place, "more") for place in _PLACES),
    *(_grid("it is the choice, not the number of parameters", "default", "wide", place, "more") for place in _PLACES),
    *(
        _grid(says, model, "projector", place, "more")
        for says, model in ((_WIDER, "wide"), (_UNIFORM, "dense"))
        for place in _PLACES
    ),
    *(_grid(_CHOICE, "default", "dense", place, "more") for place in _PLACES),
    *(
        _grid(_EXPERTS, "default", "projector", f"{decoder} decoder, 6 languages, imbalanced", "more")
        for decoder in ("LoRA", "slow", "tuned")
    ),
    *(
        _grid(says, first, second, f"frozen decoder, {count} languages, imbalanced", "more")
        for count in (24, 48)
        for says, first, second in (
            (_EXPERTS, "default", "projector"),
            (_UNIFORM, "dense", "projector"),
            (_CHOICE, "default", "dense"),
        )
    ),
    Claim(
        says="with little data of a language, answers in it are worse",
        ours="all languages alike - 10% of each but English; dense experts, tuned, two epochs; languages but English",
        figure=Difference(
            file="experiment_released.json", comparison="balanced - imbalanced, experts", part="style", key=EXCEPT_EN
        ),
        direction="more",
        study=_OLD,
    ),
    Claim(
        says=_EXPERTS,
        ours="dense experts (released rule) - projector, decoder tuned, imbalanced, two epochs; languages but English",
        figure=Difference(
            file="experiment_released.json", comparison="experts - plain, imbalanced", part="style", key=EXCEPT_EN
        ),
        direction="more",
        study=_OLD,
    ),
)


def _forgetting(says: str, comparison: str, part: str, direction: Direction) -> Claim:
    return Claim(
        says=says,
        ours=f"{comparison}, dialogues {part}",
        figure=Difference(file="forgetting.json", comparison=comparison, part=part),
        direction=direction,
        study="wings",
    )


def _curve(says: str, comparison: str, part: str, direction: Direction) -> Claim:
    return Claim(
        says=says,
        ours=f"{comparison}, dialogues {part}",
        figure=Difference(file="wings_curve.json", comparison=comparison, part=part),
        direction=direction,
        study="wings_curve",
    )


_KEEP = "learners keep the text of a decoder that learns at the same rate"
_BOTH_SIDES: Sequence[tuple[str, str, Direction]] = (
    (_KEEP, "TTT", "more"),
    ("and pictures are learned as well", "V", "not less"),
)
WINGS = (
    _forgetting("visual tuning makes a model forget text", "plain - text decoder", "TTT", "less"),
    _forgetting("Wings forgets less than a plain model (decoders at 5e-5 and 2e-3)", "Wings - plain", "TTT", "more"),
    _forgetting(_KEEP, "Wings - plain, slow decoder", "TTT", "more"),
    *(
        _curve(says, f"Wings - {other}, {rate}", part, direction)
        for rate in ("2e-3", "5e-4", "2e-4")
        for other in ("plain", "plain + LoRA")
        for says, part, direction in _BOTH_SIDES
    ),
    *(
        _curve(f"Wings keeps more text than with {name} learners only", f"Wings - {name} learners only", "TTT", "more")
        for name in ("visual", "textual")
    ),
    _curve("Wings keeps more text than without its router", "Wings - router off", "TTT", "more"),
    _curve("Wings sees more than without its router", "Wings - router off", "V", "more"),
    _curve("Wings sees more than with visual learners only", "Wings - visual learners only", "V", "more"),
)


def _joint(says: str, comparison: str, part: str, direction: Direction) -> Claim:
    return Claim(
        says=says,
        ours=f"{comparison}, dialogues {part}",
        figure=Difference(file="joint.json", comparison=comparison, part=part),
        direction=direction,
        study="joint",
    )


_BOTH = "joint training makes better dialogues than pictures or text alone"
MULTIMODAL_GPT = (
    Claim(
        says="sets with short answers make answers short",
        ours="words in an answer: tuned on long and short - on long answers",
        figure=Difference(file="answers.json", comparison="long and short - long answers", part="mmmb", unit="words"),
        direction="less",
        study="multimodal_gpt",
    ),
    *(
        _joint(_BOTH, f"joint - {other}", part, "more")
        for other, parts in (("vision only", ("T", "TTT", "TTV")), ("text only", ("V", "TV", "TTV")))
        for part in parts
    ),
    *(
        Claim(
            says="joint training leaves answers long",
            ours=f"words in an answer: joint - {other}",
            figure=Difference(file="joint_answers.json", comparison=f"joint - {other}", part="words", unit="words"),
            direction="more",
            study="joint_answers",
        )
        for other in ("vision only", "text only")
    ),
    Claim(
        says="joint training makes answers repeat themselves less",
        ours="answers that repeat themselves: joint - vision only",
        figure=Difference(
            file="joint_answers.json",
            comparison="joint - vision only",
            part="answers that repeat themselves (%)",
        ),
        direction="less",
        study="joint_answers",
    ),
)
CLAIMS: Mapping[str, Sequence[Claim]] = {
    "Parrot (arXiv 2406.02539)": PARROT,
    "Wings (arXiv 2406.03496)": WINGS,
    "MultiModal-GPT (arXiv 2305.04790)": MULTIMODAL_GPT,
}
