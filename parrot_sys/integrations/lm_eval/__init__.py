"""lm-eval (0.4): the model `parrot`. Known to lm-eval once both packages are imported; see `__main__` for its CLI."""


def register() -> None:
    """Adds the model to the registry, without importing it."""
    from lm_eval.api.registry import model_registry

    model_registry.register("parrot", target="parrot_sys.integrations.lm_eval.lm_eval_model:ParrotLM")
