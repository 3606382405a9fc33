"""`--runner pooling`: an embedding is the last token's hidden state, whatever its company."""

from pathlib import Path

import torch
from safetensors import safe_open
from vllm import TokensPrompt

from tests.support.engine import engine, generate

MODEL = Path(__file__).parents[2] / "models" / "smollm2-lola"
STORY = "The miller went to the river and the river went to the sea. "
TEXTS = ["The capital of France is", f"{STORY * 20}The miller went to the", STORY * 30]


def embed(llm, prompts):
    requests = [TokensPrompt(prompt_token_ids=p) for p in prompts]
    return [torch.tensor(o.outputs.embedding) for o in llm.embed(requests, use_tqdm=False)]


def test_embeddings_lead_to_the_tokens_that_the_model_generates():
    options = {"skip_tokenizer_init": False, "max_num_seqs": 8, "max_num_batched_tokens": 2048}
    with engine(MODEL, **options) as llm:
        prompts = [llm.get_tokenizer().encode(text.strip()) for text in TEXTS]
        tokens = [answer[0] for answer in generate(llm, prompts, 1)]
    with engine(MODEL, runner="pooling", **options) as llm:
        alone = [embed(llm, [prompt])[0] for prompt in prompts]
        together = embed(llm, prompts)
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        head = file.get_tensor("model.embed_tokens.weight").float()  # tied
    assert [int((head @ e).argmax()) for e in alone] == tokens
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
