"""Drawn scenes of operations in which the answer to every question can be seen.

A scene has a procedure, which colours the rim of the picture; tissue of two textures, one or both; and up to three
tools that come in from the sides, each of a kind (its colour), as far in as it shows its parts. The cutting tool has
another name in each procedure, so questions about tools need the answer to the one about the procedure. What is
recommended follows from whether a cutting tool and a vessel are there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from jaxablate.studies.vqa.data import raster
from jaxablate.studies.vqa.data.prompts import Wording, instruction
from jaxablate.studies.vqa.data.questions import Question, joined
from jaxablate.studies.vqa.data.raster import Colour, Look
from jaxablate.studies.vqa.data.stages import StageRule, split_of, stage_of

GENERATOR = 4  # part of the cache key: raise it when a scene of the same seed changes

SIZE = 48  # pixels each way
Kind = Literal["clip", "swab", "cutter"]
Place = Literal["left", "right", "top", "bottom"]

PROCEDURES = ("open", "keyhole", "robotic")
TISSUES = ("fat", "vessel")
PARTS = ("shaft", "wrist", "jaw")
PLACES: tuple[Place, ...] = ("left", "right", "top", "bottom")
KINDS: tuple[Kind, ...] = ("clip", "swab", "cutter")
CUTTERS = {"open": "knife", "keyhole": "hook", "robotic": "laser"}
TOOL_NAMES = ("clip", "swab", *CUTTERS.values())
ADVICE = {(True, True): "clamp", (True, False): "cut", (False, True): "rinse", (False, False): "wait"}
MOST_TOOLS = 3

_TOOLS = (0.1, 0.3, 0.35, 0.25)  # how often there are 0, 1, … of them
_TISSUE = {("fat",): 0.4, ("vessel",): 0.3, ("fat", "vessel"): 0.3}
_FAINT = 0.12  # scenes so low in contrast that a tool is easily missed
_ABSENT = 0.08  # questions where a tool is that is not there, of those that could be about one that is
_PARTS_ASKED = 0.4  # of those about one that is there; the others ask where it is
_CAPTIONS = 6  # of a scene
_DISTINCT = 0.6  # scenes in which no two tools may be of a kind

_RIM: Mapping[str, Colour] = {
    "open": (20.0, 140.0, 130.0),
    "keyhole": (8.0, 8.0, 10.0),
    "robotic": (130.0, 120.0, 165.0),
}
_TOOL: Mapping[Kind, Colour] = {
    "clip": (40.0, 80.0, 225.0),
    "swab": (245.0, 245.0, 245.0),
    "cutter": (60.0, 205.0, 60.0),
}
_INWARD: Mapping[Place, tuple[int, int]] = {
    "left": (1, 0),
    "right": (-1, 0),
    "top": (0, 1),
    "bottom": (0, -1),
}
_RADIUS = 23.5  # of the opening that the scene is seen through
# Streams of random numbers: a change of what one is for leaves the others as they are.
_SCENE, _ASK, _PAINT, _LOOK, _TELL = range(5)


@dataclass(frozen=True)
class Tool:
    """A tool of a kind, at a side of the picture, that shows the first `parts` of PARTS."""

    kind: Kind
    place: Place
    parts: int


@dataclass(frozen=True)
class Scene:
    """What there is to be seen in a frame of a sequence.

    Attributes:
      contrast: of the tools: 1, or less in a faint scene.
    """

    seed: int
    sequence: int
    frame: int
    procedure: str
    tissues: tuple[str, ...]
    tools: tuple[Tool, ...]
    contrast: float

    @property
    def image_id(self) -> str:
        """Unlike that of any other scene of a set."""
        return f"seq{self.sequence:02d}_{self.frame:03d}"

    def name(self, kind: Kind) -> str:
        """What a tool of a kind is called in this procedure."""
        return CUTTERS[self.procedure] if kind == "cutter" else kind

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Those of the tools, each once."""
        return tuple(kind for kind in KINDS if any(tool.kind == kind for tool in self.tools))

    @property
    def advice(self) -> str:
        """What is recommended."""
        return ADVICE["cutter" in self.kinds, "vessel" in self.tissues]

    def alone(self, kind: Kind) -> Tool | None:
        """The tool of a kind of which there is one."""
        found = [tool for tool in self.tools if tool.kind == kind]
        return found[0] if len(found) == 1 else None


