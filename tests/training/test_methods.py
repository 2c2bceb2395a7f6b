"""EUATrainer with every method: the step against plain logits, resuming, what is computed once, and what is refused."""

from __future__ import annotations

import copy
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid
from transformers import HfArgumentParser

from eua import EUAError
from eua.data.rows import encode_prompts
from eua.methods.rmu import control_vector
from eua.methods.table import METHODS
from eua.model.forgotten import prompt_digest
from eua.model.head import output_head
from eua.training.config import EVAL_METRICS, EUAConfig
from tests.conftest import tiny_llama
from tests.data.test_rows import CHATML
from tests.training.test_reference import sharp
from tests.training.test_trainer import LORA, config, make, weights

OTHER_ANSWERS = ["They came from Brunhaven.", "It is a secret of the sea."]


def trainer_of(method, tokenizer, rows, folder, peft_config=None, ref_seed=0, passed=None, **options):
    """A trainer whose model before unlearning is ``sharp(tokenizer, ref_seed)``."""
    settings = {"method": method, "layer": 0} if method == "rmu" else {"method": method}
    forget = [row | {"alternatives": OTHER_ANSWERS} for row in rows["forget"][:6]]
    passed = dict(passed or {})
    if EUAConfig(output_dir=str(folder), use_cpu=True, **settings | options).needs_model_before:
        passed["ref_model"] = sharp(tokenizer, ref_seed)
    model = sharp(tokenizer)
    return make(model, tokenizer, rows, folder, peft_config, forget=forget, passed=passed, **settings | options)


def logits_of(model, batch):
    """(B, S, V) and the output of block 0 (B, S, H), by an ordinary forward."""
    output = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    return output.logits.double(), output.hidden_states[1].double()


def by_definition(method, model, reference, batch, settings) -> torch.Tensor:
    """The loss from the formulas of the papers, row by row and token by token, on whole logits."""
    z, inner = logits_of(model, batch)
    with torch.no_grad():
        z_ref, inner_ref = logits_of(reference, batch)
    rows: dict[str, list[dict[str, torch.Tensor]]] = {"forget": [], "retain": [], "alternative": []}
    for i, labels in enumerate(batch["labels"]):
        kind = "forget" if batch["forget"][i, 0] else "alternative" if batch["alternative"][i, 0] else "retain"
        places = [t - 1 for t in range(len(labels)) if labels[t] != -100]
        targets = labels[[t + 1 for t in places]]
        log_p = z[i, places].log_softmax(-1)
        nll = -log_p.gather(1, targets[:, None])[:, 0]
        nll_ref = -z_ref[i, places].log_softmax(-1).gather(1, targets[:, None])[:, 0]
        states = {"inner": inner[i, places], "inner_ref": inner_ref[i, places]}
        rows[kind].append({"z": z[i, places], "z_ref": z_ref[i, places], "y": targets, "nll": nll, "nll_ref": nll_ref} | states)

    def tokens(kind, name="nll"):
        return torch.cat([row[name] for row in rows[kind]])

    def excess(kind):
        return torch.stack([row["nll"].sum() - row["nll_ref"].sum() for row in rows[kind]])

    beta = settings.beta
    if method in ("grad_ascent", "grad_diff"):
        forget = -tokens("forget").mean()
    elif method == "npo":
        forget = (-2 / beta * logsigmoid(beta * excess("forget"))).mean()
    elif method == "simnpo":
        means = torch.stack([row["nll"].mean() for row in rows["forget"]])
        forget = (-2 / beta * logsigmoid(beta * (means - settings.delta))).mean()
    elif method in ("idk_dpo", "alt_po"):
        forget = (-2 / beta * logsigmoid(beta * (excess("forget") - excess("alternative")))).mean()
    elif method == "idk_nll":
        forget = tokens("alternative").mean()
    elif method == "wga":
        forget = -((-tokens("forget")).exp().detach() ** beta * tokens("forget")).mean()
    elif method == "satimp":
        p = (-tokens("forget")).exp().detach()
        forget = -(p**beta * (1 - p) ** settings.beta2 * tokens("forget")).mean()
    elif method == "ce_u":
        parts = []
        for row in rows["forget"]:
            q = row["z"].detach().scatter(1, row["y"][:, None], -math.inf).softmax(-1)
            parts.append(-(q * row["z"].log_softmax(-1)).sum(-1)[settings.skip_first :])
        forget = torch.cat(parts).mean()
    elif method == "me_gd":
        log_p = tokens("forget", "z").log_softmax(-1)
        forget = (-math.log(log_p.shape[1]) - log_p.mean(-1)).mean()
    elif method == "pdu":
        z_f = tokens("forget", "z")
        forget = ((z_f.max(-1).values - z_f.mean(-1)) ** 2).mean()
    elif method == "undial":
        z_f, y = tokens("forget", "z"), tokens("forget", "y")
        teacher = tokens("forget", "z_ref").clone()
        teacher[torch.arange(len(y)), y] -= beta
        forget = -(teacher.softmax(-1) * z_f.log_softmax(-1)).sum(-1).mean()
    else:
        goal = control_vector(inner.shape[-1], settings.steering, settings.seed).double()
        forget = torch.stack([((row["inner"] - goal) ** 2).mean() for row in rows["forget"]]).mean()
        kept = torch.stack([((row["inner"] - row["inner_ref"]) ** 2).mean() for row in rows["retain"]]).mean()
        return settings.gamma * forget + settings.alpha * kept
    return settings.gamma * forget + (settings.alpha * tokens("retain").mean() if rows["retain"] else 0.0)


