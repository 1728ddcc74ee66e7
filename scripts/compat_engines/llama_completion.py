"""In place of llama.cpp's ``llama-completion`` program, which no package has: its library, and greedy."""

import argparse

import llama_cpp

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", required=True)
    parser.add_argument("-p", required=True)
    parser.add_argument("-n", type=int, required=True)
    parser.add_argument("-no-cnv", action="store_true")
    options = parser.parse_args()
    llm = llama_cpp.Llama(options.m, n_ctx=512, n_threads=2, verbose=False)
    print(options.p + llm(options.p, max_tokens=options.n, temperature=0, repeat_penalty=1)["choices"][0]["text"])
