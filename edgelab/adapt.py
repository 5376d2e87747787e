"""A domain that the embedded models never saw: spoken commands to a robot, for few-shot adaptation of a compressed model.

Same form as the assistant's domain (a command, then a JSON call), other words and other calls, so that what must be learnt is
the new grammar and not how to write JSON. Of `examples` drawn commands those of the training split teach; the test split, by the same
rule as everywhere (`data.split_of`), holds commands that are in neither. Forgetting is measured on the four old domains.
"""

import json
import random

from edgelab.data import CALL, SPLITS, USER, split_of, spoken

DOMAIN = "robot"
_PARTS = ("arm", "base", "camera", "left wheel", "right wheel", "gripper", "head")
_WAYS = ("left", "right", "up", "down", "forward", "back")
_COLOURS = ("red", "green", "blue", "yellow", "black", "white")
_THINGS = ("cup", "box", "ball", "bottle", "brick", "key", "pen", "plate")
_PATIENCE = 5000  # draws in a row that bring nothing new
_PLACES = ("table", "shelf", "floor", "door", "window", "charger", "sink")


def _command(r: random.Random) -> tuple[str, dict]:
    """One command and the call it means, drawn from some ten thousand."""
    pick = r.choice
    match r.randrange(6):
        case 0:
            part, way, steps = pick(_PARTS), pick(_WAYS), r.randrange(2, 40)
            text = pick(("move the {0} {2} steps {1}", "{0} {1} by {2}", "shift the {0} {1} {2} steps"))
            return text.format(part, way, spoken(steps)), {"call": "move", "part": part, "way": way, "steps": steps}
        case 1:
            part, degrees = pick(_PARTS), r.randrange(5, 100)
            text = pick(("turn the {0} by {1} degrees", "rotate the {0} {1} degrees")).format(part, spoken(degrees))
            return text, {"call": "turn", "part": part, "degrees": degrees}
        case 2:
            colour, thing = pick(_COLOURS), pick(_THINGS)
            text = pick(("pick up the {0} {1}", "grasp the {0} {1}", "take the {0} {1}")).format(colour, thing)
            return text, {"call": "grasp", "thing": thing, "colour": colour}
        case 3:
            colour, thing, place = pick(_COLOURS), pick(_THINGS), pick(_PLACES)
            text = pick(("put the {0} {1} on the {2}", "bring the {0} {1} to the {2}")).format(colour, thing, place)
            return text, {"call": "bring", "thing": thing, "colour": colour, "to": place}
        case 4:
            place, speed = pick(_PLACES), r.randrange(5, 100)
            text = pick(("drive to the {0} at {1} percent", "go to the {0} with {1} percent of your speed")).format(place, spoken(speed))
            return text, {"call": "drive", "to": place, "speed": speed}
        case _:
            thing, place = pick(_THINGS), pick(_PLACES)
            text = pick(("is there a {0} on the {1}", "look for a {0} near the {1}")).format(thing, place)
            return text, {"call": "look", "thing": thing, "at": place}


def commands(examples: int = 1000, *, tests: int = 300, seed: int = 0):
    """A `datasets.DatasetDict` of train (exactly `examples`), calibration and test (`tests`), columns as those of `data.corpus`.

    Raises ValueError when so many different commands can't be drawn.
    """
    import datasets

    wanted = {"train": examples, "calibration": min(tests, examples), "test": tests}
    columns: dict[str, dict[str, list]] = {s: {k: [] for k in ("domain", "id", "text", "prompt", "answer")} for s in SPLITS}
    r, seen, idle = random.Random(seed), set(), 0
    while idle < _PATIENCE and any(len(columns[s]["text"]) < wanted[s] for s in SPLITS):
        said, call = _command(r)
        target = split_of(f"{DOMAIN}:{said}")
        idle += 1
        if said in seen or len(columns[target]["text"]) == wanted[target]:
            continue
        seen.add(said)
        idle = 0
        prompt, answer = f"{USER}{said}{CALL}", json.dumps(call)
        row = {"domain": DOMAIN, "id": f"{DOMAIN}:{said}", "text": prompt + answer, "prompt": prompt, "answer": answer}
        for k, v in row.items():
            columns[target][k].append(v)
    short = next((s for s in SPLITS if len(columns[s]["text"]) < wanted[s]), None)
    if short:
        raise ValueError(
            f"{wanted[short]} different commands for {short} can't be drawn, only {len(columns[short]['text'])}; ask for fewer"
        )
    return datasets.DatasetDict({s: datasets.Dataset.from_dict(columns[s]) for s in SPLITS})
