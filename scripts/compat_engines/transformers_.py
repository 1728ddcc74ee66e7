"""transformers, from the directory's own code. Beside the tokens: logits bit for bit, every cache, saved and loaded."""

LIMITS = {}


def run(request, device="cpu"):
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    directory, source, scratch = request["directory"], request["source"], request["scratch"] + "/again"
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    with torch.no_grad():
        ids = torch.tensor([request["prompts"][0]], device=device)
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
                model, original = model.to(device), original.to(device)
                same = torch.equal(model(ids, use_cache=False).logits, original(ids, use_cache=False).logits)
                assert same, f"logits are not the original's: {options}"
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, torch_dtype=torch.float32).to(
            device
        )
        tokens = []
        for prompt in request["prompts"]:
            ids = torch.tensor([prompt], device=device)
            options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
            if device == "cuda":
                options["disable_compile"] = True  # of the static cache: minutes, and other rounding
            options["max_new_tokens"] = options["min_new_tokens"] = request["new_tokens"]
            made = model.generate(ids, use_cache=False, **options)
            for cache in ("dynamic", "static"):
                again = model.generate(ids, cache_implementation=cache, **options)
                assert torch.equal(again, made), f"generation with a {cache} cache differs from generation without"
            tokens.append(made[0, len(prompt) :].tolist())
        model.save_pretrained(scratch)
        again = AutoModelForCausalLM.from_pretrained(scratch, trust_remote_code=True, torch_dtype=torch.float32)
        again = again.to(device)
        assert torch.equal(again(ids).logits, model(ids).logits), "not the same after save_pretrained"
    return {
        "version": f"{transformers.__version__}, torch {torch.__version__}"
        + (f", {torch.cuda.get_device_name()}" if device == "cuda" else ""),
        "ids": [tokenizer(text).input_ids for text in request["texts"]],
        "tokens": tokens,
    }
