"""transformers on a CUDA device, in the interpreter that runs this."""

from compat_engines import transformers_

LIMITS = {}


def run(request):
    return transformers_.run(request, device="cuda")
