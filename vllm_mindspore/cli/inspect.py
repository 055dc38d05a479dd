"""`vllm-mindspore inspect MODEL`: the model's graph before and after each pass, and the emitted network.

Nothing is loaded but the configuration: weights are not read and MindSpore compiles nothing.
"""

import argparse
import os
from collections import Counter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a local directory or a hub id, as for `vllm serve`")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    parser.add_argument("--quantization", default=None, help="as for `vllm serve`")
    parser.add_argument("--max-model-len", type=int, default=None)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--graph", choices=("model", "logits", "all"), default="all", help="which graph to print")
    parser.add_argument("--pass", dest="graph_pass", default=None, help="print only the graph around this pass")
    parser.add_argument("--summary", action="store_true", help="matches, operators and paths only, no graphs")


def run(args: argparse.Namespace) -> int:
    """Capture and lower the model, printing what happens on the way."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm.engine.arg_utils import EngineArgs

    from vllm_mindspore.worker import inspection

    engine = EngineArgs(
        model=args.model,
        dtype=args.dtype,
        quantization=args.quantization,
        max_model_len=args.max_model_len,
        trust_remote_code=args.trust_remote_code,
        load_format="dummy",
    )
    names = [graph_pass.name for graph_pass in inspection.passes()]
    if args.graph_pass is not None and args.graph_pass not in names:
        raise SystemExit(f"--pass {args.graph_pass}: there is no such pass; the passes are {', '.join(names)}")
    for graph in inspection.inspect(engine.create_engine_config()):
        if args.graph in (graph.name, "all"):
            _print(graph, args)
    return 0


def _print(graph, args: argparse.Namespace) -> None:
    print(f"== graph {graph.name}")
    for report in graph.passes:
        print(f"pass {report.name}: {report.matches} matches, {report.seconds * 1e3:.1f} ms")
        if not args.summary and args.graph_pass in (None, report.name):
            print(f"-- before {report.name}\n{report.before}\n-- after {report.name}\n{report.after}")
    print("operators:")
    for name, count in Counter(graph.emitted.operators).most_common():
        print(f"  {count:5} {name}")
    print(f"classes of repeated layers: {graph.emitted.layer_classes}")
    print(f"emitted source: {graph.path}\n")
