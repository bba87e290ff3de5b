"""What a step with trees does on the device between its inputs and its sampled tokens. Nothing waits for the host.

One Triton kernel per file, each with a host version in ``trees`` that it has to equal. No vLLM here: the kernels are
compiled and, under TRITON_INTERPRET=1, run on machines that have no GPU.
"""
