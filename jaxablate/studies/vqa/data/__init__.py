"""The data of the VQA study: drawn scenes or a folder of questions behind one `open_vqa`."""

from jaxablate.studies.vqa.data.jsonl import read_questions, write_questions
from jaxablate.studies.vqa.data.language import Language
from jaxablate.studies.vqa.data.opening import open_captions, open_files, open_vqa, synthetic_questions
from jaxablate.studies.vqa.data.pictures import PictureSpec
from jaxablate.studies.vqa.data.questions import Question
from jaxablate.studies.vqa.data.rows import Rows
from jaxablate.studies.vqa.data.source import CaptionSource, VqaSource

__all__ = [
    "CaptionSource",
    "Language",
    "PictureSpec",
    "Question",
    "Rows",
    "VqaSource",
    "open_captions",
    "open_files",
    "open_vqa",
    "read_questions",
    "synthetic_questions",
    "write_questions",
]