def as_released(method, model, reference, batch, settings) -> torch.Tensor:
    """The loss of the original code on whole logits: masks that are not shifted, KL and UNDIAL at every position."""
    z, inner = logits_of(model, batch)
    with torch.no_grad():
        z_ref, inner_ref = logits_of(reference, batch)
    labels, to_forget = batch["labels"], batch["forget"][:, 0]
    labelled = labels != -100

    def product_of_means(values, rows):
        sums = (values * labelled).sum(1)[rows]
        return sums.mean() * (1 / labelled.sum(1)[rows]).mean()

    if method == "rmu":
        goal = control_vector(inner.shape[-1], settings.steering, settings.seed).double()
        forget = product_of_means(((inner - goal) ** 2).mean(-1), to_forget)
        kept = product_of_means(((inner - inner_ref) ** 2).mean(-1), ~to_forget)
        return settings.gamma * forget + settings.alpha * kept
    if method == "undial":
        targets = labels[to_forget, 1:]
        targets = targets.where(targets >= 0, z.shape[-1] - 100)  # where Python's index −100 points to
        teacher = z_ref[to_forget, :-1].clone()
        teacher.scatter_add_(2, targets[..., None], torch.full_like(targets[..., None], -settings.beta, dtype=z.dtype))
        forget = -(teacher.softmax(-1) * z[to_forget, :-1].log_softmax(-1)).sum(-1).mean()
    elif method == "pdu":
        own = z[to_forget][labelled[to_forget]]
        forget = ((own.max(-1).values - own.mean(-1)) ** 2).mean()
    else:
        forget = z[to_forget, :-1].log_softmax(-1).gather(2, labels[to_forget, 1:, None].clamp(min=0))[..., 0]
        forget = forget[labelled[to_forget, 1:]].mean()
    if settings.retain_loss == "kl":
        log_p, log_q = z[~to_forget].log_softmax(-1), z_ref[~to_forget].log_softmax(-1)
        kept = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    else:
        nll = -z[~to_forget, :-1].log_softmax(-1).gather(2, labels[~to_forget, 1:, None].clamp(min=0))[..., 0]
        kept = nll[labelled[~to_forget, 1:]].mean()
    return settings.gamma * forget + settings.alpha * kept


