"""What ``benchmarks/soak.py`` is made of: requests, who sends them, and what is checked afterwards."""
