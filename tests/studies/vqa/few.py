"""The VQA study on a handful of questions, for tests that ask nothing of the answers."""

from __future__ import annotations

# 19 training questions of few scenes, on a base that knows nothing.
FEW = {
    "model.base": "random", "model.answer_tokens": "4", "data.scenes": "4", "data.sequences": "3",
    "data.questions.stage_1": "4", "data.questions.stage_2": "11", "data.questions.stage_3": "4",
    "training.eval_batch_size": "8", "host.mesh.member": "1", "host.mesh.data": "1",
}  # fmt: skip