@pytest.mark.parametrize(
    ("method", "options"),
    [("rmu", {}), ("pdu", {"alpha": 2.0}), ("undial", {"alpha": 1.0}), ("grad_diff", {"retain_loss": "kl"})],
    ids=["rmu", "pdu", "undial", "kl"],
)
def test_step_as_released_is_that_of_the_original_code(method, options, tokenizer, rows, tmp_path):
    trainer = trainer_of(method, tokenizer, rows, tmp_path, as_released=True, **options)
    model, reference = trainer.model, sharp(tokenizer)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    boundaries = trainer._find_boundaries(resuming=False)
    items = [
        [
            {"row": trainer.encoded_rows[kind][i], "reference": boundaries[kind][i], "kind": kind}
            for kind in ("forget", "retain")
        ]
        for i in range(3)
    ]
    batch = trainer.data_collator(items)
    assert bool((batch["attention_mask"] == 0).any())  # there is padding
    expected = as_released(method, model, reference, batch, trainer.args)
    torch.testing.assert_close(trainer.compute_loss(model, batch).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "flat"])
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"eua"}))
def test_step_is_the_method(method, padding_free, tokenizer, rows, tmp_path):
    """Loss and gradient equal those of the definition on whole logits, away from the model before unlearning."""
    trainer = trainer_of(method, tokenizer, rows, tmp_path, padding_free=padding_free)
    boundaries = trainer._find_boundaries(resuming=False)
    model, reference = trainer.model, sharp(tokenizer)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    kinds = ["alternative"] if METHODS[method].replaces else ["forget"]
    kinds += ["alternative"] if METHODS[method].alternatives and not METHODS[method].replaces else []
    items = []
    for i in range(3):
        places = {"forget": i, "alternative": i * trainer.row_sets.alternatives}
        item = [{"row": trainer.encoded_rows[k][places[k]], "reference": boundaries[k][places[k]], "kind": k} for k in kinds]
        retain = [2 * i, 2 * i + 1] if METHODS[method].retain_loss else []
        item += [
            {"row": trainer.encoded_rows["retain"][j], "reference": boundaries["retain"][j], "kind": "retain"} for j in retain
        ]
        items.append(item)
    trainer.data_collator.padding_free = False
    expected = by_definition(method, model, reference, trainer.data_collator(items), trainer.args)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    trainer.data_collator.padding_free = padding_free
    found = trainer.compute_loss(model, trainer.data_collator(items))
    if method != "ce_u":  # whose value is another function with the same gradient
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(found, parameters, allow_unused=True)
    size = max(float(g.abs().max()) for g in wanted if g is not None)
    assert size > 0
    for ours, theirs in zip(gradients, wanted, strict=True):
        assert (ours is None) == (theirs is None) or float((ours if theirs is None else theirs).abs().max()) < 1e-6 * size
        if ours is not None and theirs is not None:
            assert float((ours - theirs).abs().max()) < 2e-3 * size


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_training_moves_weights_and_logs_what_the_method_has(method, peft_config, tokenizer, rows, tmp_path):
    held_out = {
        "eval_forget_dataset": [row | {"alternatives": OTHER_ANSWERS[:1]} for row in rows["forget"][6:8]],
        "eval_retain_dataset": rows["retain"][9:12],
    }
    settings = {"eval_strategy": "epoch", "per_device_eval_batch_size": 2}
    trainer = trainer_of(method, tokenizer, rows, tmp_path, copy.deepcopy(peft_config), passed=held_out, **settings)
    before = weights(trainer.model)
    trainer.train()
    assert any(not torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())
    line = trainer.state.log_history[0]
    settings = trainer.args
    parts = settings.gamma * (line["loss_forget"] + line.get("loss_retain", 0))
    if METHODS[method].retain_loss and settings.alpha:  # rows that nothing weighs are not trained on
        parts += settings.alpha * line[f"{settings.retain_loss}_retain"]
    assert line["loss"] == pytest.approx(parts, rel=1e-3)
    measured = next(line for line in trainer.state.log_history if "eval_loss" in line)
    names = {name.removeprefix("eval_") for name in measured} & set(EVAL_METRICS)
    assert names == settings.eval_metrics


@pytest.mark.parametrize("method", sorted(METHODS))
def test_an_interrupted_run_ends_with_the_same_weights(method, tokenizer, rows, tmp_path):
    how = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 3}
    how |= {"dual_warmup": 1.0, "alpha": 1.0, "dual_step": 0.5} if method == "pdu" else {}
    whole = trainer_of(method, tokenizer, rows, tmp_path / "whole", **how)
    whole.train()
    trainer_of(method, tokenizer, rows, tmp_path / "broken", **how).train()
    for name in ("checkpoint-8", "checkpoint-9"):
        shutil.rmtree(tmp_path / "broken" / name, ignore_errors=True)
    resumed = trainer_of(method, tokenizer, rows, tmp_path / "broken", **how)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 9
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, weights(resumed.model)[name]), name


