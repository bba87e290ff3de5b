"""``vllm-lookahead batch``: a file of prompts through engines on a Ray cluster, with a result for every row.

Ray does the work: ray.data reads, places, retries, writes and remembers what is written, and ray.data.llm runs the
engines. Here is what it lacks: the check of the input, the check that a resumed job is the same job, and the account of
what is done. Only ``pipeline`` and ``blocks`` import Ray.
"""
