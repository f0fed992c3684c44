"""vLLM's plug-in: its transformers backend finds the multimodal model by the names in a run's config.json.

    vllm serve runs/instruct --model-impl transformers

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`), before a configuration is read.
"""


def register() -> None:
    """Make AutoConfig, AutoModel and AutoProcessor know the model, and transformers have its class by name."""
    import mllm.model  # noqa: F401 - importing it registers all; not at the top, since vLLM imports every plug-in