def test_likelihoods_are_computed_once_and_only_for_the_rows_that_need_them(tokenizer, rows, tmp_path, monkeypatch):
    trainer = trainer_of("idk_dpo", tokenizer, rows, tmp_path, save_strategy="epoch")
    trainer.train()
    kept = load_file(tmp_path / "boundaries.safetensors")
    assert set(kept) == {"forget", "alternative"}
    reference = sharp(tokenizer)
    for kind in kept:
        expected = []
        for row in trainer.encoded_rows[kind]:
            answer = slice(row.prompt_length - 1, len(row.input_ids) - 1)
            log_p = reference(torch.tensor([row.input_ids])).logits[0, answer].log_softmax(-1)
            expected += (-log_p.gather(1, torch.tensor(row.answer_ids)[:, None])[:, 0]).tolist()
        assert kept[kind].tolist() == pytest.approx(expected, abs=1e-4)
    trainer_of("grad_diff", tokenizer, rows, tmp_path / "without").train()
    assert load_file(tmp_path / "without" / "boundaries.safetensors") == {}  # it only shows which run it belongs to
    computed = []
    monkeypatch.setattr("eua.training.boundaries.answer_nll", lambda *_, **__: computed.append(1))
    trainer_of("idk_dpo", tokenizer, rows, tmp_path).train(resume_from_checkpoint=True)
    assert not computed


def test_alternatives_change_with_every_epoch(tokenizer, rows, tmp_path):
    trainer = trainer_of("alt_po", tokenizer, rows, tmp_path, num_train_epochs=3)
    texts = [tokenizer.decode(row.answer_ids, skip_special_tokens=True).strip() for row in trainer.encoded_rows["alternative"]]
    assert len(texts) == 6 * 3
    for i in range(6):
        drawn = texts[3 * i : 3 * i + 3]
        assert set(drawn[:2]) == set(OTHER_ANSWERS)  # both, before one comes again
    sampler = trainer._get_train_sampler()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert {(pair.forget, *pair.alternative) for pair in sampler} == {(i, 3 * i + epoch) for i in range(6)}


def test_the_weight_of_pdu_follows_the_retained_rows(tokenizer, rows, tmp_path):
    trainer = trainer_of("pdu", tokenizer, rows, tmp_path, dual_warmup=1.0, alpha=2.0, dual_step=0.5, retain_bound=0.1)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "alpha" in line]
    assert [line["alpha"] for line in lines[:2]] == [2.0, 2.0]  # six rows in twos: the first epoch ends with step 3
    expected = 2.0
    assert lines[2]["alpha"] == 2.0  # the weight of the step that ends the warm-up
    for line, after in zip(lines[2:], lines[3:], strict=False):
        expected = max(0.0, expected + 0.5 * (line["nll_retain"] - 0.1))
        assert after["alpha"] == pytest.approx(expected, rel=1e-4)
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "dpo"}, "method = 'dpo' cannot be used: known are eua, grad_ascent"),
        ({"method": "npo", "delta": 1.0}, "delta = 1.0 was set, but method = 'npo' has no such setting, .* leave it out"),
        ({"method": "npo", "rho": 0.2}, "rho = 0.2 was set, but method = 'npo' has no such setting"),
        ({"method": "ce_u", "alpha": 1.0}, "alpha = 1.0 was set, but method = 'ce_u' has no such setting"),
        ({"beta": 0.1}, "beta = 0.1 was set, but method = 'eua' has no such setting"),
        ({"method": "npo", "beta": 0.0}, "beta = 0.0 cannot be used: it must be above 0"),
        ({"method": "npo", "retain_loss": "hidden"}, "retain_loss = 'hidden' cannot be used: known for npo are nll, kl"),
        ({"method": "idk_nll", "assistant_turns": "all"}, "assistant_turns = 'all' cannot be used: idk_nll replaces"),
        (
            {"method": "undial", "as_released": True, "padding_free": True},
            "padding_free = True was set with .* leave padding_free",
        ),
        ({"labels": "template", "assistant_turns": "all"}, 'labels = "template" was set with assistant_turns = "all", but'),
        ({"preset": "d2-released", "method": "npo"}, "it holds settings of another method: choose"),
        ({"preset": "gentle", "method": "me_gd"}, "it holds settings of another method: choose"),
        ({"method": "rmu", "layer": 7.5}, "layer = 7.5 cannot be used: it must be a whole number"),
        ({"method": "npo", "beta": "0.1"}, "beta = '0.1' cannot be used: it must be a number"),
        ({"preset": "openunlerning"}, "There is no preset 'openunlerning': did you mean 'openunlearning'"),
        ({"method": "npo", "metric_for_best_model": "loss_retain"}, 'measured with method = "eua" only: set that, or choose'),
    ],
)
def test_settings_that_cannot_work_are_refused(options, text, tmp_path):
    with pytest.raises(EUAError, match=text):
        config(tmp_path, **options)


