"""lm-eval's own HFLM, to compare with and for who trusts it more; it tells no lengths and no gold answers."""

from collections.abc import Sequence
from typing import Any

from moe_harness.harness.core.errors import CannotJudge
from moe_harness.harness.gate import identity
from moe_harness.harness.gate.answerers.finding import DTYPES, Settings, registered_source
from moe_harness.harness.gate.answerers.tokens import Tokens, quiet
from moe_harness.harness.gate.exchange import Answer, Request


class Hflm:
    """HFLM with an experts implementation of transformers."""

    traceable = True

    def __init__(self, implementation: str, settings: Settings):
        try:
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            raise CannotJudge(f"hflm needs lm-eval[hf]: pip install 'moe-harness[eval]' ({error})") from error
        assert settings.model is not None
        self.implementation, self.settings = implementation, settings
        self.tokens = Tokens(settings.model)
        with quiet():
            self.model = HFLM(
                pretrained=str(settings.model), dtype=DTYPES[settings.dtype], device=settings.device,
                batch_size=settings.batch_size, experts_implementation=implementation,
            )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        assert self.settings.model is not None
        return {
            "spec": f"hflm:{self.implementation}", "source": registered_source(self.implementation),
            "model": identity.model_hash(self.settings.model),
            "dtype": self.settings.dtype, "batch_size": self.settings.batch_size,
            **identity.surroundings(self.settings.device),
        }  # fmt: skip

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        from lm_eval.api.instance import Instance

        instances = []
        for request in requests:
            self.tokens.prompt(request)  # that it fits; HFLM would cut it on the left
            arguments = {"until": list(request.until), "max_gen_toks": request.max_new_tokens, "do_sample": False}
            instances.append(Instance("generate_until", {}, (request.prompt, arguments), request.doc_id))
        texts = self.model.generate_until(instances, disable_tqdm=True)
        return [self._answer(request, text) for request, text in zip(requests, texts, strict=True)]

    def _answer(self, request: Request, text: str) -> Answer:
        length = len(self.tokens.encode(text))
        return Answer(request.key, text, length, "length" if length >= request.max_new_tokens - 1 else "stop")
