"""``vllm-lookahead bench``: programs that measure and print.

Each engine lives in a process of its own (``engine.py``), driven over a pipe (``worker.py``). What is measured is data
(``results.py``), from which alone tables (``tables.py``) and plots (``plot.py``) are made.
"""
