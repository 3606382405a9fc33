"""Documents that were read apart, and which of them a question is about.

`compose` (`lola_vllm/core/ops/compose.py`) makes one state of a few documents. Of many documents a
question has to choose first: `choose.py` finds those that it reads, by the model's own attention.
"""