def scene(seed: int, sequence: int, frame: int) -> Scene:
    """The scene of a frame; a function of the three numbers."""
    rng = _rng(_SCENE, seed, sequence, frame)
    procedure = PROCEDURES[rng.integers(len(PROCEDURES))]
    tissues = list(_TISSUE)[rng.choice(len(_TISSUE), p=list(_TISSUE.values()))]
    number = rng.choice(len(_TOOLS), p=_TOOLS)
    places = sorted(rng.permutation(len(PLACES))[:number])
    distinct = rng.random() < _DISTINCT
    kinds = rng.permutation(len(KINDS))[:number] if distinct else rng.integers(len(KINDS), size=number)
    parts = 1 + rng.integers(len(PARTS), size=number)
    tools = tuple(
        Tool(KINDS[kind], PLACES[place], int(shown))
        for kind, place, shown in zip(kinds, places, parts, strict=True)
    )
    contrast = rng.uniform(0.25, 0.4) if rng.random() < _FAINT else 1.0
    return Scene(seed, sequence, frame, procedure, tissues, tools, contrast)


# -------------------------------------------------------------------------------------------- what is asked


def questions(scene: Scene, *, wording: Wording, rule: StageRule) -> list[Question]:
    """Four to six, of all three stages: how many depends on the frame alone, see `counts`."""
    rng = _rng(_ASK, scene.seed, scene.sequence, scene.frame)
    asked = [_procedure, _tools, *(_FURTHER[i] for i in sorted(rng.permutation(3)[: 1 + scene.frame % 3]))]
    found = [ask(scene, rng) for ask in (*asked, _treatment)]
    return [_question(scene, one, wording, rule) for one in found]


def counts(scenes: int, sequences: Sequence[int]) -> tuple[int, int, int]:
    """Questions of each stage about the first so many scenes of each sequence."""
    findings = sum(2 + frame % 3 for frame in range(scenes))
    return scenes * len(sequences), findings * len(sequences), scenes * len(sequences)


@dataclass(frozen=True)
class _Asked:
    category: str
    question: str
    answer: str
    candidates: tuple[str, ...]
    is_multi_label: bool = False


def _procedure(scene: Scene, rng: np.random.Generator) -> _Asked:
    return _Asked("PROCEDURE_TYPE", "Which procedure?", scene.procedure, PROCEDURES)


def _tools(scene: Scene, rng: np.random.Generator) -> _Asked:
    names = [scene.name(kind) for kind in scene.kinds]
    return _Asked("INSTRUMENT_DETECTION", "Which tools?", joined(names), (*TOOL_NAMES, "none"), True)


def _count(scene: Scene, rng: np.random.Generator) -> _Asked:
    numbers = tuple(str(number) for number in range(MOST_TOOLS + 1))
    return _Asked("INSTRUMENT_COUNT", "How many tools?", str(len(scene.tools)), numbers)


def _tissue(scene: Scene, rng: np.random.Generator) -> _Asked:
    # "type of": a finding all the same.
    return _Asked("ANATOMY_DETECTION", "What type of tissue?", joined(scene.tissues), TISSUES, True)


def _one_tool(scene: Scene, rng: np.random.Generator) -> _Asked:
    """Where a tool is, or what is seen of it."""
    missing: list[Kind] = [kind for kind in KINDS if kind not in scene.kinds]
    alone: list[Kind] = [kind for kind in scene.kinds if scene.alone(kind)]
    # One of them is not empty: three tools cannot be two of each kind.
    about = missing if missing and (not alone or rng.random() < _ABSENT) else alone
    kind = about[int(rng.integers(len(about)))]
    tool, name = scene.alone(kind), scene.name(kind)
    if tool is not None and rng.random() < _PARTS_ASKED:
        question, answer = f"Which parts of the {name}?", joined(PARTS[: tool.parts])
        return _Asked("INSTRUMENT_PARTS", question, answer, PARTS, True)
    answer = tool.place if tool else "none"
    return _Asked("INSTRUMENT_POSITION", f"Where is the {name}?", answer, (*PLACES, "none"))


def _treatment(scene: Scene, rng: np.random.Generator) -> _Asked:
    return _Asked("TREATMENT", "What do you recommend?", scene.advice, tuple(ADVICE.values()))


_FURTHER = (_count, _tissue, _one_tool)


def _question(scene: Scene, asked: _Asked, wording: Wording, rule: StageRule) -> Question:
    return Question(
        image_id=scene.image_id,
        image_filename=f"{scene.image_id}.png",
        question=asked.question,
        answer=asked.answer,
        instruction=instruction(
            asked.question, asked.candidates, is_multi_label=asked.is_multi_label, wording=wording
        ),
        question_type=asked.category.lower(),
        category=asked.category,
        is_multi_label=asked.is_multi_label,
        stage=stage_of(asked.category, asked.question, rule),
        sequence=str(scene.sequence),
        frame=str(scene.frame),
        dataset="synthetic",
        candidates=asked.candidates,
    )


