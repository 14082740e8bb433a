"""The scrape: parses, has vLLM's names, counts what happened, and has labels from fixed sets only."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

VLLM = {
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:num_preemptions",
    "vllm:prompt_tokens", "vllm:generation_tokens", "vllm:request_success", "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits", "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens",
    "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds", "vllm:e2e_request_latency_seconds", "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens", "vllm:request_params_n", "vllm:request_params_max_tokens",
}  # fmt: skip
OURS = {
    "octavo_compiles", "octavo_compile_seconds", "octavo_compiles_after_ready", "octavo_steps", "octavo_tokens_used",
    "octavo_tokens_padded", "octavo_http_responses", "octavo_client_retries", "octavo_event_loop_lag_seconds",
    "octavo_last_step_age_seconds", "octavo_ready", "octavo_texts", "octavo_expert_tokens", "octavo_expert_imbalance",
    "octavo_step_seconds", "octavo_loop_seconds",
    "octavo_device_flops", "octavo_device_memory_bytes",
}  # fmt: skip
LABELS = {"model_name", "engine", "finished_reason", "le", "status", "bucket", "expert", "expert_layer", "phase"}


async def scrape(client: httpx.AsyncClient) -> dict[str, float]:
    """Sample name and its labels besides the model's -> value."""
    answer = await client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            assert sample.labels.keys() <= LABELS
            rest = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name + "".join(f" {k}={v}" for k, v in sorted(rest.items()))] = sample.value
    return found


async def test_names(client):
    await client.post("/v1/completions", json={"prompt": "x"})
    text = (await client.get("/metrics")).text
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {name for name in names if not name.endswith("_created")} == VLLM | OURS


async def test_values(client):
    await client.post("/v1/completions", json={"prompt": "abc", "n": 2, "max_tokens": 5})
    await client.post("/v1/completions", json={"prompt": "=ab", "max_tokens": 9, "stream": True})
    await client.post("/v1/completions", json={"prompt": "FAULT"}, headers={"x-stainless-retry-count": "1"})
    await client.get("/" + "random" * 9)
    found = await scrape(client)
    assert found["vllm:request_success_total finished_reason=length"] == 2
    assert found["vllm:request_success_total finished_reason=stop"] == 1
    assert found["vllm:request_success_total finished_reason=error"] == 1
    assert found["vllm:request_prompt_tokens_sum"] == 3 + 3 + 5 and found["vllm:request_prompt_tokens_count"] == 3
    assert found["vllm:request_generation_tokens_sum"] == 5 + 5 + 3
    assert found["vllm:time_to_first_token_seconds_count"] == 4
    assert found["vllm:inter_token_latency_seconds_count"] == 4 + 4 + 2 + 1
    assert found["vllm:request_params_n_sum"] == 4 and found["vllm:request_params_max_tokens_sum"] == 5 + 9 + 16
    assert found["vllm:e2e_request_latency_seconds_count"] == 3
    assert found["vllm:num_preemptions_total"] == 3 and found["vllm:kv_cache_usage_perc"] == 0.25
    assert found["octavo_steps_total bucket=decode_8"] == 11 and found["octavo_ready"] == 1
    assert found["octavo_device_flops_total"] == 4e9 and found["octavo_device_memory_bytes_total"] == 5e9
    assert found["octavo_step_seconds_total bucket=decode_8"] == 2.5
    assert found["octavo_loop_seconds_total phase=plan"] == 0.5
    assert found["octavo_client_retries_total"] == 1
    assert found["octavo_expert_tokens_total expert=0"] == 6 and found["octavo_expert_tokens_total expert=1"] == 8
    assert (
        found["octavo_expert_imbalance expert_layer=0"] == 1.5 and found["octavo_expert_imbalance expert_layer=1"] == 1
    )
    assert found["octavo_http_responses_total status=200"] == 2
    assert found["octavo_http_responses_total status=404"] == found["octavo_http_responses_total status=500"] == 1
