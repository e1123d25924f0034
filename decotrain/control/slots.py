"""Which slots newcomers get. Pure: the same joins and the same record give the same slots.

Samples and the order of sums go by slot, so a run that is resumed goes on with the same bits only
when its peers have the slots they had. Their checkpoints know them, and they ask for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from decotrain.control.maps import SLOTS


def give_slots(wishes: Mapping[int, int | None], taken: int, used: Sequence[int]) -> dict[int, int]:
    """Newcomer -> its slot, while there are any. `wishes` in the order of joining, `taken` a set
    as a word, `used` the slots that somebody had, least recently used first.

    Wishes first, or who wishes for nothing would take what others can go on with. A slot that is
    not free (taken, wished for by who joined before, none of a run) is as no wish.
    """
    age = {slot: number for number, slot in enumerate(used)}
    free = {slot for slot in range(SLOTS) if not taken >> slot & 1}
    given: dict[int, int] = {}
    for key, wish in wishes.items():
        if wish is not None and wish in free:
            free.remove(wish)
            given[key] = wish
    rest = sorted(free, key=lambda slot: (age.get(slot, -1), slot))
    others = [key for key in wishes if key not in given]
    return given | dict(zip(others, rest, strict=False))
