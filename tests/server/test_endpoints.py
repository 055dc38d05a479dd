"""What operators look at: health, models, metrics, version; and what the platform says about itself."""

import vllm

from tests.support import commands
from tests.support.server import NAME

PROMPT = "Return a new list"


def test_health_models_and_version(server):
    assert server.http.get("/health").status_code == 200
    assert [model.id for model in server.openai.models.list()] == [NAME]
    assert server.http.get("/version").json()["version"] == vllm.__version__


def test_metrics_count_requests_and_tokens(server, complete):
    names = ("generation_tokens_total", "prompt_tokens_total", "request_success_total")
    before = [server.metric(name) for name in names]
    usage = complete(PROMPT, max_tokens=10, ignore_eos=True).usage
    commands.wait_until(lambda: server.metric(names[2]) > before[2], 30, "the request is counted")
    grown = [server.metric(name) - value for name, value in zip(names, before, strict=True)]
    assert grown == [10, usage.prompt_tokens, 1]


def test_metrics_have_what_routers_read(server):
    assert server.metric("num_requests_waiting") == 0
    assert 0 <= server.metric("kv_cache_usage_perc") <= 1
    assert server.metric("cache_config_info") == 1


def test_closing_a_stream_aborts_its_request(server, complete):
    stream = complete(PROMPT, stream=True, max_tokens=2000, ignore_eos=True)
    next(iter(stream))
    assert server.metric("num_requests_running") == 1
    generated = server.metric("generation_tokens_total")
    stream.close()
    commands.wait_until(lambda: server.metric("num_requests_running") == 0, 10, "the closed stream's request ends")
    assert server.metric("generation_tokens_total") - generated < 1500, "it ended because of the abort"


def test_aborts_leave_no_cache_block_behind(server, complete):
    streams = [complete(f"{i} {PROMPT}", stream=True, max_tokens=1900, ignore_eos=True) for i in range(6)]
    for stream in streams:
        next(iter(stream))
    for stream in streams:
        stream.close()
    commands.wait_until(lambda: server.metric("num_requests_running") == 0, 10, "all aborted")
    commands.wait_until(lambda: server.metric("kv_cache_usage_perc") == 0, 10, "their KV cache blocks are free")


def test_pooling_is_refused(server):
    assert server.http.post("/v1/embeddings", json={"model": NAME, "input": "x"}).status_code == 404
