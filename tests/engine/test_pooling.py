"""`--runner pooling`: an embedding is the last token's hidden state, whatever its company."""

import torch
from safetensors import safe_open
from vllm import TokensPrompt

from tests.support.engine import engine, generate
from tools.support.speaking import make_speaking
from tools.support.tiny import random_prompts

PROMPTS = random_prompts([5, 90, 300])


def embed(llm, prompts):
    requests = [TokensPrompt(prompt_token_ids=p) for p in prompts]
    return [torch.tensor(o.outputs.embedding) for o in llm.embed(requests, use_tqdm=False)]


def test_embeddings_lead_to_the_tokens_that_the_model_generates(tmp_path):
    model = make_speaking(tmp_path)
    options = {"skip_tokenizer_init": False, "max_num_seqs": 8}
    with engine(model, **options) as llm:
        tokens = [answer[0] for answer in generate(llm, PROMPTS, 1)]
    with engine(model, runner="pooling", **options) as llm:
        alone = [embed(llm, [prompt])[0] for prompt in PROMPTS]
        together = embed(llm, PROMPTS)
    with safe_open(model / "model.safetensors", "pt") as file:
        head = file.get_tensor("lm_head.weight").float()
    assert [int((head @ e).argmax()) for e in alone] == tokens
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
