"""Which micro-batches a pipeline rank holds at a time, in the order of Megatron-Core's schedules."""

from __future__ import annotations

from collections.abc import Sequence


def peak_in_flight(chunks: Sequence[float], pipeline: int, stage: int, num_micro_batches: int) -> float:
    """Most that is kept between forward and backward passes at a time.

    1F1B starts with pipeline - stage - 1 forward passes, the interleaved schedule with 2 (pipeline - stage - 1) +
    (virtual - 1) pipeline of them; then each forward pass is followed by a backward pass. Chunks take turns after
    `pipeline` micro-batches (Narayanan et al., arXiv 2104.04473, section 2.2).

    Args:
        chunks: what the forward pass of each chunk of layers keeps; one chunk is plain 1F1B.
        pipeline: ranks.
        stage: number of this rank.
        num_micro_batches: of a step; a multiple of `pipeline` with several chunks.
    """
    virtual, behind = len(chunks), pipeline - stage - 1
    warm_up = behind if virtual == 1 else 2 * behind + (virtual - 1) * pipeline
    # The pattern repeats after all chunks have had their turn.
    passes = min(num_micro_batches * virtual, warm_up + 2 * pipeline * virtual)
    warm_up = min(warm_up, passes)
    held = sum(chunks[_chunk(turn, pipeline, virtual)] for turn in range(warm_up))
    peak = held
    for turn in range(passes - warm_up):
        held += chunks[_chunk(warm_up + turn, pipeline, virtual)]
        peak = max(peak, held)
        held -= chunks[virtual - 1 - _chunk(turn, pipeline, virtual)]
    return peak


def _chunk(turn: int, pipeline: int, virtual: int) -> int:
    """Chunk of a rank's `turn`-th forward pass."""
    return turn % (pipeline * virtual) // pipeline