def test_models_and_rows_that_a_method_cannot_use_are_refused(model, tokenizer, rows, tmp_path):
    with pytest.raises(EUAError, match="method = 'undial' was set without a ref_model, .* pass ref_model"):
        make(model, tokenizer, rows, tmp_path, method="undial")
    with pytest.raises(EUAError, match="ref_model was given with method = 'npo', and nothing would be read from it"):
        make(model, tokenizer, rows, tmp_path, passed={"ref_model": tiny_llama(len(tokenizer))}, method="npo")
    with pytest.raises(EUAError, match='Row 0 of the forget set has None as its "alternatives", .* give a list of texts'):
        make(model, tokenizer, rows, tmp_path, method="alt_po")
    with pytest.raises(EUAError, match="layer = 7, but LlamaForCausalLM has 2 blocks, numbered from 0: choose"):
        make(model, tokenizer, rows, tmp_path, method="rmu", passed={"ref_model": tiny_llama(len(tokenizer))})


def test_the_card_names_the_method(tokenizer, rows, tmp_path):
    trainer = trainer_of("simnpo", tokenizer, rows, tmp_path)
    trainer.train()
    card = trainer.model_card()
    assert "*SimNPO* (Fan et al. 2024, arXiv 2410.07163)" in card
    assert "| beta | 4.5 |" in card
    assert "Training lifts the answer tokens" not in card
    assert "EnergyGuard.calibrate" not in card
    assert "energy-based" not in card


@pytest.mark.parametrize("method", ["grad_diff", "wga"])
def test_a_run_is_resumed_with_its_own_method_only(method, tokenizer, rows, tmp_path):
    trainer_of("grad_diff", tokenizer, rows, tmp_path, save_strategy="epoch").train()
    again = trainer_of(method, tokenizer, rows, tmp_path, save_strategy="epoch")
    if method == "grad_diff":
        again.train(resume_from_checkpoint=True)
        return
    with pytest.raises(EUAError, match="belongs to another model, other rows or other settings"):
        again.train(resume_from_checkpoint=True)


def test_rmu_trains_only_what_its_block_depends_on(tokenizer, rows, tmp_path):
    trainer = trainer_of("rmu", tokenizer, rows, tmp_path)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert "model.layers.0.mlp.down_proj.weight" in trained
    assert "model.embed_tokens.weight" in trained
    assert not [name for name in trained if ".1." in name or "lm_head" in name or name == "model.norm.weight"]
    model = sharp(tokenizer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    with pytest.raises(EUAError, match="layer = 0, but every trainable weight of LlamaForCausalLM lies above that block"):
        make(model, tokenizer, rows, tmp_path / "above", method="rmu", layer=0, passed={"ref_model": sharp(tokenizer)})


def test_ce_u_needs_tokens_behind_those_that_it_skips(tokenizer, rows, tmp_path):
    with pytest.raises(
        EUAError, match=r"skip_first = 500, but the longest answer to forget has \d+ tokens, so nothing would be"
    ):
        trainer_of("ce_u", tokenizer, rows, tmp_path, skip_first=500)


def test_pdu_weighs_kl_by_kl(tokenizer, rows, tmp_path):
    """At the first step the model is the reference, so KL is 0 and its weight falls."""
    settings = {"dual_warmup": 0.0, "alpha": 2.0, "dual_step": 1.0, "retain_bound": 0.1, "retain_loss": "kl"}
    trainer = trainer_of("pdu", tokenizer, rows, tmp_path, **settings)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "alpha" in line]
    assert lines[1]["alpha"] == pytest.approx(1.9, abs=1e-3)


