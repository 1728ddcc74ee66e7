"""Stand-ins for CUDA's libraries, so that ONNX Runtime's own CUDA provider opens a graph on a machine without a GPU.

Where each operator goes, whether the provider has a kernel for it, and whether it would capture a CUDA graph are
decided before anything runs. Device memory is the host's, kernels do nothing and every call succeeds, so numbers mean
nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

# What must do more than return 0. cudaDeviceProp: offsets of CUDA 12 and 13, for an A100.
_SOURCE = r"""
#include <stdlib.h>
#include <string.h>
static int take(void **p, size_t n) {
    *p = aligned_alloc(256, (n | 255) + 1);
    return *p ? (memset(*p, 0, n), 0) : 2;
}
static int device(void *prop) {
    int *ints = memset(prop, 0, 1008);
    *(size_t *)((char *)prop + 296) = 49152;
    ints[308 / 4] = 32, ints[320 / 4] = 1024, ints[360 / 4] = 8, ints[384 / 4] = ints[388 / 4] = 108;
    for (int i = 0; i < 3; i++) ints[324 / 4 + i] = ints[336 / 4 + i] = 1024;
    return 0;
}
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = 8; return 0; }
int cudaGetDevice(int *d) { *d = 0; return 0; }
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDeviceProperties(void *p, int d) { return device(p); }
int cudaGetDeviceProperties_v2(void *p, int d) { return device(p); }
int cudaDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 8 : a == 76 ? 0 : 1024; return 0; }
int cudaDriverGetVersion(int *v) { *v = 13000; return 0; }
int cudaRuntimeGetVersion(int *v) { *v = 13000; return 0; }
int cudaMemGetInfo(size_t *a, size_t *b) { *a = *b = (size_t)64 << 30; return 0; }
int cudaMalloc(void **p, size_t n) { return take(p, n); }
int cudaMallocHost(void **p, size_t n) { return take(p, n); }
int cudaHostAlloc(void **p, size_t n, unsigned f) { return take(p, n); }
int cudaFree(void *p) { free(p); return 0; }
int cudaFreeHost(void *p) { free(p); return 0; }
int cudaMemcpy(void *d, const void *s, size_t n, int k) { memcpy(d, s, n); return 0; }
int cudaMemcpyAsync(void *d, const void *s, size_t n, int k, void *q) { memcpy(d, s, n); return 0; }
int cudaMemset(void *d, int v, size_t n) { memset(d, v, n); return 0; }
int cudaMemsetAsync(void *d, int v, size_t n, void *q) { memset(d, v, n); return 0; }
int cudaStreamCreate(void **p) { return take(p, 256); }
int cudaStreamCreateWithFlags(void **p, unsigned f) { return take(p, 256); }
int cudaEventCreate(void **p) { return take(p, 256); }
int cudaEventCreateWithFlags(void **p, unsigned f) { return take(p, 256); }
int cudaStreamEndCapture(void *q, void **p) { return take(p, 256); }
int cudaGraphInstantiate(void **p) { return take(p, 256); }
int cublasCreate_v2(void **p) { return take(p, 256); }
int cublasLtCreate(void **p) { return take(p, 256); }
int cudnnCreate(void **p) { return take(p, 256); }
size_t cudnnGetVersion(void) { return 92000; }
const char *cudaGetErrorString(int e) { return "fake"; }
const char *cudaGetErrorName(int e) { return "fake"; }
void **__cudaRegisterFatBinary(void *p) { static void *one; return &one; }
"""
_DRIVER = ["cuInit"]  # our own calls
_CUDNN = "libcudnn.so.9"  # opened by name, so the provider does not list it


def available() -> bool:
    return all(map(shutil.which, ("cc", "nm", "readelf")))


def build(provider: Path, directory: Path) -> None:
    """Write the libraries that ``libonnxruntime_providers_cuda.so`` wants into a directory, for LD_LIBRARY_PATH."""

    def said(*command: str | Path) -> str:
        return subprocess.run([*command, provider], capture_output=True, text=True, check=True).stdout

    libraries = re.findall(r"\[(lib(?:cu|nv)[^]]*)\]", said("readelf", "-d"))
    wanted = set(re.findall(r"U ((?:__cuda|cuda|cu[A-Z]|cu(?:blas|dnn|fft|rand))\w+)", said("nm", "-D")))
    wanted |= {name.decode() for name in re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", provider.read_bytes())}
    wanted |= set(_DRIVER)
    wanted -= set(re.findall(r"(\w+)\(", _SOURCE))
    source = directory / "fake.c"
    source.write_text(_SOURCE + "".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(wanted)))
    subprocess.run(["cc", "-w", "-shared", "-fPIC", "-o", directory / _CUDNN, source], check=True)
    for library in libraries:
        shutil.copy(directory / _CUDNN, directory / library)
