"""Tests of architectures, adapters and wrappers: energies are those of the model's own logits, or the model is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from eua import EnergyGuard, EUAConfig, EUAError, EUATrainer
from eua.data.batches import flatten_rows, pad_rows
from eua.data.rows import EncodedRow, encode_rows
from eua.evaluation.metrics import measure_answers
from eua.guard.scores import answer_scores, prompt_scores
from eua.model.asking import answer
from eua.model.forward import check_head, check_ids, hidden_states, token_energies
from eua.model.head import output_head, output_module
from eua.model.loading import load_model
from eua.serving.engine import Engine
from eua.training.checks import check_padding_free
from tests.conftest import tiny_llama

V = 64
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_LIKE = SPECIAL | {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
GPT2_LIKE = SPECIAL | {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
# The config class, its options, and what the model's head has in addition to a matrix.
MODELS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "llama": ("LlamaConfig", LLAMA_LIKE, set()),
    "mistral": ("MistralConfig", LLAMA_LIKE, set()),
    "qwen2": ("Qwen2Config", LLAMA_LIKE, set()),
    "qwen3": ("Qwen3Config", LLAMA_LIKE, set()),
    "gemma2": ("Gemma2Config", LLAMA_LIKE | {"final_logit_softcapping": 3.0}, {"softcap"}),
    "gemma3": ("Gemma3TextConfig", LLAMA_LIKE | {"final_logit_softcapping": 3.0}, {"softcap"}),
    "phi3": ("Phi3Config", LLAMA_LIKE, set()),
    "phi": ("PhiConfig", LLAMA_LIKE, {"bias"}),
    "gpt2": ("GPT2Config", GPT2_LIKE, set()),
    "gptj": ("GPTJConfig", GPT2_LIKE | {"rotary_dim": 4}, {"bias"}),
    "gpt_neox": ("GPTNeoXConfig", LLAMA_LIKE, set()),
    "opt": (
        "OPTConfig",
        SPECIAL
        | {"vocab_size": V, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"word_embed_proj_dim": 16, "max_position_embeddings": 128},
        set(),
    ),
    "granite": ("GraniteConfig", LLAMA_LIKE | {"logits_scaling": 0.25}, {"logit_scale"}),
    "cohere": ("CohereConfig", LLAMA_LIKE | {"logit_scale": 3.0}, {"logit_scale"}),
    "cohere2": ("Cohere2Config", LLAMA_LIKE | {"logit_scale": 3.0}, {"logit_scale"}),
    "mixtral": ("MixtralConfig", LLAMA_LIKE | {"num_local_experts": 4}, set()),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        set(),
    ),
}
DEFAULTS: dict[str, Any] = {"bias": None, "logit_scale": 1.0, "softcap": None}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_model(name: str, vocabulary: int = V, **changed: Any) -> PreTrainedModel:
    """A tiny model in eval mode, with weights large enough for logits that are not flat."""
    config_class, options, _ = MODELS[name]
    return randomized(AutoModelForCausalLM.from_config(config_of(config_class, options | {"vocab_size": vocabulary} | changed)))


def config_of(name: str, options: dict[str, Any]) -> Any:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)(**options)


def randomized(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            of_vector = noise if name == "lm_head.bias" else parameter + 0.2 * noise
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else of_vector)
    return model.eval()


def padded_batch() -> dict[str, Tensor]:
    """Three rows of 4, 12 and 7 tokens, padded on the right."""
    ids = torch.randint(3, V, (3, 12), generator=torch.Generator().manual_seed(1)).tolist()
    batch = pad_rows([EncodedRow(row[:length], length // 2) for row, length in zip(ids, (4, 12, 7), strict=True)])
    assert (batch["attention_mask"] == 0).sum() == 13
    return batch


def plain_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()


def plain_energies(z: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Energy and NLL (B, S−1) of the counted tokens, from logits (B, S, V)."""
    z, targets = z[:, :-1], labels[:, 1:]
    counted = targets != -100
    energy = -temperature * torch.logsumexp(z / temperature, dim=-1)
    nll = F.cross_entropy(z.transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return energy.where(counted, 0.0), nll.where(counted, 0.0)


def assert_same_energies(model: nn.Module, temperature: float = 0.7) -> None:
    batch = padded_batch()
    with torch.no_grad():
        z = plain_logits(model, batch)
        found = token_energies(model, batch, temperature)
    tolerance = max(torch.finfo(output_head(model).weight.dtype).eps, 1e-5) * z.abs().max().item()
    for ours, theirs in zip(found, plain_energies(z, batch["labels"], temperature), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def assert_same_gradients(model: nn.Module) -> dict[str, Tensor]:
    batch = padded_batch()
    energy, nll = token_energies(model, batch, 0.7)
    found = gradients(model, energy.square().sum() + nll.sum())
    energy, nll = plain_energies(plain_logits(model, batch), batch["labels"], 0.7)
    expected = gradients(model, energy.square().sum() + nll.sum())
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=1e-6 * largest, msg=lambda text, name=name: f"{name}: {text}"
        )
    return found


# ---- architectures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_energies_are_those_of_the_models_logits(name, dtype):
    model = random_model(name).to(dtype)
    check_head(model)
    assert_same_energies(model)

    head, batch = output_head(model), padded_batch()
    assert head.weight is model.get_output_embeddings().weight
    has = {field for field, default in DEFAULTS.items() if getattr(head, field) is not default}
    assert {field for field in has if field != "logit_scale" or head.logit_scale != 1.0} == MODELS[name][2]
    with torch.no_grad():
        hidden = hidden_states(model, batch)
        theirs = -torch.logsumexp(plain_logits(model, batch), dim=-1)
    tolerance = torch.finfo(dtype).eps * theirs.abs().max()
    for field in MODELS[name][2]:  # leaving one out changes the energies enough for the check above to fail
        without = replace(head, **{field: DEFAULTS[field]}).energy(hidden, 1.0)
        assert (without - theirs).abs().max() > 10 * tolerance, field


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_tail_energies_are_those_of_the_models_logits(name, dtype):
    model, batch = random_model(name).to(dtype), padded_batch()
    with torch.no_grad():
        z = plain_logits(model, batch)
        hidden = hidden_states(model, batch)
    k = V // 8
    for side, fill in (("top", "zero"), ("bottom", "zero"), ("top", "none"), ("bottom", "none")):
        found = output_head(model).tail_energy(hidden, 1 / 8, side, fill, 2.0)
        sums = (z.topk(k, largest=side == "top").values / 2.0).exp().sum(dim=-1) + (V - k if fill == "zero" else 0)
        tolerance = max(torch.finfo(dtype).eps, 1e-5) * z.abs().max().item()
        torch.testing.assert_close(found.double(), -2.0 * sums.log(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_no_energy(name):
    model, batch = random_model(name), padded_batch()
    with torch.no_grad():
        together = token_energies(model, batch, 1.0).energy
        for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            alone = {key: tensor[row : row + 1, :length] for key, tensor in batch.items()}
            energy = token_energies(model, alone, 1.0).energy
            torch.testing.assert_close(together[row : row + 1, : length - 1], energy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_without_padding_are_kept_apart_or_refused(name, dtype):
    model, batch = random_model(name).to(dtype), padded_batch()
    if name == "opt":  # takes positions only from the attention mask
        with pytest.raises(
            EUAError, match=r"padding_free = True, but this model does not keep rows apart .* leave it at False"
        ):
            check_padding_free(model)
        return
    check_padding_free(model)
    flat = flatten_rows(batch)
    with torch.no_grad():
        alone = token_energies(model, batch, 1.0)
        together = token_energies(model, flat, 1.0)
    counted = [rows["labels"][:, 1:] != -100 for rows in (batch, flat)]
    assert counted[0].sum() == counted[1].sum()
    for theirs, ours in zip(alone, together, strict=True):
        tolerance = (1e-4 if dtype == torch.float32 else 0.05) * theirs.abs().max().item()
        torch.testing.assert_close(ours[counted[1]], theirs[counted[0]], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("MambaConfig", {}),  # carries its state from row to row
        ("BloomConfig", {"n_head": 4}),  # takes no position_ids
        ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_models_that_would_mix_rows_without_padding_are_refused(config, options):
    sizes = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2}
    model = randomized(AutoModelForCausalLM.from_config(config_of(config, sizes | options)))
    with pytest.raises(EUAError, match="padding_free = True"):
        check_padding_free(model)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gemma3", "granite", "cohere", "phi", "opt", "mixtral"])
def test_gradients_are_those_of_the_models_logits(name):
    model = random_model(name)
    found = assert_same_gradients(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name in {"gpt2", "gemma2", "gemma3", "cohere", "opt"})
    assert not tied or not any("lm_head" in parameter for parameter in found)


def test_hidden_states_are_those_after_the_last_projection():
    model, batch = random_model("opt"), padded_batch()
    assert hidden_states(model, batch).shape == (3, 12, 16)


def test_multimodal_wrapper_on_text():
    text = LLAMA_LIKE
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision | {"patch_size": 14},
        mm_tokens_per_image=1,
        image_token_index=0,
        boi_token_index=1,
        eoi_token_index=2,
    )
    model = randomized(transformers.Gemma3ForConditionalGeneration(config))
    check_head(model)
    assert_same_energies(model)
    # This wrapper does not softcap, even if its text config says so.
    model.config.text_config.final_logit_softcapping = 3.0
    with pytest.raises(EUAError, match=r"more between hidden states and logits .* the scale \(1\) and softcap \(3.0\)"):
        check_head(model)


def test_rows_of_a_padded_vocabulary_count():
    """Energies are over all logits of the model, even if the head has more rows than the tokenizer has tokens."""
    model = random_model("llama", vocabulary=50)
    model.resize_token_embeddings(50, pad_to_multiple_of=64)
    check_head(model)
    assert output_head(model).weight.shape[0] == 64
    assert_same_energies(model)
    batch = padded_batch()
    with torch.no_grad():
        energy = token_energies(model, batch, 1.0).energy
        narrow = plain_energies(plain_logits(model, batch)[..., :50], batch["labels"].clamp(max=49), 1.0)[0]
    assert (energy - narrow).abs().max() > 1e-3


def test_a_bias_is_scaled_with_the_rest():
    model = random_model("granite")
    model.lm_head = nn.Linear(32, V)
    randomized(model)
    assert model.lm_head.bias.abs().max() > 0.1
    check_head(model)
    assert_same_energies(model)
    assert_same_gradients(model)


# ---- unsupported heads ----------------------------------------------------------------------------------------------


def change_logits(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        output.logits = change(output.logits)
        return output

    model.register_forward_hook(hook)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [lambda z: 1.05 * z, lambda z: 30 * torch.tanh(z / 30), lambda z: z.log_softmax(dim=-1), lambda z: z + 0.2],
    ids=["scale", "softcap", "log_softmax", "constant"],
)
def test_what_the_config_does_not_state_is_refused(change, dtype):
    model = tiny_llama(V).to(dtype)  # fresh: its logits are so flat that a softcap of 30 hardly changes them
    check_head(model)
    change_logits(model, change)
    with pytest.raises(EUAError, match=r"LlamaForCausalLM does more between hidden states and logits than a matrix"):
        check_head(model)


@pytest.mark.parametrize(("field", "value"), [("logits_scaling", 2.0), ("logit_scale", 0.5), ("final_logit_softcapping", 30.0)])
def test_what_the_model_does_not_do_is_refused(field, value):
    """A field of the config may mean something else, or nothing, in another architecture."""
    model = tiny_llama(V)
    setattr(model.config, field, value)
    with pytest.raises(EUAError, match="that its config states .* this architecture is not supported"):
        check_head(model)


def test_a_model_that_multiplies_while_granite_divides_is_refused():
    options = LLAMA_LIKE | {"logits_scaling": 2.0}
    model = randomized(AutoModelForCausalLM.from_config(config_of("HyperCLOVAXConfig", options)))
    with pytest.raises(EUAError, match=r"HyperCLOVAXForCausalLM does more .* the scale \(0.5\)"):
        check_head(model)


def test_scores_are_not_made_by_a_head_that_was_never_checked():
    model = change_logits(tiny_llama(V), lambda z: 2 * z)
    with pytest.raises(EUAError, match="does more between hidden states and logits"):
        prompt_scores(model, [[3, 4, 5]])


def test_another_vocabulary_is_refused():
    model = change_logits(tiny_llama(V), lambda z: z[..., :60])
    with pytest.raises(EUAError, match=r"a head of 64 rows and returns logits of shape \(1, 8, 60\) for a row of 8 tokens"):
        check_head(model)


def test_a_head_called_twice_is_refused():
    class Twice(LlamaForCausalLM):
        def forward(self, **arguments: Any) -> Any:
            super().forward(**arguments)
            return super().forward(**arguments)

    with pytest.raises(EUAError, match="Twice called its head 2 times, on .* energies need one call"):
        check_head(Twice(tiny_llama(V).config))


LONG = [list(range(3, 3 + n)) for n in (4, 9, 8, 12)]


@pytest.mark.parametrize(
    ("name", "key"), [("gpt2", "n_positions"), ("gptj", "n_positions"), ("opt", "max_position_embeddings")]
)
def test_rows_beyond_learned_positions_are_named(name, key):
    model = random_model(name, **{key: 8})
    with pytest.raises(EUAError, match="Row 1 of the forget set has 9 tokens, but the model has learned 8 positions: shorten"):
        check_ids(model, LONG, "forget set")
    with pytest.raises(EUAError, match="Row 1 has 9 tokens"):
        measure_answers(model, [EncodedRow(ids, 2) for ids in LONG])
    for score in (prompt_scores, partial(prompt_scores, first_tokens=1), partial(answer_scores, window=1, new_tokens=1)):
        with pytest.raises(EUAError, match="Row 1 of the prompts has 9 tokens"):
            score(model, LONG)
    check_ids(model, LONG[::2])
    with pytest.raises(EUAError, match="Row 1 has 8 tokens and 2 generated ones"):
        check_ids(model, LONG[::2], new_tokens=2)


def test_the_last_generated_token_needs_no_position():
    """No model reads it."""
    model = random_model("gpt2", n_positions=8)
    ids = torch.tensor([LONG[0]])
    model.generation_config.eos_token_id = None
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, pad_token_id=0).shape == (1, 9)
    assert prompt_scores(model, LONG[:1], first_tokens=4).isfinite().all()
    assert answer_scores(model, LONG[:1], window=1, new_tokens=5).isfinite().all()
    for score in (partial(prompt_scores, first_tokens=5), partial(answer_scores, window=1, new_tokens=6)):
        with pytest.raises(EUAError, match="Row 0 of the prompts has 4 tokens and 6 generated ones"):
            score(model, LONG[:1])


def test_rows_beyond_computed_positions_are_counted_in_a_warning(caplog):
    model = random_model("llama", max_position_embeddings=8)
    check_ids(model, LONG, "forget set")
    check_ids(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), LONG, "retain set")
    check_ids(model, LONG[::2])
    text = "2 of 4 rows of the {} set are longer than the 8 positions for which the model was made"
    assert [message.partition(", and")[0] for message in caplog.messages] == [text.format(k) for k in ("forget", "retain")]


class Int8Linear(nn.Module):
    """A minimal quantized layer: integers, and a scale for each row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale)


def quantize_layers(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        for owner in (layer.self_attn, layer.mlp):
            for name, module in list(owner.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(owner, name, Int8Linear(module))


SMALL_DECODER = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
BART_LIKE = (
    SPECIAL | SMALL_DECODER | {"vocab_size": V, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
)
T5_LIKE = SPECIAL | {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
BERT_LIKE = {name: value for name, value in LLAMA_LIKE.items() if name not in ("num_key_value_heads", "head_dim")}
NO_ANSWER = "generates no text, so there is neither an answer to forget nor one to refuse: load a causal"
OTHER_KINDS = [
    ("BartForConditionalGeneration", "BartConfig", BART_LIKE, "is an encoder–decoder model, .*: use a causal language model"),
    ("T5ForConditionalGeneration", "T5Config", T5_LIKE, "is an encoder–decoder model"),
    ("WhisperForConditionalGeneration", "WhisperConfig", BART_LIKE, "is an encoder–decoder model"),
    ("BertForMaskedLM", "BertConfig", BERT_LIKE, NO_ANSWER),
    ("BertLMHeadModel", "BertConfig", BERT_LIKE, r"reads what follows a token, too .* or set is_decoder=True"),
    ("RobertaForCausalLM", "RobertaConfig", BERT_LIKE, r"reads what follows a token, too"),
]


@pytest.mark.parametrize(
    ("kind", "config", "options", "text"), OTHER_KINDS, ids=lambda part: part if isinstance(part, str) else ""
)
def test_models_that_do_not_write_from_left_to_right_are_refused(kind, config, options, text, tokenizer, rows, tmp_path):
    model = randomized(getattr(transformers, kind)(config_of(config, options | {"vocab_size": len(tokenizer)})))
    encoded = encode_rows(rows["forget"], tokenizer, None)
    settings = EUAConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    sets = {"forget_dataset": rows["forget"], "retain_dataset": rows["retain"]}
    guard = EnergyGuard(0.0, 1.0, "No.", (5,), (5,), 0.05, 100)
    entrances: list[Callable[[], Any]] = [
        lambda: EUATrainer(model, settings, processing_class=tokenizer, **sets),
        lambda: EnergyGuard.calibrate(model, tokenizer, rows["calibration"], tolerance=0.2),
        lambda: guard.score(model, tokenizer, "Who?"),
        lambda: measure_answers(model, encoded),
    ]
    if "reads what follows" not in text:  # known without a forward
        entrances += [lambda: guard.attach(model), lambda: answer(model, tokenizer, "Who?")]
        entrances += [lambda: Engine(model, tokenizer, None)]
    for enter in entrances:
        with pytest.raises(EUAError, match=f"{kind} {text}"):
            enter()


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        ("BertLMHeadModel", "BertConfig", BERT_LIKE | {"is_decoder": True}),
        ("RobertaForCausalLM", "RobertaConfig", BERT_LIKE | {"is_decoder": True}),
        ("BartForCausalLM", "BartConfig", BART_LIKE),
    ],
)
def test_decoders_of_such_families_are_taken(kind, config, options):
    check_head(randomized(getattr(transformers, kind)(config_of(config, options))))


def test_an_encoder_decoder_model_is_not_loaded_as_its_decoder(tokenizer, tmp_path):
    transformers.BartForConditionalGeneration(config_of("BartConfig", BART_LIKE)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(EUAError, match="is an encoder–decoder model, of which only the decoder would be loaded"):
        load_model(str(tmp_path))


def test_quantized_layers_leave_the_head_readable():
    model = random_model("llama")
    before = plain_logits(model, padded_batch())
    quantize_layers(model)
    assert (plain_logits(model, padded_batch()) - before).abs().max() > 1e-3
    check_head(model)
    assert_same_energies(model)
    assert set(assert_same_gradients(model)) >= {"lm_head.weight", "model.embed_tokens.weight"}


def test_a_quantized_head_is_refused():
    model = random_model("llama")
    model.lm_head = Int8Linear(model.lm_head)
    text = r"is a Int8Linear without a plain \(V, H\) weight matrix, .* leave the head out of quantization"
    with pytest.raises(EUAError, match=text):
        check_head(model)
    model = random_model("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(EUAError, match=r"without a plain \(V, H\) weight matrix"):
        check_head(model)


# ---- compiled and checkpointed --------------------------------------------------------------------------------------


def test_compiled_models():
    compilations = []

    def backend(graph: Any, example: Any) -> Any:
        compilations.append(graph)
        return aot_eager(graph, example)

    torch.compiler.reset()
    model = random_model("gemma2", num_hidden_layers=1)
    compiled: Any = torch.compile(model, backend=backend)
    check_head(compiled)
    assert not compilations
    batch = padded_batch()
    for _ in range(2):
        found = hidden_states(compiled, batch)
        torch.testing.assert_close(found, hidden_states(model, batch))
    assert len(compilations) == 1
    assert_same_energies(compiled)
    assert_same_gradients(compiled)


def test_a_model_that_was_compiled_and_run_before():
    torch.compiler.reset()
    compiled: Any = torch.compile(random_model("gemma2", num_hidden_layers=1), backend="aot_eager")
    batch = padded_batch()
    with torch.no_grad():  # compiles a graph without the hook on the head, which the same call would reuse
        compiled(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    check_head(compiled)
    assert_same_energies(compiled)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["gemma2", "gpt2", "mixtral"])
def test_gradient_checkpointing(name, use_reentrant):
    model, batch = random_model(name).train(), padded_batch()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = gradients(model, token_energies(model, batch, 1.0).energy.sum())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same_energies(model)
    model.zero_grad()
    token_energies(model, batch, 1.0).energy.sum().backward()
    for name, parameter in model.named_parameters():
        if name in plain:
            torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-3, atol=1e-5)


# ---- adapters -------------------------------------------------------------------------------------------------------


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options)


def move_adapter(model: nn.Module) -> nn.Module:
    """Change the adapter as training would: a fresh one has no effect yet."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return model.eval()


PREFIX = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
TIED_LORA = {"target_modules": ["c_attn"]}
# The model, the adapter, and the trainable parameters that must receive the head's gradient.
ADAPTERS: dict[str, tuple[str, Any, str]] = {
    "the head is trained": ("llama", lora(modules_to_save=["lm_head"]), "modules_to_save"),
    "the tied head is trained": ("gpt2", lora(**TIED_LORA, modules_to_save=["lm_head"]), "modules_to_save"),
    "the tied embedding is trained": ("gpt2", lora(**TIED_LORA, modules_to_save=["wte"]), "modules_to_save"),
    "DoRA": ("llama", lora(use_dora=True), "magnitude"),
    "all-linear": ("qwen3", lora(target_modules="all-linear"), "down_proj"),
    "LoRA on the embedding": ("llama", lora(target_modules=["embed_tokens"]), "lora_embedding"),
    "LoRA on the tied embedding": ("gpt2", lora(target_modules=["wte"]), "lora_embedding"),
    "tokens of the embedding": ("llama", lora(trainable_token_indices=[3, 5]), "trainable_tokens_delta"),
    "tokens of the tied embedding": ("gpt2", lora(**TIED_LORA, trainable_token_indices=[3, 5]), "trainable_tokens_delta"),
    "prefix tuning": ("llama", PREFIX, "prompt_encoder"),
}


@pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning")
@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_are_supported(case):
    name, adapter, trained = ADAPTERS[case]
    model = get_peft_model(random_model(name), copy.deepcopy(adapter))
    check_head(model)
    move_adapter(model)
    check_head(model)
    assert_same_energies(model)
    found = assert_same_gradients(model)
    assert any(trained in parameter for parameter in found)


ON_HEAD = "An adapter sits on the output head .* leave the head out of target_modules, or train all of it with modules_to_save"
REFUSED_ADAPTERS: dict[str, tuple[str, Any, str]] = {
    "LoRA on the head": ("llama", lora(target_modules=["lm_head", "q_proj"]), ON_HEAD),
    "LoRA on the head's parameter": ("llama", lora(target_parameters=["lm_head.weight"]), ON_HEAD),
    "tokens of the head": ("llama", TrainableTokensConfig(token_indices=[3], target_modules=["lm_head"]), ON_HEAD),
    "tokens of a tied head": ("gpt2", TrainableTokensConfig(token_indices=[3], target_modules=["wte"]), ON_HEAD),
    "prompt tuning": (
        "llama",
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        r"called its head 1 times, on \[\(2, 11, 32\)\], for tokens of shape \(2, 8\)",
    ),
}


@pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning")
@pytest.mark.parametrize("case", REFUSED_ADAPTERS)
def test_unsupported_adapters_are_refused(case):
    name, adapter, text = REFUSED_ADAPTERS[case]
    model = get_peft_model(random_model(name), copy.deepcopy(adapter))
    with pytest.raises(EUAError, match=text):
        check_head(model)


def test_a_disabled_adapter_gives_the_old_head():
    model = get_peft_model(random_model("llama"), lora(modules_to_save=["lm_head"]))
    move_adapter(model)
    trained = output_head(model).weight
    with model.disable_adapter():
        assert not torch.equal(output_head(model).weight, trained)
        assert_same_energies(model)


# ---- training -------------------------------------------------------------------------------------------------------


def trainer_of(model: Any, tokenizer: Any, rows: Any, folder: Path, peft_config: Any = None, **options: Any) -> EUATrainer:
    defaults = {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "save_strategy": "no"}
    defaults |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return EUATrainer(
        model,
        EUAConfig(output_dir=str(folder), **defaults | options),
        forget_dataset=rows["forget"][:4],
        retain_dataset=rows["retain"][:4],
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def saved_base(name: str, tokenizer: Any, folder: Path) -> Path:
    random_model(name, len(tokenizer)).save_pretrained(folder)
    return folder


def energies_of(model: nn.Module, trainer: EUATrainer) -> Tensor:
    with torch.no_grad():
        return token_energies(model.eval(), pad_rows(trainer.encoded_rows["forget"]), 1.0).energy


def assert_only_trainable_parameters_move(trainer: EUATrainer) -> set[str]:
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    return moved


@pytest.mark.filterwarnings("ignore:.*tie.*:UserWarning")
@pytest.mark.parametrize(
    ("case", "wrapped"),
    [
        ("the head is trained", False),
        ("the head is trained", True),
        ("the tied head is trained", False),
        ("DoRA", True),
        ("tokens of the tied embedding", False),
    ],
)
def test_adapters_are_trained_saved_and_loaded(case, wrapped, tokenizer, rows, tmp_path):
    name, adapter, trained = ADAPTERS[case]
    model, adapter = (
        AutoModelForCausalLM.from_pretrained(saved_base(name, tokenizer, tmp_path / "base")),
        copy.deepcopy(adapter),
    )
    trainer = trainer_of(
        get_peft_model(model, adapter) if wrapped else model, tokenizer, rows, tmp_path / "run", None if wrapped else adapter
    )
    before = energies_of(trainer.model, trainer)
    moved = assert_only_trainable_parameters_move(trainer)
    assert any(trained in parameter for parameter in moved)
    assert any("lora_" in parameter for parameter in moved)

    after = energies_of(trainer.model, trainer)
    assert (after - before).abs().max() > 1e-3
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(energies_of(loaded, trainer), after)


@pytest.mark.parametrize("loader", ["PeftModel", "AutoPeftModelForCausalLM"])
def test_boundaries_are_those_of_the_adapter_that_was_passed(loader, tokenizer, rows, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(saved_base("llama", tokenizer, tmp_path / "base"))
    plain = trainer_of(base, tokenizer, rows, tmp_path / "plain")._find_boundaries(resuming=False)
    move_adapter(get_peft_model(base, lora(modules_to_save=["lm_head"]))).save_pretrained(tmp_path / "adapter")

    if loader == "PeftModel":
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    else:
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    merged = copy.deepcopy(model).merge_and_unload()
    expected = trainer_of(merged, tokenizer, rows, tmp_path / "merged")._find_boundaries(resuming=False)
    trainer = trainer_of(model, tokenizer, rows, tmp_path / "run")
    found = trainer._find_boundaries(resuming=False)
    for kind in ("forget", "retain"):
        torch.testing.assert_close(torch.cat(found[kind]), torch.cat(expected[kind]), rtol=0, atol=1e-4)
        assert (torch.cat(found[kind]) - torch.cat(plain[kind])).abs().max() > 1e-3
    assert any("modules_to_save" in name for name in assert_only_trainable_parameters_move(trainer))


def test_training_a_compiled_model(tokenizer, rows, tmp_path):
    torch.compiler.reset()
    with pytest.raises(
        EUAError, match=r"wrapped by torch.compile, .* \(_orig_mod.\*\): pass the model itself, and torch_compile"
    ):
        trainer_of(torch.compile(random_model("llama", len(tokenizer))), tokenizer, rows, tmp_path)

    losses = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}, {"gradient_checkpointing": True}):
        folder = tmp_path / str(len(losses))
        model = random_model("llama", len(tokenizer), num_hidden_layers=1)
        trainer = trainer_of(model, tokenizer, rows, folder, logging_steps=1, **options)
        assert_only_trainable_parameters_move(trainer)
        losses.append([logged["loss"] for logged in trainer.state.log_history[:2]])
        trainer.save_model(str(folder / "model"))
        loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
        torch.testing.assert_close(energies_of(loaded, trainer), energies_of(trainer.model, trainer))
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


def test_training_a_multimodal_model_on_text(tokenizer, rows, tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = transformers.Gemma3Config(
        text_config=LLAMA_LIKE | {"vocab_size": len(tokenizer)},
        vision_config=vision | {"patch_size": 14},
        mm_tokens_per_image=1,
    )
    trainer = trainer_of(randomized(transformers.Gemma3ForConditionalGeneration(config)), tokenizer, rows, tmp_path)
    before = energies_of(trainer.model, trainer)
    trainer.train()
    assert (energies_of(trainer.model, trainer) - before).abs().max() > 1e-3
    assert trainer.model.config.get_text_config().use_cache


def test_training_with_a_padded_vocabulary(tokenizer, rows, tmp_path):
    model = random_model("gpt2", len(tokenizer))
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    assert model.get_output_embeddings().weight.shape[0] > len(tokenizer)
    trainer = trainer_of(model, tokenizer, rows, tmp_path)
    padding = output_module(model).weight[len(tokenizer) :].detach().clone()
    trainer.train()
    assert (output_module(model).weight[len(tokenizer) :] - padding).abs().max() > 0
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(energies_of(loaded, trainer), energies_of(model, trainer))
