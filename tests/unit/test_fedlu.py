"""FedLU: what it sends, who answers, what reaches the private model, and what MMFeD3 adds to it."""

import pytest
import torch

from experiments import all_values, generator, same_values, strategy_runtime, train_rounds
from fedsim.federated.fedlu import FedLU
from fedsim.federated.mmfed3 import MMFeD3


def test_fedlu_sends_rows_and_modules_alone_and_answers_with_the_private_model() -> None:
    """The global copy can be anything: the ranks are those of the private model."""
    runtime = strategy_runtime("fedlu", **{"model.imputer": "diffusion"})
    client = runtime.clients[0]
    assert runtime.server is not None
    update, report = client.train(1, client.own_part(runtime.server.begin_round(1)))
    assert update is not None
    assert (update.token_present, update.tokens, update.soft_queries) == (None, None, None)
    assert {"logit_to_client", "logit_to_global"} <= set(report.losses)
    assert not [name for name in report.losses if "feature" in name]
    before = client.evaluate("valid", 1, choose=True)
    assert [item.combination for item in before] == [0.0]
    client.values.params["global/entity"].normal_(generator=generator())
    client.forget_imputations()
    assert client.evaluate("valid", 1, choose=True) == before
    client.values.params["local/entity"].normal_(generator=generator())
    client.forget_imputations()
    assert client.evaluate("valid", 1, choose=True) != before


def test_fedlu_private_model_without_a_teacher_is_that_of_local_training() -> None:
    """The global copy is trained on the same relations and taught by the private model: none of it comes back."""
    settings = {"model.imputer": "zero", "distillation.logit_to_client": 0.0, "distillation.warmup_rounds": 0}
    together, alone = strategy_runtime("fedlu", **settings), strategy_runtime("local", **settings)
    for number, client in alone.clients.items():
        for name in client.values.params:
            client.values.params[name] = together.clients[number].values.params[name].clone()
    train_rounds(together, 2)
    train_rounds(alone, 2)
    for number, client in alone.clients.items():
        ours = together.clients[number].values.params
        assert all(torch.equal(value, ours[name]) for name, value in client.values.params.items())


def test_mmfed3_is_fedlu_once_all_else_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but who trains the relations: with MMFeD3 both views, with FedLU the private model."""
    monkeypatch.setattr(MMFeD3, "relation_views", FedLU.relation_views)
    off = {f"distillation.feature_to_{who}": 0.0 for who in ("client", "global")}
    off |= {"distillation.send_prototypes": False, "distillation.num_soft_queries": 0}
    one, other = strategy_runtime("mmfed3", **off), strategy_runtime("fedlu", **off)
    assert train_rounds(one, 3) == train_rounds(other, 3)
    one_values, other_values = all_values(one), all_values(other)
    assert same_values(
        *(
            {name: value for name, value in values.items() if "combination" not in name}
            for values in (one_values, other_values)
        )
    )