def captions(scene: Scene) -> tuple[str, ...]:
    """Texts that go with the picture, in the words of the questions: what is in it, but nothing of what to do.

    Each says all of it, one thing after another in an order of its own: what stands first cannot be told from the rest
    of the text, so nothing can be learned by reading alone.
    """
    rng = _rng(_TELL, scene.seed, scene.sequence, scene.frame)
    kinds = joined([scene.name(kind) for kind in scene.kinds])
    ground = [
        f"procedure {scene.procedure}",
        f"tissue {joined(scene.tissues)}",
        f"tools {kinds}",
        f"count {len(scene.tools)}",
    ]

    def of(tool: Tool) -> str:
        alone = scene.alone(tool.kind) is not None
        seen = joined(PARTS[: tool.parts]) if alone and rng.random() < 0.5 else tool.place
        return f"{scene.name(tool.kind)} {seen}"

    def told() -> str:
        found = [*ground, *map(of, scene.tools)]
        return ". ".join(found[i] for i in rng.permutation(len(found))) + "."

    return tuple(told() for _ in range(_CAPTIONS))


# ------------------------------------------------------------------------------------------- what is drawn


def look(seed: int, sequence: int) -> Look:
    """How the camera of a sequence shows things; those of the test are further from the middle."""
    rng = _rng(_LOOK, seed, sequence, 0)
    far = 1.5 if split_of(sequence) == "test" else 1.0
    red, green, blue = 1 + far * rng.uniform(-0.1, 0.1, 3)
    return Look((red, green, blue), 1 + far * rng.uniform(-0.12, 0.12), 4 + far * rng.uniform(0, 6))


def draw(scene: Scene) -> npt.NDArray[np.uint8]:
    """The picture: uint8 (SIZE, SIZE, 3)."""
    rng = _rng(_PAINT, scene.seed, scene.sequence, scene.frame)
    picture = _ground(scene.tissues, rng)
    for tool in scene.tools:
        picture = _with_tool(picture, tool, scene.contrast, rng)
    picture = raster.blend(picture, raster.opening(SIZE, _RADIUS), _RIM[scene.procedure])
    return raster.seen(picture, look(scene.seed, scene.sequence), rng)


def _ground(tissues: Sequence[str], rng: np.random.Generator) -> raster.Pixels:
    """Fat is yellow with round bumps; a vessel red with dark streaks. Both lie side by side."""
    x, y = raster.middles(SIZE)
    phase, angle = rng.uniform(0, 2 * math.pi, 3), rng.uniform(0, math.pi)
    bumps = np.sin(x * 0.9 + phase[0]) * np.sin(y * 0.9 + phase[1])
    streaks = np.sin(1.1 * (x * math.cos(angle) + y * math.sin(angle)) + phase[2])
    fat = np.array((220.0, 170.0, 90.0)) + 25 * bumps[..., None]
    vessel = np.array((185.0, 60.0, 60.0)) + 30 * streaks[..., None]
    if tissues == ("fat",):
        return fat
    if tissues == ("vessel",):
        return vessel
    across = rng.uniform(0, 2 * math.pi)
    side = (x - SIZE / 2) * math.cos(across) + (y - SIZE / 2) * math.sin(across)
    return raster.blend(fat, np.clip(side / 2 + 0.5, 0, 1), vessel)


def _with_tool(
    picture: raster.Pixels, tool: Tool, contrast: float, rng: np.random.Generator
) -> raster.Pixels:
    inward = np.array(_INWARD[tool.place], float)
    side = np.array((-inward[1], inward[0]))
    turn = rng.uniform(-0.2, 0.2)
    along = math.cos(turn) * inward + math.sin(turn) * side
    start = SIZE / 2 * (1 - inward) + rng.uniform(-3, 3) * side
    colour = tuple(np.clip(np.array(_TOOL[tool.kind]) + rng.uniform(-15, 15, 3), 0, 255))

    def at(depth: float, sideways: float = 0.0) -> raster.Point:
        x, y = start + depth * along + sideways * np.array((-along[1], along[0]))
        return float(x), float(y)

    strokes = [(at(-2.0), at(9.0), 4.8, colour)]
    if tool.parts > 1:
        strokes.append((at(12.0), at(13.5), 4.0, (45.0, 45.0, 50.0)))
    if tool.parts > 2:
        strokes += [(at(17.0, 2 * way), at(21.5, 4 * way), 1.6, colour) for way in (-1.0, 1.0)]
    for begin, end, radius, paint in strokes:
        picture = raster.blend(picture, contrast * raster.stroke(SIZE, begin, end, radius), paint)
    return picture


def _rng(stream: int, seed: int, sequence: int, frame: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, (stream << 48) + (sequence << 32) + frame]))
