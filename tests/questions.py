"""A small file in HellaSwag's form, of our own writing: both of its spellings, brackets and all."""

import json
from pathlib import Path

_STORIES = [
    ("Baking bread", "A woman kneads dough on a floured table.", "she", "sets it to rise"),
    ("Fixing a bicycle", "[header] How to mend a tyre [title] Take the wheel off.", "", "patches"),
    ("Rowing", "Two men sit in a boat on a  still lake.", "the taller man", "pulls at the oars"),
    ("Playing chess", "A girl looks at the board for a long while.", "then she", "moves a knight"),
    ("Gardening", "Rain has fallen all night, and the beds are soft.", "he", "plants the beans"),
]
_WRONG = [
    "eats the table [step] and leaves.",
    "sings to  the wheel until the crowd claps and goes home at last.",
    "is blue.",
]


def write_questions(path: Path, count: int = 5) -> Path:
    """Writes ``count`` examples, labels as text (the hub's) and as numbers (the original's)."""
    lines = []
    for i in range(count):
        activity, first, second, ending = _STORIES[i % len(_STORIES)]
        endings = [f"{w} {i}" for w in _WRONG]
        endings.insert(i * 3 % 4, f"{ending}, and day {i} is done." if i % 3 else "naps")
        label = i * 3 % 4
        lines.append(
            {
                "ind": i,
                "activity_label": activity,
                "ctx_a": first,
                "ctx_b": second,
                "ctx": f"{first} {second}",
                "endings": endings,
                "label": label if i % 2 else str(label),
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
