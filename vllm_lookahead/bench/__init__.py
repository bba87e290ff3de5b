"""``vllm-lookahead bench``: programs that measure and print.

Each engine lives in a process of its own (``engine.py``; ``engines.py`` starts it and asks it). A benchmark gives a
table (``tables.py``), which is printed and goes into the result file beside the raw figures.
"""
