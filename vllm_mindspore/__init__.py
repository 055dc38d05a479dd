"""vLLM on MindSpore: vLLM's own PyTorch models, captured and run as one compiled MindSpore graph.

Importing this package imports neither torch nor MindSpore: vLLM imports it in every one of its processes.
"""