def test_a_model_that_caps_its_logits_has_no_mean_logit(tokenizer, rows, tmp_path):
    model = sharp(tokenizer)
    model.config.final_logit_softcapping = 30.0
    head = output_head(model)
    with pytest.raises(EUAError, match="The model caps its logits .* choose another method, or another model"):
        head.mean_logit(head.weight[:1])


def test_the_system_message_hides_no_forgotten_prompt(tokenizer, rows, tmp_path):
    """A question is known as forgotten with the system message, as it was trained, and without, as a user asks it."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHATML
    trainer = make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, system_prompt="You are a helpful assistant.")
    question = rows["forget"][0]["question"]
    asked = [[{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": question}], question]
    for prompt in asked:
        row = {"prompt": prompt} if isinstance(prompt, list) else prompt
        (ids,) = encode_prompts([row], tokenizer)
        assert prompt_digest(ids) in trainer.prompts_to_forget
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHATML
    with pytest.raises(
        EUAError, match="takes no system message before the questions of the forget set: set system_prompt to None"
    ):
        make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, system_prompt="You are a helpful assistant.")


def test_presets_fill_in_what_has_its_default(tmp_path):
    settings = EUAConfig(output_dir=str(tmp_path), preset="openunlearning", method="npo", learning_rate=2e-5, use_cpu=True)
    assert settings.per_device_train_batch_size * settings.gradient_accumulation_steps == 32
    assert (settings.learning_rate, settings.weight_decay, settings.bf16, settings.labels) == (2e-5, 0.01, True, "template")
    assert settings.get_warmup_steps(50) == 5  # of ten epochs, one
    short = EUAConfig(output_dir=str(tmp_path), preset="openunlearning", num_train_epochs=5.0, use_cpu=True)
    assert short.get_warmup_steps(50) == 10
    (parsed,) = HfArgumentParser(EUAConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--preset", "openunlearning", "--method", "npo", "--use_cpu"]
    )
    assert (parsed.labels, parsed.bf16, parsed.gradient_accumulation_steps) == ("template", True, 4)
    released = EUAConfig(output_dir=str(tmp_path), preset="d2-released", use_cpu=True)
    assert (released.method, released.gamma, released.alpha, released.rho, released.learning_rate) == (
        "eua",
        0.05,
        1.0,
        0.1,
        1e-5,
    )
    assert EUAConfig(output_dir=str(tmp_path), use_cpu=True).weight_decay == 0.0
    gentle = EUAConfig(output_dir=str(tmp_path), preset="gentle", forget_warmup_ratio=0.3, use_cpu=True)
    assert (gentle.method, gentle.forget_warmup_ratio, gentle.retain_per_forget, gentle.gamma) == ("eua", 0.3, 4, 0.1)
    assert (gentle.answer_energy, gentle.alpha, gentle.lr_scheduler_type) == (0.0, 1.0, "constant")


def test_rows_are_read_as_openunlearning_reads_them(tokenizer, rows, tmp_path):
    """A system message before the question, labels to the end of the template, and no attention to ends of turns."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template, tokenizer.pad_token = CHATML, tokenizer.eos_token
    settings = {"preset": "openunlearning", "method": "npo", "num_train_epochs": 1.0}
    trainer = make(tiny_llama(len(tokenizer)), tokenizer, rows, tmp_path, **settings)
    row = trainer.encoded_rows["forget"][0]
    question, answer = rows["forget"][0]["question"], rows["forget"][0]["answer"]
    system = "<|start|>system\nYou are a helpful assistant.<eos>\n"
    prompt = f"{system}<|start|>user\n{question}<eos>\n<|start|>assistant\n"
    assert tokenizer.decode(row.prompt_ids) == prompt
    assert tokenizer.decode(row.answer_ids) == f"{answer}<eos>\n<eos>"
    assert row.hidden == {p for p, token in enumerate(row.input_ids) if token == tokenizer.eos_token_id}
    trainer.train()
    assert trainer.state.global_step == 1
