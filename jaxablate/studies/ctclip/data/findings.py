"""The 18 findings a CT-CLIP model is asked for, and the sentences it is asked with."""

from __future__ import annotations

from typing import Literal

FINDINGS: tuple[str, ...] = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)

PromptStyle = Literal["there_is", "original"]

# (positive, negative); `original` keeps the capital letter that upstream's prompts start with.
_TEMPLATES: dict[PromptStyle, tuple[str, str]] = {
    "there_is": ("There is {lower}.", "There is no {lower}."),
    "original": ("{name} is present.", "{name} is not present."),
}
PROMPT_STYLES: tuple[PromptStyle, ...] = ("there_is", "original")


def prompts(style: PromptStyle = "there_is") -> tuple[list[str], list[str]]:
    """The 18 positive and the 18 negative sentences, each in the order of `FINDINGS`.

    `there_is` is the study's default; `original` is the wording of the CT-CLIP paper's code.
    No finding has an acronym, so lower-casing the whole name reads right inside a sentence.
    """
    positive, negative = _TEMPLATES[style]
    return (
        [positive.format(name=name, lower=name.lower()) for name in FINDINGS],
        [negative.format(name=name, lower=name.lower()) for name in FINDINGS],
    )
