"""transformers, from the directory's own code. Beside the tokens: logits bit for bit, every cache, saved and loaded."""

LIMITS = {}


def run(request):
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    directory, source = request["directory"], request["source"]
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    with torch.no_grad():
        ids = torch.tensor([request["prompts"][0]])
        for dtype in (torch.float32, torch.bfloat16):
            for implementation in ("eager", "sdpa"):
                options = {"torch_dtype": dtype, "attn_implementation": implementation}
                model, info = AutoModelForCausalLM.from_pretrained(
                    directory, trust_remote_code=True, output_loading_info=True, **options
                )
                assert not any(info.values()), info
                original = LlamaForCausalLM.from_pretrained(source, **options)
                for i in request["attention"]:
                    attention = original.model.layers[i].self_attn
                    attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
                for i in request["mlp"]:
                    original.model.layers[i].mlp.forward = lambda x: torch.zeros_like(x)
                same = torch.equal(model(ids, use_cache=False).logits, original(ids, use_cache=False).logits)
                assert same, f"logits are not the original's: {options}"
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, torch_dtype=torch.float32)
        tokens = []
        for prompt in request["prompts"]:
            ids = torch.tensor([prompt])
            options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
            options["max_new_tokens"] = options["min_new_tokens"] = request["new_tokens"]
            made = model.generate(ids, use_cache=False, **options)
            for cache in ("dynamic", "static"):
                again = model.generate(ids, cache_implementation=cache, **options)
                assert torch.equal(again, made), f"generation with a {cache} cache differs from generation without"
            tokens.append(made[0, len(prompt) :].tolist())
        model.save_pretrained(request["scratch"] + "/again")
        again = AutoModelForCausalLM.from_pretrained(
            request["scratch"] + "/again", trust_remote_code=True, torch_dtype=torch.float32
        )
        assert torch.equal(again(ids).logits, model(ids).logits), "not the same after save_pretrained"
    return {
        "version": f"{transformers.__version__}, torch {torch.__version__}",
        "ids": [tokenizer(text).input_ids for text in request["texts"]],
        "tokens": tokens,
    }
